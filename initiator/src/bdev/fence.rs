//! What must not be overwritten yet: the ranges of writes that were repeated by another way, while the server may still
//! execute what came by the lost one.
//!
//! That a write is executed twice does no harm, as both executions write the same. It does once something newer is
//! written in between, which the later execution undoes. So only requests that change the same bytes wait, until the
//! lost way is known to be clean, or for as long as a server may take to notice the loss. Everything else goes on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The fence of one device, for all reactors: a newer write may come on another one than the older.
#[derive(Debug, Default)]
pub struct Fence {
    /// There are ranges. In ordinary times the data path looks at this alone, and nobody writes it.
    up: AtomicBool,
    /// How long a range is fenced at most, nanoseconds; 0: none ever is.
    hold_ns: AtomicU64,
    /// No more for each way than it had requests in flight when it was lost, since it is lowered before it is used again.
    ranges: Mutex<Vec<Range>>,
}

#[derive(Debug)]
struct Range {
    from: u64,
    to: u64,
    way: u64,
    until: Instant,
}

impl Fence {
    fn ranges(&self) -> MutexGuard<'_, Vec<Range>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a server may go on with what came by a lost way; zero: nothing is fenced.
    pub(super) fn set_hold(&self, hold: Duration) {
        self.hold_ns.store(u64::try_from(hold.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Bytes `from..from + len` were on their way by `way`, which is lost, and are about to be written once more.
    pub(super) fn raise(&self, way: u64, from: u64, len: u64, now: Instant) {
        let hold = Duration::from_nanos(self.hold_ns.load(Ordering::Relaxed));
        let Some(until) = now.checked_add(hold).filter(|until| *until > now) else { return };
        self.ranges().push(Range { from, to: from.saturating_add(len), way, until });
        // Whoever writes there next has heard that the repeated write is done, so it sees this.
        self.up.store(true, Ordering::Release);
    }

    /// The server has finished with everything that came by `way`.
    pub(super) fn lower(&self, way: u64) {
        let mut ranges = self.ranges();
        ranges.retain(|r| r.way != way);
        self.up.store(!ranges.is_empty(), Ordering::Release);
    }

    /// Whether [`Fence::until`] needs to be asked.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Until when bytes `from..from + len` are fenced; `None`: they are not.
    pub(super) fn until(&self, from: u64, len: u64, now: Instant) -> Option<Instant> {
        let mut ranges = self.ranges();
        ranges.retain(|r| r.until > now);
        self.up.store(!ranges.is_empty(), Ordering::Release);
        let overlap = |r: &&Range| r.from < from.saturating_add(len) && from < r.to;
        ranges.iter().filter(overlap).map(|r| r.until).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_fenced_until_their_way_is_clean_or_their_time_is_over() {
        let (fence, t) = (Fence::default(), Instant::now());
        let sec = Duration::from_secs;
        fence.raise(1, 0, 512, t);
        assert!(!fence.is_up(), "without a time nothing is fenced");
        fence.set_hold(sec(40));
        fence.raise(1, 4096, 1024, t);
        fence.raise(2, 5120, 512, t + sec(1));
        assert!(fence.is_up());
        for (from, len, until) in [
            (4096, 1, Some(40)),
            (0, 4096, None),
            (0, 4097, Some(40)),
            (5119, 2, Some(41)),
            (5632, 512, None),
            (0, u64::MAX, Some(41)),
        ] {
            assert_eq!(fence.until(from, len, t), until.map(|s| t + sec(s)), "{from}+{len}");
        }
        fence.lower(1);
        assert_eq!((fence.until(4096, 1024, t), fence.is_up()), (None, true));
        assert_eq!(fence.until(5120, 512, t + sec(41)), None);
        assert!(!fence.is_up(), "the last one is over");
    }
}
