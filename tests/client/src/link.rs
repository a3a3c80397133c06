//! Connections of a path and what comes in on them.

use std::time::{Duration, Instant};

use rtrs_proto::client::{ClientImm, Rbufs, check_accept, decode, parse_rkey_rsp};
use rtrs_proto::imm::{HB_ACK, Imm};
use verbs::{
    CmEvent, CmId, ConnParams, Qp, QpCaps, RecvWr, RejectReason, SendOp, SendWr, SgeList, Wc, WcOp, WcStatus,
};
use zerocopy::FromBytes;

use crate::client::{Client, Reply};
use crate::outcome::ConnectError;

pub(crate) struct Con {
    // Before the connection's id goes with the `Cm`.
    pub qp: Box<dyn Qp>,
    pub id: CmId,
    pub up: bool,
    pub send_free: u32,
    /// The server disconnected it.
    pub dropped_by_server: bool,
}

const KIND_SEND: u64 = 0;
const KIND_RECV: u64 = 1;
const KIND_INFO: u64 = 2;

fn wr_id(kind: u64, con: usize, index: usize) -> u64 {
    kind << 56 | (con as u64) << 32 | index as u64
}

impl Client {
    /// Opens one connection with `private` as its request's private data; returns its index among the connections.
    ///
    /// # Errors
    /// [`ConnectError`]; the client stays usable.
    pub fn dial(&mut self, private: &[u8]) -> Result<usize, ConnectError> {
        let id = self.cm.resolve(self.opts.src, self.dst, self.opts.timeout)?;
        let result = self.dial_id(id, private);
        match result {
            Ok((qp, answer)) => {
                let send_free = self.opts.send_depth;
                self.cons.push(Con { qp, id, up: true, send_free, dropped_by_server: false });
                self.accept_bytes = answer;
                Ok(self.cons.len() - 1)
            }
            Err(e) => {
                self.cm.destroy(id);
                Err(e)
            }
        }
    }

