//! CM messages as bytes. Source: IBTA volume 1, 12.6; `ibta_vol1_c12.h`, `ib_mad.h`. All fields are big-endian.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A management datagram: what follows the UD headers of a packet for queue pair 1.
pub type MadBytes = [u8; 256];

/// The common header of a management datagram (`struct ib_mad_hdr`).
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct MadHeader {
    pub base_version: u8,
    pub class: u8,
    pub class_version: u8,
    pub method: u8,
    pub status: U16,
    pub class_specific: U16,
    pub tid: U64,
    pub attribute: U16,
    pub reserved: U16,
    pub modifier: U32,
}

pub(super) const HEADER_LEN: usize = size_of::<MadHeader>();
pub(super) const BODY_LEN: usize = 256 - HEADER_LEN;

pub(super) mod attribute {
    pub const REQ: u16 = 0x10;
    pub const MRA: u16 = 0x11;
    pub const REJ: u16 = 0x12;
    pub const REP: u16 = 0x13;
    pub const RTU: u16 = 0x14;
    pub const DREQ: u16 = 0x15;
    pub const DREP: u16 = 0x16;
}

/// Path of a REQ.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct WirePath {
    pub local_lid: U16,
    pub remote_lid: U16,
    pub local_gid: [u8; 16],
    pub remote_gid: [u8; 16],
    pub flow_rate: U32, // flow label 31..12, packet rate 5..0
    pub traffic_class: u8,
    pub hop_limit: u8,
    pub sl: u8,          // service level 7..4, subnet local 3
    pub ack_timeout: u8, // 7..3
}

/// Connection request.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct WireReq {
    pub local_id: U32,
    pub reserved4: u8,
    pub vendor: [u8; 3],
    pub service_id: U64,
    pub guid: U64,
    pub reserved24: U32,
    pub qkey: U32,
    pub qpn: [u8; 3],
    pub responder_resources: u8,
    pub local_eecn: [u8; 3],
    pub initiator_depth: u8,
    pub remote_eecn: [u8; 3],
    pub remote_timeout: u8, // 7..3; transport type 2..1; end-to-end flow control 0
    pub psn: [u8; 3],
    pub local_timeout: u8, // 7..3; retry count 2..0
    pub pkey: U16,
    pub mtu: u8,         // 7..4; RDC exists 3; RNR retry count 2..0
    pub max_retries: u8, // 7..4; SRQ 3; extended transport type 2..0
    pub primary: WirePath,
    pub alternate: WirePath,
    pub private: [u8; 92],
}

/// Connection reply.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct WireRep {
    pub local_id: U32,
    pub remote_id: U32,
    pub qkey: U32,
    pub qpn: [u8; 3],
    pub vendor_high: u8,
    pub eecn: [u8; 3],
    pub vendor_middle: u8,
    pub psn: [u8; 3],
    pub vendor_low: u8,
    pub responder_resources: u8,
    pub initiator_depth: u8,
    pub ack_delay: u8, // 7..3; failover 2..1; end-to-end flow control 0
    pub rnr_retry: u8, // 7..5; SRQ 4
    pub guid: U64,
    pub private: [u8; 196],
}

/// Ready to use, and disconnect reply.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct WireIds {
    pub local_id: U32,
    pub remote_id: U32,
    pub private: [u8; 224],
}

/// Disconnect request.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct WireDreq {
    pub local_id: U32,
    pub remote_id: U32,
    pub remote_qpn: [u8; 3],
    pub reserved11: u8,
    pub private: [u8; 220],
}

/// Message receipt acknowledgement.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct WireMra {
    pub local_id: U32,
    pub remote_id: U32,
    pub of: u8,      // 7..6
    pub timeout: u8, // 7..3
    pub private: [u8; 222],
}

/// Reject.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct WireRej {
    pub local_id: U32,
    pub remote_id: U32,
    pub of: u8,       // 7..6
    pub info_len: u8, // 7..1
    pub reason: U16,
    pub info: [u8; 72],
    pub private: [u8; 148],
}

const _: () = assert!(
    HEADER_LEN == 24
        && size_of::<WirePath>() == 44
        && size_of::<WireReq>() == BODY_LEN
        && size_of::<WireRep>() == BODY_LEN
        && size_of::<WireIds>() == BODY_LEN
        && size_of::<WireDreq>() == BODY_LEN
        && size_of::<WireMra>() == BODY_LEN
        && size_of::<WireRej>() == BODY_LEN
);

/// The first 36 bytes of a REQ's private data, as rdma_cm lays them out (`struct cma_hdr`).
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct CmaHeader {
    pub version: u8,
    pub ip_version: u8, // 7..4
    pub port: U16,
    pub src: [u8; 16], // IPv4: in the last four bytes, the others zero
    pub dst: [u8; 16],
}

const _: () = assert!(size_of::<CmaHeader>() == 36);
