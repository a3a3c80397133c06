//! What a vhost-user-blk controller serves: a [`Disk`], and on each reactor a [`DiskChannel`] of it.

use std::os::fd::RawFd;
use std::time::Instant;

use iobuf::Segment;

/// Properties of a disk, asked anew for each connection and after a resize.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes: a power of two from 512.
    pub block_size: u32,
    /// Physical block, bytes.
    pub physical_block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Smallest unit that discard frees, bytes; 0 = no discard.
    pub discard_granularity: u32,
    /// Write-zeroes is possible.
    pub write_zeroes: bool,
    /// Identity for the guest (`/dev/disk/by-id/virtio-…`); the first 20 bytes count.
    pub serial: String,
}

/// A disk, shared by the threads that serve it.
pub trait Disk: Send + Sync + 'static {
    /// Its data path.
    type Channel: DiskChannel;

    /// Properties now.
    fn info(&self) -> DiskInfo;

    /// A data path for the calling thread.
    ///
    /// # Errors
    /// Why there is none, in words; requests are then answered with [`BlkStatus::IoError`].
    fn channel(&self) -> Result<Self::Channel, String>;
}

/// What a guest wants. The values of [`Request::sector`] and lengths are as the guest sent them, not yet compared with
/// the size of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Disk to segments.
    Read,
    /// Segments to disk.
    Write {
        /// Stable before it is completed: the guest runs without a write cache.
        fua: bool,
    },
    /// All completed writes become stable.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range becomes zeroes.
    WriteZeroes {
        /// Its space may be given back.
        unmap: bool,
        /// As of a write.
        fua: bool,
    },
}

/// One request. The segments are the guest's memory, which may change at any time, and stay mapped until the completion.
#[derive(Debug)]
pub struct Request<'a> {
    /// What to do.
    pub op: Op,
    /// First sector, in units of 512 bytes.
    pub sector: u64,
    /// Bytes. A multiple of 512; 0 for a flush only.
    pub len: u64,
    /// Where the data is, `len` bytes in all; empty without data.
    pub segments: &'a [Segment],
    /// Comes back in the [`Completion`].
    pub cookie: u64,
}

/// How a request ended, as a guest can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BlkStatus {
    /// Done (VIRTIO_BLK_S_OK).
    Ok,
    /// Failed (VIRTIO_BLK_S_IOERR).
    IoError,
    /// Not an operation of this disk (VIRTIO_BLK_S_UNSUPP).
    Unsupported,
}

/// The answer to one [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Of the request.
    pub cookie: u64,
    /// How it ended.
    pub status: BlkStatus,
}

/// One reactor's way to a disk. Made, used and dropped there.
pub trait DiskChannel: 'static {
    /// Takes one request; exactly one completion with its cookie comes out of [`DiskChannel::poll`], never from within
    /// this call. Takes also those that come after [`DiskChannel::is_full`] (a discard has several ranges).
    fn submit(&mut self, request: Request<'_>);

    /// No more for now: requests are left in the ring until something completed.
    fn is_full(&self) -> bool;

    /// Hands what was submitted to the device; once per turn.
    fn kick(&mut self);

    /// Appends what has completed.
    fn poll(&mut self, done: &mut Vec<Completion>);

    /// Readable when something completes while the reactor sleeps, if that needs waiting for.
    fn wait_fd(&self) -> Option<RawFd>;

    /// When to poll although no descriptor fires.
    fn deadline(&self) -> Option<Instant>;

    /// Completions wait in memory already.
    fn ready(&self) -> bool;

    /// Ends what can be ended early, with errors: requests that wait for a server that is away. Each still has its completion.
    fn abort(&mut self);
}
