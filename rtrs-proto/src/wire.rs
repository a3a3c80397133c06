//! RTRS messages, byte for byte (Linux `drivers/infiniband/ulp/rtrs/rtrs-pri.h`, protocol 2.0).
//!
//! Every multi-byte field is little-endian. (Immediates are not messages; they are big-endian on the wire, see
//! [`crate::imm`].) Any bytes of the right length are a value of these types; what makes sense is decided by
//! `admission`, `request` and `client`. All types are unaligned views, so they can be read straight out of a
//! receive buffer with `zerocopy::FromBytes` and written with `IntoBytes`.

use std::fmt;
use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{I16, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `RTRS_MAGIC`: first field of both connect messages.
pub const RTRS_MAGIC: u16 = 0x1bbd;
/// `RTRS_PROTO_VER_MAJOR`: the only part of the version that peers compare.
pub const RTRS_PROTO_VER_MAJOR: u8 = 2;
/// `RTRS_PROTO_VER`: major in the high byte, minor in the low byte.
pub const RTRS_PROTO_VER: u16 = (RTRS_PROTO_VER_MAJOR as u16) << 8;
/// `RTRS_PORT`: default port, in `RDMA_PS_TCP` as well as `RDMA_PS_IB`.
pub const RTRS_PORT: u16 = 1234;
/// Bytes of RTRS private data in a CM REQ and, at least, in a REP or REJ.
pub const CONN_PRIV_LEN: usize = 56;
/// Largest `cid_num` that a kernel server accepts.
pub const MAX_CID_NUM: u16 = 4096;
/// `MAX_PATHS_NUM`: paths in one session.
pub const MAX_PATHS_NUM: usize = 128;
/// `NAME_MAX`: a session or device name has at most 254 bytes and a NUL within these 255.
pub const NAME_MAX: usize = 255;
/// `SERVICE_CON_QUEUE_DEPTH`: receives that a server posts on con 0; a client posts twice as many.
pub const SERVICE_CON_QUEUE_DEPTH: u16 = 512;

/// [`ConnReq::flags`] bit: this path may create the session (`first_conn`).
pub const FIRST_CONN: u8 = 1 << 0;
/// [`ConnRsp::flags`] bit `MSG_NEW_RKEY_F`: every response carries a [`MsgRkeyRsp`] with a fresh rkey.
pub const MSG_NEW_RKEY_F: u32 = 1 << 1;
/// [`MsgRdmaRead::flags`] bit `RTRS_MSG_NEED_INVAL_F`: the client would like SEND_WITH_INV for its key.
pub const MSG_NEED_INVAL_F: u16 = 1 << 0;

/// `enum rtrs_msg_types`: first field of every message but the connect ones.
pub mod msg_type {
    /// [`super::InfoReq`].
    pub const INFO_REQ: u16 = 0;
    /// [`super::InfoRspHdr`].
    pub const INFO_RSP: u16 = 1;
    /// [`super::MsgRdmaWrite`].
    pub const WRITE: u16 = 2;
    /// [`super::MsgRdmaRead`].
    pub const READ: u16 = 3;
    /// [`super::MsgRkeyRsp`].
    pub const RKEY_RSP: u16 = 4;
}

/// A version 4 UUID as raw bytes, in the order they have on the wire and in text.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `struct rtrs_msg_conn_req`: private data of `rdma_connect`, client to server, 56 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ConnReq {
    /// 0. Overlays the CMA header's version when the address family is AF_IB.
    pub cma_version: u8,
    /// 0. Overlays the CMA header's IP version; 0 says "not IP".
    pub ip_version: u8,
    /// [`RTRS_MAGIC`].
    pub magic: U16,
    /// [`RTRS_PROTO_VER`]; a server compares the high byte only.
    pub version: U16,
    /// Index of this connection in its path; 0 is the service connection.
    pub cid: U16,
    /// Connections of the path, the same in each of its requests.
    pub cid_num: U16,
    /// 1 on the first attempt to connect the path, one more on each further attempt.
    pub recon_cnt: U16,
    /// Names the path; kept across reconnects.
    pub sess_uuid: Uuid,
    /// Names the session.
    pub paths_uuid: Uuid,
    /// [`FIRST_CONN`]; the other bits are reserved.
    pub flags: u8,
    /// Sent as 0, ignored on receipt.
    pub reserved: [u8; 11],
}
const _: () = assert!(size_of::<ConnReq>() == CONN_PRIV_LEN && offset_of!(ConnReq, magic) == 2);
const _: () = assert!(offset_of!(ConnReq, sess_uuid) == 12 && offset_of!(ConnReq, paths_uuid) == 28);
const _: () = assert!(offset_of!(ConnReq, flags) == 44);

