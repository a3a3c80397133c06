//! What one reactor has of a connected path.

use std::sync::Arc;

use rtrs_proto::client::Rbuf;
use rtrs_proto::heartbeat;
use rtrs_proto::heartbeat::Heartbeat;
use rtrs_proto::limits::Geometry;
use rtrs_proto::wire::InfoReq;
use verbs::Qp;

use super::con::{Con, ConSizes};
use super::memory::LinkMemory;
use super::slab::{Key, Slab};
use crate::client::keys::KeyTable;
use crate::client::path::{Counters, Path};
use crate::client::session::SessionId;
use crate::client::upper::Via;

/// A connection, established, on its way to its reactor.
pub(in crate::client) struct ConSetup {
    pub cid: u16,
    pub qp: Box<dyn Qp>,
    pub sizes: ConSizes,
}

/// A link on its way to its reactor. Fields are dropped in this order: the queue pairs use the memory.
pub(in crate::client) struct LinkSetup {
    pub cons: Vec<ConSetup>,
    pub memory: LinkMemory,
    pub path: Arc<Path>,
    /// Which of the session's reactors it is.
    pub index: usize,
    pub geometry: Geometry,
    pub rotating_keys: bool,
    /// With con 0: what to send once receives are posted.
    pub info_req: Option<InfoReq>,
}

/// What makes a link live.
pub(in crate::client) struct LinkStart {
    pub session: SessionId,
    /// Of the reactor's buffer ids.
    pub chunks: Vec<Rbuf>,
    pub keys: Arc<KeyTable>,
    pub heartbeat: heartbeat::Config,
}

/// What is left of a link, to be dropped where system calls do no harm.
pub(in crate::client) struct Remains {
    pub _memory: LinkMemory,
    pub _keys: Option<Arc<KeyTable>>,
}

pub(super) struct Link {
    pub path: Arc<Path>,
    index: usize,
    pub geometry: Geometry,
    pub rotating_keys: bool,
    pub memory: LinkMemory,
    /// Con 0.
    pub service: Option<Key>,
    /// All others.
    pub io: Vec<Key>,
    /// Of `io`: whose turn it is.
    turn: usize,
    /// Once it is live: the session that it serves, on this reactor.
    pub session: Option<Key>,
    /// The server's buffers by index of their id, with their keys now. Empty until it is live.
    pub chunks: Box<[Rbuf]>,
    pub keys: Option<Arc<KeyTable>>,
    /// Requests in flight here.
    pub inflight: u32,
    pub heartbeat: Option<Heartbeat>,
    /// Its failure has been reported: nothing is submitted any more.
    pub broken: bool,
}

impl Link {
    pub fn new(setup: LinkSetup) -> Self {
        Self {
            path: setup.path,
            index: setup.index,
            geometry: setup.geometry,
            rotating_keys: setup.rotating_keys,
            memory: setup.memory,
            service: None,
            io: Vec::new(),
            turn: 0,
            session: None,
            chunks: Box::default(),
            keys: None,
            inflight: 0,
            heartbeat: None,
            broken: false,
        }
    }

    /// New requests may take it.
    pub fn is_usable(&self) -> bool {
        !self.broken && !self.path.is_retiring()
    }

    pub fn counters(&self) -> &Counters {
        self.path.counters(self.index)
    }

    /// All connections.
    pub fn cons(&self) -> impl Iterator<Item = Key> {
        self.service.iter().chain(&self.io).copied()
    }

    /// A connection that takes one more request now. One lookup in the usual case.
    pub fn con_with_room(&mut self, cons: &mut Slab<Con>, via: Via) -> Option<Key> {
        let mut has_room = |key: &Key| cons.get(*key).is_some_and(|c| c.has_room());
        if via == Via::Service || self.io.is_empty() {
            return self.service.filter(|k| has_room(k));
        }
        self.turn = (self.turn + 1) % self.io.len();
        let (later, first) = self.io.split_at(self.turn);
        first.iter().chain(later).copied().find(|k| has_room(k))
    }

    pub fn remains(self) -> Remains {
        Remains { _memory: self.memory, _keys: self.keys }
    }
}
