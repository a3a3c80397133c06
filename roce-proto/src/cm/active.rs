//! The side that connects: REQ out, REP, REJ and MRA in.

use std::net::{IpAddr, SocketAddr};

use super::admit::{ACK_TIMEOUT, is_usable_qpn};
use super::agent::{Agent, Conn, Repeat, State, Wanted};
use super::message::of;
use super::rdma_cm::put_cma;
use super::{
    Action, Attributes, Body, ConnId, ConnectParams, Error, Ids, Mra, Path, REQ_PRIVATE, Rej, Rep, Req, Why,
    gid, is_own_guid, mtu_bytes, mtu_code, reason, service_id,
};
use crate::{Counter, Counters, Nanos};

/// Time codes that we announce: how long a peer may take to answer (4.3 s), and how long we do (0.27 s), which is how
/// soon a peer repeats its REP if our RTU was lost.
const PEER_RESPONSE_TIMEOUT: u8 = 20;
const OWN_RESPONSE_TIMEOUT: u8 = 16;

impl Agent {
    /// Asks `dst` for a connection from `src`, named `conn`. [`Action::Established`], [`Action::Rejected`] or
    /// [`Action::Unreachable`] follows.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Invalid`], [`Error::PrivateTooLong`].
    pub fn connect(
        &mut self,
        now: Nanos,
        conn: ConnId,
        src: IpAddr,
        dst: SocketAddr,
        params: &ConnectParams<'_>,
    ) -> Result<(), Error> {
        let (src, dst) = (src.to_canonical(), SocketAddr::new(dst.ip().to_canonical(), dst.port()));
        if self.conns.contains_key(&conn) {
            return Err(Error::Exists);
        }
        if params.private.len() > REQ_PRIVATE {
            return Err(Error::PrivateTooLong(REQ_PRIVATE));
        }
        let mtu = mtu_code(params.mtu).filter(|code| mtu_bytes(*code) == Some(params.mtu));
        let mtu = mtu.filter(|_| src.is_ipv4() == dst.is_ipv4() && is_usable_qpn(params.qp.qpn));
        let mtu = mtu.ok_or(Error::Invalid)?;
        let wanted = Wanted { mtu: params.mtu, retry: params.retry.min(7), reads: params.reads };
        let tid = (self.random)();
        self.create(conn, State::ReqSent(wanted), (src, dst.ip()), tid);
        let bits = (self.random)();
        let new = self.conns.get_mut(&conn).ok_or(Error::Unknown)?;
        new.qp = Some(params.qp);
        let req = Req {
            local_id: new.local_id,
            service_id: service_id(dst.port()),
            guid: self.identity.guid,
            qpn: params.qp.qpn,
            responder_resources: params.reads.serve,
            initiator_depth: params.reads.issue,
            remote_timeout: PEER_RESPONSE_TIMEOUT,
            transport: 0,
            start_psn: params.qp.start_psn,
            local_timeout: OWN_RESPONSE_TIMEOUT,
            retry: wanted.retry,
            rnr_retry: params.rnr_retry.min(7),
            pkey: 0xffff,
            mtu_code: mtu,
            max_retries: 15,
            primary: Path {
                local_lid: 0xffff,
                remote_lid: 0xffff,
                local_gid: gid(src),
                remote_gid: gid(dst.ip()),
                flow_label: bits as u32 & 0xf_ffff,
                hop_limit: 64,
                ack_timeout: ACK_TIMEOUT,
                ..Path::default()
            },
            alternate: Path::default(),
            // The source port is informational; from the range for ephemeral ones.
            private: put_cma(
                SocketAddr::new(src, 32768 + (bits >> 32) as u16 % 28232),
                dst.ip(),
                params.private,
            ),
        };
        let repeat = Repeat {
            left: self.config.req_retries,
            interval: self.config.retry_interval,
            max_interval: self.config.max_retry_interval,
            until: now.saturating_add(self.config.give_up_after),
            patience: false,
        };
        self.send_until_answered(now, conn, tid, Body::Req(req), repeat);
        Ok(())
    }

