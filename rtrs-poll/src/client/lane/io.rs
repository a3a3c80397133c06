//! Sessions, links and connections of a lane: what the upper layer may touch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iobuf::Registry;
use rtrs_proto::client::{Post, TooLong, encode_read, encode_write};
use rtrs_proto::wire::SgDesc;
use verbs::{SendOp, Sge, SgeList};

use super::Reports;
use super::con::Con;
use super::link::Link;
use super::memory::HEADER_LEN;
use super::permits::{MAX_PIECES, Pending, Pieces};
use super::session::LaneSession;
use super::slab::{Key, Slab};
use crate::client::error::Refused;
use crate::client::session::{Limits, Session};
use crate::client::upper::{Submit, Via};
use crate::upper::MAX_USR_LEN;

/// Names a session on this reactor; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionKey(pub(super) Key);

/// Everything of a lane except the upper layer, which gets it as argument.
pub struct Io {
    // Dropped in this order: the queue pairs use the links' memory.
    pub(super) cons: Slab<Con>,
    pub(super) links: Slab<Link>,
    pub(super) sessions: Slab<LaneSession>,
    /// Connections with something to post.
    dirty: Vec<Key>,
    pub(super) reports: Arc<dyn Reports>,
    pub(super) registry: Arc<Registry>,
    /// Where a header is put together.
    header: Box<[u8; HEADER_LEN]>,
    /// Origin of `now_ns`.
    epoch: Instant,
    /// When this turn began.
    pub(super) now_ns: u64,
    /// When the next heartbeat, or look at old requests, is due.
    pub(super) next_beat: Option<Instant>,
}

impl Io {
    pub(super) fn new(reports: Arc<dyn Reports>, registry: Arc<Registry>, epoch: Instant) -> Self {
        Self {
            links: Slab::default(),
            cons: Slab::default(),
            sessions: Slab::default(),
            dirty: Vec::new(),
            reports,
            registry,
            header: Box::new([0; HEADER_LEN]),
            epoch,
            now_ns: 0,
            next_beat: None,
        }
    }

    /// Queues a request, to be posted with all others of this turn. `Ok`: exactly one
    /// [`Upper::completed`](crate::client::Upper::completed) with its cookie will follow, never from within this call.
    ///
    /// # Errors
    /// [`Refused`]; nothing has happened then.
    pub fn submit(&mut self, session: SessionKey, request: &Submit<'_>) -> Result<(), Refused> {
        let Self { sessions, links, cons, header, now_ns, .. } = self;
        let session = sessions.get(session.0).filter(|s| s.up).ok_or(Refused::Down)?;
        let data = check(&session.session.limits, request)?;
        let id = session.permits.next().ok_or(Refused::Busy)?;
        let index = session.permits.index(id).ok_or(Refused::Busy)?;
        let (link, con) = session.choose(links, cons, request.via)?;
        let (Some(link), Some(con)) = (links.get(link), cons.get(con)) else { return Err(Refused::Down) };
        send(link, con, id, index, request.usr, &data, &mut header[..])?;
        session.permits.take(Pending {
            cookie: request.cookie,
            via: request.via,
            usr_len: request.usr.len() as u16,
            data,
            since_ns: *now_ns,
            con: Some(con.key),
        });
        let key = con.key;
        self.mark(key);
        Ok(())
    }

    /// Sends a request that waits for another path, if there is one. `Ok(true)`: there may be more of them.
    ///
    /// # Errors
    /// No path will ever take this one: it is out of the queue, and must end with that.
    pub(super) fn resend(&mut self, session: Key) -> Result<bool, (u16, Refused)> {
        let Self { sessions, links, cons, header, now_ns, registry, .. } = self;
        let Some(session) = sessions.get(session).filter(|s| s.up) else { return Ok(false) };
        let Some(via) = session.permits.next_parked().map(|(_, p, _)| p.via) else { return Ok(false) };
        let Ok((link, con)) = session.choose(links, cons, via) else { return Ok(false) };
        let (Some(link), Some(con)) = (links.get(link), cons.get(con)) else { return Ok(false) };
        let Some((id, pending, usr)) = session.permits.next_parked() else { return Ok(false) };
        let Some(index) = session.permits.index(id) else { return Ok(false) };
        match send(link, con, id, index, usr, &pending.data, &mut header[..]) {
            Ok(()) => {
                link.counters().failed_over();
                session.permits.unpark(Some(con.key), *now_ns);
                let key = con.key;
                self.mark(key);
                Ok(true)
            }
            // Its region may be new to this path's device.
            Err(Refused::Unregistered)
                if link.keys.as_ref().is_none_or(|k| k.generation != registry.generation()) =>
            {
                Ok(false)
            }
            Err(refused) => {
                session.permits.unpark(None, *now_ns);
                Err((id, refused))
            }
        }
    }

    /// What a session is; `None` once it has ended.
    pub fn session(&mut self, session: SessionKey) -> Option<&Arc<Session>> {
        self.sessions.get(session.0).map(|s| &s.session)
    }

    /// Requests of this reactor in flight.
    pub fn inflight(&mut self, session: SessionKey) -> usize {
        self.sessions.get(session.0).map_or(0, |s| s.permits.inflight())
    }

    /// Buffer ids of this reactor that are free.
    pub fn free(&mut self, session: SessionKey) -> usize {
        self.sessions.get(session.0).map_or(0, |s| s.permits.free())
    }

    pub(super) fn mark(&mut self, key: Key) {
        let Some(con) = self.cons.get(key) else { return };
        if !con.dirty {
            con.dirty = true;
            self.dirty.push(key);
        }
    }

