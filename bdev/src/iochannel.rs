//! The data path that users see: checks, then the backend, then statistics. What a backend lacks is in
//! [`crate::emulate`].
//!
//! Each request gets a slot; the backend sees the slot's number as its cookie, so that a completion finds its
//! request by index. Slots are kept and reused: nothing is allocated once the channel has seen its deepest queue.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use iobuf::Region;

use crate::clock::now_ns;
use crate::descriptor::{Mode, Open};
use crate::device::{Channel, ChannelError, OpSet};
use crate::emulate::Step;
use crate::io::{Completion, Completions, Flags, IoRequest, Op, Rejected, Status};
use crate::stats::ChannelRecorder;

/// Most requests in flight on one channel; more are refused with [`Status::Busy`].
const MAX_SLOTS: usize = 1 << 16;

/// One core's way to a bdev, as its users have it. `!Send`: made, used and dropped on one thread.
///
/// Per turn: any number of [`submit`](Self::submit), one [`kick`](Self::kick), one [`poll`](Self::poll). Wait with
/// [`wait_fd`](Self::wait_fd), [`deadline`](Self::deadline) and [`ready`](Self::ready) as for [`Channel`]. Segments
/// must stay valid until the completion, so drop a channel only when [`inflight`](Self::inflight) is 0; if it is
/// dropped earlier all the same, it waits for the device to let go of the memory, and no completion comes out.
///
/// ```compile_fail
/// fn crosses_threads<T: Send>() {}
/// crosses_threads::<bdev::IoChannel>();
/// ```
pub struct IoChannel {
    // Field order is drop order: the backend's channel goes before the descriptor that keeps its bdev.
    pub(crate) backend: Box<dyn Channel>,
    pub(crate) slots: Vec<Slot>,
    free: Vec<u32>,
    /// Ended without the backend; reported by the next poll.
    pub(crate) ended: Vec<(u32, Status)>,
    /// Multi-step requests whose next step met a full backend.
    pub(crate) retry: VecDeque<u32>,
    /// Resets that wait for earlier requests.
    pub(crate) resets: Vec<PendingReset>,
    /// Moves with each reset: tells earlier requests from later ones.
    pub(crate) generation: u64,
    /// Requests the backend holds.
    pub(crate) at_backend: usize,
    /// A step was submitted, and the backend wants a kick.
    pub(crate) stepped: bool,
    /// `retry` has a step that was not tried yet.
    pub(crate) untried: bool,
    raw: Completions,
    recorder: ChannelRecorder,
    /// Clock at the first submit of this batch, 0 between batches.
    batch_ns: u64,
    pub(crate) limits: Limits,
    /// Set at the first emulated write-zeroes.
    zeroes: Option<Arc<Region>>,
    open: Arc<Open>,
}

/// What the checks and steps need of `Info`, at hand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) block_shift: u32,
    pub(crate) max_unmap_blocks: u64,
    pub(crate) native: OpSet,
    supported: OpSet,
    pub(crate) native_fua: bool,
    pub(crate) write_cache: bool,
    writable: bool,
}

/// One request in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) cookie: u64,
    start_ns: u64,
    bytes: u64,
    pub(crate) generation: u64,
    /// Next block and blocks left of a multi-step request.
    pub(crate) lba: u64,
    pub(crate) left: u64,
    /// Blocks of the step that the backend has now.
    pub(crate) piece: u64,
    pub(crate) op: Op,
    pub(crate) flags: Flags,
    pub(crate) step: Step,
    /// Ends after its present step.
    pub(crate) cut: bool,
}

/// A reset and how many of its predecessors are in flight.
#[derive(Debug)]
pub(crate) struct PendingReset {
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) waiting_for: usize,
}

impl IoChannel {
    pub(crate) fn new(open: Arc<Open>) -> Result<Self, ChannelError> {
        let info = open.entry.info();
        let limits = Limits {
            block_shift: info.block_size.trailing_zeros(),
            max_unmap_blocks: info.max_unmap_blocks,
            native: info.native,
            supported: info.supported(),
            native_fua: info.native_fua,
            write_cache: info.write_cache,
            writable: open.mode == Mode::ReadWrite && !info.read_only,
        };
        Ok(Self {
            backend: open.entry.bdev().clone().channel_for(open.mode)?,
            slots: Vec::with_capacity(64),
            free: Vec::with_capacity(64),
            ended: Vec::with_capacity(64),
            retry: VecDeque::new(),
            resets: Vec::new(),
            generation: 0,
            at_backend: 0,
            stepped: false,
            untried: false,
            raw: Vec::with_capacity(64),
            recorder: open.entry.stats.join(),
            batch_ns: 0,
            limits,
            zeroes: None,
            open,
        })
    }

