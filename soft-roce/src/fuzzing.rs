//! For fuzz targets: packets without a network, time and randomness of the target's choice.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};

use roce_proto::{Nanos, packet};

use crate::SoftRoce;
use crate::udp::{Datagram, SLOT_MASK};

/// The time.
static CLOCK: AtomicU64 = AtomicU64::new(1_000_000_000);
/// What was drawn last.
static DRAWN: AtomicU64 = AtomicU64::new(0);

/// Random numbers begin again.
pub fn reset() {
    DRAWN.store(0, Ordering::Relaxed);
}

/// Lets time pass.
pub fn pass(time: Nanos) {
    CLOCK.fetch_add(time, Ordering::Relaxed);
}

pub(crate) fn now() -> Nanos {
    CLOCK.load(Ordering::Relaxed)
}

/// Numbers that do not repeat for long (splitmix64).
pub(crate) fn draw() -> u64 {
    let mut z = DRAWN.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

impl SoftRoce {
    /// A datagram of packets of `segment` bytes for local address `dst`, as if the kernel had brought it to the socket
    /// that it steers such packets to.
    pub fn inject(&self, src: SocketAddr, dst: IpAddr, bytes: &[u8], segment: usize) {
        let mut control = self.0.control();
        let Some(port) = control.port_of(dst).cloned() else { return };
        let datagram =
            Datagram { src: src.ip(), src_port: src.port(), dst: Some(dst), bytes, segment: segment.max(1) };
        let slot = packet::dest_qpn(bytes).filter(|qpn| *qpn != 1).map(|qpn| qpn & SLOT_MASK);
        match port.engines().into_iter().find(|engine| slot == Some(engine.slot().into())) {
            Some(engine) => {
                drop(control);
                engine.inject(&datagram);
            }
            None => control.inject(&port, &datagram),
        }
    }
}
