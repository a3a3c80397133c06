//! What runs on a reactor.

use std::time::Instant;

use crate::Turn;

/// Whether a turn found work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polled {
    /// Nothing to do.
    Idle,
    /// Something was done; poll again soon.
    Busy,
}

impl From<bool> for Polled {
    fn from(busy: bool) -> Self {
        if busy { Self::Busy } else { Self::Idle }
    }
}

/// Names a poller on its reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PollerId(pub(crate) u64);

/// A piece of work that is asked every turn. Lives on one reactor, so it need not be `Send`.
pub trait Poller {
    /// Does at most one budget of work and never blocks.
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled;

    /// The reactor is about to sleep: arm notifications on the watched descriptors. `Busy` keeps it awake, because
    /// work came in between.
    fn before_sleep(&mut self, cx: &mut Turn<'_>) -> Polled {
        let _ = cx;
        Polled::Idle
    }

    /// What the last busy `poll` did is no reason to spin: nothing is expected before [`Poller::deadline`].
    fn rests(&self) -> bool {
        false
    }

    /// When `poll` must run next although no watched descriptor fires. Asked before each sleep.
    fn deadline(&self) -> Option<Instant> {
        None
    }
}
