//! Sessions and paths as the control thread keeps them.

use std::sync::Arc;
use std::time::Instant;

use rtrs_proto::client::{Rbufs, ServerParams};
use rtrs_proto::wire::Uuid;
use verbs::{CmId, Device, Qp};

use super::error::{PathError, SessionEnd};
use super::info::{PathInfo, PathState, SessionInfo};
use super::lane::ConSizes;
use super::options::{PathSpec, SessionOptions};
use super::path::{Path, PathId};
use super::session::{Session, SessionId};
use super::silence::Silence;
use crate::cqs::Share;

/// A random uuid.
pub(super) fn random_uuid() -> Uuid {
    Uuid(*uuid::Uuid::new_v4().as_bytes())
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionPhase {
    /// No path.
    Down,
    /// At least one path is up.
    Up,
    /// The last path is being closed, and reactors let go of requests. A path that comes up now has to wait: whether
    /// the server still knows the session, nobody can tell.
    Draining,
    /// It ends.
    Ending,
}

pub(super) struct SessionEntry {
    pub id: SessionId,
    /// But for the paths.
    pub options: SessionOptions,
    /// `paths_uuid`: names the session at servers.
    pub uuid: Uuid,
    pub phase: SessionPhase,
    /// Once it has been connected.
    pub shared: Option<Arc<Session>>,
    /// Header bytes that every path must take.
    pub max_hdr_size: u32,
    pub generation: u64,
    pub paths: Vec<PathEntry>,
    /// Reports of reactors that are due.
    pub draining: usize,
    /// Since when it has had no path.
    pub lost_at: Instant,
    pub last_failure: Option<String>,
    /// It has been said that no path will be tried.
    pub stalled: bool,
    pub end: Option<SessionEnd>,
}

/// How far a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PathPhase {
    /// For its turn: as long as the server may not know the session, one path is tried at a time.
    Waiting,
    /// Until the next attempt.
    Resting(Instant),
    /// Connections 0..cid are established, `cid` is on its way.
    Connecting,
    /// INFO_REQ is on its way.
    Info,
    /// Connected, and waits for the session to be down.
    Ready,
    /// Requests flow.
    Up,
    /// The lanes are letting go.
    Closing,
    /// Left alone.
    Closed,
}

/// What follows when a path's connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// Another attempt, if the options allow.
    Retry,
    /// Another attempt at once.
    Reconnect,
    /// Nothing.
    Close,
    /// It is forgotten.
    Remove,
}

pub(super) struct PathEntry {
    pub id: PathId,
    pub spec: PathSpec,
    /// `sess_uuid`: names the path at the server; kept when it is connected again.
    pub uuid: Uuid,
    pub shared: Arc<Path>,
    pub phase: PathPhase,
    pub after: After,
    /// Attempts so far; `recon_cnt` on the wire.
    pub attempts: u64,
    /// Attempts to reconnect since it was up (or made).
    pub retries: u16,
    /// An attempt has had an outcome: those that follow are attempts to reconnect.
    pub tried: bool,
    /// It has been connected: the server was the right one, so it may make the session anew there.
    pub ever_up: bool,
    /// Which of the providers is tried, or has served.
    pub provider: usize,
    /// What earlier ones said in this attempt.
    pub provider_errors: Vec<String>,
    pub hca_name: Option<String>,
    pub hca_port: u8,
    pub rotating_keys: bool,
    pub last_error: Option<String>,
    /// It is to be disconnected on request, once its requests are answered.
    pub retire: Option<Retire>,
    /// While it is up.
    pub silence: Option<Silence>,
    /// Somebody asked for it to be connected: until then a server that has not finished with its former connections is
    /// asked again.
    pub insist_until: Option<Instant>,
    /// Of a new session: until then a server that has another one of its name is asked again.
    pub name_until: Option<Instant>,
    /// What is there of its connections.
    pub attempt: Option<Attempt>,
}

/// The last moments of a path that is to go.
#[derive(Clone, Debug)]
pub(super) struct Retire {
    /// When to look again whether it has requests in flight.
    pub look: Instant,
    /// When it goes, whatever it has.
    pub until: Instant,
    pub why: PathError,
}

/// One attempt to connect a path, and what came of it.
pub(super) struct Attempt {
    pub cm: usize,
    /// It may make the session at the server.
    pub first: bool,
    pub cons: Vec<ConEntry>,
    /// From the accept of cid 0.
    pub params: Option<ServerParams>,
    pub device: Option<Arc<dyn Device>>,
    /// It uses the device's keys.
    pub keyed: bool,
    /// From INFO_RSP.
    pub rbufs: Option<Rbufs>,
    /// Lanes that were given a link and have not given it back.
    pub open_links: usize,
    /// When to give up what is under way.
    pub deadline: Option<Instant>,
    pub was_up: bool,
    pub error: Option<PathError>,
}

pub(super) struct ConEntry {
    pub id: CmId,
    /// Which lane, and its share of a completion queue there.
    pub share: Option<(usize, Share)>,
    /// Until the lane takes it.
    pub qp: Option<Box<dyn Qp>>,
    pub sizes: Option<ConSizes>,
    /// Address and route are known.
    pub resolved: bool,
    /// The server has accepted it, so it will confirm a disconnect.
    pub established: bool,
}

