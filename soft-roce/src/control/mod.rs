//! The control thread's side: addresses, listeners, connections, and the agent that speaks for them on queue pair 1.
//!
//! All connection managers of one [`crate::SoftRoce`] share this state under a lock: control work is rare. Whoever
//! polls one of them takes a turn for all; events wait in the queue of the one they are for.

mod cm_socket;
mod conn;
mod events;
mod ports;
mod qpns;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use roce_proto::cm::{Agent, Config, Identity, ListenerId};
use roce_proto::{Counters, Nanos};
use rustix::event::epoll;
use verbs::{CmId, Error};

use crate::clock::{Random, now};
use crate::engine::{Engine, new_timer, set_timer};
use crate::neighbours::{Claim, cm_name, port_name};
use crate::port::Port;
use crate::shared::Shared;
use crate::udp::sys;
use cm_socket::CmSocket;
use conn::Conn;
use events::Mailboxes;
use qpns::Qpns;

/// The state behind the lock.
pub struct Control {
    pub shared: Arc<Shared>,
    agent: Agent,
    random: Random,
    ports: Vec<OpenPort>,
    listeners: HashMap<CmId, Listener>,
    conns: HashMap<CmId, Conn>,
    qpns: Qpns,
    pub events: Mailboxes,
    sources: OwnedFd,
    timer: OwnedFd,
    /// Low bits of our communication IDs.
    tag: u8,
    _claim: Claim,
    /// Packets on queue pair 1 that belong to no open port.
    stray_counters: Counters,
}

/// A port and its first socket.
struct OpenPort {
    // Closed before the port gives up its claim to the slot.
    socket: CmSocket,
    port: Arc<Port>,
    /// When it was last seen in use.
    used: Nanos,
}

struct Listener {
    owner: u32,
    addr: SocketAddr,
    /// Keeps them open.
    _ports: Vec<Arc<Port>>,
    /// Its name, so that other processes pass on what is for it.
    _claim: Claim,
}

/// How a system call's failure is told.
fn error(what: String, source: io::Error, hint: &str) -> Error {
    Error { what, source, hint: hint.into() }
}

fn invalid(what: String, hint: &str) -> Error {
    error(what, io::Error::from_raw_os_error(libc::EINVAL), hint)
}

impl Control {
    pub fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let mut random = Random::new();
        let identity = Identity::new(random.u64());
        let (tag, claim) = shared.neighbours.claim_first(0..128, cm_name)?;
        let config = Config::new(tag, || CmId::next().0);
        let mut bits = Random::new();
        let agent = Agent::new(identity, config, Box::new(move || bits.u64()));
        let (sources, timer) = (epoll::create(epoll::CreateFlags::CLOEXEC)?, new_timer()?);
        for fd in [shared.notices.fd(), timer.as_fd(), shared.neighbours.fd()] {
            epoll::add(&sources, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self {
            shared,
            agent,
            random,
            ports: Vec::new(),
            listeners: HashMap::new(),
            conns: HashMap::new(),
            qpns: Qpns::default(),
            events: Mailboxes::default(),
            sources,
            timer,
            tag,
            _claim: claim,
            stray_counters: Counters::default(),
        })
    }

    /// Readable when [`Control::turn`] has something to do.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.sources.as_fd()
    }

    /// [`Control::turn`] has something to do. One system call.
    pub fn is_ready(&self) -> bool {
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut events = [std::mem::MaybeUninit::uninit()];
        let ready = epoll::wait(&self.sources, &mut events[..], Some(&now));
        ready.map_or(true, |(ready, _)| !ready.is_empty())
    }

    /// Receives, does what is due, sends, and queues events. True: there was something.
    pub fn turn(&mut self) -> bool {
        sys::drain(self.timer.as_fd());
        self.shared.notices.quiet();
        let mut busy = self.take_notices();
        busy |= self.receive();
        busy |= self.receive_from_neighbours();
        let now = now();
        if self.agent.deadline().is_some_and(|at| at <= now) {
            busy = true;
            let counters = self.ports.first().map_or(&self.stray_counters, |open| open.port.cm_counters());
            self.agent.on_time(now, counters);
        }
        self.act();
        self.arm();
        busy
    }

    /// Has the timer wake whoever takes turns when something is due. To be called after everything that may have changed
    /// when that is.
    pub fn arm(&mut self) {
        let ports = self.close_unused_ports(now());
        let at = self.agent.deadline().unwrap_or(Nanos::MAX).min(ports);
        set_timer(&self.timer, at);
    }

    /// Every engine of every port.
    pub fn engines(&self) -> Vec<Arc<Engine>> {
        self.ports.iter().flat_map(|open| open.port.engines()).collect()
    }

    /// Listens for `owner`.
    pub fn listen(&mut self, owner: u32, addr: SocketAddr, backlog: u32) -> Result<CmId, Error> {
        let ports = self.ports_to_listen(addr.ip())?;
        let id = CmId::next();
        match self.agent.listen(ListenerId(id.0), addr.ip(), addr.port(), backlog) {
            Ok(port) => {
                let addr = SocketAddr::new(addr.ip(), port);
                match self.shared.neighbours.claim(&port_name(addr.ip(), port)) {
                    Ok(claim) => {
                        self.listeners.insert(id, Listener { owner, addr, _ports: ports, _claim: claim });
                        Ok(id)
                    }
                    Err(e) => {
                        self.agent.unlisten(ListenerId(id.0));
                        Err(error(format!("listen on {addr}"), e, "another program listens there"))
                    }
                }
            }
            Err(e) => {
                let errno = match e {
                    roce_proto::cm::Error::InUse => libc::EADDRINUSE,
                    _ => libc::EINVAL,
                };
                let hint = "another listener of this program has the port";
                Err(error(format!("listen on {addr}"), io::Error::from_raw_os_error(errno), hint))
            }
        }
    }

    /// Where a listener listens.
    pub fn listener_addr(&self, id: CmId) -> Option<SocketAddr> {
        self.listeners.get(&id).map(|listener| listener.addr)
    }

    /// A connection manager is gone, with all it had.
    pub fn leave(&mut self, owner: u32) {
        let of = |o: &u32| *o == owner;
        let conns = self.conns.iter().filter(|(_, conn)| of(&conn.owner)).map(|(id, _)| *id);
        let listeners = self.listeners.iter().filter(|(_, l)| of(&l.owner)).map(|(id, _)| *id);
        let all: Vec<CmId> = conns.chain(listeners).collect();
        all.into_iter().for_each(|id| self.destroy(owner, id));
        self.events.remove(owner);
        self.act();
    }

    /// Forgets a connection or listener of `owner`.
    pub fn destroy(&mut self, owner: u32, id: CmId) {
        if self.listeners.get(&id).is_some_and(|listener| listener.owner == owner) {
            self.listeners.remove(&id);
            self.agent.unlisten(ListenerId(id.0));
            // Requests that nobody has seen.
            for request in self.events.forget_requests_of(owner, id) {
                self.destroy(owner, request);
            }
        } else {
            self.destroy_conn(owner, id);
        }
    }
}
