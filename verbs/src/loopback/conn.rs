//! Connections: what the connection managers of two hosts agree on. Padding and reason codes as the IB CM has them.

use std::io::ErrorKind::InvalidInput;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::io::Errno;

use super::engine::Phase;
use super::state::State;
use crate::{CmEvent, CmId, ConnParams, Error, RejectReason};

/// Bytes of private data that rdma_cm leaves to its users in REQ, REP and REJ (IBTA 12.6.5, 12.6.8, 12.6.7).
const PRIVATE_REQ: usize = 56;
const PRIVATE_REP: usize = 196;
const PRIVATE_REJ: usize = 148;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnPhase {
    Listening {
        backlog: u32,
    },
    Resolved,
    Connecting,
    /// Passive side, not answered yet.
    Requested,
    Connected,
    /// We asked to disconnect, the peer has not answered.
    Disconnecting,
    /// The peer asked to disconnect, we have not answered.
    PeerClosed,
    Closed,
}

pub(super) struct Conn {
    pub host: u32,
    pub phase: ConnPhase,
    pub local: SocketAddr,
    pub peer: SocketAddr,
    pub remote: Option<CmId>,
    pub qp: Option<u32>,
    /// As the request said, for the acceptor's queue pair.
    pub rnr_retry: u8,
    pub read_depth: u8,
}

pub(super) fn error(what: String, source: impl Into<std::io::Error>, hint: &str) -> Error {
    Error { what, source: source.into(), hint: hint.to_owned() }
}

fn padded(private: &[u8], room: usize, what: &str) -> Result<Vec<u8>, Error> {
    if private.len() > room {
        let hint = format!("at most {room} bytes of private data fit, not {}", private.len());
        return Err(error(what.to_owned(), InvalidInput, &hint));
    }
    let mut out = private.to_vec();
    out.resize(room, 0);
    Ok(out)
}

