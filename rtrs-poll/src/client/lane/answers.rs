//! Completions: what came in, and for which request.
//!
//! A server that answers what was not asked, or otherwise than agreed, has lost count of buffers or keys; going on
//! with it would sooner or later end the wrong request. So every such message resets its path.

use reactor::Turn;
use rtrs_proto::Errno;
use rtrs_proto::client::{ClientImm, decode, parse_rkey_rsp};
use rtrs_proto::imm;
use verbs::{Wc, WcOp, WcStatus, wc_status};

use super::Lane;
use super::io::{Io, SessionKey};
use super::slab::Key;
use super::tag::{self, Tag};
use crate::client::upper::Upper;

impl<U: Upper> Lane<U> {
    pub(super) fn completion(&mut self, cx: &mut Turn<'_>, wc: &Wc) {
        let (tag, key) = tag::unpack(wc.wr_id);
        // Of a queue pair that is gone.
        let Some(con) = self.io.cons.get(key) else { return };
        match (wc.status, tag) {
            (WcStatus::Success, Tag::Send(retires)) => con.retire(retires),
            (WcStatus::Success, Tag::Recv(n)) => self.received(cx, key, n, wc),
            (WcStatus::Success, Tag::InfoRecv) => self.info_received(key, wc),
            (WcStatus::Flushed, _) => self.io.ended(key),
            (WcStatus::Error(wc_status::RETRY_EXC_ERR), _) => {
                self.io.broken(key, "the server has acknowledged nothing for too long (RETRY_EXC_ERR)");
            }
            (WcStatus::Error(code), _) => {
                self.io.broken(key, &format!("work completion: {} ({code})", wc_status::name(code)));
            }
        }
    }

    fn info_received(&mut self, key: Key, wc: &Wc) {
        if wc.op != WcOp::Recv || wc.imm.is_some() {
            return self.io.broken(key, "a message other than INFO_RSP came first");
        }
        let Io { links, cons, reports, .. } = &mut self.io;
        let Some(link) = cons.get(key).and_then(|c| links.get(c.link)) else { return };
        reports.info_rsp(link.path.id, link.memory.info_rsp(wc.byte_len));
    }

    /// A receive was used: what for, and what it brought.
    fn received(&mut self, cx: &mut Turn<'_>, key: Key, n: u32, wc: &Wc) {
        let Io { links, cons, .. } = &mut self.io;
        let Some(con) = cons.get(key) else { return };
        let Some(link) = links.get(con.link) else { return };
        link.path.heard();
        // Read before the receive is posted again, for the next message will overwrite it.
        let message = match (wc.op, link.rotating_keys) {
            (WcOp::Recv, true) => link.memory.key_message(n).filter(|_| wc.byte_len == 8),
            _ => None,
        };
        con.renew_receive(&link.memory, n, link.rotating_keys);
        let meaning = wc.imm.map(|imm| decode(&link.geometry, imm));
        self.io.mark(key);
        match (wc.op, meaning) {
            (_, None) => self.io.broken(key, "a message without immediate"),
            (_, Some(ClientImm::Response { id, result, .. })) => {
                self.answered(cx, key, wc.op, id, result, message);
            }
            (WcOp::RecvWriteImm, Some(ClientImm::HbMsg)) => {
                if let Some(con) = self.io.cons.get(key).filter(|c| c.can_beat()) {
                    con.push_imm(imm::HB_ACK);
                }
            }
            (WcOp::RecvWriteImm, Some(ClientImm::HbAck)) => self.io.hb_acked(key),
            (_, Some(ClientImm::HbMsg | ClientImm::HbAck)) => {
                self.io.broken(key, "a heartbeat as SEND");
            }
            (_, Some(ClientImm::Ignore(_))) => {
                let imm = wc.imm.unwrap_or(0);
                self.io.broken(key, &format!("immediate {imm:#010x}, which means nothing to a client"));
            }
        }
    }

    /// An answer about buffer `id`.
    fn answered(
        &mut self,
        cx: &mut Turn<'_>,
        key: Key,
        op: WcOp,
        id: u16,
        result: Result<(), Errno>,
        message: Option<[u8; 8]>,
    ) {
        let (session, cookie) = match self.io.answer(key, op, id, message) {
            Ok(found) => found,
            Err(why) => return self.io.broken(key, &why),
        };
        self.upper.completed(cx, &mut self.io, session, cookie, result.map_err(of_server));
    }
}

/// ECONNABORTED is what a lost session says.
fn of_server(errno: Errno) -> Errno {
    if errno == Errno::ECONNABORTED { Errno::EREMOTEIO } else { errno }
}

impl Io {
    /// Ends the request that an answer on `key` is about; returns its session and cookie.
    fn answer(
        &mut self,
        key: Key,
        op: WcOp,
        id: u16,
        message: Option<[u8; 8]>,
    ) -> Result<(SessionKey, u64), String> {
        let Self { links, cons, sessions, .. } = self;
        let con = cons.get(key).ok_or("the connection is gone")?;
        let link = links.get(con.link).ok_or("the path is gone")?;
        let rkey = new_key(link.rotating_keys, op, id, message)?;
        let session_key = link.session.ok_or("an answer before any request")?;
        let session = sessions.get(session_key).ok_or("the session is gone")?;
        let permits = &mut session.permits;
        let (Some(index), Some(pending)) = (permits.index(id), permits.pending(id)) else {
            return Err(format!("an answer about buffer {id}, which has no request in flight"));
        };
        if pending.con != Some(key) {
            // The order within a queue pair is all that says the data has come.
            return Err(format!("the answer about buffer {id} came on another connection than the request"));
        }
        let cookie = pending.cookie;
        if let (Some(rkey), Some(chunk)) = (rkey, link.chunks.get_mut(index)) {
            chunk.rkey = rkey;
        }
        permits.finish(id);
        con.inflight -= 1;
        link.inflight -= 1;
        link.counters().ended(1);
        Ok((SessionKey(session_key), cookie))
    }
}

/// The chunk's next key, if keys rotate. Then, and only then, answers come as SENDs.
fn new_key(rotating: bool, op: WcOp, id: u16, message: Option<[u8; 8]>) -> Result<Option<u32>, String> {
    match (rotating, op, message) {
        (false, WcOp::RecvWriteImm, _) => Ok(None),
        (false, ..) => Err("an answer as SEND, though keys are static".into()),
        (true, WcOp::Recv, Some(message)) => {
            parse_rkey_rsp(&message, id).map(Some).map_err(|e| e.to_string())
        }
        (true, ..) => Err(format!("an answer about buffer {id} without its next key")),
    }
}
