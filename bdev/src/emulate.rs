//! What `IoChannel` adds to a backend: requests of several steps.
//!
//! | request | steps |
//! |---|---|
//! | flush without a write cache | none: done at the next poll |
//! | FUA write, backend without FUA but with a write cache | write, flush |
//! | discard, write-zeroes longer than `max_unmap_blocks` | pieces, one after the other |
//! | write-zeroes that the backend lacks, or finds out to lack | writes of shared zeroes, 1 MiB at most, one after the other |
//! | the same with FAST | none: unsupported |
//! | write-zeroes with FUA | as above, then flush |
//! | reset | the backend's abort where it has one; done when all earlier requests are |
//!
//! One step of a request is in flight at a time, so the memory is bounded by the slot itself. A reset cuts the
//! earlier multi-step requests short, [`IoChannel::cut_short`] those that it is told: they end `Aborted` after their present
//! step. So does the removal of the bdev, with `Gone`.

use crate::io::{Completions, Flags, IoRequest, Op, Rejected, Segments, Status};
use crate::iochannel::{IoChannel, PendingReset};
use crate::manager::Manager;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// One trip to the backend is all.
    Plain,
    /// A write is in flight, a flush follows.
    WriteThenFlush,
    /// Pieces of a native discard, secure erase or write-zeroes.
    Pieces,
    /// Pieces of zeroes, written.
    Zeroing,
    /// The last step of any.
    Flush,
    /// Waits for others.
    Reset,
}

impl IoChannel {
    /// Whether the backend can do the whole request in one go. Takes an idle FUA flag off.
    #[inline]
    pub(crate) fn is_plain(&self, request: &mut IoRequest) -> bool {
        let limits = &self.limits;
        match request.op {
            Op::Read => true,
            Op::Write => {
                if request.flags == Flags::NONE || limits.native_fua {
                    return true;
                }
                // Without a write cache every write is durable when it completes.
                request.flags = Flags::NONE;
                !limits.write_cache
            }
            Op::Flush => limits.write_cache,
            Op::Discard | Op::SecureErase => request.blocks <= limits.max_unmap_blocks,
            // Stays a stepped request even if the backend has it: it may turn out not to (files).
            Op::WriteZeroes | Op::Reset => false,
        }
    }

    /// Starts a request that is not plain.
    #[allow(clippy::result_large_err)]
    #[cold]
    pub(crate) fn submit_steps(&mut self, slot: u32, mut request: IoRequest) -> Result<(), Rejected> {
        let op = request.op;
        self.slots[slot as usize].step = match op {
            Op::Flush => {
                self.ended.push((slot, Status::Ok));
                return Ok(());
            }
            Op::Reset => {
                self.submit_reset(slot);
                return Ok(());
            }
            Op::Write => Step::WriteThenFlush,
            Op::WriteZeroes if request.flags.has(Flags::FAST) && !self.limits.native.has(op) => {
                self.release(slot);
                return self.refuse(request, Status::Unsupported);
            }
            _ if self.limits.native.has(op) => Step::Pieces,
            _ => Step::Zeroing,
        };
        if op == Op::Write {
            let cookie = std::mem::replace(&mut request.cookie, u64::from(slot));
            return match self.backend.submit(request) {
                Ok(()) => {
                    self.at_backend += 1;
                    Ok(())
                }
                Err(mut rejected) => {
                    rejected.request.cookie = cookie;
                    // As the submitter gave it.
                    rejected.request.flags = Flags::FUA;
                    self.release(slot);
                    self.refuse(rejected.request, rejected.status)
                }
            };
        }
        self.advance(slot);
        Ok(())
    }

    /// Sends the next step of `slot` to the backend.
    fn advance(&mut self, slot: u32) {
        let zeroes = if self.slots[slot as usize].step == Step::Zeroing { self.zeroes() } else { None };
        let s = &mut self.slots[slot as usize];
        let (op, flags, segments) = match s.step {
            Step::Flush => (Op::Flush, Flags::NONE, Segments::new()),
            Step::Pieces => {
                s.piece = s.left.min(self.limits.max_unmap_blocks);
                (s.op, Flags(s.flags.0 & !Flags::FUA.0), Segments::new())
            }
            Step::Zeroing => {
                s.piece = s.left.min((Manager::ZEROES_LEN >> self.limits.block_shift) as u64);
                let len = (s.piece as usize) << self.limits.block_shift;
                // SAFETY: the channel keeps the region until it is dropped, after its backend; writes only read it.
                let zeroes = zeroes.as_ref().and_then(|z| unsafe { z.segment(0, len) });
                let Some(zeroes) = zeroes else { return self.ended.push((slot, Status::Busy)) };
                (Op::Write, Flags::NONE, Segments::from_slice(&[zeroes]))
            }
            Step::Plain | Step::WriteThenFlush | Step::Reset => unreachable!("steps without a successor"),
        };
        let (lba, blocks) = if op == Op::Flush { (0, 0) } else { (s.lba, s.piece) };
        match self.backend.submit(IoRequest { op, flags, lba, blocks, segments, cookie: u64::from(slot) }) {
            Ok(()) => {
                self.at_backend += 1;
                self.stepped = true;
            }
            Err(Rejected { status: Status::Busy, .. }) => self.retry.push_back(slot),
            Err(Rejected { status, .. }) => self.step_done(slot, status),
        }
    }