    pub(super) fn reserve(&mut self) {
        self.dirty.reserve(self.cons.capacity());
    }

    /// Reports the first failure of a link.
    pub(super) fn broken(&mut self, con: Key, why: &str) {
        let Some(con) = self.cons.get(con) else { return };
        let (link, why) = (con.link, format!("con {}: {why}", con.cid));
        self.link_broken(link, why);
    }

    /// The queue pair of `con` was flushed: the connection manager knows, or will hear, why.
    pub(super) fn ended(&mut self, con: Key) {
        let Some(con) = self.cons.get(con) else { return };
        let Some(link) = self.links.get(con.link) else { return };
        if !std::mem::replace(&mut link.broken, true) {
            self.reports.link_ended(link.path.id, con.cid);
        }
    }

    pub(super) fn link_broken(&mut self, link: Key, why: String) {
        let Some(link) = self.links.get(link) else { return };
        if !std::mem::replace(&mut link.broken, true) {
            self.reports.link_broken(link.path.id, why);
        }
    }

    /// A turn begins.
    pub(super) fn tick(&mut self, now: Instant) {
        self.now_ns = now.saturating_duration_since(self.epoch).as_nanos() as u64;
    }

    pub(super) fn instant(&self, ns: u64) -> Instant {
        self.epoch + Duration::from_nanos(ns)
    }

    /// See [`super::LaneRef::abandon`].
    pub(super) fn abandon(&mut self, cookies: &[u64]) -> usize {
        let (mut ended, mut cut) = (0, Vec::new());
        for key in self.sessions.keys() {
            while let Some(con) = self.sessions.get(key).and_then(|s| s.permits.abandon(cookies)) {
                ended += 1;
                let Some(key) = con else { continue };
                let Some((link, cid)) = self.cons.get(key).map(|c| (c.link, c.cid)) else { continue };
                if let Some(link) = self.links.get(link) {
                    link.counters().ended(1);
                }
                self.link_broken(link, format!("con {cid}: a user left without waiting for its requests"));
                cut.push(key);
            }
        }
        // With the queue pair goes all that the server could do to the memory; the path is closed by the control thread.
        cut.into_iter().for_each(|key| drop(self.cons.remove(key)));
        ended
    }

    /// Posts what is due on every dirty connection.
    pub(super) fn post(&mut self) {
        for i in 0..self.dirty.len() {
            let key = self.dirty[i];
            let Some(con) = self.cons.get(key) else { continue };
            if let Err(why) = con.post() {
                self.broken(key, &why);
            }
        }
        self.dirty.clear();
    }
}

/// What every path of the session takes.
fn check(limits: &Limits, request: &Submit<'_>) -> Result<Pieces, Refused> {
    if request.usr.len() > MAX_USR_LEN {
        return Err(TooLong::Header { got: request.usr.len(), most: MAX_USR_LEN }.into());
    }
    let pieces = |got| Refused::Pieces { got, most: limits.max_pieces };
    let data = Pieces::new(request.data).ok_or(pieces(MAX_PIECES + 1))?;
    if data.as_slice().len() > limits.max_pieces {
        return Err(pieces(data.as_slice().len()));
    }
    if data.bytes() > limits.max_io_size.into() {
        return Err(Refused::TooMuchData { got: data.bytes(), most: limits.max_io_size });
    }
    Ok(data)
}

/// Queues a request with buffer `id`, the reactor's `index`th, on a connection that has room for it.
fn send(
    link: &mut Link,
    con: &mut Con,
    id: u16,
    index: usize,
    usr: &[u8],
    data: &Pieces,
    header: &mut [u8],
) -> Result<(), Refused> {
    let (post, mut sges) = lay_out(link, id, usr, data, header)?;
    let chunk = *link.chunks.get(index).ok_or(Refused::Down)?;
    let staged = link.memory.stage_header(index, &header[..post.hdr_len]);
    let fits = sges.push(staged.ok_or(Refused::Down)?);
    debug_assert!(fits, "pieces leave room for the header");
    con.inflight += 1;
    link.inflight += 1;
    let addr = chunk.addr + u64::from(post.chunk_off);
    con.push(SendOp::WriteImm { addr, rkey: chunk.rkey, imm: post.imm }, sges);
    link.counters().submitted(data.is_read(), data.bytes() + usr.len() as u64);
    Ok(())
}

/// Writes the header of a request to `header`, with the keys of the link's device; returns how to post it and the
/// pieces of data that go before it.
fn lay_out(
    link: &Link,
    id: u16,
    usr: &[u8],
    data: &Pieces,
    header: &mut [u8],
) -> Result<(Post, SgeList), Refused> {
    let keys = link.keys.as_ref().ok_or(Refused::Down)?;
    let geometry = &link.geometry;
    // No more than `Limits::max_io_size`, by `check`.
    let len = data.bytes() as u32;
    let mut sges = SgeList::EMPTY;
    if data.is_read() {
        let desc = match data.as_slice().first() {
            Some(target) => {
                let (_, rkey) = keys.find(target).ok_or(Refused::Unregistered)?;
                Some(SgDesc::new(target.addr, rkey, target.len))
            }
            None => None,
        };
        return Ok((encode_read(geometry, id, usr, len, desc, false, header)?, sges));
    }
    for piece in data.as_slice() {
        let (lkey, _) = keys.find(piece).ok_or(Refused::Unregistered)?;
        let fits = sges.push(Sge { addr: piece.addr, len: piece.len, lkey });
        debug_assert!(fits, "no more than MAX_PIECES");
    }
    Ok((encode_write(geometry, id, usr, len, header)?, sges))
}

impl Via {
    /// In messages.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Service => "administration",
            Self::Io => "I/O",
        }
    }
}
