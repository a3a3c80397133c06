//! Sources that have shown that they are clients.

use std::collections::HashMap;

use crate::Source;

/// A bounded set of sources. Who has not been seen for longest is forgotten first.
#[derive(Debug)]
pub struct Known {
    most: usize,
    /// When each was seen last, in calls of [`Known::remember`].
    seen: HashMap<Source, u64>,
    calls: u64,
}

impl Known {
    /// Room for `most` sources, at least one.
    pub fn new(most: usize) -> Known {
        Known { most: most.max(1), seen: HashMap::new(), calls: 0 }
    }

    /// `source` has done what only a client can do. Linear in the number of sources when there is no room.
    pub fn remember(&mut self, source: Source) {
        self.calls += 1;
        if self.seen.len() >= self.most
            && !self.seen.contains_key(&source)
            && let Some((&oldest, _)) = self.seen.iter().min_by_key(|(_, call)| **call)
        {
            self.seen.remove(&oldest);
        }
        self.seen.insert(source, self.calls);
    }

    /// `source` is one of them.
    pub fn contains(&self, source: Source) -> bool {
        self.seen.contains_key(&source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(n: u8) -> Source {
        Source::of([10, 0, 0, n].into())
    }

    #[test]
    fn the_oldest_is_forgotten() {
        let mut known = Known::new(2);
        [1, 2, 1, 3].into_iter().for_each(|n| known.remember(source(n)));
        assert_eq!([1, 2, 3].map(|n| known.contains(source(n))), [true, false, true]);
    }
}
