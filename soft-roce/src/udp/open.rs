//! Sockets with the options that RoCE needs.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use super::steer::steer_by_qpn;
use super::sys;

const UDP_SEGMENT: i32 = 103;
const UDP_GRO: i32 = 104;
const UDP_NO_CHECK6_RX: i32 = 102;
const SO_RXQ_OVFL: i32 = 40;
/// Never fragments, and ignores forged ICMP about smaller MTUs. On an unconnected IPv4 socket it also makes the kernel
/// send identification 0 with DF set, which the ICRC needs to know (`ip_select_ident_segs` in Linux `ip.h`).
const PMTUDISC_PROBE: i32 = 3;

/// A receiving socket on the RoCE port.
pub struct RxSocket {
    pub fd: OwnedFd,
    /// Bytes of payload that the kernel buffers at most; it accounts overhead beside them.
    pub buffer: usize,
}

/// A sending socket.
pub struct TxSocket {
    pub fd: OwnedFd,
    /// Source port, which the ICRC covers.
    pub port: u16,
    /// Bound to no address: packets say theirs.
    pub wildcard: bool,
    /// The kernel can cut a run of packets into its packets.
    pub segments: bool,
}

/// Opens one more socket of `addr`'s group. `first`: tells the group how to spread packets; later sockets follow.
/// `want`: bytes of receive buffer to ask for, 0 for the system's default.
pub fn open_rx(addr: SocketAddr, first: bool, want: usize) -> io::Result<RxSocket> {
    let fd = sys::udp_socket(addr.ip())?;
    sys::set(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    discover_by_probing(&fd, addr.ip())?;
    if addr.ip().is_ipv6() {
        // rxe sends no UDP checksums over IPv6 either.
        sys::set(&fd, libc::SOL_UDP, UDP_NO_CHECK6_RX, 1)?;
    }
    if addr.ip().is_unspecified() {
        tell_destination(&fd, addr.ip())?;
    }
    // A kernel without these two is slower or tells less, no more.
    let _ = sys::set(&fd, libc::SOL_UDP, UDP_GRO, 1);
    let _ = sys::set(&fd, libc::SOL_SOCKET, SO_RXQ_OVFL, 1);
    let buffer = ask_for_buffer(&fd, want)?;
    sys::bind(&fd, addr)?;
    if first {
        steer_by_qpn(&fd)?;
    }
    Ok(RxSocket { fd, buffer })
}

/// Opens a sending socket on `ip` with a port from the range for RoCE senders (`rdma_flow_label_to_udp_sport`).
/// `random` gives numbers to choose it with.
pub fn open_tx(ip: IpAddr, mut random: impl FnMut() -> u32) -> io::Result<TxSocket> {
    let fd = sys::udp_socket(ip)?;
    discover_by_probing(&fd, ip)?;
    let _ = sys::set(&fd, libc::SOL_SOCKET, libc::SO_SNDBUF, 4 << 20);
    let segments = sys::set(&fd, libc::SOL_UDP, UDP_SEGMENT, 0).is_ok();
    let mut tries = 0;
    loop {
        let port = 0xc000 | (random() as u16 & 0x3fff);
        match sys::bind(&fd, SocketAddr::new(ip, port)) {
            Ok(()) => return Ok(TxSocket { fd, port, wildcard: ip.is_unspecified(), segments }),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && tries < 64 => tries += 1,
            Err(e) => return Err(e),
        }
    }
}

fn discover_by_probing(fd: &OwnedFd, ip: IpAddr) -> io::Result<()> {
    if ip.is_ipv4() {
        return sys::set(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, PMTUDISC_PROBE);
    }
    sys::set(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, PMTUDISC_PROBE)?;
    sys::set(fd, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 1)
}

fn tell_destination(fd: &OwnedFd, ip: IpAddr) -> io::Result<()> {
    if ip.is_ipv4() {
        sys::set(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)
    } else {
        sys::set(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)
    }
}

/// Asks for a receive buffer, past the system's limit if privileged. Returns what it is.
fn ask_for_buffer(fd: &OwnedFd, want: usize) -> io::Result<usize> {
    if want > 0 {
        let want = i32::try_from(want).unwrap_or(i32::MAX);
        sys::set(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, want)
            .or_else(|_| sys::set(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, want))?;
    }
    // The kernel doubles what it was asked for, for its overhead (socket(7)).
    sys::get(fd, libc::SOL_SOCKET, libc::SO_RCVBUF).map(|n| n.max(0) as usize / 2)
}
