//! What a worker measures, by interval.

use hdrhistogram::Histogram;

/// What takes longer counts as this.
const LONGEST_NS: u64 = 600_000_000_000;

/// One worker's part of an interval.
pub(super) struct Sample {
    pub worker: usize,
    /// From the beginning of the measurement, nanoseconds.
    pub from: u64,
    /// As above.
    pub until: u64,
    /// Of reads, and of the others: nanoseconds.
    pub latencies: [Histogram<u64>; 2],
}

impl Sample {
    fn new(worker: usize) -> Self {
        Self { worker, from: 0, until: 0, latencies: [histogram(), histogram()] }
    }

    pub fn clear(&mut self) {
        self.latencies.iter_mut().for_each(Histogram::reset);
    }
}

/// Three digits, nanoseconds to minutes.
pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(LONGEST_NS, 3).expect("constant bounds that are right")
}

/// Latencies of equal kind and length in a row, counted before they are recorded: what completes in one turn after it was
/// submitted in one turn costs one record.
#[derive(Clone, Copy, Default)]
struct Row {
    kind: usize,
    ns: u64,
    count: u64,
}

/// A worker's samples, the one that fills and one that is empty.
pub(super) struct Recorder {
    current: Box<Sample>,
    spare: Option<Box<Sample>>,
    row: Row,
}

impl Recorder {
    pub fn new(worker: usize) -> Self {
        Self {
            current: Box::new(Sample::new(worker)),
            spare: Some(Box::new(Sample::new(worker))),
            row: Row::default(),
        }
    }

    #[inline]
    pub fn record(&mut self, read: bool, ns: u64) {
        let kind = usize::from(!read);
        if (self.row.kind, self.row.ns) != (kind, ns) {
            self.settle();
            self.row = Row { kind, ns, count: 0 };
        }
        self.row.count += 1;
    }

    #[inline]
    fn settle(&mut self) {
        let Row { kind, ns, count } = std::mem::take(&mut self.row);
        if count > 0 {
            self.current.latencies[kind].saturating_record_n(ns, count);
        }
    }

    /// Begins to measure at `from`.
    pub fn begin(&mut self, from: u64) {
        (self.row, self.current.from) = (Row::default(), from);
    }

    /// Ends the interval and begins the next one.
    pub fn rotate(&mut self, until: u64) -> Box<Sample> {
        self.settle();
        let worker = self.current.worker;
        // It is allocated only if the control thread has not given the last one back for a whole interval.
        let mut next = self.spare.take().unwrap_or_else(|| Box::new(Sample::new(worker)));
        next.from = until;
        let mut full = std::mem::replace(&mut self.current, next);
        full.until = until;
        full
    }

    /// An empty sample for reuse.
    pub fn give_back(&mut self, sample: Box<Sample>) {
        self.spare = Some(sample);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_whole() {
        let mut r = Recorder::new(3);
        r.record(true, 9);
        r.begin(10);
        for (read, ns, n) in [(true, 100, 5), (false, 100, 2), (true, 200, 1), (true, u64::MAX, 1)] {
            (0..n).for_each(|_| r.record(read, ns));
        }
        let s = r.rotate(20);
        assert_eq!((s.worker, s.from, s.until), (3, 10, 20));
        assert_eq!((s.latencies[0].len(), s.latencies[1].len()), (7, 2));
        assert_eq!((s.latencies[0].min(), s.latencies[1].max()), (100, 100));
        assert!(s.latencies[0].max() >= LONGEST_NS);
        // Nothing of it is left for the next one.
        let mut s = r.rotate(30);
        assert_eq!((s.from, s.latencies[0].len()), (20, 0));
        s.clear();
        r.give_back(s);
    }
}
