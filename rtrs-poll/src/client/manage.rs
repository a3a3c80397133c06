//! What the layer above may ask for.

use std::time::{Duration, Instant};

use reactor::Turn;

use super::control::Client;
use super::entry::{After, PathEntry, PathPhase, SessionEntry, SessionPhase};
use super::error::{ControlError, PathError, SessionEnd};
use super::event::Event;
use super::info::SessionInfo;
use super::options::{PathSpec, Policy, Reconnect, SessionOptions};
use super::path::PathId;
use super::session::SessionId;
use super::upper::Upper;

/// Paths of a session (`MAX_PATHS_NUM`).
const MAX_PATHS: usize = 128;

impl<U: Upper> Client<U> {
    /// Makes a session and starts to connect it. What becomes of it is told by [`Event`]s, from the next turn on;
    /// failures are repeated as `options.reconnect` says, the first one included, until [`Client::close_session`].
    ///
    /// # Errors
    /// Options that cannot work; a session of that name. No event follows.
    pub fn create_session(
        &mut self,
        cx: &Turn<'_>,
        options: SessionOptions,
    ) -> Result<SessionId, ControlError> {
        options.check(self.lanes.len()).map_err(ControlError::Options)?;
        if self.sessions.values().any(|s| s.options.name == options.name) {
            return Err(ControlError::SessionExists(options.name));
        }
        let paths = options.paths.clone();
        for (i, path) in paths.iter().enumerate() {
            self.check_path(path, paths[..i].iter())?;
        }
        if paths.len() > MAX_PATHS {
            return Err(ControlError::TooManyPaths(MAX_PATHS));
        }
        let id = self.new_session_id();
        let mut entry = SessionEntry::new(id, options, cx.now);
        let reactors = entry.options.used_reactors().len();
        for spec in paths {
            let mut path = PathEntry::new(self.new_path_id(), spec, reactors);
            path.name_until = cx.now.checked_add(entry.options.name_timeout);
            entry.paths.push(path);
        }
        self.sessions.insert(id, entry);
        self.start_waiting(cx.now, id);
        Ok(id)
    }

