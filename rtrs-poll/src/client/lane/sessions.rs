//! How sessions come and go on a reactor, and what becomes of requests whose path is lost.

use reactor::Turn;
use rtrs_proto::Errno;

use super::Lane;
use super::io::SessionKey;
use super::session::{LaneSession, SessionSetup};
use super::slab::Key;
use crate::client::options::Policy;
use crate::client::session::SessionId;
use crate::client::upper::Upper;

impl<U: Upper> Lane<U> {
    /// A session has been connected for the first time, or to a server with other limits. Its first link comes next, then
    /// [`Lane::session_up`].
    pub(in crate::client) fn add_session(&mut self, setup: SessionSetup) {
        let former = self.session_of(setup.session.id);
        match former.and_then(|key| self.io.sessions.get(key)) {
            Some(session) => session.renew(setup),
            None => drop(self.io.sessions.insert_with(|_| LaneSession::new(setup))),
        }
    }

    /// The server has made the session (anew).
    pub(in crate::client) fn session_up(&mut self, cx: &mut Turn<'_>, id: SessionId) {
        self.io.tick(cx.now);
        let Some(key) = self.session_of(id) else { return };
        let Some(session) = self.io.sessions.get(key) else { return };
        session.up = true;
        let session = session.session.clone();
        self.io.find_next_beat();
        self.upper.session_up(cx, &mut self.io, SessionKey(key), &session);
        self.io.post();
    }

    /// No path is left, and [`Lane::close_link`] has run for all there were: every request fails. `forget`: the session
    /// ends.
    pub(in crate::client) fn session_down(&mut self, cx: &mut Turn<'_>, id: SessionId, forget: bool) {
        if let Some(key) = self.session_of(id) {
            self.abort(cx, key);
            if forget {
                self.io.sessions.remove(key);
            }
        }
        self.io.reports.session_drained(id);
        self.io.post();
    }

    fn abort(&mut self, cx: &mut Turn<'_>, key: Key) {
        let Some(session) = self.io.sessions.get(key).filter(|s| s.up) else { return };
        debug_assert!(session.links.is_empty(), "a session goes down after its paths");
        session.up = false;
        while let Some(session) = self.io.sessions.get(key)
            && let Some(id) = session.permits.abort()
            && let Some(pending) = session.permits.finish(id)
        {
            let aborted = Err(Errno::ECONNABORTED);
            self.upper.completed(cx, &mut self.io, SessionKey(key), pending.cookie, aborted);
        }
        self.upper.session_down(cx, &mut self.io, SessionKey(key));
    }

    pub(in crate::client) fn set_policy(&mut self, id: SessionId, policy: Policy) {
        if let Some(key) = self.session_of(id)
            && let Some(session) = self.io.sessions.get(key)
        {
            session.policy = policy;
        }
    }

    /// Sends requests of lost paths by another one, as many as there is room for.
    pub(super) fn send_parked(&mut self, cx: &mut Turn<'_>, key: Key) {
        loop {
            match self.io.resend(key) {
                Ok(true) => {}
                Ok(false) => return,
                Err((id, why)) => {
                    let session = self.io.sessions.get(key);
                    let Some(pending) = session.and_then(|s| s.permits.finish(id)) else { return };
                    tracing::error!(%why, "a request cannot fail over to the path that is left");
                    self.upper.completed(cx, &mut self.io, SessionKey(key), pending.cookie, Err(Errno::EIO));
                }
            }
        }
    }

    /// Sends what found no room before. True if some is waiting.
    pub(super) fn send_all_parked(&mut self, cx: &mut Turn<'_>) -> bool {
        let waiting = self.io.sessions.iter().any(|(_, s)| waits(s));
        if waiting {
            self.io.sessions.keys().into_iter().for_each(|key| self.send_parked(cx, key));
        }
        waiting
    }
}

/// It has requests that wait for a path, and a path that might take them.
fn waits(session: &LaneSession) -> bool {
    session.permits.waiting() > 0 && !session.links.is_empty()
}
