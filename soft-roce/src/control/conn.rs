//! Connections as their users see them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use roce_proto::cm::{self, AcceptParams, Action, Attributes, ConnId, ConnectParams, Depths, QpFacts};
use roce_proto::{Nanos, Psn, rc};
use verbs::{CmEvent, CmId, ConnParams, CqHandle, Error, Qp, QpCaps};

use super::{Control, error, invalid};
use crate::clock::now;
use crate::engine::{Engine, Entry, Mail};
use crate::port::Port;
use crate::qp::SoftQp;
use crate::route::route;

/// READs of a peer that are served at a time at most, and that are issued.
const MAX_READS: u8 = rc::MAX_READS;

/// A connection.
pub struct Conn {
    pub owner: u32,
    port: Arc<Port>,
    local: SocketAddr,
    peer: SocketAddr,
    mtu: u32,
    phase: Phase,
    qp: Option<QpFacts>,
    /// When the peer is given up, if the connection is ours: nothing acknowledged for so long.
    give_up: Option<Duration>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Outgoing, not connecting yet; the agent does not know it.
    Resolved,
    /// Incoming, not answered yet.
    Requested,
    /// The agent has it.
    Going,
}

impl Control {
    /// Finds the way to `dst` for `owner`.
    pub fn resolve(&mut self, owner: u32, src: Option<IpAddr>, dst: SocketAddr) -> Result<CmId, Error> {
        let what = || match src {
            Some(src) => format!("resolve {dst} from {src}"),
            None => format!("resolve {dst}"),
        };
        let ip = dst.ip().to_canonical();
        if ip.is_unspecified() || ip.is_multicast() || dst.port() == 0 {
            return Err(invalid(what(), "the address of a listener is needed"));
        }
        if matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            return Err(invalid(
                what(),
                "link-local addresses do not work; use a global or unique local one",
            ));
        }
        let dst = SocketAddr::new(ip, dst.port());
        let route = route(src.map(|ip| ip.to_canonical()), ip).map_err(|e| {
            let hint = match e.raw_os_error() {
                Some(libc::EADDRNOTAVAIL) => "the source is no address of this host; see `ip address`",
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => "no route; see `ip route get`",
                Some(libc::EINVAL) => "source and destination do not fit each other",
                _ => "",
            };
            error(what(), e, hint)
        })?;
        let port = if route.src == ip { self.port_beside(ip) } else { self.port_for(route.src) }?;
        let id = CmId::next();
        let conn = Conn {
            owner,
            port,
            local: SocketAddr::new(route.src, 0),
            peer: dst,
            mtu: route.mtu,
            phase: Phase::Resolved,
            qp: None,
            give_up: None,
        };
        self.conns.insert(id, conn);
        self.events.push(owner, CmEvent::Resolved(id));
        Ok(id)
    }

    /// The device of a connection.
    pub fn device_of(&self, owner: u32, id: CmId) -> Option<Arc<Port>> {
        self.conns.get(&id).filter(|conn| conn.owner == owner).map(|conn| conn.port.clone())
    }

    /// All devices.
    pub fn devices(&self) -> Vec<Arc<Port>> {
        self.ports.iter().map(|open| open.port.clone()).collect()
    }

    fn conn(&mut self, owner: u32, id: CmId, what: &str) -> Result<&mut Conn, Error> {
        let conn = self.conns.get_mut(&id).filter(|conn| conn.owner == owner);
        conn.ok_or_else(|| invalid(what.into(), "no such connection"))
    }

    /// Gives a connection its queue pair.
    pub fn create_qp(
        &mut self,
        owner: u32,
        id: CmId,
        caps: &QpCaps,
        cq: &CqHandle,
    ) -> Result<Box<dyn Qp>, Error> {
        let what = || format!("create queue pair ({caps:?})");
        let conn = self.conns.get(&id).filter(|conn| conn.owner == owner);
        let conn = conn.filter(|conn| conn.qp.is_none() && conn.phase != Phase::Going);
        let conn = conn.ok_or_else(|| invalid(what(), "not a new connection without a queue pair"))?;
        let engine = Arc::downcast::<Engine>(cq.clone()).ok();
        let engine = engine.filter(|engine| Arc::ptr_eq(engine.port(), &conn.port));
        let engine = engine.ok_or_else(|| invalid(what(), "the completion queue is of another device"))?;
        let limit = &conn.port.info;
        if caps.max_send_wr.max(caps.max_recv_wr) > limit.max_qp_wr {
            return Err(invalid(what(), &format!("the device allows {} work requests", limit.max_qp_wr)));
        }
        if caps.max_send_sge.max(caps.max_recv_sge) > limit.max_sge {
            return Err(invalid(what(), &format!("the device allows {} scatter entries", limit.max_sge)));
        }
        let conn_id = ConnId(id.0);
        let mailbox = engine.mailbox().clone();
        let qpn = self.qpns.allocate(engine.slot(), conn_id, mailbox.clone(), &mut self.random);
        let facts = QpFacts { qpn, start_psn: Psn::new(self.random.u32()) };
        mailbox.push(Mail::Add(Box::new(Entry::new(qpn, conn_id, caps))));
        self.shared.directory.write().unwrap_or_else(|e| e.into_inner()).insert(qpn, mailbox);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.qp = Some(facts);
        }
        Ok(Box::new(SoftQp::new(engine, qpn, *caps)))
    }

    /// A user has dropped a queue pair.
    pub fn qp_dropped(&mut self, qpn: u32) {
        self.shared.directory.write().unwrap_or_else(|e| e.into_inner()).remove(&qpn);
        self.qpns.dropped(qpn);
    }

    /// Sends the connection request.
    pub fn connect(&mut self, owner: u32, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        let conn = self.conn(owner, id, "connect")?;
        let (Phase::Resolved, Some(qp)) = (conn.phase, conn.qp) else {
            return Err(invalid("connect".into(), "resolve and create a queue pair first"));
        };
        let (src, dst, mtu) = (conn.local.ip(), conn.peer, conn.mtu);
        conn.phase = Phase::Going;
        conn.give_up = Some(params.give_up.unwrap_or(GIVE_UP));
        let reads = depths(params.read_depth);
        let ConnParams { retry, rnr_retry, .. } = params;
        let params = ConnectParams { qp, mtu, retry, rnr_retry, reads, private };
        self.agent.connect(now(), ConnId(id.0), src, dst, &params).map_err(|e| refused("connect", e))?;
        self.qpns.in_agent(qp.qpn);
        self.act();
        Ok(())
    }

    /// Accepts a request.
    pub fn accept(&mut self, owner: u32, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        let conn = self.conn(owner, id, "accept")?;
        let (Phase::Requested, Some(qp)) = (conn.phase, conn.qp) else {
            return Err(invalid("accept".into(), "not a pending request with a queue pair"));
        };
        let reads = depths(params.read_depth);
        let ack_delay = params.ack_delay.unwrap_or(ACK_DELAY);
        let params = AcceptParams { qp, rnr_retry: params.rnr_retry, ack_delay, reads, private };
        self.agent.accept(now(), ConnId(id.0), &params).map_err(|e| refused("accept", e))?;
        self.qpns.in_agent(qp.qpn);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.phase = Phase::Going;
        }
        self.act();
        Ok(())
    }

    /// Refuses a request.
    pub fn reject(&mut self, owner: u32, id: CmId, private: &[u8]) -> Result<(), Error> {
        self.conn(owner, id, "reject")?.phase = Phase::Going;
        self.agent.reject(now(), ConnId(id.0), private).map_err(|e| refused("reject", e))?;
        self.act();
        Ok(())
    }

    /// Ends a connection.
    pub fn disconnect(&mut self, owner: u32, id: CmId) -> Result<(), Error> {
        let conn = self.conn(owner, id, "disconnect")?;
        // A request is not connected yet; its answer is up to `reject` or `destroy`, which say why.
        if !matches!(conn.phase, Phase::Resolved | Phase::Requested) {
            // One that the agent has forgotten meanwhile is disconnected.
            let _ = self.agent.disconnect(now(), ConnId(id.0));
        }
        self.break_qp(ConnId(id.0));
        self.act();
        Ok(())
    }

    /// Forgets a connection.
    pub fn destroy_conn(&mut self, owner: u32, id: CmId) {
        if self.conn(owner, id, "destroy").is_err() {
            return;
        }
        self.agent.destroy(now(), ConnId(id.0));
        self.break_qp(ConnId(id.0));
        // Last words go out while the port is surely open.
        self.act();
        self.conns.remove(&id);
        self.events.forget(owner, id);
    }

    fn break_qp(&self, conn: ConnId) {
        if let Some((qpn, engine)) = self.qpns.of(conn) {
            engine.push(Mail::Fail { qpn });
        }
    }

    /// Does what the agent wants done.
    pub fn act(&mut self) {
        while let Some(action) = self.agent.next_action() {
            match action {
                Action::Send { src, dst, mad } => self.send_mad(src, dst, &mad),
                Action::Request { listener, conn, private, local, peer, mtu, .. } => {
                    self.requested(CmId(listener.0), CmId(conn.0), private.to_vec(), (local, peer), mtu);
                }
                Action::QpReady { conn, attrs } => self.qp_ready(conn, attrs),
                Action::QpError { conn } => self.break_qp(conn),
                Action::Established { conn, private } => {
                    let id = CmId(conn.0);
                    self.event(conn, CmEvent::Established { id, private });
                }
                Action::Rejected { conn, reason, private } => {
                    let id = CmId(conn.0);
                    self.event(conn, CmEvent::Rejected { id, reason: i32::from(reason), private });
                }
                Action::Unreachable { conn, why } => {
                    let (id, reason) = (CmId(conn.0), why.to_string());
                    self.event(conn, CmEvent::Failed { id, reason });
                }
                Action::Disconnected { conn } => self.event(conn, CmEvent::Disconnected(CmId(conn.0))),
                Action::QpnFree { qpn } => self.qpns.agent_done(qpn),
            }
        }
    }

    fn event(&mut self, conn: ConnId, event: CmEvent) {
        if let Some(conn) = self.conns.get(&CmId(conn.0)) {
            self.events.push(conn.owner, event);
        }
    }

    fn requested(
        &mut self,
        listener: CmId,
        id: CmId,
        private: Vec<u8>,
        (local, peer): (SocketAddr, SocketAddr),
        mtu: u32,
    ) {
        let owner = self.listeners.get(&listener).map(|listener| listener.owner);
        let (Some(owner), Some(port)) = (owner, self.port_of(local.ip())) else {
            return self.agent.destroy(now(), ConnId(id.0));
        };
        let port = port.clone();
        self.conns.insert(
            id,
            Conn { owner, port, local, peer, mtu, phase: Phase::Requested, qp: None, give_up: None },
        );
        self.events.push(owner, CmEvent::ConnectRequest { listener, id, private, local, peer });
    }

    fn qp_ready(&self, conn: ConnId, attrs: Attributes) {
        let Some((_, engine)) = self.qpns.of(conn) else { return };
        let give_up = self.conns.get(&CmId(conn.0)).and_then(|conn| conn.give_up);
        let config = rc::Config {
            // What servers announce is for peers that must not repeat too early. Our timer follows the round trip.
            ack_timeout: attrs.ack_timeout.min(MAX_ACK_TIMEOUT),
            give_up: give_up.map_or(0, |t| t.as_nanos() as Nanos),
            retry: attrs.retry,
            rnr_retry: attrs.rnr_retry,
            serve_reads: attrs.serve_reads,
            issue_reads: attrs.issue_reads,
            max_inflight: self.shared.options.max_inflight,
            ..rc::Config::new(attrs.mtu, attrs.dest_qpn, attrs.send_psn, attrs.recv_psn)
        };
        engine.push(Mail::Connect { attrs, config });
    }
}

/// Code of the longest retransmission timer: 0.54 s.
const MAX_ACK_TIMEOUT: u8 = 17;

/// Target ACK Delay that peers are told: 8.6 s. Linux rxe makes its timer of it, and does not survive a repetition: it
/// executes REG_MR again, which fails. With the 15 that rxe itself announces, a server that does not run for half a
/// second loses its clients.
const ACK_DELAY: u8 = 21;

/// A server that has acknowledged nothing for so long is given up.
const GIVE_UP: Duration = Duration::from_secs(5);

fn depths(reads: u8) -> Depths {
    let reads = reads.min(MAX_READS);
    Depths { serve: reads, issue: reads }
}

/// The agent did not want to.
fn refused(what: &str, e: cm::Error) -> Error {
    let errno = match e {
        cm::Error::WrongState | cm::Error::Unknown => libc::ECONNRESET,
        _ => libc::EINVAL,
    };
    error(what.into(), io::Error::from_raw_os_error(errno), &e.to_string())
}
