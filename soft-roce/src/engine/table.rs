//! The queue pairs of an engine, found by number.

use roce_proto::Nanos;

use super::entry::Entry;

/// Bits of a queue pair number above its engine's slot.
const INDEX_BITS: u32 = 17;

/// Number to place without search: numbers are random, so the index is as large as their range, and as few of its
/// pages exist as are used.
pub struct Table {
    /// Place + 1 by the number's upper bits, 0 for none.
    index: Box<[u16]>,
    entries: Vec<Option<Box<Entry>>>,
    free: Vec<u16>,
    /// By place; beside each other, because they are looked through.
    deadlines: Vec<Nanos>,
    /// No deadline is before this.
    earliest: Nanos,
}

fn bits_of(qpn: u32) -> usize {
    (qpn >> 7) as usize & ((1 << INDEX_BITS) - 1)
}

impl Table {
    pub fn new() -> Self {
        Self {
            index: vec![0; 1 << INDEX_BITS].into(),
            entries: Vec::new(),
            free: Vec::new(),
            deadlines: Vec::new(),
            earliest: Nanos::MAX,
        }
    }

    /// Adds a queue pair of a number that is not there. Returns it back if there are too many.
    pub fn add(&mut self, entry: Box<Entry>) -> Result<u16, Box<Entry>> {
        let place = match self.free.pop() {
            Some(place) => place,
            None => match u16::try_from(self.entries.len()) {
                Ok(place) if place < u16::MAX => {
                    self.entries.push(None);
                    self.deadlines.push(Nanos::MAX);
                    place
                }
                _ => return Err(entry),
            },
        };
        self.index[bits_of(entry.qpn)] = place + 1;
        self.entries[usize::from(place)] = Some(entry);
        Ok(place)
    }

    /// Where queue pair `qpn` is.
    pub fn find(&self, qpn: u32) -> Option<u16> {
        let place = self.index[bits_of(qpn)].checked_sub(1)?;
        // The slot bits must be the engine's own.
        self.entries[usize::from(place)].as_ref().filter(|entry| entry.qpn == qpn)?;
        Some(place)
    }

    /// The queue pair at `place`.
    pub fn at(&mut self, place: u16) -> Option<&mut Entry> {
        self.entries.get_mut(usize::from(place))?.as_deref_mut()
    }

    /// Takes out the queue pair at `place`.
    pub fn remove(&mut self, place: u16) -> Option<Box<Entry>> {
        let entry = self.entries.get_mut(usize::from(place))?.take()?;
        self.index[bits_of(entry.qpn)] = 0;
        self.deadlines[usize::from(place)] = Nanos::MAX;
        self.free.push(place);
        self.trim();
        Some(entry)
    }

    /// Gives up places at the end: what is looked through is as long as there are queue pairs, not as there ever were.
    fn trim(&mut self) {
        let used = self.entries.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        if used < self.entries.len() {
            self.entries.truncate(used);
            self.deadlines.truncate(used);
            self.free.retain(|place| usize::from(*place) < used);
        }
    }

    /// Places of all queue pairs.
    pub fn places(&self) -> std::ops::Range<u16> {
        0..self.entries.len() as u16
    }

    /// Notes when the queue pair at `place` must be looked at.
    pub fn set_deadline(&mut self, place: u16, at: Nanos) {
        if let Some(deadline) = self.deadlines.get_mut(usize::from(place)) {
            *deadline = at;
            self.earliest = self.earliest.min(at);
        }
    }

    /// A time before which nothing is due; there may be nothing due at it.
    pub fn earliest(&self) -> Nanos {
        self.earliest
    }

    /// The next place from `from` on that is due. Call with 0, then with one more than the last answer, to the end,
    /// setting the deadline of each: after that [`Table::earliest`] is exact.
    pub fn next_due(&mut self, from: u16, now: Nanos) -> Option<u16> {
        let later = self.deadlines.get(usize::from(from)..)?;
        let found = later.iter().position(|at| *at <= now).map(|i| from + i as u16);
        if found.is_none() {
            self.earliest = self.deadlines.iter().copied().min().unwrap_or(Nanos::MAX);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use roce_proto::cm::ConnId;
    use verbs::QpCaps;

    fn entry(qpn: u32) -> Box<Entry> {
        let caps = QpCaps {
            max_send_wr: 1,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            domain: verbs::Domain::COMMON,
        };
        Box::new(Entry::new(qpn, ConnId(1), &caps))
    }

    #[test]
    fn numbers_are_found_with_all_their_bits() {
        let mut table = Table::new();
        let place = table.add(entry(0xff_ff83)).ok().unwrap();
        assert_eq!(table.find(0xff_ff83), Some(place));
        assert_eq!((table.find(0xff_ff84), table.find(0xff_ff03)), (None, None));
        assert_eq!(table.remove(place).unwrap().qpn, 0xff_ff83);
        assert_eq!(table.find(0xff_ff83), None);
        assert_eq!(table.add(entry(0x83)).ok(), Some(place), "places are used again");
    }

    #[test]
    fn a_table_is_no_longer_than_it_must_be() {
        let mut table = Table::new();
        let places: Vec<u16> = (0..4).map(|i| table.add(entry(i << 7 | 0x101)).ok().unwrap()).collect();
        for i in [1, 3, 2] {
            table.remove(places[i]).unwrap();
        }
        assert_eq!(table.places(), 0..1);
        assert_eq!(table.add(entry(0x901)).ok(), Some(1));
    }

    #[test]
    fn deadlines_fire_once_they_have_come() {
        let mut table = Table::new();
        for i in 0..3 {
            let place = table.add(entry(i << 7 | 0x101)).ok().unwrap();
            table.set_deadline(place, u64::from(i) * 10 + 10);
        }
        assert_eq!((table.earliest(), table.next_due(0, 5)), (10, None));
        assert_eq!(table.next_due(0, 20), Some(0));
        table.set_deadline(0, 100);
        assert_eq!(table.next_due(1, 20), Some(1));
        table.set_deadline(1, Nanos::MAX);
        assert_eq!((table.next_due(2, 20), table.earliest()), (None, 30));
    }
}
