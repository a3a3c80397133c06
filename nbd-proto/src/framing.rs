//! How requests and replies look on a connection, and the request header without its framing.

use zerocopy::FromBytes;

use crate::wire::{
    EXTENDED_REQUEST_LEN, EXTENDED_REQUEST_MAGIC, ExtendedRequest, ORIGINAL_REQUEST_LEN,
    ORIGINAL_REQUEST_MAGIC, OriginalRequest, REQUEST_LEN, REQUEST_MAGIC, RequestHeader, cmd, cmd_flag,
};

/// Longest request header of all framings, bytes.
pub const MAX_REQUEST_LEN: usize = EXTENDED_REQUEST_LEN;

/// How requests and replies look, as haggling settled it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; replies with data, and errors, in chunks; others simple.
    Structured,
    /// Extended requests and replies, all in chunks.
    Extended,
    /// As in 1997: 32-bit offsets, `READ` and `WRITE` only.
    Original {
        /// What replies begin with: [`ORIGINAL_REPLY_MAGIC`](crate::wire::ORIGINAL_REPLY_MAGIC) unless the peer is of
        /// another opinion.
        reply_magic: u32,
    },
}

/// What was agreed upon besides the export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// How requests and replies look.
    pub framing: Framing,
    /// The context `base:allocation` was selected, as [`ALLOCATION_CONTEXT`].
    pub allocation: bool,
}

/// The id by which clients know `base:allocation`.
pub const ALLOCATION_CONTEXT: u32 = 1;

/// A request header of any framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// As it came.
    pub magic: u32,
    /// Bits of [`cmd_flag`].
    pub flags: u16,
    /// One of [`cmd`]; a number that no 16 bits hold is 0xffff, which is unknown all the same.
    pub command: u16,
    /// Chosen by the client.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes of the range, or of the payload.
    pub length: u64,
}

impl Framing {
    /// Bytes of a request header.
    pub const fn request_len(self) -> usize {
        match self {
            Self::Simple | Self::Structured => REQUEST_LEN,
            Self::Extended => EXTENDED_REQUEST_LEN,
            Self::Original { .. } => ORIGINAL_REQUEST_LEN,
        }
    }

    /// Magic of a request.
    pub const fn request_magic(self) -> u32 {
        match self {
            Self::Simple | Self::Structured => REQUEST_MAGIC,
            Self::Extended => EXTENDED_REQUEST_MAGIC,
            Self::Original { .. } => ORIGINAL_REQUEST_MAGIC,
        }
    }

    /// The framing of 1997.
    pub const fn is_original(self) -> bool {
        matches!(self, Self::Original { .. })
    }

    /// Data and errors travel in chunks.
    pub const fn has_chunks(self) -> bool {
        matches!(self, Self::Structured | Self::Extended)
    }

    /// The header of [`Framing::request_len`] bytes; `None` for any other number of bytes.
    pub fn head(self, bytes: &[u8]) -> Option<Head> {
        match self {
            Self::Simple | Self::Structured => RequestHeader::ref_from_bytes(bytes).ok().map(|h| Head {
                magic: h.magic.get(),
                flags: h.flags.get(),
                command: h.command.get(),
                cookie: h.cookie.get(),
                offset: h.offset.get(),
                length: h.length.get().into(),
            }),
            Self::Extended => ExtendedRequest::ref_from_bytes(bytes).ok().map(|h| Head {
                magic: h.magic.get(),
                flags: h.flags.get(),
                command: h.command.get(),
                cookie: h.cookie.get(),
                offset: h.offset.get(),
                length: h.length.get(),
            }),
            Self::Original { .. } => OriginalRequest::ref_from_bytes(bytes).ok().map(|h| Head {
                magic: h.magic.get(),
                flags: 0,
                command: u16::try_from(h.kind.get()).unwrap_or(u16::MAX),
                cookie: h.handle.get(),
                offset: h.from.get().into(),
                length: h.len.get().into(),
            }),
        }
    }

    /// Bytes that follow a header, whatever becomes of the request ("Request message"). A `WRITE` has a payload with extended
    /// headers even where the client did not set `PAYLOAD_LEN`, which it must: QEMU's client never does (10.0 and 11.1), and
    /// its server takes that.
    pub fn payload_len(self, head: &Head) -> u64 {
        let flagged = self == Self::Extended && head.flags & cmd_flag::PAYLOAD_LEN != 0;
        if flagged || head.command == cmd::WRITE { head.length } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ORIGINAL_REPLY_MAGIC;

    const ORIGINAL: Framing = Framing::Original { reply_magic: ORIGINAL_REPLY_MAGIC };

    #[test]
    fn every_framing_has_its_header() {
        let compact = b"\x25\x60\x95\x13\0\x01\0\x03\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x02\0\0\0\x04\0";
        let head = Head { magic: REQUEST_MAGIC, flags: 1, command: 3, cookie: 7, offset: 512, length: 1024 };
        for framing in [Framing::Simple, Framing::Structured] {
            assert_eq!(framing.head(compact), Some(head));
            assert_eq!(framing.head(&compact[1..]), None);
        }
        let extended =
            b"\x21\xe4\x1c\x71\0\x01\0\x03\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x02\0\0\0\0\x01\0\0\x04\0";
        let long = Head { magic: EXTENDED_REQUEST_MAGIC, length: (1 << 32) + 1024, ..head };
        assert_eq!(Framing::Extended.head(extended), Some(long));
        let original = b"\x12\x56\x09\x53\0\0\x02\0\0\0\x04\0\0\0\0\0\0\0\0\x07\0\0\0\x01";
        let old = Head { magic: ORIGINAL_REQUEST_MAGIC, flags: 0, command: 1, ..head };
        assert_eq!(ORIGINAL.head(original), Some(old));
        let mut odd = *original;
        odd[20] = 1;
        assert_eq!(
            ORIGINAL.head(&odd).map(|h| h.command),
            Some(u16::MAX),
            "1 in the low half is not a write"
        );
    }

    #[test]
    fn only_some_requests_have_payloads() {
        let head = Head { magic: 0, flags: 0, command: cmd::WRITE, cookie: 0, offset: 0, length: 5 };
        let flagged = Head { flags: cmd_flag::PAYLOAD_LEN, ..head };
        let read = Head { command: cmd::READ, ..flagged };
        for framing in [Framing::Simple, Framing::Structured, ORIGINAL] {
            assert_eq!([head, flagged, read].map(|h| framing.payload_len(&h)), [5, 5, 0]);
        }
        assert_eq!([head, flagged, read].map(|h| Framing::Extended.payload_len(&h)), [5, 5, 5]);
        let plain_read = Head { command: cmd::READ, ..head };
        assert_eq!(Framing::Extended.payload_len(&plain_read), 0);
    }
}
