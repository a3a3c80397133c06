//! The two traits of a backend: [`Bdev`] for the control path, [`Channel`] for one core's data path.
//!
//! ```text
//!   control thread                       a reactor
//!   Manager::create ──▶ Arc<dyn Bdev>
//!   Manager::open   ──▶ Descriptor ─────▶ Descriptor::channel() ──▶ IoChannel (checks, emulation, statistics)
//!                                                                      └── Box<dyn Channel> (the backend)
//!   remove event    ──▶ owner drops its IoChannels on every reactor, then the Descriptor
//! ```

use std::any::Any;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use crate::descriptor::Mode;
use crate::io::{Completions, IoRequest, Op, Rejected};
use crate::manager::Error;

/// Operations as a bit set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpSet(u16);

impl OpSet {
    /// The set of `ops`.
    pub const fn of(ops: &[Op]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < ops.len() {
            bits |= 1 << ops[i] as u16;
            i += 1;
        }
        Self(bits)
    }

    /// This set and `op`.
    #[must_use]
    pub const fn with(self, op: Op) -> Self {
        Self(self.0 | 1 << op as u16)
    }

    /// Membership.
    pub fn has(self, op: Op) -> bool {
        self.0 & (1 << op as u16) != 0
    }
}

/// Limits and properties, fixed for the life of a bdev except the size.
#[derive(Clone, Debug)]
pub struct Info {
    /// Unique among the bdevs of the process.
    pub name: String,
    /// Other names, unique too.
    pub aliases: Vec<String>,
    /// As SPDK names it: "Malloc disk", "URING bdev", …
    pub product_name: &'static str,
    /// Stable identity, which is an alias, too.
    pub uuid: uuid::Uuid,
    /// Logical block, bytes: a power of two, 512..=65536.
    pub block_size: u32,
    /// Physical block, bytes: writes of this alignment need no read-modify-write.
    pub physical_block_size: u32,
    /// What the backend does itself. `IoChannel` adds write-zeroes (by writing zeroes), flush (no-op without a
    /// volatile cache) and FUA (write, then flush) where they are missing.
    pub native: OpSet,
    /// Whether the backend honours [`crate::Flags::FUA`] of a `Write` itself. (After write-zeroes with FUA the
    /// `IoChannel` flushes, if there is a write cache; a backend never sees the flag there.)
    pub native_fua: bool,
    /// An acknowledged write may be lost with power until it is flushed.
    pub write_cache: bool,
    /// The backend refuses every modification.
    pub read_only: bool,
    /// What is written ends with this process: a later one begins with a bdev of this name empty, so users that outlived
    /// the former process (kernel devices, guests) must not be put on it. Layers have it of their base. False where
    /// nothing is kept anyway (null) and where the contents are somebody else's, who may live longer.
    pub volatile: bool,
    /// Its blocks are on disks that spin: seeks take time.
    pub rotational: bool,
    /// Smallest unit that discard frees, bytes; 0 = no discard.
    pub discard_granularity: u32,
    /// Most blocks of one discard or write-zeroes; `u64::MAX` = any.
    pub max_unmap_blocks: u64,
    /// Address alignment of segments in bytes, 1 if any address will do. Others are bounced by the backend.
    pub buffer_align: u32,
}

impl Info {
    /// The aliases, and the UUID if it is none of them: SPDK makes it one of every bdev.
    pub fn all_aliases(&self) -> Vec<String> {
        let uuid =
            Some(self.uuid.to_string()).filter(|uuid| !self.uuid.is_nil() && !self.aliases.contains(uuid));
        self.aliases.iter().cloned().chain(uuid).collect()
    }

    /// What an `IoChannel` on this bdev takes: `native` and what it adds.
    pub fn supported(&self) -> OpSet {
        let mut set = self.native.with(Op::Flush).with(Op::Reset);
        if !self.read_only {
            set = set.with(Op::WriteZeroes);
        }
        set
    }

    /// What is wrong with these properties, in words. A backend with wrong ones is not registered.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        let is_block = |b: u32| b.is_power_of_two() && (512..=65536).contains(&b);
        if self.name.is_empty() || self.aliases.iter().any(String::is_empty) {
            return Some("a name must not be empty");
        }
        if !is_block(self.block_size) {
            return Some("block_size must be a power of two from 512 to 65536");
        }
        if !self.physical_block_size.is_power_of_two() || self.physical_block_size < self.block_size {
            return Some("physical_block_size must be a power of two and at least block_size");
        }
        if !self.native.has(Op::Read) || !(self.read_only || self.native.has(Op::Write)) {
            return Some("the backend must read, and write unless it is read-only");
        }
        if self.write_cache && !self.native.has(Op::Flush) {
            return Some("a device with a volatile cache must support flush");
        }
        if self.max_unmap_blocks == 0 {
            return Some("max_unmap_blocks must be at least 1");
        }
        None
    }
}

/// A run of blocks of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// At least 1.
    pub blocks: u64,
    /// They take no space, and read as zeroes.
    pub hole: bool,
}

/// A block device of any kind. Shared by all threads; everything here is control path.
///
/// `Any`, so that a control method of one backend (resize of a null bdev) can ask for its own type by name.
pub trait Bdev: Any + Send + Sync {
    /// Properties.
    fn info(&self) -> &Info;

