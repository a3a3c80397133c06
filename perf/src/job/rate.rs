//! When a request may begin: a bucket of requests that fills with time.

/// Requests per second of one worker.
#[derive(Clone, Debug)]
pub(super) struct Rate {
    /// Nanoseconds between two requests.
    gap: f64,
    /// When the next one may begin, nanoseconds of the run.
    due: f64,
    /// How far `due` may lie in the past: what a device was too slow for is caught up with only so far, or a stall would
    /// be followed by a burst of any length.
    most_behind: f64,
}

/// What can be caught up with.
const CATCH_UP_NS: f64 = 100e6;

impl Rate {
    /// `iops` is above 0. The first request may begin at once.
    pub fn new(iops: f64) -> Self {
        let gap = 1e9 / iops;
        Self { gap, due: 0.0, most_behind: CATCH_UP_NS.max(gap) }
    }

    /// One request may begin now, and it counts.
    #[inline]
    pub fn take(&mut self, now: u64) -> bool {
        let now = now as f64;
        if self.due > now {
            return false;
        }
        self.due = self.due.max(now - self.most_behind) + self.gap;
        true
    }

    /// When the next one may begin.
    pub fn due(&self) -> u64 {
        self.due.ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(rate: &mut Rate, from: u64, to: u64, step: u64) -> u64 {
        let mut n = 0;
        for now in (from..to).step_by(step as usize) {
            while rate.take(now) {
                n += 1;
            }
        }
        n
    }

    #[test]
    fn the_rate_is_kept_over_time() {
        for iops in [100.0, 12_345.0, 3e6] {
            let n = count(&mut Rate::new(iops), 0, 2_000_000_000, 10_000) as f64;
            // What may begin in the last step is not due to be asked for any more.
            assert!((n - 2.0 * iops).abs() <= iops * 1e-5 + 2.0, "{iops}: {n}");
        }
    }

    #[test]
    fn a_stall_is_caught_up_with_only_a_little() {
        let mut rate = Rate::new(1000.0);
        assert_eq!(count(&mut rate, 0, 1_000_000_000, 1_000_000), 1000);
        let n = count(&mut rate, 60_000_000_000, 60_000_000_001, 1);
        assert!((100..=102).contains(&n), "{n}");
        assert!(rate.due() > 60_000_000_000);
    }
}
