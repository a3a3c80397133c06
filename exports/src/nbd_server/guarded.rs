//! Changes that need a place in the export's [`RangeLock`](super::ranges): those of a part of a block, and, beside them,
//! those of whole blocks.
//!
//! ```text
//!   write   place ─▶ read the edges ─▶ complete the data with them ─▶ write ────────────────▶ answer
//!   zeroes  place ─▶ zero the whole blocks ─▶ read the edges ─▶ zero their parts ─▶ write ──▶ answer
//!   trim    place ─▶ discard the whole blocks ──────────────────────────────────────────────▶ answer
//! ```
//!
//! Edges are the first and the last block of the range, where it has only a part of them. They cost an allocation and a
//! read each: clients that send such requests are slow by nature.

use std::sync::Arc;

use bdev::{Flags, IoRequest, Op, Segments, Status};
use iobuf::{Region, Segment};
use nbd_poll::Incoming;
use nbd_proto::request::Command;
use smallvec::SmallVec;

use super::disk::Tag;
use super::ranges::Ticket;

/// A block of which a part is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edge {
    lba: u64,
    /// The part, bytes of the block.
    from: u32,
    to: u32,
}

type Edges = SmallVec<[Edge; 2]>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// For its place.
    Waiting,
    ReadEdges,
    /// The request itself.
    Main,
    WriteEdges,
    Flush,
    Done,
}

/// One change.
pub(super) struct Change {
    pub(super) tag: Tag,
    pub(super) ticket: Option<Ticket>,
    /// Of whole blocks; none is 0 blocks long but one that has edges only.
    main: IoRequest,
    edges: Edges,
    /// The edges' blocks, one behind the other. Made when they are read.
    scratch: Option<Arc<Region>>,
    block: u32,
    then_flush: bool,
    stage: Stage,
    /// Requests of this stage that the bdev has.
    left: u32,
    failed: Option<Status>,
}

/// Requests of one stage.
pub(super) type Step = SmallVec<[IoRequest; 2]>;

impl Change {
    /// The change that a request is, on blocks of 2^`shift` bytes; `None` if it changes nothing: a trim of no whole block.
    ///
    /// # Panics
    /// If the request does not modify.
    pub(super) fn of(tag: Tag, incoming: Incoming, shift: u32) -> Option<Self> {
        let (request, block) = (&incoming.request, 1_u32 << shift);
        let cover = request.cover(block);
        let (start, end) = (request.offset(), request.offset() + request.len());
        // Whole blocks inside.
        let (first, past) = (start.div_ceil(block.into()), end >> shift);
        let inside = (first, past.saturating_sub(first));
        let whole = (cover.offset >> shift, cover.len >> shift);
        let fua = |fua| if fua { Flags::FUA } else { Flags::NONE };
        let edges = edges(start, end, shift);
        let (op, flags, (lba, blocks), edges, then_flush) = match request.command() {
            Command::Write { fua: f } => (Op::Write, fua(f), whole, edges, false),
            Command::Trim { fua } => (Op::Discard, Flags::NONE, inside, Edges::new(), fua),
            Command::WriteZeroes { fua: f, no_hole, fast } => {
                let unmap = if no_hole { Flags::NO_UNMAP } else { Flags::NONE };
                let fast = if fast { Flags::FAST } else { Flags::NONE };
                (Op::WriteZeroes, fua(f) | unmap | fast, inside, edges, false)
            }
            other => unreachable!("{other:?} changes nothing"),
        };
        if blocks == 0 && edges.is_empty() {
            return None;
        }
        let main = IoRequest { op, flags, lba, blocks, segments: incoming.segments, cookie: 0 };
        Some(Self {
            tag,
            ticket: None,
            main,
            edges,
            scratch: None,
            block,
            then_flush,
            stage: Stage::Waiting,
            left: 0,
            failed: None,
        })
    }

    /// Blocks for its place: the first and the one behind the last, and whether it changes a part of one.
    pub(super) fn range(&self) -> (u64, u64, bool) {
        let (mut first, mut end) = (self.main.lba, self.main.lba + self.main.blocks);
        if self.main.blocks == 0 {
            (first, end) = (self.edges[0].lba, self.edges[0].lba);
        }
        for edge in &self.edges {
            (first, end) = (first.min(edge.lba), end.max(edge.lba + 1));
        }
        (first, end, !self.edges.is_empty())
    }

    /// What comes next, with `cookie` for each request; empty: it has ended, [`Change::result`] is the answer.
    pub(super) fn advance(&mut self, cookie: u64) -> Step {
        let mut step = Step::new();
        while step.is_empty() && self.stage != Stage::Done {
            self.stage = self.next();
            match self.stage {
                Stage::Main if self.main.blocks > 0 => {
                    step.push(IoRequest { cookie, ..self.main.clone() });
                }
                Stage::ReadEdges => self.edge_requests(Op::Read, Flags::NONE, cookie, &mut step),
                Stage::WriteEdges => {
                    let flags = Flags(self.main.flags.0 & Flags::FUA.0);
                    self.edge_requests(Op::Write, flags, cookie, &mut step);
                }
                Stage::Flush if self.then_flush => step.push(IoRequest {
                    op: Op::Flush,
                    flags: Flags::NONE,
                    lba: 0,
                    blocks: 0,
                    segments: Segments::new(),
                    cookie,
                }),
                Stage::Main | Stage::Flush | Stage::Waiting | Stage::Done => {}
            }
        }
        self.left = step.len() as u32;
        step
    }