    /// Takes one request, or gives it back. `Ok`: exactly one completion with its cookie will come out of
    /// [`poll`](Self::poll).
    ///
    /// # Errors
    /// In this order: `Gone` (the bdev was removed), `ReadOnly`, `Unsupported`, `Invalid` (flags, zero blocks,
    /// segment sum), `OutOfRange`, `Busy` (full: again after some completion), and what the device has to say.
    // The request comes back by value on purpose: a full channel costs no allocation.
    #[allow(clippy::result_large_err)]
    #[inline]
    pub fn submit(&mut self, mut request: IoRequest) -> Result<(), Rejected> {
        let status = self.check(&request);
        if status != Status::Ok {
            return self.refuse(request, status);
        }
        let Some(slot) = self.take_slot(&request) else { return self.refuse(request, Status::Busy) };
        if !self.is_plain(&mut request) {
            return self.submit_steps(slot, request);
        }
        request.cookie = u64::from(slot);
        match self.backend.submit(request) {
            Ok(()) => {
                self.at_backend += 1;
                Ok(())
            }
            Err(rejected) => self.take_back(slot, rejected),
        }
    }

    /// Hands the batch to the device. Once per turn, after the submits.
    pub fn kick(&mut self) {
        self.batch_ns = 0;
        self.backend.kick();
    }

    /// Appends what has completed. Never blocks; true if there was anything.
    pub fn poll(&mut self, done: &mut Completions) -> bool {
        self.recorder.sync();
        let mut raw = std::mem::take(&mut self.raw);
        self.backend.poll(&mut raw);
        let before = done.len();
        if !raw.is_empty() || !self.ended.is_empty() || !self.retry.is_empty() {
            let now = now_ns();
            self.at_backend -= raw.len();
            for completion in raw.drain(..) {
                self.complete(completion, now, done);
            }
            if !self.ended.is_empty() || !self.retry.is_empty() || self.stepped {
                self.turn_steps(now, done);
            }
        }
        self.raw = raw;
        done.len() > before
    }

    /// Ends requests of several steps early, those whose cookie `which` picks: they end `Aborted`, after the step that the
    /// device has now. For requests that nobody waits for any more: zeroing a TiB by writing takes hours.
    #[cold]
    pub fn cut_short(&mut self, which: impl Fn(u64) -> bool) {
        // Places that are free, too: whoever takes one next begins anew.
        self.slots.iter_mut().filter(|s| which(s.cookie)).for_each(|s| s.cut = true);
    }

    /// Requests taken and not yet completed.
    pub fn inflight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// As [`Channel::wait_fd`].
    pub fn wait_fd(&self) -> Option<RawFd> {
        self.backend.wait_fd()
    }

    /// As [`Channel::deadline`].
    pub fn deadline(&self) -> Option<Instant> {
        let backend = self.backend.deadline();
        // A step met a full backend: its completions end the wait, except if it is full for other reasons.
        let retry = (!self.retry.is_empty()).then(|| Instant::now() + Duration::from_millis(1));
        backend.into_iter().chain(retry).min()
    }

    /// As [`Channel::ready`].
    pub fn ready(&self) -> bool {
        !self.ended.is_empty() || self.untried || self.backend.ready()
    }

    pub(crate) fn is_removed(&self) -> bool {
        self.open.entry.removed.load(Relaxed)
    }

    /// Properties of the bdev.
    pub fn info(&self) -> &crate::Info {
        self.open.entry.info()
    }

    /// Size of the bdev now, in blocks.
    pub fn blocks(&self) -> u64 {
        self.open.entry.blocks.load(Relaxed)
    }

