//! Busy and idle accounting: written by the reactor, read by anybody.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

/// Times of a reactor since its start, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReactorStats {
    /// In turns that found work.
    pub busy_ns: u64,
    /// In turns that found none, asleep included.
    pub idle_ns: u64,
    /// Turns so far.
    pub turns: u64,
    /// Times it went to sleep.
    pub sleeps: u64,
    /// Asleep at this moment.
    pub asleep: bool,
    /// Thread id in the kernel.
    pub tid: i32,
}

/// One writer, many readers: plain loads and stores suffice, no read-modify-write on the data path.
#[derive(Debug, Default)]
pub(crate) struct TimeStats {
    busy_ns: AtomicU64,
    idle_ns: AtomicU64,
    turns: AtomicU64,
    sleeps: AtomicU64,
    asleep: AtomicBool,
    tid: AtomicI32,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl TimeStats {
    pub(crate) fn belongs_to_this_thread(&self) {
        self.tid.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
    }

    pub(crate) fn turn(&self, busy: bool, ns: u64) {
        add(if busy { &self.busy_ns } else { &self.idle_ns }, ns);
        add(&self.turns, 1);
    }

    pub(crate) fn sleeping(&self, asleep: bool) {
        self.asleep.store(asleep, Ordering::Relaxed);
        if asleep {
            add(&self.sleeps, 1);
        }
    }

    pub(crate) fn read(&self) -> ReactorStats {
        ReactorStats {
            busy_ns: self.busy_ns.load(Ordering::Relaxed),
            idle_ns: self.idle_ns.load(Ordering::Relaxed),
            turns: self.turns.load(Ordering::Relaxed),
            sleeps: self.sleeps.load(Ordering::Relaxed),
            asleep: self.asleep.load(Ordering::Relaxed),
            tid: self.tid.load(Ordering::Relaxed),
        }
    }
}

/// One poller's counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PollerStats {
    /// As given at registration.
    pub name: String,
    /// Unique on its reactor.
    pub id: u64,
    /// Calls.
    pub run_count: u64,
    /// Calls that found work.
    pub busy_count: u64,
    /// Interval of a timed poller, ns.
    pub period_ns: Option<u64>,
}
