//! How paths come into their session, leave it, and end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rtrs_proto::Errno;
use verbs::CmId;

use super::control::{Client, ConnRef, LEAVE_TIMEOUT};
use super::entry::{After, Attempt, PathEntry, PathPhase, Retire, SessionEntry, SessionPhase};
use super::error::{PathError, SessionEnd};
use super::event::Event;
use super::lane::{ConSizes, Lane, LinkStart, SessionSetup};
use super::path::PathId;
use super::session::{Limits, Session, SessionId};
use super::silence::Silence;
use super::upper::Upper;
use crate::cqs::Share;

/// How long requests of a path that is to be disconnected may take to be answered.
const RETIRE_TIME: Duration = Duration::from_secs(2);
/// How often it is looked at meanwhile.
const RETIRE_LOOK: Duration = Duration::from_millis(5);
/// Pause before a server that has not closed the former connections of a path is asked again.
const INSIST_DELAY: Duration = Duration::from_millis(50);
/// The same for one that has another session of that name.
const NAME_DELAY: Duration = Duration::from_millis(500);

impl<U: Upper> Client<U> {
    /// A path is connected: it joins its session, or waits until that is down.
    pub(super) fn path_ready(&mut self, now: Instant, id: PathId) {
        let Some(session) = self.session_of(id) else { return };
        let (session_id, phase) = (session.id, session.phase);
        if matches!(phase, SessionPhase::Draining | SessionPhase::Ending) {
            return;
        }
        if let Err(error) = self.settle(id) {
            return self.close_path(now, id, error);
        }
        self.link_up(now, id);
        self.events.push(Event::PathUp { session: session_id, path: id });
        if phase == SessionPhase::Down {
            self.session_up(session_id);
        }
        // The others join.
        self.start_waiting(now, session_id);
    }

    /// The first path of a session that is down decides what its requests may be: the server may have started anew with
    /// other options. Every other path must fit.
    fn settle(&mut self, path: PathId) -> Result<(), PathError> {
        let Some(session) = self.session_of(path) else { return Ok(()) };
        let Some(attempt) = session.path(path).and_then(|p| p.attempt.as_ref()) else { return Ok(()) };
        let sizes = attempt.cons.first().and_then(|c| c.sizes);
        let (Some(params), Some((limits, max_hdr_size))) = (attempt.params, attempt.facts()) else {
            return Ok(());
        };
        if session.phase == SessionPhase::Up {
            return session.demands().check(&params, sizes.as_ref()).map_err(PathError::Misfit);
        }
        let former = session.shared.as_ref().map(|s| s.limits);
        if former == Some(limits) && session.max_hdr_size == max_hdr_size {
            return Ok(());
        }
        if let Some(former) = former {
            tracing::warn!(session = session.options.name, ?former, now = ?limits, "the server has other limits");
        }
        let reactors = session.options.used_reactors().to_vec();
        let shared =
            Arc::new(Session { id: session.id, name: session.options.name.clone(), limits, reactors });
        session.shared = Some(shared.clone());
        session.max_hdr_size = max_hdr_size;
        let (policy, io_timeout) = (session.options.policy, session.options.io_timeout);
        for (index, reactor) in shared.reactors.iter().enumerate() {
            let setup = SessionSetup { session: shared.clone(), index, policy, io_timeout };
            Lane::<U>::send(&self.lanes[*reactor].handle, move |_, lane| lane.add_session(setup));
        }
        Ok(())
    }

    /// Requests may take the path.
    fn link_up(&mut self, now: Instant, id: PathId) {
        let Some(session) = self.sessions.values_mut().find(|s| s.has(id)) else { return };
        let (Some(shared), heartbeat) = (session.shared.clone(), session.options.heartbeat) else { return };
        let Some(path) = session.path(id) else { return };
        let Some(attempt) = &mut path.attempt else { return };
        let (Some(rbufs), Some(device)) = (attempt.rbufs.take(), attempt.device.clone()) else { return };
        let Some(keys) = self.keys.table(&device) else { return };
        attempt.was_up = true;
        if path.tried {
            path.shared.reconnected(true);
        }
        (path.phase, path.ever_up, path.tried, path.retries) = (PathPhase::Up, true, true, 0);
        (path.retire, path.insist_until, path.silence) = (None, None, Some(Silence::new(now)));
        path.shared.set_retiring(false);
        path.provider_errors.clear();
        for (index, reactor) in shared.reactors.iter().enumerate() {
            let (first, count) = shared.ids(index);
            let chunks = (first..first + count).filter_map(|id| rbufs.rbuf(id)).collect();
            let start = LinkStart { session: shared.id, chunks, keys: keys.clone(), heartbeat };
            Lane::<U>::send(&self.lanes[*reactor].handle, move |cx, lane| lane.link_up(cx, id, start));
        }
        tracing::info!(
            session = shared.name, path = %path.spec, device = device.info().name,
            queue_depth = shared.limits.queue_depth, "path connected"
        );
    }

