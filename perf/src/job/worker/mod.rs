//! One job on one reactor: slots that are submitted anew as they complete, until the time is over. `runner.rs` makes a
//! poller of it.

mod runner;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bdev::{Completions, Op, Status};
use reactor::{Handle, Turn};
use rustix::time::{ClockId, clock_gettime};

use super::pattern::{Action, Next, Pattern};
use super::queue::{Queue, Request};
use super::rate::Rate;
use super::record::{Recorder, Sample};
use crate::stamp::{SPOILT, check, stamp};

pub(super) use runner::{Runner, Spares};

/// What all workers of a run look at.
pub(super) struct Shared {
    /// Times are nanoseconds since then.
    pub base: Instant,
    /// When the warm-up begins; 0: not yet.
    pub go: AtomicU64,
    /// End soon, and skip the last pass of a verifying run.
    pub stop: AtomicBool,
    pub warm_up: u64,
    pub time: u64,
    pub interval: u64,
    pub keep_going: bool,
}

impl Shared {
    fn ns(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.base).as_nanos() as u64
    }
}

/// What a worker has to say, on the control thread.
pub(super) enum Said {
    /// Every block of the worker has been written, and it waits for the beginning.
    Filled,
    Sample(Box<Sample>),
    Done(Box<Outcome>),
}

/// Sends to the control thread.
pub(super) type Say = Box<dyn Fn(Said)>;

/// What a worker has counted besides its samples.
#[derive(Default)]
pub(super) struct Outcome {
    pub worker: usize,
    pub errors: u64,
    pub first_error: Option<String>,
    pub busy: u64,
    pub checked: u64,
    pub checked_at_end: u64,
    pub mismatch: Option<String>,
    /// Beginning and end of the measurement; none if it never began.
    pub marks: Option<(Mark, Mark)>,
}

/// Clocks at one moment.
#[derive(Clone, Copy)]
pub(super) struct Mark {
    pub at: u64,
    pub thread_cpu: f64,
    pub process_cpu: f64,
    pub busy_ns: u64,
    pub idle_ns: u64,
}

