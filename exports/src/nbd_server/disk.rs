//! An export's bdev on one reactor: requests of all its connections there go through one channel.

use std::collections::VecDeque;

use bdev::{Descriptor, Flags, IoChannel, IoRequest, Op, Segments, Status};
use nbd_poll::{Incoming, RequestId};
use nbd_proto::request::Command;
use nbd_proto::wire::ErrorCode;

use crate::nbd_error::error_code;

/// In the cookie of a bdev request: flush once it is done, then answer.
const THEN_FLUSH: u64 = 1 << 63;

/// Whom a bdev request is answered to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    /// Place of the client in its lane, below 2^31.
    pub(super) client: u32,
    pub(super) request: RequestId,
}

impl Tag {
    fn cookie(self) -> u64 {
        u64::from(self.client) << 32 | u64::from(self.request.0)
    }

    fn of(cookie: u64) -> Self {
        Self { client: ((cookie & !THEN_FLUSH) >> 32) as u32, request: RequestId(cookie as u32) }
    }
}

pub(super) struct Disk {
    /// Number of the export.
    pub(super) export: u64,
    pub(super) channel: IoChannel,
    /// For what the channel does not answer.
    pub(super) descriptor: Descriptor,
    /// Connections.
    pub(super) users: u32,
    shift: u32,
    /// Taken while the channel was full, oldest first.
    waiting: VecDeque<IoRequest>,
}

impl Disk {
    pub(super) fn new(export: u64, descriptor: &Descriptor) -> Result<Self, bdev::ChannelError> {
        let channel = descriptor.channel()?;
        let shift = channel.info().block_size.trailing_zeros();
        Ok(Self {
            export,
            channel,
            descriptor: descriptor.clone(),
            users: 0,
            shift,
            waiting: VecDeque::new(),
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

    /// Takes a request; `Err` is its answer.
    pub(super) fn submit(&mut self, client: u32, incoming: Incoming) -> Result<(), ErrorCode> {
        let request = self.request(Tag { client, request: incoming.id }, incoming)?;
        if !self.waiting.is_empty() {
            self.waiting.push_back(request);
            return Ok(());
        }
        self.try_submit(request).map_err(|(_, status)| error_code(status))
    }

    /// What became of a completed bdev request: the answer, or `None` if there is another step.
    pub(super) fn finished(&mut self, cookie: u64, status: Status) -> Option<(Tag, Result<(), ErrorCode>)> {
        let tag = Tag::of(cookie);
        if status == Status::Ok && cookie & THEN_FLUSH != 0 {
            return match self.try_submit(bare(Op::Flush, tag.cookie())) {
                Ok(()) => None,
                Err((_, status)) => Some((tag, Err(error_code(status)))),
            };
        }
        if status == Status::Ok {
            return Some((tag, Ok(())));
        }
        tracing::debug!(bdev = self.channel.info().name, ?status, "I/O failed");
        Some((tag, Err(error_code(status))))
    }

    /// Ends what can be ended of a client that waits for nothing any more.
    pub(super) fn cut_short(&mut self, client: u32) {
        self.channel.cut_short(|cookie| Tag::of(cookie).client == client);
    }

    /// After completions there may be room for what waited; answers to what was refused.
    pub(super) fn resubmit(&mut self, mut answer: impl FnMut(Tag, ErrorCode)) {
        while let Some(request) = self.waiting.pop_front() {
            let before = self.waiting.len();
            if let Err((tag, status)) = self.try_submit(request) {
                answer(tag, error_code(status));
            } else if self.waiting.len() > before {
                return;
            }
        }
    }

    /// To the channel, or to the head of the queue if that is full.
    fn try_submit(&mut self, request: IoRequest) -> Result<(), (Tag, Status)> {
        match self.channel.submit(request) {
            Ok(()) => Ok(()),
            // With nothing in flight no completion would bring it back.
            Err(r) if r.status == Status::Busy && self.channel.inflight() > 0 => {
                self.waiting.push_front(r.request);
                Ok(())
            }
            Err(r) => Err((Tag::of(r.request.cookie), r.status)),
        }
    }

    /// As the bdev has it. Range and alignment were checked against the export, and will be against the bdev.
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
        Ok(IoRequest {
            op,
            flags,
            lba: incoming.request.offset() >> self.shift,
            blocks: incoming.request.len() >> self.shift,
            segments: incoming.segments,
            cookie: tag.cookie() | then,
        })
    }
}

fn bare(op: Op, cookie: u64) -> IoRequest {
    IoRequest { op, flags: Flags::NONE, lba: 0, blocks: 0, segments: Segments::new(), cookie }
}
