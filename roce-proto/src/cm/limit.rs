//! How much strangers may cost: answers to messages that belong to no connection, and connections that are half open.

use std::collections::HashMap;
use std::net::IpAddr;

use quota::Source;

use crate::Nanos;

const SECOND: Nanos = 1_000_000_000;

/// Token bucket: `rate` per second, bursts of a second's worth.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// When the bucket would be full.
    full_at: Nanos,
}

impl Bucket {
    /// Each taking moves the time at which the bucket is full by `1 / rate`; it is empty a second away from that.
    fn has(&self, now: Nanos, rate: u32) -> bool {
        self.full_at.saturating_sub(now) + SECOND / Nanos::from(rate.max(1)) <= SECOND
    }

    fn take(&mut self, now: Nanos, rate: u32) {
        self.full_at = self.full_at.max(now) + SECOND / Nanos::from(rate.max(1));
    }
}

/// Answers to strangers: one budget for all, so that we are no amplifier, and one per group of addresses, so that
/// one stranger does not use up everybody's.
#[derive(Debug)]
pub(super) struct Strangers {
    rate: u32,
    rate_per_source: u32,
    secret: u64,
    all: Bucket,
    by_source: [Bucket; Self::GROUPS],
}

impl Strangers {
    const GROUPS: usize = 256;

    pub fn new(rate: u32, rate_per_source: u32, secret: u64) -> Self {
        let empty = Bucket { full_at: 0 };
        Self { rate, rate_per_source, secret, all: empty, by_source: [empty; Self::GROUPS] }
    }

    /// `src` may be answered now.
    pub fn allow(&mut self, now: Nanos, src: IpAddr) -> bool {
        let group = self.group(src);
        let own = &mut self.by_source[group];
        if !own.has(now, self.rate_per_source) || !self.all.has(now, self.rate) {
            return false;
        }
        own.take(now, self.rate_per_source);
        self.all.take(now, self.rate);
        true
    }

    /// Keyed, so that nobody can choose a victim's group.
    fn group(&self, src: IpAddr) -> usize {
        let bits = Source::of(src).bits();
        let mixed =
            (bits ^ self.secret).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ self.secret.rotate_left(32) | 1);
        (mixed >> 56) as usize
    }
}

/// Incoming connections that are not established yet.
#[derive(Debug, Default)]
pub(super) struct HalfOpen {
    all: u32,
    by_source: HashMap<Source, u32>,
}

impl HalfOpen {
    /// Counts one of `src`, unless it is one too many.
    pub fn enter(&mut self, src: IpAddr, max: u32, max_per_source: u32) -> bool {
        let src = Source::of(src);
        let own = self.by_source.get(&src).copied().unwrap_or(0);
        if self.all >= max || own >= max_per_source {
            return false;
        }
        self.all += 1;
        self.by_source.insert(src, own + 1);
        true
    }

    /// Undoes one [`HalfOpen::enter`].
    pub fn leave(&mut self, src: IpAddr) {
        let src = Source::of(src);
        self.all -= 1;
        if let Some(own) = self.by_source.get_mut(&src) {
            *own -= 1;
            if *own == 0 {
                self.by_source.remove(&src);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn a_flood_gets_a_burst_and_then_the_rate() {
        let mut strangers = Strangers::new(1000, 10, 7);
        let now = 5 * SECOND;
        assert_eq!((0..100).filter(|_| strangers.allow(now, ip(1))).count(), 10);
        assert!(!strangers.allow(now + SECOND / 11, ip(1)));
        assert!(strangers.allow(now + SECOND / 10, ip(1)));
        assert_eq!(
            (0..100).filter(|_| strangers.allow(now + 60 * SECOND, ip(1))).count(),
            10,
            "no saving up"
        );
    }

    #[test]
    fn many_sources_share_one_budget() {
        let mut strangers = Strangers::new(50, 10, 7);
        assert_eq!((0..=255).filter(|i| strangers.allow(SECOND, ip(*i))).count(), 50);
    }

    #[test]
    fn half_open_connections_are_limited_in_all_and_per_source() {
        let mut half = HalfOpen::default();
        assert!(half.enter(ip(1), 3, 2) && half.enter(ip(1), 3, 2));
        assert!(!half.enter(ip(1), 3, 2));
        assert!(half.enter(ip(2), 3, 2));
        assert!(!half.enter(ip(3), 3, 2));
        half.leave(ip(1));
        assert!(half.enter(ip(3), 3, 2));
        assert_eq!(half.by_source.len(), 3);
        half.leave(ip(2));
        assert_eq!(half.by_source.len(), 2);
        half.leave(ip(1));
        half.leave(ip(3));
        let v6 = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        assert!(half.enter(v6(1), 3, 2) && half.enter(v6(2), 3, 2));
        assert!(!half.enter(v6(3), 3, 2), "a host has the whole /64");
    }
}
