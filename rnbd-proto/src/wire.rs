//! RNBD messages, byte for byte (Linux `drivers/block/rnbd/rnbd-proto.h`, protocol 2.0).
//!
//! Little-endian. Padding and reserved bytes of kernel peers are uninitialised memory in several messages: they are
//! sent as zero and never looked at. Sectors on the wire are always 512 bytes, whatever the logical block size.

use std::fmt;
use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `RNBD_PROTO_VER_MAJOR`: the only version number exchanged.
pub const RNBD_PROTO_VER_MAJOR: u8 = 2;
/// `NAME_MAX`: a device name has at most 254 bytes and a NUL within these 255.
pub const NAME_MAX: usize = 255;
/// Bytes of the unit in which the wire counts sectors.
pub const SECTOR_SIZE: u32 = 512;

/// `enum rnbd_msg_type`: first field of every message.
pub mod msg_type {
    /// [`super::MsgSessInfo`], request.
    pub const SESS_INFO: u16 = 0;
    /// [`super::MsgSessInfo`], answer.
    pub const SESS_INFO_RSP: u16 = 1;
    /// [`super::MsgOpen`].
    pub const OPEN: u16 = 2;
    /// [`super::MsgOpenRsp`].
    pub const OPEN_RSP: u16 = 3;
    /// [`super::MsgIo`].
    pub const IO: u16 = 4;
    /// [`super::MsgClose`].
    pub const CLOSE: u16 = 5;
}

/// [`MsgOpenRsp::cache_policy`] bit `RNBD_FUA`; a kernel client uses FUA only if the write-back bit is set too.
pub const CACHE_FUA: u8 = 1 << 0;
/// [`MsgOpenRsp::cache_policy`] bit `RNBD_WRITEBACK`: there is a volatile cache, so flushes are wanted.
pub const CACHE_WRITEBACK: u8 = 1 << 1;

/// `struct rnbd_msg_hdr`, 4 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MsgHdr {
    /// One of [`msg_type`].
    pub msg_type: U16,
    /// Anything.
    pub padding: U16,
}
const _: () = assert!(size_of::<MsgHdr>() == 4);

impl MsgHdr {
    /// A header of type `msg_type`.
    pub const fn new(msg_type: u16) -> MsgHdr {
        MsgHdr { msg_type: U16::new(msg_type), padding: U16::new(0) }
    }
}

impl fmt::Display for MsgHdr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.msg_type.get() {
            msg_type::SESS_INFO => f.write_str("SESS_INFO"),
            msg_type::SESS_INFO_RSP => f.write_str("SESS_INFO_RSP"),
            msg_type::OPEN => f.write_str("OPEN"),
            msg_type::OPEN_RSP => f.write_str("OPEN_RSP"),
            msg_type::IO => f.write_str("IO"),
            msg_type::CLOSE => f.write_str("CLOSE"),
            other => write!(f, "message type {other}"),
        }
    }
}

/// `struct rnbd_msg_sess_info` and, being the same, `struct rnbd_msg_sess_info_rsp`; 36 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MsgSessInfo {
    /// [`msg_type::SESS_INFO`] or [`msg_type::SESS_INFO_RSP`].
    pub hdr: MsgHdr,
    /// Major version: the client's own, then the lower of both.
    pub ver: u8,
    /// Anything.
    pub reserved: [u8; 31],
}
const _: () = assert!(size_of::<MsgSessInfo>() == 36 && offset_of!(MsgSessInfo, ver) == 4);

impl MsgSessInfo {
    /// The client's message.
    pub const fn request() -> MsgSessInfo {
        MsgSessInfo { hdr: MsgHdr::new(msg_type::SESS_INFO), ver: RNBD_PROTO_VER_MAJOR, reserved: [0; 31] }
    }

    /// The server's answer with the version that the session will use.
    pub const fn response(ver: u8) -> MsgSessInfo {
        MsgSessInfo { hdr: MsgHdr::new(msg_type::SESS_INFO_RSP), ver, reserved: [0; 31] }
    }
}

impl fmt::Display for MsgSessInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ver {}", self.hdr, self.ver)
    }
}

