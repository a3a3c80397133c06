//! Which connections a server takes, and what they add up to (`rtrs-srv.c`, `rtrs_rdma_connect`, `get_or_create_srv`,
//! `process_info_req`, `rtrs_srv_close_work`).
//!
//! A session is one client; it owns the chunks and, while a path of it is up, the upper layer's session. A path is
//! one pair of addresses; it has `cid_num` connections, all of which must be there before INFO_REQ brings it up.
//!
//! ```text
//!             admit (first cid)          info_req ok
//!   (none) ───────────────────▶ Connecting ─────────▶ Up
//!                                 │  ▲ admit, prove   │
//!                                 │  └─ (more cids)   │ begin_close
//!    info_req or prove refused,   │                   ▼
//!    evicted, expired, begin_close└──────────────▶ Closing ── path_closed ──▶ (none)
//! ```
//!
//! The table keeps no resources. The driver keeps its own by [`PathId`] and [`SessionId`], tears them down between
//! [`SessionTable::begin_close`] and [`SessionTable::path_closed`], and until the latter a client that comes back
//! with the same path is refused, so that never two incarnations of it share memory.
//!
//! Every list that a client can make grow has a limit in [`Limits`], and of each limit a source has a share and known
//! clients a reserve ([`quota::Limit`]):
//! - A path is *unproved* until a connection of it is established, which takes an answer to what we sent to its address:
//!   anybody can send a request in somebody's name. Unproved paths have a small table of their own, in which a new one
//!   takes the place of the oldest one of the source that has most.
//! - A path that is proved and not up counts, but gives way to others where a limit is reached.
//! - A path that is up stays.

use std::fmt;
use std::net::IpAddr;

use quota::{Known, Over, Source};

use crate::errno::Errno;
use crate::handshake::{BadConnReq, BadInfoReq, ConnectRequest, parse_info_req};
use crate::slab::{Key, Slab};
use crate::wire::{MAX_PATHS_NUM, Uuid};

mod limits;
mod room;

pub use limits::{Limits, Resource, Usage};

/// Names a path from its first connection to [`SessionTable::path_closed`]. Never means another path later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathId(Key);

/// Names a session from its first connection until its last path is closed. Never means another session later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(Key);

impl PathId {
    /// A small number, unique among the paths that exist now.
    pub const fn index(self) -> usize {
        self.0.index as usize
    }
}

impl SessionId {
    /// A small number, unique among the sessions that exist now.
    pub const fn index(self) -> usize {
        self.0.index as usize
    }
}

impl fmt::Display for PathId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "path {}.{}", self.0.index, self.0.generation)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {}.{}", self.0.index, self.0.generation)
    }
}

/// Why a connection is refused. Send [`crate::handshake::reject`] with [`Refusal::errno`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The request makes no sense by itself.
    #[error(transparent)]
    Malformed(#[from] BadConnReq),
    /// A later path of a session that is not here, as after a restart of the server.
    #[error("no such session, and first_conn is not set")]
    NoSession,
    /// The path exists and is up or being torn down, usually an old incarnation of the same one.
    #[error("{0} is {1}, not connecting")]
    NotConnecting(PathId, PathState),
    /// The path's requests disagree.
    #[error("cid_num {got} where the path's first connection had {had}")]
    CidNum {
        /// In this request.
        got: u16,
        /// In the first one.
        had: u16,
    },
    /// This connection is there already.
    #[error("cid {0} is connected already")]
    CidTaken(u16),
    /// The session is full.
    #[error("session has {MAX_PATHS_NUM} paths already")]
    Paths,
    /// Another path of the session joins the same two addresses.
    #[error("{0} has the same addresses")]
    Addresses(PathId),
    /// Above [`Limits::max_cid_num`].
    #[error("path of {got} connections: this server takes {most}")]
    TooManyCids {
        /// In this request.
        got: u16,
        /// The limit.
        most: u16,
    },
    /// The path's first connection had other addresses: of the client, and of the server.
    #[error("the path began from {0} to {1}")]
    OtherAddresses(IpAddr, IpAddr),
    /// A limit, or the source's share of it, is reached.
    #[error("{}", .1.explain(*.2, .0))]
    Limit(Resource, Over, quota::Limit),
    /// Every place for unproved connections is taken by clients that come first.
    #[error("limit of {0} connections that nobody has confirmed reached")]
    Unproved(usize),
}

