//! What is connected, for listings.

use std::net::IpAddr;
use std::time::Instant;

use quota::Limit;
use rtrs_proto::admission::Resource;

use super::Server;
use crate::path::{Path, PathStats};
use crate::upper::Upper;

/// One path.
#[derive(Clone, Debug)]
pub struct PathInfo {
    /// `client@server`, as the kernel names it in sysfs.
    pub name: String,
    /// The client's address.
    pub src: String,
    /// Ours.
    pub dst: String,
    /// RDMA device.
    pub device: String,
    /// Its provider.
    pub provider: &'static str,
    /// `connecting`, `connected`, `draining`, `closing`.
    pub state: &'static str,
    /// Connections announced.
    pub connections: usize,
    /// By connection: index of the reactor that polls it.
    pub reactors: Vec<usize>,
    /// Last heartbeat round trip, 0 before the first.
    pub heartbeat_ns: u64,
    /// Seconds since its first connection.
    pub age_sec: u64,
    /// Requests and bytes.
    pub stats: PathStats,
}

/// One session.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// From INFO_REQ; empty while no path has come up.
    pub name: String,
    /// The client's uuid.
    pub uuid: String,
    /// Requests being executed.
    pub inflight: usize,
    /// Chunks per path.
    pub queue_depth: u16,
    /// Bytes of each chunk.
    pub chunk_size: u32,
    /// Addresses of its paths that are up.
    pub peers: Vec<IpAddr>,
    /// Its paths.
    pub paths: Vec<PathInfo>,
}

/// `client@server`, each as `ip:address`.
pub(super) fn path_name(path: &Path) -> String {
    format!("ip:{}@ip:{}", path.peer.ip().to_canonical(), path.local.ip().to_canonical())
}

impl<U: Upper> Server<U> {
    /// All sessions with their paths, by name.
    pub fn sessions(&self, now: Instant) -> Vec<SessionInfo> {
        let mut all: Vec<SessionInfo> = self
            .sessions
            .iter()
            .map(|(id, s)| SessionInfo {
                name: s.name().into(),
                uuid: s.uuid.to_string(),
                inflight: s.inflight(),
                queue_depth: self.options.geometry.queue_depth(),
                peers: s.peers(),
                chunk_size: self.options.geometry.chunk_size(),
                paths: self.paths.values().filter(|p| p.session_id == *id).map(|p| p.info(now)).collect(),
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

impl<U: Upper> Server<U> {
    /// What clients have of each resource, and its bound.
    pub fn in_use(&self) -> impl Iterator<Item = (Resource, u64, Limit)> {
        self.table.in_use()
    }

    /// Resets the counters of all paths that match.
    pub fn reset_path_stats(&self, session: Option<&str>, path: Option<&str>) {
        let matches = |p: &Path| {
            session.is_none_or(|s| s == p.session.name()) && path.is_none_or(|w| w == path_name(p))
        };
        self.paths.values().filter(|e| matches(&e.path)).for_each(|e| e.path.reset_stats());
    }
}

impl super::PathEntry {
    fn info(&self, now: Instant) -> PathInfo {
        let p = &self.path;
        PathInfo {
            name: path_name(p),
            src: format!("ip:{}", p.peer.ip().to_canonical()),
            dst: format!("ip:{}", p.local.ip().to_canonical()),
            device: p.device.clone(),
            provider: p.provider,
            state: p.state_name(),
            connections: self.cons.len(),
            reactors: self.cons.iter().flatten().map(|c| c.lane).collect(),
            heartbeat_ns: p.latency_ns(),
            age_sec: now.saturating_duration_since(self.since).as_secs(),
            stats: p.stats(),
        }
    }
}
