//! How things ended.

use std::fmt;

use rtrs_proto::Errno;

/// What came of something that a client did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered without errno.
    Ok,
    /// Answered with this errno.
    Errno(Errno),
    /// The connection request was rejected with this (negative) errno.
    Rejected(i16),
    /// The server disconnected every connection of the path.
    PathClosed,
    /// Nothing happened in time.
    Timeout,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.pad("ok"),
            Self::Errno(e) => f.pad(&e.to_string()),
            Self::Rejected(n) => f.pad(&format!("rejected {n}")),
            Self::PathClosed => f.pad("path closed"),
            Self::Timeout => f.pad("timeout"),
        }
    }
}

/// A path did not come up.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The server said no; its errno as sent, negative.
    #[error("rejected with errno {0}")]
    Rejected(i16),
    /// Rejected by the transport, with its reason code.
    #[error("rejected by the transport, reason {0}")]
    Transport(i32),
    /// Lost or impossible.
    #[error("connection failed: {0}")]
    Failed(String),
    /// The server disconnected instead of answering INFO_REQ.
    #[error("path closed by the server")]
    Closed,
    /// Nothing came in time.
    #[error("timed out waiting for {0}")]
    Timeout(&'static str),
    /// The server's answer breaks the protocol.
    #[error("the server breaks the protocol: {0}")]
    Protocol(String),
    /// A verbs call failed.
    #[error(transparent)]
    Verbs(#[from] verbs::Error),
    /// A work request could not be posted.
    #[error(transparent)]
    Post(#[from] verbs::PostError),
    /// No memory for buffers.
    #[error(transparent)]
    Map(#[from] iobuf::MapError),
}

impl ConnectError {
    /// The outcome that a table expects; the error itself if it is none of the server's doing.
    ///
    /// # Errors
    /// Itself.
    pub fn outcome(self) -> Result<Outcome, Self> {
        match self {
            Self::Rejected(n) => Ok(Outcome::Rejected(n)),
            Self::Closed => Ok(Outcome::PathClosed),
            Self::Timeout(_) => Ok(Outcome::Timeout),
            other => Err(other),
        }
    }
}