impl SessionEntry {
    pub fn new(id: SessionId, options: SessionOptions, now: Instant) -> Self {
        Self {
            id,
            options: SessionOptions { paths: Vec::new(), ..options },
            uuid: random_uuid(),
            phase: SessionPhase::Down,
            shared: None,
            max_hdr_size: 0,
            generation: 0,
            paths: Vec::new(),
            draining: 0,
            lost_at: now,
            last_failure: None,
            stalled: false,
            end: None,
        }
    }

    pub fn path(&mut self, id: PathId) -> Option<&mut PathEntry> {
        self.paths.iter_mut().find(|p| p.id == id)
    }

    /// Some path has been connected, so the server is the right one and may know the session.
    pub fn is_known(&self) -> bool {
        self.paths.iter().any(|p| p.ever_up)
    }

    /// When it ends unless a path comes up.
    pub fn loss_deadline(&self) -> Option<Instant> {
        let lost = matches!(self.phase, SessionPhase::Down | SessionPhase::Draining);
        self.lost_at.checked_add(self.options.loss_timeout.filter(|_| lost)?)
    }

    /// What is due next.
    pub fn deadline(&self) -> Option<Instant> {
        let paths = self.paths.iter().filter_map(PathEntry::deadline);
        paths.chain(self.loss_deadline()).min()
    }

    pub fn info(&self, now: Instant, provider_names: impl Fn(&PathEntry) -> String) -> SessionInfo {
        SessionInfo {
            id: self.id,
            name: self.options.name.clone(),
            connected: self.phase == SessionPhase::Up,
            generation: self.generation,
            limits: self.shared.as_ref().map(|s| s.limits),
            connections: self.options.connections,
            policy: self.options.policy,
            reconnect: self.options.reconnect,
            loss_timeout: self.options.loss_timeout,
            paths: self.paths.iter().map(|p| p.info(now, provider_names(p))).collect(),
        }
    }
}

impl PathEntry {
    pub fn new(id: PathId, spec: PathSpec, reactors: usize) -> Self {
        Self {
            id,
            spec,
            uuid: random_uuid(),
            shared: Arc::new(Path::new(id, reactors)),
            phase: PathPhase::Waiting,
            after: After::Retry,
            attempts: 0,
            retries: 0,
            tried: false,
            ever_up: false,
            provider: 0,
            provider_errors: Vec::new(),
            hca_name: None,
            hca_port: 1,
            retire: None,
            silence: None,
            insist_until: None,
            name_until: None,
            rotating_keys: false,
            last_error: None,
            attempt: None,
        }
    }

    /// Its connections are being made, used or given up.
    pub fn is_active(&self) -> bool {
        self.attempt.is_some()
    }

    fn deadline(&self) -> Option<Instant> {
        match self.phase {
            PathPhase::Resting(until) => Some(until),
            PathPhase::Up => {
                let retire = self.retire.as_ref().map(|r| r.look.min(r.until));
                retire.into_iter().chain(self.silence.map(|s| s.look)).min()
            }
            _ => self.attempt.as_ref()?.deadline,
        }
    }

    /// The attempt in `phase`, if it is there.
    pub fn attempt_in(&mut self, phase: PathPhase) -> Option<&mut Attempt> {
        if self.phase == phase { self.attempt.as_mut() } else { None }
    }

    fn info(&self, now: Instant, provider: String) -> PathInfo {
        let next_attempt = match self.phase {
            PathPhase::Resting(until) => Some(until.saturating_duration_since(now)),
            _ => None,
        };
        PathInfo {
            id: self.id,
            state: self.phase.state(),
            provider,
            src: self.spec.src,
            dst: self.spec.dst,
            hca_name: self.hca_name.clone(),
            hca_port: self.hca_port,
            latency_ns: self.shared.latency_ns(),
            rotating_keys: self.rotating_keys,
            stats: self.shared.stats(),
            last_error: self.last_error.clone(),
            silent: self.silence.and_then(|s| s.since()).map(|t| now.saturating_duration_since(t)),
            next_attempt,
        }
    }
}

impl PathPhase {
    pub fn state(self) -> PathState {
        match self {
            Self::Waiting | Self::Resting(_) => PathState::Reconnecting,
            Self::Connecting | Self::Info | Self::Ready => PathState::Connecting,
            Self::Up => PathState::Connected,
            Self::Closing => PathState::Closing,
            Self::Closed => PathState::Closed,
        }
    }
}

impl Attempt {
    pub fn new(cm: usize, first: bool) -> Self {
        Self {
            cm,
            first,
            cons: Vec::new(),
            params: None,
            device: None,
            keyed: false,
            rbufs: None,
            open_links: 0,
            deadline: None,
            was_up: false,
            error: None,
        }
    }
}

impl ConEntry {
    pub fn new(id: CmId) -> Self {
        Self { id, share: None, qp: None, sizes: None, resolved: false, established: false }
    }
}
