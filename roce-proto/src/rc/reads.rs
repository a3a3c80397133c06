//! READs of the peer: those to answer, and those answered that the peer may ask for again.

use super::config::MAX_READS;
use crate::Reth;

/// One READ request as it was accepted.
#[derive(Clone, Copy, Default)]
struct Record {
    first: u64,
    end: u64,
    reth: Reth,
    msn: u32,
}

/// One packet of an answer.
pub(super) struct Response {
    pub(super) seq: u64,
    /// First packet of an answer, or of one that was begun again.
    pub(super) first: bool,
    pub(super) last: bool,
    /// Of the message, for the AETH.
    pub(super) msn: u32,
    pub(super) rkey: u32,
    pub(super) va: u64,
    pub(super) len: u32,
}

/// A ring of the newest accepted READs; numbers of records only grow. Records before `serve` are answered.
pub(super) struct Reads {
    records: [Record; MAX_READS as usize],
    serve: u32,
    tail: u32,
    depth: u32,
    /// Next packet to answer with, in record `serve`, and the packet that counts as its first.
    cursor: u64,
    start: u64,
    /// Everything before this packet was answered at least once.
    answered: u64,
    /// The same, when the peer last asked again: answers up to there are repetitions.
    repeated: u64,
}

impl Reads {
    pub(super) fn new(depth: u8) -> Self {
        let depth = u32::from(depth.min(MAX_READS));
        Self {
            records: Default::default(),
            serve: 0,
            tail: 0,
            depth,
            cursor: 0,
            start: 0,
            answered: 0,
            repeated: 0,
        }
    }

    fn record(&self, n: u32) -> &Record {
        &self.records[n as usize % usize::from(MAX_READS)]
    }

    /// No more can be accepted: the peer has more outstanding than was agreed on.
    pub(super) fn is_full(&self) -> bool {
        // An answer that is being repeated does not count: whoever sends something new has it by now.
        self.tail.wrapping_sub(self.serve) >= self.depth && self.record(self.serve).end > self.answered
    }

    /// Answers wait to be sent.
    pub(super) fn is_pending(&self) -> bool {
        self.serve != self.tail
    }

    /// A new READ with the packets `first..end`; not to be called when full.
    pub(super) fn push(&mut self, first: u64, end: u64, reth: Reth, msn: u32) {
        if self.tail.wrapping_sub(self.serve) >= self.depth {
            self.serve = self.serve.wrapping_add(1);
            self.begin();
        }
        if !self.is_pending() {
            (self.cursor, self.start) = (first, first);
        }
        self.records[self.tail as usize % usize::from(MAX_READS)] = Record { first, end, reth, msn };
        self.tail = self.tail.wrapping_add(1);
    }

    /// The peer asks again for answers from `seq` on. True if that was accepted before: then they come (again), with
    /// all that follow, for a peer that goes back asks for those, too.
    pub(super) fn again(&mut self, seq: u64, reth: &Reth, mtu_shift: u32) -> bool {
        let kept = self.tail.min(self.depth);
        for n in (1..=kept).map(|back| self.tail.wrapping_sub(back)) {
            let record = self.record(n);
            if !(record.first..record.end).contains(&seq) {
                continue;
            }
            let offset = (seq - record.first) << mtu_shift;
            let original = &record.reth;
            let inside = reth.rkey == original.rkey
                && reth.va == original.va.wrapping_add(offset)
                && offset + u64::from(reth.len) <= u64::from(original.len);
            if inside && (!self.is_pending() || seq < self.cursor) {
                self.serve = n;
                (self.cursor, self.start) = (seq, seq);
                self.repeated = self.answered;
            }
            return inside;
        }
        false
    }

    /// The next packet of an answer.
    pub(super) fn next(&mut self, mtu_shift: u32) -> Option<Response> {
        if !self.is_pending() {
            return None;
        }
        let (record, seq) = (*self.record(self.serve), self.cursor);
        let offset = ((seq - record.first) << mtu_shift) as u32;
        let last = seq + 1 == record.end;
        let response = Response {
            seq,
            first: seq == self.start,
            last,
            msn: record.msn,
            rkey: record.reth.rkey,
            va: record.reth.va.wrapping_add(u64::from(offset)),
            len: (record.reth.len - offset).min(1 << mtu_shift),
        };
        self.cursor += 1;
        if last {
            self.serve = self.serve.wrapping_add(1);
            self.begin();
        }
        self.answered = self.answered.max(seq + 1);
        Some(response)
    }

    /// Goes to the start of record `serve`, if there is one.
    fn begin(&mut self) {
        if self.is_pending() {
            self.cursor = self.record(self.serve).first;
            self.start = self.cursor;
        }
    }

    /// Takes back the newest answer, which was packet `seq` and began an answer if `first`.
    pub(super) fn unsent(&mut self, seq: u64, first: bool) {
        let mut serve = self.serve;
        if !self.is_pending() || self.record(serve).first > seq {
            serve = serve.wrapping_sub(1);
        } else if self.cursor <= seq {
            return;
        }
        let record = self.record(serve);
        if (record.first..record.end).contains(&seq) {
            self.start = if first { seq } else { record.first };
            (self.serve, self.cursor) = (serve, seq);
            // A repetition that was not sent leaves the first answer sent.
            self.answered = self.answered.min(seq.max(self.repeated));
        }
    }

    /// Nothing will be answered any more.
    pub(super) fn clear(&mut self) {
        self.serve = self.tail;
    }
}
