//! Who may ask for a connection: listeners, and what a REQ must be like.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::rdma_cm::{address, gid, mtu_bytes, mtu_code, parse_cma, service_port};
use super::{Depths, Error, ListenerId, REQ_PRIVATE, Req, reason};
use crate::Psn;

/// A port somebody listens on.
#[derive(Debug)]
struct Listener {
    ip: IpAddr,
    port: u16,
    backlog: u32,
    /// Requests the consumer has not answered.
    waiting: u32,
}

impl Listener {
    fn takes(&self, ip: IpAddr) -> bool {
        match self.ip {
            IpAddr::V6(any) if any.is_unspecified() => true,
            own if own.is_unspecified() => ip.is_ipv4(),
            own => own == ip,
        }
    }

    /// An address both take exists.
    fn overlaps(&self, ip: IpAddr) -> bool {
        self.takes(ip) || Listener { ip, port: 0, backlog: 0, waiting: 0 }.takes(self.ip)
    }
}

/// All listeners of an agent.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    by_id: HashMap<ListenerId, Listener>,
    by_port: HashMap<u16, Vec<ListenerId>>,
}

impl Listeners {
    /// `random` finds a port for port 0.
    pub fn add(
        &mut self,
        id: ListenerId,
        ip: IpAddr,
        port: u16,
        backlog: u32,
        mut random: impl FnMut() -> u64,
    ) -> Result<u16, Error> {
        if self.by_id.contains_key(&id) {
            return Err(Error::Exists);
        }
        let port = match port {
            0 => {
                // The range of Linux, from a random point on.
                let (start, len) = (32768u16, 28232u16);
                let first = (random() % u64::from(len)) as u16;
                let mut ports = (0..len).map(|i| start + (first + i) % len);
                ports.find(|port| self.is_free(ip, *port)).ok_or(Error::InUse)?
            }
            port if self.is_free(ip, port) => port,
            _ => return Err(Error::InUse),
        };
        self.by_id.insert(id, Listener { ip, port, backlog: backlog.max(1), waiting: 0 });
        self.by_port.entry(port).or_default().push(id);
        Ok(port)
    }

    fn is_free(&self, ip: IpAddr, port: u16) -> bool {
        self.on_port(port).all(|(_, listener)| !listener.overlaps(ip))
    }

    fn on_port(&self, port: u16) -> impl Iterator<Item = (ListenerId, &Listener)> {
        let ids = self.by_port.get(&port).into_iter().flatten();
        ids.filter_map(|id| Some((*id, self.by_id.get(id)?)))
    }

    pub fn remove(&mut self, id: ListenerId) {
        let Some(listener) = self.by_id.remove(&id) else { return };
        if let Some(ids) = self.by_port.get_mut(&listener.port) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.by_port.remove(&listener.port);
            }
        }
    }

    pub fn find(&self, ip: IpAddr, port: u16) -> Option<ListenerId> {
        self.on_port(port).find(|(_, listener)| listener.takes(ip)).map(|(id, _)| id)
    }

    /// Counts a request that waits for the consumer; false if that is one too many.
    pub fn enter(&mut self, id: ListenerId) -> bool {
        let Some(listener) = self.by_id.get_mut(&id) else { return false };
        let room = listener.waiting < listener.backlog;
        listener.waiting += u32::from(room);
        room
    }

    /// Undoes one [`Listeners::enter`]; the listener may be gone.
    pub fn leave(&mut self, id: ListenerId) {
        if let Some(listener) = self.by_id.get_mut(&id) {
            listener.waiting -= 1;
        }
    }
}

/// What remains of a REQ that was found good.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    pub listener: ListenerId,
    pub local: SocketAddr,
    pub peer: SocketAddr,
    pub qpn: u32,
    pub start_psn: Psn,
    pub mtu: u32,
    pub ack_timeout: u8,
    pub retry: u8,
    pub rnr_retry: u8,
    /// As we see it: what we would serve and issue.
    pub reads: Depths,
    /// How long the peer takes to answer, time code.
    pub response_timeout: u8,
    pub max_retries: u8,
    pub private: [u8; REQ_PRIVATE],
}

/// Why a REQ is not good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It claims to be from somebody else: no answer.
    Forged,
    /// REJ with a reason, and with an address as additional information.
    Reject(u16, Option<[u8; 16]>),
}

impl Refusal {
    fn because(reason: u16) -> Self {
        Self::Reject(reason, None)
    }
}

/// Queue pair numbers that a peer cannot mean: the two for management, the one for multicast.
pub(super) fn is_usable_qpn(qpn: u32) -> bool {
    (2..0xff_ffff).contains(&qpn)
}

/// Checks a REQ from `src` to `dst`. `path_mtu`: the most that can be sent between two addresses.
pub(super) fn check(
    listeners: &Listeners,
    req: &Req,
    src: IpAddr,
    dst: IpAddr,
    path_mtu: impl FnOnce(IpAddr, IpAddr) -> u32,
) -> Result<Offer, Refusal> {
    // Answers and data go to the packet's source, so all three addresses a peer can claim must be that one.
    if address(req.primary.local_gid) != src || src.is_unspecified() || src.is_multicast() {
        return Err(Refusal::Forged);
    }
    let port = service_port(req.service_id);
    let Some((port, listener)) = port.and_then(|port| Some((port, listeners.find(dst, port)?))) else {
        return Err(Refusal::because(reason::INVALID_SERVICE_ID));
    };
    if req.transport != TRANSPORT_RC {
        return Err(Refusal::because(reason::INVALID_TRANSPORT));
    }
    // Linux refuses an unknown partition with this reason, too.
    if address(req.primary.remote_gid) != dst || req.pkey & 0x7fff != 0x7fff {
        return Err(Refusal::Reject(reason::INVALID_GID, Some(gid(dst))));
    }
    let alternate = &req.alternate;
    if alternate.local_lid != 0 || alternate.local_gid != [0; 16] || alternate.remote_gid != [0; 16] {
        return Err(Refusal::because(reason::INVALID_ALTERNATE_GID));
    }
    if !is_usable_qpn(req.qpn) {
        return Err(Refusal::because(reason::UNSUPPORTED));
    }
    let peer = match parse_cma(&req.private) {
        Some((peer, to)) if peer.ip() == src && to == dst => peer,
        _ => return Err(Refusal::because(reason::CONSUMER)),
    };
    let mtu = match mtu_bytes(req.mtu_code) {
        Some(mtu) if mtu_code(path_mtu(dst, src)).is_some_and(|most| req.mtu_code <= most) => mtu,
        _ => return Err(Refusal::because(reason::INVALID_MTU)),
    };
    let mut private = [0; REQ_PRIVATE];
    private.copy_from_slice(&req.private[req.private.len() - REQ_PRIVATE..]);
    Ok(Offer {
        listener,
        local: SocketAddr::new(dst, port),
        peer,
        qpn: req.qpn,
        start_psn: req.start_psn,
        mtu,
        // 0 would be a timer that never ends.
        ack_timeout: if req.primary.ack_timeout == 0 { ACK_TIMEOUT } else { req.primary.ack_timeout },
        retry: req.retry,
        rnr_retry: req.rnr_retry,
        reads: Depths { serve: req.initiator_depth, issue: req.responder_resources },
        response_timeout: req.local_timeout,
        max_retries: req.max_retries,
        private,
    })
}

const TRANSPORT_RC: u8 = 0;

/// What Linux uses on RoCE: 0.54 s.
pub(super) const ACK_TIMEOUT: u8 = 17;
