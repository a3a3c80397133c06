//! Which block next, and what to do with it.

use crate::rng::{Rng, mix};
use crate::stamp::Ledger;

use super::options::Workload;

/// One request to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Next {
    /// Number of the block among those of the job.
    pub block: u64,
    /// What to do with it.
    pub action: Action,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read,
    /// What the workload does besides reading.
    Change,
    /// Write what the buffer holds, before the run.
    Fill,
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
pub(super) struct Pattern {
    workload: Workload,
    read_percent: u8,
    first: u64,
    count: u64,
    cursor: u64,
    rng: Rng,
    ledger: Option<Ledger>,
    /// Of the last pass over everything, when verifying.
    last_pass: bool,
}

impl Pattern {
    /// The blocks `first..first + count`; `count` is not 0. The same arguments give the same requests.
    pub fn new(workload: Workload, read_percent: u8, first: u64, count: u64, seed: u64) -> Self {
        let ledger = (workload == Workload::Verify).then(|| Ledger::new(count as usize));
        let rng = Rng::new(mix(seed) ^ mix(!first));
        Self { workload, read_percent, first, count, cursor: 0, rng, ledger, last_pass: false }
    }

    /// The next request; `None` when there is none now (everything is in flight) or ever (of the last pass).
    #[inline]
    pub fn next(&mut self) -> Option<Next> {
        let (block, action) = match self.workload {
            Workload::RandRead => (self.rng.below(self.count), Action::Read),
            Workload::RandWrite => (self.rng.below(self.count), Action::Change),
            Workload::RandRw => {
                let action = self.read_or_change();
                (self.rng.below(self.count), action)
            }
            Workload::Read => (self.step(), Action::Read),
            Workload::Rw => {
                let action = self.read_or_change();
                (self.step(), action)
            }
            Workload::Write | Workload::Unmap | Workload::WriteZeroes => (self.step(), Action::Change),
            Workload::Flush => (0, Action::Change),
            Workload::Verify => self.next_verified()?,
        };
        Some(Next { block: self.first + block, action })
    }

    #[inline]
    fn step(&mut self) -> u64 {
        let block = self.cursor;
        self.cursor = if block + 1 == self.count { 0 } else { block + 1 };
        block
    }

    #[inline]
    fn read_or_change(&mut self) -> Action {
        if self.rng.below(100) < u64::from(self.read_percent) { Action::Read } else { Action::Change }
    }

    fn next_verified(&mut self) -> Option<(u64, Action)> {
        if self.last_pass {
            return self.next_of_last_pass();
        }
        let read = self.read_or_change() == Action::Read;
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
    #[inline]
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

    fn take(p: &mut Pattern, n: usize) -> Vec<Next> {
        (0..n).map(|_| p.next().expect("there are free blocks")).collect()
    }

    #[test]
    fn sequences_wrap_within_their_share() {
        for workload in
            [Workload::Read, Workload::Write, Workload::Unmap, Workload::WriteZeroes, Workload::Rw]
        {
            let mut p = Pattern::new(workload, 50, 10, 3, 1);
            let blocks: Vec<u64> = take(&mut p, 5).iter().map(|n| n.block).collect();
            assert_eq!(blocks, [10, 11, 12, 10, 11], "{workload:?}");
        }
    }

    #[test]
    fn random_blocks_stay_within_their_share_and_mix() {
        for workload in [Workload::RandRw, Workload::Rw] {
            let mut p = Pattern::new(workload, 70, 100, 50, 1);
            let all = take(&mut p, 10_000);
            assert!(all.iter().all(|n| (100..150).contains(&n.block)));
            let reads = all.iter().filter(|n| n.action.is_read()).count();
            assert!((6500..7500).contains(&reads), "{workload:?}: {reads}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_requests_and_another_others() {
        for workload in [Workload::RandRead, Workload::RandRw, Workload::Verify] {
            let list = |seed| take(&mut Pattern::new(workload, 50, 0, 1000, seed), 200);
            assert_eq!(list(7), list(7), "{workload:?}");
            assert_ne!(list(7), list(8), "{workload:?}");
        }
    }

    #[test]
    fn verified_blocks_are_in_flight_once_and_read_as_written() {
        let mut p = Pattern::new(Workload::Verify, 50, 0, 8, 1);
        let mut written = [0u32; 8];
        for _ in 0..1000 {
            let batch = take(&mut p, 8);
            assert_eq!(p.next(), None, "all are in flight");
            for n in batch {
                match n.action {
                    Action::Stamp(g) => written[n.block as usize] = g,
                    Action::Check(g) => assert_eq!(g, written[n.block as usize]),
                    other => panic!("{other:?}"),
                }
                p.ended(n, true);
            }
        }
        assert!(p.begin_last_pass());
        let last: Vec<u64> = std::iter::from_fn(|| p.next()).map(|n| n.block).collect();
        assert_eq!(last, (0..8).collect::<Vec<_>>());
        assert!(!p.begin_last_pass());
    }
}
