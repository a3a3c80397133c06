//! Queue pair 1 of a port.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

use roce_proto::cm::{self, Agent, MadBytes};
use roce_proto::icrc::{Flow, FlowCrc};
use roce_proto::packet::{self, MAD_PACKET_LEN, Parsed};
use roce_proto::{Counter, Counters, UDP_PORT};
use verbs::CmId;

use super::ports::unspecified;
use super::{Control, Listener, OpenPort};
use crate::clock::now;
use crate::engine::{Mail, Source, Stray, verify_once};
use crate::faults::{Faults, Weather};
use crate::neighbours::{cm_name, port_name, slot_name};
use crate::port::{Port, Sockets};
use crate::route::route;
use crate::shared::{Notice, Shared};
use crate::udp::{Dest, SLOT_MASK, Sent};

/// Datagram batches per turn at most.
const MAX_BATCHES: usize = 4;
/// Notices per turn at most.
const MAX_TAKEN: usize = 256;
/// Packets for an engine that wait at most.
const MAX_STRAYS: usize = 1024;

/// The first socket of a port, which gets what is for queue pair 1 or too short to tell.
pub struct CmSocket {
    sockets: Sockets,
    /// Of datagrams sent; means nothing.
    psn: u32,
    /// See [`crate::Options::faults`].
    weather: Option<Weather>,
}

impl CmSocket {
    pub fn new(sockets: Sockets, faults: Option<Faults>) -> Self {
        Self { sockets, psn: 0, weather: faults.map(|faults| Weather::new(faults, 1 << 32)) }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.sockets.rx.fd()
    }

    /// Sends a management datagram; lost if the system has no room.
    fn send(&mut self, src: IpAddr, dst: IpAddr, mad: &MadBytes, counters: &Counters) {
        let tx = &mut self.sockets.tx;
        let mut packet = [0; MAD_PACKET_LEN];
        packet::encode_mad(self.psn, mad, &mut packet);
        self.psn = self.psn.wrapping_add(1);
        let len = MAD_PACKET_LEN + packet::ICRC_LEN;
        let flow = FlowCrc::new(Flow { src, src_port: tx.port(), dst });
        let mut digest = flow.begin(len, 0, &packet[..20]);
        digest.update(&packet[20..]);
        let id = tx.begin(1, &Dest::new(src, SocketAddr::new(dst, UDP_PORT)), len);
        debug_assert_eq!(id, 0, "one message at a time");
        tx.copy(&packet);
        tx.copy(&digest.finish());
        if tx.send() == Sent::All {
            counters.count(Counter::TxPackets);
            counters.add(Counter::TxBytes, len as u64);
        }
    }

    /// Gives every packet to `each`.
    fn receive(&mut self, port: &Port, each: &mut impl FnMut(&Source, &[u8])) -> bool {
        let mut any = false;
        for _ in 0..MAX_BATCHES {
            let Ok((n, dropped)) = self.sockets.rx.receive() else { break };
            port.cm_counters().add(Counter::RxOverflow, u64::from(dropped));
            if n == 0 {
                break;
            }
            any = true;
            for datagram in (0..n).filter_map(|i| self.sockets.rx.datagram(i)) {
                let dst = datagram.dst.unwrap_or(port.ip);
                for (index, udp) in (0..).zip(datagram.bytes.chunks(datagram.segment)) {
                    let from = Source { src: datagram.src, src_port: datagram.src_port, dst, index };
                    match &mut self.weather {
                        None => each(&from, udp),
                        Some(weather) => weather.pass(&from, udp, &mut *each),
                    }
                }
            }
        }
        any
    }
}

/// What a packet that came in on a socket of `port` is for.
struct Desk<'a> {
    agent: &'a mut Agent,
    shared: &'a Shared,
    listeners: &'a HashMap<CmId, Listener>,
    tag: u8,
}

