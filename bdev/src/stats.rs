//! Counters of one channel, written by its core alone and read by the control thread at any time.
//!
//! Single writer, so an increment is a plain load and store (`Relaxed`): no locked instruction on the data path. A
//! reader sees each number whole, though not all numbers of one instant. Channels that close hand their counts to
//! the bdev, so nothing is lost.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::histogram::{Buckets, HistogramConfig};
use crate::io::{Op, Status};

/// Counts of one operation. Latencies in nanoseconds, from the start of the submitting batch to the `poll` that
/// reported the completion (one clock reading per batch and per poll).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpStats {
    /// Completed with `Ok`.
    pub ops: u64,
    /// Bytes of these (0 for flush and reset).
    pub bytes: u64,
    /// Sum of latencies.
    pub latency_ns: u64,
    /// Longest; 0 if there was none.
    pub max_latency_ns: u64,
    /// Shortest; `u64::MAX` if there was none.
    pub min_latency_ns: u64,
}

impl Default for OpStats {
    fn default() -> Self {
        Self { ops: 0, bytes: 0, latency_ns: 0, max_latency_ns: 0, min_latency_ns: u64::MAX }
    }
}

/// Counts of one channel or of a whole bdev.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoStats {
    by_op: [OpStats; Op::ALL.len()],
    errors: [u64; Status::ALL.len()],
}

impl IoStats {
    /// Of one operation.
    pub fn op(&self, op: Op) -> &OpStats {
        &self.by_op[op as usize]
    }

    /// How often `status` was the answer: completions that failed, and submits that were refused (`Busy`, a wrong
    /// range). Always 0 for `Ok`.
    pub fn errors(&self, status: Status) -> u64 {
        self.errors[status as usize]
    }

    /// Adds the counts of `other`.
    fn merge(&mut self, other: &Self) {
        for (a, b) in self.by_op.iter_mut().zip(&other.by_op) {
            a.ops += b.ops;
            a.bytes += b.bytes;
            a.latency_ns += b.latency_ns;
            a.max_latency_ns = a.max_latency_ns.max(b.max_latency_ns);
            a.min_latency_ns = a.min_latency_ns.min(b.min_latency_ns);
        }
        for (a, b) in self.errors.iter_mut().zip(&other.errors) {
            *a += b;
        }
    }

    /// Takes the counts (not the extremes) of `base` away.
    fn subtract(&mut self, base: &Self) {
        for (a, b) in self.by_op.iter_mut().zip(&base.by_op) {
            a.ops = a.ops.saturating_sub(b.ops);
            a.bytes = a.bytes.saturating_sub(b.bytes);
            a.latency_ns = a.latency_ns.saturating_sub(b.latency_ns);
        }
        for (a, b) in self.errors.iter_mut().zip(&base.errors) {
            *a = a.saturating_sub(*b);
        }
    }

    fn forget_extremes(&mut self) {
        for op in &mut self.by_op {
            op.max_latency_ns = 0;
            op.min_latency_ns = u64::MAX;
        }
    }
}

/// What `bdev_get_iostat` and `bdev_reset_iostat` reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetMode {
    /// Counts and extremes.
    All,
    /// Longest and shortest latency only.
    MaxMin,
    /// Nothing.
    None,
}

#[derive(Debug)]
struct OpCounters {
    ops: AtomicU64,
    bytes: AtomicU64,
    latency_ns: AtomicU64,
    max_latency_ns: AtomicU64,
    min_latency_ns: AtomicU64,
}

/// The live counters of one channel. Aligned so that two cores never share a cache line (two lines, because the
/// adjacent-line prefetcher of x86 pairs them).
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct ChannelStats {
    by_op: [OpCounters; Op::ALL.len()],
    errors: [AtomicU64; Status::ALL.len()],
    thread: String,
}

/// Single-writer increment.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

