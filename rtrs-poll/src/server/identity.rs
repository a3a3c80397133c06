//! Whose a path is: all paths of a session have one name, and the layer above says which addresses belong together. (That all
//! connections of a path have the same addresses is the session table's rule.)
//!
//! Two moments count. A connection request tells uuids: a path that would join a session that is up is judged there, so that
//! its client hears an errno. INFO_REQ tells the name, and nothing counts before it: everything is judged there again, and
//! whether the path may have a name that another session holds.

use std::net::IpAddr;

use reactor::Turn;
use rtrs_proto::admission::SessionId;
use rtrs_proto::errno::Errno;
use rtrs_proto::handshake::{ConnectRequest, parse_info_req};

use super::{PathEntry, Server, Verdict};
use crate::upper::Upper;

/// An INFO_REQ that waits for the end of a session whose name it takes.
pub(super) struct Claim {
    tag: u32,
    message: Vec<u8>,
}

impl<U: Upper> Server<U> {
    /// May the path that a request begins be part of the session that it names? A path that is there has been judged, and
    /// what makes no sense is left to the table.
    pub(super) fn judge_connection(
        &mut self,
        cx: &mut Turn<'_>,
        request: &ConnectRequest,
        peer: IpAddr,
    ) -> Result<(), (Errno, String)> {
        let known = self.table.sessions().find(|s| s.uuid == request.session_uuid).map(|s| s.id);
        let Some(session) = known else { return Ok(()) };
        if self.table.paths().any(|p| p.session == session && p.uuid == request.path_uuid) {
            return Ok(());
        }
        let Some(name) = self.sessions.get(&session).map(|s| s.name().to_owned()) else { return Ok(()) };
        match self.judge_join(session, &name, peer) {
            Verdict::Welcome => Ok(()),
            Verdict::Refused(why) => Err((Errno::EACCES, why)),
            Verdict::Displaces => {
                self.displace(cx, session, peer);
                Err((Errno::ECONNRESET, "the session is being taken from another address".into()))
            }
        }
    }

    /// May the path `tag` come up with this INFO_REQ? If not, it is closed, or waits for [`Server::names_freed`].
    pub(super) fn judge_info(&mut self, cx: &mut Turn<'_>, tag: u32, message: &[u8]) -> bool {
        // What makes no sense is left to the table.
        let Ok(name) = parse_info_req(message) else { return true };
        let Some(entry) = self.paths.get(&tag) else { return true };
        let (session, peer) = (entry.session_id, entry.path.peer.ip());
        let present = entry.path.session.name();
        let verdict = if present.is_empty() || present == name {
            self.judge_join(session, name, peer)
        } else {
            Verdict::Refused(format!("the session's name is {present:?}, this path says {name:?}"))
        };
        match verdict {
            Verdict::Welcome => {}
            Verdict::Refused(why) => {
                self.close_path(cx, tag, &why);
                return false;
            }
            Verdict::Displaces => {
                self.displace(cx, session, peer);
                self.close_path(cx, tag, "the session is being taken from another address");
                return false;
            }
        }
        !self.claims_name(cx, tag, session, name, message)
    }

    /// Another session has the name, but not with so good a right: it is ended, and the path waits for that.
    fn claims_name(
        &mut self,
        cx: &mut Turn<'_>,
        tag: u32,
        session: SessionId,
        name: &str,
        message: &[u8],
    ) -> bool {
        let Some(peer) = self.paths.get(&tag).map(|e| e.path.peer.ip()) else { return false };
        // Also those that are closing: they have the name until they are gone.
        let holds = |e: &&PathEntry| {
            let named = self.table.path(e.id).is_some_and(|p| p.name == Some(name));
            e.session_id != session && named
        };
        let holders: Vec<(SessionId, IpAddr)> =
            self.paths.values().filter(holds).map(|e| (e.session_id, e.path.peer.ip())).collect();
        let Some((holder, _)) = holders.first().copied() else { return false };
        let addresses: Vec<IpAddr> = holders.iter().map(|(_, ip)| *ip).collect();
        if self.events.borrow().judge_name(name, peer, &addresses) != Verdict::Displaces {
            return false;
        }
        if self.claims.iter().any(|claim| claim.tag == tag) {
            self.close_path(cx, tag, "a second INFO_REQ");
            return true;
        }
        self.claims.push(Claim { tag, message: message.into() });
        self.displace(cx, holder, peer);
        true
    }

    /// A path is gone: those that waited for its session's name try again.
    pub(super) fn names_freed(&mut self, cx: &mut Turn<'_>) {
        for Claim { tag, message } in std::mem::take(&mut self.claims) {
            self.info_req(cx, tag, &message);
        }
    }

    fn judge_join(&self, session: SessionId, name: &str, peer: IpAddr) -> Verdict {
        let Some(known) = self.sessions.get(&session) else { return Verdict::Welcome };
        let present: Vec<IpAddr> = self.up(session).map(|e| e.path.peer.ip()).collect();
        if present.is_empty() {
            return Verdict::Welcome;
        }
        self.events.borrow().judge_join(known, name, peer, &present)
    }

    /// Its paths that are up.
    fn up(&self, session: SessionId) -> impl Iterator<Item = &PathEntry> {
        self.paths.values().filter(move |e| e.session_id == session && !e.closing && e.path.is_up())
    }

    fn displace(&mut self, cx: &mut Turn<'_>, session: SessionId, by: IpAddr) {
        let of_it = |e: &&PathEntry| e.session_id == session && e.path.is_up();
        let tags: Vec<u32> = self.paths.values().filter(of_it).map(|e| e.path.tag).collect();
        for tag in tags {
            if let Some(entry) = self.paths.get(&tag).filter(|e| !e.closing) {
                let (session, peer) = (entry.path.session.name(), entry.path.peer);
                tracing::warn!(session, %peer, by = %by, "session ended: allow entries name the address that asks for it");
            }
            self.close_path(cx, tag, "the session is somebody else's");
        }
    }
}