/// `struct rnbd_msg_open`, 264 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MsgOpen {
    /// [`msg_type::OPEN`].
    pub hdr: MsgHdr,
    /// 0 read-only, 1 read-write, 2 migration.
    pub access_mode: u8,
    /// Anything.
    pub resv1: u8,
    /// Below the server's search path, NUL-terminated.
    pub dev_name: [u8; NAME_MAX],
    /// Anything.
    pub reserved: [u8; 3],
}
const _: () = assert!(size_of::<MsgOpen>() == 264 && offset_of!(MsgOpen, dev_name) == 6);

impl MsgOpen {
    /// The client's message, or `None` if `dev_name` is longer than 254 bytes or contains a NUL.
    pub fn request(access_mode: u8, dev_name: &[u8]) -> Option<MsgOpen> {
        if dev_name.len() >= NAME_MAX || dev_name.contains(&0) {
            return None;
        }
        let mut msg = MsgOpen { hdr: MsgHdr::new(msg_type::OPEN), access_mode, ..MsgOpen::new_zeroed() };
        msg.dev_name[..dev_name.len()].copy_from_slice(dev_name);
        Some(msg)
    }

    /// The name up to its NUL, or `None` if it has none.
    pub fn name(&self) -> Option<&[u8]> {
        let end = self.dev_name.iter().position(|&b| b == 0)?;
        Some(&self.dev_name[..end])
    }
}

impl fmt::Display for MsgOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name().unwrap_or(&self.dev_name);
        write!(f, "{} mode {} \"{}\"", self.hdr, self.access_mode, name.escape_ascii())
    }
}

/// `struct rnbd_msg_open_rsp`, 56 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MsgOpenRsp {
    /// [`msg_type::OPEN_RSP`].
    pub hdr: MsgHdr,
    /// Names the open in IO and CLOSE; valid within the session.
    pub device_id: U32,
    /// Capacity in 512-byte sectors.
    pub nsectors: U64,
    /// In 512-byte sectors. Kernel clients ignore it: requests go up to the session's `max_io_size`.
    pub max_hw_sectors: U32,
    /// In 512-byte sectors; 0 if not supported.
    pub max_write_zeroes_sectors: U32,
    /// In 512-byte sectors; 0 if not supported.
    pub max_discard_sectors: U32,
    /// Bytes.
    pub discard_granularity: U32,
    /// Bytes.
    pub discard_alignment: U32,
    /// Bytes.
    pub physical_block_size: U16,
    /// Bytes; a kernel client refuses 0.
    pub logical_block_size: U16,
    /// Kernel clients ignore it.
    pub max_segments: U16,
    /// Non-zero if secure erase works, with `max_discard_sectors` as its limit.
    pub secure_discard: U16,
    /// 0.
    pub obsolete_rotational: u8,
    /// [`CACHE_FUA`] and [`CACHE_WRITEBACK`].
    pub cache_policy: u8,
    /// Anything.
    pub reserved: [u8; 10],
}
const _: () = assert!(size_of::<MsgOpenRsp>() == 56 && offset_of!(MsgOpenRsp, nsectors) == 8);
const _: () = assert!(offset_of!(MsgOpenRsp, physical_block_size) == 36);
const _: () = assert!(offset_of!(MsgOpenRsp, cache_policy) == 45);

impl fmt::Display for MsgOpenRsp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} device {} sectors {} block {}/{} discard {} zeroes {} cache {:#x}",
            self.hdr,
            self.device_id,
            self.nsectors,
            self.logical_block_size,
            self.physical_block_size,
            self.max_discard_sectors,
            self.max_write_zeroes_sectors,
            self.cache_policy
        )
    }
}

/// `struct rnbd_msg_close`, 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MsgClose {
    /// [`msg_type::CLOSE`].
    pub hdr: MsgHdr,
    /// From [`MsgOpenRsp`].
    pub device_id: U32,
}
const _: () = assert!(size_of::<MsgClose>() == 8);

impl MsgClose {
    /// The client's message.
    pub const fn request(device_id: u32) -> MsgClose {
        MsgClose { hdr: MsgHdr::new(msg_type::CLOSE), device_id: U32::new(device_id) }
    }
}

impl fmt::Display for MsgClose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} device {}", self.hdr, self.device_id)
    }
}

