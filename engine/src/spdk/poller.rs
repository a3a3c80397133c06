//! What threads do for SPDK in their turns.
//!
//! A channel polls SPDK while it has requests in flight, and its reactor stays awake. Otherwise SPDK's pollers, which it would
//! call without pause, are asked at its timers and every `idle`, so that an idle program sleeps.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bdev::spdk;
use reactor::{Polled, Poller, Turn};

use super::state::State;

/// Of a reactor.
pub(super) struct OnReactor {
    pub(super) idle: Duration,
}

impl Poller for OnReactor {
    fn poll(&mut self, _: &mut Turn<'_>) -> Polled {
        spdk::poll_idle().into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        spdk::poll_idle().into()
    }

    fn deadline(&self) -> Option<Instant> {
        spdk::next_wake(self.idle)
    }
}

/// Of the control thread, which is SPDK's app thread.
pub(super) struct OnControl {
    pub(super) state: Rc<RefCell<State>>,
    pub(super) idle: Duration,
}

impl Poller for OnControl {
    fn poll(&mut self, _: &mut Turn<'_>) -> Polled {
        self.state.borrow_mut().poll().into()
    }

    fn deadline(&self) -> Option<Instant> {
        spdk::next_wake(self.idle)
    }
}
