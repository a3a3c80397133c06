//! What a work-request id says: kind (2 bits), number (22), generation (24), connection (16).

use super::slab::Key;

const NUMBER_BITS: u32 = 22;
const NUMBER_MASK: u32 = (1 << NUMBER_BITS) - 1;
const GENERATION_MASK: u32 = 0xff_ffff;
const INDEX_MASK: u32 = 0xffff;

/// Connections of one lane: what an id can tell apart.
pub(super) const MAX_CONS: usize = 1 << 16;
/// Receives of one connection, and entries that one signal can retire.
pub(super) const MAX_NUMBER: u32 = NUMBER_MASK;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// Receive number so-and-so of the link.
    Recv(u32),
    /// The receive for INFO_RSP.
    InfoRecv,
    /// A send-queue entry, which retires this many.
    Send(u32),
}

pub(super) const fn pack(tag: Tag, key: Key) -> u64 {
    let (kind, number) = match tag {
        Tag::Recv(n) => (0, n),
        Tag::InfoRecv => (1, 0),
        Tag::Send(n) => (2, n),
    };
    kind << 62
        | ((number & NUMBER_MASK) as u64) << 40
        | ((key.generation & GENERATION_MASK) as u64) << 16
        | (key.index & INDEX_MASK) as u64
}

pub(super) const fn unpack(wr_id: u64) -> (Tag, Key) {
    let key = Key { index: wr_id as u32 & INDEX_MASK, generation: (wr_id >> 16) as u32 & GENERATION_MASK };
    let number = (wr_id >> 40) as u32 & NUMBER_MASK;
    let tag = match wr_id >> 62 {
        0 => Tag::Recv(number),
        1 => Tag::InfoRecv,
        _ => Tag::Send(number),
    };
    (tag, key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let key = Key { index: 0xfedc, generation: 0x123456 };
        for tag in [Tag::Recv(MAX_NUMBER), Tag::InfoRecv, Tag::Send(77)] {
            assert_eq!(unpack(pack(tag, key)), (tag, key));
        }
    }
}