    /// The backend has finished the present step of `slot`.
    #[cold]
    pub(crate) fn step_done(&mut self, slot: u32, status: Status) {
        let s = &mut self.slots[slot as usize];
        let aborted = s.cut || s.generation != self.generation;
        match s.step {
            Step::Reset => return self.backend_reset_done(slot),
            // Found out at run time, e.g. by a file system: write the zeroes instead.
            Step::Pieces
                if status == Status::Unsupported && s.op == Op::WriteZeroes && !s.flags.has(Flags::FAST) =>
            {
                s.step = Step::Zeroing;
            }
            _ if status != Status::Ok => return self.ended.push((slot, status)),
            Step::Flush | Step::Plain => return self.ended.push((slot, status)),
            Step::WriteThenFlush => s.step = Step::Flush,
            Step::Pieces | Step::Zeroing => {
                s.lba += s.piece;
                s.left -= s.piece;
                if s.left == 0 {
                    if !(s.flags.has(Flags::FUA) && self.limits.write_cache) {
                        return self.ended.push((slot, Status::Ok));
                    }
                    s.step = Step::Flush;
                }
            }
        }
        if aborted {
            return self.ended.push((slot, Status::Aborted));
        }
        // Not from here: `advance` may come back with a refusal, and the two must not recurse.
        self.retry.push_back(slot);
        self.untried = true;
    }

    /// The part of `poll` for requests of several steps.
    #[cold]
    pub(crate) fn turn_steps(&mut self, now: u64, done: &mut Completions) {
        self.untried = false;
        // One round: what meets a full backend again waits for the next poll.
        for _ in 0..self.retry.len() {
            let Some(slot) = self.retry.pop_front() else { break };
            let s = &self.slots[slot as usize];
            if s.cut || s.generation != self.generation {
                self.ended.push((slot, Status::Aborted));
            } else if self.is_removed() {
                self.ended.push((slot, Status::Gone));
            } else {
                self.advance(slot);
            }
        }
        // `finish` may end a reset, which lands in `ended` again: hence no iterator.
        while let Some((slot, status)) = self.ended.pop() {
            self.finish(slot, status, now, done);
        }
        if std::mem::take(&mut self.stepped) {
            self.backend.kick();
        }
    }

    fn submit_reset(&mut self, slot: u32) {
        // All in flight but the reset itself.
        let mut waiting_for = self.inflight() - 1;
        self.slots[slot as usize].step = Step::Reset;
        if self.limits.native.has(Op::Reset) {
            let request = IoRequest::reset(u64::from(slot));
            // A backend too full to take it cannot abort; its requests end by themselves and the reset with them.
            if self.backend.submit(request).is_ok() {
                self.at_backend += 1;
                waiting_for += 1;
            }
        }
        self.slots[slot as usize].generation = self.generation;
        self.generation += 1;
        if waiting_for == 0 {
            return self.ended.push((slot, Status::Ok));
        }
        self.resets.push(PendingReset { slot, generation: self.generation, waiting_for });
    }

    /// A request of `generation` ended: resets that came after it have one less to wait for.
    #[cold]
    pub(crate) fn count_down(&mut self, generation: u64) {
        for reset in &mut self.resets {
            if generation < reset.generation {
                reset.waiting_for -= 1;
            }
        }
        self.end_resets();
    }

    /// The backend's part of reset `slot` is over.
    fn backend_reset_done(&mut self, slot: u32) {
        if let Some(reset) = self.resets.iter_mut().find(|r| r.slot == slot) {
            reset.waiting_for -= 1;
        }
        self.end_resets();
    }

    fn end_resets(&mut self) {
        let ended = &mut self.ended;
        self.resets.retain(|r| {
            if r.waiting_for == 0 {
                ended.push((r.slot, Status::Ok));
            }
            r.waiting_for > 0
        });
    }
}
