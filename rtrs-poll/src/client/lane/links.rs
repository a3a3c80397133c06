//! How paths come to a reactor and leave it.

use std::sync::Arc;

use reactor::Turn;
use rtrs_proto::heartbeat::Heartbeat;
use rtrs_proto::imm;
use verbs::Device;

use super::Lane;
use super::con::{Broken, Con};
use super::io::{Io, SessionKey};
use super::link::{Link, LinkSetup, LinkStart};
use super::slab::Key;
use super::tag;
use crate::client::keys::KeyTable;
use crate::client::path::PathId;
use crate::client::session::SessionId;
use crate::client::upper::Upper;

impl<U: Upper> Lane<U> {
    /// Takes over the connections of a path, posts their receives, and sends INFO_REQ if con 0 is among them.
    pub(in crate::client) fn open_link(&mut self, setup: LinkSetup) {
        let path = setup.path.id;
        if let Err(why) = self.try_open(setup) {
            // What was opened is closed when the control thread says so; with nothing opened, that only answers.
            self.io.reports.link_broken(path, why);
        }
    }

    fn try_open(&mut self, mut setup: LinkSetup) -> Result<(), Broken> {
        let (keyed, info_req) = (setup.rotating_keys, setup.info_req.take());
        let new_cons = std::mem::take(&mut setup.cons);
        let Io { links, cons, .. } = &mut self.io;
        let link_key = links.insert_with(|_| Link::new(setup));
        let link = links.get(link_key).ok_or("link is gone")?;
        let mut receive = 0;
        for c in new_cons {
            let (cid, receives) = (c.cid, c.sizes.receives);
            let key = cons.insert_with(|key| Con::new(key, link_key, cid, c.qp, c.sizes, receive));
            receive += receives;
            if cid == 0 {
                link.service = Some(key);
            } else {
                link.io.push(key);
            }
            let con = cons.get(key).ok_or("connection is gone")?;
            con.post_first_receives(&link.memory, keyed)?;
        }
        if receive > tag::MAX_NUMBER || cons.capacity() > tag::MAX_CONS {
            return Err("too many connections on one reactor".into());
        }
        if let (Some(message), Some(key)) = (info_req, link.service) {
            let sge = link.memory.stage_info_req(&message).ok_or("no room for INFO_REQ")?;
            cons.get(key).ok_or("connection is gone")?.push_info_req(sge);
            self.io.mark(key);
        }
        self.io.reserve();
        self.io.post();
        Ok(())
    }

    fn link_of(&self, path: PathId) -> Option<Key> {
        self.io.links.iter().find(|(_, l)| l.path.id == path).map(|(k, _)| k)
    }

    /// Sends a heartbeat at once, if con 0 of the path is here: the transport then notices a server that is gone.
    pub(in crate::client) fn ask(&mut self, path: PathId) {
        let service = self.link_of(path).and_then(|key| self.io.links.get(key)).and_then(|link| link.service);
        let Some(key) = service else { return };
        if let Some(con) = self.io.cons.get(key).filter(|c| c.can_beat()) {
            con.push_imm(imm::HB_MSG);
            self.io.mark(key);
            self.io.post();
        }
    }

    pub(super) fn session_of(&self, session: SessionId) -> Option<Key> {
        self.io.sessions.iter().find(|(_, s)| s.session.id == session).map(|(k, _)| k)
    }

    /// The chunks are known: requests of the session may take this path.
    pub(in crate::client) fn link_up(&mut self, cx: &mut Turn<'_>, path: PathId, start: LinkStart) {
        self.io.tick(cx.now);
        let (Some(key), Some(session_key)) = (self.link_of(path), self.session_of(start.session)) else {
            return;
        };
        let Io { links, sessions, now_ns, .. } = &mut self.io;
        // One that is broken has been reported, and will be closed.
        let Some(link) = links.get(key).filter(|l| !l.broken) else { return };
        link.chunks = start.chunks.into();
        link.keys = Some(start.keys);
        link.session = Some(session_key);
        link.heartbeat = link.service.map(|_| Heartbeat::new(start.heartbeat, *now_ns));
        if let Some(session) = sessions.get(session_key) {
            session.add_link(path, key);
        }
        self.io.find_next_beat();
        self.send_parked(cx, session_key);
        self.io.post();
    }

    /// Lets go of a path: destroys its queue pairs here, and only then lets its requests go by another path, or
    /// fail, so that nobody gets memory back that the server can still write to.
    pub(in crate::client) fn close_link(&mut self, cx: &mut Turn<'_>, path: PathId) {
        self.io.tick(cx.now);
        let Some(key) = self.link_of(path) else { return self.io.reports.link_closed(path, None) };
        let Some(link) = self.io.links.remove(key) else { return };
        let cons: Vec<Key> = link.cons().collect();
        cons.iter().for_each(|con| drop(self.io.cons.remove(*con)));
        if let Some(session_key) = link.session
            && let Some(session) = self.io.sessions.get(session_key)
        {
            session.remove_link(key);
            let parked = session.permits.park(&cons, |index, usr| link.memory.header(index, usr));
            link.counters().ended(parked as u64);
            let cookies: Vec<u64> = session.permits.last_parked(parked).collect();
            for cookie in cookies {
                self.upper.failing_over(cx, SessionKey(session_key), cookie, path);
            }
            self.send_parked(cx, session_key);
        }
        self.io.find_next_beat();
        self.io.reports.link_closed(path, Some(link.remains()));
        self.io.post();
    }

    /// The paths of `device` get another table of keys.
    pub(in crate::client) fn set_keys(&mut self, device: &Arc<dyn Device>, keys: &Arc<KeyTable>) {
        for key in self.io.links.keys() {
            let Some(link) = self.io.links.get(key).filter(|l| l.memory.is_on(device)) else { continue };
            if link.keys.is_some()
                && let Some(old) = link.keys.replace(keys.clone())
            {
                self.io.reports.keys_back(old);
            }
        }
    }
}
