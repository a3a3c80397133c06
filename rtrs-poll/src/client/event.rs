//! What the layer above hears on the control thread.

use std::sync::Arc;
use std::time::Duration;

use super::error::{PathError, SessionEnd};
use super::path::PathId;
use super::session::{Session, SessionId};

/// What becomes of sessions and their paths. Sent in the order of what happened.
///
/// ```text
///  create_session ─▶ (PathDown)* ─▶ PathUp, SessionUp ─▶ (PathUp | PathDown)* ─▶ SessionDown ─┐ ─▶ SessionEnded
///                                     ▲───────────────────────────────────────────────────────┘
/// ```
#[derive(Clone, Debug)]
pub enum Event {
    /// The first path of a session came up, and reactors hear [`super::Upper::session_up`] now. The server's session
    /// is to be taken for a new one: send SESS_INFO, and open everything again.
    SessionUp {
        /// Which.
        session: Arc<Session>,
        /// 1 for the first time, and one more each time.
        generation: u64,
    },
    /// A path is connected.
    PathUp {
        /// Of which session.
        session: SessionId,
        /// Which.
        path: PathId,
    },
    /// An attempt to connect a path failed, or a connected one was lost; nothing of it is left.
    PathDown {
        /// Of which session.
        session: SessionId,
        /// Which.
        path: PathId,
        /// Why.
        why: PathError,
        /// Until the next attempt; `None`: there will be none by itself.
        next_attempt: Option<Duration>,
    },
    /// [`super::Client::remove_path`] is done: the path is forgotten.
    PathRemoved {
        /// Of which session.
        session: SessionId,
        /// Which.
        path: PathId,
    },
    /// The last path of a connected session was lost, and all reactors have heard [`super::Upper::session_down`].
    SessionDown {
        /// Which.
        session: SessionId,
    },
    /// A session without any path that is up, or will be tried by itself: attempts are exhausted, or paths were
    /// disconnected or removed. [`super::Client::reconnect_path`] and [`super::Client::add_path`] revive it.
    SessionStalled {
        /// Which.
        session: SessionId,
    },
    /// The session is forgotten, on all reactors. Exactly once for every [`super::Client::create_session`] that
    /// returned `Ok`, and the last one of it.
    SessionEnded {
        /// Which.
        session: SessionId,
        /// Why.
        why: SessionEnd,
    },
}
