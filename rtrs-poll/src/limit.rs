//! Keeps peers from filling the log.

use std::time::{Duration, Instant};

/// Lets the first few messages of each second through.
#[derive(Debug)]
pub struct LogLimit {
    per_second: u32,
    second: Option<Instant>,
    count: u32,
}

impl LogLimit {
    /// At most `per_second` messages.
    pub const fn new(per_second: u32) -> Self {
        Self { per_second, second: None, count: 0 }
    }

    /// Whether a message may be logged at `now`.
    pub fn allows(&mut self, now: Instant) -> bool {
        if self.second.is_none_or(|s| now.saturating_duration_since(s) >= Duration::from_secs(1)) {
            self.second = Some(now);
            self.count = 0;
        }
        self.count += 1;
        self.count <= self.per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_each_second() {
        let (mut l, t) = (LogLimit::new(2), Instant::now());
        assert_eq!([l.allows(t), l.allows(t), l.allows(t)], [true, true, false]);
        assert!(l.allows(t + Duration::from_secs(1)));
    }
}
