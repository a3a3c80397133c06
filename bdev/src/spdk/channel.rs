//! One thread's io channel of a bdev of SPDK.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spdk_sys as sys;

use super::disk::Desc;
use super::local::{self, Local};
use super::memory::Bounce;
use super::slot::{self, Slot};
use crate::device::Channel;
use crate::io::{Completion, Completions, Flags, IoRequest, Op, Rejected, Status};

/// More than any stack of bdevs has: a volume on a crypto on a raid on a partition …, with two messages each.
const LAYERS: usize = 32;
/// Requests in flight on one channel; more get [`Status::Busy`].
pub(super) const DEPTH: usize = 1024;
/// Slots are made in pieces of this, so that they stay where they are.
const PIECE: usize = 64;
/// How long a channel that is dropped waits for requests that SPDK does not take back, when the program gives up waiting for
/// them (`give_up_soon`).
const LAST_WAIT: Duration = Duration::from_secs(2);
/// Bytes of bounce buffers that are kept for the next requests: DPDK clears what it gets back.
const KEPT: usize = 16 << 20;

pub(super) struct SpdkChannel {
    inner: Rc<Inner>,
    /// Write-zeroes is the device's own, as far as one can know: `FAST` may be promised.
    fast_zeroes: bool,
    /// Of a descriptor that cannot write, and so may not flush either: what it never wrote is as durable as it can be.
    reader: bool,
}

/// What SPDK's callbacks reach. Cells only: they come while the channel polls.
pub(super) struct Inner {
    // What every request touches comes first.
    channel: *mut sys::spdk_io_channel,
    /// Of `_desc`.
    raw_desc: *mut sys::spdk_bdev_desc,
    block_size: u32,
    inflight: Cell<u32>,
    /// The first free slot of a list, null if there is none.
    free: Cell<*const Slot>,
    done: RefCell<Completions>,
    local: Rc<Local>,
    pieces: RefCell<Vec<Box<[Slot]>>>,
    /// SPDK had no memory for them, nor a queue to wait in.
    refused: RefCell<VecDeque<*const Slot>>,
    bounces: RefCell<Vec<Bounce>>,
    /// Aborts that SPDK has not answered.
    aborts: Cell<u32>,
    /// Open as long as the channel is there.
    _desc: Arc<Desc>,
}

impl SpdkChannel {
    /// # Errors
    /// SPDK's refusal, in words.
    pub(super) fn new(
        desc: Arc<Desc>,
        reader: bool,
        block_size: u32,
        fast_zeroes: bool,
    ) -> Result<Self, String> {
        let local = Local::current()?;
        // SAFETY: the descriptor is open as long as `desc` lives; this thread has an `spdk_thread`.
        let channel = unsafe { sys::spdk_bdev_get_io_channel(desc.as_ptr()) };
        if channel.is_null() {
            return Err(format!("SPDK gives no io channel: {}", super::recent_errors()));
        }
        let inner = Rc::new(Inner {
            channel,
            raw_desc: desc.as_ptr(),
            block_size,
            inflight: Cell::new(0),
            free: Cell::new(std::ptr::null()),
            done: RefCell::new(Vec::with_capacity(64)),
            local,
            pieces: RefCell::default(),
            refused: RefCell::default(),
            bounces: RefCell::default(),
            aborts: Cell::new(0),
            _desc: desc,
        });
        inner.grow();
        Ok(Self { inner, fast_zeroes, reader })
    }

    /// Something that SPDK cannot do as the flags want it.
    fn unsupported(&self, request: &IoRequest) -> bool {
        let flags = request.flags;
        // SPDK does not say whether zeroes keep their space; the `IoChannel` writes them then.
        request.op == Op::WriteZeroes
            && (flags.has(Flags::NO_UNMAP) || (flags.has(Flags::FAST) && !self.fast_zeroes))
    }
}

