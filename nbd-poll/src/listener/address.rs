//! Where a server listens, and who came.

use quota::Source;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
    /// Nowhere: one client is on standard input and output.
    Stdio,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(addr) => addr.fmt(f),
            Self::Stdio => f.write_str("standard input"),
        }
    }
}

/// The other end of an accepted socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A process of this host, as it was when it connected.
    Unix {
        /// Process; 0 if it is of another PID name space.
        pid: u32,
        /// User.
        uid: u32,
    },
    /// Over TCP.
    Tcp(SocketAddr),
}

impl Peer {
    /// Whom it counts for, where many share what there is.
    pub fn source(&self) -> Source {
        match self {
            Self::Unix { uid, .. } => Source::User(*uid),
            Self::Tcp(address) => Source::of(address.ip()),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { pid, uid } => write!(f, "process {pid} (user {uid})"),
            Self::Tcp(addr) => addr.fmt(f),
        }
    }
}