impl fmt::Display for ConnReq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "CONN_REQ v{:#06x} cid {}/{} recon {} path {} session {}{}",
            self.version,
            self.cid,
            self.cid_num,
            self.recon_cnt,
            self.sess_uuid,
            self.paths_uuid,
            if self.flags & FIRST_CONN != 0 { " first" } else { "" }
        )
    }
}

/// `struct rtrs_msg_conn_rsp`: private data of `rdma_accept` and of `rdma_reject`, server to client, 56 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ConnRsp {
    /// [`RTRS_MAGIC`].
    pub magic: U16,
    /// [`RTRS_PROTO_VER`]; the client compares the high byte only.
    pub version: U16,
    /// 0 in an accept, a negative errno in a reject (0 there would stall a kernel client for 30 s).
    pub errno: I16,
    /// Chunks of the session; 0 in a reject.
    pub queue_depth: U16,
    /// Data bytes per request; 0 in a reject.
    pub max_io_size: U32,
    /// Bytes for the user message and the RTRS header; 0 in a reject.
    pub max_hdr_size: U32,
    /// [`MSG_NEW_RKEY_F`].
    pub flags: U32,
    /// Sent as 0, ignored on receipt.
    pub reserved: [u8; 36],
}
const _: () = assert!(size_of::<ConnRsp>() == CONN_PRIV_LEN && offset_of!(ConnRsp, errno) == 4);
const _: () = assert!(offset_of!(ConnRsp, max_io_size) == 8 && offset_of!(ConnRsp, flags) == 16);

impl fmt::Display for ConnRsp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "CONN_RSP v{:#06x} errno {} qd {} max_io {} max_hdr {} flags {:#x}",
            self.version, self.errno, self.queue_depth, self.max_io_size, self.max_hdr_size, self.flags
        )
    }
}

/// `struct rtrs_msg_info_req`: first SEND on con 0, client to server, exactly 272 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InfoReq {
    /// [`msg_type::INFO_REQ`].
    pub msg_type: U16,
    /// Session name, NUL-terminated.
    pub pathname: [u8; NAME_MAX],
    /// Sent as 0, ignored on receipt.
    pub reserved: [u8; 15],
}
const _: () = assert!(size_of::<InfoReq>() == 272 && offset_of!(InfoReq, pathname) == 2);

impl InfoReq {
    /// The name up to its NUL, or `None` if it has none.
    pub fn name(&self) -> Option<&[u8]> {
        let end = self.pathname.iter().position(|&b| b == 0)?;
        Some(&self.pathname[..end])
    }
}

impl fmt::Display for InfoReq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name().unwrap_or(&self.pathname);
        write!(f, "INFO_REQ type {} name \"{}\"", self.msg_type, name.escape_ascii())
    }
}

/// `struct rtrs_msg_info_rsp` without its descriptors: answer to [`InfoReq`], server to client, 8 bytes.
/// `sg_cnt` [`SgDesc`]s follow, which cut into chunks give the address and rkey of every chunk in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InfoRspHdr {
    /// [`msg_type::INFO_RSP`].
    pub msg_type: U16,
    /// Descriptors that follow; must divide the queue depth.
    pub sg_cnt: U16,
    /// Sent as 0, ignored on receipt.
    pub reserved: [u8; 4],
}
const _: () = assert!(size_of::<InfoRspHdr>() == 8 && offset_of!(InfoRspHdr, sg_cnt) == 2);

impl fmt::Display for InfoRspHdr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "INFO_RSP type {} sg_cnt {}", self.msg_type, self.sg_cnt)
    }
}

