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
    /// chunks. `None`: half of the memory that the process may use, or what one path needs if that is more.
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

    /// Bytes that a path of two connections takes, about: with less in [`Options::max_memory`] nobody gets in.
    pub fn least_memory(&self) -> u64 {
        u64::from(self.geometry.total_bytes()) + 2 * self.queue_bytes()
    }

    /// Bytes that the queues of one connection take, about.
    pub(crate) fn queue_bytes(&self) -> u64 {
        let (send, receive) = queue_lengths(self.geometry, self.policy());
        u64::from(send + receive) * BYTES_PER_REQUEST
    }
}

/// Receives beyond the queue depth, for heartbeats and their answers.
pub(crate) const SPARE_RECEIVES: u32 = 16;
/// Memory of one work request: here and in the provider. 1024 connections of depth 64 took 57 MiB with soft-roce, which is
/// 173 each.
const BYTES_PER_REQUEST: u64 = 192;

/// Sends and receives that a connection can have waiting: each answer is one send, with rotating keys or separate
/// invalidations up to five.
pub(crate) fn queue_lengths(geometry: Geometry, policy: Policy) -> (u32, u32) {
    let depth = u32::from(geometry.queue_depth());
    let per_request = match (policy.keys, policy.reads) {
        (Keys::Rotating, _) => 5,
        (Keys::Static, ReadStyle::Invalidate) => 3,
        (Keys::Static, ReadStyle::OneMessage) => 1,
    };
    (depth * per_request + 64, depth + SPARE_RECEIVES + 1)
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