    /// Size now, in blocks. Changes are announced by the manager's resize event.
    fn blocks(&self) -> u64;

    /// A data path for the calling thread, which must be the one that uses it. Each call makes an independent channel.
    ///
    /// # Errors
    /// The system's refusal (file table, locked memory), in words.
    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError>;

    /// As [`Bdev::channel`], for a descriptor of `mode`: where devices tell readers from writers.
    ///
    /// # Errors
    /// As there.
    fn channel_for(self: Arc<Self>, _mode: Mode) -> Result<Box<dyn Channel>, ChannelError> {
        self.channel()
    }

    /// A descriptor of `mode` is about to be open; [`Bdev::closed`] follows when it is dropped.
    ///
    /// # Errors
    /// Somebody else, whom the manager does not know, has the device: `Busy`.
    fn opened(&self, _mode: Mode) -> Result<(), Error> {
        Ok(())
    }

    /// A descriptor of `mode` and all its channels are gone.
    fn closed(&self, _mode: Mode) {}

    /// Somebody whom the manager does not know has the device for himself, so nobody else should be given it, not even to
    /// read. Control path.
    fn is_held(&self) -> bool {
        false
    }

    /// What of `blocks` blocks from `lba` on, a range inside the bdev, is allocated: at least one extent, at most `max`, in
    /// order and without gaps, less than the range if there are more. `None` where that is not known, which is as good as
    /// all data. Control path: may wait for the device's own metadata.
    fn extents(&self, _lba: u64, _blocks: u64, _max: usize) -> Option<Vec<Extent>> {
        None
    }

    /// Whether [`Bdev::extents`] is worth asking.
    fn has_extents(&self) -> bool {
        false
    }

    /// The range will be read soon. Control path, a hint.
    fn prefetch(&self, _lba: u64, _blocks: u64) {}

    /// Whether [`Bdev::prefetch`] does anything.
    fn prefetches(&self) -> bool {
        false
    }

    /// Name and values of `driver_specific` in `bdev_get_bdevs`.
    fn driver_specific(&self) -> Vec<(&'static str, DriverValue)> {
        Vec::new()
    }
}

/// Bytes of a device of this shape.
///
/// # Errors
/// `Invalid`, naming the parameter.
pub(crate) fn check_size(num_blocks: u64, block_size: u32) -> Result<u64, Error> {
    let invalid = |parameter, reason: String| Err(Error::Invalid { parameter, reason });
    if !(block_size.is_power_of_two() && (512..=65536).contains(&block_size)) {
        return invalid("block_size", format!("{block_size} is not a power of two from 512 to 65536"));
    }
    // Offsets are signed 64-bit numbers in every system call.
    match num_blocks.checked_mul(u64::from(block_size)).filter(|b| *b > 0 && *b <= i64::MAX as u64) {
        Some(bytes) => Ok(bytes),
        None => invalid(
            "num_blocks",
            format!("{num_blocks} blocks of {block_size} bytes: 1 byte to 2^63-1 is right"),
        ),
    }
}

/// A value in `driver_specific`.
#[derive(Clone, Debug, PartialEq)]
pub enum DriverValue {
    /// Text.
    Text(String),
    /// Number.
    Number(u64),
    /// Truth.
    Bool(bool),
}

/// A channel could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot open an I/O channel to bdev {bdev}: {reason}")]
pub struct ChannelError {
    /// Which bdev.
    pub bdev: String,
    /// What failed and what would help.
    pub reason: String,
}

/// One core's way to a bdev. `!Send`: made, used and dropped on one thread.
///
/// The caller has checked range, alignment, segment sum, read-only and operation support (that is `IoChannel`'s
/// work), so a backend may rely on them.
pub trait Channel {
    /// Takes one request; it may stay in a batch until [`Channel::kick`].
    ///
    /// `Ok`: exactly one [`crate::Completion`] with its cookie will come out of [`Channel::poll`], never from within
    /// this call. `Err`: none will, and the request is back.
    ///
    /// A `Reset` (only where it is `native`) completes once everything that can be aborted is on its way out;
    /// `IoChannel` waits for the earlier requests themselves. A `WriteZeroes` may end `Unsupported` though `native`,
    /// if that shows only at run time: `IoChannel` then writes zeroes.
    ///
    /// # Errors
    /// [`crate::Status::Busy`] when no slot is free; other states as the device has them.
    // The request comes back by value on purpose: a full channel costs no allocation.
    #[allow(clippy::result_large_err)]
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected>;

    /// Hands the batch to the device (one `io_uring_enter`, one doorbell). Once per turn; cheap when empty.
    fn kick(&mut self);

    /// Appends what has completed. Never blocks; true if there was anything.
    fn poll(&mut self, done: &mut Completions) -> bool;

    /// Becomes readable when a completion is ready, so that an idle core can sleep. `None`: completions appear only
    /// in the turn after a submit (or at [`Channel::deadline`]), so nothing needs waiting for.
    fn wait_fd(&self) -> Option<RawFd> {
        None
    }

    /// When `poll` will next have something though no descriptor fires (delay layers).
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// True while completed work waits in memory for the next `poll`, so the core must not sleep.
    fn ready(&self) -> bool {
        false
    }
}
