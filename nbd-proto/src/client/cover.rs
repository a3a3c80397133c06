//! Which bytes of a read have been answered.

/// Disjoint ranges, in order. Servers send chunks in order nearly always, and then there is one range.
#[derive(Debug, Default)]
pub(super) struct Cover {
    ranges: Vec<(u32, u32)>,
}

/// More holes than this in what has been answered end the connection: a server that answers a read back to front in
/// single blocks is not worth the memory.
pub(super) const MAX_RANGES: usize = 1024;

/// Why a chunk does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Misfit {
    Overlap,
    Fragments,
}

impl Cover {
    pub(super) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Bytes `at..at + len`, `len` > 0, are answered now. The end must not exceed `u32::MAX`.
    pub(super) fn add(&mut self, at: u32, len: u32) -> Result<(), Misfit> {
        let end = at + len;
        // The first range that ends at or behind the new one's start.
        let i = self.ranges.partition_point(|r| r.1 < at);
        match self.ranges.get(i).copied() {
            None => self.insert(i, (at, end)),
            Some((_, stop)) if stop == at => {
                let next = self.ranges.get(i + 1).map_or(u32::MAX, |r| r.0);
                if i + 1 < self.ranges.len() && next < end {
                    return Err(Misfit::Overlap);
                }
                self.ranges[i].1 = end;
                if i + 1 < self.ranges.len() && next == end {
                    self.ranges[i].1 = self.ranges.remove(i + 1).1;
                }
                Ok(())
            }
            Some((start, _)) if start < end => Err(Misfit::Overlap),
            Some((start, _)) if start == end => {
                self.ranges[i].0 = at;
                Ok(())
            }
            Some(_) => self.insert(i, (at, end)),
        }
    }

    fn insert(&mut self, i: usize, range: (u32, u32)) -> Result<(), Misfit> {
        if self.ranges.len() >= MAX_RANGES {
            return Err(Misfit::Fragments);
        }
        self.ranges.insert(i, range);
        Ok(())
    }

    /// Bytes `0..len` are answered.
    pub(super) fn is_whole(&self, len: u32) -> bool {
        self.ranges == [(0, len)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn in_order_is_one_range() {
        let mut c = Cover::default();
        for at in (0..4096).step_by(512) {
            assert_eq!(c.add(at, 512), Ok(()));
            assert_eq!(c.ranges.len(), 1);
        }
        assert!(c.is_whole(4096) && !c.is_whole(4097));
        assert_eq!(c.add(4095, 1), Err(Misfit::Overlap));
        c.clear();
        assert!(!c.is_whole(4096));
    }

    #[test]
    fn fragments_are_bounded() {
        let mut c = Cover::default();
        for i in 0..MAX_RANGES as u32 {
            assert_eq!(c.add(i * 2, 1), Ok(()));
        }
        assert_eq!(c.add(5000, 1), Err(Misfit::Fragments));
        assert_eq!(c.add(1, 1), Ok(()), "what joins two ranges makes room");
        assert_eq!(c.add(5000, 1), Ok(()));
    }

    proptest! {
        /// The same answers as a bitmap gives.
        #[test]
        fn as_a_bitmap(chunks in prop::collection::vec((0u32..100, 1u32..30), 0..40)) {
            let (mut cover, mut bits) = (Cover::default(), [false; 130]);
            for (at, len) in chunks {
                let range = at as usize..(at + len) as usize;
                let free = bits[range.clone()].iter().all(|b| !b);
                prop_assert_eq!(cover.add(at, len).is_ok(), free);
                if free {
                    bits[range].fill(true);
                }
            }
            let first = bits.iter().position(|b| !b).unwrap_or(130);
            let whole = bits[first..].iter().all(|b| !b);
            prop_assert_eq!(first > 0 && cover.is_whole(first as u32), first > 0 && whole);
        }
    }
}