    fn session_up(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(shared) = session.shared.clone() else { return };
        session.phase = SessionPhase::Up;
        session.stalled = false;
        session.generation += 1;
        let generation = session.generation;
        self.events.push(Event::SessionUp { session: shared, generation });
        let session = &self.sessions[&id];
        self.to_lanes(session, move |cx, lane| lane.session_up(cx, id));
    }

    /// Ends a path: disconnects all its connections, which moves their queue pairs to the error state, then lets the
    /// lanes finish. The first reason given is the one reported.
    pub(super) fn close_path(&mut self, now: Instant, id: PathId, error: PathError) {
        let Some(session) = self.sessions.values_mut().find(|s| s.has(id)) else { return };
        let (session_id, name) = (session.id, session.options.name.clone());
        let Some(path) = session.path(id).filter(|p| p.phase != PathPhase::Closing) else { return };
        let Some(attempt) = &mut path.attempt else { return };
        // A server that stays away is worth one line, not one for each attempt.
        if path.last_error.as_ref().is_none_or(|last| attempt.was_up || *last != error.to_string()) {
            tracing::info!(session = name, path = %path.spec, why = %error, "closing path");
        }
        path.phase = PathPhase::Closing;
        (path.retire, path.silence) = (None, None);
        attempt.deadline = None;
        attempt.error = Some(error);
        for con in attempt.cons.iter_mut() {
            if con.established
                && let Err(error) = self.cms[attempt.cm].disconnect(con.id)
            {
                tracing::debug!(%error, "disconnect");
            }
            con.qp = None;
        }
        if attempt.open_links > 0 {
            let session = &self.sessions[&session_id];
            self.to_lanes(session, move |cx, lane| lane.close_link(cx, id));
        }
        self.drain_if_last(now, session_id);
        self.finish_path(now, id);
    }

    /// A connection of a path has ended, without a word of why.
    pub(super) fn path_ended(&mut self, now: Instant, id: PathId, why: String) {
        let refused = self.path(id).is_some_and(|p| p.phase == PathPhase::Info);
        self.close_path(now, id, if refused { PathError::NameRefused } else { PathError::Lost(why) });
    }

    /// Disconnects a path that is up, on request: it gets no new requests, and once the server has answered those it
    /// has, or after [`RETIRE_TIME`], it goes. So nothing has to be repeated that the server may be executing.
    pub(super) fn retire(&mut self, now: Instant, id: PathId, why: PathError) {
        let Some(path) = self.path(id) else { return };
        if path.phase != PathPhase::Up {
            return self.close_path(now, id, why);
        }
        path.shared.set_retiring(true);
        let until = path.retire.as_ref().map_or(now + RETIRE_TIME, |r| r.until);
        path.retire = Some(Retire { look: now + RETIRE_LOOK, until, why });
    }

    /// Looks whether a path that is to go has finished.
    pub(super) fn look_at_retiring(&mut self, now: Instant, id: PathId) {
        let Some(path) = self.path(id) else { return };
        let idle = path.shared.stats().inflight == 0;
        let Some(retire) = path.retire.as_mut().filter(|r| r.look <= now || r.until <= now) else { return };
        if !idle && now < retire.until {
            retire.look = now + RETIRE_LOOK;
            return;
        }
        let why = retire.why.clone();
        self.close_path(now, id, why);
    }

