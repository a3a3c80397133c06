//! The bdev: what all threads share of a mapped device.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bdev::{Bdev, Channel, ChannelError, DriverValue, Info};
use reactor::Handle;
use rtrs_poll::client::SessionId;

use super::channel::{Here, Link, LocalChannel, refused};
use super::disks::Gate;
use super::fence::Fence;
use super::proxy::ProxyChannel;

/// As `bdev_get_bdevs` shows it.
pub const PRODUCT_NAME: &str = "RNBD disk";

/// A device of an RNBD server as a bdev.
pub type RnbdDisk = RemoteDisk<SessionId>;

/// A device of a server as a bdev. `S` names the ways to its server.
pub struct RemoteDisk<S> {
    info: Info,
    /// In the whole process; never used again.
    number: u64,
    blocks: AtomicU64,
    /// What reactors that have no channel yet start from.
    state: Mutex<State<S>>,
    /// Reactors that serve the device, by their place in the list, with the first of them.
    reactors: Vec<usize>,
    home: Handle,
    proxies: AtomicU64,
    fence: Arc<Fence>,
}

struct State<S> {
    gate: Gate<S>,
    /// Of reactors where it is another one, by their place in the list.
    own: BTreeMap<usize, Gate<S>>,
    fast_io_fail: Option<Duration>,
    shown: Vec<(&'static str, DriverValue)>,
}

impl<S: Link> RemoteDisk<S> {
    pub(super) fn new(
        info: Info,
        number: u64,
        blocks: u64,
        fast_io_fail: Option<Duration>,
        (reactors, home): (Vec<usize>, Handle),
    ) -> Self {
        let gate = Gate::Held { since: Instant::now() };
        Self {
            info,
            number,
            blocks: AtomicU64::new(blocks),
            state: Mutex::new(State { gate, own: BTreeMap::new(), fast_io_fail, shown: Vec::new() }),
            reactors,
            home,
            proxies: AtomicU64::new(0),
            fence: Arc::default(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// What may not be overwritten now.
    pub(super) fn fence(&self) -> &Arc<Fence> {
        &self.fence
    }

    /// What may be sent now by the reactor of that place in the list, and how long requests wait.
    pub(super) fn gate(&self, reactor: usize) -> (Gate<S>, Option<Duration>) {
        let state = self.state();
        (state.own.get(&reactor).copied().unwrap_or(state.gate), state.fast_io_fail)
    }

    /// Whether a reactor serves it by itself. One that has no connection now goes by way of the first one, if that has one.
    fn is_local(&self, reactor: usize) -> bool {
        let is_open = |reactor| matches!(self.gate(reactor).0, Gate::Open(_));
        let elsewhere = || self.reactors.first().is_some_and(|home| is_open(*home));
        self.reactors.contains(&reactor) && (is_open(reactor) || !elsewhere())
    }

    /// For all reactors.
    pub(super) fn set_gate(&self, gate: Gate<S>) {
        let mut state = self.state();
        state.own.clear();
        state.gate = gate;
    }

    /// For one reactor.
    pub(super) fn set_gate_of(&self, reactor: usize, gate: Gate<S>) {
        self.state().own.insert(reactor, gate);
    }

    pub(super) fn set_blocks(&self, blocks: u64) {
        self.blocks.store(blocks, Ordering::Relaxed);
    }

    /// Values of `driver_specific`.
    pub(super) fn show(&self, shown: Vec<(&'static str, DriverValue)>) {
        self.state().shown = shown;
    }

    /// A number for a [`ProxyChannel`], different from those of all disks.
    pub(super) fn next_proxy(&self) -> u64 {
        self.number << 32 | self.proxies.fetch_add(1, Ordering::Relaxed)
    }
}

impl<S: Link> Bdev for RemoteDisk<S> {
    fn info(&self) -> &Info {
        &self.info
    }

    fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        match Here::<S>::get().filter(|here| self.is_local(here.index)) {
            Some(here) => match LocalChannel::open(self.clone(), here) {
                Ok(channel) => Ok(Box::new(channel)),
                Err(e) => Err(refused(&self, e.to_string())),
            },
            None => match ProxyChannel::open(self.clone(), self.home.clone()) {
                Ok(channel) => Ok(Box::new(channel)),
                Err(e) => Err(refused(&self, format!("no descriptor left: {e}"))),
            },
        }
    }

    fn driver_specific(&self) -> Vec<(&'static str, DriverValue)> {
        self.state().shown.clone()
    }
}
