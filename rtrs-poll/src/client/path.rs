//! What the reactors of one path share: signs of life and counters. They outlive its connections.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Names a path of a [`super::Client`]; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathId(pub(super) u64);

impl PathId {
    /// For tables of the layers above: different for each path that a client ever has.
    pub const fn number(self) -> u64 {
        self.0
    }
}

/// Requests and bytes (user message plus data) of a path, as the kernel's `stats/rdma` and `stats/reconnects` count
/// them. All but `inflight` start at 0 again with [`super::Client::reset_stats`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathStats {
    /// READ requests.
    pub rd_cnt: u64,
    /// Their bytes.
    pub rd_bytes: u64,
    /// WRITE requests.
    pub wr_cnt: u64,
    /// Their bytes.
    pub wr_bytes: u64,
    /// Requests without an answer now.
    pub inflight: u64,
    /// Requests that came here from a lost path; they count as requests, too.
    pub failovers: u64,
    /// Attempts to connect it again that succeeded. The first connection does not count.
    pub reconnects_ok: u64,
    /// Attempts to connect it again that failed.
    pub reconnects_failed: u64,
}

/// Counts of one reactor. One writer, so plain loads and stores; and lines of their own, or reactors would take them from
/// each other with every request (two lines, as processors fetch them in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Counters {
    rd_cnt: AtomicU64,
    rd_bytes: AtomicU64,
    wr_cnt: AtomicU64,
    wr_bytes: AtomicU64,
    inflight: AtomicU64,
    failovers: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl Counters {
    pub fn submitted(&self, read: bool, bytes: u64) {
        let (cnt, sum) = if read { (&self.rd_cnt, &self.rd_bytes) } else { (&self.wr_cnt, &self.wr_bytes) };
        add(cnt, 1);
        add(sum, bytes);
        add(&self.inflight, 1);
    }

    pub fn failed_over(&self) {
        add(&self.failovers, 1);
    }

    pub fn ended(&self, n: u64) {
        add(&self.inflight, n.wrapping_neg());
    }
}

/// A path, for as long as it is known.
#[derive(Debug)]
pub(super) struct Path {
    pub id: PathId,
    /// Set by every message of the server, cleared by the heartbeat.
    traffic: AtomicBool,
    /// It is about to be disconnected: it gets no new requests.
    retiring: AtomicBool,
    latency_ns: AtomicU64,
    /// By index of the reactor among those of the session.
    counters: Box<[Counters]>,
    reconnects_ok: AtomicU64,
    reconnects_failed: AtomicU64,
    /// What [`Path::stats`] starts counting from.
    base: Mutex<PathStats>,
}

impl Path {
    pub fn new(id: PathId, reactors: usize) -> Self {
        Self {
            id,
            traffic: AtomicBool::new(false),
            retiring: AtomicBool::new(false),
            latency_ns: AtomicU64::new(0),
            counters: (0..reactors).map(|_| Counters::default()).collect(),
            reconnects_ok: AtomicU64::new(0),
            reconnects_failed: AtomicU64::new(0),
            base: Mutex::default(),
        }
    }

    /// Counters of the `index`th reactor, which alone writes them.
    pub fn counters(&self, index: usize) -> &Counters {
        &self.counters[index]
    }

    /// The server has been heard of. A load in the usual case.
    pub fn heard(&self) {
        if !self.traffic.load(Ordering::Relaxed) {
            self.traffic.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it has been heard of since the last call.
    pub fn take_traffic(&self) -> bool {
        self.traffic.swap(false, Ordering::Relaxed)
    }

    /// Whether reactors leave it alone from now on. Those that are just choosing may still give it a request.
    pub fn set_retiring(&self, retiring: bool) {
        self.retiring.store(retiring, Ordering::Relaxed);
    }

    /// See [`Path::set_retiring`].
    pub fn is_retiring(&self) -> bool {
        self.retiring.load(Ordering::Relaxed)
    }

    /// Round trip of the last heartbeat, 0 before the first.
    pub fn latency_ns(&self) -> u64 {
        self.latency_ns.load(Ordering::Relaxed)
    }

    pub fn set_latency(&self, ns: u64) {
        self.latency_ns.store(ns, Ordering::Relaxed);
    }

    /// Another connection than the first has come up, or not.
    pub fn reconnected(&self, ok: bool) {
        add(if ok { &self.reconnects_ok } else { &self.reconnects_failed }, 1);
    }

    /// Sums over all reactors since the last reset.
    pub fn stats(&self) -> PathStats {
        let (now, base) = (self.totals(), *self.base.lock().unwrap_or_else(|e| e.into_inner()));
        PathStats {
            rd_cnt: now.rd_cnt - base.rd_cnt,
            rd_bytes: now.rd_bytes - base.rd_bytes,
            wr_cnt: now.wr_cnt - base.wr_cnt,
            wr_bytes: now.wr_bytes - base.wr_bytes,
            inflight: now.inflight,
            failovers: now.failovers - base.failovers,
            reconnects_ok: now.reconnects_ok - base.reconnects_ok,
            reconnects_failed: now.reconnects_failed - base.reconnects_failed,
        }
    }

    /// Requests that were answered, ever, and those that were not yet.
    pub fn answered(&self) -> (u64, u64) {
        let all = self.totals();
        ((all.rd_cnt + all.wr_cnt).wrapping_sub(all.inflight), all.inflight)
    }

    /// Starts counting at 0 again. The counters have one writer each, so their present values become the base instead.
    pub fn reset_stats(&self) {
        *self.base.lock().unwrap_or_else(|e| e.into_inner()) = self.totals();
    }

    fn totals(&self) -> PathStats {
        let load = |a: &AtomicU64| a.load(Ordering::Relaxed);
        let sum = |f: fn(&Counters) -> &AtomicU64| self.counters.iter().map(|c| load(f(c))).sum();
        PathStats {
            rd_cnt: sum(|c| &c.rd_cnt),
            rd_bytes: sum(|c| &c.rd_bytes),
            wr_cnt: sum(|c| &c.wr_cnt),
            wr_bytes: sum(|c| &c.wr_bytes),
            inflight: sum(|c| &c.inflight),
            failovers: sum(|c| &c.failovers),
            reconnects_ok: load(&self.reconnects_ok),
            reconnects_failed: load(&self.reconnects_failed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_forgets_all_but_what_is_in_flight() {
        let p = Path::new(PathId(1), 2);
        p.counters(0).submitted(true, 100);
        p.counters(1).submitted(false, 50);
        p.counters(1).failed_over();
        p.counters(0).ended(1);
        p.reconnected(true);
        p.reconnected(false);
        let all = PathStats {
            rd_cnt: 1,
            rd_bytes: 100,
            wr_cnt: 1,
            wr_bytes: 50,
            inflight: 1,
            failovers: 1,
            reconnects_ok: 1,
            reconnects_failed: 1,
        };
        assert_eq!(p.stats(), all);
        p.reset_stats();
        assert_eq!(p.stats(), PathStats { inflight: 1, ..PathStats::default() });
        p.counters(1).ended(1);
        assert_eq!(p.stats(), PathStats::default());
    }
}