impl Refusal {
    /// What the kernel server answers in such a case; ENOMEM for our own limits.
    pub const fn errno(&self) -> Errno {
        match self {
            Refusal::NoSession => Errno::ENXIO,
            Refusal::Addresses(_) => Errno::EEXIST,
            Refusal::TooManyCids { .. } | Refusal::Limit(..) | Refusal::Unproved(_) => Errno::ENOMEM,
            Refusal::Malformed(_)
            | Refusal::NotConnecting(..)
            | Refusal::CidNum { .. }
            | Refusal::CidTaken(_)
            | Refusal::OtherAddresses(..)
            | Refusal::Paths => Errno::ECONNRESET,
        }
    }
}

/// Where a path is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathState {
    /// Connections arrive; INFO_REQ has not.
    Connecting,
    /// Requests flow.
    Up,
    /// The driver tears it down.
    Closing,
}

impl fmt::Display for PathState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PathState::Connecting => "connecting",
            PathState::Up => "connected",
            PathState::Closing => "closing",
        })
    }
}

/// A connection that belongs to the table now. If the driver cannot set it up, it closes the whole path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Its session.
    pub session: SessionId,
    /// Its path.
    pub path: PathId,
    /// Its place in the path, below `cid_num`.
    pub cid: u16,
    /// Connections the path will have.
    pub cid_num: u16,
    /// The session began with it.
    pub new_session: bool,
    /// The path began with it.
    pub new_path: bool,
    /// Paths that had to make room: in [`PathState::Closing`] already, and the driver tears them down.
    pub evicted: Vec<PathId>,
}

/// A path is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathUp {
    /// Its session.
    pub session: SessionId,
    /// The name in its INFO_REQ.
    pub name: Box<str>,
    /// No other path of the session was up: the upper layer's session begins.
    pub first_of_session: bool,
    /// As [`Admitted::evicted`].
    pub evicted: Vec<PathId>,
}

/// Why a path must be closed instead of coming up. The table has it in [`PathState::Closing`] already.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// The id is stale; there is nothing to close.
    #[error("path is gone")]
    Gone,
    /// It is up (a second INFO_REQ) or closing.
    #[error("INFO_REQ on a path that is {0}")]
    State(PathState),
    /// The message makes no sense.
    #[error(transparent)]
    Message(#[from] BadInfoReq),
    /// Too early.
    #[error("INFO_REQ with {have} of {cid_num} connections present")]
    Incomplete {
        /// Connections there are.
        have: u16,
        /// Connections announced.
        cid_num: u16,
    },
    /// It cannot be let in.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no memory for its chunks: a limit, or the source's share.
    #[error("{}", .0.explain(*.1, Resource::Memory))]
    Memory(Over, quota::Limit),
    /// Another client has the name. After a crash of a client this lasts until heartbeats find its old session dead.
    #[error("session name {0:?} is in use by another client")]
    NameTaken(Box<str>),
}

/// A path is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathClosed {
    /// Its session.
    pub session: SessionId,
    /// Connections it had.
    pub connections: u16,
    /// It had been up and was the session's last such path: the upper layer's session ends, devices close.
    pub last_up: bool,
    /// It was the session's last path of any kind: free the chunks; the session's id is stale now.
    pub session_gone: bool,
}

/// One path, for listings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathView<'a> {
    /// Its id.
    pub id: PathId,
    /// Its session's id.
    pub session: SessionId,
    /// Its state.
    pub state: PathState,
    /// `sess_uuid` on the wire.
    pub uuid: Uuid,
    /// The client's address.
    pub src: IpAddr,
    /// Our address.
    pub dst: IpAddr,
    /// Connections announced.
    pub cid_num: u16,
    /// Connections present.
    pub connections: u16,
    /// The client's count of attempts.
    pub recon_cnt: u16,
    /// From its INFO_REQ.
    pub name: Option<&'a str>,
}

/// One session, for listings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionView<'a> {
    /// Its id.
    pub id: SessionId,
    /// `paths_uuid` on the wire.
    pub uuid: Uuid,
    /// The name of the path that first came up; `None` before.
    pub name: Option<&'a str>,
    /// Paths of any state.
    pub paths: usize,
    /// Paths that came up and are not closed yet.
    pub paths_up: usize,
}

