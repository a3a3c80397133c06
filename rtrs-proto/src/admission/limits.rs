//! What clients can make a server keep, and how much of it.

use std::fmt;

use quota::Limit;

use crate::wire::MAX_CID_NUM;

/// Bounds on what clients can make a server keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sessions.
    pub max_sessions: usize,
    /// Paths of all sessions.
    pub max_paths: usize,
    /// Connections of all paths; each has a queue pair.
    pub max_connections: usize,
    /// Bytes of chunks and queues.
    pub max_memory: u64,
    /// Bytes of the chunks of one path, which it gets when it comes up.
    pub path_bytes: u64,
    /// Bytes of the queues of one connection, about.
    pub connection_bytes: u64,
    /// What one source may have of each limit, 1 to 100.
    pub share_percent: u8,
    /// Connections of unproved paths, which count towards no other limit.
    pub max_unproved: usize,
    /// Connections per path, at most 4096. A kernel client has one more than it has CPUs.
    pub max_cid_num: u16,
    /// A path must be up so long after its first connection. Kernel clients take up to 30 s per step.
    pub half_open_ns: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_sessions: 64,
            max_paths: 128,
            max_connections: 4096,
            max_memory: u64::MAX,
            path_bytes: 0,
            connection_bytes: 0,
            share_percent: 25,
            max_unproved: 128,
            max_cid_num: MAX_CID_NUM,
            half_open_ns: 35_000_000_000,
        }
    }
}

/// Connections of a path that a client has on a machine of usual size: one more than it has CPUs.
const USUAL_CONNECTIONS: u16 = 65;

impl Limits {
    /// Bytes of a path as clients have them: a source gets at least so much.
    pub fn usual_path(&self) -> u64 {
        let connections = u64::from(USUAL_CONNECTIONS.min(self.max_cid_num));
        self.path_bytes.saturating_add(self.connection_bytes.saturating_mul(connections))
    }

    /// The bound on a resource.
    pub fn of(&self, resource: Resource) -> Limit {
        let (total, unit) = match resource {
            Resource::Sessions => (self.max_sessions as u64, 1),
            Resource::Paths => (self.max_paths as u64, 1),
            Resource::Connections => (self.max_connections as u64, 1),
            Resource::Memory => (self.max_memory, self.usual_path()),
        };
        Limit::new(total, self.share_percent, unit)
    }
}

/// What there are limits of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// [`Limits::max_sessions`].
    Sessions,
    /// [`Limits::max_paths`].
    Paths,
    /// [`Limits::max_connections`].
    Connections,
    /// [`Limits::max_memory`].
    Memory,
}

impl Resource {
    /// All of them.
    pub const ALL: [Resource; 4] =
        [Resource::Sessions, Resource::Paths, Resource::Connections, Resource::Memory];

    /// As programs call it.
    pub const fn key(self) -> &'static str {
        match self {
            Resource::Sessions => "sessions",
            Resource::Paths => "paths",
            Resource::Connections => "connections",
            Resource::Memory => "memory",
        }
    }
}

/// In the plural.
impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self, Resource::Memory) { "bytes of memory" } else { self.key() })
    }
}

/// So much of each resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Sessions with a proved path.
    pub sessions: u64,
    /// Proved paths.
    pub paths: u64,
    /// Their connections.
    pub connections: u64,
    /// Bytes of their queues, and of the chunks of those that are up.
    pub memory: u64,
}

impl Usage {
    pub(super) const fn of(&self, resource: Resource) -> u64 {
        match resource {
            Resource::Sessions => self.sessions,
            Resource::Paths => self.paths,
            Resource::Connections => self.connections,
            Resource::Memory => self.memory,
        }
    }

    pub(super) const fn add(&mut self, other: Usage) {
        self.sessions += other.sessions;
        self.paths += other.paths;
        self.connections += other.connections;
        self.memory += other.memory;
    }
}
