//! The end of a connection, and what comes after it.

use std::io;

use nbd_proto::client::Violation;

use crate::stream::Moved;
use crate::tls::pipe::Pipe;

/// System calls of one look.
const CALLS_PER_TURN: usize = 16;

/// Why a connection has ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The server closed it between two replies.
    #[error("the server has closed the connection")]
    Closed,
    /// The server closed it in the middle of a reply.
    #[error("the server has closed the connection in the middle of a reply")]
    Truncated,
    /// The server does not speak NBD, or no dialect that was agreed upon.
    #[error("the server broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// A write was answered before the server can have had its data.
    #[error("the server broke the protocol: it answered a request that was not sent completely")]
    Early,
    /// The socket failed.
    #[error("the connection has failed: {0}")]
    Failed(#[from] io::Error),
    /// It was given up here: why.
    #[error("{0}")]
    GivenUp(String),
}

impl End {
    /// The server itself has let go of the connection, so it does not read from it any more. Otherwise it may still be
    /// working on requests that it has, or find more of them in its socket.
    pub fn is_servers(&self) -> bool {
        matches!(self, Self::Closed | Self::Truncated)
    }
}

/// What is left of a connection that was given up here, while the server may still be working for it.
#[derive(Debug)]
pub struct Remains {
    pub(super) pipe: Pipe,
}

impl Remains {
    /// Whether the server has closed its side by now: it has read all there was, and will answer nothing more. Throws
    /// away what it still sends, within a budget.
    pub fn is_closed(&mut self) -> bool {
        let mut bytes = [0u8; 4096];
        for _ in 0..CALLS_PER_TURN {
            let piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            // SAFETY: `bytes` is exclusively borrowed.
            match unsafe { self.pipe.read_raw(&[piece]) } {
                Ok(Moved::Some(_)) => {}
                Ok(Moved::WouldBlock) => return false,
                Ok(Moved::End) => return true,
                // A connection that has failed says nothing of what the server does.
                Err(_) => return false,
            }
        }
        false
    }

    /// Waits no longer: what was not sent is thrown away, and the server hears of a reset.
    pub fn abort(mut self) {
        self.pipe.reset_on_close();
    }
}
