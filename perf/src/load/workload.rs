//! Which block next, and what to do with it.

use super::options::Pattern;
use crate::rng::Rng;
use crate::stamp::Ledger;

/// One request to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Next {
    /// Number of the block among those of the whole run.
    pub block: u64,
    /// What to do with it.
    pub action: Action,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read,
    Write,
    /// Write with this generation's stamps.
    Stamp(u32),
    /// Read, and expect this generation's stamps.
    Check(u32),
}

impl Action {
    pub fn is_read(self) -> bool {
        matches!(self, Self::Read | Self::Check(_))
    }
}

/// A worker's share of the blocks, and its place in them.
pub(super) struct Workload {
    pattern: Pattern,
    read_percent: u8,
    first: u64,
    count: u64,
    cursor: u64,
    rng: Rng,
    ledger: Option<Ledger>,
    /// Of the last pass over everything, when verifying.
    last_pass: bool,
}

impl Workload {
    /// The blocks `first..first + count`.
    pub fn new(pattern: Pattern, read_percent: u8, first: u64, count: u64, seed: u64) -> Self {
        let ledger = (pattern == Pattern::Verify).then(|| Ledger::new(count as usize));
        let rng = Rng::new(seed ^ first);
        Self { pattern, read_percent, first, count, cursor: 0, rng, ledger, last_pass: false }
    }

    /// The next request; `None` when there is none any more (of the last pass).
    pub fn next(&mut self) -> Option<Next> {
        let (block, action) = match self.pattern {
            Pattern::Read => (self.step(), Action::Read),
            Pattern::Write => (self.step(), Action::Write),
            Pattern::RandRead => (self.rng.below(self.count), Action::Read),
            Pattern::RandWrite => (self.rng.below(self.count), Action::Write),
            Pattern::RandRw => {
                let action = if self.wants_read() { Action::Read } else { Action::Write };
                (self.rng.below(self.count), action)
            }
            Pattern::Verify => self.next_verified()?,
        };
        Some(Next { block: self.first + block, action })
    }

    fn step(&mut self) -> u64 {
        let block = self.cursor;
        self.cursor = (self.cursor + 1) % self.count;
        block
    }

    fn wants_read(&mut self) -> bool {
        self.rng.below(100) < u64::from(self.read_percent)
    }

    fn next_verified(&mut self) -> Option<(u64, Action)> {
        if self.last_pass {
            return self.next_of_last_pass();
        }
        let read = self.wants_read();
        let at = self.rng.below(self.count);
        let ledger = self.ledger.as_mut()?;
        let block = ledger.claim_from(at)?;
        let generation = ledger.generation(block);
        let action = if read && generation > 0 {
            Action::Check(generation)
        } else {
            Action::Stamp(Ledger::after(generation))
        };
        Some((block, action))
    }

    fn next_of_last_pass(&mut self) -> Option<(u64, Action)> {
        let ledger = self.ledger.as_mut()?;
        while self.cursor < self.count {
            let block = self.cursor;
            self.cursor += 1;
            let generation = ledger.generation(block);
            if generation > 0 && ledger.claim(block) {
                return Some((block, Action::Check(generation)));
            }
        }
        None
    }

    /// A request has ended, with success or not.
    pub fn ended(&mut self, next: Next, ok: bool) {
        let Some(ledger) = &mut self.ledger else { return };
        let block = next.block - self.first;
        ledger.release(block);
        if let Action::Stamp(generation) = next.action {
            // After a failed write nobody knows what is there.
            ledger.set(block, if ok { generation } else { 0 });
        }
    }

    /// Time is up: true if there is a last pass to make, once all requests in flight have ended.
    pub fn begin_last_pass(&mut self) -> bool {
        if self.ledger.is_none() || std::mem::replace(&mut self.last_pass, true) {
            return false;
        }
        self.cursor = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_wrap_within_their_share() {
        let mut w = Workload::new(Pattern::Read, 0, 10, 3, 1);
        let blocks: Vec<u64> = (0..5).map(|_| w.next().unwrap().block).collect();
        assert_eq!(blocks, [10, 11, 12, 10, 11]);
    }

    #[test]
    fn random_blocks_stay_within_their_share_and_mix() {
        let mut w = Workload::new(Pattern::RandRw, 70, 100, 50, 1);
        let all: Vec<Next> = (0..10_000).map(|_| w.next().unwrap()).collect();
        assert!(all.iter().all(|n| (100..150).contains(&n.block)));
        let reads = all.iter().filter(|n| n.action.is_read()).count();
        assert!((6500..7500).contains(&reads), "{reads}");
    }

    #[test]
    fn verified_blocks_are_in_flight_once_and_read_as_written() {
        let mut w = Workload::new(Pattern::Verify, 50, 0, 8, 1);
        let mut written = [0u32; 8];
        for _ in 0..1000 {
            let batch: Vec<Next> = (0..8).map(|_| w.next().expect("one is free")).collect();
            assert_eq!(w.next(), None, "all are in flight");
            for n in batch {
                match n.action {
                    Action::Stamp(g) => written[n.block as usize] = g,
                    Action::Check(g) => assert_eq!(g, written[n.block as usize]),
                    other => panic!("{other:?}"),
                }
                w.ended(n, true);
            }
        }
        assert!(w.begin_last_pass());
        let last: Vec<u64> = std::iter::from_fn(|| w.next()).map(|n| n.block).collect();
        assert_eq!(last, (0..8).collect::<Vec<_>>());
        assert!(!w.begin_last_pass());
    }
}
