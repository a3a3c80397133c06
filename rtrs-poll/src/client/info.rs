//! How sessions and paths are doing, for people and RPC.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::options::{Policy, Reconnect};
use super::path::{PathId, PathStats};
use super::session::{Limits, SessionId};

/// One session.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// Which.
    pub id: SessionId,
    /// Its name at the server.
    pub name: String,
    /// Requests can be executed.
    pub connected: bool,
    /// How often it has been connected.
    pub generation: u64,
    /// Once it has been connected.
    pub limits: Option<Limits>,
    /// Connections of each path.
    pub connections: u16,
    /// Which path a request takes.
    pub policy: Policy,
    /// When to try again.
    pub reconnect: Reconnect,
    /// When to give up.
    pub loss_timeout: Option<Duration>,
    /// In the order in which they were added.
    pub paths: Vec<PathInfo>,
}

/// One path of a session.
#[derive(Clone, Debug)]
pub struct PathInfo {
    /// Which.
    pub id: PathId,
    /// How far it is.
    pub state: PathState,
    /// Provider in use, or to be tried next.
    pub provider: String,
    /// Our address, if it was asked for.
    pub src: Option<IpAddr>,
    /// The server's.
    pub dst: SocketAddr,
    /// Name of the RDMA device (`hca_name`), once an address was resolved.
    pub hca_name: Option<String>,
    /// Its port (`hca_port`), counted from 1.
    pub hca_port: u8,
    /// Round trip of the last heartbeat in nanoseconds (`cur_latency`), 0 before the first.
    pub latency_ns: u64,
    /// Each answer of the server brings its buffer's next key.
    pub rotating_keys: bool,
    /// Counters.
    pub stats: PathStats,
    /// Why it is not connected, or was not the last time.
    pub last_error: Option<String>,
    /// It has requests in flight and has answered none for so long, if that is some seconds.
    pub silent: Option<Duration>,
    /// Until the next attempt, if one is due.
    pub next_attempt: Option<Duration>,
}

/// How far a path is. The kernel's sysfs only says `connected` or `disconnected`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathState {
    /// Connections are being made, or INFO_REQ is unanswered.
    Connecting,
    /// Requests may take it.
    Connected,
    /// Waits for the next attempt, or for the session's first path.
    Reconnecting,
    /// Connections are being given up.
    Closing,
    /// Left alone until [`super::Client::reconnect_path`].
    Closed,
}

impl PathState {
    /// In lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Reconnecting => "reconnecting",
            Self::Closing => "closing",
            Self::Closed => "closed",
        }
    }

    /// `connected` or `disconnected`, as the kernel's `paths/…/state`.
    pub const fn kernel_name(self) -> &'static str {
        if matches!(self, Self::Connected) { "connected" } else { "disconnected" }
    }
}
