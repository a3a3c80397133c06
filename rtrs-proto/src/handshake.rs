//! The messages of connection set-up as a server reads and writes them: private data of CM REQ, REP and REJ, and the
//! INFO exchange. Checks are those of `rtrs-srv.c` (`rtrs_rdma_connect`, `process_info_req`), in its order.

use std::fmt;

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::errno::Errno;
use crate::limits::Geometry;
use crate::wire::{
    ConnReq, ConnRsp, FIRST_CONN, InfoReq, InfoRspHdr, MAX_CID_NUM, MSG_NEW_RKEY_F, RTRS_MAGIC,
    RTRS_PROTO_VER, RTRS_PROTO_VER_MAJOR, SgDesc, Uuid, msg_type,
};

/// A connect request that made sense by itself: `cid < cid_num <= 4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Index of the connection in its path.
    pub cid: u16,
    /// Connections of the path.
    pub cid_num: u16,
    /// The client's attempts to connect this path; informative.
    pub recon_cnt: u16,
    /// Names the path (`sess_uuid` on the wire).
    pub path_uuid: Uuid,
    /// Names the session (`paths_uuid` on the wire).
    pub session_uuid: Uuid,
    /// May create the session.
    pub first_conn: bool,
}

/// Private data that is no RTRS connect request. Reject with ECONNRESET.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadConnReq {
    /// Not enough bytes.
    #[error("private data of {0} bytes is too short: at least 56")]
    Short(usize),
    /// Not RTRS.
    #[error("magic {0:#06x} is not 0x1bbd")]
    Magic(u16),
    /// An RTRS we do not know.
    #[error("protocol version {0:#06x}: major version 2 is the only one supported")]
    Version(u16),
    /// Too many connections, or this one beyond them.
    #[error("cid {cid} of {cid_num}: cid must be below cid_num, and cid_num at most 4096")]
    Cid {
        /// As sent.
        cid: u16,
        /// As sent.
        cid_num: u16,
    },
}

impl ConnectRequest {
    /// Reads the private data of a CM REQ, without the CMA header (librdmacm removes it). Surplus bytes, which
    /// transports pad with, are ignored.
    ///
    /// # Errors
    /// [`BadConnReq`].
    pub fn parse(private_data: &[u8]) -> Result<ConnectRequest, BadConnReq> {
        let (msg, _) =
            ConnReq::ref_from_prefix(private_data).map_err(|_| BadConnReq::Short(private_data.len()))?;
        if msg.magic.get() != RTRS_MAGIC {
            return Err(BadConnReq::Magic(msg.magic.get()));
        }
        if !same_major(msg.version.get()) {
            return Err(BadConnReq::Version(msg.version.get()));
        }
        let (cid, cid_num) = (msg.cid.get(), msg.cid_num.get());
        if cid_num > MAX_CID_NUM || cid >= cid_num {
            return Err(BadConnReq::Cid { cid, cid_num });
        }
        Ok(ConnectRequest {
            cid,
            cid_num,
            recon_cnt: msg.recon_cnt.get(),
            path_uuid: msg.sess_uuid,
            session_uuid: msg.paths_uuid,
            first_conn: msg.flags & FIRST_CONN != 0,
        })
    }

    /// The client's message.
    pub fn to_wire(&self) -> ConnReq {
        ConnReq {
            cma_version: 0,
            ip_version: 0,
            magic: RTRS_MAGIC.into(),
            version: RTRS_PROTO_VER.into(),
            cid: self.cid.into(),
            cid_num: self.cid_num.into(),
            recon_cnt: self.recon_cnt.into(),
            sess_uuid: self.path_uuid,
            paths_uuid: self.session_uuid,
            flags: if self.first_conn { FIRST_CONN } else { 0 },
            reserved: [0; 11],
        }
    }
}

impl fmt::Display for ConnectRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_wire().fmt(f)
    }
}

