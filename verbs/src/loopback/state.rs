//! What a fabric holds under its lock: completion queues and event channels; connections and queue pairs are next door.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::Config;
use super::conn::Conn;
use super::engine::QpState;
use super::keys::Keys;
use crate::{CmEvent, CmId, Wc};

/// Makes an eventfd readable, or empty again. Both are best effort: a full counter is readable already.
pub(super) fn notify(fd: &OwnedFd) {
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

pub(super) fn drain(fd: &OwnedFd) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}

/// A completion and the queue slots that polling it gives back.
pub(super) struct Cqe {
    pub wc: Wc,
    pub frees_send: u32,
    pub frees_recv: u32,
}

pub(super) struct CqState {
    pub entries: u32,
    pub queue: VecDeque<Cqe>,
    pub armed: bool,
    pub overrun: bool,
    pub fd: Arc<OwnedFd>,
}

/// The event channel of one `Cm`.
pub(super) struct Channel {
    pub queue: VecDeque<CmEvent>,
    pub fd: Arc<OwnedFd>,
}

pub(super) struct State {
    pub config: Config,
    pub keys: Keys,
    pub cqs: HashMap<u32, CqState>,
    pub qps: HashMap<u32, QpState>,
    pub conns: BTreeMap<CmId, Conn>,
    pub listeners: HashMap<SocketAddr, CmId>,
    pub channels: HashMap<u32, Channel>,
    /// Connections (either direction) whose packets vanish.
    pub cut: HashSet<(SocketAddr, SocketAddr)>,
    next: u32,
    next_port: u16,
}

impl State {
    pub fn new(config: Config) -> Self {
        Self {
            config,
            keys: Keys::default(),
            cqs: HashMap::new(),
            qps: HashMap::new(),
            conns: BTreeMap::new(),
            listeners: HashMap::new(),
            channels: HashMap::new(),
            cut: HashSet::new(),
            next: 0,
            next_port: 49152,
        }
    }

    /// A number nobody had: hosts, completion queues, queue pairs.
    pub fn number(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    pub fn ephemeral_port(&mut self) -> u16 {
        let port = self.next_port;
        self.next_port = port.checked_add(1).unwrap_or(49152);
        port
    }

    /// Queues an event for the owner of a connection or listener.
    pub fn event(&mut self, host: u32, event: CmEvent) {
        if let Some(channel) = self.channels.get_mut(&host) {
            channel.queue.push_back(event);
            notify(&channel.fd);
        }
    }

    /// Adds a completion. A full queue is lost with every queue pair on it.
    pub fn complete(&mut self, cq: u32, cqe: Cqe) {
        let Some(state) = self.cqs.get_mut(&cq) else { return };
        if state.overrun {
            return;
        }
        if state.queue.len() >= state.entries as usize {
            state.overrun = true;
            notify(&state.fd);
            let lost: Vec<u32> = self.qps.iter().filter(|(_, q)| q.cq == cq).map(|(n, _)| *n).collect();
            lost.into_iter().for_each(|qp| self.break_off(qp));
            return;
        }
        state.queue.push_back(cqe);
        if std::mem::take(&mut state.armed) {
            notify(&state.fd);
        }
    }

    pub fn is_cut(&self, a: SocketAddr, b: SocketAddr) -> bool {
        self.cut.contains(&(a, b)) || self.cut.contains(&(b, a))
    }
}
