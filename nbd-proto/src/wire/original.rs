//! The framing of 1997 (Linux 2.1.55 and its `nbd-server`): no handshake, 32-bit offsets, `READ` and `WRITE` only.
//!
//! ```text
//!   request   magic  from  len  handle  type          data, if type is WRITE
//!             u32    u32   u32  u64     u32           24 bytes in front of them, packed
//!   reply     magic  handle  error                    data, if it answers a READ and error is 0
//!             u32    u64     u32                      16 bytes; later versions have error before handle
//! ```

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Magic of a request of 1997.
pub const ORIGINAL_REQUEST_MAGIC: u32 = 0x1256_0953;
/// Magic of a reply of 1997: `NBD_SIMPLE_REPLY_MAGIC` "used to be" this until 2.1.116pre2 (`doc/proto.md`, "Simple reply
/// message").
pub const ORIGINAL_REPLY_MAGIC: u32 = 0x9674_4668;
/// Bytes of an [`OriginalRequest`].
pub const ORIGINAL_REQUEST_LEN: usize = 24;
/// Bytes of an [`OriginalReply`].
pub const ORIGINAL_REPLY_LEN: usize = 16;
/// Exports of 1997 have at most so many bytes: the last one is the last that an offset can name.
pub const ORIGINAL_MAX_SIZE: u64 = 1 << 32;

/// Request of 1997.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OriginalRequest {
    /// [`ORIGINAL_REQUEST_MAGIC`].
    pub magic: U32,
    /// First byte of the range.
    pub from: U32,
    /// Bytes of the range.
    pub len: U32,
    /// Chosen by the client, echoed in the reply.
    pub handle: U64,
    /// [`cmd::READ`](super::cmd::READ) or [`cmd::WRITE`](super::cmd::WRITE).
    pub kind: U32,
}

/// Reply of 1997.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OriginalReply {
    /// [`ORIGINAL_REPLY_MAGIC`], unless agreed otherwise.
    pub magic: U32,
    /// Of the request.
    pub handle: U64,
    /// 0 or an error.
    pub error: U32,
}

const _: () = assert!(size_of::<OriginalRequest>() == ORIGINAL_REQUEST_LEN);
const _: () = assert!(std::mem::offset_of!(OriginalRequest, handle) == 12);
const _: () = assert!(size_of::<OriginalReply>() == ORIGINAL_REPLY_LEN);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let request = OriginalRequest {
            magic: ORIGINAL_REQUEST_MAGIC.into(),
            from: 0xffff_fc00.into(),
            len: 1024.into(),
            handle: 0x0102_0304_0506_0708.into(),
            kind: 1.into(),
        };
        let bytes =
            [0x12, 0x56, 0x09, 0x53, 0xff, 0xff, 0xfc, 0, 0, 0, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1];
        assert_eq!(request.as_bytes(), bytes);
        assert_eq!(OriginalRequest::read_from_bytes(&bytes), Ok(request));
        let reply = OriginalReply {
            magic: ORIGINAL_REPLY_MAGIC.into(),
            handle: 0x0102_0304_0506_0708.into(),
            error: 5.into(),
        };
        let bytes = [0x96, 0x74, 0x46, 0x68, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 5];
        assert_eq!(reply.as_bytes(), bytes);
        assert_eq!(OriginalReply::read_from_bytes(&bytes), Ok(reply));
    }
}
