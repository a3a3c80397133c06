//! Paths and options of a session while it runs.

use std::net::IpAddr;
use std::time::Instant;

use reactor::Turn;
use rtrs_poll::client::{PathId, PathInfo, PathSpec, PathState, PathStats, Policy, Reconnect, SessionId};

use super::session::Want;
use super::{Done, Maps};
use crate::bdev::error::MapError;
use crate::bdev::params::PathParam;

/// Changes to a session; what is absent stays.
#[derive(Clone, Debug, Default)]
pub struct SessionChanges {
    /// After how many failures in a row a path is left alone; `Some(None)`: never.
    pub max_attempts: Option<Option<u16>>,
    /// From a failure to the next attempt.
    pub delay: Option<std::time::Duration>,
    /// Among several paths.
    pub policy: Option<Policy>,
    /// Without any path for so long it is given up; `Some(None)`: never.
    pub ctrlr_loss: Option<Option<std::time::Duration>>,
}

impl Maps {
    /// The RTRS session of that name.
    fn living(&self, name: &str) -> Result<SessionId, MapError> {
        let session = self.session(name).ok_or_else(|| MapError::NoSession(name.into()))?;
        session.id.filter(|_| !session.ending).ok_or_else(|| MapError::Ended {
            session: name.into(),
            text: session.reason.clone().unwrap_or_else(|| "it is being closed".into()),
        })
    }

    /// A path by `src@dst` or `dst`, addresses with or without `ip:` and port.
    fn path(&self, now: Instant, session: &str, path: &str) -> Result<(SessionId, PathInfo), MapError> {
        let id = self.living(session)?;
        let info = self.initiator.borrow().client().borrow().session(now, id);
        let found = info.into_iter().flat_map(|i| i.paths).find(|p| is_named(p, path));
        let none = || MapError::NoPath { session: session.into(), path: path.into() };
        found.map(|p| (id, p)).ok_or_else(none)
    }

    fn wait(&mut self, session: &str, path: PathId, want: Want, done: Done<()>) {
        match self.session_mut(session) {
            Some(s) => s.waiters.push((path, want, done)),
            None => done(Err(MapError::NoSession(session.into()))),
        }
    }

    /// Adds a path; answers when it is connected, or, if it cannot be, forgets it and says why.
    pub fn add_path(&mut self, cx: &mut Turn<'_>, session: &str, path: PathParam, done: Done<()>) {
        match self.try_add_path(cx, session, path) {
            Ok(id) => self.wait(session, id, Want::Added, done),
            Err(e) => done(Err(e)),
        }
    }

    fn try_add_path(
        &mut self,
        cx: &mut Turn<'_>,
        session: &str,
        path: PathParam,
    ) -> Result<PathId, MapError> {
        let id = self.living(session)?;
        let Some(s) = self.session(session) else { return Err(MapError::NoSession(session.into())) };
        let (providers, dst) = (s.params.providers(&path), path.dst(s.params.port));
        self.open_providers(cx, &providers)?;
        let client = self.initiator.borrow().client().clone();
        let added = client.borrow_mut().add_path(cx, id, PathSpec { providers, src: path.src, dst })?;
        if let Some(s) = self.session_mut(session) {
            s.params.paths.push(path);
        }
        Ok(added)
    }

    /// Forgets a path that could not be connected when it was added.
    pub(super) fn forget_path(&mut self, cx: &mut Turn<'_>, session: SessionId, path: PathId) {
        let client = self.initiator.borrow().client().clone();
        let info = client.borrow().session(cx.now, session);
        let gone = info.into_iter().flat_map(|i| i.paths).find(|p| p.id == path);
        if let (Some(gone), Some(s)) = (gone, self.session_by_id(session)) {
            s.params.paths.retain(|p| (p.src, p.dst) != (gone.src, gone.dst.ip()));
        }
        if let Err(error) = client.borrow_mut().remove_path(cx, session, path) {
            tracing::debug!(%error, "path that was not added");
        }
    }

    /// Disconnects and forgets a path.
    pub fn remove_path(&mut self, cx: &mut Turn<'_>, session: &str, path: &str, done: Done<()>) {
        let (id, info) = match self.path(cx.now, session, path) {
            Ok(found) => found,
            Err(e) => return done(Err(e)),
        };
        let client = self.initiator.borrow().client().clone();
        if let Err(e) = client.borrow_mut().remove_path(cx, id, info.id) {
            return done(Err(e.into()));
        }
        if let Some(s) = self.session_mut(session) {
            s.params.paths.retain(|p| (p.src, p.dst) != (info.src, info.dst.ip()));
            s.asked.insert(info.id);
        }
        self.wait(session, info.id, Want::Removed, done);
    }

