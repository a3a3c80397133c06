//! Replies of the transmission phase, as a server makes them.
//!
//! What a client is told, by what was agreed:
//!
//! | answer             | simple, 1997      | structured              | extended                |
//! |--------------------|-------------------|-------------------------|-------------------------|
//! | data of a `READ`   | reply, data       | OFFSET_DATA, data       | OFFSET_DATA, data       |
//! | … that are zeroes  | reply, data       | OFFSET_HOLE             | OFFSET_HOLE             |
//! | `BLOCK_STATUS`     | never             | BLOCK_STATUS            | BLOCK_STATUS_EXT        |
//! | other success      | reply             | simple reply            | NONE                    |
//! | an error           | reply             | ERROR or ERROR_OFFSET   | ERROR or ERROR_OFFSET   |
//!
//! Every reply is one chunk, the last of its request (DONE).

use zerocopy::IntoBytes;

use crate::framing::{ALLOCATION_CONTEXT, Framing};
use crate::wire::{
    EXTENDED_REPLY_MAGIC, ErrorCode, ErrorHead, ExtendedReply, Extent, ExtentExt, Hole, OriginalReply,
    STRUCTURED_REPLY_MAGIC, SimpleReply, StatusHead, StructuredReply, chunk,
};

/// Longest [`ReplyHead`], bytes: an error with its text.
pub const MAX_REPLY_HEAD: usize = 112;
/// Most extents of one `BLOCK_STATUS` reply; the specification allows 2^20.
pub const MAX_EXTENTS: usize = 1024;
/// Bytes of an error's text, at most.
const MAX_TEXT: usize = MAX_REPLY_HEAD - size_of::<ExtendedReply>() - size_of::<ErrorHead>() - 8;

/// A run of the export of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Bytes, not 0.
    pub len: u64,
    /// Bits of [`state`](crate::wire::state).
    pub state: u32,
}

/// A reply, or its part in front of the data.
#[derive(Clone, Copy, Debug)]
pub struct ReplyHead {
    bytes: [u8; MAX_REPLY_HEAD],
    len: usize,
}

/// Which request is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct To {
    /// Of the request.
    pub cookie: u64,
    /// Of the request, as it came.
    pub offset: u64,
}

impl Default for ReplyHead {
    fn default() -> Self {
        Self { bytes: [0; MAX_REPLY_HEAD], len: 0 }
    }
}

impl ReplyHead {
    /// To be sent.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// Success; `len` bytes of data of the request's range follow, if there are any.
    pub fn data(framing: Framing, to: To, len: u32) -> Self {
        let mut head = Self::default();
        match framing {
            Framing::Structured if len > 0 => {
                head.chunk(framing, to, chunk::OFFSET_DATA, 8 + u64::from(len));
                head.put(&to.offset.to_be_bytes());
            }
            Framing::Extended if len > 0 => {
                head.chunk(framing, to, chunk::OFFSET_DATA, 8 + u64::from(len));
                head.put(&to.offset.to_be_bytes());
            }
            Framing::Extended => head.chunk(framing, to, chunk::NONE, 0),
            _ => head.simple(framing, to.cookie, Ok(())),
        }
        head
    }

    /// The `len` bytes of a `READ` are all zeroes. Only for framings with chunks.
    pub fn hole(framing: Framing, to: To, len: u32) -> Self {
        let mut head = Self::default();
        head.chunk(framing, to, chunk::OFFSET_HOLE, size_of::<Hole>() as u64);
        head.put(Hole { offset: to.offset.into(), size: len.into() }.as_bytes());
        head
    }

    /// An error and why. `at`: where in the request's range it happened.
    pub fn error(framing: Framing, to: To, error: ErrorCode, why: &str, at: Option<u64>) -> Self {
        let mut head = Self::default();
        if !framing.has_chunks() {
            head.simple(framing, to.cookie, Err(error));
            return head;
        }
        let text = &why.as_bytes()[..why.floor_char_boundary(MAX_TEXT)];
        let error = ErrorHead { error: (error as u32).into(), message_len: (text.len() as u16).into() };
        let kind = if at.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
        let len = size_of::<ErrorHead>() + text.len() + at.map_or(0, |_| 8);
        head.chunk(framing, to, kind, len as u64);
        head.put(error.as_bytes());
        head.put(text);
        if let Some(at) = at {
            head.put(&at.to_be_bytes());
        }
        head
    }

