//! The layer above: what it submits, and what it must offer to hear of the results.

use std::sync::Arc;
use std::time::Instant;

use iobuf::Segment;
use reactor::{Polled, Turn};
use rtrs_proto::Errno;

use super::lane::{Io, SessionKey};
use super::path::PathId;
use super::session::Session;

/// Which connection a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// Con 0 of some path, for administration. Only the first reactor of a session has it.
    Service,
    /// One of the reactor's others; con 0 if paths have no other.
    Io,
}

/// Where a request's data comes from or goes to. The memory must lie in regions of the [`iobuf::Registry`] given to
/// [`super::Client::install`], and stay as it is and untouched by others until the request has completed: a request
/// that fails over is sent once more from the same memory.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// RTRS WRITE: these pieces, at most [`super::Limits::max_pieces`], go to the server. May be empty.
    Write(&'a [Segment]),
    /// RTRS READ: the server's data comes here, exactly as many bytes, or none if it fails; `None` if it has none to
    /// give.
    Read(Option<Segment>),
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Submit<'a> {
    /// By which connection.
    pub via: Via,
    /// User message, at most [`crate::MAX_USR_LEN`] bytes. Copied at once.
    pub usr: &'a [u8],
    /// Its data, at most [`super::Limits::max_io_size`] bytes.
    pub data: Data<'a>,
    /// Comes back in [`Upper::completed`].
    pub cookie: u64,
}

/// One per reactor, beside the lane that serves it.
///
/// For each session: [`Upper::session_up`], then any number of requests and completions, then
/// [`Upper::session_down`], and so on. The [`SessionKey`] is the same each time. The loss of a path is not heard of
/// here as long as another one is up: its requests fail over by themselves.
pub trait Upper: 'static {
    /// The server has made the session, for the first time or anew: what was said in it before (SESS_INFO, OPEN) has
    /// to be said again. Requests may be submitted from now on.
    fn session_up(&mut self, cx: &mut Turn<'_>, io: &mut Io, key: SessionKey, session: &Arc<Session>);

    /// A request has ended. Exactly once for every [`Io::submit`] that returned `Ok`, and never from within it.
    ///
    /// ECONNABORTED, which no server sends: the session lost its last path first, and nobody knows whether the
    /// server has executed, or is still executing, the request. [`Upper::session_down`] follows at once.
    fn completed(
        &mut self,
        cx: &mut Turn<'_>,
        io: &mut Io,
        key: SessionKey,
        cookie: u64,
        result: Result<(), Errno>,
    );

    /// `path` was lost with a request in flight, which now waits for another path: the server may still execute what
    /// came by `path`, even after the repeated request has completed, until it lets that path connect again.
    fn failing_over(&mut self, cx: &mut Turn<'_>, key: SessionKey, cookie: u64, path: PathId) {
        let _ = (cx, key, cookie, path);
    }

    /// The session has no path any more, and none of its requests is in flight: no queue pair is left by which the
    /// server could touch their memory. Requests are refused until it comes up again.
    fn session_down(&mut self, cx: &mut Turn<'_>, io: &mut Io, key: SessionKey);

    /// Once per turn, after all completions: submit what waits. True if there was anything to do.
    fn poll(&mut self, cx: &mut Turn<'_>, io: &mut Io) -> bool;

    /// About to sleep; `Busy` vetoes.
    fn before_sleep(&mut self, cx: &mut Turn<'_>) -> Polled {
        let _ = cx;
        Polled::Idle
    }

    /// When `poll` must run though nothing fires.
    fn deadline(&self) -> Option<Instant> {
        None
    }
}