#[derive(Debug)]
struct Session {
    /// Who began it: it counts towards this one's share.
    source: Source,
    uuid: Uuid,
    name: Option<Box<str>>,
    paths: Vec<PathId>,
    paths_up: usize,
}

#[derive(Debug)]
struct Path {
    session: SessionId,
    uuid: Uuid,
    src: IpAddr,
    dst: IpAddr,
    recon_cnt: u16,
    state: PathState,
    /// Its address has answered.
    proved: bool,
    /// It has to make room: what it had counts no more.
    evicted: bool,
    /// Strangers do not push it out.
    known: bool,
    was_up: bool,
    name: Option<Box<str>>,
    cids: Cids,
    deadline_ns: u64,
}

/// Which of a path's connections are there.
#[derive(Debug)]
struct Cids {
    cid_num: u16,
    present: u16,
    bits: Box<[u64]>,
}

impl Cids {
    fn new(cid_num: u16) -> Cids {
        Cids { cid_num, present: 0, bits: vec![0; usize::from(cid_num).div_ceil(64)].into() }
    }

    fn contains(&self, cid: u16) -> bool {
        self.bits[usize::from(cid / 64)] & 1 << (cid % 64) != 0
    }

    fn insert(&mut self, cid: u16) {
        self.bits[usize::from(cid / 64)] |= 1 << (cid % 64);
        self.present += 1;
    }
}

/// Sources that are remembered because a client there has opened a device.
const MAX_KNOWN: usize = 1024;

/// All sessions of a server. Paths are told apart by their pairs of addresses, which have no port.
///
/// For the control thread: look-ups are linear in the number of sessions or paths.
#[derive(Debug)]
pub struct SessionTable {
    limits: Limits,
    sessions: Slab<Session>,
    paths: Slab<Path>,
    known: Known,
}

impl SessionTable {
    /// An empty table.
    pub fn new(limits: Limits) -> SessionTable {
        SessionTable { limits, sessions: Slab::new(), paths: Slab::new(), known: Known::new(MAX_KNOWN) }
    }

    /// A client at `src` has done something useful: the reserve is for it, too, from now on.
    pub fn remember(&mut self, src: IpAddr) {
        self.known.remember(Source::of(src));
    }

    /// Decides about a connection from `src` (client) to `dst` (us). `named`: the operator expects clients at `src`.
    ///
    /// # Errors
    /// [`Refusal`], which changes nothing.
    pub fn admit(
        &mut self,
        now_ns: u64,
        request: &ConnectRequest,
        src: IpAddr,
        dst: IpAddr,
        named: bool,
    ) -> Result<Admitted, Refusal> {
        let session = self.find_session(request.session_uuid);
        if session.is_none() && !request.first_conn {
            return Err(Refusal::NoSession);
        }
        let path = session.and_then(|s| self.find_path(s, request.path_uuid));
        match (session, path) {
            (_, Some(path)) => self.check_known_path(path, request, (src, dst))?,
            (Some(session), None) => self.check_new_path(session, src, dst)?,
            (None, None) => {}
        }
        self.check_connection(request)?;
        let known = named || self.known.contains(Source::of(src));
        let evicted = self.room_for_request(session, path, src, known)?;

        let (new_session, new_path) = (session.is_none(), path.is_none());
        let session = session.unwrap_or_else(|| self.add_session(request.session_uuid, src));
        let path = path.unwrap_or_else(|| self.add_path(now_ns, session, request, (src, dst), known));
        if let Some(path) = self.paths.get_mut(path.0) {
            path.cids.insert(request.cid);
        }
        let (cid, cid_num) = (request.cid, request.cid_num);
        Ok(Admitted { session, path, cid, cid_num, new_session, new_path, evicted })
    }

    fn check_known_path(
        &self,
        id: PathId,
        request: &ConnectRequest,
        addresses: (IpAddr, IpAddr),
    ) -> Result<(), Refusal> {
        let Some(path) = self.paths.get(id.0) else { return Ok(()) };
        if path.state != PathState::Connecting {
            return Err(Refusal::NotConnecting(id, path.state));
        }
        if (path.src, path.dst) != addresses {
            return Err(Refusal::OtherAddresses(path.src, path.dst));
        }
        if path.cids.cid_num != request.cid_num {
            return Err(Refusal::CidNum { got: request.cid_num, had: path.cids.cid_num });
        }
        if request.cid >= path.cids.cid_num || path.cids.contains(request.cid) {
            return Err(Refusal::CidTaken(request.cid));
        }
        Ok(())
    }

