//! Socket addresses as librdmacm wants and gives them.

use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use rdma_mummy_sys as sys;

/// A `sockaddr` of either family, large enough for both.
pub(super) struct RawAddr(libc::sockaddr_storage);

impl RawAddr {
    pub fn new(addr: SocketAddr) -> Self {
        // SAFETY: all-zero bytes are a valid sockaddr_storage (AF_UNSPEC).
        let mut storage: libc::sockaddr_storage = unsafe { MaybeUninit::zeroed().assume_init() };
        let at = (&raw mut storage).cast::<u8>();
        match addr {
            SocketAddr::V4(v4) => {
                let sin = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from(*v4.ip()).to_be() },
                    sin_zero: [0; 8],
                };
                const { assert!(size_of::<libc::sockaddr_in>() <= size_of::<libc::sockaddr_storage>()) };
                // SAFETY: the storage is larger and aligned for every address family (RFC 3493 3.10).
                unsafe { at.cast::<libc::sockaddr_in>().write(sin) };
            }
            SocketAddr::V6(v6) => {
                let sin6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: v6.scope_id(),
                };
                const { assert!(size_of::<libc::sockaddr_in6>() <= size_of::<libc::sockaddr_storage>()) };
                // SAFETY: as above.
                unsafe { at.cast::<libc::sockaddr_in6>().write(sin6) };
            }
        }
        Self(storage)
    }

    /// Valid while `self` lives.
    pub fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        (&raw mut self.0).cast()
    }
}

/// An address of librdmacm; IPv4 that came in by an IPv6 listener becomes IPv4. `None` for other families.
fn from_storage(s: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let at = &raw const *s;
    match i32::from(s.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says what the storage holds, which is larger and aligned for it.
            let sin = unsafe { at.cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(u32::from_be(sin.sin_addr.s_addr));
            Some(SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(sin.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let sin6 = unsafe { at.cast::<libc::sockaddr_in6>().read() };
            let (ip, port) = (Ipv6Addr::from(sin6.sin6_addr.s6_addr), u16::from_be(sin6.sin6_port));
            Some(match ip.to_canonical() {
                IpAddr::V4(v4) => SocketAddr::V4(SocketAddrV4::new(v4, port)),
                IpAddr::V6(v6) => {
                    SocketAddr::V6(SocketAddrV6::new(v6, port, sin6.sin6_flowinfo, sin6.sin6_scope_id))
                }
            })
        }
        _ => None,
    }
}

/// Our and the peer's address.
///
/// # Safety
/// `id` is a live `rdma_cm_id`, and no other thread changes its addresses meanwhile.
pub(super) unsafe fn of_id(id: *mut sys::rdma_cm_id) -> (Option<SocketAddr>, Option<SocketAddr>) {
    // SAFETY: live by the caller's word. Every member of the two unions is plain bytes, and the storage member, the
    // largest, is what librdmacm allocates for them.
    unsafe {
        let route = &raw const (*id).route.addr;
        let src = (&raw const (*route).src_addr_union.src_storage).read();
        let dst = (&raw const (*route).dst_addr_union.dst_storage).read();
        (from_storage(&src), from_storage(&dst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_round_trip_and_mapped_ones_become_ipv4() {
        for text in ["10.1.2.3:1234", "[fe80::1%5]:80", "[::]:0", "[2001:db8::7]:65535"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(from_storage(&RawAddr::new(addr).0), Some(addr));
        }
        let mapped = RawAddr::new("[::ffff:10.1.2.3]:9".parse().unwrap());
        assert_eq!(from_storage(&mapped.0), Some("10.1.2.3:9".parse().unwrap()));
    }

    #[test]
    fn other_families_are_none() {
        let mut raw = RawAddr::new("10.1.2.3:1234".parse().unwrap());
        raw.0.ss_family = libc::AF_UNIX as libc::sa_family_t;
        assert_eq!(from_storage(&raw.0), None);
    }
}
