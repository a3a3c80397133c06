//! What a work-request id says: kind (2 bits), send-queue entries retired (14), generation (24), connection (24).

/// Slot of a connection on its lane. The generation tells late completions of a former connection apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ConKey {
    pub index: u32,
    pub generation: u32,
}

const BITS24: u32 = 0xff_ffff;
const BITS14: u32 = 0x3fff;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// A zero-SGE receive.
    Recv,
    /// The receive for INFO_REQ.
    InfoRecv,
    /// A send-queue entry, which retires this many.
    Send(u32),
}

const fn pack(kind: u64, key: ConKey, n: u32) -> u64 {
    kind << 62
        | ((n & BITS14) as u64) << 48
        | ((key.generation & BITS24) as u64) << 24
        | (key.index & BITS24) as u64
}

pub(super) const fn recv(key: ConKey) -> u64 {
    pack(0, key, 0)
}

pub(super) const fn info_recv(key: ConKey) -> u64 {
    pack(1, key, 0)
}

pub(super) const fn send(key: ConKey, retires: u32) -> u64 {
    pack(2, key, retires)
}

pub(super) const fn unpack(wr_id: u64) -> (Tag, ConKey) {
    let key = ConKey { index: wr_id as u32 & BITS24, generation: (wr_id >> 24) as u32 & BITS24 };
    let tag = match wr_id >> 62 {
        0 => Tag::Recv,
        1 => Tag::InfoRecv,
        _ => Tag::Send((wr_id >> 48) as u32 & BITS14),
    };
    (tag, key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let key = ConKey { index: 0xabcdef, generation: 0x123456 };
        assert_eq!(unpack(recv(key)), (Tag::Recv, key));
        assert_eq!(unpack(info_recv(key)), (Tag::InfoRecv, key));
        assert_eq!(unpack(send(key, 16383)), (Tag::Send(16383), key));
    }
}
