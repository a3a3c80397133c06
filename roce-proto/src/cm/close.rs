//! The end of connections: DREQ and DREP, and what the consumer gives up.

use std::net::IpAddr;

use super::agent::{Agent, Repeat, State};
use super::passive::refusal;
use super::{Action, Body, ConnId, Error, Ids, Message, reason};
use crate::{Counter, Nanos};

impl Agent {
    /// Ends a connection, or an attempt. The queue pair goes to the error state at once;
    /// [`Action::Disconnected`] follows when the peer has answered or is taken for dead. Idempotent.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn disconnect(&mut self, now: Nanos, conn: ConnId) -> Result<(), Error> {
        self.owned(conn)?;
        self.close(now, conn);
        Ok(())
    }

    /// As [`Agent::disconnect`], without an event: the consumer has forgotten the connection. Unknown ones are
    /// ignored.
    pub fn destroy(&mut self, now: Nanos, conn: ConnId) {
        if let Some(known) = self.conns.get_mut(&conn).filter(|known| known.owned) {
            known.owned = false;
            self.close(now, conn);
        }
    }

    fn close(&mut self, now: Nanos, id: ConnId) {
        match self.conns.get(&id).map(|conn| conn.state) {
            Some(State::Requested { .. }) => {
                self.event(id, |conn| Action::Disconnected { conn });
                self.refuse(now, id, &[]);
            }
            Some(State::ReqSent(_)) => {
                self.send_abort(id);
                self.lose(now, id, |conn| Action::Disconnected { conn });
            }
            Some(State::RepSent) => self.send_dreq(now, id, true),
            Some(State::Established) => self.send_dreq(now, id, false),
            Some(State::DreqSent { .. } | State::TimeWait) | None => (),
        }
    }

    fn send_dreq(&mut self, now: Nanos, id: ConnId, refuse: bool) {
        let tid = (self.random)();
        let Some(conn) = self.conns.get(&id) else { return };
        let body = conn.dreq();
        let repeat = Repeat {
            // Nobody has answered from there yet, so this may go to somebody who has never heard of us.
            left: if refuse { self.config.dreq_retries.min(1) } else { self.config.dreq_retries },
            interval: self.config.retry_interval,
            max_interval: self.config.max_retry_interval,
            until: now.saturating_add(self.config.give_up_after),
            patience: false,
        };
        self.act(Action::QpError { conn: id });
        self.enter(id, State::DreqSent { refuse });
        self.send_until_answered(now, id, tid, body, repeat);
    }

    /// The peer uses the queue pair of connection `old` for a new one, so it has lost the old one. Somebody else who
    /// says so is not believed.
    pub(super) fn end_stale(&mut self, now: Nanos, old: ConnId, path: (IpAddr, IpAddr)) {
        let Some(conn) = self.conns.get(&old).filter(|conn| (conn.local, conn.peer) == path) else { return };
        if matches!(conn.state, State::Requested { .. }) {
            let reason = reason::STALE_CONNECTION;
            self.event(old, |conn| Action::Rejected { conn, reason, private: Vec::new() });
            self.bury(now, old);
        } else {
            self.close(now, old);
        }
    }

    pub(super) fn on_dreq(
        &mut self,
        now: Nanos,
        path: (IpAddr, IpAddr),
        tid: u64,
        ids: Ids,
        remote_qpn: u32,
    ) -> Result<(), Counter> {
        let drep = Body::Drep(ids.flip());
        let Some(conn) = self.find_both(path, ids)? else {
            // The peer has a connection that we have forgotten; let it end.
            self.send_to_stranger(now, path, tid, drep)?;
            return Err(Counter::CmStale);
        };
        let id = conn.id;
        if conn.qp.is_none_or(|qp| qp.qpn != remote_qpn) {
            return Err(Counter::CmStale);
        }
        match conn.state {
            State::RepSent | State::Established => {
                self.send_to(path, tid, drep);
                self.lose(now, id, |conn| Action::Disconnected { conn });
            }
            State::DreqSent { .. } => {
                self.send_to(path, tid, drep);
                self.event(id, |conn| Action::Disconnected { conn });
                self.bury(now, id);
            }
            // Our DREP was lost.
            State::TimeWait => {
                self.send_to(path, tid, drep);
            }
            State::Requested { .. } | State::ReqSent(_) => return Err(Counter::CmStale),
        }
        Ok(())
    }

    pub(super) fn on_drep(&mut self, now: Nanos, path: (IpAddr, IpAddr), ids: Ids) -> Result<(), Counter> {
        let conn = self.find_both(path, ids)?.ok_or(Counter::CmStale)?;
        let State::DreqSent { refuse } = conn.state else { return Err(Counter::CmStale) };
        let id = conn.id;
        let rej = Message { tid: conn.tid, body: Body::Rej(refusal(conn.ids().remote)) };
        self.event(id, |conn| Action::Disconnected { conn });
        self.bury_with(now, id, refuse.then(|| rej.encode()));
        Ok(())
    }
}