impl Inner {
    /// Makes more slots; false at the limit.
    #[cold]
    fn grow(&self) -> bool {
        let mut pieces = self.pieces.borrow_mut();
        if pieces.len() * PIECE >= DEPTH {
            return false;
        }
        let piece: Box<[Slot]> = (0..PIECE).map(|_| Slot::new(self)).collect();
        piece.iter().for_each(|slot| self.give_back(slot));
        pieces.push(piece);
        true
    }

    #[inline]
    fn take_slot(&self) -> Option<&Slot> {
        if self.free.get().is_null() && !self.grow() {
            return None;
        }
        // SAFETY: not null; slots are boxed, and live as long as this.
        let slot = unsafe { &*self.free.get() };
        self.free.set(slot.next.get());
        Some(slot)
    }

    #[inline]
    fn give_back(&self, slot: &Slot) {
        slot.next.set(self.free.get());
        self.free.set(slot);
    }

    /// `None`: there is no memory now.
    #[cold]
    fn bounce_for(&self, request: &IoRequest) -> Option<Bounce> {
        let len = request.segments.iter().map(|s| s.len as usize).sum();
        let mut kept = self.bounces.borrow_mut();
        if let Some(i) = kept.iter().position(|b| b.len() >= len) {
            return Some(kept.swap_remove(i));
        }
        Bounce::new(len)
    }

    /// Hands a slot's request to SPDK, now or when it has memory.
    #[inline]
    pub(super) fn send(&self, slot: &Slot) {
        // Before: it may complete before the call returns.
        slot.sent.set(true);
        // SAFETY: descriptor and channel stay until the last request has completed (`drop` waits), on this thread.
        let rc = unsafe { slot.send(self.raw_desc, self.channel) };
        if rc == 0 {
            return;
        }
        slot.sent.set(false);
        match rc {
            // SAFETY: as above.
            -12 if unsafe { slot.wait(self.raw_desc, self.channel) } => {}
            -12 => self.refused.borrow_mut().push_back(slot),
            rc => self.completed(slot, slot::refused(rc)),
        }
    }

    /// A request is over.
    #[inline]
    pub(super) fn completed(&self, slot: &Slot, status: Status) {
        debug_assert!(std::ptr::eq(slot.owner(), self));
        slot.sent.set(false);
        if let Some(bounce) = slot.empty(status) {
            self.keep(bounce);
        }
        self.done.borrow_mut().push(Completion { cookie: slot.cookie.get(), status });
        self.give_back(slot);
        let inflight = self.inflight.get() - 1;
        self.inflight.set(inflight);
        if inflight == 0 {
            self.local.channel_rests();
        }
    }

    #[cold]
    fn keep(&self, bounce: Bounce) {
        let mut kept = self.bounces.borrow_mut();
        if kept.iter().map(Bounce::len).sum::<usize>() + bounce.len() <= KEPT {
            kept.push(bounce);
        }
    }

    /// Waits until nothing is in flight; for a limited time if the program gives up. False: SPDK holds on to something. Users
    /// drop channels with none in flight, except at the end of the program.
    #[cold]
    fn settle(&self) -> bool {
        if self.local.has_given_up() {
            return false;
        }
        self.abort_all();
        let until = Instant::now() + LAST_WAIT;
        while self.inflight.get() > 0 || self.aborts.get() > 0 {
            if local::gives_up() && Instant::now() >= until {
                return false;
            }
            self.poll();
        }
        true
    }

    /// Asks SPDK to take every request back, where the bdev can do that: those that wait for a lost controller end so.
    fn abort_all(&self) {
        // These SPDK does not have.
        for _ in 0..self.refused.borrow().len() {
            let Some(slot) = self.refused.borrow_mut().pop_front() else { break };
            // SAFETY: a slot of this channel, which live as long.
            self.completed(unsafe { &*slot }, Status::Aborted);
        }
        // SAFETY: descriptor and channel stay until the last abort has been answered (`settle`), or for ever.
        let abort = |slot: &Slot| unsafe {
            let slot = std::ptr::from_ref(slot).cast_mut().cast();
            sys::spdk_bdev_abort(
                self.raw_desc,
                self.channel,
                slot,
                Some(aborted),
                std::ptr::from_ref(self).cast_mut().cast(),
            )
        };
        // Slots are not added meanwhile; completions, which come out of some aborts at once, only give them back.
        let pieces = self.pieces.borrow();
        for slot in pieces.iter().flat_map(|piece| piece.iter()).filter(|s| s.sent.get()) {
            // Counted first: the answer may come before the call returns.
            self.aborts.set(self.aborts.get() + 1);
            if abort(slot) != 0 {
                self.aborts.set(self.aborts.get() - 1);
            }
        }
    }

