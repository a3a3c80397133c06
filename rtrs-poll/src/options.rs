//! What an operator may choose about an RTRS server.

use std::time::Duration;

use rtrs_proto::heartbeat;
use rtrs_proto::limits::Geometry;
use rtrs_proto::response::{Keys, Policy, ReadStyle};

/// Options of a [`crate::Server`], fixed once it listens.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queue depth and sizes of every session.
    pub geometry: Geometry,
    /// Change each chunk's key with every request, as the kernel server's `always_invalidate=Y`.
    pub rotate_rkeys: bool,
    /// How reads are answered while keys are static. `OneMessage` is faster, but only for clients of Linux 6.12 and
    /// later: earlier ones count a reference too many when they have to invalidate a read's key themselves, and the
    /// request never ends (`rtrs-clt.c`, `complete_rdma_req`; seen with 6.1). Nothing on the wire tells them apart.
    pub reads: ReadStyle,
    /// Interval and patience.
    pub heartbeat: heartbeat::Config,
    /// A path whose connections and INFO_REQ have not all come by then is closed.
    pub half_open_timeout: Duration,
    /// Sessions at once.
    pub max_sessions: u32,
    /// Paths at once, over all sessions.
    pub max_paths: u32,
    /// Connections at once, over all sessions.
    pub max_connections: u32,
    /// Bytes of chunks and queues at once: a path that is up has `queue_depth * (max_io_size + max_hdr_size)` bytes of
    /// chunks. `None`: half of the memory that the process may use.
    pub max_memory: Option<u64>,
    /// What one source ([`quota::Source`]) may have of each of these limits, percent, 1 to 100.
    pub share_percent: u8,
}

impl Options {
    /// How requests are answered.
    pub(crate) const fn policy(&self) -> Policy {
        let keys = if self.rotate_rkeys { Keys::Rotating } else { Keys::Static };
        Policy { keys, reads: self.reads }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            geometry: Geometry::default(),
            rotate_rkeys: false,
            reads: ReadStyle::Invalidate,
            heartbeat: heartbeat::Config::default(),
            half_open_timeout: Duration::from_secs(30),
            max_sessions: 64,
            max_paths: 128,
            max_connections: 4096,
            max_memory: None,
            share_percent: 25,
        }
    }
}
