//! The side that is connected to: REQ in, REP, REJ or MRA out, RTU in.

use std::net::IpAddr;

use super::active::time_code;
use super::admit::{self, Offer, Refusal, is_usable_qpn};
use super::agent::{Agent, Repeat, State};
use super::message::of;
use super::{
    AcceptParams, Action, Attributes, Body, ConnId, Error, Ids, MS, Mra, REJ_PRIVATE, REP_PRIVATE, Rej, Rep,
    Req, Why, is_own_guid, reason,
};
use crate::{Counter, Counters, Nanos};

/// How long a peer shall wait for a slow consumer, time code: 17 s, and it may ask again.
const PATIENCE: u8 = 22;

impl Agent {
    pub(super) fn on_req(
        &mut self,
        now: Nanos,
        path: (IpAddr, IpAddr),
        tid: u64,
        req: &Req,
        path_mtu: impl FnOnce(IpAddr, IpAddr) -> u32,
        counters: &Counters,
    ) -> Result<(), Counter> {
        let remote = (req.guid, req.local_id);
        if let Some(id) = self.by_remote.get(&remote).copied() {
            return self.on_repeated_req(path, id, counters);
        }
        let offer = match admit::check(&self.listeners, req, path.1, path.0, path_mtu) {
            Ok(offer) => offer,
            Err(Refusal::Forged) => return Err(Counter::CmWrongSource),
            Err(Refusal::Reject(reason, info)) => {
                let info = info.as_ref().map_or(&[][..], |gid| &gid[..]);
                return self.refuse_stranger(now, path, tid, req, reason, info);
            }
        };
        if let Some(old) = self.by_qpn.get(&(req.guid, req.qpn)).copied() {
            self.end_stale(now, old, path);
            return self.refuse_stranger(now, path, tid, req, reason::STALE_CONNECTION, &[]);
        }
        // No answer over the limits: the peer asks again, and may find room then.
        let (max, max_per_source) = (self.config.max_half_open, self.config.max_half_open_per_source);
        if !self.half_open.enter(path.1, max, max_per_source) {
            return Err(Counter::CmLimited);
        }
        if !self.listeners.enter(offer.listener) {
            self.half_open.leave(path.1);
            return Err(Counter::CmLimited);
        }
        self.ask_consumer(now, path, tid, remote, offer);
        Ok(())
    }

    fn ask_consumer(
        &mut self,
        now: Nanos,
        path: (IpAddr, IpAddr),
        tid: u64,
        remote: (u64, u32),
        offer: Offer,
    ) {
        let id = ConnId((self.config.next_id)());
        let refuse_at = now.saturating_add(self.config.answer_timeout);
        self.create(id, State::Requested { offer, refuse_at }, path, tid);
        if let Some(conn) = self.conns.get_mut(&id) {
            (conn.remote, conn.remote_qpn, conn.ack_timeout) = (Some(remote), offer.qpn, offer.ack_timeout);
        }
        self.by_remote.insert(remote, id);
        self.by_qpn.insert((remote.0, offer.qpn), id);
        self.arm(id, now.saturating_add(self.config.mra_after));
        self.act(Action::Request {
            listener: offer.listener,
            conn: id,
            private: offer.private,
            local: offer.local,
            peer: offer.peer,
            own_peer: is_own_guid(remote.0),
            mtu: offer.mtu,
            reads: offer.reads,
        });
    }

    /// The peer has not heard our answer, or there is none yet.
    fn on_repeated_req(
        &mut self,
        path: (IpAddr, IpAddr),
        id: ConnId,
        counters: &Counters,
    ) -> Result<(), Counter> {
        let conn = self.conns.get(&id).ok_or(Counter::CmStale)?;
        if (conn.local, conn.peer) != path {
            return Err(Counter::CmWrongSource);
        }
        let has_answer = conn.answer.is_some();
        match conn.state {
            State::Requested { .. } | State::RepSent | State::TimeWait if has_answer => self.send_again(id),
            State::DreqSent { refuse: true } => {
                let (tid, rej) = (conn.tid, refusal(conn.ids().remote));
                self.send_to(path, tid, Body::Rej(rej));
            }
            _ => return Err(Counter::CmStale),
        }
        counters.count(Counter::CmRetries);
        Ok(())
    }

    fn refuse_stranger(
        &mut self,
        now: Nanos,
        path: (IpAddr, IpAddr),
        tid: u64,
        req: &Req,
        reason: u16,
        info: &[u8],
    ) -> Result<(), Counter> {
        let rej = Rej::with_info(Ids { local: 0, remote: req.local_id }, of::REQ, reason, info);
        self.send_to_stranger(now, path, tid, Body::Rej(rej))?;
        Err(Counter::CmRejected)
    }

