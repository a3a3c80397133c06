//! The agent: its connections, how they are found, their timers, and what it wants done.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::net::IpAddr;

use super::admit::{Listeners, Offer};
use super::limit::{HalfOpen, Strangers};
use super::message::of;
use super::wire::MadBytes;
use super::{
    Action, Body, Config, ConnId, Depths, Error, Identity, Ids, ListenerId, MS, Message, QpFacts, Rej,
    TAG_MASK, Why,
};
use crate::{Counter, Counters, Nanos};

/// All connections of a provider instance, whatever their addresses. After each call, take [`Agent::next_action`]
/// until there is none.
pub struct Agent {
    pub(super) config: Config,
    pub(super) identity: Identity,
    pub(super) random: Box<dyn FnMut() -> u64 + Send>,
    pub(super) listeners: Listeners,
    pub(super) strangers: Strangers,
    pub(super) half_open: HalfOpen,
    pub(super) conns: HashMap<ConnId, Conn>,
    /// Own communication IDs. Every connection has one until its time wait is over.
    pub(super) by_local: HashMap<u32, ConnId>,
    /// Peers' GUIDs and communication IDs, until the time wait is over.
    pub(super) by_remote: HashMap<(u64, u32), ConnId>,
    /// Peers' GUIDs and queue pairs, until the time wait begins.
    pub(super) by_qpn: HashMap<(u64, u32), ConnId>,
    /// Deadlines of connections that have one and are not in time wait.
    timers: BTreeSet<(Nanos, ConnId)>,
    /// Ends of time waits.
    graves: BTreeSet<(Nanos, ConnId)>,
    actions: VecDeque<Action>,
}

/// One connection.
pub(super) struct Conn {
    pub id: ConnId,
    pub state: State,
    /// The consumer knows it and wants its events.
    pub owned: bool,
    pub local: IpAddr,
    pub peer: IpAddr,
    pub local_id: u32,
    /// GUID and communication ID of the peer, when known.
    pub remote: Option<(u64, u32)>,
    /// Of the exchange that set it up.
    pub tid: u64,
    pub qp: Option<QpFacts>,
    /// 0 when not known.
    pub remote_qpn: u32,
    pub ack_timeout: u8,
    /// The last message, for when it is asked for again: by a timer, or by what it answers. In time wait: the REJ to
    /// a REQ that comes again.
    pub answer: Option<Box<MadBytes>>,
    pub repeat: Repeat,
    /// Key in `timers` or `graves`.
    deadline: Option<Nanos>,
}

/// Where a connection is.
#[derive(Clone, Copy, Debug)]
pub(super) enum State {
    /// The consumer was asked.
    Requested { offer: Offer, refuse_at: Nanos },
    /// A REQ is out.
    ReqSent(Wanted),
    /// A REP is out.
    RepSent,
    /// Both sides know.
    Established,
    /// A DREQ is out. `refuse`: the peer may not have heard our REP, and is told no if it asks again.
    DreqSent { refuse: bool },
    /// Over; IDs and queue pair are not used again yet.
    TimeWait,
}

/// What the REQ asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub mtu: u32,
    pub retry: u8,
    pub reads: Depths,
}

/// Of a message that is repeated until it is answered.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Repeat {
    pub left: u8,
    pub interval: Nanos,
    pub max_interval: Nanos,
    /// The last time to send it.
    pub until: Nanos,
    /// The peer asked for patience since the message was sent last.
    pub patience: bool,
}

impl Agent {
    /// `random`: unpredictable bits; communication IDs and transaction IDs are made of them.
    pub fn new(identity: Identity, config: Config, mut random: Box<dyn FnMut() -> u64 + Send>) -> Self {
        Self {
            strangers: Strangers::new(config.stranger_rate, config.stranger_rate_per_source, random()),
            config,
            identity,
            random,
            listeners: Listeners::default(),
            half_open: HalfOpen::default(),
            conns: HashMap::new(),
            by_local: HashMap::new(),
            by_remote: HashMap::new(),
            by_qpn: HashMap::new(),
            timers: BTreeSet::new(),
            graves: BTreeSet::new(),
            actions: VecDeque::new(),
        }
    }