/// Peers compare major versions only.
pub(crate) const fn same_major(version: u16) -> bool {
    version >> 8 == RTRS_PROTO_VER_MAJOR as u16
}

/// Private data for an accept. `rotating_keys`: announce [`MSG_NEW_RKEY_F`], a promise about every later response.
pub fn accept(geometry: &Geometry, rotating_keys: bool) -> ConnRsp {
    ConnRsp {
        magic: RTRS_MAGIC.into(),
        version: RTRS_PROTO_VER.into(),
        errno: 0.into(),
        queue_depth: geometry.queue_depth().into(),
        max_io_size: geometry.max_io_size().into(),
        max_hdr_size: geometry.max_hdr_size().into(),
        flags: if rotating_keys { MSG_NEW_RKEY_F } else { 0 }.into(),
        reserved: [0; 36],
    }
}

/// Private data for a (consumer-defined, reason 28) reject. It always has a negative errno: a kernel client waits for
/// its 30 s timeout when it finds 0.
pub fn reject(errno: Errno) -> ConnRsp {
    ConnRsp {
        magic: RTRS_MAGIC.into(),
        version: RTRS_PROTO_VER.into(),
        errno: errno.negative().into(),
        ..ConnRsp::new_zeroed()
    }
}

/// Why an INFO_REQ does not bring its path up. The path must be disconnected; there is no message for the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadInfoReq {
    /// Not enough bytes.
    #[error("INFO_REQ of {0} bytes is too short: 272")]
    Short(usize),
    /// Something else in its place.
    #[error("message type {0} where INFO_REQ (0) was due")]
    Type(u16),
    /// No NUL among the 255 bytes.
    #[error("session name is not NUL-terminated")]
    Unterminated,
    /// Stricter than the kernel, because names are JSON strings in the RPC.
    #[error("session name {0:?} must be UTF-8")]
    NotUtf8(Box<[u8]>),
    /// Empty, or with a character that would break paths.
    #[error("session name {0:?} must not be empty and must not contain '/' or '.'")]
    Name(Box<str>),
}

/// Reads INFO_REQ and returns the session name in it.
///
/// # Errors
/// [`BadInfoReq`].
pub fn parse_info_req(bytes: &[u8]) -> Result<&str, BadInfoReq> {
    let (msg, _) = InfoReq::ref_from_prefix(bytes).map_err(|_| BadInfoReq::Short(bytes.len()))?;
    if msg.msg_type.get() != msg_type::INFO_REQ {
        return Err(BadInfoReq::Type(msg.msg_type.get()));
    }
    let name = msg.name().ok_or(BadInfoReq::Unterminated)?;
    let name = std::str::from_utf8(name).map_err(|_| BadInfoReq::NotUtf8(name.into()))?;
    if name.is_empty() || name.contains(['/', '.']) {
        return Err(BadInfoReq::Name(name.into()));
    }
    Ok(name)
}