    /// Disconnects a path, which stays so until it is reconnected.
    pub fn disconnect_path(&mut self, cx: &mut Turn<'_>, session: &str, path: &str, done: Done<()>) {
        let (id, info) = match self.path(cx.now, session, path) {
            Ok(found) => found,
            Err(e) => return done(Err(e)),
        };
        if info.state == PathState::Closed {
            return done(Ok(()));
        }
        let client = self.initiator.borrow().client().clone();
        if let Err(e) = client.borrow_mut().disconnect_path(cx, id, info.id) {
            return done(Err(e.into()));
        }
        if let Some(s) = self.session_mut(session) {
            s.asked.insert(info.id);
        }
        self.wait(session, info.id, Want::Down, done);
    }

    /// Connects a path now; answers when it is connected, or with what prevented it.
    pub fn reconnect_path(&mut self, cx: &mut Turn<'_>, session: &str, path: &str, done: Done<()>) {
        let (id, info) = match self.path(cx.now, session, path) {
            Ok(found) => found,
            Err(e) => return done(Err(e)),
        };
        let client = self.initiator.borrow().client().clone();
        if let Err(e) = client.borrow_mut().reconnect_path(cx, id, info.id) {
            return done(Err(e.into()));
        }
        self.wait(session, info.id, Want::Up, done);
    }

    /// Changes what may be changed of a session.
    ///
    /// # Errors
    /// No such session; values out of range.
    pub fn set_options(&mut self, session: &str, changes: &SessionChanges) -> Result<(), MapError> {
        let id = self.living(session)?;
        let Some(s) = self.session(session) else { return Err(MapError::NoSession(session.into())) };
        let old = s.params.reconnect;
        let reconnect = Reconnect {
            delay: changes.delay.unwrap_or(old.delay),
            max_attempts: changes.max_attempts.unwrap_or(old.max_attempts),
        };
        let client = self.initiator.borrow().client().clone();
        let mut client = client.borrow_mut();
        client.set_reconnect(id, reconnect)?;
        if let Some(policy) = changes.policy {
            client.set_policy(id, policy)?;
        }
        if let Some(loss) = changes.ctrlr_loss {
            client.set_loss_timeout(id, loss)?;
        }
        drop(client);
        if let Some(s) = self.session_mut(session) {
            s.params.reconnect = reconnect;
            s.params.policy = changes.policy.unwrap_or(s.params.policy);
            s.params.ctrlr_loss = changes.ctrlr_loss.unwrap_or(s.params.ctrlr_loss);
        }
        Ok(())
    }

    /// Counters of the paths of `session`, or of `path` alone: session, path, counters.
    ///
    /// # Errors
    /// No such session or path.
    pub fn path_stats(
        &self,
        now: Instant,
        session: Option<&str>,
        path: Option<&str>,
    ) -> Result<Vec<(String, String, PathStats)>, MapError> {
        Ok(self.chosen(now, session, path)?.into_iter().map(|(s, _, p)| (s, name_of(&p), p.stats)).collect())
    }

    /// Counters start at 0 again.
    ///
    /// # Errors
    /// No such session or path.
    pub fn reset_path_stats(
        &self,
        now: Instant,
        session: Option<&str>,
        path: Option<&str>,
    ) -> Result<(), MapError> {
        let client = self.initiator.borrow().client().clone();
        for (_, id, info) in self.chosen(now, session, path)? {
            client.borrow_mut().reset_stats(id, info.id)?;
        }
        Ok(())
    }

    fn chosen(
        &self,
        now: Instant,
        session: Option<&str>,
        path: Option<&str>,
    ) -> Result<Vec<(String, SessionId, PathInfo)>, MapError> {
        if let (Some(session), Some(path)) = (session, path) {
            let (id, info) = self.path(now, session, path)?;
            return Ok(vec![(session.into(), id, info)]);
        }
        let names: Vec<String> = match session {
            Some(name) => vec![name.into()],
            None => self.sessions.iter().filter(|s| s.id.is_some()).map(|s| s.name.clone()).collect(),
        };
        let mut all = Vec::new();
        for name in names {
            let id = self.living(&name)?;
            let info = self.initiator.borrow().client().borrow().session(now, id);
            let paths = info.into_iter().flat_map(|i| i.paths);
            let wanted = paths.filter(|p| path.is_none_or(|path| is_named(p, path)));
            all.extend(wanted.map(|p| (name.clone(), id, p)));
        }
        Ok(all)
    }
}

/// `src@dst`, or `dst` if the system chose our address; without ports.
pub(in crate::bdev) fn name_of(p: &PathInfo) -> String {
    match p.src {
        Some(src) => format!("{src}@{}", p.dst.ip()),
        None => p.dst.ip().to_string(),
    }
}

/// `path` means this one: the kernel's forms of addresses, ours, and ours with a port.
fn is_named(p: &PathInfo, path: &str) -> bool {
    let path = path.replace("ip:", "");
    let (src, dst) = match path.split_once(['@', ',']) {
        Some((src, dst)) => (src.parse::<IpAddr>().ok(), dst),
        None => (None, path.as_str()),
    };
    let same_dst = dst.parse() == Ok(p.dst.ip()) || dst.parse() == Ok(p.dst);
    same_dst && (src == p.src || !path.contains(['@', ',']))
}