/// `struct rnbd_msg_io`, 32 bytes. Version 1 sent only the first 24 ([`MSG_IO_V1_LEN`]), without `prio`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MsgIo {
    /// [`msg_type::IO`].
    pub hdr: MsgHdr,
    /// From [`MsgOpenRsp`].
    pub device_id: U32,
    /// Start in 512-byte sectors; all ones for a flush.
    pub sector: U64,
    /// Operation in bits 0..8 ([`Op`]), flags above ([`Flags`]).
    pub rw: U32,
    /// Bytes to read, write, discard or zero.
    pub bi_size: U32,
    /// Linux `ioprio`; means nothing below version 2.
    pub prio: U16,
    /// C padding on 64-bit hosts; anything.
    pub tail: [u8; 6],
}
const _: () = assert!(size_of::<MsgIo>() == 32 && offset_of!(MsgIo, sector) == 8);
const _: () = assert!(offset_of!(MsgIo, rw) == 16 && offset_of!(MsgIo, prio) == MSG_IO_V1_LEN);

/// Bytes of an IO message of protocol version 1.
pub const MSG_IO_V1_LEN: usize = 24;

impl MsgIo {
    /// The client's message. `sector` in 512-byte units, `len` in bytes.
    pub const fn request(device_id: u32, op: Op, flags: Flags, sector: u64, len: u32, prio: u16) -> MsgIo {
        MsgIo {
            hdr: MsgHdr::new(msg_type::IO),
            device_id: U32::new(device_id),
            sector: U64::new(sector),
            rw: U32::new(op.to_wire() as u32 | flags.bits()),
            bi_size: U32::new(len),
            prio: U16::new(prio),
            tail: [0; 6],
        }
    }

    /// The operation.
    pub const fn op(&self) -> Op {
        Op::from_wire(self.rw.get() as u8)
    }

    /// The flags, unknown ones included.
    pub const fn flags(&self) -> Flags {
        Flags(self.rw.get() & !0xff)
    }
}

impl fmt::Display for MsgIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (op, flags) = (self.op(), self.flags());
        write!(
            f,
            "{} device {} {op}{flags} sector {} size {} prio {:#x}",
            self.hdr, self.device_id, self.sector, self.bi_size, self.prio
        )
    }
}

/// `enum rnbd_io_flags`, operations (`RNBD_OP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// 0.
    Read,
    /// 1.
    Write,
    /// 2; everything written before is on stable storage when it completes.
    Flush,
    /// 3; the range's content becomes undefined.
    Discard,
    /// 4.
    SecureErase,
    /// 5; needs no data. Was WRITE_SAME in old kernels, which never offered it.
    WriteZeroes,
    /// Anything else.
    Unknown(u8),
}

impl Op {
    /// From the low byte of [`MsgIo::rw`].
    pub const fn from_wire(op: u8) -> Op {
        match op {
            0 => Op::Read,
            1 => Op::Write,
            2 => Op::Flush,
            3 => Op::Discard,
            4 => Op::SecureErase,
            5 => Op::WriteZeroes,
            other => Op::Unknown(other),
        }
    }

    /// The low byte of [`MsgIo::rw`].
    pub const fn to_wire(self) -> u8 {
        match self {
            Op::Read => 0,
            Op::Write => 1,
            Op::Flush => 2,
            Op::Discard => 3,
            Op::SecureErase => 4,
            Op::WriteZeroes => 5,
            Op::Unknown(other) => other,
        }
    }

    /// Data travels with it, so the RTRS data length must equal `bi_size`.
    pub const fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write)
    }

    /// Changes the device's content, so a read-only open must not do it.
    pub const fn modifies(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::SecureErase | Op::WriteZeroes)
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Read => f.write_str("READ"),
            Op::Write => f.write_str("WRITE"),
            Op::Flush => f.write_str("FLUSH"),
            Op::Discard => f.write_str("DISCARD"),
            Op::SecureErase => f.write_str("SECURE_ERASE"),
            Op::WriteZeroes => f.write_str("WRITE_ZEROES"),
            Op::Unknown(op) => write!(f, "op {op}"),
        }
    }
}

