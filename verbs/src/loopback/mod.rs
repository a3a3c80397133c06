//! A provider inside the process: hosts on a [`Fabric`] connect to each other by socket address.
//!
//! It keeps the rules of reliable connections, so that code which works here meets no surprises on a device:
//! order, receiver-not-ready, keys and bounds, flushing, queue slots that come back only with a polled completion,
//! private data padded to the transport's length. What it does not model is time: a retry limit that a device would
//! reach after seconds is reached at once, and everything else happens before the call that caused it returns.
//!
//! ```text
//! Fabric ── Mutex<State> ─┬─ keys      registered memory and windows of all hosts
//!                         ├─ qps, cqs  engine.rs: posting a work request runs it, on the poster's thread
//!                         └─ conns     conn.rs: requests, answers, events
//! Fabric::cm() = a host: LoopCm (cm.rs) + LoopDevice (device.rs); LoopQp (qp.rs) is the user's end of a queue pair
//! ```
//!
//! One lock per fabric: a copy inside memory is short, and who needs more throughput between two threads of one
//! process has better means than RDMA. A host sees only its own keys.

mod cm;
mod conn;
mod device;
mod engine;
mod keys;
mod qp;
mod state;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use state::{Channel, State};

use crate::wc_status::RETRY_EXC_ERR;
use crate::{Cm, CmEvent, CmId, DeviceInfo, Error, WindowKind};

const PROVIDER: &str = "loopback";

/// What the devices of a fabric are like.
#[derive(Clone, Debug)]
pub struct Config {
    /// Limits of every host's device; posts and creations beyond them fail as on a device.
    pub device: DeviceInfo,
}

impl Default for Config {
    fn default() -> Self {
        let device = DeviceInfo {
            name: "lo0".into(),
            provider: PROVIDER,
            max_qp_wr: 16384,
            max_cqe: 1 << 20,
            cq_grows: false,
            max_sge: 4,
            max_mr_bytes: 1 << 40,
            windows: WindowKind::PerDomain,
            pins: false,
        };
        Self { device }
    }
}

/// A network of hosts in this process. Clones are the same network.
#[derive(Clone)]
pub struct Fabric(Arc<Shared>);

struct Shared(Mutex<State>);

impl Shared {
    /// A thread that panicked under the lock left whole entries behind, as every change is one insert or removal.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Default for Fabric {
    fn default() -> Self {
        Self::new()
    }
}

impl Fabric {
    /// A fabric of generous devices.
    pub fn new() -> Self {
        Self::with_config(Config::default())
    }

    /// A fabric whose devices have other limits or windows.
    pub fn with_config(config: Config) -> Self {
        Self(Arc::new(Shared(Mutex::new(State::new(config)))))
    }

    /// A new host: a connection manager with a device of its own. Addresses are not checked against hosts; whoever
    /// listens on one first, has it. Dropping the `Cm` disconnects and forgets all its connections.
    ///
    /// # Panics
    /// When the process has no file descriptor left.
    pub fn cm(&self) -> Box<dyn Cm> {
        self.try_cm().expect("the process is out of file descriptors")
    }

    /// As [`Fabric::cm`].
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn try_cm(&self) -> Result<Box<dyn Cm>, Error> {
        let fd = device::new_eventfd()?;
        let mut state = self.0.lock();
        let host = state.number();
        state.channels.insert(host, Channel { queue: VecDeque::new(), fd: fd.clone() });
        let info = state.config.device.clone();
        drop(state);
        let device = Arc::new(device::LoopDevice { shared: self.0.clone(), host, info });
        Ok(Box::new(cm::LoopCm { shared: self.0.clone(), host, device, fd }))
    }

    /// From now on packets between the two addresses of a connection vanish, both ways, and nobody is told: sends
    /// never complete, disconnecting ends on our side only. See [`Fabric::restore`].
    pub fn cut(&self, local: SocketAddr, peer: SocketAddr) {
        self.0.lock().cut.insert((local, peer));
    }

    /// Undoes [`Fabric::cut`]: what was waiting is delivered.
    pub fn restore(&self, local: SocketAddr, peer: SocketAddr) {
        let mut state = self.0.lock();
        state.cut.retain(|c| *c != (local, peer) && *c != (peer, local));
        let mut waiting: Vec<u32> = state.qps.keys().copied().collect();
        waiting.sort_unstable();
        waiting.into_iter().for_each(|qp| state.run(qp));
    }

    /// Breaks the queue pair of the connection that has these addresses on its own side, as if transport retries had
    /// run out: the send in front (if any) fails so, everything else flushes, and no event says anything. False if
    /// there is no such queue pair.
    pub fn break_qp(&self, local: SocketAddr, peer: SocketAddr) -> bool {
        let mut state = self.0.lock();
        let qp = state.conns.values().find(|c| (c.local, c.peer) == (local, peer)).and_then(|c| c.qp);
        qp.map(|qp| state.break_qp(qp, RETRY_EXC_ERR)).is_some()
    }

    /// The devices of all hosts go away: [`CmEvent::DeviceRemoved`] for every connection and listener, and all queue
    /// pairs to the error state.
    pub fn remove_devices(&self) {
        let mut state = self.0.lock();
        let all: Vec<(CmId, u32)> = state.conns.iter().map(|(id, c)| (*id, c.host)).collect();
        for (id, host) in all {
            state.event(host, CmEvent::DeviceRemoved(id));
        }
        let qps: Vec<u32> = state.qps.keys().copied().collect();
        qps.into_iter().for_each(|qp| state.break_off(qp));
    }
}