    pub(super) fn on_rep(
        &mut self,
        now: Nanos,
        path: (IpAddr, IpAddr),
        tid: u64,
        rep: &Rep,
        counters: &Counters,
    ) -> Result<(), Counter> {
        let remote = (rep.guid, rep.ids.local);
        let Some(conn) = self.find(path, rep.ids.remote)? else {
            return self.reject_ghost(now, path, tid, rep);
        };
        let id = conn.id;
        match conn.state {
            State::ReqSent(wanted) => self.on_first_rep(now, id, wanted, rep),
            State::Established if conn.remote == Some(remote) && conn.answer.is_some() => {
                // The RTU was lost.
                counters.count(Counter::CmRetries);
                self.send_again(id);
                Ok(())
            }
            State::TimeWait => self.reject_ghost(now, path, tid, rep),
            _ => Err(Counter::CmStale),
        }
    }

    /// A REP for nothing we know of: without an answer, the peer would wait for our RTU for long.
    fn reject_ghost(
        &mut self,
        now: Nanos,
        path: (IpAddr, IpAddr),
        tid: u64,
        rep: &Rep,
    ) -> Result<(), Counter> {
        let rej = Rej::new(rep.ids.flip(), of::REP, reason::INVALID_COMM_ID);
        self.send_to_stranger(now, path, tid, Body::Rej(rej))?;
        Err(Counter::CmStale)
    }