    fn poll(&self) {
        self.local.poll();
        // As many as were there: what is refused again waits for the next turn.
        for _ in 0..self.refused.borrow().len() {
            let Some(slot) = self.refused.borrow_mut().pop_front() else { break };
            // SAFETY: a slot of this channel, which live as long.
            self.send(unsafe { &*slot });
        }
    }
}

impl Channel for SpdkChannel {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        let inner = &*self.inner;
        if self.unsupported(&request) {
            return Err(Rejected { request, status: Status::Unsupported });
        }
        if self.reader && request.op == Op::Flush {
            inner.done.borrow_mut().push(Completion { cookie: request.cookie, status: Status::Ok });
            return Ok(());
        }
        let bounced = request.op.has_data() && !slot::fits(&request.segments, inner.block_size);
        let bounce = if bounced { inner.bounce_for(&request) } else { None };
        if bounced && bounce.is_none() {
            // With nothing in flight waiting helps nobody.
            let status = if inner.inflight.get() == 0 { Status::IoError } else { Status::Busy };
            return Err(Rejected { request, status });
        }
        let Some(slot) = inner.take_slot() else { return Err(Rejected { request, status: Status::Busy }) };
        let inflight = inner.inflight.get();
        inner.inflight.set(inflight + 1);
        if inflight == 0 {
            inner.local.channel_works();
        }
        match bounce {
            None => slot.fill(&request),
            Some(bounce) => slot.fill_bounced(&request, bounce),
        }
        inner.send(slot);
        Ok(())
    }

    /// SPDK's drivers ring their doorbells when they are polled.
    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Completions) -> bool {
        if self.inner.inflight.get() > 0 {
            self.inner.poll();
        }
        let mut ended = self.inner.done.borrow_mut();
        let any = !ended.is_empty();
        if done.is_empty() {
            std::mem::swap(done, &mut ended);
        } else {
            done.append(&mut ended);
        }
        any
    }

    /// SPDK works only while it is polled.
    fn ready(&self) -> bool {
        self.inner.inflight.get() > 0 || !self.inner.done.borrow().is_empty()
    }
}

/// SPDK's `spdk_bdev_io_completion_cb`: an abort is over. Whether it found its request shows by the request.
unsafe extern "C" fn aborted(io: *mut sys::spdk_bdev_io, _: bool, channel: *mut c_void) {
    // SAFETY: the channel that waits for this (`settle`), or lives for ever; the request of SPDK is freed once, here.
    unsafe {
        sys::spdk_bdev_free_io(io);
        let aborts = &(*channel.cast::<Inner>()).aborts;
        aborts.set(aborts.get() - 1);
    }
}

impl Drop for SpdkChannel {
    fn drop(&mut self) {
        if self.inner.inflight.get() > 0 && !self.inner.settle() {
            tracing::error!(
                requests = self.inner.inflight.get(),
                "SPDK neither ends nor gives back requests in flight: they are given up, and SPDK is not used by this thread \
                 any more"
            );
            self.inner.local.give_up();
            // SPDK has the addresses of slots, descriptor and channel.
            std::mem::forget(self.inner.clone());
            return;
        }
        // SAFETY: the channel of this thread, put once; nothing is in flight on it.
        unsafe { sys::spdk_put_io_channel(self.inner.channel) };
        // Letting go takes messages to this thread, one for each layer below, and before they have come nothing below can
        // be removed. A thread that makes no more turns would leave them lying.
        for _ in 0..LAYERS {
            self.inner.local.poll();
        }
    }
}