    /// The head of a `BLOCK_STATUS` reply; `count` extents follow, which [`put_extent`] makes. Only for framings with
    /// chunks.
    pub fn status(framing: Framing, to: To, count: usize) -> Self {
        let mut head = Self::default();
        if framing == Framing::Extended {
            head.chunk(framing, to, chunk::BLOCK_STATUS_EXT, 8 + 16 * count as u64);
            let status = StatusHead { context: ALLOCATION_CONTEXT.into(), count: (count as u32).into() };
            head.put(status.as_bytes());
        } else {
            head.chunk(framing, to, chunk::BLOCK_STATUS, 4 + 8 * count as u64);
            head.put(&ALLOCATION_CONTEXT.to_be_bytes());
        }
        head
    }

    fn simple(&mut self, framing: Framing, cookie: u64, result: Result<(), ErrorCode>) {
        if let Framing::Original { reply_magic } = framing {
            let error = result.err().map_or(0, |e| e as u32);
            let reply =
                OriginalReply { magic: reply_magic.into(), handle: cookie.into(), error: error.into() };
            return self.put(reply.as_bytes());
        }
        self.put(SimpleReply::new(cookie, result).as_bytes());
    }

    fn chunk(&mut self, framing: Framing, to: To, kind: u16, length: u64) {
        if framing == Framing::Extended {
            let reply = ExtendedReply {
                magic: EXTENDED_REPLY_MAGIC.into(),
                flags: chunk::FLAG_DONE.into(),
                kind: kind.into(),
                cookie: to.cookie.into(),
                offset: to.offset.into(),
                length: length.into(),
            };
            return self.put(reply.as_bytes());
        }
        let reply = StructuredReply {
            magic: STRUCTURED_REPLY_MAGIC.into(),
            flags: chunk::FLAG_DONE.into(),
            kind: kind.into(),
            cookie: to.cookie.into(),
            length: (length as u32).into(),
        };
        self.put(reply.as_bytes());
    }
}

/// Appends a run as the extent that a `BLOCK_STATUS` reply of this framing has. Of runs that a structured reply cannot
/// express the largest beginning that is a multiple of `block_size`; false: no further extent may follow.
pub fn put_extent(framing: Framing, run: Run, block_size: u32, out: &mut Vec<u8>) -> bool {
    if framing == Framing::Extended {
        let extent = ExtentExt { length: run.len.into(), flags: u64::from(run.state).into() };
        out.extend_from_slice(extent.as_bytes());
        return true;
    }
    let most = u64::from(u32::MAX) / u64::from(block_size) * u64::from(block_size);
    let len = run.len.min(most);
    let extent = Extent { length: (len as u32).into(), flags: run.state.into() };
    out.extend_from_slice(extent.as_bytes());
    len == run.len
}