    /// Sends a connection request and gives it up at once.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn knock(&mut self, private: &[u8]) -> Result<(), ConnectError> {
        let id = self.cm.resolve(self.opts.src, self.dst, self.opts.timeout)?;
        let result = self.request(id, private);
        self.cm.destroy(id);
        result.map(drop)
    }

    /// Sends the request of `id`.
    fn request(&mut self, id: CmId, private: &[u8]) -> Result<Box<dyn Qp>, ConnectError> {
        match self.cm_event(id, "route")? {
            CmEvent::Resolved(_) => {}
            other => return Err(ConnectError::Failed(format!("{other:?}"))),
        }
        if self.cq.is_none() {
            let device = self.cm.device(id).ok_or(ConnectError::Failed("no device".into()))?;
            let cons = u32::from(self.opts.cid_num.clamp(1, 64));
            let per_con = self.opts.send_depth + self.opts.recv_depth + 2;
            self.cq = Some(device.clone().create_cq((cons * per_con).min(device.info().max_cqe))?);
            self.device = Some(device);
        }
        let caps = QpCaps {
            max_send_wr: self.opts.send_depth,
            max_recv_wr: self.opts.recv_depth + 1,
            max_send_sge: 2,
            max_recv_sge: 1,
            domain: verbs::Domain::COMMON,
        };
        let handle = self.cq.as_ref().expect("created above").handle();
        let qp = self.cm.create_qp(id, &caps, &handle)?;
        self.cm.connect(id, ConnParams::FOREVER, private)?;
        Ok(qp)
    }

    fn dial_id(&mut self, id: CmId, private: &[u8]) -> Result<(Box<dyn Qp>, Vec<u8>), ConnectError> {
        let qp = self.request(id, private)?;
        match self.cm_event(id, "the answer to the connection request")? {
            CmEvent::Established { private, .. } => {
                check_accept(&private).map_err(|e| ConnectError::Protocol(e.to_string()))?;
                Ok((qp, private))
            }
            CmEvent::Rejected { reason: RejectReason::CONSUMER, private, .. } => {
                let (rsp, _) = rtrs_proto::wire::ConnRsp::read_from_prefix(&private)
                    .map_err(|_| ConnectError::Protocol("short private data in a reject".into()))?;
                Err(ConnectError::Rejected(rsp.errno.get()))
            }
            CmEvent::Rejected { reason, .. } => Err(ConnectError::Transport(reason)),
            other => Err(ConnectError::Failed(format!("{other:?}"))),
        }
    }

    /// Waits for an event of connection `id`; those of others are handled.
    fn cm_event(&mut self, id: CmId, what: &'static str) -> Result<CmEvent, ConnectError> {
        let end = Instant::now() + self.opts.timeout;
        while Instant::now() < end {
            match self.cm.poll()? {
                Some(event) if event.id() == id => return Ok(event),
                Some(event) => self.connection_event(&event),
                None => {
                    self.poll_cq();
                    idle();
                }
            }
        }
        Err(ConnectError::Timeout(what))
    }

    fn connection_event(&mut self, event: &CmEvent) {
        let id = event.id();
        let Some(con) = self.cons.iter_mut().find(|c| c.id == id) else { return };
        match event {
            CmEvent::Disconnected(_) => {
                con.up = false;
                con.dropped_by_server = true;
                // The answer that the server waits for.
                if let Err(e) = self.cm.disconnect(id) {
                    self.fault(format!("disconnect: {e}"));
                }
            }
            CmEvent::Failed { reason, .. } => {
                con.up = false;
                con.dropped_by_server = true;
                self.fault(reason.clone());
            }
            _ => {}
        }
    }

    /// Handles everything that has come in; answers heartbeats.
    pub fn pump(&mut self) {
        loop {
            match self.cm.poll() {
                Ok(Some(event)) => self.connection_event(&event),
                Ok(None) => break,
                Err(e) => return self.fault(e.to_string()),
            }
        }
        self.poll_cq();
    }

    /// Pumps for `time`.
    pub fn pump_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.pump();
            idle();
        }
    }

    /// Pumps until `done` returns something, `None` when `time` is over.
    pub(crate) fn pump_until<T>(
        &mut self,
        time: Duration,
        mut done: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<T> {
        let end = Instant::now() + time;
        loop {
            self.pump();
            if let Some(t) = done(self) {
                return Some(t);
            }
            if Instant::now() >= end {
                return None;
            }
            idle();
        }
    }

    fn poll_cq(&mut self) {
        let mut wcs = [Wc::default(); 64];
        while let Some(cq) = &mut self.cq {
            match cq.poll(&mut wcs) {
                Ok(0) => return,
                Ok(n) => wcs[..n].iter().for_each(|wc| self.completion(wc)),
                Err(e) => return self.fault(e.to_string()),
            }
        }
    }

    fn completion(&mut self, wc: &Wc) {
        let (kind, con, index) =
            (wc.wr_id >> 56, (wc.wr_id >> 32) as usize & 0xff_ffff, wc.wr_id as u32 as usize);
        if wc.wr_id != verbs::BIND_WR_ID && kind == KIND_SEND {
            self.cons[con].send_free += index as u32;
        }
        match wc.status {
            WcStatus::Success if kind == KIND_RECV => self.received(con, index, wc),
            WcStatus::Success if kind == KIND_INFO => self.info_rsp = Some(wc.byte_len as usize),
            WcStatus::Success | WcStatus::Flushed => {}
            WcStatus::Error(code) => self.fault(format!("work completion error {code}")),
        }
    }

    fn received(&mut self, con: usize, index: usize, wc: &Wc) {
        let key = match (&self.memory, wc.op) {
            (Some(m), WcOp::Recv) => Some(m.read_key(con, index, wc.byte_len as usize)),
            _ => None,
        };
        self.post_recv(con, index);
        match (wc.imm, wc.invalidated) {
            (Some(imm), _) => self.immediate(con, imm, key),
            (None, Some(_)) => {}
            (None, None) => self.violation("a SEND without immediate or invalidation".into()),
        }
    }

    fn immediate(&mut self, con: usize, imm: u32, key: Option<Vec<u8>>) {
        let Some(params) = self.params else { return };
        match decode(&params.geometry, imm) {
            ClientImm::Response { id, result, inval } => {
                if params.rotating_keys != key.is_some() {
                    self.violation(format!("response to id {id} by the wrong kind of message"));
                }
                if let Some(key) = key {
                    match parse_rkey_rsp(&key, id) {
                        Ok(rkey) => self.set_rkey(id, rkey),
                        Err(e) => self.violation(e.to_string()),
                    }
                }
                match self.expected.get_mut(&id).filter(|n| **n > 0) {
                    Some(n) => *n -= 1,
                    None => self.violation(format!("an answer for id {id} that nobody waits for")),
                }
                self.replies.push_back(Reply { con, id, result, inval });
            }
            ClientImm::HbMsg => {
                self.heartbeats += 1;
                if self.opts.answer_heartbeats && self.cons[con].up {
                    let _ = self.post_imm(con, HB_ACK);
                }
            }
            ClientImm::HbAck => self.heartbeat_acks += 1,
            ClientImm::Ignore(Imm::IoRsp { id, .. }) => self.violation(format!("an answer for id {id}")),
            ClientImm::Ignore(imm) => self.violation(format!("the server sent {imm}")),
        }
    }

    fn set_rkey(&mut self, id: u16, rkey: u32) {
        if let Some(rbufs) = &mut self.rbufs {
            rbufs.set_rkey(id, rkey);
        }
    }

    pub(crate) fn post_recv(&mut self, con: usize, index: usize) {
        let Some(memory) = &self.memory else { return };
        let wr =
            RecvWr { wr_id: wr_id(KIND_RECV, con, index), sges: SgeList::one(memory.key_sge(con, index)) };
        if self.cons[con].up
            && let Err(e) = self.cons[con].qp.post_recv(&[wr])
        {
            self.fault(format!("post_recv: {e}"));
        }
    }

    /// Posts the receive for INFO_RSP on con 0 and, unless told not to, all others.
    pub(crate) fn post_first_receives(&mut self) {
        let Some(memory) = &self.memory else { return };
        let info = RecvWr { wr_id: wr_id(KIND_INFO, 0, 0), sges: SgeList::one(memory.info_rsp()) };
        if let Err(e) = self.cons[0].qp.post_recv(&[info]) {
            return self.fault(format!("post_recv: {e}"));
        }
        if self.opts.post_receives {
            self.post_all_receives();
        }
    }

    /// Posts what [`crate::Opts::post_receives`] left out.
    pub fn post_all_receives(&mut self) {
        for con in 0..self.cons.len() {
            (0..self.opts.recv_depth as usize).for_each(|i| self.post_recv(con, i));
        }
    }

    /// Posts one send-queue request, signaled; waits for room.
    ///
    /// # Errors
    /// The queue pair is gone, or no room within the timeout.
    pub fn post(&mut self, con: usize, op: SendOp, sges: SgeList) -> Result<(), ConnectError> {
        let room = |c: &mut Self| (c.cons[con].send_free > 0 || !c.cons[con].up).then_some(());
        if self.cons[con].send_free == 0 && self.pump_until(self.opts.timeout, room).is_none() {
            return Err(ConnectError::Timeout("room in the send queue"));
        }
        self.try_post(con, op, sges)
    }

    /// As [`Client::post`], without waiting.
    ///
    /// # Errors
    /// The queue pair is gone or full.
    pub fn try_post(&mut self, con: usize, op: SendOp, sges: SgeList) -> Result<(), ConnectError> {
        let wr = SendWr { wr_id: wr_id(KIND_SEND, con, 1), op, sges, signaled: true };
        let con = &mut self.cons[con];
        con.qp.post_send(&[wr])?;
        con.send_free = con.send_free.saturating_sub(1);
        Ok(())
    }

    /// Posts an immediate without data.
    ///
    /// # Errors
    /// As [`Client::post`].
    pub fn post_imm(&mut self, con: usize, imm: u32) -> Result<(), ConnectError> {
        self.post(con, SendOp::WriteImm { addr: 0, rkey: 0, imm }, SgeList::EMPTY)
    }
}

/// Lets the other threads of a small machine run.
fn idle() {
    std::thread::yield_now();
}

/// Parses INFO_RSP.
pub(crate) fn parse_info(client: &Client, len: usize) -> Result<Rbufs, ConnectError> {
    let broken = |e: String| ConnectError::Protocol(e);
    let (memory, params) =
        (client.memory.as_ref().zip(client.params)).ok_or_else(|| broken("INFO_RSP before accept".into()))?;
    Rbufs::parse(&params.geometry, &memory.read_info_rsp(len)).map_err(|e| broken(e.to_string()))
}
