//! Why a path did not come up or went down, why a session ended, and why a request was not taken.

use std::time::Duration;

use rtrs_proto::Errno;
use rtrs_proto::client::TooLong;

/// The end of a path, or why there was none.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// The server answered no, with an errno.
    #[error("con {cid}: the server refused: {errno}{}", hint(*.errno))]
    Refused {
        /// Which connection.
        cid: u16,
        /// As the kernel's client reports it.
        errno: Errno,
    },
    /// Nobody listens there, or the transport refused for another reason.
    #[error("con {cid}: refused by the peer's connection manager (reason {reason}{})", if *.reason == 8 { ": nobody listens" } else { "" })]
    NoListener {
        /// Which connection.
        cid: u16,
        /// IB CM reason code.
        reason: i32,
    },
    /// No answer in time.
    #[error("no answer to {what} within {within:?}")]
    Timeout {
        /// To what.
        what: String,
        /// How long was waited.
        within: Duration,
    },
    /// The server said something impossible.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
    /// The server offers something else than on the session's other paths.
    #[error("the server does not fit the session: {0}")]
    Misfit(String),
    /// A call of the provider failed, or it reported an error.
    #[error("{0}")]
    Verbs(String),
    /// The server ended the path when it heard the session's name. It gives no reason; the only one there should be is that
    /// another session has the name (`rtrs-srv.c`, process_info_req).
    #[error(
        "the server ended the connection when it heard the session's name: most likely another client has that name, or one that crashed still does"
    )]
    NameRefused,
    /// A connected path was lost.
    #[error("path lost: {0}")]
    Lost(String),
    /// By [`super::Client::disconnect_path`], or because its session or the path itself was given up.
    #[error("disconnected on request")]
    Disconnected,
    /// By [`super::Client::reconnect_path`].
    #[error("reconnecting on request")]
    Reconnect,
}

/// What the errno of a refusal means here (`rtrs_rdma_connect`).
fn hint(errno: Errno) -> &'static str {
    match errno {
        Errno::EEXIST => " (it still has a path of this session between the same addresses)",
        Errno::ENXIO => " (it does not know this session: is it another server?)",
        Errno::ECONNRESET => {
            " (it has not closed the path's former connections yet, or does not want any more)"
        }
        _ => "",
    }
}

impl PathError {
    /// The errno that the kernel's client would give for it.
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Refused { errno, .. } => *errno,
            Self::Timeout { .. } => Errno::ETIMEDOUT,
            Self::Misfit(_) => Errno::EINVAL,
            _ => Errno::ECONNRESET,
        }
    }
}

/// Why a session is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionEnd {
    /// By [`super::Client::close_session`] or [`super::Client::shutdown`].
    #[error("closed on request")]
    Closed,
    /// [`super::SessionOptions::loss_timeout`].
    #[error("no path within {after:?}; the last failure: {last}")]
    LossTimeout {
        /// The time that was given.
        after: Duration,
        /// What the last failed attempt said; "none was made" if so.
        last: String,
    },
}

/// A control call that did nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// No session of that id.
    #[error("no such session")]
    NoSession,
    /// No path of that id in the session.
    #[error("no such path in the session")]
    NoPath,
    /// A session of that name exists already.
    #[error("a session '{0}' exists already: add paths to it, or choose another name")]
    SessionExists(String),
    /// The session has a path between the same addresses.
    #[error("the session already has a path {0}")]
    PathExists(String),
    /// More paths than the protocol has room for.
    #[error("a session has at most {0} paths")]
    TooManyPaths(usize),
    /// None of the providers asked for is there.
    #[error("provider '{asked}' is not available; available: {have}")]
    Provider {
        /// As asked for.
        asked: String,
        /// What there is.
        have: String,
    },
    /// Options that no session can have.
    #[error("{0}")]
    Options(String),
    /// Not in this state.
    #[error("the path is {state}: {hint}")]
    Busy {
        /// The state it is in.
        state: &'static str,
        /// What to do.
        hint: &'static str,
    },
}

impl ControlError {
    /// The errno that the kernel's client would give for it.
    pub const fn errno(&self) -> Errno {
        match self {
            Self::NoSession | Self::NoPath | Self::Provider { .. } => Errno::ENODEV,
            Self::SessionExists(_) | Self::PathExists(_) => Errno::EEXIST,
            Self::TooManyPaths(_) => Errno::ENOMEM,
            Self::Options(_) => Errno::EINVAL,
            Self::Busy { .. } => Errno::EBUSY,
        }
    }
}

/// A request that was not taken: no completion of it will come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// All buffer ids of this reactor, or all queue entries, are in use: an ordinary answer, try again next turn or
    /// after a completion.
    #[error("all buffers of the session are in use")]
    Busy,
    /// The session is down; or its paths are all being lost right now, and either one comes up, or the session goes
    /// down. Hold the request until [`super::Upper::session_up`], or try again next turn.
    #[error("the session is not connected")]
    Down,
    /// Con 0 is not on this reactor.
    #[error("the service connection is on another reactor")]
    NoServiceCon,
    /// Data outside the regions that are registered with the path's device. Copy it to a buffer that is inside. A
    /// region that was just made is registered a little later, by itself.
    #[error("data outside all registered regions")]
    Unregistered,
    /// The user message does not fit.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// More data than [`super::Limits::max_io_size`].
    #[error("{got} bytes of data, the session takes {most}")]
    TooMuchData {
        /// In the request.
        got: u64,
        /// Of the session.
        most: u32,
    },
    /// More pieces of data than [`super::Limits::max_pieces`].
    #[error("data in {got} pieces, the session takes {most}")]
    Pieces {
        /// In the request.
        got: usize,
        /// Of the session.
        most: usize,
    },
}

impl Refused {
    /// As the layer above reports it.
    pub const fn errno(self) -> Errno {
        match self {
            Self::Busy => Errno::EBUSY,
            Self::Down => Errno::ECONNABORTED,
            Self::NoServiceCon | Self::Unregistered => Errno::EINVAL,
            Self::TooLong(_) | Self::TooMuchData { .. } | Self::Pieces { .. } => Errno::EMSGSIZE,
        }
    }
}
