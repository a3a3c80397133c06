//! Administration on con 0: one call at a time, with the answer in a buffer of its own.

use std::collections::VecDeque;
use std::sync::Arc;

use iobuf::{Region, Segment};
use rnbd_proto::Errno;
use rnbd_proto::wire::{MsgClose, MsgOpen, MsgOpenRsp, MsgSessInfo};
use rtrs_poll::client::{Data, Io, Refused, SessionKey, Submit, Via};
use zerocopy::{FromBytes, IntoBytes};

use super::lane::ADMIN_COOKIE;

/// Bytes of data memory that answers need.
pub(super) const ANSWER_ROOM: usize = size_of::<MsgOpenRsp>();

/// What is asked.
pub(super) enum Ask {
    SessInfo,
    Open(Box<MsgOpen>),
    Close(MsgClose),
}

/// What came back.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    SessInfo(MsgSessInfo),
    Open(MsgOpenRsp),
    Closed,
}

/// One call of the control thread, by its number there.
pub(super) struct Call {
    pub number: u64,
    pub ask: Ask,
}

/// The calls of one session, on the reactor that has its con 0.
pub(super) struct Admin {
    pub key: SessionKey,
    answers: Arc<Region>,
    queue: VecDeque<Call>,
    current: Option<Call>,
}

impl Admin {
    /// `answers`: at least [`ANSWER_ROOM`] bytes of registered memory for this session alone.
    pub fn new(key: SessionKey, answers: Arc<Region>) -> Self {
        Self { key, answers, queue: VecDeque::new(), current: None }
    }

    pub fn push(&mut self, call: Call) {
        self.queue.push_back(call);
    }

    /// Something could not be sent yet.
    pub fn waits(&self) -> bool {
        self.current.is_none() && !self.queue.is_empty()
    }

    /// Sends the next call if none is on its way. Returns one that cannot be sent, with the reason.
    pub fn advance(&mut self, io: &mut Io) -> Option<(Call, Errno)> {
        if self.current.is_some() {
            return None;
        }
        let call = self.queue.pop_front()?;
        match self.send(io, &call.ask) {
            Ok(()) => self.current = Some(call),
            // A session that is going down says so soon, and memory that was just made is registered soon.
            Err(Refused::Busy | Refused::Down | Refused::Unregistered) => self.queue.push_front(call),
            Err(refused) => return Some((call, refused.errno())),
        }
        None
    }

    fn send(&self, io: &mut Io, ask: &Ask) -> Result<(), Refused> {
        let sess_info = MsgSessInfo::request();
        let (usr, room) = match ask {
            Ask::SessInfo => (sess_info.as_bytes(), size_of::<MsgSessInfo>()),
            Ask::Open(message) => (message.as_bytes(), size_of::<MsgOpenRsp>()),
            Ask::Close(message) => (message.as_bytes(), 0),
        };
        let data = if room == 0 { Data::Write(&[]) } else { Data::Read(self.room(room)) };
        io.submit(self.key, &Submit { via: Via::Service, usr, data, cookie: ADMIN_COOKIE })
    }

    /// Clears the room for an answer, so that nothing of an earlier one is taken for it.
    fn room(&self, len: usize) -> Option<Segment> {
        let cleared = self.answers.zero(0, ANSWER_ROOM, false);
        debug_assert!(cleared, "the region has room for every answer");
        // SAFETY: `self` keeps the region until RTRS has ended the call: it does so before `session_down`, after which
        // alone the lane drops an `Admin`.
        unsafe { self.answers.segment(0, len) }
    }

    /// The call on its way has ended. Types of answers are not looked at, as by the kernel's client.
    pub fn completed(&mut self, result: Result<(), Errno>) -> Option<(Call, Result<Answer, Errno>)> {
        let call = self.current.take()?;
        let answer = result.map(|()| match call.ask {
            Ask::SessInfo => Answer::SessInfo(self.answer()),
            Ask::Open(_) => Answer::Open(self.answer()),
            Ask::Close(_) => Answer::Closed,
        });
        Some((call, answer))
    }

    fn answer<M: FromBytes + IntoBytes>(&self) -> M {
        let mut message = M::new_zeroed();
        let inside = self.answers.copy_out(0, message.as_mut_bytes());
        debug_assert!(inside, "the region has room for every answer");
        message
    }

    /// Calls that were never answered.
    pub fn into_unsent(self) -> impl Iterator<Item = Call> {
        self.current.into_iter().chain(self.queue)
    }
}
