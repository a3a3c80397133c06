//! One thread's io channel of a bdev of SPDK.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use spdk_sys as sys;

use super::disk::Desc;
use super::local::Local;
use super::memory::Bounce;
use super::slot::{self, Slot};
use crate::device::Channel;
use crate::io::{Completion, Completions, Flags, IoRequest, Op, Rejected, Status};

/// More than any stack of bdevs has: a volume on a crypto on a raid on a partition …, with two messages each.
const LAYERS: usize = 32;
/// Requests in flight on one channel; more get [`Status::Busy`].
pub(super) const DEPTH: u32 = 1024;
/// Slots are made in pieces of this, so that they stay where they are.
const PIECE: u32 = 64;
/// Bounce buffers that are kept for the next, and the largest that is.
const KEPT: usize = 16;
const KEPT_LEN: usize = 1 << 20;

pub(super) struct SpdkChannel {
    inner: Rc<Inner>,
    /// Write-zeroes is the device's own, as far as one can know: `FAST` may be promised.
    fast_zeroes: bool,
    /// Of a descriptor that cannot write, and so may not flush either: what it never wrote is as durable as it can be.
    reader: bool,
}

/// What SPDK's callbacks reach. Cells only: they come while the channel polls.
pub(super) struct Inner {
    local: Rc<Local>,
    channel: *mut sys::spdk_io_channel,
    block_size: u32,
    pieces: RefCell<Vec<Box<[Slot]>>>,
    free: RefCell<Vec<u32>>,
    done: RefCell<Completions>,
    /// SPDK had no memory for them, nor a queue to wait in.
    refused: RefCell<VecDeque<u32>>,
    inflight: Cell<u32>,
    bounces: RefCell<Vec<Bounce>>,
    desc: Arc<Desc>,
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
            local,
            channel,
            block_size,
            pieces: RefCell::default(),
            free: RefCell::default(),
            done: RefCell::new(Vec::with_capacity(64)),
            refused: RefCell::default(),
            inflight: Cell::new(0),
            bounces: RefCell::default(),
            desc,
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
    fn grow(&self) -> bool {
        let mut pieces = self.pieces.borrow_mut();
        let first = pieces.len() as u32 * PIECE;
        if first >= DEPTH {
            return false;
        }
        pieces.push((first..first + PIECE).map(|i| Slot::new(self, i)).collect());
        self.free.borrow_mut().extend((first..first + PIECE).rev());
        true
    }

    fn take_slot(&self) -> Option<u32> {
        let free = self.free.borrow_mut().pop();
        free.or_else(|| self.grow().then(|| self.free.borrow_mut().pop())?)
    }

    /// Runs `f` on slot `index`.
    fn with<R>(&self, index: u32, f: impl FnOnce(&Slot) -> R) -> R {
        let slot: *const Slot = &self.pieces.borrow()[(index / PIECE) as usize][(index % PIECE) as usize];
        // SAFETY: slots are boxed and live as long as the channel; `f` may call back into here, so the list of boxes must
        // not be borrowed meanwhile.
        f(unsafe { &*slot })
    }

    /// `Ok(None)`: none is needed.
    fn bounce_for(&self, request: &IoRequest) -> Result<Option<Bounce>, Status> {
        if !request.op.has_data() || slot::fits(&request.segments, self.block_size) {
            return Ok(None);
        }
        let len = request.segments.iter().map(|s| s.len as usize).sum();
        let mut kept = self.bounces.borrow_mut();
        if let Some(i) = kept.iter().position(|b| b.len() >= len) {
            return Ok(Some(kept.swap_remove(i)));
        }
        Bounce::new(len).map(Some).ok_or(Status::Busy)
    }

    /// Hands a slot's request to SPDK, now or when it has memory.
    pub(super) fn send(&self, slot: &Slot) {
        // SAFETY: descriptor and channel stay until the last request has completed (`drop` waits), on this thread.
        let rc = unsafe { slot.send(self.desc.as_ptr(), self.channel) };
        match rc {
            0 => {}
            // SAFETY: as above.
            -12 if unsafe { slot.wait(self.desc.as_ptr(), self.channel) } => {}
            -12 => self.refused.borrow_mut().push_back(slot.index()),
            rc => self.completed(slot, slot::refused(rc)),
        }
    }

    /// A request is over.
    pub(super) fn completed(&self, slot: &Slot, status: Status) {
        debug_assert!(std::ptr::eq(slot.owner(), self));
        if let Some(bounce) = slot.empty(status) {
            let mut kept = self.bounces.borrow_mut();
            if kept.len() < KEPT && bounce.len() <= KEPT_LEN {
                kept.push(bounce);
            }
        }
        self.done.borrow_mut().push(Completion { cookie: slot.cookie.get(), status });
        self.free.borrow_mut().push(slot.index());
        self.inflight.set(self.inflight.get() - 1);
        self.local.request_ends();
    }

    fn poll(&self) {
        self.local.poll();
        // As many as were there: what is refused again waits for the next turn.
        for _ in 0..self.refused.borrow().len() {
            let Some(index) = self.refused.borrow_mut().pop_front() else { break };
            self.with(index, |slot| self.send(slot));
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
        let bounce = match inner.bounce_for(&request) {
            Ok(bounce) => bounce,
            // Nothing that would come back is in flight: waiting helps nobody.
            Err(_) if inner.inflight.get() == 0 => return Err(Rejected { request, status: Status::IoError }),
            Err(status) => return Err(Rejected { request, status }),
        };
        let Some(index) = inner.take_slot() else { return Err(Rejected { request, status: Status::Busy }) };
        inner.inflight.set(inner.inflight.get() + 1);
        inner.local.request_begins();
        inner.with(index, |slot| {
            slot.fill(request, bounce);
            inner.send(slot);
        });
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
        done.append(&mut ended);
        any
    }

    /// SPDK works only while it is polled.
    fn ready(&self) -> bool {
        self.inner.inflight.get() > 0 || !self.inner.done.borrow().is_empty()
    }
}

impl Drop for SpdkChannel {
    fn drop(&mut self) {
        while self.inner.inflight.get() > 0 {
            self.inner.poll();
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
