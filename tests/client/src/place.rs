//! Where the table runs: how to reach the server under test, and what it was configured with.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::Value;
use verbs::Cm;

/// A server under test. It must offer these device paths, each on a bdev of its own:
///
/// | name      | block | size              |                                   |
/// |-----------|-------|-------------------|-----------------------------------|
/// | `m512`    | 512   | at least 8 MiB    | discard and write zeroes          |
/// | `m4k`     | 4096  | at least 8 MiB    |                                   |
/// | `slow`    | 512   | at least 8 MiB    | every I/O takes [`Place::delay`]  |
/// | `witness` | 512   | at least 8 MiB    | for the bystander                 |
pub trait Place {
    /// A connection manager of a client host.
    ///
    /// # Errors
    /// The provider's refusal.
    fn cm(&self) -> Result<Box<dyn Cm>, Box<dyn Error>>;
    /// Where the server listens.
    fn dst(&self) -> SocketAddr;
    /// Client address number `n`, all different; `None` if there is none, or the system chooses (0).
    fn src(&self, n: usize) -> Option<IpAddr>;
    /// How many client addresses there are.
    fn src_count(&self) -> usize;
    /// How long any one thing may take.
    fn timeout(&self) -> Duration;
    /// After which the server closes paths that do not come up.
    fn half_open(&self) -> Duration;
    /// Latency of `slow`.
    fn delay(&self) -> Duration;
    /// The server's limits of sessions, connections; `None` if a test must not try to reach them.
    fn limits(&self) -> Option<(usize, usize)>;
    /// Memory windows, on both sides, are as IBTA wants them, and can be invalidated. Those of rxe are not: bounds are
    /// those of the region below (`rxe_resp.c`, `check_rkey`), a retransmission repeats the binds behind it, which
    /// fail the second time (`rxe_req.c`, `req_retry`), and type 1, which rdma-core prefers, knows no invalidation.
    fn exact_windows(&self) -> bool;
    /// Names of the server's sessions, one for each path.
    ///
    /// # Errors
    /// The server does not answer.
    fn paths(&self) -> Result<Vec<String>, Box<dyn Error>>;
}

/// From the result of `rnbd_get_sessions`: the session's name for each path, and for a session without any.
pub fn session_of_each_path(sessions: &Value) -> Vec<String> {
    let rows = sessions.as_array().into_iter().flatten();
    let names = |s: &Value| {
        let paths = s["paths"].as_array().map_or(0, Vec::len);
        std::iter::repeat_n(s["session"].as_str().unwrap_or_default().to_owned(), paths.max(1))
    };
    rows.flat_map(names).collect()
}