    /// A session that has lost its last path lets go of its requests. Their queue pairs are destroyed first: lanes do
    /// what they are told in order.
    fn drain_if_last(&mut self, now: Instant, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id).filter(|s| s.phase == SessionPhase::Up) else {
            return;
        };
        if session.paths.iter().any(|p| p.phase == PathPhase::Up) {
            return;
        }
        session.phase = SessionPhase::Draining;
        session.lost_at = now;
        session.draining += session.options.used_reactors().len();
        let session = &self.sessions[&id];
        self.to_lanes(session, move |cx, lane| lane.session_down(cx, id, false));
    }

    /// A lane has let go of a session's requests.
    pub(super) fn lane_drained(&mut self, now: Instant, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.draining = session.draining.saturating_sub(1);
        if session.draining > 0 {
            return;
        }
        if session.phase == SessionPhase::Draining {
            session.phase = SessionPhase::Down;
            let ready = |p: &&PathEntry| p.phase == PathPhase::Ready;
            let ready: Vec<PathId> = session.paths.iter().filter(ready).map(|p| p.id).collect();
            self.events.push(Event::SessionDown { session: id });
            ready.into_iter().for_each(|path| self.path_ready(now, path));
            self.start_waiting(now, id);
        }
        self.finish_session(id);
    }

    /// Ends a session with all its paths.
    pub(super) fn end_session(&mut self, now: Instant, id: SessionId, why: SessionEnd) {
        let Some(session) = self.sessions.get_mut(&id).filter(|s| s.phase != SessionPhase::Ending) else {
            return;
        };
        session.phase = SessionPhase::Ending;
        session.end = Some(why);
        session.paths.retain(PathEntry::is_active);
        let paths: Vec<PathId> = session.paths.iter().map(|p| p.id).collect();
        let known_to_lanes = session.shared.is_some();
        paths.into_iter().for_each(|path| self.close_path(now, path, PathError::Disconnected));
        if let Some(session) = self.sessions.get_mut(&id)
            && known_to_lanes
        {
            session.draining += session.options.used_reactors().len();
            let session = &self.sessions[&id];
            self.to_lanes(session, move |cx, lane| lane.session_down(cx, id, true));
        }
        self.finish_session(id);
    }

    /// Forgets a session once nothing of it is left.
    fn finish_session(&mut self, id: SessionId) {
        let over =
            |s: &SessionEntry| s.phase == SessionPhase::Ending && s.draining == 0 && s.paths.is_empty();
        if !self.sessions.get(&id).is_some_and(over) {
            return;
        }
        if let Some(session) = self.sessions.remove(&id) {
            let why = session.end.unwrap_or(SessionEnd::Closed);
            tracing::info!(session = session.options.name, %why, "session ended");
            self.events.push(Event::SessionEnded { session: id, why });
        }
    }

    /// A lane has let go of its part of a path.
    pub(super) fn link_closed(&mut self, now: Instant, id: PathId) {
        let Some(attempt) = self.path(id).and_then(|p| p.attempt.as_mut()) else { return };
        attempt.open_links = attempt.open_links.saturating_sub(1);
        self.finish_path(now, id);
    }

    fn release(&mut self, lane: usize, share: Share) {
        if let Some(cq) = self.lanes[lane].cqs.release(share) {
            Lane::<U>::send(&self.lanes[lane].handle, move |cx, l| l.cqs.drop_cq(cx, cq));
        }
    }

    /// Gives up what is left of an attempt once all lanes have let go, and decides what follows.
    fn finish_path(&mut self, now: Instant, id: PathId) {
        let Some(path) = self.path(id).filter(|p| p.phase == PathPhase::Closing) else { return };
        if path.attempt.as_ref().is_none_or(|a| a.open_links > 0) {
            return;
        }
        let Some(attempt) = path.attempt.take() else { return };
        for con in &attempt.cons {
            if let Some((lane, share)) = con.share {
                self.release(lane, share);
            }
            // One whose end the peer has confirmed is not in `conns` any more.
            if self.conns.remove(&con.id).is_some() && con.established {
                self.leaving.insert(con.id, (attempt.cm, now + LEAVE_TIMEOUT));
            } else {
                self.cms[attempt.cm].destroy(con.id);
            }
        }
        if let Some(device) = attempt.device.as_ref().filter(|_| attempt.keyed) {
            self.keys.leave(device);
        }
        self.follow(now, id, attempt);
    }

    /// What comes after an attempt.
    fn follow(&mut self, now: Instant, id: PathId, attempt: Attempt) {
        let providers = self.sessions.values().flat_map(|s| &s.paths).find(|p| p.id == id);
        let providers = providers.map_or(0, |p| self.candidates(p).len());
        let Some(session) = self.session_of(id) else { return };
        let (session_id, reconnect) = (session.id, session.options.reconnect);
        if session.phase == SessionPhase::Ending {
            session.paths.retain(|p| p.id != id);
            return self.finish_session(session_id);
        }
        let Some(path) = session.path(id) else { return };
        let unresolved = attempt.cons.first().is_none_or(|c| !c.resolved);
        let mut why = attempt.error.unwrap_or(PathError::Disconnected);
        if path.after == After::Retry && unresolved && !path.ever_up && path.provider + 1 < providers {
            path.provider += 1;
            path.provider_errors.push(why.to_string());
            path.phase = PathPhase::Waiting;
            return self.start_waiting(now, session_id);
        }
        if let Some(again) = path.insists(now, &why).filter(|_| path.after == After::Retry) {
            path.phase = PathPhase::Resting(again);
            return self.start_waiting(now, session_id);
        }
        if !path.provider_errors.is_empty() {
            path.provider_errors.push(why.to_string());
            why = PathError::Verbs(std::mem::take(&mut path.provider_errors).join("; "));
        }
        if !path.ever_up {
            path.provider = 0;
        }
        let next_attempt = path.next(now, reconnect, attempt.was_up);
        path.last_error = Some(why.to_string());
        let removed = path.after == After::Remove;
        session.last_failure = Some(why.to_string());
        if removed {
            self.forget_path(session_id, id);
        } else {
            self.events.push(Event::PathDown { session: session_id, path: id, why, next_attempt });
        }
        self.start_waiting(now, session_id);
    }

    pub(super) fn forget_path(&mut self, session: SessionId, path: PathId) {
        if let Some(entry) = self.sessions.get_mut(&session) {
            entry.paths.retain(|p| p.id != path);
            self.events.push(Event::PathRemoved { session, path });
        }
    }

    /// The peer knows that this connection has ended: nothing to wait for.
    pub(super) fn confirmed(&mut self, conn: ConnRef) {
        let Some(attempt) = self.path(conn.path).and_then(|p| p.attempt.as_ref()) else { return };
        if let Some(id) = attempt.cons.get(usize::from(conn.cid)).map(|c| c.id) {
            self.conns.remove(&id);
        }
    }

    /// A disconnect is over.
    pub(super) fn left(&mut self, id: CmId) {
        if let Some((cm, _)) = self.leaving.remove(&id) {
            self.cms[cm].destroy(id);
        }
    }
}

