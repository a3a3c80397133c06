//! Notices at once that a server does not answer: asks whether it is there, and says so.
//!
//! A server that has acknowledged all requests and then vanishes leaves nothing for the transport to time out on. The next
//! heartbeat would find out, but may be seconds away.

use std::time::{Duration, Instant};

/// How often a path with requests in flight is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Without an answer for so long, it is said.
const SILENT: Duration = Duration::from_secs(2);

/// Watches one connected path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Silence {
    /// Requests that had been answered when that last changed, or when none was in flight.
    answered: u64,
    since: Instant,
    /// It was asked.
    asked: bool,
    told: bool,
    pub look: Instant,
}

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing was answered since the last look: ask.
    Quiet,
    /// Requests wait, the oldest at least so long.
    Silent(Duration),
    /// It answers again, after so long.
    Answers(Duration),
}

impl Silence {
    pub fn new(now: Instant) -> Self {
        Self { answered: 0, since: now, asked: false, told: false, look: now + LOOK }
    }

    /// Since when there has been no answer, once that has been said.
    pub fn since(&self) -> Option<Instant> {
        self.told.then_some(self.since)
    }

    /// `answered` requests in all, `inflight` are not.
    pub fn look(&mut self, now: Instant, answered: u64, inflight: u64) -> Option<Change> {
        self.look = now + LOOK;
        let waited = now.saturating_duration_since(self.since);
        if inflight == 0 || answered != self.answered {
            (self.answered, self.since, self.asked) = (answered, now, false);
            return std::mem::take(&mut self.told).then_some(Change::Answers(waited));
        }
        if !std::mem::replace(&mut self.asked, true) {
            return Some(Change::Quiet);
        }
        if self.told || waited < SILENT {
            return None;
        }
        self.told = true;
        Some(Change::Silent(waited))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_told_once_and_so_is_its_end() {
        let start = Instant::now();
        let at = |sec| start + Duration::from_secs(sec);
        let mut s = Silence::new(start);
        assert_eq!(s.look, start + LOOK);
        // Nothing is in flight.
        assert_eq!(s.look(at(60), 0, 0), None);
        // It answers, slowly.
        assert_eq!([61, 62, 63].map(|t| s.look(at(t), t, 7)), [None; 3]);
        assert_eq!(s.look(at(64), 63, 7), Some(Change::Quiet));
        assert_eq!(
            (s.look(at(65), 63, 8), s.since()),
            (Some(Change::Silent(Duration::from_secs(2))), Some(at(63)))
        );
        assert_eq!(s.look(at(66), 63, 9), None);
        assert_eq!(s.look(at(67), 64, 8), Some(Change::Answers(Duration::from_secs(4))));
        assert_eq!((s.look(at(68), 64, 0), s.since()), (None, None));
    }
}
