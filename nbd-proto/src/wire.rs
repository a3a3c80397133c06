//! Structures and numbers of the transmission phase, any bytes (NBD `doc/proto.md`, "Transmission phase" and "Values").

mod chunks;
mod original;

pub use chunks::*;
pub use original::*;

use std::fmt;

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `NBD_REQUEST_MAGIC`.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// `NBD_SIMPLE_REPLY_MAGIC`.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// `NBD_EXTENDED_REQUEST_MAGIC`.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

/// Bytes of a [`RequestHeader`].
pub const REQUEST_LEN: usize = 28;
/// Bytes of an [`ExtendedRequest`].
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Bytes of a [`SimpleReply`].
pub const SIMPLE_REPLY_LEN: usize = 16;

/// Compact request header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// Bits of [`cmd_flag`].
    pub flags: U16,
    /// One of [`cmd`].
    pub command: U16,
    /// Chosen by the client, echoed in the reply.
    pub cookie: U64,
    /// First byte of the range.
    pub offset: U64,
    /// Bytes of the range; of the payload too, for `WRITE`.
    pub length: U32,
}

const _: () = assert!(size_of::<RequestHeader>() == REQUEST_LEN);
const _: () = assert!(std::mem::offset_of!(RequestHeader, cookie) == 8);
const _: () = assert!(std::mem::offset_of!(RequestHeader, length) == 24);

impl fmt::Display for RequestHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "NBD request {} flags {:#x} cookie {:#x} range {}+{}",
            self.command, self.flags, self.cookie, self.offset, self.length
        )
    }
}

/// Request header after EXTENDED_HEADERS. `length` is that of the payload if [`cmd_flag::PAYLOAD_LEN`] is set, else of the
/// range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedRequest {
    /// [`EXTENDED_REQUEST_MAGIC`].
    pub magic: U32,
    /// Bits of [`cmd_flag`].
    pub flags: U16,
    /// One of [`cmd`].
    pub command: U16,
    /// Chosen by the client, echoed in the reply.
    pub cookie: U64,
    /// First byte of the range, echoed in the reply.
    pub offset: U64,
    /// Bytes of the payload or of the range.
    pub length: U64,
}

const _: () = assert!(size_of::<ExtendedRequest>() == EXTENDED_REQUEST_LEN);
const _: () = assert!(std::mem::offset_of!(ExtendedRequest, length) == 24);

/// Simple reply; the data follow if it answers a `READ` and `error` is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// 0, or one of [`ErrorCode`].
    pub error: U32,
    /// Of the request.
    pub cookie: U64,
}

const _: () = assert!(size_of::<SimpleReply>() == SIMPLE_REPLY_LEN);

impl SimpleReply {
    /// The answer to `cookie`.
    pub fn new(cookie: u64, result: Result<(), ErrorCode>) -> Self {
        let error = result.err().map_or(0, |e| e as u32);
        Self { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: cookie.into() }
    }
}

/// Commands, `NBD_CMD_*`.
pub mod cmd {
    /// Data from the export.
    pub const READ: u16 = 0;
    /// Data to the export.
    pub const WRITE: u16 = 1;
    /// The client leaves; there is no reply.
    pub const DISC: u16 = 2;
    /// Everything answered so far becomes stable.
    pub const FLUSH: u16 = 3;
    /// The contents of the range are not needed any more.
    pub const TRIM: u16 = 4;
    /// The range will be read soon.
    pub const CACHE: u16 = 5;
    /// The range becomes zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// What is allocated.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Bits of [`RequestHeader::flags`], `NBD_CMD_FLAG_*`.
pub mod cmd_flag {
    /// Stable before it is answered.
    pub const FUA: u16 = 1 << 0;
    /// `WRITE_ZEROES`: keep the space allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// `READ`: one chunk (structured replies only).
    pub const DF: u16 = 1 << 2;
    /// `BLOCK_STATUS`: one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// `WRITE_ZEROES`: fail rather than write zeroes.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of the payload (extended headers only).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Properties of an export, `NBD_FLAG_*`: what a client may do with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TransmissionFlags(pub u16);

impl TransmissionFlags {
    /// The others mean something; always set.
    pub const HAS_FLAGS: Self = Self(1 << 0);
    /// No changes.
    pub const READ_ONLY: Self = Self(1 << 1);
    /// `FLUSH` is understood.
    pub const SEND_FLUSH: Self = Self(1 << 2);
    /// [`cmd_flag::FUA`] is understood.
    pub const SEND_FUA: Self = Self(1 << 3);
    /// Seeks cost.
    pub const ROTATIONAL: Self = Self(1 << 4);
    /// `TRIM` is understood.
    pub const SEND_TRIM: Self = Self(1 << 5);
    /// `WRITE_ZEROES` is understood.
    pub const SEND_WRITE_ZEROES: Self = Self(1 << 6);
    /// [`cmd_flag::DF`] is understood.
    pub const SEND_DF: Self = Self(1 << 7);
    /// A flush on one connection covers what was answered on all.
    pub const CAN_MULTI_CONN: Self = Self(1 << 8);
    /// `CACHE` is understood.
    pub const SEND_CACHE: Self = Self(1 << 10);
    /// [`cmd_flag::FAST_ZERO`] is understood.
    pub const SEND_FAST_ZERO: Self = Self(1 << 11);
    /// `BLOCK_STATUS` can be asked for some of the contexts (extended headers only).
    pub const BLOCK_STATUS_PAYLOAD: Self = Self(1 << 12);