impl Desk<'_> {
    /// A packet from the network. `fresh`: no engine has counted it yet. One that gets it here will.
    fn packet(&mut self, port: &Port, from: &Source, udp: &[u8], fresh: bool) {
        let counters = port.cm_counters();
        let result = match packet::parse(udp) {
            Ok(Parsed::Rc(packet)) => {
                let qpn = packet.headers.dest_qpn;
                if self.give_to_engine(qpn, from, udp) {
                    return;
                }
                self.pass_on(port, qpn, from, udp)
            }
            Ok(Parsed::Mad(_)) if !verify_once(from, udp) => Err(Counter::Icrc),
            Ok(Parsed::Mad(mad)) => {
                if !self.pass_mad_on(from, mad.mad, udp) {
                    self.agent.receive(now(), from.src, from.dst, mad.mad, path_mtu, counters);
                }
                Ok(())
            }
            Err(reason) => Err(reason),
        };
        if fresh {
            counters.count(Counter::RxPackets);
            counters.add(Counter::RxBytes, udp.len() as u64);
        }
        if let Err(reason) = result {
            counters.count(reason);
        }
    }

    /// A packet that another process has passed on. It goes no further.
    fn passed_on(&mut self, from: &Source, udp: &[u8], counters: &Counters) {
        match packet::parse(udp) {
            Ok(Parsed::Rc(packet)) => {
                if !self.give_to_engine(packet.headers.dest_qpn, from, udp) {
                    counters.count(Counter::UnknownQpn);
                }
            }
            Ok(Parsed::Mad(mad)) if verify_once(from, udp) => {
                counters.count(Counter::Forwarded);
                self.agent.receive(now(), from.src, from.dst, mad.mad, path_mtu, counters);
            }
            Ok(Parsed::Mad(_)) => counters.count(Counter::Icrc),
            Err(reason) => counters.count(reason),
        }
    }

    fn give_to_engine(&self, qpn: u32, from: &Source, udp: &[u8]) -> bool {
        let Some(engine) = self.shared.engine_of(qpn) else { return false };
        engine.push_below(MAX_STRAYS, Mail::Stray(Stray { bytes: udp.into(), from: *from }));
        true
    }

    /// To the process that has the queue pair's slot on this address, or among those on all addresses.
    fn pass_on(&self, port: &Port, qpn: u32, from: &Source, udp: &[u8]) -> Result<(), Counter> {
        let slot = (qpn & SLOT_MASK) as u8;
        let mut taken = false;
        if !port.has_slot(slot) {
            taken |= self.shared.neighbours.pass(&slot_name(port.ip, slot), from, udp);
        }
        if !port.ip.is_unspecified() {
            taken |= self.shared.neighbours.pass(&slot_name(unspecified(port.ip), slot), from, udp);
        }
        if taken { Ok(()) } else { Err(Counter::UnknownQpn) }
    }

    /// To the process that has the listener or the connection. False: that is us, or nobody.
    fn pass_mad_on(&self, from: &Source, mad: &MadBytes, udp: &[u8]) -> bool {
        let neighbours = &self.shared.neighbours;
        match cm::Route::of(mad) {
            Some(cm::Route::Port(port)) => {
                if self.listeners.values().any(|listener| listener.addr.port() == port) {
                    return false;
                }
                let any = [unspecified(from.dst), Ipv6Addr::UNSPECIFIED.into()];
                let mut names = [from.dst].into_iter().chain(any).map(|ip| port_name(ip, port));
                names.any(|name| neighbours.pass(&name, from, udp))
            }
            Some(cm::Route::CommId(id)) if cm::tag_of(id) != self.tag => {
                neighbours.pass(&cm_name(cm::tag_of(id)), from, udp)
            }
            Some(cm::Route::CommId(_) | cm::Route::Any) | None => false,
        }
    }
}

impl Control {
    fn parts(&mut self) -> (&mut Vec<OpenPort>, Desk<'_>) {
        let Self { ports, agent, shared, listeners, tag, .. } = self;
        (ports, Desk { agent, shared, listeners, tag: *tag })
    }

    /// Takes in what has come on queue pair 1.
    pub fn receive(&mut self) -> bool {
        let (ports, mut desk) = self.parts();
        let mut any = false;
        for open in ports {
            let port = &open.port;
            any |= open.socket.receive(port, &mut |from, udp| desk.packet(port, from, udp, true));
        }
        any
    }

    /// For [`crate::SoftRoce::inject`].
    #[cfg(fuzzing)]
    pub fn inject(&mut self, port: &Port, datagram: &crate::udp::Datagram<'_>) {
        for (index, udp) in (0..).zip(datagram.bytes.chunks(datagram.segment)) {
            let dst = datagram.dst.unwrap_or(port.ip);
            let from = Source { src: datagram.src, src_port: datagram.src_port, dst, index };
            self.parts().1.packet(port, &from, udp, true);
        }
        self.act();
    }

    /// Takes in what other processes have passed on.
    pub fn receive_from_neighbours(&mut self) -> bool {
        let shared = self.shared.clone();
        shared.neighbours.receive(|from, udp| {
            let port = self.port_of(from.dst).cloned();
            let stray = &Counters::default();
            let (_, mut desk) = self.parts();
            desk.passed_on(from, udp, port.as_ref().map_or(stray, |port| port.cm_counters()));
        })
    }

    /// Takes in what engines have to say.
    pub fn take_notices(&mut self) -> bool {
        if !self.shared.notices.check() {
            return false;
        }
        for n in 0.. {
            // Peers can cause notices as fast as this takes them.
            if n == MAX_TAKEN {
                self.shared.notices.later();
                break;
            }
            let Some(notice) = self.shared.notices.pop() else { break };
            match notice {
                Notice::Heard(conn) => self.agent.data_arrived(conn),
                Notice::Dropped { qpn } => self.qp_dropped(qpn),
                Notice::Mad { from, udp } => self.engine_packet(from.dst, &from, &udp),
                Notice::Foreign { port, from, udp } => self.engine_packet(port, &from, &udp),
            }
        }
        true
    }

    /// A packet that came in on an engine's socket of the port on `ip`, and is nothing for it.
    fn engine_packet(&mut self, ip: IpAddr, from: &Source, udp: &[u8]) {
        if let Some(port) = self.port_of(ip).cloned() {
            self.parts().1.packet(&port, from, udp, false);
        }
    }

    /// Sends a management datagram from the port of `src`. One whose port is gone is lost.
    pub fn send_mad(&mut self, src: IpAddr, dst: IpAddr, mad: &MadBytes) {
        let Some(ip) = self.port_of(src).map(|port| port.ip) else { return };
        if let Some(open) = self.ports.iter_mut().find(|open| open.port.ip == ip) {
            open.socket.send(src, dst, mad, open.port.cm_counters());
        }
    }
}

/// The largest path MTU from one address to the other, 0 if there is none.
fn path_mtu(local: IpAddr, peer: IpAddr) -> u32 {
    route(Some(local), peer).map_or(0, |route| route.mtu)
}
