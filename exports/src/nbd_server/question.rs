//! Requests that the bdev's control path answers: what is allocated, and what to read ahead.
//!
//! ```text
//!   reactor: Client ── one question at a time ──▶ control thread: Bdev::extents, Bdev::prefetch ──▶ Lane::answered
//! ```
//!
//! These may wait for the disk (a file's extents are its file system's metadata), so no reactor asks itself. A client has
//! one question with the control thread at a time: others, and RPC, get their turn however much it asks. The way there
//! and back costs two messages between threads, some tens of microseconds if both are awake.

use std::collections::VecDeque;

use bdev::Descriptor;
use nbd_poll::{Incoming, RequestId};
use nbd_proto::reply::{MAX_EXTENTS, Run};
use nbd_proto::request::Command;
use nbd_proto::wire::state;

/// One request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) request: RequestId,
    lba: u64,
    blocks: u64,
    /// Bytes of the first block in front of the range.
    before: u64,
    /// Bytes of the range.
    len: u64,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    /// Extents, this many at most.
    Extents(usize),
    Prefetch,
}

/// The questions of one client, at most one of them asked. No longer than a connection has requests in flight.
#[derive(Debug, Default)]
pub(super) struct Questions {
    waiting: VecDeque<Question>,
    asked: bool,
}

impl Question {
    /// The question that a request is, for a bdev with blocks of 2^`shift` bytes; `None`: it is none.
    pub(super) fn of(incoming: &Incoming, shift: u32) -> Option<Self> {
        let what = match incoming.request.command() {
            Command::BlockStatus { one } => What::Extents(if one { 1 } else { MAX_EXTENTS }),
            Command::Cache => What::Prefetch,
            _ => return None,
        };
        let cover = incoming.request.cover(1 << shift);
        let (lba, blocks) = (cover.offset >> shift, cover.len >> shift);
        let (before, len) = (cover.before.into(), incoming.request.len());
        Some(Self { request: incoming.id, lba, blocks, before, len, what })
    }

    /// The answer of a bdev that has none: all of it is data, and nothing is read ahead.
    pub(super) fn plain(&self) -> Answer {
        match self.what {
            What::Extents(_) => Answer::Runs(vec![Run { len: self.len, state: 0 }]),
            What::Prefetch => Answer::Done,
        }
    }

    /// Whether the bdev has more to say than [`Question::plain`].
    pub(super) fn is_worth_asking(&self, descriptor: &Descriptor) -> bool {
        match self.what {
            What::Extents(_) => descriptor.bdev().has_extents(),
            What::Prefetch => descriptor.bdev().prefetches(),
        }
    }

    /// Asks the bdev; on the control thread.
    pub(super) fn ask(&self, descriptor: &Descriptor) -> Answer {
        let shift = descriptor.info().block_size.trailing_zeros();
        let What::Extents(max) = self.what else {
            descriptor.bdev().prefetch(self.lba, self.blocks);
            return Answer::Done;
        };
        match descriptor.bdev().extents(self.lba, self.blocks, max) {
            Some(extents) if !extents.is_empty() => {
                let state = |hole| if hole { state::HOLE | state::ZERO } else { 0 };
                let runs = extents.iter().map(|e| Run { len: e.blocks << shift, state: state(e.hole) });
                Answer::Runs(within(runs, self.before, self.len))
            }
            _ => self.plain(),
        }
    }
}

/// Those of `runs` that lie in `len` bytes from byte `before` on.
fn within(runs: impl Iterator<Item = Run>, before: u64, len: u64) -> Vec<Run> {
    let (mut skip, mut left) = (before, len);
    runs.filter_map(|run| {
        let skipped = skip.min(run.len);
        skip -= skipped;
        let inside = (run.len - skipped).min(left);
        left -= inside;
        (inside > 0).then_some(Run { len: inside, ..run })
    })
    .collect()
}

/// What came of a question.
#[derive(Debug)]
pub(super) enum Answer {
    /// At least one.
    Runs(Vec<Run>),
    Done,
}

impl Questions {
    pub(super) fn push(&mut self, question: Question) {
        self.waiting.push_back(question);
    }

    /// The next one to be asked, if none is being asked.
    pub(super) fn next(&mut self) -> Option<Question> {
        if self.asked {
            return None;
        }
        let next = self.waiting.pop_front();
        self.asked = next.is_some();
        next
    }

    /// The one that was asked is answered.
    pub(super) fn answered(&mut self) {
        self.asked = false;
    }
}
