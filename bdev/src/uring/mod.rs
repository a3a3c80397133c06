//! Files and block devices through io_uring; also the alias "AIO disk" with the parameters of `bdev_aio_create`.
//!
//! - Direct I/O where the file system has it and the block size fits; else the page cache, with a notice.
//! - Each channel has its own ring, one registered file, and the regions of the manager's registry as fixed buffers.
//! - Flush is `fdatasync`, FUA is `RWF_DSYNC`; both reach the disk's own cache.
//! - Write-zeroes is `fallocate`: a punched hole, or a zeroed range with `NO_UNMAP`. Where the file system has
//!   neither, the `IoChannel` writes zeroes. On block devices the same calls are the kernel's zero-out, with
//!   (`NO_UNMAP`) or without its own fallback of writing.
//! - Discard is a punched hole in files. On block devices it is `BLOCK_URING_CMD_DISCARD` (Linux 6.12), which is
//!   asynchronous in the kernel; older kernels get a punched hole, which zeroes too. The ioctl BLKDISCARD would block
//!   the core, and `FALLOC_FL_NO_HIDE_STALE` never passed the kernel's `vfs_fallocate`.
//! - Secure erase is not offered: its only interface is the blocking ioctl BLKSECDISCARD.
//! - One program at a time: `O_EXCL` on block devices that are opened for writing, `flock` on files (advisory).
//!
//! Reading order: [`file`](self) opens and examines, `channel` runs the ring, `slot` is one request in it, `buffers`
//! keeps the fixed buffers in step with the registry.

mod buffers;
mod channel;
mod file;
mod slot;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iobuf::Registry;
use uuid::Uuid;

use crate::device::{Bdev, Channel, ChannelError, DriverValue, Extent, Info, OpSet};
use crate::io::Op;
use crate::manager::{Error, Manager};
pub use file::FileId;
use file::{Backing, Wish};

/// Which of SPDK's modules the bdev presents itself as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// `bdev_uring_create`: "URING bdev".
    #[default]
    Uring,
    /// `bdev_aio_create`: "AIO disk".
    Aio,
}

/// As `bdev_uring_create` and `bdev_aio_create` take them.
#[derive(Clone, Debug)]
pub struct Params {
    /// Name.
    pub name: String,
    /// Path of a regular file or block device.
    pub filename: String,
    /// Bytes. If absent: the device's, or for a file its preferred I/O size (4096 as a rule; 512 if the size of the
    /// file is no multiple of that).
    pub block_size: Option<u32>,
    /// Random if absent.
    pub uuid: Option<Uuid>,
    /// Open read-only. Files and devices that cannot be written become read-only by themselves.
    pub read_only: bool,
    /// Offer discard, and let write-zeroes give space back. `bdev_aio_create {fallocate}`; always true for uring. Without,
    /// write-zeroes keeps the space allocated; it is `fallocate` in either case.
    pub fallocate: bool,
    /// Bypass the page cache where possible.
    pub direct: bool,
    /// Which module's names to show.
    pub kind: Kind,
}

impl Params {
    /// The usual ones.
    pub fn new(name: &str, filename: &str) -> Self {
        Self {
            name: name.to_owned(),
            filename: filename.to_owned(),
            block_size: None,
            uuid: None,
            read_only: false,
            fallocate: true,
            direct: true,
            kind: Kind::Uring,
        }
    }
}

/// The backend.
#[derive(Debug)]
pub struct Uring {
    info: Info,
    blocks: AtomicU64,
    params: Params,
    backing: Arc<Backing>,
    registry: Arc<Registry>,
}

/// Opens, makes and registers one; returns its name.
///
/// # Errors
/// `System` (the file, its lock, io_uring), `Invalid`, `Exists`.
pub fn create(manager: &Arc<Manager>, params: Params) -> Result<String, Error> {
    channel::probe()?;
    let wish = Wish {
        read_only: params.read_only,
        direct: params.direct,
        punch: params.fallocate,
        block_size: None,
    };
    let block_size = match params.block_size {
        Some(size) => crate::device::check_size(1, size).map(|_| size)?,
        None => default_block_size(&params.filename)?,
    };
    let backing = Backing::open(&params.filename, Wish { block_size: Some(block_size), ..wish })?;
    if block_size < backing.logical_block {
        let reason = format!(
            "{block_size} is less than the {} of {}; use that or leave it out",
            backing.logical_block, params.filename
        );
        return Err(Error::Invalid { parameter: "block_size", reason });
    }
    let blocks = whole_blocks(&backing, block_size)?;
    let name = params.name.clone();
    let uring = Uring {
        info: info(&params, &backing, block_size),
        blocks: AtomicU64::new(blocks),
        params,
        backing: Arc::new(backing),
        registry: manager.registry().clone(),
    };
    manager.register(Arc::new(uring))?;
    Ok(name)
}