    /// The consumer takes its time: asks the peer for patience once, then refuses in its place.
    pub(super) fn hurry(&mut self, now: Nanos, id: ConnId, refuse_at: Nanos) {
        let Some(conn) = self.conns.get(&id) else { return };
        if now >= refuse_at || conn.answer.is_some() {
            self.event(id, |conn| Action::Unreachable { conn, why: Why::Unanswered });
            self.refuse(now, id, &[]);
            return;
        }
        let (path, tid) = ((conn.local, conn.peer), conn.tid);
        let mra = Mra { ids: conn.ids(), of: of::REQ, timeout: PATIENCE };
        let mad = self.send_to(path, tid, Body::Mra(mra));
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.answer = Some(mad);
        }
        self.arm(id, refuse_at);
    }

    /// Accepts a request. [`Action::QpReady`] comes at once, [`Action::Established`] when the peer has confirmed.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::WrongState`] (the peer or time may have been faster), [`Error::PrivateTooLong`],
    /// [`Error::Invalid`].
    pub fn accept(&mut self, now: Nanos, conn: ConnId, params: &AcceptParams<'_>) -> Result<(), Error> {
        let id = conn;
        let conn = self.owned(id)?;
        let State::Requested { offer, .. } = conn.state else { return Err(Error::WrongState) };
        let mut private = [0; REP_PRIVATE];
        let head = private.get_mut(..params.private.len()).ok_or(Error::PrivateTooLong(REP_PRIVATE))?;
        head.copy_from_slice(params.private);
        if !is_usable_qpn(params.qp.qpn) {
            return Err(Error::Invalid);
        }
        let serve = params.reads.serve.min(offer.reads.serve);
        let issue = params.reads.issue.min(offer.reads.issue);
        let attrs = Attributes {
            local: conn.local,
            peer: conn.peer,
            qpn: params.qp.qpn,
            dest_qpn: offer.qpn,
            send_psn: offer.start_psn,
            recv_psn: params.qp.start_psn,
            mtu: offer.mtu,
            ack_timeout: offer.ack_timeout,
            retry: offer.retry,
            rnr_retry: offer.rnr_retry,
            serve_reads: serve,
            issue_reads: issue,
            own_peer: conn.remote.is_some_and(|(guid, _)| is_own_guid(guid)),
        };
        let rep = Rep {
            ids: conn.ids(),
            qpn: params.qp.qpn,
            start_psn: params.qp.start_psn,
            responder_resources: serve,
            initiator_depth: issue,
            ack_delay: params.ack_delay.min(31),
            rnr_retry: params.rnr_retry.min(7),
            guid: self.identity.guid,
            private,
        };
        // Faster than the peer's own time at first: most likely the REP was lost, not slow.
        let repeat = Repeat {
            left: offer.max_retries.max(1),
            interval: self.config.retry_interval,
            max_interval: time_code(offer.response_timeout).clamp(1000 * MS, self.config.max_retry_interval),
            until: now.saturating_add(self.config.give_up_after),
            patience: false,
        };
        let tid = conn.tid;
        self.enter(id, State::RepSent);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.qp = Some(params.qp);
        }
        self.act(Action::QpReady { conn: id, attrs });
        self.send_until_answered(now, id, tid, Body::Rep(rep), repeat);
        Ok(())
    }

    /// Refuses a request in the consumer's name. No event follows.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::WrongState`], [`Error::PrivateTooLong`] over [`REJ_PRIVATE`] bytes.
    pub fn reject(&mut self, now: Nanos, conn: ConnId, private: &[u8]) -> Result<(), Error> {
        if !matches!(self.owned(conn)?.state, State::Requested { .. }) {
            return Err(Error::WrongState);
        }
        if private.len() > REJ_PRIVATE {
            return Err(Error::PrivateTooLong(REJ_PRIVATE));
        }
        self.refuse(now, conn, private);
        Ok(())
    }

    /// `private` fits.
    pub(super) fn refuse(&mut self, now: Nanos, id: ConnId, private: &[u8]) {
        let Some(conn) = self.conns.get(&id) else { return };
        let (path, tid) = ((conn.local, conn.peer), conn.tid);
        let mut rej = refusal(conn.ids().remote);
        rej.private[..private.len()].copy_from_slice(private);
        let mad = self.send_to(path, tid, Body::Rej(rej));
        self.bury_with(now, id, Some(mad));
    }

    pub(super) fn on_rtu(&mut self, path: (IpAddr, IpAddr), ids: Ids) -> Result<(), Counter> {
        let conn = self.find_both(path, ids)?.ok_or(Counter::CmStale)?;
        let id = conn.id;
        match conn.state {
            State::RepSent => {
                self.confirm(id);
                Ok(())
            }
            // Our DREQ overtook our REP: the peer answers it without knowing the connection that it now has.
            State::DreqSent { .. } | State::TimeWait => {
                let (tid, body) = (conn.tid, conn.dreq());
                self.send_to(path, tid, body);
                Err(Counter::CmStale)
            }
            _ => Err(Counter::CmStale),
        }
    }

    /// A valid packet came for the connection's queue pair, which says as much as an RTU: that the peer is ready.
    /// Cheap, and does nothing if that was known.
    pub fn data_arrived(&mut self, conn: ConnId) {
        if self.conns.get(&conn).is_some_and(|conn| matches!(conn.state, State::RepSent)) {
            self.confirm(conn);
        }
    }

    fn confirm(&mut self, id: ConnId) {
        self.disarm(id);
        self.enter(id, State::Established);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.answer = None;
        }
        self.event(id, |conn| Action::Established { conn, private: Vec::new() });
    }
}

/// A no to a REQ in the consumer's name.
pub(super) fn refusal(remote_id: u32) -> Rej {
    Rej::new(Ids { local: 0, remote: remote_id }, of::REQ, reason::CONSUMER)
}
