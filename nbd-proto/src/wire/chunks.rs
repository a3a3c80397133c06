//! Replies in chunks: structured replies and those with extended headers (NBD `doc/proto.md`, "Structured reply chunk
//! message", "Structured reply types"; "Extended reply chunk message" of its extension `ext-header`).
//!
//! ```text
//!   structured: StructuredReply (20) ┐            OFFSET_DATA: u64 offset, data
//!   extended:   ExtendedReply   (32) ┘ + payload: OFFSET_HOLE: Hole            BLOCK_STATUS:     u32 id, Extent…
//!                                                 ERROR: ErrorHead, text       BLOCK_STATUS_EXT: StatusHead, ExtentExt…
//! ```

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `NBD_STRUCTURED_REPLY_MAGIC`.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// `NBD_EXTENDED_REPLY_MAGIC`.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a [`StructuredReply`].
pub const STRUCTURED_REPLY_LEN: usize = 20;
/// Bytes of an [`ExtendedReply`].
pub const EXTENDED_REPLY_LEN: usize = 32;

/// Types of chunks, `NBD_REPLY_TYPE_*`.
pub mod chunk {
    /// No payload; only with DONE.
    pub const NONE: u16 = 0;
    /// `u64` offset, and at least one byte of data.
    pub const OFFSET_DATA: u16 = 1;
    /// [`Hole`](super::Hole): the range reads as zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// `u32` context id, [`Extent`](super::Extent)s; structured replies only.
    pub const BLOCK_STATUS: u16 = 5;
    /// [`StatusHead`](super::StatusHead), [`ExtentExt`](super::ExtentExt)s; extended headers only.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error; its payload begins with an [`ErrorHead`](super::ErrorHead).
    pub const ERROR_BIT: u16 = 1 << 15;
    /// [`ErrorHead`](super::ErrorHead), text.
    pub const ERROR: u16 = ERROR_BIT + 1;
    /// As ERROR, then a `u64` offset at which it happened.
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;

    /// Bit of the flags: the last chunk of the reply.
    pub const FLAG_DONE: u16 = 1 << 0;
}

/// Status flags of the metadata context `base:allocation`; 0 is plain data.
pub mod state {
    /// Not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Head of a chunk after STRUCTURED_REPLY; `length` bytes of payload follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StructuredReply {
    /// [`STRUCTURED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`chunk::FLAG_DONE`].
    pub flags: U16,
    /// One of [`chunk`].
    pub kind: U16,
    /// Of the request.
    pub cookie: U64,
    /// Bytes of payload.
    pub length: U32,
}

/// Head of a chunk after EXTENDED_HEADERS; `length` bytes of payload follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedReply {
    /// [`EXTENDED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`chunk::FLAG_DONE`].
    pub flags: U16,
    /// One of [`chunk`].
    pub kind: U16,
    /// Of the request.
    pub cookie: U64,
    /// Of the request, whatever the payload says.
    pub offset: U64,
    /// Bytes of payload.
    pub length: U64,
}

/// Payload of OFFSET_HOLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Hole {
    /// First byte, of the export.
    pub offset: U64,
    /// Bytes, not 0.
    pub size: U32,
}

/// Beginning of the payload of every error; `message_len` bytes of UTF-8 follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ErrorHead {
    /// One of [`ErrorCode`](super::ErrorCode), not 0.
    pub error: U32,
    /// Bytes of text, at most 4096.
    pub message_len: U16,
}

/// One extent of BLOCK_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extent {
    /// Bytes, not 0.
    pub length: U32,
    /// As the context defines them; of `base:allocation`: [`state`].
    pub flags: U32,
}

/// Beginning of the payload of BLOCK_STATUS_EXT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StatusHead {
    /// Of SET_META_CONTEXT.
    pub context: U32,
    /// Extents that follow, not 0.
    pub count: U32,
}

/// One extent of BLOCK_STATUS_EXT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtentExt {
    /// Bytes, not 0.
    pub length: U64,
    /// As [`Extent::flags`]; the upper half is 0 in contexts of `base:`.
    pub flags: U64,
}

const _: () = assert!(size_of::<StructuredReply>() == STRUCTURED_REPLY_LEN);
const _: () = assert!(size_of::<ExtendedReply>() == EXTENDED_REPLY_LEN);
const _: () = assert!(std::mem::offset_of!(ExtendedReply, length) == 24);
const _: () = assert!(size_of::<Hole>() == 12 && size_of::<ErrorHead>() == 6);
const _: () = assert!(size_of::<Extent>() == 8 && size_of::<ExtentExt>() == 16);
const _: () = assert!(size_of::<StatusHead>() == 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_have_golden_bytes() {
        let structured = StructuredReply {
            magic: STRUCTURED_REPLY_MAGIC.into(),
            flags: chunk::FLAG_DONE.into(),
            kind: chunk::ERROR_OFFSET.into(),
            cookie: 0x0102_0304_0506_0708.into(),
            length: 0x0a0b.into(),
        };
        let bytes = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 2, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0x0a, 0x0b];
        assert_eq!(structured.as_bytes(), bytes);
        assert_eq!(StructuredReply::read_from_bytes(&bytes), Ok(structured));
        let extended = ExtendedReply {
            magic: EXTENDED_REPLY_MAGIC.into(),
            flags: 0.into(),
            kind: chunk::BLOCK_STATUS_EXT.into(),
            cookie: 9.into(),
            offset: (1 << 40).into(),
            length: 24.into(),
        };
        let bytes = [
            0x6e, 0x8a, 0x27, 0x8c, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 24,
        ];
        assert_eq!(extended.as_bytes(), bytes);
        assert_eq!(ExtendedReply::read_from_bytes(&bytes), Ok(extended));
    }

    #[test]
    fn payloads_have_golden_bytes() {
        let hole = Hole { offset: 0x1000.into(), size: 512.into() };
        assert_eq!(hole.as_bytes(), [0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0]);
        let error = ErrorHead { error: 22.into(), message_len: 258.into() };
        assert_eq!(error.as_bytes(), [0, 0, 0, 22, 1, 2]);
        let extent = Extent { length: 4096.into(), flags: (state::HOLE | state::ZERO).into() };
        assert_eq!(extent.as_bytes(), [0, 0, 0x10, 0, 0, 0, 0, 3]);
        let head = StatusHead { context: 7.into(), count: 1.into() };
        assert_eq!(head.as_bytes(), [0, 0, 0, 7, 0, 0, 0, 1]);
        let extent = ExtentExt { length: (1 << 32).into(), flags: 2.into() };
        assert_eq!(extent.as_bytes(), [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    }
}
