//! An export's bdev on one reactor: requests of all its connections there go through one channel.

use std::collections::VecDeque;

use bdev::{Descriptor, Flags, IoChannel, IoRequest, Op, Segments, Status};
use nbd_poll::{Incoming, RequestId};
use nbd_proto::request::Command;
use nbd_proto::wire::ErrorCode;

use super::guarded::Change;
use super::ranges::{Armed, Member, Ticket};
use crate::nbd_error::error_code;

/// In the cookie of a bdev request: flush once it is done, then answer.
const THEN_FLUSH: u64 = 1 << 63;
/// The request is a step of the change whose number is in the low half.
const STEP: u64 = 1 << 62;
/// It is a change that has no place in the range lock.
const COUNTED: u64 = 1 << 61;
const FLAGS: u64 = THEN_FLUSH | STEP | COUNTED;

/// Whom a bdev request is answered to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    /// Place of the client in its lane, below 2^29.
    pub(super) client: u32,
    pub(super) request: RequestId,
}

impl Tag {
    fn cookie(self) -> u64 {
        u64::from(self.client) << 32 | u64::from(self.request.0)
    }

    fn of(cookie: u64) -> Self {
        Self { client: ((cookie & !FLAGS) >> 32) as u32, request: RequestId(cookie as u32) }
    }
}

/// What a client is told.
pub(super) type Answer = (Tag, Result<(), ErrorCode>);

pub(super) struct Disk {
    /// Number of the export.
    pub(super) export: u64,
    // Field order is drop order: the channel waits until the device has let go of the memory of the changes.
    pub(super) channel: IoChannel,
    /// For what the channel does not answer.
    pub(super) descriptor: Descriptor,
    /// Connections.
    pub(super) users: u32,
    shift: u32,
    /// Taken while the channel was full, oldest first.
    waiting: VecDeque<IoRequest>,
    /// Changes with a place in the range lock, by their numbers.
    changes: Vec<Option<Change>>,
    member: Member,
    /// Changes under way that have no place.
    counted: u32,
    /// The range lock is to hear when there are none of these.
    draining: bool,
}

impl Disk {
    pub(super) fn new(
        export: u64,
        descriptor: &Descriptor,
        member: Member,
    ) -> Result<Self, bdev::ChannelError> {
        let channel = descriptor.channel()?;
        let shift = channel.info().block_size.trailing_zeros();
        Ok(Self {
            export,
            channel,
            descriptor: descriptor.clone(),
            users: 0,
            shift,
            waiting: VecDeque::new(),
            changes: Vec::new(),
            member,
            counted: 0,
            draining: false,
        })
    }

    /// Size now, bytes.
    pub(super) fn size(&self) -> u64 {
        self.channel.blocks() << self.shift
    }

    /// Bytes of a block are 2 to the power of this.
    pub(super) fn shift(&self) -> u32 {
        self.shift
    }

    /// The request changes a part of a block: its client must be armed before it is submitted.
    pub(super) fn is_partial(&self, incoming: &Incoming) -> bool {
        let mask = (1_u64 << self.shift) - 1;
        incoming.request.command().modifies()
            && (incoming.request.offset() | incoming.request.len()) & mask != 0
    }

    /// The range lock knows of a client that changes parts of blocks, until the guard is dropped.
    pub(super) fn arm(&self) -> Armed {
        self.member.arm()
    }

    /// Takes a request. `Some`: it has ended already.
    pub(super) fn submit(&mut self, client: u32, incoming: Incoming) -> Option<Result<(), ErrorCode>> {
        let tag = Tag { client, request: incoming.id };
        let changes = incoming.request.command().modifies();
        if changes && self.member.is_armed() {
            return self.change(tag, incoming).map(|(_, result)| result);
        }
        let mut request = match self.request(tag, incoming) {
            Ok(request) => request,
            Err(error) => return Some(Err(error)),
        };
        if changes {
            request.cookie |= COUNTED;
            self.counted += 1;
        }
        if !self.waiting.is_empty() {
            self.waiting.push_back(request);
            return None;
        }
        let (cookie, status) = self.try_submit(request).err()?;
        Some(self.answer(cookie, status).1)
    }

    /// What became of a completed bdev request: the answer, or `None` if there is another step.
    pub(super) fn finished(&mut self, cookie: u64, status: Status) -> Option<Answer> {
        if cookie & STEP != 0 {
            return self.step_done(cookie, status);
        }
        if status == Status::Ok && cookie & THEN_FLUSH != 0 {
            return match self.try_submit(bare(Op::Flush, cookie & !THEN_FLUSH)) {
                Ok(()) => None,
                Err((cookie, status)) => Some(self.answer(cookie, status)),
            };
        }
        Some(self.answer(cookie, status))
    }

    fn answer(&mut self, cookie: u64, status: Status) -> Answer {
        self.uncount(cookie);
        (Tag::of(cookie), self.result(status))
    }

    fn result(&self, status: Status) -> Result<(), ErrorCode> {
        if status == Status::Ok {
            return Ok(());
        }
        tracing::debug!(bdev = self.channel.info().name, ?status, "I/O failed");
        Err(error_code(status))
    }

