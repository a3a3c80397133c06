//! Whether others want the core, too.
//!
//! A thread that spins uses up its share of a core that it does not have for itself. When work comes at last it has to wait
//! until the others have had theirs: milliseconds. One that sleeps is woken, and goes first. So a reactor that finds the core
//! contended sleeps at once when there is nothing to do, and tries spinning again from time to time.

use std::time::{Duration, Instant};

/// A turn without work takes some microseconds. If it took this long, somebody else had the core: less than any time slice,
/// and more than interrupts take.
const STOLEN: Duration = Duration::from_micros(250);
/// How long nobody spins then; twice as long with each further time, up to [`LONGEST`].
const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

/// What a reactor knows of its neighbours on the core.
#[derive(Debug)]
pub(crate) struct Crowd {
    /// No spinning before.
    until: Option<Instant>,
    /// The next time without spinning.
    next: Duration,
    /// Time spun undisturbed since.
    quiet: Duration,
}

impl Default for Crowd {
    fn default() -> Self {
        Self { until: None, next: FIRST, quiet: Duration::ZERO }
    }
}

impl Crowd {
    /// Spinning would harm.
    #[inline]
    pub(crate) fn is_there(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// A turn that neither found work nor slept took from `began` to `now`.
    #[inline]
    pub(crate) fn spun(&mut self, began: Instant, now: Instant) {
        let took = now.duration_since(began);
        if took >= STOLEN {
            return self.found(now);
        }
        if self.next > FIRST {
            self.quiet += took;
            if self.quiet >= FIRST {
                (self.next, self.quiet) = (FIRST, Duration::ZERO);
            }
        }
    }

    #[cold]
    fn found(&mut self, now: Instant) {
        self.until = Some(now + self.next);
        self.next = (self.next * 2).min(LONGEST);
        self.quiet = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stolen_turn_ends_the_spinning_for_longer_each_time() {
        let (mut crowd, start) = (Crowd::default(), Instant::now());
        let us = Duration::from_micros;
        crowd.spun(start, start + us(5));
        assert!(!crowd.is_there(start + us(5)));
        let mut now = start;
        for wait in [FIRST, FIRST * 2, FIRST * 4] {
            crowd.spun(now, now + us(3000));
            now += us(3000);
            assert!(crowd.is_there(now + wait - us(1)));
            now += wait;
            assert!(!crowd.is_there(now));
        }
        for _ in 0..20 {
            crowd.spun(now, now + us(3000));
        }
        assert!(!crowd.is_there(now + us(3000) + LONGEST));
        // Left alone for a while, it begins anew.
        for _ in 0..FIRST.as_micros() / 100 {
            crowd.spun(now, now + us(100));
        }
        crowd.spun(now, now + us(3000));
        assert!(!crowd.is_there(now + us(3000) + FIRST));
    }
}
