//! Names and addresses in CM messages, as rdma_cm and RoCE write them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use zerocopy::{FromBytes, IntoBytes};

use super::wire::CmaHeader;

/// An IP address as a RoCEv2 GID: IPv4 in the mapped form. Source: IBTA A17.4.
pub fn gid(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The address behind a GID.
pub fn address(gid: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(gid).to_canonical()
}

/// The service of a port of rdma_cm's port space TCP. Source: `cma.c`, `rdma_get_service_id`.
pub fn service_id(port: u16) -> u64 {
    RDMA_PS_TCP << 16 | u64::from(port)
}

/// The port, if `service_id` is of that port space.
pub fn service_port(service_id: u64) -> Option<u16> {
    (service_id >> 16 == RDMA_PS_TCP).then_some(service_id as u16)
}

const RDMA_PS_TCP: u64 = 0x0106;

/// rdma_cm's own part of a REQ's private data: who calls whom. `None` if it is not of the known version or family.
pub(super) fn parse_cma(private: &[u8; 92]) -> Option<(SocketAddr, IpAddr)> {
    let (header, _) = CmaHeader::read_from_prefix(private).ok()?;
    let ip: fn([u8; 16]) -> IpAddr = match (header.version, header.ip_version >> 4) {
        (0, 4) => |b| Ipv4Addr::new(b[12], b[13], b[14], b[15]).into(),
        (0, 6) => |b| Ipv6Addr::from(b).to_canonical(),
        _ => return None,
    };
    Some((SocketAddr::new(ip(header.src), header.port.get()), ip(header.dst)))
}

/// Bytes of a REQ that are left for the consumer.
pub const REQ_PRIVATE: usize = 92 - size_of::<CmaHeader>();

/// `consumer` is at most [`REQ_PRIVATE`] bytes long.
pub(super) fn put_cma(src: SocketAddr, dst: IpAddr, consumer: &[u8]) -> [u8; 92] {
    let ip = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[12..].copy_from_slice(&v4.octets());
            bytes
        }
        IpAddr::V6(v6) => v6.octets(),
    };
    let header = CmaHeader {
        version: 0,
        ip_version: if dst.is_ipv4() { 4 << 4 } else { 6 << 4 },
        port: src.port().into(),
        src: ip(src.ip()),
        dst: ip(dst),
    };
    let mut private = [0; 92];
    let (head, rest) = private.split_at_mut(size_of::<CmaHeader>());
    head.copy_from_slice(header.as_bytes());
    rest[..consumer.len()].copy_from_slice(consumer);
    private
}

/// Bytes of a path MTU code 1..=5.
pub fn mtu_bytes(code: u8) -> Option<u32> {
    (1..=5).contains(&code).then(|| 128 << code)
}

/// Code of the largest path MTU of at most `bytes`; `None` below 256.
pub fn mtu_code(bytes: u32) -> Option<u8> {
    (1..=5).rev().find(|code| 128 << code <= bytes)
}
