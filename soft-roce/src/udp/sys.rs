//! What the standard library lacks about UDP sockets: options, and addresses as `sendmmsg` and `recvmmsg` want them.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A `sockaddr` of either IP family.
#[derive(Clone, Copy)]
pub union RawAddr {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl RawAddr {
    /// All zero: family `AF_UNSPEC`.
    pub const fn empty() -> Self {
        // SAFETY: both members are plain integers and arrays of them, of which zero is a value.
        unsafe { MaybeUninit::zeroed().assume_init() }
    }

    /// `addr` without flow label and scope.
    pub fn new(addr: SocketAddr) -> Self {
        let mut raw = Self::empty();
        let port = addr.port().to_be();
        match addr.ip() {
            IpAddr::V4(ip) => {
                raw.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: port,
                    sin_addr: libc::in_addr { s_addr: u32::from(ip).to_be() },
                    sin_zero: [0; 8],
                }
            }
            IpAddr::V6(ip) => {
                raw.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: port,
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: ip.octets() },
                    sin6_scope_id: 0,
                }
            }
        }
        raw
    }

    /// `None` for other families.
    pub fn get(&self) -> Option<(IpAddr, u16)> {
        // SAFETY: the family is the first member of both layouts, and every member is initialised in both (`empty`
        // zeroes all, and the kernel only writes integers).
        unsafe {
            match i32::from(self.v4.sin_family) {
                libc::AF_INET => {
                    let ip = Ipv4Addr::from(u32::from_be(self.v4.sin_addr.s_addr));
                    Some((ip.into(), u16::from_be(self.v4.sin_port)))
                }
                libc::AF_INET6 => {
                    let ip = Ipv6Addr::from(self.v6.sin6_addr.s6_addr);
                    Some((ip.into(), u16::from_be(self.v6.sin6_port)))
                }
                _ => None,
            }
        }
    }

    /// Bytes of the family's layout.
    pub fn len(&self) -> u32 {
        // SAFETY: as in `get`.
        let v6 = i32::from(unsafe { self.v4.sin_family }) == libc::AF_INET6;
        (if v6 { size_of::<libc::sockaddr_in6>() } else { size_of::<libc::sockaddr_in>() }) as u32
    }

    /// Room for any address the kernel may write.
    pub const ROOM: u32 = size_of::<Self>() as u32;
}

fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// A non-blocking UDP socket of `ip`'s family; IPv6 ones take IPv6 only.
pub fn udp_socket(ip: IpAddr) -> io::Result<OwnedFd> {
    let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is involved.
    let fd = check(unsafe { libc::socket(family, kind, 0) })?;
    // SAFETY: a new descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if ip.is_ipv6() {
        set(&fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    Ok(fd)
}

/// Sets an option that is an `int`.
pub fn set(fd: &OwnedFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_raw(fd, level, name, &value)
}

/// Sets an option that is a `T`, which must be a plain C type.
pub fn set_raw<T: Copy>(fd: &OwnedFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes at `value`, which is borrowed meanwhile.
    let ret = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const *value).cast(), size_of::<T>() as u32)
    };
    check(ret).map(drop)
}

/// An option that is an `int`.
pub fn get(fd: &OwnedFd, level: i32, name: i32) -> io::Result<i32> {
    let (mut value, mut len) = (0i32, size_of::<i32>() as u32);
    // SAFETY: `value` and `len` are writable and `len` tells the size of `value`.
    let ret = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) };
    check(ret).map(|_| value)
}

/// Source: `bind(2)`.
pub fn bind(fd: &OwnedFd, addr: SocketAddr) -> io::Result<()> {
    let raw = RawAddr::new(addr);
    // SAFETY: `raw` is a valid address of `raw.len()` bytes.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const raw).cast(), raw.len()) }).map(drop)
}

/// Nobody has `addr`, not even to share it.
pub fn is_free(addr: SocketAddr) -> bool {
    let bound = udp_socket(addr.ip()).and_then(|fd| bind(&fd, addr));
    !matches!(bound, Err(e) if e.kind() == io::ErrorKind::AddrInUse)
}

/// Source: `connect(2)`; on a UDP socket this chooses route and source address.
pub fn connect(fd: &OwnedFd, addr: SocketAddr) -> io::Result<()> {
    let raw = RawAddr::new(addr);
    // SAFETY: as in `bind`.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const raw).cast(), raw.len()) }).map(drop)
}

/// Own address. Source: `getsockname(2)`.
pub fn local_addr(fd: &OwnedFd) -> io::Result<(IpAddr, u16)> {
    let (mut raw, mut len) = (RawAddr::empty(), RawAddr::ROOM);
    // SAFETY: room for `len` bytes.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut raw).cast(), &raw mut len) })?;
    raw.get().ok_or_else(|| io::ErrorKind::Unsupported.into())
}

/// Adds to an eventfd, so that it becomes readable. A full counter is readable already.
pub fn notify(fd: BorrowedFd<'_>) {
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Empties an eventfd or timerfd.
pub fn drain(fd: BorrowedFd<'_>) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive() {
        for text in ["192.0.2.1:4791", "[2001:db8::1]:65535", "0.0.0.0:0"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(RawAddr::new(addr).get(), Some((addr.ip(), addr.port())));
        }
        assert_eq!(RawAddr::empty().get(), None);
    }
}
