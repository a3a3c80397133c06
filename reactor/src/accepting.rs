//! What a listener does when the system has no descriptor or memory for another connection.

use std::time::{Duration, Instant};

/// How long nothing is accepted then.
const PAUSE: Duration = Duration::from_millis(200);
/// How often the log is told.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// A listener's pauses. Its descriptor stays readable while connections wait, so whoever has one takes it out of epoll
/// until [`AcceptPause::until`]; without that, a loop would try again at once and for ever.
#[derive(Debug, Default)]
pub struct AcceptPause {
    until: Option<Instant>,
    tell_from: Option<Instant>,
}

impl AcceptPause {
    /// accept(2) has failed at `now`: a pause begins. True if the log should say so, which is once in a while.
    pub fn failed(&mut self, now: Instant) -> bool {
        self.until = Some(now + PAUSE);
        let tells = self.tell_from.is_none_or(|t| t <= now);
        if tells {
            self.tell_from = Some(now + TELL_EVERY);
        }
        tells
    }

    /// Whether there is a pause at `now`.
    pub fn holds(&mut self, now: Instant) -> bool {
        self.until = self.until.filter(|t| *t > now);
        self.until.is_some()
    }

    /// When to try again, for whoever sleeps.
    pub fn until(&self) -> Option<Instant> {
        self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_by_time_and_tells_once_in_a_while() {
        let (mut pause, start) = (AcceptPause::default(), Instant::now());
        assert!(!pause.holds(start) && pause.until().is_none());
        let mut told = 0;
        let mut now = start;
        // A minute in which nothing goes.
        while now < start + Duration::from_secs(60) {
            told += u32::from(pause.failed(now));
            assert!(pause.holds(now));
            now = pause.until().unwrap();
            assert!(!pause.holds(now) && pause.until().is_none());
        }
        assert_eq!((told, now - start), (6, Duration::from_secs(60)));
    }
}