impl PathEntry {
    /// The server only needs a moment more, and somebody waits for this path: when it is asked again.
    fn insists(&self, now: Instant, why: &PathError) -> Option<Instant> {
        let (delay, until) = match why {
            PathError::Refused { errno: Errno::ECONNRESET, .. } => (INSIST_DELAY, self.insist_until?),
            PathError::NameRefused => (NAME_DELAY, self.name_until?),
            _ => return None,
        };
        Some(now + delay).filter(|again| *again < until)
    }

    /// Decides on the next attempt after one that ended, and returns how far away it is.
    fn next(&mut self, now: Instant, reconnect: super::options::Reconnect, was_up: bool) -> Option<Duration> {
        if self.tried && !was_up {
            self.shared.reconnected(false);
        }
        self.tried = true;
        let may_retry = reconnect.max_attempts.is_none_or(|max| self.retries < max);
        let delay = match self.after {
            After::Reconnect => {
                self.retries = 0;
                Some(Duration::ZERO)
            }
            After::Retry if may_retry => {
                self.retries = self.retries.saturating_add(1);
                Some(with_jitter(reconnect.delay))
            }
            _ => None,
        };
        self.phase = match delay {
            Some(Duration::ZERO) => PathPhase::Waiting,
            Some(delay) => now.checked_add(delay).map_or(PathPhase::Closed, PathPhase::Resting),
            None => PathPhase::Closed,
        };
        delay
    }
}

/// Up to an eighth more, so that the clients of a server that comes back do not all come at once.
fn with_jitter(delay: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() as u32 % 1024;
    delay.saturating_add(delay / 8 * random / 1024)
}

impl Attempt {
    /// What a session that it is the first path of can do, and the header bytes of a request.
    fn facts(&self) -> Option<(Limits, u32)> {
        let geometry = self.params?.geometry;
        let max_pieces = self.cons.iter().map(|c| c.sizes.as_ref().map_or(0, ConSizes::max_pieces)).min()?;
        let limits =
            Limits { queue_depth: geometry.queue_depth(), max_io_size: geometry.max_io_size(), max_pieces };
        Some((limits, geometry.max_hdr_size()))
    }
}
