//! What may be chosen about a session and its paths.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use rtrs_proto::client::info_req;
use rtrs_proto::heartbeat;

/// How a session is set up. Everything about reconnecting and choosing paths can be changed later.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Session name: 1..=254 bytes without NUL, '/' and '.', unique at the server.
    pub name: String,
    /// Where to connect. The first that can be reached makes the session at the server, then the others join it.
    pub paths: Vec<PathSpec>,
    /// Connections of each path, 1..=4096. Con 0 is for administration; with only one it carries I/O too.
    pub connections: u16,
    /// Reactors to use, by their place in the list given to [`super::Client::install`]. Con 0 is on the first, the
    /// others go round. Reactors that would get no connection are not used: take at least one connection more than
    /// reactors.
    pub reactors: Vec<usize>,
    /// Which of several paths a request takes.
    pub policy: Policy,
    /// When to try again what failed.
    pub reconnect: Reconnect,
    /// So long after the last path was lost (or after the session was asked for) the session ends, if no path has
    /// come up. `None`: it never does.
    pub loss_timeout: Option<Duration>,
    /// For each connection, and for the answer to INFO_REQ (kernel: 30 s).
    pub connect_timeout: Duration,
    /// How long a new session asks a server again that has another session of its name. Our server finds out within 3 s
    /// that the other one is what a crash of the client has left.
    pub name_timeout: Duration,
    /// A path that leaves a request unanswered for so long is reset, and the request fails over. `None`, as in the
    /// kernel: wait as long as the server answers heartbeats.
    pub io_timeout: Option<Duration>,
    /// A path is lost when the server's end of the transport has acknowledged nothing for so long; `None`: as
    /// [`ConnParams::give_up`](verbs::ConnParams::give_up).
    pub ack_timeout: Option<Duration>,
    /// Interval and patience.
    pub heartbeat: heartbeat::Config,
}

impl SessionOptions {
    /// A session over `paths`: two connections on the first reactor, kernel's timeouts and policy.
    pub fn new(name: &str, paths: Vec<PathSpec>) -> Self {
        Self {
            name: name.into(),
            paths,
            connections: 2,
            reactors: vec![0],
            policy: Policy::default(),
            reconnect: Reconnect::default(),
            loss_timeout: None,
            connect_timeout: Duration::from_secs(30),
            name_timeout: Duration::from_secs(6),
            io_timeout: None,
            ack_timeout: None,
            heartbeat: heartbeat::Config::default(),
        }
    }

    /// What is wrong with them on a client of `reactors` reactors, in words.
    pub(super) fn check(&self, reactors: usize) -> Result<(), String> {
        if info_req(&self.name).is_none() {
            let name = &self.name;
            return Err(format!("session name {name:?}: use 1 to 254 bytes without '/', '.' and NUL"));
        }
        if self.connections == 0 || self.connections > rtrs_proto::wire::MAX_CID_NUM {
            return Err(format!("{} connections: use 1 to 4096", self.connections));
        }
        self.reconnect.check()?;
        let twice = (1..self.reactors.len()).find(|i| self.reactors[..*i].contains(&self.reactors[*i]));
        if let Some(i) = twice {
            return Err(format!("reactor {} twice", self.reactors[i]));
        }
        match self.reactors.iter().find(|r| **r >= reactors) {
            Some(r) => Err(format!("reactor {r}: there are {reactors}, counted from 0")),
            None if self.reactors.is_empty() => Err("no reactor: name at least one".into()),
            None => Ok(()),
        }
    }

    /// The reactors that get a connection.
    pub(super) fn used_reactors(&self) -> &[usize] {
        let io_cons = usize::from(self.connections.max(2) - 1);
        &self.reactors[..self.reactors.len().min(if self.connections == 1 { 1 } else { io_cons })]
    }

    /// Index into [`SessionOptions::used_reactors`] of connection `cid`.
    pub(super) fn reactor_of(&self, cid: u16) -> usize {
        usize::from(cid.saturating_sub(1)) % self.used_reactors().len()
    }
}

/// One way to the server: a pair of addresses, distinct from all others of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathSpec {
    /// Connection managers to try, in order ("rdma-core", "soft-roce", …): the next one if a provider has no device
    /// for the addresses. The one that has served is kept.
    pub providers: Vec<String>,
    /// Our address; `None` leaves the choice to the system.
    pub src: Option<IpAddr>,
    /// The server.
    pub dst: SocketAddr,
}

impl PathSpec {
    /// To `dst`, from wherever the system likes.
    pub fn new(provider: &str, dst: SocketAddr) -> Self {
        Self { providers: vec![provider.into()], src: None, dst }
    }

    /// To `dst` from `src`.
    pub fn from(self, src: IpAddr) -> Self {
        Self { src: Some(src), ..self }
    }

    /// The server would see the same pair of addresses, and refuse the second with EEXIST.
    pub(super) fn same_way(&self, other: &Self) -> bool {
        (self.src, self.dst.ip()) == (other.src, other.dst.ip())
    }
}

/// As the kernel names a path: `src@dst`, or only the destination.
impl fmt::Display for PathSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.src {
            Some(src) => write!(f, "{src}@{}", self.dst),
            None => self.dst.fmt(f),
        }
    }
}

