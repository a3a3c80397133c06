//! The bdev: what all threads share of a mapped device.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bdev::{Bdev, Channel, ChannelError, DriverValue, Info};
use reactor::Handle;

use super::channel::{Here, LocalChannel, refused};
use super::disks::Gate;
use super::proxy::ProxyChannel;

/// As `bdev_get_bdevs` shows it.
pub const PRODUCT_NAME: &str = "RNBD disk";

/// A device of an RNBD server as a bdev.
pub struct RnbdDisk {
    info: Info,
    /// In the whole process; never used again.
    number: u64,
    blocks: AtomicU64,
    /// What reactors that have no channel yet start from.
    state: Mutex<State>,
    /// Reactors that serve the session, by their place in the list, with the first of them.
    reactors: Vec<usize>,
    home: Handle,
    proxies: AtomicU64,
}

struct State {
    gate: Gate,
    fast_io_fail: Option<Duration>,
    shown: Vec<(&'static str, DriverValue)>,
}

impl RnbdDisk {
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
            state: Mutex::new(State { gate, fast_io_fail, shown: Vec::new() }),
            reactors,
            home,
            proxies: AtomicU64::new(0),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// What may be sent now, and how long requests wait.
    pub(super) fn gate(&self) -> (Gate, Option<Duration>) {
        let state = self.state();
        (state.gate, state.fast_io_fail)
    }

    pub(super) fn set_gate(&self, gate: Gate) {
        self.state().gate = gate;
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

impl Bdev for RnbdDisk {
    fn info(&self) -> &Info {
        &self.info
    }

    fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        match Here::get().filter(|here| self.reactors.contains(&here.index)) {
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