    fn on_first_rep(&mut self, now: Nanos, id: ConnId, wanted: Wanted, rep: &Rep) -> Result<(), Counter> {
        let conn = self.conns.get_mut(&id).ok_or(Counter::CmStale)?;
        let qp = conn.qp.ok_or(Counter::CmStale)?;
        let (path, tid) = ((conn.local, conn.peer), conn.tid);
        if !is_usable_qpn(rep.qpn) {
            let rej = Rej::new(rep.ids.flip(), of::REP, reason::CONSUMER);
            self.send_to(path, tid, Body::Rej(rej));
            self.lose(now, id, |conn| Action::Unreachable { conn, why: Why::BadReply });
            return Err(Counter::CmMalformed);
        }
        let remote = (rep.guid, rep.ids.local);
        if self.lives(self.by_remote.get(&remote)) {
            return Err(Counter::CmStale);
        }
        if let Some(old) = self.by_qpn.get(&(rep.guid, rep.qpn)).copied() {
            self.end_stale(now, old, path);
            let rej = Rej::new(rep.ids.flip(), of::REP, reason::STALE_CONNECTION);
            self.send_to(path, tid, Body::Rej(rej));
            let (reason, private) = (reason::STALE_CONNECTION, Vec::new());
            self.lose(now, id, |conn| Action::Rejected { conn, reason, private });
            return Err(Counter::CmRejected);
        }
        self.by_remote.insert(remote, id);
        self.by_qpn.insert((rep.guid, rep.qpn), id);
        let conn = self.conns.get_mut(&id).ok_or(Counter::CmStale)?;
        (conn.remote, conn.remote_qpn) = (Some(remote), rep.qpn);
        conn.ack_timeout = ack_timeout(rep.ack_delay);
        let attrs = Attributes {
            local: conn.local,
            peer: conn.peer,
            qpn: qp.qpn,
            dest_qpn: rep.qpn,
            send_psn: rep.start_psn,
            recv_psn: qp.start_psn,
            mtu: wanted.mtu,
            ack_timeout: conn.ack_timeout,
            retry: wanted.retry,
            rnr_retry: rep.rnr_retry,
            serve_reads: wanted.reads.serve.min(rep.initiator_depth),
            issue_reads: wanted.reads.issue.min(rep.responder_resources),
            own_peer: is_own_guid(rep.guid),
        };
        let ids = Ids { local: conn.local_id, remote: rep.ids.local };
        self.disarm(id);
        self.enter(id, State::Established);
        self.act(Action::QpReady { conn: id, attrs });
        let rtu = self.send_to(path, tid, Body::Rtu(ids));
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.answer = Some(rtu);
        }
        let private = rep.private.to_vec();
        self.event(id, |conn| Action::Established { conn, private });
        Ok(())
    }

    /// Exists and is not in time wait.
    pub(super) fn lives(&self, id: Option<&ConnId>) -> bool {
        let conn = id.and_then(|id| self.conns.get(id));
        conn.is_some_and(|conn| !matches!(conn.state, State::TimeWait))
    }

    pub(super) fn on_mra(&mut self, now: Nanos, path: (IpAddr, IpAddr), mra: &Mra) -> Result<(), Counter> {
        // While a REQ is out, the peer's ID is not settled yet.
        let conn = self.find(path, mra.ids.remote)?.filter(|conn| match conn.state {
            State::ReqSent(_) => mra.of == of::REQ,
            State::RepSent => mra.of == of::REP && conn.remote.is_some_and(|(_, id)| id == mra.ids.local),
            _ => false,
        });
        let conn = conn.filter(|conn| !conn.repeat.patience).ok_or(Counter::CmStale)?;
        let id = conn.id;
        let wait = now.saturating_add(time_code(mra.timeout)).saturating_add(conn.repeat.interval);
        let at = wait.min(conn.repeat.until);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.repeat.patience = true;
        }
        self.arm(id, at);
        Ok(())
    }

    pub(super) fn on_rej(&mut self, now: Nanos, path: (IpAddr, IpAddr), rej: &Rej) -> Result<(), Counter> {
        let conn = self.find_rejected(path, rej)?.ok_or(Counter::CmStale)?;
        let id = conn.id;
        let (reason, private) = (rej.reason, rej.private.to_vec());
        match conn.state {
            State::TimeWait => return Err(Counter::CmStale),
            State::ReqSent(_) | State::Requested { .. } | State::RepSent => {
                self.lose(now, id, |conn| Action::Rejected { conn, reason, private });
            }
            State::Established => self.lose(now, id, |conn| Action::Disconnected { conn }),
            State::DreqSent { .. } => {
                self.event(id, |conn| Action::Disconnected { conn });
                self.bury(now, id);
            }
        }
        Ok(())
    }

    /// Source: `cm.c`, `cm_acquire_rejected_id`.
    fn find_rejected(&self, path: (IpAddr, IpAddr), rej: &Rej) -> Result<Option<&Conn>, Counter> {
        if rej.reason == reason::TIMEOUT {
            // The peer gave up on a REQ to us; it may never have learnt our ID.
            let guid = rej.info.first_chunk().map_or(0, |guid| u64::from_be_bytes(*guid));
            let conn = self.by_remote.get(&(guid, rej.ids.local)).and_then(|id| self.conns.get(id));
            match conn {
                Some(conn) if (conn.local, conn.peer) != path => return Err(Counter::CmWrongSource),
                Some(conn) if rej.ids.remote == conn.local_id => return Ok(Some(conn)),
                // Later it has spoken to our ID, so who does not know it is somebody else.
                Some(conn) if rej.ids.remote == 0 => {
                    return Ok(
                        Some(conn).filter(|c| matches!(c.state, State::Requested { .. } | State::RepSent))
                    );
                }
                _ => (),
            }
        }
        if rej.of == of::REQ {
            let conn = self.find(path, rej.ids.remote)?;
            return Ok(conn.filter(|conn| matches!(conn.state, State::ReqSent(_))));
        }
        self.find_both(path, rej.ids)
    }
}

/// A CM time code: 4.096 us times a power of two, at most a minute.
pub(super) fn time_code(code: u8) -> Nanos {
    (4096 << u32::from(code.min(31))).min(60_000 * super::MS)
}

/// The timer of our queue pair, from how long the peer may delay an acknowledgement. Source: `cm.c`, `cm_ack_timeout`,
/// for the packet life time that RoCE assumes.
fn ack_timeout(ack_delay: u8) -> u8 {
    let twice_life = PACKET_LIFE_TIME + 1;
    let sum = if twice_life >= ack_delay {
        twice_life + u8::from(ack_delay >= twice_life - 1)
    } else {
        ack_delay + u8::from(twice_life >= ack_delay - 1)
    };
    sum.min(31)
}

const PACKET_LIFE_TIME: u8 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ack_timeouts_are_those_of_linux() {
        assert_eq!([0, 15, 16, 17, 18, 19, 31].map(ack_timeout), [17, 17, 18, 18, 19, 19, 31]);
    }
}