/// The file or device that a bdev of this kind is on.
pub fn file_of(bdev: Arc<dyn Bdev>) -> Option<FileId> {
    let any: Arc<dyn std::any::Any + Send + Sync> = bdev;
    FileId::of(&any.downcast::<Uring>().ok()?.backing.fd).ok()?
}

/// The bdevs, by their names, whose file or device this is.
pub fn on_file(manager: &Manager, file: FileId) -> Vec<String> {
    let all = manager.list().into_iter().map(|status| status.bdev);
    let same = all.filter(|bdev| file_of(bdev.clone()) == Some(file));
    same.map(|bdev| bdev.info().name.clone()).collect()
}

/// Asks the file or device for its size and tells the users of `name` if it changed (`bdev_aio_rescan`,
/// `bdev_uring_rescan`).
///
/// # Errors
/// `NotFound`, `WrongKind`, `System`.
pub fn rescan(manager: &Arc<Manager>, name: &str) -> Result<(), Error> {
    let uring = manager.get_as::<Uring>(name)?;
    let blocks = uring.backing.size()? / u64::from(uring.info.block_size);
    uring.blocks.store(blocks, Ordering::Relaxed);
    manager.resized(name)
}

/// Removes `name`, which must be of `kind`.
///
/// # Errors
/// `NotFound`, `WrongKind`.
pub fn delete(manager: &Arc<Manager>, name: &str, kind: Kind, on_gone: crate::OnGone) -> Result<(), Error> {
    let uring = manager.get_as::<Uring>(name)?;
    if uring.params.kind != kind {
        return Err(Error::WrongKind { name: name.to_owned(), product: uring.info.product_name });
    }
    // Or its file would stay open until the end of this function.
    drop(uring);
    manager.unregister(name, on_gone)
}

/// SPDK's rule: the device's logical block, or the preferred I/O size of the file.
fn default_block_size(path: &str) -> Result<u32, Error> {
    let wish = Wish { read_only: true, direct: false, punch: false, block_size: None };
    // Read-only and for a moment: this takes no lock that the real open would meet.
    let examined = Backing::open(path, wish)?;
    if examined.is_device {
        return Ok(examined.logical_block);
    }
    let preferred = examined.physical_block.min(4096);
    Ok(if examined.size()?.is_multiple_of(u64::from(preferred)) { preferred } else { 512 })
}

fn whole_blocks(backing: &Backing, block_size: u32) -> Result<u64, Error> {
    let bytes = backing.size()?;
    let blocks = bytes / u64::from(block_size);
    if blocks == 0 {
        let reason = format!("{} has {bytes} bytes, less than one block of {block_size}", backing.path);
        return Err(Error::Invalid { parameter: "filename", reason });
    }
    if !bytes.is_multiple_of(u64::from(block_size)) {
        tracing::warn!(
            path = backing.path,
            bytes,
            block_size,
            "not whole blocks: the rest at the end is not used"
        );
    }
    Ok(blocks)
}

fn info(params: &Params, backing: &Backing, block_size: u32) -> Info {
    let mut native = OpSet::of(&[Op::Read, Op::Flush, Op::Reset]);
    let mut discard_granularity = 0;
    if !backing.read_only {
        // Even where nothing is to be freed: the kernel zeroes a range faster than anybody writes zeroes to it.
        native = native.with(Op::Write).with(Op::WriteZeroes);
        if params.fallocate && backing.discards() {
            native = native.with(Op::Discard);
            discard_granularity = backing.discard_granularity().max(block_size);
        }
    }
    Info {
        name: params.name.clone(),
        aliases: Vec::new(),
        product_name: match params.kind {
            Kind::Uring => "URING bdev",
            Kind::Aio => "AIO disk",
        },
        uuid: params.uuid.unwrap_or_else(Uuid::new_v4),
        block_size,
        physical_block_size: backing.physical_block.next_power_of_two().max(block_size),
        native,
        native_fua: true,
        write_cache: !backing.read_only,
        read_only: backing.read_only,
        volatile: false,
        rotational: backing.is_rotational(),
        discard_granularity,
        max_unmap_blocks: u64::MAX,
        buffer_align: backing.memory_align,
    }
}