/// When to try again what failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reconnect {
    /// From a failure to the next attempt, up to an eighth more at random (kernel: 30 s and 1 s). At least 1 ms.
    pub delay: Duration,
    /// Attempts in a row that may fail before a path is left alone, 0..=9999; 0: it never reconnects by itself.
    /// `None`: as many as it takes (kernel: -1).
    pub max_attempts: Option<u16>,
}

impl Reconnect {
    /// Largest [`Reconnect::max_attempts`].
    pub const MAX_ATTEMPTS: u16 = 9999;

    pub(super) fn check(&self) -> Result<(), String> {
        if self.max_attempts.is_some_and(|n| n > Self::MAX_ATTEMPTS) {
            return Err("reconnect attempts: use at most 9999, or no limit".into());
        }
        if self.delay < Duration::from_millis(1) {
            return Err("reconnect delay: use at least 1 ms".into());
        }
        Ok(())
    }
}

impl Default for Reconnect {
    fn default() -> Self {
        Self { delay: Duration::from_secs(2), max_attempts: None }
    }
}

/// Which of several connected paths a request takes (`rtrs-clt.c`, `get_next_path_*`). Among equals each reactor has
/// another favourite: the first prefers the path that was added first, the second the next, and so on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Each in turn, per reactor.
    RoundRobin,
    /// The one with the fewest requests in flight from the same reactor. The kernel counts those of all cores, by a
    /// word that every core changes with every request; here nothing of the data path is shared. It comes to the same:
    /// each reactor keeps its own requests even over the paths, to within one, and as ties go to different paths on
    /// different reactors, the remainders are even, too. A path that answers slowly is full on every reactor.
    #[default]
    MinInflight,
    /// The one whose last heartbeat came back soonest.
    MinLatency,
}

impl Policy {
    /// All, with the kernel's long and short names and number.
    pub const ALL: [(Self, &'static str, &'static str, u8); 3] = [
        (Self::RoundRobin, "round-robin", "rr", 0),
        (Self::MinInflight, "min-inflight", "mi", 1),
        (Self::MinLatency, "min-latency", "ml", 2),
    ];

    /// The kernel's long name.
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// As the kernel's `mpath_policy` takes it: name, short name or number; `_` is as good as `-`.
impl FromStr for Policy {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let name = s.replace('_', "-");
        let found = Self::ALL
            .iter()
            .find(|(_, long, short, n)| name == *long || name == *short || name == n.to_string());
        found.map(|p| p.0).ok_or_else(|| {
            format!(
                "multipath policy '{s}': use round-robin (rr, 0), min-inflight (mi, 1) or min-latency (ml, 2)"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(connections: u16, reactors: usize) -> SessionOptions {
        SessionOptions {
            connections,
            reactors: (0..reactors).collect(),
            ..SessionOptions::new("s", Vec::new())
        }
    }

    #[test]
    fn connections_go_round_the_reactors() {
        let o = options(5, 2);
        assert_eq!((0..5).map(|c| o.reactor_of(c)).collect::<Vec<_>>(), [0, 0, 1, 0, 1]);
        assert_eq!(options(2, 4).used_reactors(), [0]);
        assert_eq!(options(1, 4).used_reactors(), [0]);
        assert_eq!(options(9, 4).used_reactors(), [0, 1, 2, 3]);
    }

    #[test]
    fn options_that_cannot_work() {
        let with = |f: fn(&mut SessionOptions)| {
            let mut o = options(3, 2);
            f(&mut o);
            o.check(2).expect_err("cannot work")
        };
        for (why, say) in [
            (with(|o| o.name = "a/b".into()), "session name"),
            (with(|o| o.name.clear()), "session name"),
            (with(|o| o.connections = 0), "use 1 to 4096"),
            (with(|o| o.connections = 4097), "use 1 to 4096"),
            (with(|o| o.reactors = vec![2]), "reactor 2: there are 2"),
            (with(|o| o.reactors = vec![1, 0, 1]), "reactor 1 twice"),
            (with(|o| o.reactors.clear()), "no reactor"),
            (with(|o| o.reconnect.max_attempts = Some(10_000)), "at most 9999"),
            (with(|o| o.reconnect.delay = Duration::ZERO), "at least 1 ms"),
        ] {
            assert!(why.contains(say), "{why}");
        }
        assert_eq!(options(3, 2).check(2), Ok(()));
    }

    #[test]
    fn policies_by_every_name() {
        for (policy, long, short, n) in Policy::ALL {
            assert_eq!((policy.name(), policy as u8), (long, n));
            for name in [long.into(), short.into(), n.to_string(), long.replace('-', "_")] {
                assert_eq!(name.parse(), Ok(policy), "{name}");
            }
        }
        for bad in ["", "3", "RR", "round robin"] {
            assert!(bad.parse::<Policy>().is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_are_told_apart_by_their_addresses() {
        let to = |dst: &str| PathSpec::new("x", dst.parse().unwrap());
        let src = "10.0.0.9".parse().unwrap();
        assert!(to("10.0.0.1:1").same_way(&to("10.0.0.1:2")), "ports do not count");
        assert!(!to("10.0.0.1:1").same_way(&to("10.0.0.2:1")));
        assert!(!to("10.0.0.1:1").same_way(&to("10.0.0.1:1").from(src)));
        assert_eq!(to("10.0.0.1:1").from(src).to_string(), "10.0.0.9@10.0.0.1:1");
    }
}