/// Builds INFO_RSP from the regions that hold the chunks, in order. `None` if there are none or more than 65535.
///
/// The client demands that `descs.len()` divides the queue depth and that each region is whole chunks; one region
/// over all chunks always does.
pub fn info_rsp(descs: &[SgDesc]) -> Option<Vec<u8>> {
    let sg_cnt = u16::try_from(descs.len()).ok().filter(|&n| n != 0)?;
    let hdr = InfoRspHdr { msg_type: msg_type::INFO_RSP.into(), sg_cnt: sg_cnt.into(), reserved: [0; 4] };
    Some([hdr.as_bytes(), descs.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> ConnectRequest {
        ConnectRequest {
            cid: 1,
            cid_num: 3,
            recon_cnt: 7,
            path_uuid: Uuid([1; 16]),
            session_uuid: Uuid([2; 16]),
            first_conn: true,
        }
    }

    #[test]
    fn connect_request_round_trips_and_padding_is_ignored() {
        let mut bytes = request().to_wire().as_bytes().to_vec();
        bytes.extend([0xee; 36]);
        assert_eq!(ConnectRequest::parse(&bytes), Ok(request()));
    }

    #[test]
    fn minor_version_is_ignored_major_is_not() {
        let mut msg = request().to_wire();
        msg.version = 0x02ff.into();
        assert_eq!(ConnectRequest::parse(msg.as_bytes()), Ok(request()));
        msg.version = 0x0300.into();
        assert_eq!(ConnectRequest::parse(msg.as_bytes()), Err(BadConnReq::Version(0x0300)));
    }

    #[test]
    fn bad_connect_requests() {
        let msg = request().to_wire();
        assert_eq!(ConnectRequest::parse(&msg.as_bytes()[..55]), Err(BadConnReq::Short(55)));
        let magic = ConnReq { magic: 0x1bbe.into(), ..msg };
        assert_eq!(ConnectRequest::parse(magic.as_bytes()), Err(BadConnReq::Magic(0x1bbe)));
        for (cid, cid_num) in [(0, 0), (3, 3), (0, 4097)] {
            let msg = ConnReq { cid: cid.into(), cid_num: cid_num.into(), ..msg };
            assert_eq!(ConnectRequest::parse(msg.as_bytes()), Err(BadConnReq::Cid { cid, cid_num }));
        }
        let most = ConnReq { cid: 4095.into(), cid_num: 4096.into(), ..msg };
        assert!(ConnectRequest::parse(most.as_bytes()).is_ok());
    }

    #[test]
    fn accept_golden() {
        let head = [0xbd, 0x1b, 0, 2, 0, 0, 0, 2, 0, 0xf0, 1, 0, 0, 0x10, 0, 0, 2, 0, 0, 0];
        let rsp = accept(&Geometry::default(), true);
        assert_eq!((&rsp.as_bytes()[..20], &rsp.as_bytes()[20..]), (&head[..], &[0; 36][..]));
        assert_eq!(accept(&Geometry::default(), false).flags.get(), 0);
    }

    #[test]
    fn reject_golden() {
        let rsp = reject(Errno::EEXIST);
        assert_eq!(rsp.as_bytes()[..6], [0xbd, 0x1b, 0, 2, 0xef, 0xff]);
        assert_eq!(rsp.as_bytes()[6..], [0; 50]);
    }

    fn info_req(name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 272];
        bytes[2..2 + name.len()].copy_from_slice(name);
        bytes
    }

    #[test]
    fn info_req_names() {
        assert_eq!(parse_info_req(&info_req(b"s1")), Ok("s1"));
        assert_eq!(parse_info_req(&info_req(&[b'x'; 254])).map(str::len), Ok(254));
        assert_eq!(parse_info_req(&info_req(&[b'x'; 255])), Err(BadInfoReq::Unterminated));
        for bad in ["", "a/b", "host.example"] {
            assert_eq!(parse_info_req(&info_req(bad.as_bytes())), Err(BadInfoReq::Name(bad.into())));
        }
        assert_eq!(parse_info_req(&info_req(&[0xff])), Err(BadInfoReq::NotUtf8([0xff].into())));
        assert_eq!(parse_info_req(&info_req(b"s1")[..271]), Err(BadInfoReq::Short(271)));
        let mut typed = info_req(b"s1");
        typed[0] = 1;
        assert_eq!(parse_info_req(&typed), Err(BadInfoReq::Type(1)));
    }

    #[test]
    fn info_rsp_golden_and_limits() {
        let bytes = info_rsp(&[SgDesc::new(0x1000, 0x4c9, 64 << 20)]).unwrap();
        let golden = [1, 0, 1, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0xc9, 4, 0, 0, 0, 0, 0, 4];
        assert_eq!(bytes, golden);
        assert_eq!(info_rsp(&[]), None);
        assert_eq!(info_rsp(&vec![SgDesc::new(0, 0, 1); 65536]), None);
    }
}