/// Runs of bytes, data (true) and holes, as extents of blocks of 2^`shift` bytes: a block with any data is data.
fn whole_extents(runs: &[(bool, u64)], shift: u32) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::with_capacity(runs.len());
    let (mut at, mut told) = (0u64, 0u64);
    for (data, len) in runs {
        at += len;
        // Data take the block that they end in, holes leave it to the data behind them.
        let end = if *data { at.div_ceil(1 << shift) } else { at >> shift };
        let blocks = end.saturating_sub(told);
        told = told.max(end);
        match extents.last_mut() {
            _ if blocks == 0 => {}
            Some(last) if last.hole != *data => last.blocks += blocks,
            _ => extents.push(Extent { blocks, hole: !*data }),
        }
    }
    extents
}

impl Uring {
    /// As created.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Whether the page cache is bypassed.
    pub fn direct(&self) -> bool {
        self.backing.direct
    }
}

impl Bdev for Uring {
    fn info(&self) -> &Info {
        &self.info
    }

    fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    fn extents(&self, lba: u64, blocks: u64, max: usize) -> Option<Vec<Extent>> {
        if !self.has_extents() {
            return None;
        }
        let shift = self.info.block_size.trailing_zeros();
        // One run more, for a hole that is smaller than a block and gives no extent.
        let runs = self.backing.allocation(lba << shift, blocks << shift, max + 1)?;
        let mut extents = whole_extents(&runs, shift);
        extents.truncate(max);
        Some(extents)
    }

    /// A device has no holes that one could ask for.
    fn has_extents(&self) -> bool {
        !self.backing.is_device
    }

    fn prefetch(&self, lba: u64, blocks: u64) {
        let shift = self.info.block_size.trailing_zeros();
        // A hint: what the system makes of it is its own business.
        let _ = rustix::fs::fadvise(
            &self.backing.fd,
            lba << shift,
            std::num::NonZeroU64::new(blocks << shift),
            rustix::fs::Advice::WillNeed,
        );
    }

    /// Direct I/O leaves nothing in the page cache, nor takes it from there.
    fn prefetches(&self) -> bool {
        !self.backing.direct
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        channel::UringChannel::new(
            self.backing.clone(),
            self.registry.clone(),
            self.info.block_size.trailing_zeros(),
        )
        .map(|c| Box::new(c) as Box<dyn Channel>)
        .map_err(|e| ChannelError { bdev: self.info.name.clone(), reason: channel::explain(&e) })
    }

    /// `filename` as in SPDK's `aio`/`uring` objects; the rest is ours.
    fn driver_specific(&self) -> Vec<(&'static str, DriverValue)> {
        vec![
            ("filename", DriverValue::Text(self.params.filename.clone())),
            ("block_size_override", DriverValue::Bool(self.params.block_size.is_some())),
            ("readonly", DriverValue::Bool(self.backing.read_only)),
            ("fallocate", DriverValue::Bool(self.params.fallocate)),
            ("direct", DriverValue::Bool(self.backing.direct)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_with_data_are_data() {
        let extents = |runs: &[(bool, u64)]| -> Vec<(u64, bool)> {
            whole_extents(runs, 12).iter().map(|e| (e.blocks, e.hole)).collect()
        };
        assert_eq!(extents(&[(true, 4096), (false, 8192)]), [(1, false), (2, true)]);
        // A hole smaller than a block is none, and one that ends inside a block loses that.
        assert_eq!(extents(&[(false, 100), (true, 3996), (false, 4096)]), [(1, false), (1, true)]);
        assert_eq!(extents(&[(false, 5000), (true, 100), (false, 7188)]), [(1, true), (1, false), (1, true)]);
        assert_eq!(extents(&[(true, 100), (false, 200), (true, 3796)]), [(1, false)]);
        // Cut off inside a block: what is not known of it is not told.
        assert_eq!(extents(&[(false, 5000)]), [(1, true)]);
    }
}