    /// Who we are.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Listens on `ip` (unspecified: on all of the family, unspecified IPv6: on all) and `port` (0: any free one),
    /// with up to `backlog` requests waiting for the consumer. Returns the port.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Exists`].
    pub fn listen(&mut self, id: ListenerId, ip: IpAddr, port: u16, backlog: u32) -> Result<u16, Error> {
        self.listeners.add(id, ip.to_canonical(), port, backlog, &mut self.random)
    }

    /// Ends a listener. Requests that have come already remain.
    pub fn unlisten(&mut self, id: ListenerId) {
        self.listeners.remove(id);
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Agent::on_time`] must be called at the latest.
    pub fn deadline(&self) -> Option<Nanos> {
        let first = |set: &BTreeSet<(Nanos, ConnId)>| set.first().map(|(at, _)| *at);
        first(&self.timers).into_iter().chain(first(&self.graves)).min()
    }

    /// Connections that exist for the agent, those in time wait included.
    pub fn connections(&self) -> usize {
        self.conns.len()
    }

    /// A MAD came to queue pair 1 at `dst` from `src` (IPv4 as such, not mapped). `path_mtu(local, peer)`: the largest
    /// path MTU, in bytes, that can be sent from one to the other; asked for requests only.
    pub fn receive(
        &mut self,
        now: Nanos,
        src: IpAddr,
        dst: IpAddr,
        mad: &MadBytes,
        path_mtu: impl FnOnce(IpAddr, IpAddr) -> u32,
        counters: &Counters,
    ) {
        let Some(message) = Message::parse(mad) else {
            counters.count(Counter::CmMalformed);
            return;
        };
        let path = (dst, src);
        let tid = message.tid;
        let result = match message.body {
            Body::Req(req) => self.on_req(now, path, tid, &req, path_mtu, counters),
            Body::Mra(mra) => self.on_mra(now, path, &mra),
            Body::Rej(rej) => self.on_rej(now, path, &rej),
            Body::Rep(rep) => self.on_rep(now, path, tid, &rep, counters),
            Body::Rtu(ids) => self.on_rtu(path, ids),
            Body::Dreq { ids, remote_qpn } => self.on_dreq(now, path, tid, ids, remote_qpn),
            Body::Drep(ids) => self.on_drep(now, path, ids),
        };
        if let Err(reason) = result {
            counters.count(reason);
        }
    }

    /// Does what is due.
    pub fn on_time(&mut self, now: Nanos, counters: &Counters) {
        while let Some((at, id)) = self.graves.first().copied()
            && at <= now
        {
            self.forget(id);
        }
        while let Some((at, id)) = self.timers.first().copied()
            && at <= now
        {
            self.disarm(id);
            let Some(conn) = self.conns.get(&id) else { continue };
            if let State::Requested { refuse_at, .. } = conn.state {
                self.hurry(now, id, refuse_at);
            } else if conn.repeat.left > 0 && now < conn.repeat.until {
                counters.count(Counter::CmRetries);
                self.repeat(now, id);
            } else {
                self.give_up(now, id);
            }
        }
    }

    /// The message was repeated often enough.
    fn give_up(&mut self, now: Nanos, id: ConnId) {
        match self.conns.get(&id).map(|conn| conn.state) {
            Some(State::ReqSent(_)) => {
                self.send_abort(id);
                self.lose(now, id, |conn| Action::Unreachable { conn, why: Why::NoAnswer });
            }
            Some(State::RepSent) => {
                self.send_abort(id);
                self.lose(now, id, |conn| Action::Unreachable { conn, why: Why::NoConfirmation });
            }
            Some(State::DreqSent { .. }) => {
                self.event(id, |conn| Action::Disconnected { conn });
                self.bury(now, id);
            }
            _ => (),
        }
    }

    /// Ends a connection whose queue pair, if it has one, is still to be told.
    pub(super) fn lose(&mut self, now: Nanos, id: ConnId, event: impl FnOnce(ConnId) -> Action) {
        if self.conns.get(&id).is_some_and(|conn| conn.qp.is_some()) {
            self.act(Action::QpError { conn: id });
        }
        self.event(id, event);
        self.bury(now, id);
    }

    pub(super) fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    /// Tells the consumer, if there still is one.
    pub(super) fn event(&mut self, id: ConnId, event: impl FnOnce(ConnId) -> Action) {
        if self.conns.get(&id).is_some_and(|conn| conn.owned) {
            self.actions.push_back(event(id));
        }
    }

    /// `(local, peer)` as in all that follows.
    pub(super) fn send_to(&mut self, (src, dst): (IpAddr, IpAddr), tid: u64, body: Body) -> Box<MadBytes> {
        let mad = Message { tid, body }.encode();
        self.act(Action::Send { src, dst, mad: mad.clone() });
        mad
    }

    /// Answers something that is about no connection of ours, within limits.
    pub(super) fn send_to_stranger(
        &mut self,
        now: Nanos,
        path: (IpAddr, IpAddr),
        tid: u64,
        body: Body,
    ) -> Result<(), Counter> {
        if !self.strangers.allow(now, path.1) {
            return Err(Counter::CmLimited);
        }
        self.send_to(path, tid, body);
        Ok(())
    }

    /// Repeats the last message because the peer missed it.
    pub(super) fn send_again(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get(&id) else { return };
        if let Some(mad) = conn.answer.clone() {
            let (src, dst) = (conn.local, conn.peer);
            self.act(Action::Send { src, dst, mad });
        }
    }

    /// Sends a message until it is answered.
    pub(super) fn send_until_answered(
        &mut self,
        now: Nanos,
        id: ConnId,
        tid: u64,
        body: Body,
        repeat: Repeat,
    ) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.repeat = repeat;
        let path = (conn.local, conn.peer);
        let mad = self.send_to(path, tid, body);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.answer = Some(mad);
        }
        self.arm(id, now.saturating_add(repeat.interval));
    }

    fn repeat(&mut self, now: Nanos, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let repeat = &mut conn.repeat;
        repeat.left -= 1;
        repeat.patience = false;
        repeat.interval = (repeat.interval * 2).min(repeat.max_interval);
        let next = now.saturating_add(repeat.interval);
        self.send_again(id);
        self.arm(id, next);
    }

    pub(super) fn arm(&mut self, id: ConnId, at: Nanos) {
        self.disarm(id);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.deadline = Some(at);
            self.timers.insert((at, id));
        }
    }

    pub(super) fn disarm(&mut self, id: ConnId) {
        if let Some(at) = self.conns.get_mut(&id).and_then(|conn| conn.deadline.take()) {
            self.timers.remove(&(at, id));
        }
    }

    /// A new connection in `state`, with communication ID.
    pub(super) fn create(&mut self, id: ConnId, state: State, path: (IpAddr, IpAddr), tid: u64) {
        let local_id = self.new_comm_id();
        self.by_local.insert(local_id, id);
        let conn = Conn {
            id,
            state,
            owned: true,
            local: path.0,
            peer: path.1,
            local_id,
            remote: None,
            tid,
            qp: None,
            remote_qpn: 0,
            ack_timeout: super::admit::ACK_TIMEOUT,
            answer: None,
            repeat: Repeat::default(),
            deadline: None,
        };
        self.conns.insert(id, conn);
    }

    /// 25 random bits and the tag. Few numbers are in use at a time, so this ends soon.
    fn new_comm_id(&mut self) -> u32 {
        let mut id = (self.random)() as u32 & !TAG_MASK | u32::from(self.config.tag);
        while id & !TAG_MASK == 0 || self.by_local.contains_key(&id) {
            id = id.wrapping_add(TAG_MASK + 1);
        }
        id
    }

    /// Into another state, with the accounts of half-open connections and of listeners kept.
    pub(super) fn enter(&mut self, id: ConnId, state: State) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let old = std::mem::replace(&mut conn.state, state);
        if old.is_half_open() && !state.is_half_open() {
            self.half_open.leave(conn.peer);
        }
        if let State::Requested { offer, .. } = old {
            self.listeners.leave(offer.listener);
        }
    }

    /// Ends a connection: what is on its way may still come for some time.
    pub(super) fn bury(&mut self, now: Nanos, id: ConnId) {
        self.bury_with(now, id, None);
    }

    /// As [`Agent::bury`]; `answer` is for a REQ that comes again.
    pub(super) fn bury_with(&mut self, now: Nanos, id: ConnId, answer: Option<Box<MadBytes>>) {
        self.disarm(id);
        self.enter(id, State::TimeWait);
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.answer = answer;
        if let Some((guid, _)) = conn.remote
            && self.by_qpn.get(&(guid, conn.remote_qpn)) == Some(&id)
        {
            self.by_qpn.remove(&(guid, conn.remote_qpn));
        }
        let at = now.saturating_add(time_wait(conn));
        conn.deadline = Some(at);
        self.graves.insert((at, id));
        while self.graves.len() > self.config.max_time_wait
            && let Some((_, oldest)) = self.graves.first().copied()
        {
            self.forget(oldest);
        }
    }

    /// Ends time wait.
    fn forget(&mut self, id: ConnId) {
        let Some(conn) = self.conns.remove(&id) else { return };
        if let Some(at) = conn.deadline {
            self.graves.remove(&(at, id));
        }
        self.by_local.remove(&conn.local_id);
        if let Some(remote) = conn.remote
            && self.by_remote.get(&remote) == Some(&id)
        {
            self.by_remote.remove(&remote);
        }
        if let Some(qp) = conn.qp {
            self.act(Action::QpnFree { qpn: qp.qpn });
        }
    }

    /// The connection with our communication ID; an error if the message is not from its peer.
    pub(super) fn find(
        &self,
        (local, peer): (IpAddr, IpAddr),
        local_id: u32,
    ) -> Result<Option<&Conn>, Counter> {
        let conn = self.by_local.get(&local_id).and_then(|id| self.conns.get(id));
        match conn {
            Some(conn) if (conn.local, conn.peer) != (local, peer) => Err(Counter::CmWrongSource),
            conn => Ok(conn),
        }
    }

    /// As [`Agent::find`], by both IDs (those of the message: "local" is the peer's).
    pub(super) fn find_both(&self, path: (IpAddr, IpAddr), ids: Ids) -> Result<Option<&Conn>, Counter> {
        let conn = self.find(path, ids.remote)?;
        Ok(conn.filter(|conn| conn.remote.is_some_and(|(_, id)| id == ids.local)))
    }

    /// The consumer's connection.
    pub(super) fn owned(&self, id: ConnId) -> Result<&Conn, Error> {
        self.conns.get(&id).filter(|conn| conn.owned).ok_or(Error::Unknown)
    }

    /// Tells the peer that we have given up waiting for it, in words that it understands whether or not it knows our
    /// communication ID.
    pub(super) fn send_abort(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get(&id) else { return };
        let rej =
            Rej::with_info(conn.ids(), of::OTHER, super::reason::TIMEOUT, &self.identity.guid.to_be_bytes());
        self.send_to((conn.local, conn.peer), conn.tid, Body::Rej(rej));
    }
}

impl Conn {
    /// IDs for a message to the peer.
    pub fn ids(&self) -> Ids {
        Ids { local: self.local_id, remote: self.remote.map_or(0, |(_, id)| id) }
    }

    pub fn dreq(&self) -> Body {
        Body::Dreq { ids: self.ids(), remote_qpn: self.remote_qpn }
    }
}

impl State {
    /// Counts towards the limits of half-open connections.
    fn is_half_open(self) -> bool {
        matches!(self, Self::Requested { .. } | Self::RepSent)
    }
}

/// How long IDs and queue pair stay reserved: twice the longer of both sides' timers, and long enough for a REQ that
/// we refused to come again, even if we have asked for patience before. Bounded, because the peer chose one of them.
fn time_wait(conn: &Conn) -> Nanos {
    let acks = 2 * (4096 << u32::from(conn.ack_timeout.min(31)));
    let least = if conn.answer.is_some() { 30_000 * MS } else { 1000 * MS };
    acks.clamp(least, 30_000 * MS)
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("identity", &self.identity)
            .field("connections", &self.conns.len())
            .field("listeners", &self.listeners)
            .finish_non_exhaustive()
    }
}