    /// Everything that a backend may rely on, in one place.
    #[inline]
    fn check(&self, r: &IoRequest) -> Status {
        let entry = &self.open.entry;
        if entry.removed.load(Relaxed) {
            return Status::Gone;
        }
        if r.op.modifies() && !self.limits.writable {
            return Status::ReadOnly;
        }
        if !self.limits.supported.has(r.op) {
            return Status::Unsupported;
        }
        if !flags_fit(r.op, r.flags) {
            return Status::Invalid;
        }
        if !r.op.has_range() {
            return if r.lba == 0 && r.blocks == 0 && r.segments.is_empty() {
                Status::Ok
            } else {
                Status::Invalid
            };
        }
        if r.blocks == 0 {
            return Status::Invalid;
        }
        let size = entry.blocks.load(Relaxed);
        if r.lba.checked_add(r.blocks).is_none_or(|end| end > size) {
            return Status::OutOfRange;
        }
        // A sum of u32 cannot overflow u64, and blocks << shift cannot either: it is inside the device.
        let sum: u64 = r.segments.iter().map(|s| u64::from(s.len)).sum();
        let want = if r.op.has_data() { r.blocks << self.limits.block_shift } else { 0 };
        if sum != want || (want == 0 && !r.segments.is_empty()) {
            return Status::Invalid;
        }
        Status::Ok
    }

    /// Zeroes to write, shared by all channels. The first use in the process maps them.
    pub(crate) fn zeroes(&mut self) -> Option<Arc<Region>> {
        if self.zeroes.is_none() {
            self.zeroes = self.open.entry.manager().and_then(|m| m.zeroes().ok());
        }
        self.zeroes.clone()
    }

    #[cold]
    #[allow(clippy::result_large_err)]
    pub(crate) fn refuse(&self, request: IoRequest, status: Status) -> Result<(), Rejected> {
        self.recorder.stats.failure(status);
        Err(Rejected { request, status })
    }

    /// The backend refused slot `slot`: undo, and give the request back as it came.
    #[cold]
    #[allow(clippy::result_large_err)]
    fn take_back(&mut self, slot: u32, mut rejected: Rejected) -> Result<(), Rejected> {
        rejected.request.cookie = self.slots[slot as usize].cookie;
        self.release(slot);
        self.refuse(rejected.request, rejected.status)
    }

    #[inline]
    fn take_slot(&mut self, r: &IoRequest) -> Option<u32> {
        if self.batch_ns == 0 {
            self.batch_ns = now_ns();
        }
        let slot = Slot {
            cookie: r.cookie,
            start_ns: self.batch_ns,
            bytes: r.blocks << self.limits.block_shift,
            generation: self.generation,
            lba: r.lba,
            left: r.blocks,
            piece: r.blocks,
            op: r.op,
            flags: r.flags,
            step: Step::Plain,
            cut: false,
        };
        if let Some(free) = self.free.pop() {
            self.slots[free as usize] = slot;
            return Some(free);
        }
        if self.slots.len() == MAX_SLOTS {
            return None;
        }
        self.slots.push(slot);
        Some(self.slots.len() as u32 - 1)
    }

    pub(crate) fn release(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// A completion of the backend.
    #[inline]
    fn complete(&mut self, completion: Completion, now: u64, done: &mut Completions) {
        let slot = completion.cookie as u32;
        if self.slots[slot as usize].step == Step::Plain {
            return self.finish(slot, completion.status, now, done);
        }
        self.step_done(slot, completion.status);
    }

    /// Ends a request.
    #[inline]
    pub(crate) fn finish(&mut self, slot: u32, status: Status, now: u64, done: &mut Completions) {
        let s = &self.slots[slot as usize];
        self.recorder.record(s.op, s.bytes, now.saturating_sub(s.start_ns), status);
        done.push(Completion { cookie: s.cookie, status });
        let generation = s.generation;
        self.free.push(slot);
        if !self.resets.is_empty() {
            self.count_down(generation);
        }
    }
}

/// Flags that mean nothing to an operation are refused rather than ignored.
#[inline]
fn flags_fit(op: Op, flags: Flags) -> bool {
    let allowed = match op {
        Op::Write => Flags::FUA,
        Op::WriteZeroes => Flags::FUA | Flags::NO_UNMAP | Flags::FAST,
        _ => Flags::NONE,
    };
    flags.0 & !allowed.0 == 0
}