    /// Whether all bits of `other` are set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These and, if `on`, those of `other`.
    #[must_use]
    pub const fn with_if(self, other: Self, on: bool) -> Self {
        if on { Self(self.0 | other.0) } else { self }
    }
}

impl std::ops::BitOr for TransmissionFlags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Error numbers that a reply may carry ("Error values"); Linux' numbers, on every system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorCode {
    /// Not permitted: the export is read-only.
    Eperm = 1,
    /// The device failed.
    Eio = 5,
    /// No memory now.
    Enomem = 12,
    /// The request makes no sense.
    Einval = 22,
    /// No space; also a write past the end.
    Enospc = 28,
    /// Too much for one chunk.
    Eoverflow = 75,
    /// Not an operation of this export, or not fast.
    Enotsup = 95,
    /// The server is shutting down.
    Eshutdown = 108,
}

impl ErrorCode {
    /// What a reply carries; others that are not 0 are EINVAL, as the specification has it.
    pub fn of(number: u32) -> Option<Self> {
        let known = Self::ALL.into_iter().find(|e| *e as u32 == number);
        if number == 0 { None } else { Some(known.unwrap_or(Self::Einval)) }
    }

    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Eperm,
        Self::Eio,
        Self::Enomem,
        Self::Einval,
        Self::Enospc,
        Self::Eoverflow,
        Self::Enotsup,
        Self::Eshutdown,
    ];
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eperm => "EPERM",
            Self::Eio => "EIO",
            Self::Enomem => "ENOMEM",
            Self::Einval => "EINVAL",
            Self::Enospc => "ENOSPC",
            Self::Eoverflow => "EOVERFLOW",
            Self::Enotsup => "ENOTSUP",
            Self::Eshutdown => "ESHUTDOWN",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_golden_bytes() {
        let header = RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: cmd_flag::FUA.into(),
            command: cmd::WRITE.into(),
            cookie: 0x0102_0304_0506_0708.into(),
            offset: 0x1122_3344_5566_7788.into(),
            length: 0xa0b0_c0d0.into(),
        };
        let bytes = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66,
            0x77, 0x88, 0xa0, 0xb0, 0xc0, 0xd0,
        ];
        assert_eq!(header.as_bytes(), bytes);
        assert_eq!(RequestHeader::read_from_bytes(&bytes).unwrap(), header);
    }

    #[test]
    fn extended_request_golden_bytes() {
        let header = ExtendedRequest {
            magic: EXTENDED_REQUEST_MAGIC.into(),
            flags: cmd_flag::PAYLOAD_LEN.into(),
            command: cmd::BLOCK_STATUS.into(),
            cookie: 3.into(),
            offset: 0x1122_3344_5566_7788.into(),
            length: (1 << 33).into(),
        };
        let bytes = [
            0x21, 0xe4, 0x1c, 0x71, 0, 0x20, 0, 7, 0, 0, 0, 0, 0, 0, 0, 3, 0x11, 0x22, 0x33, 0x44, 0x55,
            0x66, 0x77, 0x88, 0, 0, 0, 2, 0, 0, 0, 0,
        ];
        assert_eq!(header.as_bytes(), bytes);
        assert_eq!(ExtendedRequest::read_from_bytes(&bytes).unwrap(), header);
    }

    #[test]
    fn reply_golden_bytes() {
        let ok = SimpleReply::new(0x0102_0304_0506_0708, Ok(()));
        assert_eq!(ok.as_bytes(), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        let bad = SimpleReply::new(9, Err(ErrorCode::Eshutdown));
        assert_eq!(bad.as_bytes(), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 108, 0, 0, 0, 0, 0, 0, 0, 9]);
    }

    #[test]
    fn error_numbers_are_those_of_the_specification() {
        let numbers: Vec<u32> = ErrorCode::ALL.iter().map(|e| *e as u32).collect();
        assert_eq!(numbers, [1, 5, 12, 22, 28, 75, 95, 108]);
        assert_eq!(
            [0, 75, 2].map(ErrorCode::of),
            [None, Some(ErrorCode::Eoverflow), Some(ErrorCode::Einval)]
        );
    }

    #[test]
    fn flags_have_their_bits() {
        let flags = TransmissionFlags::HAS_FLAGS
            .with_if(TransmissionFlags::READ_ONLY, false)
            .with_if(TransmissionFlags::CAN_MULTI_CONN, true);
        assert_eq!(flags.0, 0x101);
        assert!(
            flags.has(TransmissionFlags::CAN_MULTI_CONN) && !flags.has(TransmissionFlags::SEND_FAST_ZERO)
        );
    }
}
