//! How many connections there are, of whom, and whether there may be one more.
//!
//! A source may have as many as it leaves for others: one alone gets half of what is shared, two a third each, so that there
//! is always something for one more. As many sources as connections find an end to that, so a quarter is not shared:
//! ```text
//!   │ shared: 3/4                                       │ 1/8: sources that  │ 1/8: those who came first, of │
//!   │                                                   │ an allow list names│ all that are remembered       │
//! ```
//! Of either eighth a source gets a few, beyond its share, so that who was there before a crowd came can come again.
//! Where there may be fewer than eight connections there is nothing to share.

use std::collections::HashMap;

use quota::Source;

/// Parts of a part that is reserved; with fewer connections nothing is shared.
const PART: usize = 8;
/// Connections that a source gets of what is reserved, at most.
const FEW: usize = 2;
/// Sources that are remembered.
const REMEMBERED: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Census {
    total: usize,
    /// Those of them that are out of a reserve: for those whom an allow list names, and for those who came first.
    named: usize,
    early: usize,
    sources: HashMap<Source, Entry>,
    /// Counts arrivals.
    clock: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    connections: usize,
    /// Those of them that are out of a reserve: as one that an allow list names, and as one who came first.
    named: usize,
    early: usize,
    /// Its first arrival, and its last.
    first: u64,
    last: u64,
}

/// How a connection is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entrance {
    Shared,
    Named,
    Early,
}

impl Census {
    /// How one connection more of `source` may be let in, where there may be `most`; `None` if it may not. `named`: an allow
    /// list names it.
    pub(super) fn entrance(&self, most: usize, source: Source, named: bool) -> Option<Entrance> {
        if self.total >= most {
            return None;
        }
        let part = most / PART;
        let entry = self.sources.get(&source).copied().unwrap_or_default();
        let shared = (most - 2 * part).saturating_sub(self.total - self.named - self.early);
        if part == 0 || entry.connections < shared {
            Some(Entrance::Shared)
        } else if named && entry.named < FEW && self.named < part {
            Some(Entrance::Named)
        } else if entry.early < FEW && self.is_early(source, part / FEW) {
            Some(Entrance::Early)
        } else {
            None
        }
    }

    /// Whether `source` is one of the first `count`.
    fn is_early(&self, source: Source, count: usize) -> bool {
        let Some(entry) = self.sources.get(&source) else { return false };
        self.sources.values().filter(|other| other.first < entry.first).take(count).count() < count
    }

    pub(super) fn enter(&mut self, source: Source, entrance: Entrance) {
        if !self.sources.contains_key(&source) {
            self.forget_one();
        }
        self.clock += 1;
        self.total += 1;
        let entry = self.sources.entry(source).or_insert(Entry { first: self.clock, ..Entry::default() });
        entry.connections += 1;
        entry.last = self.clock;
        match entrance {
            Entrance::Shared => {}
            Entrance::Named => (entry.named, self.named) = (entry.named + 1, self.named + 1),
            Entrance::Early => (entry.early, self.early) = (entry.early + 1, self.early + 1),
        }
    }

    /// A connection of `source`, which stays known, has ended. What it has of a reserve goes back first.
    pub(super) fn leave(&mut self, source: Source) {
        let Some(entry) = self.sources.get_mut(&source) else { return };
        entry.connections -= 1;
        self.total -= 1;
        if entry.named > 0 {
            (entry.named, self.named) = (entry.named - 1, self.named - 1);
        } else if entry.early > 0 {
            (entry.early, self.early) = (entry.early - 1, self.early - 1);
        }
    }

    /// Makes room in the memory: who has not come for the longest time, of those who have no connection.
    fn forget_one(&mut self) {
        if self.sources.len() < REMEMBERED {
            return;
        }
        let gone = self.sources.iter().filter(|(_, e)| e.connections == 0);
        if let Some(oldest) = gone.min_by_key(|(_, e)| e.last).map(|(source, _)| *source) {
            self.sources.remove(&oldest);
        }
    }

    /// Sources with connections, those with most first, and how many these are.
    pub(super) fn sources(&self) -> Vec<(Source, usize)> {
        let present = self.sources.iter().filter(|(_, e)| e.connections > 0);
        let mut list: Vec<(Source, usize)> = present.map(|(s, e)| (*s, e.connections)).collect();
        list.sort_unstable_by_key(|(source, n)| (std::cmp::Reverse(*n), *source));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Census {
        fn try_enter(&mut self, most: usize, source: Source, named: bool) -> Option<Entrance> {
            let entrance = self.entrance(most, source, named)?;
            self.enter(source, entrance);
            Some(entrance)
        }
    }

    /// Lets `source` in as often as it may.
    fn fill(census: &mut Census, most: usize, source: Source, named: bool) -> usize {
        std::iter::from_fn(|| census.try_enter(most, source, named)).count()
    }

    fn user(n: u32) -> Source {
        Source::User(n)
    }

    #[test]
    fn one_source_leaves_something_for_the_next() {
        let mut census = Census::default();
        let held: Vec<usize> = (0..5).map(|n| fill(&mut census, 128, user(n), false)).collect();
        // Half of what is shared each time, and two of what is for the first eight.
        assert_eq!(held, [50, 26, 14, 8, 5]);
        assert_eq!(census.sources()[..2], [(user(0), 50), (user(1), 26)]);
        (0..50).for_each(|_| census.leave(user(0)));
        assert_eq!(fill(&mut census, 128, user(7), false), 28);
    }

    #[test]
    fn who_was_there_before_a_crowd_comes_back() {
        let mut census = Census::default();
        assert_eq!(census.try_enter(128, user(1), false), Some(Entrance::Shared));
        // As many strangers as there can be, each as often as it can.
        for n in 100..1000 {
            fill(&mut census, 128, user(n), false);
        }
        assert_eq!(census.try_enter(128, user(5), false), None);
        for _ in 0..3 {
            assert_eq!(fill(&mut census, 128, user(1), false), 2);
            (0..2).for_each(|_| census.leave(user(1)));
        }
        // And whom an allow list names, if they have never been there.
        assert_eq!(fill(&mut census, 128, user(6), true), 2);
        let named: usize = (2000..3000).map(|n| fill(&mut census, 128, user(n), true)).sum();
        assert_eq!((named, census.named), (14, 16));
        assert_eq!(fill(&mut census, 128, user(1), false), 2, "each reserve is for its own");
        assert!(census.total <= 128);
    }

    #[test]
    fn few_are_not_shared_and_memory_has_an_end() {
        let mut census = Census::default();
        assert_eq!(fill(&mut census, 7, user(1), false), 7);
        let mut census = Census::default();
        for n in 0..5000 {
            assert!(census.try_enter(64, user(n), false).is_some());
            census.leave(user(n));
        }
        assert_eq!((census.sources.len(), census.total, census.named + census.early), (REMEMBERED, 0, 0));
        assert!(census.sources.contains_key(&user(4999)) && !census.sources.contains_key(&user(0)));
    }
}
