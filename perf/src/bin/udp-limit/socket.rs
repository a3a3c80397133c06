//! Opens sockets as the provider's: non-blocking, unconnected, with a buffer for everything that can be outstanding.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use libc::{c_int, socklen_t};

use crate::address::Address;

/// Most that is asked for as a receive buffer, bytes.
const MAX_BUFFER: usize = 64 << 20;

/// A socket on a free port of `address` that holds `outstanding` payload bytes, if the kernel grants it.
///
/// Packets are sent with DF set, whatever path MTU the kernel believes in, as RoCEv2 needs it. `gro`: runs of packets
/// arrive whole.
pub fn open(address: IpAddr, outstanding: usize, gro: bool) -> Result<UdpSocket, String> {
    let failed = |what: &str, error: io::Error| format!("{what} ({address}): {error}");
    let socket = UdpSocket::bind((address, 0)).map_err(|e| failed("bind", e))?;
    socket.set_nonblocking(true).map_err(|e| failed("O_NONBLOCK", e))?;
    let fd = socket.as_raw_fd();
    let (level, option, probe) = match address {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
    };
    set(fd, level, option, probe).map_err(|e| failed("MTU_DISCOVER", e))?;
    if gro {
        set(fd, libc::IPPROTO_UDP, libc::UDP_GRO, 1).map_err(|e| failed("UDP_GRO", e))?;
    }
    // Packets are charged with the kernel's bookkeeping: for small ones a multiple of their payload.
    let bytes = (outstanding * 4).clamp(1 << 20, MAX_BUFFER) as c_int;
    if set(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes).is_err() {
        set(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, bytes).map_err(|e| failed("SO_RCVBUF", e))?;
    }
    Ok(socket)
}

/// The receive buffer that the kernel granted, in the bytes that one asks for.
pub fn receive_buffer(socket: &UdpSocket) -> io::Result<usize> {
    let (mut value, mut len) = (0 as c_int, size_of::<c_int>() as socklen_t);
    let into = (&raw mut value).cast();
    // SAFETY: `into` points to an int of `len` bytes; both live across the call. The kernel keeps no pointer.
    let rc =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, into, &mut len) };
    // The kernel doubles what was asked for, socket(7).
    if rc == 0 { Ok(value as usize / 2) } else { Err(io::Error::last_os_error()) }
}

/// The address to which `socket` is bound.
pub fn address(socket: &UdpSocket) -> io::Result<Address> {
    let mut address = Address::default();
    let mut len = Address::CAPACITY as socklen_t;
    // SAFETY: the address has room for `len` bytes; both live across the call. The kernel keeps no pointer.
    let rc = unsafe { libc::getsockname(socket.as_raw_fd(), address.as_mut_ptr().cast(), &mut len) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    address.len = len;
    Ok(address)
}

fn set(fd: RawFd, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    let from = (&raw const value).cast();
    // SAFETY: `from` points to an int of the length given, which the kernel reads before the call returns.
    let rc = unsafe { libc::setsockopt(fd, level, option, from, size_of::<c_int>() as socklen_t) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