/// `enum rnbd_io_flags`, flags (`RNBD_F_*`): bits 8 and up of [`MsgIo::rw`]. Unknown bits are ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u32);

impl Flags {
    /// Someone waits for it; a hint.
    pub const SYNC: Flags = Flags(1 << 8);
    /// The write itself is on stable storage when it completes. Kernel clients also set it, without meaning, on FLUSH.
    pub const FUA: Flags = Flags(1 << 9);
    /// Flush before doing it (clients newer than Linux 6.18).
    pub const PREFLUSH: Flags = Flags(1 << 10);
    /// Do not deallocate while zeroing (clients newer than Linux 6.18).
    pub const NOUNMAP: Flags = Flags(1 << 11);

    /// No flag.
    pub const fn empty() -> Flags {
        Flags(0)
    }

    /// The bits as they stand in `rw`.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Both sets together.
    pub const fn with(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    /// All of `other` is set.
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [(Flags, &str); 4] = [
            (Flags::SYNC, "|SYNC"),
            (Flags::FUA, "|FUA"),
            (Flags::PREFLUSH, "|PREFLUSH"),
            (Flags::NOUNMAP, "|NOUNMAP"),
        ];
        NAMES.iter().filter(|(flag, _)| self.contains(*flag)).try_for_each(|(_, name)| f.write_str(name))
    }
}

/// A client's message, by type. What is in it has not been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// First message of a session.
    SessInfo(&'a MsgSessInfo),
    /// Open a device.
    Open(&'a MsgOpen),
    /// Read, write, and so on. A copy: a version 1 message is shorter than the struct.
    Io(MsgIo),
    /// Close a device.
    Close(&'a MsgClose),
}

/// Bytes that are no client message. Answer EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Shorter than its type requires.
    #[error("message of {got} bytes is too short: at least {least}")]
    Short {
        /// Bytes there are.
        got: usize,
        /// Bytes the type requires.
        least: usize,
    },
    /// Not a type that a client sends.
    #[error("message type {0} is none that a client sends")]
    Type(u16),
}

impl<'a> Request<'a> {
    /// Reads the user message of one RTRS request. Surplus bytes at the end are ignored.
    ///
    /// # Errors
    /// [`ParseError`]; answer the request with EINVAL.
    pub fn parse(bytes: &'a [u8]) -> Result<Request<'a>, ParseError> {
        match prefix::<MsgHdr>(bytes)?.msg_type.get() {
            msg_type::IO => parse_io(bytes).map(Request::Io),
            msg_type::SESS_INFO => prefix(bytes).map(Request::SessInfo),
            msg_type::OPEN => prefix(bytes).map(Request::Open),
            msg_type::CLOSE => prefix(bytes).map(Request::Close),
            other => Err(ParseError::Type(other)),
        }
    }
}

impl fmt::Display for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Request::SessInfo(m) => m.fmt(f),
            Request::Open(m) => m.fmt(f),
            Request::Io(m) => m.fmt(f),
            Request::Close(m) => m.fmt(f),
        }
    }
}

fn prefix<T: FromBytes + KnownLayout + Immutable + Unaligned>(bytes: &[u8]) -> Result<&T, ParseError> {
    let short = ParseError::Short { got: bytes.len(), least: size_of::<T>() };
    T::ref_from_prefix(bytes).map(|(msg, _)| msg).map_err(|_| short)
}