/// What an error means, for people who read a client's messages.
pub fn text(error: ErrorCode) -> &'static str {
    match error {
        ErrorCode::Eperm => "the device is read-only",
        ErrorCode::Eio => "the device has failed",
        ErrorCode::Enomem => "no memory for the request now",
        ErrorCode::Einval => "the device refuses the request as invalid",
        ErrorCode::Enospc => "no space left on the device",
        ErrorCode::Eoverflow => "too much data for one reply",
        ErrorCode::Enotsup => "the device cannot do that, or not fast",
        ErrorCode::Eshutdown => "the device is going away",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{ORIGINAL_REPLY_MAGIC, state};

    const TO: To = To { cookie: 0x0102_0304_0506_0708, offset: 0x1000 };
    const COOKIE: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
    const OFFSET: [u8; 8] = [0, 0, 0, 0, 0, 0, 0x10, 0];
    const ORIGINAL: Framing = Framing::Original { reply_magic: ORIGINAL_REPLY_MAGIC };

    fn structured(kind: u16, len: u32) -> Vec<u8> {
        let k = kind.to_be_bytes();
        [&[0x66, 0x8e, 0x33, 0xef, 0, 1, k[0], k[1]], COOKIE.as_slice(), &len.to_be_bytes()].concat()
    }

    fn extended(kind: u16, len: u64) -> Vec<u8> {
        let k = kind.to_be_bytes();
        let start = [0x6e, 0x8a, 0x27, 0x8c, 0, 1, k[0], k[1]];
        [start.as_slice(), &COOKIE, &OFFSET, &len.to_be_bytes()].concat()
    }

    #[test]
    fn data() {
        let simple = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], COOKIE.as_slice()].concat();
        let original = [&[0x96, 0x74, 0x46, 0x68], COOKIE.as_slice(), &[0, 0, 0, 0]].concat();
        for len in [0, 512] {
            assert_eq!(ReplyHead::data(Framing::Simple, TO, len).as_bytes(), simple);
            assert_eq!(ReplyHead::data(ORIGINAL, TO, len).as_bytes(), original);
        }
        let wanted = [structured(1, 520), OFFSET.to_vec()].concat();
        assert_eq!(ReplyHead::data(Framing::Structured, TO, 512).as_bytes(), wanted);
        assert_eq!(ReplyHead::data(Framing::Structured, TO, 0).as_bytes(), simple);
        let wanted = [extended(1, 520), OFFSET.to_vec()].concat();
        assert_eq!(ReplyHead::data(Framing::Extended, TO, 512).as_bytes(), wanted);
        assert_eq!(ReplyHead::data(Framing::Extended, TO, 0).as_bytes(), extended(0, 0));
        let largest = ReplyHead::data(Framing::Structured, TO, 32 << 20);
        assert_eq!(largest.as_bytes()[16..20], ((32u32 << 20) + 8).to_be_bytes());
    }

    #[test]
    fn holes() {
        let payload = [OFFSET.as_slice(), &[0, 0, 2, 0]].concat();
        let wanted = [structured(2, 12), payload.clone()].concat();
        assert_eq!(ReplyHead::hole(Framing::Structured, TO, 512).as_bytes(), wanted);
        let wanted = [extended(2, 12), payload].concat();
        assert_eq!(ReplyHead::hole(Framing::Extended, TO, 512).as_bytes(), wanted);
    }

    #[test]
    fn errors() {
        let error = |framing, at| ReplyHead::error(framing, TO, ErrorCode::Enospc, "past", at);
        let simple = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28], COOKIE.as_slice()].concat();
        assert_eq!(error(Framing::Simple, Some(7)).as_bytes(), simple);
        let original = [&[0x96, 0x74, 0x46, 0x68], COOKIE.as_slice(), &[0, 0, 0, 28]].concat();
        assert_eq!(error(ORIGINAL, None).as_bytes(), original);
        let payload = [0, 0, 0, 28, 0, 4, b'p', b'a', b's', b't'];
        let wanted = [structured(0x8001, 10), payload.to_vec()].concat();
        assert_eq!(error(Framing::Structured, None).as_bytes(), wanted);
        let wanted = [structured(0x8002, 18), payload.to_vec(), OFFSET.to_vec()].concat();
        assert_eq!(error(Framing::Structured, Some(0x1000)).as_bytes(), wanted);
        let wanted = [extended(0x8001, 10), payload.to_vec()].concat();
        assert_eq!(error(Framing::Extended, None).as_bytes(), wanted);
        let long = ReplyHead::error(Framing::Extended, TO, ErrorCode::Eio, &"ä".repeat(99), Some(1));
        let long = long.as_bytes();
        let len = usize::from(u16::from_be_bytes([long[36], long[37]]));
        assert_eq!(len, MAX_TEXT / 2 * 2);
        assert!(std::str::from_utf8(&long[38..38 + len]).is_ok());
        for code in ErrorCode::ALL {
            assert!(text(code).len() <= MAX_TEXT);
        }
    }

    #[test]
    fn extents() {
        let run = Run { len: 4096, state: state::HOLE | state::ZERO };
        let mut out = ReplyHead::status(Framing::Structured, TO, 1).as_bytes().to_vec();
        assert!(put_extent(Framing::Structured, run, 512, &mut out));
        let wanted = [structured(5, 12), vec![0, 0, 0, 1, 0, 0, 0x10, 0, 0, 0, 0, 3]].concat();
        assert_eq!(out, wanted);
        let mut out = ReplyHead::status(Framing::Extended, TO, 1).as_bytes().to_vec();
        assert!(put_extent(Framing::Extended, Run { len: 1 << 40, ..run }, 512, &mut out));
        let payload = [[0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 3]];
        assert_eq!(out, [extended(6, 24), payload.concat()].concat());
        // 2^32 bytes do not fit 32 bits, and blocks stay whole.
        let mut out = Vec::new();
        assert!(!put_extent(Framing::Structured, Run { len: 1 << 32, state: 0 }, 4096, &mut out));
        assert_eq!(out, [0xff, 0xff, 0xf0, 0, 0, 0, 0, 0]);
    }
}
