//! What becomes of sessions and paths, and what that means for mappings.

use std::time::Instant;

use reactor::Turn;
use rtrs_poll::client::{Event as RtrsEvent, PathError, PathId, SessionEnd, SessionId};

use super::session::{Failure, Want};
use super::{Event, Maps, State};
use crate::bdev::error::{self, MapError};
use crate::client::CallError;

impl Maps {
    pub(super) fn event(&mut self, cx: &mut Turn<'_>, event: Event) {
        match event {
            Event::Ready { session, generation } => {
                let Some(entry) = self.session_by_id(session.id) else { return };
                entry.ready = Some((session, generation));
                let name = entry.name.clone();
                self.of_session(&name).into_iter().for_each(|number| self.open_if_ready(cx, number));
            }
            Event::NotReady { session, why } => self.not_ready(cx, session, why),
            Event::Rtrs(event) => self.rtrs_event(cx, event),
        }
    }

    fn rtrs_event(&mut self, cx: &mut Turn<'_>, event: RtrsEvent) {
        match event {
            RtrsEvent::PathUp { session, path } => self.path_up(session, path),
            RtrsEvent::PathDown { session, path, why, next_attempt } => {
                tracing::debug!(%why, ?next_attempt, "path down");
                self.path_down(cx, session, path, why);
            }
            RtrsEvent::PathRemoved { session, path } => {
                let Some(s) = self.session_by_id(session) else { return };
                s.failures.remove(&path);
                s.answer(path, &[Want::Down, Want::Removed], &Ok(()));
                let gone = MapError::NoPath { session: s.name.clone(), path: "that was removed".into() };
                s.answer(path, &[Want::Up, Want::Added], &Err(gone));
            }
            RtrsEvent::SessionDown { session } => self.session_down(cx, session),
            RtrsEvent::SessionStalled { session } => self.session_stalled(session),
            RtrsEvent::SessionEnded { session, why } => self.session_ended(cx, session, &why),
            // Ready follows.
            RtrsEvent::SessionUp { .. } => {}
        }
    }

    /// SESS_INFO failed. A lost session says so itself.
    fn not_ready(&mut self, cx: &mut Turn<'_>, session: SessionId, why: CallError) {
        let Some(s) = self.session_by_id(session).filter(|_| why != CallError::NotConnected) else { return };
        let name = s.name.clone();
        tracing::warn!(session = name, %why, "SESS_INFO failed");
        let e = MapError::Connect {
            session: name.clone(),
            text: format!("SESS_INFO: {why}"),
            errno: why.errno(),
        };
        self.of_session(&name).into_iter().for_each(|number| self.not_opened(cx, number, &e));
    }

    fn path_up(&mut self, session: SessionId, path: PathId) {
        let Some(s) = self.session_by_id(session) else { return };
        s.connected.insert(path);
        s.failures.remove(&path);
        s.asked.clear();
        // The server lets a path in again only when it has finished with its former connections.
        let was_last = s.stale.remove(&path).is_some() && s.stale.is_empty();
        s.answer(path, &[Want::Up, Want::Added], &Ok(()));
        let name = s.name.clone();
        for number in self.of_session(&name) {
            if was_last {
                self.on_reactors(move |disks| disks.repeat(number));
            }
            let disk = self.maps.get(&number).and_then(|m| m.disk.as_ref());
            if let Some(disk) = disk.filter(|d| d.fence().is_up()) {
                disk.fence().lower(path.number());
                self.on_reactors(move |disks| disks.unfence(number));
            }
        }
    }

    fn path_down(&mut self, cx: &mut Turn<'_>, session: SessionId, path: PathId, why: PathError) {
        let named = self.name_of_path(cx.now, session, path);
        let Some(s) = self.session_by_id(session) else { return };
        if s.connected.remove(&path) {
            s.stale.insert(path, cx.now);
        }
        s.answer(path, &[Want::Down], &Ok(()));
        // The first half of what was asked for.
        if matches!(why, PathError::Reconnect) {
            return;
        }
        let why = Failure { path: named, why };
        let failed = error::connect(&s.name, why.to_string(), Some(&why.why));
        let added = s.waiters.iter().any(|(p, want, _)| *p == path && *want == Want::Added);
        s.answer(path, &[Want::Up, Want::Added], &Err(failed));
        s.failures.insert(path, why);
        if added {
            self.forget_path(cx, session, path);
        }
        self.fail_waiting(cx, session);
    }

    /// A path in words: addresses and port.
    fn name_of_path(&self, now: Instant, session: SessionId, path: PathId) -> String {
        let info = self.initiator.borrow().client().borrow().session(now, session);
        let found = info.into_iter().flat_map(|i| i.paths).find(|p| p.id == path);
        found.map_or_else(String::new, |p| match p.src {
            Some(src) => format!("{src}@{}", p.dst),
            None => p.dst.to_string(),
        })
    }

    /// Nobody waits for a session whose paths have all failed.
    fn fail_waiting(&mut self, cx: &mut Turn<'_>, session: SessionId) {
        let client = self.initiator.borrow().client().clone();
        let Some(info) = client.borrow().session(cx.now, session) else { return };
        let Some(s) = self.session_by_id(session) else { return };
        if !s.connected.is_empty() || !info.paths.iter().all(|p| s.failures.contains_key(&p.id)) {
            return;
        }
        let last = s.failures.values().next_back().map(|f| &f.why);
        let e = error::connect(&s.name, s.why(), last);
        let name = s.name.clone();
        self.of_session(&name).into_iter().for_each(|number| self.not_opened(cx, number, &e));
    }

    fn session_down(&mut self, cx: &mut Turn<'_>, session: SessionId) {
        let Some(s) = self.session_by_id(session) else { return };
        s.ready = None;
        let (name, why) = (s.name.clone(), s.why());
        self.of_session(&name).into_iter().for_each(|number| self.closed(cx.now, number, &why));
    }

    /// Nothing will be tried by itself. If somebody wanted it so, the devices wait; else they are given up.
    fn session_stalled(&mut self, session: SessionId) {
        let Some(s) = self.session_by_id(session) else { return };
        if !s.asked.is_empty() || s.ending {
            return;
        }
        let (name, why) = (s.name.clone(), format!("no reconnect attempt is left: {}", s.why()));
        self.of_session(&name).into_iter().for_each(|number| self.give_up(number, &why));
    }

    fn session_ended(&mut self, cx: &mut Turn<'_>, session: SessionId, why: &SessionEnd) {
        let Some(s) = self.session_by_id(session) else { return };
        s.id = None;
        s.ready = None;
        s.connected.clear();
        s.reason = Some(why.to_string());
        let (name, ending) = (s.name.clone(), s.ending);
        let e = MapError::Ended { session: name.clone(), text: why.to_string() };
        s.waiters.drain(..).for_each(|(_, _, done)| done(Err(e.clone())));
        if ending {
            s.leaving.drain(..).for_each(|done| done(Ok(())));
            return self.sessions.retain(|s| s.name != name);
        }
        let why = why.to_string();
        for number in self.of_session(&name) {
            self.closed(cx.now, number, &why);
            // A mapping that never came up and nobody waits for is kept for a later remap.
            if self.maps.get(&number).is_some_and(|m| m.state != State::Unmapped) {
                self.give_up(number, &why);
            }
        }
    }
}