fn parse_io(bytes: &[u8]) -> Result<MsgIo, ParseError> {
    if let Ok((msg, _)) = MsgIo::read_from_prefix(bytes) {
        return Ok(msg);
    }
    if bytes.len() < MSG_IO_V1_LEN {
        return Err(ParseError::Short { got: bytes.len(), least: MSG_IO_V1_LEN });
    }
    let mut msg = MsgIo::new_zeroed();
    msg.as_mut_bytes()[..MSG_IO_V1_LEN].copy_from_slice(&bytes[..MSG_IO_V1_LEN]);
    Ok(msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_golden_flush_as_the_kernel_sends_it() {
        let mut bytes = [0u8; 32];
        bytes[..8].copy_from_slice(&[4, 0, 0xaa, 0xbb, 7, 0, 0, 0]);
        bytes[8..16].fill(0xff);
        bytes[16..20].copy_from_slice(&[2, 3, 0, 0]);
        let Ok(Request::Io(m)) = Request::parse(&bytes) else { panic!("no IO") };
        assert_eq!(m.op(), Op::Flush);
        assert_eq!(m.flags(), Flags::SYNC.with(Flags::FUA));
        assert_eq!(m.sector.get(), u64::MAX);
        assert_eq!(m.to_string(), "IO device 7 FLUSH|SYNC|FUA sector 18446744073709551615 size 0 prio 0x0");
    }

    #[test]
    fn io_golden_read_round_trip() {
        let m = MsgIo::request(0, Op::Read, Flags::SYNC, 8, 4096, 0x4004);
        let golden = [
            4, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0x10, 0, 0, 4, 0x40, 0, 0, 0, 0,
            0, 0,
        ];
        assert_eq!(m.as_bytes(), golden);
        assert_eq!(Request::parse(&golden), Ok(Request::Io(m)));
    }

    #[test]
    fn io_of_version_1_has_no_prio() {
        let m = MsgIo::request(3, Op::Write, Flags::empty(), 1, 512, 0x4004);
        let Ok(Request::Io(v1)) = Request::parse(&m.as_bytes()[..24]) else { panic!("no IO") };
        assert_eq!(v1, MsgIo { prio: 0.into(), ..m });
        let short = Err(ParseError::Short { got: 23, least: 24 });
        assert_eq!(Request::parse(&m.as_bytes()[..23]), short);
    }

    #[test]
    fn sess_info_golden() {
        let m = MsgSessInfo::request();
        assert_eq!(m.as_bytes()[..5], [0, 0, 0, 0, 2]);
        assert_eq!(MsgSessInfo::response(1).as_bytes()[..5], [1, 0, 0, 0, 1]);
        assert_eq!(Request::parse(m.as_bytes()), Ok(Request::SessInfo(&m)));
        assert_eq!(m.to_string(), "SESS_INFO ver 2");
    }

    #[test]
    fn open_golden_and_names() {
        let m = MsgOpen::request(1, b"ram0").unwrap();
        assert_eq!(m.as_bytes()[..11], [2, 0, 0, 0, 1, 0, b'r', b'a', b'm', b'0', 0]);
        assert_eq!(m.name(), Some(&b"ram0"[..]));
        assert_eq!(m.to_string(), "OPEN mode 1 \"ram0\"");
        assert_eq!(MsgOpen::request(1, &[b'x'; 255]), None);
        assert_eq!(MsgOpen { dev_name: [b'x'; 255], ..m }.name(), None);
    }

    #[test]
    fn open_rsp_field_places() {
        let rsp = MsgOpenRsp {
            device_id: 1.into(),
            nsectors: 0x1122.into(),
            logical_block_size: 512.into(),
            cache_policy: CACHE_WRITEBACK | CACHE_FUA,
            hdr: MsgHdr::new(msg_type::OPEN_RSP),
            ..MsgOpenRsp::new_zeroed()
        };
        let b = rsp.as_bytes();
        assert_eq!(b[..10], [3, 0, 0, 0, 1, 0, 0, 0, 0x22, 0x11]);
        assert_eq!((b[38], b[39], b[45]), (0, 2, 3));
    }

    #[test]
    fn close_golden() {
        let m = MsgClose::request(0x0102);
        assert_eq!(m.as_bytes(), [5, 0, 0, 0, 2, 1, 0, 0]);
        assert_eq!(Request::parse(m.as_bytes()), Ok(Request::Close(&m)));
    }

    #[test]
    fn what_no_client_sends_is_refused() {
        assert_eq!(Request::parse(&[3, 0, 0, 0]), Err(ParseError::Type(3)));
        assert_eq!(Request::parse(&[2, 0, 0]), Err(ParseError::Short { got: 3, least: 4 }));
        assert_eq!(Request::parse(&[2, 0, 0, 0]), Err(ParseError::Short { got: 4, least: 264 }));
    }

    #[test]
    fn every_op_byte_round_trips() {
        for op in 0..=u8::MAX {
            assert_eq!(Op::from_wire(op).to_wire(), op);
        }
    }
}
