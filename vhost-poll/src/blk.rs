//! The virtio block device: features, configuration space, and what a chain asks for (virtio 1.2 section 5.2).

use virtio_bindings::{virtio_blk as v, virtio_config, virtio_ring};

use crate::chain::{Broken, Chain};
use crate::disk::{BlkStatus, DiskInfo, Op};

/// Feature bit `n`.
const fn bit(n: u32) -> u64 {
    1 << n
}

/// VIRTIO_F_RING_PACKED.
pub const F_RING_PACKED: u64 = bit(virtio_config::VIRTIO_F_RING_PACKED);
/// VIRTIO_RING_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = bit(virtio_ring::VIRTIO_RING_F_EVENT_IDX);
/// VIRTIO_RING_F_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = bit(virtio_ring::VIRTIO_RING_F_INDIRECT_DESC);
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = bit(virtio_config::VIRTIO_F_VERSION_1);
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = bit(30);
/// VIRTIO_BLK_F_FLUSH.
pub const F_FLUSH: u64 = bit(v::VIRTIO_BLK_F_FLUSH);
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const F_CONFIG_WCE: u64 = bit(v::VIRTIO_BLK_F_CONFIG_WCE);
/// VIRTIO_BLK_F_RO.
pub const F_RO: u64 = bit(v::VIRTIO_BLK_F_RO);

/// Sector of the protocol, bytes.
pub const SECTOR: u64 = 512;
/// Data segments of a request that the guest is told; with header and status 128 descriptors.
pub const SEG_MAX: u32 = 126;
/// Bytes of a segment that the guest is told.
pub const SIZE_MAX: u32 = 1 << 22;
/// Ranges of one discard or write-zeroes.
pub const MAX_RANGES: usize = 16;
/// Sectors of one range: what a 32-bit number of bytes can say.
const MAX_RANGE_SECTORS: u32 = (u32::MAX / 512) & !7;
/// Bytes of a range: `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: usize = 16;
/// Bytes of the request header: `struct virtio_blk_outhdr`.
const HEADER_LEN: usize = 16;

/// What the device offers.
pub fn features(info: &DiskInfo, packed: bool) -> u64 {
    let always = [
        v::VIRTIO_BLK_F_SIZE_MAX,
        v::VIRTIO_BLK_F_SEG_MAX,
        v::VIRTIO_BLK_F_BLK_SIZE,
        v::VIRTIO_BLK_F_TOPOLOGY,
        v::VIRTIO_BLK_F_FLUSH,
        v::VIRTIO_BLK_F_CONFIG_WCE,
        v::VIRTIO_BLK_F_MQ,
    ];
    let mut features = always.iter().fold(0, |set, f| set | bit(*f));
    features |= F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_PROTOCOL_FEATURES;
    if info.read_only {
        features |= F_RO;
    } else {
        if info.discard_granularity > 0 {
            features |= bit(v::VIRTIO_BLK_F_DISCARD);
        }
        if info.write_zeroes {
            features |= bit(v::VIRTIO_BLK_F_WRITE_ZEROES);
        }
    }
    if packed { features | F_RING_PACKED } else { features }
}

/// Bytes of the configuration space that are defined here: `struct virtio_blk_config` up to write_zeroes_may_unmap.
pub const CONFIG_LEN: usize = 60;
/// Offset of `wce` in it, the only byte that a driver may write.
pub const CONFIG_WCE: usize = 32;

/// The configuration space (virtio 5.2.4).
pub fn config(info: &DiskInfo, queues: u16, write_back: bool) -> [u8; CONFIG_LEN] {
    let mut c = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
    let block = info.block_size.max(512);
    put(0, &(info.size / SECTOR).to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &block.to_le_bytes());
    // physical_block_exp, alignment_offset, min_io_size, opt_io_size: in logical blocks.
    let physical = (info.physical_block_size / block).max(1);
    put(24, &[physical.ilog2() as u8, 0]);
    put(26, &(physical.min(u32::from(u16::MAX)) as u16).to_le_bytes());
    put(28, &0u32.to_le_bytes());
    put(CONFIG_WCE, &[u8::from(write_back)]);
    put(34, &queues.to_le_bytes());
    let whole_blocks = MAX_RANGE_SECTORS / (block / 512) * (block / 512);
    put(36, &whole_blocks.to_le_bytes());
    put(40, &(MAX_RANGES as u32).to_le_bytes());
    put(44, &(info.discard_granularity.max(block) / 512).to_le_bytes());
    put(48, &whole_blocks.to_le_bytes());
    put(52, &(MAX_RANGES as u32).to_le_bytes());
    // write_zeroes_may_unmap
    put(56, &[u8::from(info.discard_granularity > 0)]);
    c
}

/// A range of a discard or write-zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// What to do with it.
    pub op: Op,
    /// First, in units of 512 bytes.
    pub sector: u64,
    /// Bytes, more than 0.
    pub len: u64,
}

/// What a chain asks for. For [`Asked::Data`] the chain has been cut to the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Read or write.
    Data(Range),
    /// Stable storage.
    Flush,
    /// Discards or write-zeroes, in the list of ranges.
    Ranges,
    /// The serial number.
    Id,
    /// Nothing that can be done: this is the answer.
    Nothing(BlkStatus),
}

