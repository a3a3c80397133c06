//! Sessions: made with their first mapping, made again after they were given up.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use reactor::Turn;
use rtrs_poll::client::{self as rtrs, PathError, PathId, PathSpec, PathState, SessionId, SessionOptions};

use super::{Done, Maps};
use crate::bdev::error::MapError;
use crate::bdev::params::{MapParams, SessionParams};

/// What someone waits for at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// To be connected; a failure is an answer too.
    Up,
    /// The same, for a path that is to be forgotten if it fails.
    Added,
    /// To be disconnected.
    Down,
    /// To be forgotten.
    Removed,
}

/// What a path met.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// The path in words, with the port.
    pub path: String,
    pub why: PathError,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "path {}: {}", self.path, self.why)
    }
}

/// A session, for as long as it has mappings.
pub(super) struct Session {
    pub name: String,
    pub params: SessionParams,
    /// In RTRS; `None` once it was given up.
    pub id: Option<SessionId>,
    /// Up, and SESS_INFO was answered: which generation.
    pub ready: Option<(Arc<rtrs::Session>, u64)>,
    /// Paths that are up.
    pub connected: BTreeSet<PathId>,
    /// Paths by which the server may still execute what was sent: since when they are down.
    pub stale: BTreeMap<PathId, Instant>,
    /// Last failure of paths that are down.
    pub failures: BTreeMap<PathId, Failure>,
    /// Paths that are down because somebody asked for it.
    pub asked: BTreeSet<PathId>,
    pub waiters: Vec<(PathId, Want, Done<()>)>,
    /// Why it was given up.
    pub reason: Option<String>,
    /// It is being closed with its last mapping.
    pub ending: bool,
    /// Who waits for that.
    pub leaving: Vec<Done<()>>,
}

impl Session {
    fn new(name: &str, params: SessionParams) -> Self {
        Self {
            name: name.into(),
            params,
            id: None,
            ready: None,
            connected: BTreeSet::new(),
            stale: BTreeMap::new(),
            failures: BTreeMap::new(),
            asked: BTreeSet::new(),
            waiters: Vec::new(),
            reason: None,
            ending: false,
            leaving: Vec::new(),
        }
    }

    /// When nothing of what lost paths have carried can be left at the server; `None`: now.
    pub fn clean_at(&mut self, now: Instant) -> Option<Instant> {
        let over = self.params.stale_io;
        self.stale.retain(|_, since| *since + over > now);
        self.stale.values().max().map(|since| *since + over)
    }

    /// Answers those who wait for `path` and `wanted`.
    pub fn answer(&mut self, path: PathId, wanted: &[Want], result: &Result<(), MapError>) {
        let (now, later) =
            self.waiters.drain(..).partition(|(p, want, _)| *p == path && wanted.contains(want));
        self.waiters = later;
        let now: Vec<(PathId, Want, Done<()>)> = now;
        now.into_iter().for_each(|(_, _, done)| done(result.clone()));
    }

    /// What each path met, in words.
    pub fn why(&self) -> String {
        let failures: Vec<String> = self.failures.values().map(ToString::to_string).collect();
        if failures.is_empty() { "no answer yet".into() } else { failures.join("; ") }
    }
}

impl Maps {
    /// The session of a mapping that is to be made.
    pub(super) fn session_for(&mut self, cx: &mut Turn<'_>, p: &MapParams) -> Result<(), MapError> {
        if let Some(session) = self.session(&p.sessname) {
            if session.ending {
                let text = "it is being closed; try again in a moment".into();
                return Err(MapError::Ended { session: p.sessname.clone(), text });
            }
            return self.session_again(cx, &p.sessname);
        }
        if p.session.paths.is_empty() {
            return Err(MapError::NoSession(p.sessname.clone()));
        }
        self.sessions.push(Session::new(&p.sessname, p.session.clone()));
        let created = self.create(cx, &p.sessname);
        if created.is_err() {
            self.sessions.retain(|s| s.name != p.sessname);
        }
        created
    }

    /// Makes a session that was given up once more, and wakes paths that are left alone if there is no other.
    pub(super) fn session_again(&mut self, cx: &mut Turn<'_>, name: &str) -> Result<(), MapError> {
        let Some(session) = self.session(name) else { return Err(MapError::NoSession(name.into())) };
        let Some(id) = session.id else { return self.create(cx, name) };
        if !session.connected.is_empty() {
            return Ok(());
        }
        let client = self.initiator.borrow().client().clone();
        let info = client.borrow().session(cx.now, id);
        for path in info.iter().flat_map(|i| &i.paths).filter(|p| p.state == PathState::Closed) {
            client.borrow_mut().reconnect_path(cx, id, path.id)?;
        }
        Ok(())
    }

    fn create(&mut self, cx: &mut Turn<'_>, name: &str) -> Result<(), MapError> {
        let reactors = self.reactors.len();
        let Some(session) = self.session(name) else { return Err(MapError::NoSession(name.into())) };
        let p = session.params.clone();
        let mut paths = Vec::new();
        for path in &p.paths {
            let providers = p.providers(path);
            self.open_providers(cx, &providers)?;
            paths.push(PathSpec { providers, src: path.src, dst: path.dst(p.port) });
        }
        let options = SessionOptions {
            connections: p.connections.unwrap_or(reactors as u16 + 1),
            reactors: (0..reactors).collect(),
            policy: p.policy,
            reconnect: p.reconnect,
            loss_timeout: p.ctrlr_loss,
            connect_timeout: p.connect_timeout,
            ack_timeout: Some(p.ack_timeout),
            heartbeat: p.heartbeat,
            ..SessionOptions::new(name, paths)
        };
        let id = self.initiator.borrow_mut().create_session(cx, options)?;
        if let Some(session) = self.session_mut(name) {
            session.id = Some(id);
            session.reason = None;
            session.failures.clear();
            session.asked.clear();
        }
        Ok(())
    }

    /// Closes a session that has no mappings any more.
    pub(super) fn close_if_unused(&mut self, cx: &mut Turn<'_>, name: &str) {
        if !self.of_session(name).is_empty() {
            return;
        }
        let Some(session) = self.session_mut(name) else { return };
        session.ending = true;
        let id = session.id;
        let closing = id.is_some_and(|id| self.initiator.borrow_mut().close_session(cx, id).is_ok());
        if !closing {
            self.sessions.retain(|s| s.name != name);
        }
    }
}
