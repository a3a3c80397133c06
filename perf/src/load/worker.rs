//! One reactor's share of a run: a number of slots, each with a buffer and at most one request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use iobuf::{Region, Segment};
use reactor::Turn;
use rnbd_initiator::client::{self, Device, IoRequest, Op};
use rtrs_poll::client::{Io, Refused, Session, SessionId, SessionKey, Upper};
use rtrs_proto::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::workload::{Action, Next, Workload};
use crate::rng::Rng;
use crate::stamp::{SPOILT, check, stamp};

/// What a worker needs to begin.
pub(super) struct Start {
    pub session: SessionId,
    pub device: Device,
    /// `slots` times `block_size` registered bytes.
    pub memory: Arc<Region>,
    pub slots: u32,
    pub block_size: u32,
    pub workload: Workload,
    pub warm_up: Duration,
    pub time: Duration,
    pub seed: u64,
    /// Tells this run's stamps from those of others.
    pub run: u32,
    pub done: Done,
}

type Done = Box<dyn FnOnce(WorkerResult) + Send>;

/// What a worker has counted.
pub(super) struct WorkerResult {
    /// Nanoseconds, of requests that completed in the measured time.
    pub latencies: Histogram<u64>,
    pub reads: u64,
    pub errors: u64,
    pub first_error: Option<String>,
    pub busy: u64,
    pub checked: u64,
    pub checked_at_end: u64,
    pub mismatch: Option<String>,
    pub seconds: f64,
    pub thread_cpu: f64,
    pub process_cpu: f64,
}

/// Clocks at one moment.
#[derive(Clone, Copy)]
struct Mark {
    at: Instant,
    thread_cpu: f64,
    process_cpu: f64,
}

