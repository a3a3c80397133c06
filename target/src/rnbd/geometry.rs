//! How a bdev looks to an RNBD client, and how its statuses do.

use bdev::{Info, Op, Status};
use rnbd_proto::device::{DevGeometry, DevGeometryError};
use rnbd_proto::errno::Errno;
use rnbd_proto::wire::SECTOR_SIZE;

/// Longest discard or write-zeroes announced: 2 GiB, below the 32-bit byte count of the message.
const MAX_RANGE_BYTES: u64 = 1 << 31;

/// What a client learns of a bdev of `blocks` blocks, opened read-only or not.
pub(super) fn geometry(info: &Info, blocks: u64, read_only: bool) -> Result<DevGeometry, DevGeometryError> {
    let sectors_per_block = u64::from(info.block_size / SECTOR_SIZE);
    let mut g = DevGeometry::new(blocks.saturating_mul(sectors_per_block), info.block_size)?;
    let range = (MAX_RANGE_BYTES / u64::from(SECTOR_SIZE)) as u32;
    g.physical_block_size = info.physical_block_size;
    g.read_only = read_only || info.read_only;
    g.write_cache = info.write_cache;
    // Where the backend has no FUA of its own, the channel writes and then flushes.
    g.fua = true;
    if info.native.has(Op::Discard) && info.discard_granularity > 0 {
        g.max_discard_sectors = range;
        g.discard_granularity = info.discard_granularity;
    }
    // Every bdev can: the channel writes zeroes where the backend has no better way.
    g.max_write_zeroes_sectors = range;
    g.secure_erase = info.native.has(Op::SecureErase);
    Ok(g)
}

/// The errno a Linux client maps to the nearest block status.
pub(super) fn errno(status: Status) -> Result<(), Errno> {
    Err(match status {
        Status::Ok => return Ok(()),
        Status::IoError | Status::OutOfRange => Errno::EIO,
        Status::MediumError => Errno::ENODATA,
        Status::NoSpace => Errno::ENOSPC,
        Status::Unsupported => Errno::EOPNOTSUPP,
        Status::Invalid => Errno::EINVAL,
        Status::ReadOnly => Errno::EROFS,
        Status::TimedOut => Errno::ETIMEDOUT,
        Status::Aborted => Errno::ECANCELED,
        Status::Busy => Errno::EAGAIN,
        Status::Gone => Errno::ENODEV,
    })
}
