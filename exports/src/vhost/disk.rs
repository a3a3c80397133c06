//! A bdev as vhost-poll sees a disk.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bdev::{Completions, Descriptor, Flags, IoChannel, IoRequest, Op, Rejected, Segments, Status};
use vhost_poll::{BlkStatus, Completion, Disk, DiskChannel, DiskInfo, Request};

/// A bdev that is too busy for other reasons than this channel's requests is asked again after this.
const RETRY: Duration = Duration::from_millis(1);

/// The bdev behind a controller.
pub(super) struct BdevDisk {
    /// `None` once the bdev was removed and nothing uses it any more.
    descriptor: Mutex<Option<Descriptor>>,
    /// As it was when there was a descriptor.
    last: Mutex<DiskInfo>,
}

impl BdevDisk {
    pub(super) fn new(descriptor: Descriptor) -> Self {
        let last = Mutex::new(describe(&descriptor));
        Self { descriptor: Mutex::new(Some(descriptor)), last }
    }

    /// Lets go of the bdev. Channels have been dropped.
    pub(super) fn release(&self) {
        drop(self.descriptor());
    }

    fn descriptor(&self) -> Option<Descriptor> {
        self.descriptor.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn with<R>(&self, f: impl FnOnce(&Descriptor) -> R) -> Option<R> {
        self.descriptor.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(f)
    }
}

/// What a guest is told of a bdev.
fn describe(d: &Descriptor) -> DiskInfo {
    let info = d.info();
    let read_only = d.mode() == bdev::Mode::ReadOnly;
    DiskInfo {
        size: d.blocks().saturating_mul(u64::from(info.block_size)),
        block_size: info.block_size,
        physical_block_size: info.physical_block_size,
        read_only,
        discard_granularity: if info.native.has(Op::Discard) && !read_only {
            info.discard_granularity.max(info.block_size)
        } else {
            0
        },
        // Every writable bdev takes it: where the backend does not, the I/O channel writes zeroes.
        write_zeroes: !read_only,
        serial: info.name.clone(),
    }
}

impl Disk for BdevDisk {
    type Channel = BdevChannel;

    fn info(&self) -> DiskInfo {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now) = self.with(describe) {
            *last = now;
        }
        last.clone()
    }

    fn channel(&self) -> Result<BdevChannel, String> {
        match self.with(Descriptor::channel) {
            None => Err("the bdev was removed".into()),
            Some(Err(e)) => Err(e.to_string()),
            Some(Ok(channel)) => Ok(BdevChannel::new(channel)),
        }
    }
}

/// The cookie of a reset; those of requests have 32 bits.
const RESET: u64 = u64::MAX;

/// A bdev on one reactor.
pub(super) struct BdevChannel {
    channel: IoChannel,
    /// log2 of sectors per block.
    shift: u32,
    /// Requests that the bdev had no room for, in order.
    backlog: VecDeque<IoRequest>,
    raw: Completions,
    /// Ended without the bdev.
    ended: Vec<Completion>,
}

impl BdevChannel {
    fn new(channel: IoChannel) -> Self {
        let shift = channel.info().block_size.trailing_zeros() - 9;
        Self {
            channel,
            shift,
            backlog: VecDeque::with_capacity(64),
            raw: Completions::with_capacity(256),
            ended: Vec::with_capacity(64),
        }
    }

    /// The guest's request in the words of bdev; `None` if it is not whole blocks.
    #[inline]
    fn translate(&self, r: &Request<'_>) -> Option<IoRequest> {
        use vhost_poll::Op as V;
        let when = |condition, flag| if condition { flag } else { Flags::NONE };
        let (op, flags) = match r.op {
            V::Read => (Op::Read, Flags::NONE),
            V::Write { fua } => (Op::Write, when(fua, Flags::FUA)),
            V::Flush => (Op::Flush, Flags::NONE),
            V::Discard => (Op::Discard, Flags::NONE),
            V::WriteZeroes { unmap, fua } => {
                (Op::WriteZeroes, when(!unmap, Flags::NO_UNMAP) | when(fua, Flags::FUA))
            }
        };
        let sectors = r.len >> 9;
        let rest = (1u64 << self.shift) - 1;
        if (r.sector | sectors) & rest != 0 {
            return None;
        }
        Some(IoRequest {
            op,
            flags,
            lba: r.sector >> self.shift,
            blocks: sectors >> self.shift,
            segments: Segments::from_slice(r.segments),
            cookie: r.cookie,
        })
    }

    #[inline]
    fn end(&mut self, cookie: u64, status: BlkStatus) {
        self.ended.push(Completion { cookie, status });
    }

    /// Tries what waits once more.
    #[cold]
    fn retry(&mut self) {
        while let Some(request) = self.backlog.pop_front() {
            let cookie = request.cookie;
            match self.channel.submit(request) {
                Ok(()) => {}
                Err(Rejected { request, status: Status::Busy }) => {
                    self.backlog.push_front(request);
                    break;
                }
                Err(Rejected { status, .. }) => self.end(cookie, blk_status(status)),
            }
        }
        self.channel.kick();
    }
}

/// As a guest can be told.
#[inline]
fn blk_status(status: Status) -> BlkStatus {
    match status {
        Status::Ok => BlkStatus::Ok,
        Status::Unsupported => BlkStatus::Unsupported,
        Status::IoError
        | Status::MediumError
        | Status::NoSpace
        | Status::Invalid
        | Status::OutOfRange
        | Status::ReadOnly
        | Status::TimedOut
        | Status::Aborted
        | Status::Busy
        | Status::Gone => BlkStatus::IoError,
    }
}

impl DiskChannel for BdevChannel {
    #[inline]
    fn submit(&mut self, request: Request<'_>) {
        let Some(request) = self.translate(&request) else {
            return self.end(request.cookie, BlkStatus::IoError);
        };
        if !self.backlog.is_empty() {
            return self.backlog.push_back(request);
        }
        let cookie = request.cookie;
        match self.channel.submit(request) {
            Ok(()) => {}
            Err(Rejected { request, status: Status::Busy }) => self.backlog.push_back(request),
            Err(Rejected { status, .. }) => self.end(cookie, blk_status(status)),
        }
    }

    #[inline]
    fn is_full(&self) -> bool {
        !self.backlog.is_empty()
    }

    #[inline]
    fn kick(&mut self) {
        self.channel.kick();
    }

    #[cold]
    fn abort(&mut self) {
        for request in std::mem::take(&mut self.backlog) {
            self.end(request.cookie, BlkStatus::IoError);
        }
        // Refused if the bdev is gone, which has ended them then.
        let _ = self.channel.submit(IoRequest::reset(RESET));
        self.channel.kick();
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<Completion>) {
        self.channel.poll(&mut self.raw);
        done.append(&mut self.ended);
        let raw = self.raw.drain(..).filter(|c| c.cookie != RESET);
        done.extend(raw.map(|c| Completion { cookie: c.cookie, status: blk_status(c.status) }));
        if !self.backlog.is_empty() {
            self.retry();
        }
    }

    fn wait_fd(&self) -> Option<RawFd> {
        self.channel.wait_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        let retry = (!self.backlog.is_empty()).then(|| Instant::now() + RETRY);
        self.channel.deadline().into_iter().chain(retry).min()
    }

    fn ready(&self) -> bool {
        !self.ended.is_empty() || self.channel.ready()
    }
}