impl Mark {
    fn now(at: Instant) -> Self {
        let seconds = |id| {
            let t = clock_gettime(id);
            t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
        };
        Self {
            at,
            thread_cpu: seconds(ClockId::ThreadCPUTime),
            process_cpu: seconds(ClockId::ProcessCPUTime),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    WarmUp,
    Measured,
    /// Time is up, or something went wrong: what is in flight ends.
    Ending,
    /// Everything written is read once more.
    LastPass,
}

#[derive(Clone, Copy)]
struct Slot {
    next: Next,
    since: Instant,
}

struct Run {
    key: SessionKey,
    device: Device,
    memory: Arc<Region>,
    block_size: u32,
    workload: Workload,
    run: u32,
    phase: Phase,
    measure_from: Instant,
    time: Duration,
    slots: Vec<Option<Slot>>,
    /// Slots whose request found all buffers of the session in use.
    waiting: Vec<u32>,
    inflight: usize,
    interrupted: bool,
    from: Option<Mark>,
    until: Option<Mark>,
    /// For comparing.
    scratch: Vec<u8>,
    counts: WorkerResult,
    done: Done,
}

/// The consumer of a reactor's RNBD lane.
#[derive(Default)]
pub(super) struct Worker {
    sessions: Vec<(SessionId, SessionKey)>,
    run: Option<Run>,
}

impl Worker {
    /// Begins; `done` gets the result when everything has ended.
    pub fn start(&mut self, io: &mut Io, start: Start) {
        let Some((_, key)) = self.sessions.iter().find(|(s, _)| *s == start.session) else {
            // The session went down in between, which the control thread hears, too.
            return (start.done)(WorkerResult::lost());
        };
        let mut run = Run::new(*key, start);
        run.launch_all(io);
        self.run = Some(run);
        self.settle(io);
    }

    /// Ends the run as soon as what is in flight has ended.
    pub fn interrupt(&mut self, io: &mut Io) {
        if let Some(run) = &mut self.run {
            run.interrupted = true;
            run.end(Instant::now());
            self.settle(io);
        }
    }

    /// Ends the run if nothing is left to do.
    fn settle(&mut self, io: &mut Io) {
        let Some(run) = &mut self.run else { return };
        if run.inflight > 0 || !run.waiting.is_empty() {
            return;
        }
        if run.may_look_again() {
            run.phase = Phase::LastPass;
            run.launch_all(io);
            if run.inflight > 0 || !run.waiting.is_empty() {
                return;
            }
        }
        if let Some(run) = self.run.take() {
            run.finish();
        }
    }
}

impl WorkerResult {
    fn new() -> Self {
        let latencies =
            Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds and digits are valid constants");
        Self {
            latencies,
            reads: 0,
            errors: 0,
            first_error: None,
            busy: 0,
            checked: 0,
            checked_at_end: 0,
            mismatch: None,
            seconds: 0.0,
            thread_cpu: 0.0,
            process_cpu: 0.0,
        }
    }

    fn lost() -> Self {
        Self {
            errors: 1,
            first_error: Some("the session went down before the run began".into()),
            ..Self::new()
        }
    }
}

impl Run {
    fn new(key: SessionKey, s: Start) -> Self {
        fill(&s.memory, s.seed);
        Self {
            key,
            device: s.device,
            memory: s.memory,
            block_size: s.block_size,
            workload: s.workload,
            run: s.run,
            phase: Phase::WarmUp,
            measure_from: Instant::now() + s.warm_up,
            time: s.time,
            slots: vec![None; s.slots as usize],
            waiting: Vec::with_capacity(s.slots as usize),
            inflight: 0,
            interrupted: false,
            from: None,
            until: None,
            scratch: vec![0; s.block_size as usize],
            counts: WorkerResult::new(),
            done: s.done,
        }
    }

    fn launch_all(&mut self, io: &mut Io) {
        for slot in 0..self.slots.len() as u32 {
            self.launch(io, slot, Instant::now());
        }
    }

    /// Gives a free slot its next request, if there is one.
    fn launch(&mut self, io: &mut Io, slot: u32, now: Instant) {
        if self.phase == Phase::Ending {
            return;
        }
        let Some(next) = self.workload.next() else { return };
        self.prepare(slot, next);
        self.slots[slot as usize] = Some(Slot { next, since: now });
        self.submit(io, slot);
    }

    fn buffer_at(&self, slot: u32) -> usize {
        slot as usize * self.block_size as usize
    }

    fn segment(&self, slot: u32) -> Option<Segment> {
        // SAFETY: each slot has its own part of the region and at most one request; the region is kept by this run,
        // which ends only when none is in flight.
        unsafe { self.memory.segment(self.buffer_at(slot), self.block_size as usize) }
    }

    fn offset_of(&self, next: Next) -> u64 {
        next.block * u64::from(self.block_size)
    }

    /// Writes stamps, or spoils what a read must bring anew.
    fn prepare(&mut self, slot: u32, next: Next) {
        let (at, offset) = (self.buffer_at(slot), self.offset_of(next));
        match next.action {
            Action::Read | Action::Write => {}
            Action::Stamp(generation) => {
                stamp(&mut self.scratch, offset, generation, self.run);
                let inside = self.memory.copy_in(at, &self.scratch);
                debug_assert!(inside, "each slot has its buffer");
            }
            Action::Check(_) => {
                for sector in (0..self.block_size as usize).step_by(512) {
                    let inside = self.memory.copy_in(at + sector, &SPOILT);
                    debug_assert!(inside, "each slot has its buffer");
                }
            }
        }
    }

    fn submit(&mut self, io: &mut Io, slot: u32) {
        let Some(Slot { next, .. }) = self.slots[slot as usize] else { return };
        let Some(segment) = self.segment(slot) else { return };
        let from = [segment];
        let op =
            if next.action.is_read() { Op::Read(segment) } else { Op::Write { from: &from, fua: false } };
        let request = IoRequest { op, sector: self.offset_of(next) / 512, cookie: slot.into() };
        match client::submit(io, self.key, self.device.id, &request) {
            Ok(()) => self.inflight += 1,
            Err(Refused::Busy) => {
                self.counts.busy += 1;
                self.waiting.push(slot);
            }
            Err(e) => self.failed(slot, &e.to_string()),
        }
    }

    fn retry(&mut self, io: &mut Io) -> bool {
        let had = self.waiting.len();
        for _ in 0..had {
            let slot = self.waiting.swap_remove(0);
            self.submit(io, slot);
            if self.waiting.len() == had {
                return false;
            }
        }
        had > 0
    }

    /// A request that will not complete with success: the run ends with what is in flight.
    fn failed(&mut self, slot: u32, why: &str) {
        let Some(Slot { next, .. }) = self.slots[slot as usize].take() else { return };
        self.workload.ended(next, false);
        self.counts.errors += 1;
        let offset = self.offset_of(next);
        self.counts.first_error.get_or_insert_with(|| format!("{:?} at byte {offset}: {why}", next.action));
        self.end(Instant::now());
    }

    fn end(&mut self, now: Instant) {
        if self.phase == Phase::Measured {
            self.until = Some(Mark::now(now));
        }
        self.phase = Phase::Ending;
        // They have not been sent, and need not be.
        for slot in std::mem::take(&mut self.waiting) {
            if let Some(Slot { next, .. }) = self.slots[slot as usize].take() {
                // A stamp that was not written leaves the block as it was, but nobody will ask.
                self.workload.ended(next, false);
            }
        }
    }

    fn completed(&mut self, io: &mut Io, slot: u32, result: Result<(), Errno>) {
        self.inflight -= 1;
        let now = Instant::now();
        if let Err(errno) = result {
            return self.failed(slot, &errno.to_string());
        }
        let Some(Slot { next, since }) = self.slots.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        self.clock(now);
        if self.phase == Phase::Measured {
            self.counts.latencies.saturating_record(now.duration_since(since).as_nanos() as u64);
            self.counts.reads += u64::from(next.action.is_read());
        }
        if let Action::Check(generation) = next.action {
            self.compare(slot, next, generation);
        }
        self.workload.ended(next, true);
        self.launch(io, slot, now);
    }

    /// Moves from phase to phase as time passes.
    fn clock(&mut self, now: Instant) {
        if self.phase == Phase::WarmUp && now >= self.measure_from {
            self.phase = Phase::Measured;
            self.from = Some(Mark::now(now));
        } else if self.phase == Phase::Measured && self.from.is_some_and(|f| now >= f.at + self.time) {
            self.end(now);
        }
    }

    fn compare(&mut self, slot: u32, next: Next, generation: u32) {
        let inside = self.memory.copy_out(self.buffer_at(slot), &mut self.scratch);
        debug_assert!(inside, "each slot has its buffer");
        self.counts.checked += 1;
        self.counts.checked_at_end += u64::from(self.phase == Phase::LastPass);
        if let Err(mismatch) = check(&self.scratch, self.offset_of(next), generation, self.run) {
            self.counts.mismatch.get_or_insert(mismatch.to_string());
            self.end(Instant::now());
        }
    }

    fn may_look_again(&mut self) -> bool {
        let good = self.counts.errors == 0 && self.counts.mismatch.is_none() && !self.interrupted;
        good && self.phase == Phase::Ending && self.workload.begin_last_pass()
    }

    fn finish(mut self) {
        if let (Some(from), Some(until)) = (self.from, self.until) {
            self.counts.seconds = until.at.duration_since(from.at).as_secs_f64();
            self.counts.thread_cpu = until.thread_cpu - from.thread_cpu;
            self.counts.process_cpu = until.process_cpu - from.process_cpu;
        }
        (self.done)(self.counts);
    }
}

/// Noise, so that no layer can take a shortcut for zeroes.
fn fill(memory: &Region, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut page = [0; 4096];
    for at in (0..memory.len()).step_by(page.len()) {
        page.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&rng.next().to_le_bytes()));
        let inside = memory.copy_in(at, &page);
        debug_assert!(inside, "regions are whole pages");
    }
}

impl Upper for Worker {
    fn session_up(&mut self, _: &mut Turn<'_>, _: &mut Io, key: SessionKey, session: &Arc<Session>) {
        self.sessions.push((session.id, key));
    }

    fn completed(
        &mut self,
        _: &mut Turn<'_>,
        io: &mut Io,
        key: SessionKey,
        cookie: u64,
        result: Result<(), Errno>,
    ) {
        if let Some(run) = self.run.as_mut().filter(|r| r.key == key) {
            run.completed(io, cookie as u32, result);
            self.settle(io);
        }
    }

    fn session_down(&mut self, _: &mut Turn<'_>, io: &mut Io, key: SessionKey) {
        self.sessions.retain(|(_, k)| *k != key);
        if let Some(run) = self.run.as_mut().filter(|r| r.key == key) {
            run.counts.errors += 1;
            run.counts.first_error.get_or_insert_with(|| "the session went down".into());
            run.end(Instant::now());
            self.settle(io);
        }
    }

    fn poll(&mut self, _: &mut Turn<'_>, io: &mut Io) -> bool {
        let Some(run) = &mut self.run else { return false };
        if run.waiting.is_empty() {
            return false;
        }
        let busy = run.retry(io);
        self.settle(io);
        busy
    }
}