impl ChannelStats {
    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            by_op: std::array::from_fn(|_| OpCounters {
                ops: zero(),
                bytes: zero(),
                latency_ns: zero(),
                max_latency_ns: zero(),
                min_latency_ns: AtomicU64::new(u64::MAX),
            }),
            errors: std::array::from_fn(|_| zero()),
            thread: std::thread::current().name().unwrap_or("unnamed").to_owned(),
        }
    }

    /// One success. Owner thread only.
    #[inline]
    pub(crate) fn success(&self, op: Op, bytes: u64, latency_ns: u64) {
        let c = &self.by_op[op as usize];
        add(&c.ops, 1);
        add(&c.bytes, bytes);
        add(&c.latency_ns, latency_ns);
        // The control thread may reset the extremes in between; whatever is stored here is a latency of now.
        if latency_ns > c.max_latency_ns.load(Relaxed) {
            c.max_latency_ns.store(latency_ns, Relaxed);
        }
        if latency_ns < c.min_latency_ns.load(Relaxed) {
            c.min_latency_ns.store(latency_ns, Relaxed);
        }
    }

    /// One failure or refusal. Owner thread only.
    #[cold]
    pub(crate) fn failure(&self, status: Status) {
        add(&self.errors[status as usize], 1);
    }

    fn read(&self) -> IoStats {
        IoStats {
            by_op: std::array::from_fn(|i| {
                let c = &self.by_op[i];
                OpStats {
                    ops: c.ops.load(Relaxed),
                    bytes: c.bytes.load(Relaxed),
                    latency_ns: c.latency_ns.load(Relaxed),
                    max_latency_ns: c.max_latency_ns.load(Relaxed),
                    min_latency_ns: c.min_latency_ns.load(Relaxed),
                }
            }),
            errors: std::array::from_fn(|i| self.errors[i].load(Relaxed)),
        }
    }

    fn forget_extremes(&self) {
        for c in &self.by_op {
            c.max_latency_ns.store(0, Relaxed);
            c.min_latency_ns.store(u64::MAX, Relaxed);
        }
    }
}

/// Statistics of one bdev: its live channels and the sum of the closed ones.
#[derive(Debug, Default)]
pub(crate) struct BdevStats {
    inner: Mutex<Inner>,
    /// Moves when the histogram is switched, so that channels look only then.
    histogram_epoch: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    live: Vec<Live>,
    closed: IoStats,
    /// Counts at the last reset. Only the control thread subtracts, so the data path never sees a reset.
    base: IoStats,
    histogram: Option<Histogram>,
    next_id: u64,
}

#[derive(Debug)]
struct Live {
    id: u64,
    stats: Arc<ChannelStats>,
    buckets: Option<Arc<Buckets>>,
}

#[derive(Debug)]
struct Histogram {
    config: HistogramConfig,
    closed: Vec<u64>,
}

impl BdevStats {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Counters for a new channel of the calling thread.
    pub(crate) fn join(self: &Arc<Self>) -> ChannelRecorder {
        let mut inner = self.lock();
        let stats = Arc::new(ChannelStats::new());
        let id = inner.next_id;
        inner.next_id += 1;
        inner.live.push(Live { id, stats: stats.clone(), buckets: None });
        // One less than the present epoch, so that the first poll picks up a histogram that is already on.
        let seen = self.histogram_epoch.load(Relaxed).wrapping_sub(1);
        ChannelRecorder { id, stats, buckets: None, filter: None, seen, bdev: self.clone() }
    }

    pub(crate) fn total(&self) -> IoStats {
        let inner = self.lock();
        let mut sum = inner.raw_total();
        sum.subtract(&inner.base);
        sum
    }

    /// Per live channel, with the name of its thread.
    pub(crate) fn per_channel(&self) -> Vec<(String, IoStats)> {
        self.lock().live.iter().map(|l| (l.stats.thread.clone(), l.stats.read())).collect()
    }

    pub(crate) fn reset(&self, mode: ResetMode) {
        let mut inner = self.lock();
        if mode == ResetMode::None {
            return;
        }
        if mode == ResetMode::All {
            inner.base = inner.raw_total();
        }
        inner.closed.forget_extremes();
        inner.live.iter().for_each(|l| l.stats.forget_extremes());
    }

    /// Switches the histogram on (empty) or off.
    pub(crate) fn set_histogram(&self, config: Option<HistogramConfig>) {
        let mut inner = self.lock();
        inner.histogram = config.map(|config| Histogram { closed: vec![0; config.bucket_count()], config });
        inner.live.iter_mut().for_each(|l| l.buckets = None);
        self.histogram_epoch.fetch_add(1, Relaxed);
    }

    pub(crate) fn histogram(&self) -> Option<(HistogramConfig, Vec<u64>)> {
        let inner = self.lock();
        let histogram = inner.histogram.as_ref()?;
        let mut sum = histogram.closed.clone();
        inner.live.iter().filter_map(|l| l.buckets.as_ref()).for_each(|b| b.add_to(&mut sum));
        Some((histogram.config, sum))
    }
}