/// `struct rtrs_sg_desc`: memory that the peer may write by RDMA, 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SgDesc {
    /// Start, as RDMA addresses it.
    pub addr: U64,
    /// rkey.
    pub key: U32,
    /// Bytes.
    pub len: U32,
}
const _: () = assert!(size_of::<SgDesc>() == 16 && offset_of!(SgDesc, len) == 12);

impl SgDesc {
    /// Puts the three numbers in wire form.
    pub const fn new(addr: u64, key: u32, len: u32) -> SgDesc {
        SgDesc { addr: U64::new(addr), key: U32::new(key), len: U32::new(len) }
    }
}

impl fmt::Display for SgDesc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{} key {:#x}", self.addr, self.len, self.key)
    }
}

/// `struct rtrs_msg_rdma_write`: header of a request that carries its data, at the immediate's offset, 4 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MsgRdmaWrite {
    /// [`msg_type::WRITE`].
    pub msg_type: U16,
    /// Bytes of the user message, which ends where this header starts.
    pub usr_len: U16,
}
const _: () = assert!(size_of::<MsgRdmaWrite>() == 4);

impl fmt::Display for MsgRdmaWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RDMA_WRITE type {} usr_len {}", self.msg_type, self.usr_len)
    }
}

/// `struct rtrs_msg_rdma_read` without its descriptor: header of a request that may be answered with data, 8 bytes.
/// `sg_cnt` (0 or 1) [`SgDesc`]s follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MsgRdmaRead {
    /// [`msg_type::READ`].
    pub msg_type: U16,
    /// Bytes of the user message, which ends where this header starts.
    pub usr_len: U16,
    /// [`MSG_NEED_INVAL_F`].
    pub flags: U16,
    /// Descriptors that follow: 0 or 1.
    pub sg_cnt: U16,
}
const _: () = assert!(size_of::<MsgRdmaRead>() == 8 && offset_of!(MsgRdmaRead, sg_cnt) == 6);

impl fmt::Display for MsgRdmaRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "RDMA_READ type {} usr_len {} flags {:#x} sg_cnt {}",
            self.msg_type, self.usr_len, self.flags, self.sg_cnt
        )
    }
}

/// `struct rtrs_msg_rkey_rsp`: payload of each response under [`MSG_NEW_RKEY_F`], server to client, 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MsgRkeyRsp {
    /// [`msg_type::RKEY_RSP`].
    pub msg_type: U16,
    /// The chunk; equals the immediate's id.
    pub buf_id: U16,
    /// Its rkey from now on.
    pub rkey: U32,
}
const _: () = assert!(size_of::<MsgRkeyRsp>() == 8 && offset_of!(MsgRkeyRsp, rkey) == 4);

impl fmt::Display for MsgRkeyRsp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RKEY_RSP type {} buf_id {} rkey {:#x}", self.msg_type, self.buf_id, self.rkey)
    }
}

/// Bytes of the longest RTRS request header: a read with its one descriptor.
pub const MAX_REQ_HDR_LEN: usize = size_of::<MsgRdmaRead>() + size_of::<SgDesc>();

#[cfg(test)]
mod tests {
    use super::*;

    /// As sent by a Linux 6.12 client for cid 0 of 3, first attempt.
    const KERNEL_CONN_REQ: [u8; 56] = [
        0x00, 0x00, 0xbd, 0x1b, 0x00, 0x02, 0x00, 0x00, 0x03, 0x00, 0x01, 0x00, //
        0xb1, 0xb1, 0x2e, 0xdb, 0x84, 0x53, 0x46, 0x1b, 0x85, 0x6d, 0xb6, 0x3e, 0x4c, 0xfe, 0xbb,
        0xcc, //
        0x4f, 0xfa, 0xb4, 0xe8, 0xd4, 0x25, 0x48, 0x7e, 0x89, 0x15, 0x89, 0xf2, 0xef, 0xb8, 0xab,
        0xc1, //
        0x01, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];