    fn check_path<'a>(
        &self,
        path: &PathSpec,
        mut others: impl Iterator<Item = &'a PathSpec>,
    ) -> Result<(), ControlError> {
        if others.any(|o| o.same_way(path)) {
            return Err(ControlError::PathExists(path.to_string()));
        }
        if path.src.is_some_and(|src| src.is_ipv4() != path.dst.is_ipv4()) {
            let why = format!("path {path}: both addresses must be IPv4, or both IPv6");
            return Err(ControlError::Options(why));
        }
        let have = self.providers();
        if path.providers.iter().any(|p| have.contains(&p.as_str())) {
            return Ok(());
        }
        Err(ControlError::Provider { asked: path.providers.join(", "), have: have.join(", ") })
    }

    /// A session that is not ending.
    fn living(&mut self, session: SessionId) -> Result<&mut SessionEntry, ControlError> {
        let found = self.sessions.get_mut(&session);
        found.filter(|s| s.phase != SessionPhase::Ending).ok_or(ControlError::NoSession)
    }

    fn living_path(&mut self, session: SessionId, path: PathId) -> Result<&mut PathEntry, ControlError> {
        let found = self.living(session)?.path(path);
        found.filter(|p| p.after != After::Remove).ok_or(ControlError::NoPath)
    }

    /// Ends a session: its requests complete with ECONNABORTED, its paths are disconnected,
    /// [`Event::SessionEnded`] follows. Does nothing if it is ending already.
    ///
    /// # Errors
    /// No such session.
    pub fn close_session(&mut self, cx: &Turn<'_>, session: SessionId) -> Result<(), ControlError> {
        if !self.sessions.contains_key(&session) {
            return Err(ControlError::NoSession);
        }
        self.end_session(cx.now, session, SessionEnd::Closed);
        Ok(())
    }

    /// Ends every session, then runs `done`, when servers have confirmed it or a short while has passed.
    pub fn shutdown(&mut self, cx: &Turn<'_>, done: impl FnOnce(&mut Turn<'_>) + 'static) {
        let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
        sessions.into_iter().for_each(|id| self.end_session(cx.now, id, SessionEnd::Closed));
        self.drained = Some(Box::new(done));
    }

    /// Adds a path and starts to connect it: [`Event::PathUp`] or [`Event::PathDown`] follows.
    ///
    /// # Errors
    /// No such session, one that is ending, or a path between the same addresses.
    pub fn add_path(
        &mut self,
        cx: &Turn<'_>,
        session: SessionId,
        path: PathSpec,
    ) -> Result<PathId, ControlError> {
        let entry = self.living(session)?;
        if entry.paths.len() >= MAX_PATHS {
            return Err(ControlError::TooManyPaths(MAX_PATHS));
        }
        let others: Vec<PathSpec> = entry.paths.iter().map(|p| p.spec.clone()).collect();
        self.check_path(&path, others.iter())?;
        let id = self.new_path_id();
        let entry = self.living(session)?;
        let reactors = entry.options.used_reactors().len();
        entry.paths.push(PathEntry::new(id, path, reactors));
        self.start_waiting(cx.now, session);
        Ok(id)
    }

    /// Disconnects and forgets a path: [`Event::PathRemoved`] follows. It gets no new requests, and goes when those it
    /// has are answered; what is not within 2 s fails over.
    ///
    /// # Errors
    /// No such path.
    pub fn remove_path(
        &mut self,
        cx: &Turn<'_>,
        session: SessionId,
        path: PathId,
    ) -> Result<(), ControlError> {
        if self.take_down(cx, session, path, After::Remove)?.is_some() {
            self.forget_path(session, path);
            self.start_waiting(cx.now, session);
        }
        Ok(())
    }

    /// Says what is to follow, and disconnects the path if it has connections; if not, returns its phase.
    fn take_down(
        &mut self,
        cx: &Turn<'_>,
        session: SessionId,
        path: PathId,
        after: After,
    ) -> Result<Option<PathPhase>, ControlError> {
        let entry = self.living_path(session, path)?;
        entry.after = after;
        let (active, phase) = (entry.is_active(), entry.phase);
        if active {
            self.retire(cx.now, path, PathError::Disconnected);
        }
        Ok((!active).then_some(phase))
    }

    /// Disconnects a path, as [`Client::remove_path`] does, and leaves it alone. [`Event::PathDown`] follows if it was not
    /// closed already.
    ///
    /// # Errors
    /// No such path.
    pub fn disconnect_path(
        &mut self,
        cx: &Turn<'_>,
        session: SessionId,
        path: PathId,
    ) -> Result<(), ControlError> {
        let phase = self.take_down(cx, session, path, After::Close)?;
        if phase.is_some_and(|phase| phase != PathPhase::Closed) {
            self.living_path(session, path)?.phase = PathPhase::Closed;
            let why = PathError::Disconnected;
            self.events.push(Event::PathDown { session, path, why, next_attempt: None });
            self.start_waiting(cx.now, session);
        }
        Ok(())
    }

    /// Connects a path now, whatever its delay and its count of failures; one that is connected is disconnected
    /// first, as by [`Client::remove_path`]. A server that has not finished with its former connections is asked again
    /// until `connect_timeout` has passed. [`Event::PathUp`] or [`Event::PathDown`] follows.
    ///
    /// # Errors
    /// No such path; an attempt is under way already.
    pub fn reconnect_path(
        &mut self,
        cx: &Turn<'_>,
        session: SessionId,
        path: PathId,
    ) -> Result<(), ControlError> {
        let insist_until = cx.now.checked_add(self.living(session)?.options.connect_timeout);
        let entry = self.living_path(session, path)?;
        match entry.phase {
            PathPhase::Connecting | PathPhase::Info | PathPhase::Ready => {
                let hint = "wait for the outcome, or disconnect it first";
                return Err(ControlError::Busy { state: entry.phase.state().name(), hint });
            }
            PathPhase::Up => {
                (entry.after, entry.insist_until) = (After::Reconnect, insist_until);
                self.retire(cx.now, path, PathError::Reconnect);
            }
            PathPhase::Closing => (entry.after, entry.insist_until) = (After::Reconnect, insist_until),
            PathPhase::Waiting | PathPhase::Resting(_) | PathPhase::Closed => {
                (entry.phase, entry.after, entry.retries) = (PathPhase::Waiting, After::Retry, 0);
                entry.insist_until = insist_until;
                self.start_waiting(cx.now, session);
            }
        }
        Ok(())
    }

    /// Changes which path a request takes, from the next one on.
    ///
    /// # Errors
    /// No such session.
    pub fn set_policy(&mut self, session: SessionId, policy: Policy) -> Result<(), ControlError> {
        self.living(session)?.options.policy = policy;
        if let Some(entry) = self.sessions.get(&session) {
            self.to_lanes(entry, move |_, lane| lane.set_policy(session, policy));
        }
        Ok(())
    }

    /// Changes when failures are repeated. A delay that is running is not touched.
    ///
    /// # Errors
    /// No such session; values out of range.
    pub fn set_reconnect(&mut self, session: SessionId, reconnect: Reconnect) -> Result<(), ControlError> {
        reconnect.check().map_err(ControlError::Options)?;
        self.living(session)?.options.reconnect = reconnect;
        Ok(())
    }

    /// Changes how long a session may be without any path before it ends, counted from when it lost the last one.
    ///
    /// # Errors
    /// No such session.
    pub fn set_loss_timeout(
        &mut self,
        session: SessionId,
        timeout: Option<Duration>,
    ) -> Result<(), ControlError> {
        self.living(session)?.options.loss_timeout = timeout;
        Ok(())
    }

    /// How a session and its paths are doing.
    pub fn session(&self, now: Instant, session: SessionId) -> Option<SessionInfo> {
        let provider = |p: &PathEntry| self.provider_of(p);
        self.sessions.get(&session).map(|s| s.info(now, provider))
    }

    /// All sessions, oldest first.
    pub fn sessions(&self, now: Instant) -> Vec<SessionInfo> {
        self.sessions.keys().filter_map(|id| self.session(now, *id)).collect()
    }

    /// Provider that a path uses, or will try next.
    fn provider_of(&self, path: &PathEntry) -> String {
        let cm =
            path.attempt.as_ref().map(|a| a.cm).or_else(|| self.candidates(path).get(path.provider).copied());
        cm.map_or(String::new(), |cm| self.cms[cm].provider().into())
    }

    /// Counters of a path start at 0 again.
    ///
    /// # Errors
    /// No such path.
    pub fn reset_stats(&mut self, session: SessionId, path: PathId) -> Result<(), ControlError> {
        self.living_path(session, path)?.shared.reset_stats();
        Ok(())
    }
}