impl Inner {
    fn raw_total(&self) -> IoStats {
        let mut sum = self.closed.clone();
        self.live.iter().for_each(|l| sum.merge(&l.stats.read()));
        sum
    }
}

/// The writing side: belongs to one channel and leaves its counts to the bdev on drop.
#[derive(Debug)]
pub(crate) struct ChannelRecorder {
    id: u64,
    pub(crate) stats: Arc<ChannelStats>,
    buckets: Option<Arc<Buckets>>,
    filter: Option<Op>,
    seen: u64,
    bdev: Arc<BdevStats>,
}

impl ChannelRecorder {
    /// Once per poll: one relaxed load unless the histogram was switched since.
    #[inline]
    pub(crate) fn sync(&mut self) {
        let epoch = self.bdev.histogram_epoch.load(Relaxed);
        if epoch != self.seen {
            self.resync(epoch);
        }
    }

    #[cold]
    fn resync(&mut self, epoch: u64) {
        let mut inner = self.bdev.inner.lock().unwrap_or_else(|e| e.into_inner());
        let config = inner.histogram.as_ref().map(|h| h.config);
        self.buckets = config.map(|c| Arc::new(Buckets::new(c)));
        self.filter = config.and_then(|c| c.op);
        if let Some(live) = inner.live.iter_mut().find(|l| l.id == self.id) {
            live.buckets = self.buckets.clone();
        }
        self.seen = epoch;
    }

    /// Counts one completed request.
    #[inline]
    pub(crate) fn record(&self, op: Op, bytes: u64, latency_ns: u64, status: Status) {
        if status != Status::Ok {
            return self.stats.failure(status);
        }
        self.stats.success(op, bytes, latency_ns);
        if let Some(buckets) = &self.buckets
            && self.filter.is_none_or(|f| f == op)
        {
            buckets.record(latency_ns);
        }
    }
}

impl Drop for ChannelRecorder {
    fn drop(&mut self) {
        let mut inner = self.bdev.lock();
        let Some(at) = inner.live.iter().position(|l| l.id == self.id) else { return };
        let live = inner.live.swap_remove(at);
        let counts = live.stats.read();
        inner.closed.merge(&counts);
        if let (Some(buckets), Some(histogram)) = (live.buckets, inner.histogram.as_mut()) {
            buckets.add_to(&mut histogram.closed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_survive_their_channel_and_resets_are_seen_once() {
        let bdev = Arc::new(BdevStats::default());
        let a = bdev.join();
        a.record(Op::Read, 4096, 50, Status::Ok);
        a.record(Op::Read, 4096, 70, Status::Ok);
        a.record(Op::Write, 512, 9, Status::IoError);
        drop(a);
        let total = bdev.total();
        let read = *total.op(Op::Read);
        assert_eq!(
            read,
            OpStats { ops: 2, bytes: 8192, latency_ns: 120, max_latency_ns: 70, min_latency_ns: 50 }
        );
        assert_eq!((total.errors(Status::IoError), total.op(Op::Write).ops), (1, 0));
        bdev.reset(ResetMode::MaxMin);
        assert_eq!(
            (bdev.total().op(Op::Read).ops, bdev.total().op(Op::Read).max_latency_ns),
            (2, 0),
            "counts stay"
        );
        bdev.reset(ResetMode::All);
        assert_eq!(bdev.total(), IoStats::default());
        let b = bdev.join();
        b.record(Op::Discard, 512, 5, Status::Ok);
        assert_eq!(bdev.total().op(Op::Discard).bytes, 512);
    }

    #[test]
    fn histogram_is_picked_up_at_the_next_sync_and_filtered() {
        let bdev = Arc::new(BdevStats::default());
        let mut a = bdev.join();
        a.sync();
        a.record(Op::Read, 512, 100, Status::Ok);
        bdev.set_histogram(Some(HistogramConfig { op: Some(Op::Read), ..Default::default() }));
        a.sync();
        a.record(Op::Read, 512, 100, Status::Ok);
        a.record(Op::Write, 512, 100, Status::Ok);
        let (_, counts) = bdev.histogram().unwrap();
        assert_eq!(counts.iter().sum::<u64>(), 1);
        drop(a);
        assert_eq!(bdev.histogram().unwrap().1.iter().sum::<u64>(), 1);
        bdev.set_histogram(None);
        assert!(bdev.histogram().is_none());
    }
}