    /// Ends what can be ended of a client that waits for nothing any more.
    pub(super) fn cut_short(&mut self, client: u32) {
        let changes = &self.changes;
        let tag_of = |cookie: u64| match changes.get(cookie as u32 as usize) {
            Some(Some(change)) if cookie & STEP != 0 => change.tag,
            _ => Tag::of(cookie),
        };
        self.channel.cut_short(|cookie| tag_of(cookie).client == client);
    }

    /// After completions there may be room for what waited; answers to what was refused.
    pub(super) fn resubmit(&mut self, mut answer: impl FnMut(Answer)) {
        while let Some(request) = self.waiting.pop_front() {
            let before = self.waiting.len();
            if let Err((cookie, status)) = self.try_submit(request) {
                if let Some(told) = self.finished(cookie, status) {
                    answer(told);
                }
            } else if self.waiting.len() > before {
                return;
            }
        }
    }

    /// To the channel, or to the head of the queue if that is full.
    fn try_submit(&mut self, request: IoRequest) -> Result<(), (u64, Status)> {
        match self.channel.submit(request) {
            Ok(()) => Ok(()),
            // With nothing in flight no completion would bring it back.
            Err(r) if r.status == Status::Busy && self.channel.inflight() > 0 => {
                self.waiting.push_front(r.request);
                Ok(())
            }
            Err(r) => Err((r.request.cookie, r.status)),
        }
    }

    /// As the bdev has it: of a read, the blocks that its range lies in. Range and alignment were checked against the
    /// export, and will be against the bdev.
    fn request(&self, tag: Tag, incoming: Incoming) -> Result<IoRequest, ErrorCode> {
        let fua = |fua| if fua { Flags::FUA } else { Flags::NONE };
        let (op, flags, then) = match incoming.request.command() {
            Command::Read => (Op::Read, Flags::NONE, 0),
            Command::Write { fua: f } => (Op::Write, fua(f), 0),
            Command::Flush => return Ok(bare(Op::Flush, tag.cookie())),
            Command::Trim { fua } => (Op::Discard, Flags::NONE, if fua { THEN_FLUSH } else { 0 }),
            Command::WriteZeroes { fua: f, no_hole, fast } => {
                let unmap = if no_hole { Flags::NO_UNMAP } else { Flags::NONE };
                let fast = if fast { Flags::FAST } else { Flags::NONE };
                (Op::WriteZeroes, fua(f) | unmap | fast, 0)
            }
            // These are questions.
            Command::Cache | Command::BlockStatus { .. } => return Err(ErrorCode::Enotsup),
        };
        let cover = incoming.request.cover(1 << self.shift);
        Ok(IoRequest {
            op,
            flags,
            lba: cover.offset >> self.shift,
            blocks: cover.len >> self.shift,
            segments: incoming.segments,
            cookie: tag.cookie() | then,
        })
    }
}

/// Changes with a place in the range lock, and the end of those without.
impl Disk {
    #[cold]
    fn change(&mut self, tag: Tag, incoming: Incoming) -> Option<Answer> {
        let Some(mut change) = Change::of(tag, incoming, self.shift) else { return Some((tag, Ok(()))) };
        let (first, end, alone) = change.range();
        let (ticket, granted) = self.member.enter(first, end, alone);
        change.ticket = Some(ticket);
        let index = self.changes.iter().position(Option::is_none).unwrap_or(self.changes.len());
        if index == self.changes.len() {
            self.changes.push(None);
        }
        self.changes[index] = Some(change);
        if granted { self.advance(index) } else { None }
    }

    /// The range lock lets a change go on.
    pub(super) fn granted(&mut self, ticket: Ticket) -> Option<Answer> {
        let is_it = |c: &Option<Change>| c.as_ref().is_some_and(|c| c.ticket == Some(ticket));
        let index = self.changes.iter().position(is_it)?;
        self.advance(index)
    }

    /// The range lock wants to hear when no change without a place is under way.
    pub(super) fn drain(&mut self) {
        self.draining = true;
        self.mind_drain();
    }

    /// A change of `cookie` has ended.
    fn uncount(&mut self, cookie: u64) {
        if cookie & COUNTED != 0 {
            self.counted -= 1;
            self.mind_drain();
        }
    }

    fn mind_drain(&mut self) {
        if self.draining && self.counted == 0 {
            self.draining = false;
            self.member.drained();
        }
    }

    fn step_done(&mut self, cookie: u64, status: Status) -> Option<Answer> {
        let index = cookie as u32 as usize;
        let change = self.changes.get_mut(index)?.as_mut()?;
        if change.step_done(status) { self.advance(index) } else { None }
    }

    /// Submits the next step of a change, or ends it.
    fn advance(&mut self, index: usize) -> Option<Answer> {
        loop {
            let change = self.changes.get_mut(index)?.as_mut()?;
            let step = change.advance(STEP | index as u64);
            if step.is_empty() {
                let change = self.changes[index].take()?;
                if let Some(ticket) = change.ticket {
                    self.member.leave(ticket);
                }
                return Some((change.tag, self.result(change.result())));
            }
            let mut ended = false;
            for request in step {
                if let Err((_, status)) = self.try_submit(request) {
                    ended = self.changes[index].as_mut()?.step_done(status);
                }
            }
            if !ended {
                return None;
            }
        }
    }
}

fn bare(op: Op, cookie: u64) -> IoRequest {
    IoRequest { op, flags: Flags::NONE, lba: 0, blocks: 0, segments: Segments::new(), cookie }
}
