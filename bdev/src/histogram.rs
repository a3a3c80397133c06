//! Latency histograms in SPDK's log-linear layout, from which an [`hdrhistogram::Histogram`] is built on request.
//!
//! Why not an `hdrhistogram` on the data path: it has one owner, so reading it from the control thread needs a lock
//! or a handshake. Fixed buckets of single-writer atomics need neither, and they are what `bdev_get_histogram`
//! returns anyway (SPDK include/spdk/histogram_data.h): `2^granularity` linear buckets in each power of two.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::io::Op;

/// Shape of a histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistogramConfig {
    /// `2^granularity` buckets per power of two, 1..=10. SPDK's default is 7 (error below 1 %).
    pub granularity: u8,
    /// Shortest latency told apart, nanoseconds. Shorter ones count in the first bucket.
    pub min_nsec: u64,
    /// Longest latency told apart, nanoseconds. Longer ones count in the last bucket.
    pub max_nsec: u64,
    /// Only this operation; `None`: all.
    pub op: Option<Op>,
}

impl Default for HistogramConfig {
    fn default() -> Self {
        Self { granularity: 7, min_nsec: 0, max_nsec: u64::MAX, op: None }
    }
}

impl HistogramConfig {
    /// First range (`min_range` of `bdev_get_histogram`): 0 for values under `2^granularity`, then one per power of two.
    pub fn min_range(&self) -> u32 {
        self.range_of(self.min_nsec)
    }

    /// Last range (`max_range` of `bdev_get_histogram`).
    pub fn max_range(&self) -> u32 {
        self.range_of(self.max_nsec).max(self.min_range())
    }

    /// Number of buckets.
    pub fn bucket_count(&self) -> usize {
        ((self.max_range() - self.min_range() + 1) as usize) << self.granularity
    }

    fn range_of(&self, ns: u64) -> u32 {
        // Bits beyond the lowest `granularity` ones.
        (64 - ns.leading_zeros()).saturating_sub(u32::from(self.granularity))
    }

    #[inline]
    fn bucket_of(&self, min_range: u32, max_range: u32, ns: u64) -> usize {
        let per_range = 1usize << self.granularity;
        let range = self.range_of(ns);
        if range < min_range {
            return 0;
        }
        if range > max_range {
            return ((max_range - min_range + 1) as usize) * per_range - 1;
        }
        let shift = range.saturating_sub(1);
        let index = (ns >> shift) as usize & (per_range - 1);
        (range - min_range) as usize * per_range + index
    }

    /// Smallest value of bucket `bucket`, nanoseconds.
    fn lowest_of(&self, bucket: usize) -> u64 {
        let per_range = 1u64 << self.granularity;
        let range = (bucket as u64 / per_range) as u32 + self.min_range();
        let index = bucket as u64 % per_range;
        match range {
            0 => index,
            // The leading bit is implied: `index` lacks it in the layout's mask.
            r => (per_range | index) << (r - 1),
        }
    }
}

/// The live buckets of one channel.
#[derive(Debug)]
pub(crate) struct Buckets {
    config: HistogramConfig,
    ranges: (u32, u32),
    counts: Box<[AtomicU64]>,
}

impl Buckets {
    pub(crate) fn new(config: HistogramConfig) -> Self {
        let counts = (0..config.bucket_count()).map(|_| AtomicU64::new(0)).collect();
        Self { config, ranges: (config.min_range(), config.max_range()), counts }
    }

    /// Counts one latency. Owner thread only.
    #[inline]
    pub(crate) fn record(&self, ns: u64) {
        let bucket = &self.counts[self.config.bucket_of(self.ranges.0, self.ranges.1, ns)];
        bucket.store(bucket.load(Relaxed) + 1, Relaxed);
    }

    pub(crate) fn add_to(&self, sum: &mut [u64]) {
        for (s, c) in sum.iter_mut().zip(&self.counts) {
            *s += c.load(Relaxed);
        }
    }
}

/// Latencies of a bdev, read at one moment.
#[derive(Clone, Debug)]
pub struct LatencyHistogram {
    /// Its shape.
    pub config: HistogramConfig,
    /// Counts by bucket, as `bdev_get_histogram` returns them.
    pub counts: Vec<u64>,
}

impl LatencyHistogram {
    /// The same data as an HDR histogram in nanoseconds, for percentiles. Each value stands for its bucket's start.
    pub fn to_hdr(&self) -> hdrhistogram::Histogram<u64> {
        let mut hdr = hdrhistogram::Histogram::new(3).expect("3 significant digits are legal");
        hdr.auto(true);
        for (bucket, &count) in self.counts.iter().enumerate().filter(|(_, c)| **c > 0) {
            let value = self.config.lowest_of(bucket).min(1 << 60);
            hdr.record_n(value, count).expect("the histogram grows by itself");
        }
        hdr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `__spdk_histogram_data_get_bucket_range/_index` written out for granularity 7.
    #[test]
    fn layout_is_spdks() {
        let c = HistogramConfig::default();
        assert_eq!((c.min_range(), c.max_range(), c.bucket_count()), (0, 57, 58 * 128));
        let bucket = |ns| c.bucket_of(0, 57, ns);
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(127), 127);
        assert_eq!(bucket(128), 128);
        assert_eq!(bucket(255), 255);
        assert_eq!(bucket(256), 256);
        assert_eq!(bucket(258), 257);
        assert_eq!(bucket(u64::MAX), 58 * 128 - 1);
    }

    #[test]
    fn a_bucket_starts_at_its_lowest_value() {
        let c = HistogramConfig::default();
        for ns in (0..64).flat_map(|s| [1u64 << s, (1u64 << s) + (1 << s) / 3, (1u64 << s) - 1]) {
            let b = c.bucket_of(0, 57, ns);
            let low = c.lowest_of(b);
            assert!(low <= ns && ns - low <= ns / 128, "{ns} in {b} from {low}");
            assert_eq!(c.bucket_of(0, 57, low), b);
        }
    }

    #[test]
    fn values_outside_the_range_count_at_its_ends() {
        let c = HistogramConfig { granularity: 4, min_nsec: 1000, max_nsec: 1_000_000, op: None };
        let b = Buckets::new(c);
        b.record(1);
        b.record(u64::MAX);
        let mut sum = vec![0; c.bucket_count()];
        b.add_to(&mut sum);
        assert_eq!((sum[0], sum[sum.len() - 1]), (1, 1));
    }

    #[test]
    fn percentiles() {
        let b = Buckets::new(HistogramConfig::default());
        (1..=100u64).for_each(|ms| b.record(ms * 1_000_000));
        let mut counts = vec![0; b.config.bucket_count()];
        b.add_to(&mut counts);
        let hdr = LatencyHistogram { config: b.config, counts }.to_hdr();
        let p99 = hdr.value_at_quantile(0.99) as f64;
        assert!((p99 / 99e6 - 1.0).abs() < 0.02, "{p99}");
    }
}