    fn next(&mut self) -> Stage {
        let (write, edges) = (self.main.op == Op::Write, !self.edges.is_empty());
        match self.stage {
            _ if self.failed.is_some() => Stage::Done,
            Stage::Waiting if write && edges => Stage::ReadEdges,
            Stage::Waiting => Stage::Main,
            Stage::ReadEdges => {
                self.merge();
                if self.failed.is_some() {
                    Stage::Done
                } else if write {
                    Stage::Main
                } else {
                    Stage::WriteEdges
                }
            }
            Stage::Main if edges && !write => Stage::ReadEdges,
            Stage::Main | Stage::WriteEdges => Stage::Flush,
            Stage::Flush | Stage::Done => Stage::Done,
        }
    }

    /// A request of the present step has ended. True if it was the last: then [`Change::advance`].
    pub(super) fn step_done(&mut self, status: Status) -> bool {
        self.left -= 1;
        if status != Status::Ok {
            self.failed = Some(status);
        }
        self.left == 0
    }

    pub(super) fn result(&self) -> Status {
        self.failed.unwrap_or(Status::Ok)
    }

    /// One request for each edge.
    fn edge_requests(&mut self, op: Op, flags: Flags, cookie: u64, step: &mut Step) {
        let block = self.block as usize;
        if self.scratch.is_none() {
            self.scratch = Region::new(self.edges.len() * block).ok();
        }
        let Some(scratch) = &self.scratch else {
            self.failed = Some(Status::Busy);
            return;
        };
        for (i, edge) in self.edges.iter().enumerate() {
            // SAFETY: the change keeps the region until its last request has ended; nobody else knows it.
            let segments = unsafe { scratch.segment(i * block, block) }.into_iter().collect();
            step.push(IoRequest { op, flags, lba: edge.lba, blocks: 1, segments, cookie });
        }
    }

    /// The edges were read. A write: completes its first and last block with what is not its own. Zeroes: makes them.
    fn merge(&mut self) {
        let Some(scratch) = &self.scratch else { return };
        let block = self.block as usize;
        let mut done = true;
        for (i, edge) in self.edges.iter().enumerate() {
            let (at, from, to) = (i * block, edge.from as usize, edge.to as usize);
            if self.main.op != Op::Write {
                done &= scratch.zero(at + from, to - from, false);
                continue;
            }
            let in_data = ((edge.lba - self.main.lba) as usize) * block;
            for (start, end) in [(0, from), (to, block)] {
                let mut offset = at + start;
                for piece in part(&self.main.segments, in_data + start, end - start) {
                    // SAFETY: the piece lies in the memory of the request, which its connection keeps until the answer,
                    // outside the range that the client has sent; the bdev has no request with it now.
                    done &= unsafe { scratch.read_to(offset, &piece) };
                    offset += piece.len as usize;
                }
            }
        }
        if !done {
            self.failed = Some(Status::IoError);
        }
    }
}

/// The blocks of which a range of bytes has only a part: one or two, or none.
fn edges(start: u64, end: u64, shift: u32) -> Edges {
    let mask = (1_u64 << shift) - 1;
    let mut edges = Edges::new();
    let (first, last) = (start >> shift, (end - 1) >> shift);
    for lba in [first, last] {
        let base = lba << shift;
        let (from, to) = (start.max(base) - base, end.min(base + mask + 1) - base);
        let known = edges.last().is_some_and(|e: &Edge| e.lba == lba);
        if to - from <= mask && !known {
            edges.push(Edge { lba, from: from as u32, to: to as u32 });
        }
    }
    edges
}

/// Bytes `start` to `start + len` of what the segments have.
fn part(segments: &Segments, start: usize, len: usize) -> SmallVec<[Segment; 2]> {
    let (mut skip, mut left, mut pieces) = (start, len, SmallVec::new());
    for s in segments {
        let from = skip.min(s.len as usize);
        skip -= from;
        let n = left.min(s.len as usize - from);
        left -= n;
        if n > 0 {
            pieces.push(Segment { addr: s.addr + from as u64, len: n as u32, ..*s });
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_the_blocks_that_are_not_whole() {
        let of = |start, end| edges(start, end, 9).iter().map(|e| (e.lba, e.from, e.to)).collect::<Vec<_>>();
        assert_eq!(of(0, 512), []);
        assert_eq!(of(512, 4096), []);
        assert_eq!(of(3, 4), [(0, 3, 4)]);
        assert_eq!(of(0, 511), [(0, 0, 511)]);
        assert_eq!(of(511, 513), [(0, 511, 512), (1, 0, 1)]);
        assert_eq!(of(512, 1537), [(3, 0, 1)]);
        assert_eq!(of(1, 1536), [(0, 1, 512)]);
        assert_eq!(of(100, 5000), [(0, 100, 512), (9, 0, 392)]);
    }
}