    fn check_new_path(&self, session: SessionId, src: IpAddr, dst: IpAddr) -> Result<(), Refusal> {
        let Some(session) = self.sessions.get(session.0) else { return Ok(()) };
        let paths = || session.paths.iter().filter_map(|id| Some((*id, self.paths.get(id.0)?)));
        if paths().filter(|(_, p)| p.proved).count() >= MAX_PATHS_NUM {
            return Err(Refusal::Paths);
        }
        match paths().find(|(_, p)| (p.src, p.dst) == (src, dst)) {
            Some((other, _)) => Err(Refusal::Addresses(other)),
            None => Ok(()),
        }
    }

    fn check_connection(&self, request: &ConnectRequest) -> Result<(), Refusal> {
        // `ConnectRequest` may have been built by hand; the bitmap relies on this.
        if request.cid >= request.cid_num {
            return Err(BadConnReq::Cid { cid: request.cid, cid_num: request.cid_num }.into());
        }
        if request.cid_num > self.limits.max_cid_num {
            return Err(Refusal::TooManyCids { got: request.cid_num, most: self.limits.max_cid_num });
        }
        Ok(())
    }

    fn add_session(&mut self, uuid: Uuid, src: IpAddr) -> SessionId {
        let source = Source::of(src);
        SessionId(self.sessions.insert(Session { source, uuid, name: None, paths: Vec::new(), paths_up: 0 }))
    }

    fn add_path(
        &mut self,
        now_ns: u64,
        session: SessionId,
        request: &ConnectRequest,
        (src, dst): (IpAddr, IpAddr),
        known: bool,
    ) -> PathId {
        let id = PathId(self.paths.insert(Path {
            session,
            uuid: request.path_uuid,
            src,
            dst,
            recon_cnt: request.recon_cnt,
            state: PathState::Connecting,
            proved: false,
            evicted: false,
            known,
            was_up: false,
            name: None,
            cids: Cids::new(request.cid_num),
            deadline_ns: now_ns.saturating_add(self.limits.half_open_ns),
        }));
        if let Some(session) = self.sessions.get_mut(session.0) {
            session.paths.push(id);
        }
        id
    }

    /// Takes the INFO_REQ of a path. After `Ok`, answer with [`crate::handshake::info_rsp`] and start heartbeats.
    ///
    /// # Errors
    /// [`CloseReason`]; the path is closing, and the driver tears it down as after [`SessionTable::begin_close`].
    pub fn info_req(&mut self, id: PathId, bytes: &[u8]) -> Result<PathUp, CloseReason> {
        // On some devices INFO_REQ overtakes the news of the connection. Nothing fails after others have given way.
        let up = self.check_info_req(id, bytes).and_then(|name| Ok((name, self.prove(id)?)));
        match up {
            Ok((name, evicted)) => self.path_up(id, name, evicted).ok_or(CloseReason::Gone),
            Err(reason) => {
                self.begin_close(id);
                Err(reason)
            }
        }
    }