fn overlaps(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

impl State {
    fn conn(&mut self, host: u32, id: CmId, what: &str) -> Result<&mut Conn, Error> {
        let conn = self.conns.get_mut(&id).filter(|c| c.host == host);
        conn.ok_or_else(|| error(what.to_owned(), Errno::INVAL, "no such connection"))
    }

    fn set_phase(&mut self, id: CmId, phase: ConnPhase) {
        if let Some(c) = self.conns.get_mut(&id) {
            c.phase = phase;
        }
    }

    pub fn listen(&mut self, host: u32, addr: SocketAddr, backlog: u32) -> Result<CmId, Error> {
        let mut addr = addr;
        if addr.port() == 0 {
            addr.set_port(self.ephemeral_port());
        }
        if self.listeners.keys().any(|l| overlaps(*l, addr)) {
            let hint = "another listener has this address: stop it or choose another port";
            return Err(error(format!("listen on {addr}"), Errno::ADDRINUSE, hint));
        }
        let id = CmId::next();
        let phase = ConnPhase::Listening { backlog: backlog.max(1) };
        let none = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        self.conns.insert(
            id,
            Conn {
                host,
                phase,
                local: addr,
                peer: none,
                remote: None,
                qp: None,
                rnr_retry: 7,
                read_depth: 0,
            },
        );
        self.listeners.insert(addr, id);
        Ok(id)
    }

    pub fn resolve(&mut self, host: u32, src: Option<IpAddr>, dst: SocketAddr) -> Result<CmId, Error> {
        let mut peer = dst;
        if peer.ip().is_unspecified() {
            peer.set_ip(if dst.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
        }
        let src = src.unwrap_or(peer.ip());
        if src.is_ipv4() != peer.is_ipv4() {
            let hint = "source and destination must both be IPv4 or both IPv6";
            return Err(error(format!("resolve {dst} from {src}"), Errno::INVAL, hint));
        }
        let (id, local) = (CmId::next(), SocketAddr::new(src, self.ephemeral_port()));
        let phase = ConnPhase::Resolved;
        self.conns.insert(
            id,
            Conn { host, phase, local, peer, remote: None, qp: None, rnr_retry: 7, read_depth: 0 },
        );
        self.event(host, CmEvent::Resolved(id));
        Ok(id)
    }

    fn listener_for(&self, dst: SocketAddr) -> Option<CmId> {
        let any = |ip: IpAddr| self.listeners.get(&SocketAddr::new(ip, dst.port()));
        let v4 = || dst.is_ipv4().then(|| any(Ipv4Addr::UNSPECIFIED.into())).flatten();
        self.listeners.get(&dst).or_else(v4).or_else(|| any(Ipv6Addr::UNSPECIFIED.into())).copied()
    }

    /// Whether `listener` has as many unseen requests as its backlog allows.
    fn backlog_full(&self, listener: CmId) -> bool {
        let Some(l) = self.conns.get(&listener) else { return true };
        let ConnPhase::Listening { backlog } = l.phase else { return true };
        let unseen = self.channels.get(&l.host).map_or(0, |c| {
            let of_it =
                |e: &&CmEvent| matches!(e, CmEvent::ConnectRequest { listener: l, .. } if *l == listener);
            c.queue.iter().filter(of_it).count()
        });
        unseen >= backlog as usize
    }

    pub fn connect(&mut self, host: u32, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        let private = padded(private, PRIVATE_REQ, "connect")?;
        let conn = self.conn(host, id, "connect")?;
        if conn.phase != ConnPhase::Resolved || conn.qp.is_none() {
            return Err(error("connect".into(), Errno::INVAL, "resolve and create a queue pair first"));
        }
        conn.phase = ConnPhase::Connecting;
        conn.read_depth = params.read_depth;
        let (local, peer) = (conn.local, conn.peer);
        let refuse = |reason| CmEvent::Rejected { id, reason, private: vec![0; PRIVATE_REJ] };
        let refusal = match self.listener_for(peer) {
            _ if self.is_cut(local, peer) => Some(CmEvent::Failed {
                id,
                reason: "peer unreachable: no answer to the connection request".into(),
            }),
            None => Some(refuse(RejectReason::INVALID_SERVICE_ID)),
            Some(l) if self.backlog_full(l) => Some(refuse(RejectReason::CONSUMER)),
            Some(l) => {
                self.request(l, id, local, peer, params, private);
                None
            }
        };
        if let Some(event) = refusal {
            self.set_phase(id, ConnPhase::Closed);
            self.event(host, event);
        }
        Ok(())
    }

    fn request(
        &mut self,
        listener: CmId,
        from: CmId,
        peer: SocketAddr,
        local: SocketAddr,
        params: ConnParams,
        private: Vec<u8>,
    ) {
        let host = self.conns[&listener].host;
        let id = CmId::next();
        let phase = ConnPhase::Requested;
        let ConnParams { rnr_retry, read_depth, .. } = params;
        let remote = Some(from);
        self.conns.insert(id, Conn { host, phase, local, peer, remote, qp: None, rnr_retry, read_depth });
        if let Some(c) = self.conns.get_mut(&from) {
            c.remote = Some(id);
        }
        self.event(host, CmEvent::ConnectRequest { listener, id, private, local, peer });
    }

    pub fn accept(&mut self, host: u32, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        let private = padded(private, PRIVATE_REP, "accept")?;
        let conn = self.conn(host, id, "accept")?;
        let (ConnPhase::Requested, Some(ours)) = (conn.phase, conn.qp) else {
            return Err(error("accept".into(), Errno::INVAL, "not a pending request with a queue pair"));
        };
        let (remote, rnr_retry) = (conn.remote, conn.rnr_retry);
        let reads = conn.read_depth.min(params.read_depth) > 0;
        let Some((remote, theirs)) = remote.and_then(|r| Some((r, self.conns.get(&r)?.qp?))) else {
            return Err(error("accept".into(), Errno::CONNRESET, "the peer gave up"));
        };
        self.link(ours, theirs, rnr_retry, reads);
        self.link(theirs, ours, params.rnr_retry, reads);
        self.set_phase(id, ConnPhase::Connected);
        self.set_phase(remote, ConnPhase::Connected);
        let remote_host = self.conns[&remote].host;
        self.event(remote_host, CmEvent::Established { id: remote, private });
        self.event(host, CmEvent::Established { id, private: Vec::new() });
        self.run(ours);
        self.run(theirs);
        Ok(())
    }

    fn link(&mut self, num: u32, peer: u32, rnr_retry: u8, reads: bool) {
        if let Some(qp) = self.qps.get_mut(&num) {
            qp.peer = Some(peer);
            qp.rnr_retry = rnr_retry;
            qp.reads = reads;
            if qp.phase == Phase::Init {
                qp.phase = Phase::ReadyToSend;
            }
        }
    }

    pub fn reject(&mut self, host: u32, id: CmId, private: &[u8]) -> Result<(), Error> {
        let private = padded(private, PRIVATE_REJ, "reject")?;
        let conn = self.conn(host, id, "reject")?;
        if conn.phase != ConnPhase::Requested {
            return Err(error("reject".into(), Errno::INVAL, "not a pending request"));
        }
        conn.phase = ConnPhase::Closed;
        if let Some(remote) = conn.remote.take() {
            self.rejected(remote, private);
        }
        Ok(())
    }

    fn rejected(&mut self, id: CmId, private: Vec<u8>) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.phase = ConnPhase::Closed;
        conn.remote = None;
        let host = conn.host;
        self.event(host, CmEvent::Rejected { id, reason: RejectReason::CONSUMER, private });
    }

    pub fn disconnect(&mut self, host: u32, id: CmId) -> Result<(), Error> {
        self.conn(host, id, "disconnect")?;
        self.close(id);
        Ok(())
    }

    /// The queue pair to the error state; a disconnect request to the peer, or the answer to the peer's.
    fn close(&mut self, id: CmId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let (phase, remote, qp, host) = (conn.phase, conn.remote, conn.qp, conn.host);
        let cut = (conn.local, conn.peer);
        match phase {
            ConnPhase::Connected if self.is_cut(cut.0, cut.1) => {
                // Nobody answers; what takes a device its timeouts is over at once here.
                self.set_phase(id, ConnPhase::Closed);
                self.event(host, CmEvent::Disconnected(id));
            }
            ConnPhase::Connected => {
                self.set_phase(id, ConnPhase::Disconnecting);
                match remote.filter(|r| self.conns.contains_key(r)) {
                    Some(remote) => self.peer_closes(remote),
                    None => self.closed(id),
                }
            }
            ConnPhase::PeerClosed => {
                self.set_phase(id, ConnPhase::Closed);
                if let Some(remote) = remote {
                    self.closed(remote);
                }
            }
            _ => {}
        }
        if let Some(qp) = qp {
            self.break_off(qp);
        }
    }

    /// A disconnect request reaches `id`: its queue pair lives on until it disconnects too, but has no peer.
    fn peer_closes(&mut self, id: CmId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if conn.phase != ConnPhase::Connected {
            return;
        }
        conn.phase = ConnPhase::PeerClosed;
        let (host, qp) = (conn.host, conn.qp);
        if let Some(qp) = qp.and_then(|q| self.qps.get_mut(&q)) {
            qp.closing = true;
        }
        self.event(host, CmEvent::Disconnected(id));
    }

    /// The answer to a disconnect request reaches `id`.
    fn closed(&mut self, id: CmId) {
        let Some(conn) = self.conns.get_mut(&id).filter(|c| c.phase == ConnPhase::Disconnecting) else {
            return;
        };
        conn.phase = ConnPhase::Closed;
        let host = conn.host;
        self.event(host, CmEvent::Disconnected(id));
    }

    /// Forgets `id` and its events; the peer hears what a closing process would make it hear.
    pub fn destroy(&mut self, host: u32, id: CmId) {
        let Some(conn) = self.conns.get(&id).filter(|c| c.host == host) else { return };
        match (conn.phase, conn.remote) {
            (ConnPhase::Listening { .. }, _) => self.stop_listening(host, id),
            (ConnPhase::Requested, Some(remote)) => self.rejected(remote, vec![0; PRIVATE_REJ]),
            (ConnPhase::Connecting, Some(remote)) => self.gave_up(remote),
            _ => self.close(id),
        }
        self.conns.remove(&id);
        if let Some(channel) = self.channels.get_mut(&host) {
            channel.queue.retain(|e| e.id() != id);
        }
    }

    fn stop_listening(&mut self, host: u32, id: CmId) {
        self.listeners.retain(|_, l| *l != id);
        let Some(channel) = self.channels.get(&host) else { return };
        let unseen = channel.queue.iter().filter_map(|e| match e {
            CmEvent::ConnectRequest { listener, id: child, .. } if *listener == id => Some(*child),
            _ => None,
        });
        let unseen: Vec<CmId> = unseen.collect();
        unseen.into_iter().for_each(|child| self.destroy(host, child));
    }

    fn gave_up(&mut self, id: CmId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.phase = ConnPhase::Closed;
        conn.remote = None;
        let host = conn.host;
        self.event(host, CmEvent::Failed { id, reason: "the peer gave up its connection request".into() });
    }
}
