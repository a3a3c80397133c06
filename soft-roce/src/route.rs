//! What the system's routing says about a peer.

use std::io;
use std::net::{IpAddr, SocketAddr};

use crate::udp::sys;
use roce_proto::UDP_PORT;

/// The way to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Our address on it.
    pub src: IpAddr,
    /// Path MTU of RDMA: 256, 512 … 4096 bytes.
    pub mtu: u32,
}

const IP_MTU: i32 = 14;

/// Bytes of IP packet beside the payload of an RDMA packet. Linux uses the same (`iboe_get_mtu` in `ib_addr.h`).
const OVERHEAD: u32 = 96;

/// Asks for the route to `dst`, from `src` if given. Sends nothing.
///
/// # Errors
/// No route; `src` is not ours; a link too narrow for 256 bytes of payload.
pub fn route(src: Option<IpAddr>, dst: IpAddr) -> io::Result<Route> {
    let socket = sys::udp_socket(dst)?;
    if let Some(src) = src {
        sys::bind(&socket, SocketAddr::new(src, 0))?;
    }
    sys::connect(&socket, SocketAddr::new(dst, UDP_PORT))?;
    let (src, _) = sys::local_addr(&socket)?;
    let mtu = if dst.is_ipv4() {
        sys::get(&socket, libc::IPPROTO_IP, IP_MTU)?
    } else {
        sys::get(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU)?
    };
    let mtu = rdma_mtu(mtu.max(0) as u32).ok_or_else(|| {
        io::Error::new(io::ErrorKind::Unsupported, format!("the path's MTU of {mtu} bytes is too small"))
    })?;
    Ok(Route { src, mtu })
}

/// The largest RDMA MTU that fits an IP packet of `mtu` bytes.
fn rdma_mtu(mtu: u32) -> Option<u32> {
    [4096, 2048, 1024, 512, 256].into_iter().find(|size| size + OVERHEAD <= mtu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mtus_are_those_of_linux() {
        let table = [(65_536, Some(4096)), (9000, Some(4096)), (4192, Some(4096)), (4191, Some(2048))];
        for (mtu, rdma) in table.into_iter().chain([(1500, Some(1024)), (352, Some(256)), (351, None)]) {
            assert_eq!(rdma_mtu(mtu), rdma);
        }
    }

    #[test]
    fn loopback_is_reached_from_itself() {
        let ip: IpAddr = "127.0.0.1".parse().unwrap();
        assert_eq!(route(None, ip).unwrap(), Route { src: ip, mtu: 4096 });
        let other: IpAddr = "127.0.0.9".parse().unwrap();
        assert_eq!(route(Some(other), ip).unwrap().src, other);
        assert!(route(Some("192.0.2.77".parse().unwrap()), ip).is_err());
    }
}