    fn check_info_req<'b>(&self, id: PathId, bytes: &'b [u8]) -> Result<&'b str, CloseReason> {
        let path = self.paths.get(id.0).ok_or(CloseReason::Gone)?;
        if path.state != PathState::Connecting {
            return Err(CloseReason::State(path.state));
        }
        if path.cids.present != path.cids.cid_num {
            return Err(CloseReason::Incomplete { have: path.cids.present, cid_num: path.cids.cid_num });
        }
        let name = parse_info_req(bytes)?;
        let foreign = |p: &Path| p.session != path.session && p.name.as_deref() == Some(name);
        if self.paths.iter().any(|(_, p)| foreign(p)) {
            return Err(CloseReason::NameTaken(name.into()));
        }
        self.room_for_chunks(id)?;
        Ok(name)
    }

    fn path_up(&mut self, id: PathId, name: &str, evicted: Vec<PathId>) -> Option<PathUp> {
        let path = self.paths.get_mut(id.0)?;
        let session = self.sessions.get_mut(path.session.0)?;
        path.state = PathState::Up;
        path.was_up = true;
        path.name = Some(name.into());
        let first_of_session = session.paths_up == 0;
        session.paths_up += 1;
        if first_of_session {
            session.name = Some(name.into());
        }
        Some(PathUp { session: path.session, name: name.into(), first_of_session, evicted })
    }

    /// The driver starts to tear the path down. False if that had begun before, or the id is stale: then someone
    /// else is at it.
    pub fn begin_close(&mut self, id: PathId) -> bool {
        match self.paths.get_mut(id.0) {
            Some(path) if path.state != PathState::Closing => {
                path.state = PathState::Closing;
                true
            }
            _ => false,
        }
    }

    /// The driver has torn the path down: connections destroyed, no request in flight, memory unregistered.
    /// `None` if the id is stale. (A path that was not closing is forgotten all the same.)
    pub fn path_closed(&mut self, id: PathId) -> Option<PathClosed> {
        let path = self.paths.remove(id.0)?;
        let session = self.sessions.get_mut(path.session.0)?;
        session.paths.retain(|&p| p != id);
        session.paths_up -= usize::from(path.was_up);
        let last_up = path.was_up && session.paths_up == 0;
        let session_gone = session.paths.is_empty();
        if session_gone {
            self.sessions.remove(path.session.0);
        }
        Some(PathClosed { session: path.session, connections: path.cids.present, last_up, session_gone })
    }

    /// Paths that took too long to come up. They stay in the list until the driver closes them.
    pub fn expired(&self, now_ns: u64) -> impl Iterator<Item = PathId> {
        self.half_open().filter(move |(_, deadline)| *deadline <= now_ns).map(|(id, _)| id)
    }

    /// When [`SessionTable::expired`] will next have something new; `None` if every path is up or closing.
    pub fn deadline(&self) -> Option<u64> {
        self.half_open().map(|(_, deadline)| deadline).min()
    }

    fn half_open(&self) -> impl Iterator<Item = (PathId, u64)> {
        let connecting = self.paths.iter().filter(|(_, p)| p.state == PathState::Connecting);
        connecting.map(|(key, p)| (PathId(key), p.deadline_ns))
    }

    fn find_session(&self, uuid: Uuid) -> Option<SessionId> {
        self.sessions.iter().find(|(_, s)| s.uuid == uuid).map(|(key, _)| SessionId(key))
    }

    fn find_path(&self, session: SessionId, uuid: Uuid) -> Option<PathId> {
        let session = self.sessions.get(session.0)?;
        let has_uuid = |id: &PathId| self.paths.get(id.0).is_some_and(|p| p.uuid == uuid);
        session.paths.iter().copied().find(has_uuid)
    }

    /// Connections of all paths, including unproved ones and those being torn down.
    pub fn connections(&self) -> usize {
        self.paths.iter().map(|(_, p)| usize::from(p.cids.present)).sum()
    }

    /// All sessions.
    pub fn sessions(&self) -> impl Iterator<Item = SessionView<'_>> {
        self.sessions.iter().map(|(key, s)| s.view(SessionId(key)))
    }

    /// One session; `None` if the id is stale.
    pub fn session(&self, id: SessionId) -> Option<SessionView<'_>> {
        self.sessions.get(id.0).map(|s| s.view(id))
    }

    /// All paths.
    pub fn paths(&self) -> impl Iterator<Item = PathView<'_>> {
        self.paths.iter().map(|(key, p)| p.view(PathId(key)))
    }

    /// One path; `None` if the id is stale.
    pub fn path(&self, id: PathId) -> Option<PathView<'_>> {
        self.paths.get(id.0).map(|p| p.view(id))
    }
}

impl Session {
    fn view(&self, id: SessionId) -> SessionView<'_> {
        SessionView {
            id,
            uuid: self.uuid,
            name: self.name.as_deref(),
            paths: self.paths.len(),
            paths_up: self.paths_up,
        }
    }
}

impl Path {
    fn view(&self, id: PathId) -> PathView<'_> {
        PathView {
            id,
            session: self.session,
            state: self.state,
            uuid: self.uuid,
            src: self.src,
            dst: self.dst,
            cid_num: self.cids.cid_num,
            connections: self.cids.present,
            recon_cnt: self.recon_cnt,
            name: self.name.as_deref(),
        }
    }
}

#[cfg(test)]
mod tests;
