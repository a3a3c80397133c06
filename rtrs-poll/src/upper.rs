//! The layer above: what a front end (RNBD) must offer to receive requests.

use std::time::Instant;

use iobuf::Segment;
use reactor::{Polled, Turn};
use rtrs_proto::request::Direction;

use crate::lane::Io;

/// A request being executed, by its slot on its reactor. Valid until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReqId(pub u32);

/// One request of a client.
pub struct Incoming<'a> {
    /// Names it in [`Io::reply`], which must be called exactly once.
    pub req: ReqId,
    /// Whose: [`crate::Session::key`]. [`Io::path`] knows more.
    pub session: u32,
    /// User message, a private copy: 0..=[`MAX_USR_LEN`] bytes.
    pub usr: &'a [u8],
    /// Room for data (read) or the data (write); `None` if the request has none. Alive and unshared until the reply,
    /// but for what the client itself may write into it.
    pub data: Option<Segment>,
    /// Which way the data goes.
    pub direction: Direction,
}

/// Longest user message handed up; longer ones are answered with EMSGSIZE.
pub const MAX_USR_LEN: usize = 512;

/// One per reactor, beside the lane that feeds it.
pub trait Upper: 'static {
    /// Starts a request. The reply may come at once or later, also from another message or poll of this reactor.
    fn request(&mut self, cx: &mut Turn<'_>, io: &mut Io, incoming: Incoming<'_>);

    /// Once per turn, after all requests: hand batches to devices, collect completions, reply.
    fn poll(&mut self, cx: &mut Turn<'_>, io: &mut Io) -> bool;

    /// About to sleep; `Busy` vetoes.
    fn before_sleep(&mut self, cx: &mut Turn<'_>) -> Polled;

    /// When `poll` must run though nothing fires.
    fn deadline(&self) -> Option<Instant>;
}
