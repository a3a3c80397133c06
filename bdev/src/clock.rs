//! Monotonic nanoseconds as a number: cheaper to keep per request than an `Instant`.

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC`, the clock of `Instant` on Linux.
#[inline]
pub(crate) fn now_ns() -> u64 {
    let t = clock_gettime(ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}