/// Reads the request of `chain`, whose last writable byte is for the status.
///
/// # Errors
/// `NoStatus`: there is nowhere to put an answer.
pub fn parse(chain: &mut Chain, ranges: &mut Vec<Range>, write_back: bool) -> Result<Asked, Broken> {
    if chain.last.is_none() || chain.writable_len == 0 {
        return Err(Broken::NoStatus);
    }
    let mut header = [0; HEADER_LEN];
    if chain.faulty || !chain.read(0, &mut header) {
        return Ok(Asked::Nothing(BlkStatus::IoError));
    }
    chain.skip(HEADER_LEN as u64);
    chain.drop_last();
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    Ok(match u32::from_le_bytes([t0, t1, t2, t3]) {
        v::VIRTIO_BLK_T_IN => data(Op::Read, sector, chain.writable_len, chain.readable_len),
        v::VIRTIO_BLK_T_OUT => {
            data(Op::Write { fua: !write_back }, sector, chain.readable_len, chain.writable_len)
        }
        v::VIRTIO_BLK_T_FLUSH => Asked::Flush,
        v::VIRTIO_BLK_T_GET_ID if chain.writable_len > 0 => Asked::Id,
        v::VIRTIO_BLK_T_DISCARD => parse_ranges(chain, ranges, None),
        v::VIRTIO_BLK_T_WRITE_ZEROES => parse_ranges(chain, ranges, Some(!write_back)),
        v::VIRTIO_BLK_T_GET_ID => Asked::Nothing(BlkStatus::IoError),
        _ => Asked::Nothing(BlkStatus::Unsupported),
    })
}

/// A read or write of `len` bytes; `other` are bytes in the wrong direction.
fn data(op: Op, sector: u64, len: u64, other: u64) -> Asked {
    if len == 0 || !len.is_multiple_of(SECTOR) || other > 0 || len > u64::from(u32::MAX) {
        return Asked::Nothing(BlkStatus::IoError);
    }
    Asked::Data(Range { op, sector, len })
}

/// The ranges of a discard, or of a write-zeroes with or without FUA (virtio 5.2.6.2: flags that mean nothing are
/// unsupported).
fn parse_ranges(chain: &Chain, ranges: &mut Vec<Range>, zeroes: Option<bool>) -> Asked {
    let count = chain.readable_len / RANGE_LEN as u64;
    if count == 0 || !chain.readable_len.is_multiple_of(RANGE_LEN as u64) || count > MAX_RANGES as u64 {
        return Asked::Nothing(BlkStatus::IoError);
    }
    ranges.clear();
    for i in 0..count {
        let mut raw = [0; RANGE_LEN];
        if !chain.read(i * RANGE_LEN as u64, &mut raw) {
            return Asked::Nothing(BlkStatus::IoError);
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = raw;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let op = match (zeroes, u32::from_le_bytes(flags)) {
            (None, 0) => Op::Discard,
            (Some(fua), 0) => Op::WriteZeroes { unmap: false, fua },
            (Some(fua), v::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => Op::WriteZeroes { unmap: true, fua },
            _ => return Asked::Nothing(BlkStatus::Unsupported),
        };
        if sectors == 0 || sectors > MAX_RANGE_SECTORS {
            return Asked::Nothing(BlkStatus::IoError);
        }
        ranges.push(Range { op, sector, len: u64::from(sectors) * SECTOR });
    }
    Asked::Ranges
}

/// The status byte for `status`.
pub fn status_byte(status: BlkStatus) -> u8 {
    (match status {
        BlkStatus::Ok => v::VIRTIO_BLK_S_OK,
        BlkStatus::IoError => v::VIRTIO_BLK_S_IOERR,
        BlkStatus::Unsupported => v::VIRTIO_BLK_S_UNSUPP,
    }) as u8
}

/// The 20 bytes of GET_ID: cut off or filled with zeroes.
pub fn serial(info: &DiskInfo) -> [u8; v::VIRTIO_BLK_ID_BYTES as usize] {
    let mut id = [0; v::VIRTIO_BLK_ID_BYTES as usize];
    let len = info.serial.len().min(id.len());
    id[..len].copy_from_slice(&info.serial.as_bytes()[..len]);
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> DiskInfo {
        DiskInfo {
            size: 1 << 30,
            block_size: 4096,
            physical_block_size: 8192,
            read_only: false,
            discard_granularity: 65536,
            write_zeroes: true,
            serial: "a-name-of-more-than-20-bytes".into(),
        }
    }

    #[test]
    fn config_space_has_its_fields_where_the_specification_says() {
        let c = config(&info(), 4, true);
        assert_eq!(c[..8], (1u64 << 21).to_le_bytes());
        assert_eq!(c[12..16], 126u32.to_le_bytes());
        assert_eq!(c[20..24], 4096u32.to_le_bytes());
        assert_eq!((c[24], &c[26..28]), (1, &2u16.to_le_bytes()[..]));
        assert_eq!((c[32], &c[34..36]), (1, &4u16.to_le_bytes()[..]));
        assert_eq!(c[44..48], 128u32.to_le_bytes());
        assert_eq!(c[56], 1);
        let whole = u32::from_le_bytes([c[36], c[37], c[38], c[39]]);
        assert!(whole.is_multiple_of(8) && whole > 1 << 22);
    }

    #[test]
    fn read_only_disks_offer_no_changes() {
        let all = features(&info(), true);
        let ro = features(&DiskInfo { read_only: true, ..info() }, false);
        assert_eq!(all & F_RO, 0);
        assert_eq!(all & F_RING_PACKED, F_RING_PACKED);
        assert_eq!(ro & (F_RO | 1 << 13 | 1 << 14 | F_RING_PACKED), F_RO);
    }

    #[test]
    fn serial_is_cut() {
        assert_eq!(&serial(&info()), b"a-name-of-more-than-");
    }
}
