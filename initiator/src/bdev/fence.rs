//! What must not be overwritten yet: the ranges of writes that were repeated by another way, while the server may still
//! execute what came by the lost one.
//!
//! That a write is executed twice does no harm, as both executions write the same. It does once something newer is
//! written in between, which the later execution undoes. So only requests that change the same bytes wait, until the
//! lost way is known to be clean, or for so long after the repeated write that the first one must be over. Everything
//! else goes on.
//!
//! How long that is depends on the server's disk alone. Nothing new can arrive by the lost way, since our end of it is
//! gone; what has arrived is with the disk, or before a processor that now serves the other way too. Hence the time
//! begins when the repeated write is answered: a server that stood still meanwhile has not used any of it up.

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
    /// `None`: what was repeated has not been answered.
    until: Option<Instant>,
}

impl Fence {
    /// For requests of which nobody knows by which way they went: their fence ends with its time alone.
    pub(super) const NO_WAY: u64 = u64::MAX;

    fn ranges(&self) -> MutexGuard<'_, Vec<Range>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a write may still be executed after a repetition of it has been; zero: nothing is fenced.
    pub(super) fn set_hold(&self, hold: Duration) {
        self.hold_ns.store(u64::try_from(hold.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Bytes `from..from + len` were on their way by `way`, which is lost, and are about to be written once more.
    pub(super) fn raise(&self, way: u64, from: u64, len: u64) {
        if self.hold().is_zero() {
            return;
        }
        self.ranges().push(Range { from, to: from.saturating_add(len), way, until: None });
        // Whoever writes there next has heard that the repeated write is done, so it sees this.
        self.up.store(true, Ordering::Release);
    }

    fn hold(&self) -> Duration {
        Duration::from_nanos(self.hold_ns.load(Ordering::Relaxed))
    }

    /// A write of bytes `from..from + len` has ended, which may be the repetition of a fenced one.
    pub(super) fn answered(&self, from: u64, len: u64, now: Instant) {
        let until = now + self.hold();
        let overlap = |r: &&mut Range| r.until.is_none() && r.overlaps(from, len);
        self.ranges().iter_mut().filter(overlap).for_each(|r| r.until = Some(until));
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

    /// Until when, at least, bytes `from..from + len` are fenced; `None`: they are not.
    pub(super) fn until(&self, from: u64, len: u64, now: Instant) -> Option<Instant> {
        let mut ranges = self.ranges();
        ranges.retain(|r| r.until.is_none_or(|until| until > now));
        self.up.store(!ranges.is_empty(), Ordering::Release);
        let fenced = ranges.iter().filter(|r| r.overlaps(from, len));
        fenced.map(|r| r.until.unwrap_or(now + self.hold())).max()
    }
}

impl Range {
    fn overlaps(&self, from: u64, len: u64) -> bool {
        self.from < from.saturating_add(len) && from < self.to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_fenced_until_their_way_is_clean_or_their_time_is_over() {
        let (fence, t) = (Fence::default(), Instant::now());
        let sec = Duration::from_secs;
        fence.raise(1, 0, 512);
        assert!(!fence.is_up(), "without a time nothing is fenced");
        fence.set_hold(sec(40));
        fence.raise(1, 4096, 1024);
        fence.raise(2, 5120, 512);
        assert!(fence.is_up());
        // As long as the repetition is under way there is no end.
        assert_eq!(fence.until(4096, 1, t + sec(1000)), Some(t + sec(1040)));
        fence.answered(4096, 1024, t);
        fence.answered(5120, 512, t + sec(1));
        fence.answered(0, 1 << 20, t + sec(9));
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