impl Mark {
    fn now(at: u64, reactor: &Handle) -> Self {
        let seconds = |id| {
            let t = clock_gettime(id);
            t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
        };
        let stats = reactor.stats();
        Self {
            at,
            thread_cpu: seconds(ClockId::ThreadCPUTime),
            process_cpu: seconds(ClockId::ProcessCPUTime),
            busy_ns: stats.busy_ns,
            idle_ns: stats.idle_ns,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Every block is written once.
    Filling,
    /// Until all workers are there.
    Waiting,
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
    since: u64,
}

/// What a worker is to do.
pub(super) struct Plan {
    pub worker: usize,
    pub pattern: Pattern,
    /// Of requests that are no reads.
    pub change: Op,
    pub slots: u32,
    pub block_size: u32,
    /// Byte of the device where block 0 is.
    pub offset: u64,
    pub rate: Option<Rate>,
    /// Blocks that are written before the run: first and end.
    pub fill: (u64, u64),
    /// Tells this run's stamps from those of others.
    pub run: u32,
}

pub(super) struct Worker<Q> {
    queue: Q,
    shared: Arc<Shared>,
    plan: Plan,
    phase: Phase,
    /// Of the last turn.
    now: u64,
    /// Beginning of the measurement, and of the warm-up until then; end of the present interval.
    from: u64,
    interval_end: u64,
    slots: Vec<Slot>,
    /// Free slots.
    idle: Vec<u32>,
    /// Slots whose request met a full device.
    waiting: Vec<u32>,
    inflight: usize,
    done: Completions,
    recorder: Recorder,
    scratch: Vec<u8>,
    begun: Option<Mark>,
    outcome: Outcome,
}

impl<Q: Queue> Worker<Q> {
    pub fn new(queue: Q, shared: Arc<Shared>, plan: Plan) -> Self {
        let n = plan.slots as usize;
        let nothing = Slot { next: Next { block: 0, action: Action::Read }, since: 0 };
        Self {
            queue,
            shared,
            phase: if plan.fill.0 < plan.fill.1 { Phase::Filling } else { Phase::Waiting },
            now: 0,
            from: 0,
            interval_end: 0,
            slots: vec![nothing; n],
            idle: (0..plan.slots).rev().collect(),
            waiting: Vec::with_capacity(n),
            inflight: 0,
            done: Completions::with_capacity(n.max(64)),
            recorder: Recorder::new(plan.worker),
            scratch: vec![0; plan.block_size as usize],
            begun: None,
            outcome: Outcome { worker: plan.worker, ..Outcome::default() },
            plan,
        }
    }

    /// One turn; true if there was work. `say` gets full samples.
    fn turn(&mut self, cx: &Turn<'_>, say: &Say) -> bool {
        self.done.clear();
        self.queue.poll(&mut self.done);
        let any = !self.done.is_empty();
        // One time stamp for all that is found now and all that begins now. The reactor's own is older than the one of the
        // round before, if there was one in this turn.
        let now = self.shared.ns(if any { Instant::now() } else { cx.now }).max(self.now);
        self.now = now;
        self.clock(now, cx, say);
        let mut done = std::mem::take(&mut self.done);
        self.inflight -= done.len();
        for completion in &done {
            self.completed(completion.cookie as u32, completion.status, now);
        }
        done.clear();
        self.done = done;
        self.fill(now, any) || any
    }

    /// Moves from phase to phase and from interval to interval as time passes.
    #[inline]
    fn clock(&mut self, now: u64, cx: &Turn<'_>, say: &Say) {
        match self.phase {
            Phase::Waiting => {
                let go = self.shared.go.load(Ordering::Relaxed);
                if go > 0 && now >= go {
                    self.from = go + self.shared.warm_up;
                    self.phase = Phase::WarmUp;
                }
            }
            Phase::WarmUp if now >= self.from => {
                // From now on, not from when it should have been: on a machine with other work that may be long ago.
                self.phase = Phase::Measured;
                self.from = now;
                self.interval_end = now + self.shared.interval.min(self.shared.time);
                self.recorder.begin(0);
                self.begun = Some(Mark::now(now, cx.handle()));
            }
            Phase::Filling if self.inflight == 0 && self.plan.fill.0 == self.plan.fill.1 => {
                self.phase = Phase::Waiting;
                say(Said::Filled);
            }
            Phase::Measured if now >= self.interval_end => self.interval(now, cx, say),
            _ => {}
        }
        if self.shared.stop.load(Ordering::Relaxed) && self.phase != Phase::Ending {
            self.end(now, cx, say);
        }
    }

    #[cold]
    fn interval(&mut self, now: u64, cx: &Turn<'_>, say: &Say) {
        if now >= self.from + self.shared.time {
            return self.end(now, cx, say);
        }
        if let Some(spare) = Spares::take(cx, self.plan.worker) {
            self.recorder.give_back(spare);
        }
        say(Said::Sample(self.recorder.rotate(now - self.from)));
        while self.interval_end <= now {
            self.interval_end += self.shared.interval;
        }
        // The last interval ends with the measurement.
        self.interval_end = self.interval_end.min(self.from + self.shared.time);
    }

    /// Time is up, or something went wrong.
    #[cold]
    fn end(&mut self, now: u64, cx: &Turn<'_>, say: &Say) {
        if self.phase == Phase::Measured {
            self.stop_measuring(now, cx, say);
        }
        self.phase = Phase::Ending;
        // They have not been sent, and need not be.
        for slot in std::mem::take(&mut self.waiting) {
            // A stamp that was not written leaves the block as it was, but nobody will ask.
            let next = self.slots[slot as usize].next;
            if next.action != Action::Fill {
                self.plan.pattern.ended(next, false);
            }
            self.idle.push(slot);
        }
    }

    fn stop_measuring(&mut self, now: u64, cx: &Turn<'_>, say: &Say) {
        say(Said::Sample(self.recorder.rotate(now - self.from)));
        self.outcome.marks = self.begun.map(|begun| (begun, Mark::now(now, cx.handle())));
    }

    #[inline]
    fn completed(&mut self, slot: u32, status: Status, now: u64) {
        let Slot { next, since } = self.slots[slot as usize];
        self.idle.push(slot);
        if status != Status::Ok {
            return self.failed(next, status);
        }
        if self.phase == Phase::Measured {
            self.recorder.record(next.action.is_read(), now - since);
        }
        if let Action::Check(generation) = next.action {
            self.compare(slot, next, generation);
        }
        if next.action != Action::Fill {
            self.plan.pattern.ended(next, true);
        }
    }

    /// A request that did not succeed.
    #[cold]
    fn failed(&mut self, next: Next, status: Status) {
        if next.action != Action::Fill {
            self.plan.pattern.ended(next, false);
        }
        self.outcome.errors += 1;
        let kind = self.op(next.action);
        let offset = self.offset_of(next);
        self.outcome
            .first_error
            .get_or_insert_with(|| format!("{kind:?} at byte {offset}: {}", status.name()));
        if !self.shared.keep_going {
            self.shared.stop.store(true, Ordering::Relaxed);
        }
    }

    #[inline]
    fn op(&self, action: Action) -> Op {
        match action {
            Action::Read | Action::Check(_) => Op::Read,
            Action::Change => self.plan.change,
            Action::Stamp(_) | Action::Fill => Op::Write,
        }
    }

    fn offset_of(&self, next: Next) -> u64 {
        self.plan.offset + next.block * u64::from(self.plan.block_size)
    }

    fn compare(&mut self, slot: u32, next: Next, generation: u32) {
        self.queue.get(slot, &mut self.scratch);
        self.outcome.checked += 1;
        self.outcome.checked_at_end += u64::from(self.phase == Phase::LastPass);
        if let Err(mismatch) = check(&self.scratch, self.offset_of(next), generation, self.plan.run) {
            self.outcome.mismatch.get_or_insert(mismatch.to_string());
            self.shared.stop.store(true, Ordering::Relaxed);
        }
    }

    /// Gives free slots their next requests. True if any was submitted.
    #[inline]
    fn fill(&mut self, now: u64, completed: bool) -> bool {
        let over = self.shared.stop.load(Ordering::Relaxed);
        if over || matches!(self.phase, Phase::Waiting | Phase::Ending) {
            return false;
        }
        // A device that was full is asked again after a completion, or if it holds nothing of ours.
        if !self.waiting.is_empty() && (!(completed || self.inflight == 0) || !self.retry()) {
            return false;
        }
        let before = self.inflight;
        while let Some(&slot) = self.idle.last() {
            let limited = self.phase != Phase::Filling;
            if limited && self.plan.rate.as_mut().is_some_and(|rate| !rate.take(now)) {
                break;
            }
            let Some(next) = self.next() else { break };
            self.idle.pop();
            self.slots[slot as usize] = Slot { next, since: now };
            if matches!(next.action, Action::Stamp(_) | Action::Check(_)) {
                self.prepare(slot, next);
            }
            if !self.submit(slot) {
                break;
            }
        }
        if self.inflight == before {
            return false;
        }
        self.queue.kick();
        true
    }

    #[inline]
    fn next(&mut self) -> Option<Next> {
        if self.phase == Phase::Filling {
            let (block, end) = self.plan.fill;
            self.plan.fill.0 = (block + 1).min(end);
            return (block < end).then_some(Next { block, action: Action::Fill });
        }
        self.plan.pattern.next()
    }

    /// Submits what met a full device, the oldest first; false if it still is full.
    #[cold]
    fn retry(&mut self) -> bool {
        let again = std::mem::take(&mut self.waiting);
        let mut left = again.iter();
        let all = left.by_ref().all(|slot| self.submit(*slot));
        // The one that failed has queued itself.
        self.waiting.extend(left);
        self.queue.kick();
        all
    }

    /// False: the device is full, or the request was refused.
    #[inline]
    fn submit(&mut self, slot: u32) -> bool {
        let next = self.slots[slot as usize].next;
        let op = self.op(next.action);
        match self.queue.submit(Request { slot, op, block: next.block }) {
            Ok(()) => {
                self.inflight += 1;
                true
            }
            Err(Status::Busy) => {
                self.outcome.busy += 1;
                self.waiting.push(slot);
                false
            }
            Err(status) => {
                self.idle.push(slot);
                self.failed(next, status);
                // One in each turn, so that a device which is gone does not keep the reactor for itself.
                false
            }
        }
    }

    /// Writes stamps, or spoils what a read must bring anew.
    fn prepare(&mut self, slot: u32, next: Next) {
        match next.action {
            Action::Stamp(generation) => {
                let offset = self.offset_of(next);
                stamp(&mut self.scratch, offset, generation, self.plan.run);
                self.queue.put(slot, 0, &self.scratch);
            }
            _ => (0..self.plan.block_size as usize)
                .step_by(512)
                .for_each(|at| self.queue.put(slot, at, &SPOILT)),
        }
    }

    /// Nothing is in flight and nothing is left to do.
    fn is_over(&mut self) -> bool {
        let stopped = self.shared.stop.load(Ordering::Relaxed);
        match self.phase {
            Phase::Ending if self.inflight == 0 => {
                let look_again = !stopped && self.outcome.errors == 0 && self.plan.pattern.begin_last_pass();
                if look_again {
                    self.plan.rate = None;
                    self.phase = Phase::LastPass;
                }
                !look_again
            }
            // `fill` came before this, so there is nothing more to check.
            Phase::LastPass => self.inflight == 0 && self.waiting.is_empty(),
            _ => false,
        }
    }

    /// When `turn` must run though nothing completes.
    fn deadline(&self) -> Option<Instant> {
        let of_run = match self.phase {
            Phase::Waiting => match self.shared.go.load(Ordering::Relaxed) {
                0 => None,
                go => Some(go),
            },
            Phase::Filling => None,
            Phase::WarmUp => Some(self.from),
            Phase::Measured => Some(self.interval_end),
            Phase::Ending | Phase::LastPass => None,
        };
        let active = matches!(self.phase, Phase::WarmUp | Phase::Measured);
        let rate = self.plan.rate.as_ref().filter(|_| active && !self.idle.is_empty()).map(Rate::due);
        let retry = (!self.waiting.is_empty()).then(|| Instant::now() + Duration::from_millis(1));
        let times = of_run.into_iter().chain(rate).map(|ns| self.shared.base + Duration::from_nanos(ns));
        times.chain(self.queue.deadline()).chain(retry).min()
    }
}