    #[test]
    fn conn_req_golden() {
        let m = ConnReq::read_from_bytes(&KERNEL_CONN_REQ).unwrap();
        assert_eq!(
            m.to_string(),
            "CONN_REQ v0x0200 cid 0/3 recon 1 path b1b12edb-8453-461b-856d-b63e4cfebbcc \
             session 4ffab4e8-d425-487e-8915-89f2efb8abc1 first"
        );
        assert_eq!((m.magic.get(), m.cma_version, m.ip_version), (RTRS_MAGIC, 0, 0));
        let again = ConnReq {
            cma_version: 0,
            ip_version: 0,
            magic: RTRS_MAGIC.into(),
            version: RTRS_PROTO_VER.into(),
            cid: 0.into(),
            cid_num: 3.into(),
            recon_cnt: 1.into(),
            sess_uuid: m.sess_uuid,
            paths_uuid: m.paths_uuid,
            flags: FIRST_CONN,
            reserved: [0; 11],
        };
        assert_eq!(again.as_bytes(), KERNEL_CONN_REQ);
    }

    #[test]
    fn conn_rsp_golden_defaults_with_rotating_keys() {
        let mut golden = [0u8; 56];
        golden[..20]
            .copy_from_slice(&[0xbd, 0x1b, 0, 2, 0, 0, 0, 2, 0, 0xf0, 1, 0, 0, 0x10, 0, 0, 2, 0, 0, 0]);
        let m = ConnRsp::read_from_bytes(&golden).unwrap();
        assert_eq!((m.errno.get(), m.queue_depth.get()), (0, 512));
        assert_eq!((m.max_io_size.get(), m.max_hdr_size.get()), (126_976, 4096));
        assert_eq!(m.flags.get(), MSG_NEW_RKEY_F);
        assert_eq!(m.to_string(), "CONN_RSP v0x0200 errno 0 qd 512 max_io 126976 max_hdr 4096 flags 0x2");
    }

    #[test]
    fn conn_rsp_golden_static_keys_qd_1000() {
        let head = [0xbd, 0x1b, 0, 2, 0, 0, 0xe8, 3, 0, 0xf0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0];
        let m = ConnRsp {
            magic: RTRS_MAGIC.into(),
            version: RTRS_PROTO_VER.into(),
            errno: 0.into(),
            queue_depth: 1000.into(),
            max_io_size: 61440.into(),
            max_hdr_size: 4096.into(),
            flags: 0.into(),
            reserved: [0; 36],
        };
        assert_eq!(m.as_bytes()[..20], head);
    }

    #[test]
    fn info_req_golden() {
        let mut golden = [0u8; 272];
        golden[2..4].copy_from_slice(b"s1");
        let m = InfoReq::read_from_bytes(&golden).unwrap();
        assert_eq!(m.name(), Some(&b"s1"[..]));
        assert_eq!(m.to_string(), "INFO_REQ type 0 name \"s1\"");
        let unterminated = InfoReq { pathname: [b'x'; 255], ..m };
        assert_eq!(unterminated.name(), None);
    }

    #[test]
    fn info_rsp_golden() {
        let golden = [1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0x24, 5, 1, 0, 0x11, 0xff, 0xc9, 4, 0, 0, 0, 0, 2, 0];
        let (hdr, rest) = InfoRspHdr::read_from_prefix(&golden).unwrap();
        assert_eq!((hdr.msg_type.get(), hdr.sg_cnt.get()), (msg_type::INFO_RSP, 512));
        let desc = SgDesc::read_from_bytes(rest).unwrap();
        assert_eq!(desc, SgDesc::new(0xff11_0001_0524_0000, 0x4c9, 131_072));
        assert_eq!(desc.to_string(), "0xff11000105240000+131072 key 0x4c9");
    }

    #[test]
    fn request_headers_and_rkey_rsp_are_little_endian() {
        let w = MsgRdmaWrite { msg_type: msg_type::WRITE.into(), usr_len: 32.into() };
        assert_eq!(w.as_bytes(), [2, 0, 32, 0]);
        let r = MsgRdmaRead {
            msg_type: msg_type::READ.into(),
            usr_len: 0x108.into(),
            flags: MSG_NEED_INVAL_F.into(),
            sg_cnt: 1.into(),
        };
        assert_eq!(r.as_bytes(), [3, 0, 8, 1, 1, 0, 1, 0]);
        let k = MsgRkeyRsp { msg_type: msg_type::RKEY_RSP.into(), buf_id: 5.into(), rkey: 0x4ca.into() };
        assert_eq!(k.as_bytes(), [4, 0, 5, 0, 0xca, 4, 0, 0]);
    }
}
