//! What an operator may choose about an RTRS server.

use std::time::Duration;

use rtrs_proto::heartbeat;
use rtrs_proto::limits::Geometry;
use rtrs_proto::response::ReadStyle;

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
    /// Sessions at once; each pins `queue_depth * (max_io_size + max_hdr_size)` bytes per path.
    pub max_sessions: u32,
    /// Paths at once, over all sessions.
    pub max_paths: u32,
    /// Connections at once, over all sessions.
    pub max_connections: u32,
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
        }
    }
}
