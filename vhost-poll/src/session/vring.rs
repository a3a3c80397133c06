//! A vring as its messages describe it.

use std::sync::Arc;

use crate::bell::Bell;
use crate::fd::Kick;
use crate::ring::{Base, RingConfig};
use crate::session::PlaceGuard;
use crate::wire::VringFd;

#[derive(Default)]
pub(super) struct Vring {
    pub(super) config: RingConfig,
    has_addr: bool,
    pub(super) base: Option<Base>,
    /// A kick descriptor, or the word that there is none, was sent: the ring is to run.
    kicked: bool,
    pub(super) kick: Option<Arc<Kick>>,
    pub(super) call: Option<Arc<Bell>>,
    pub(super) err: Option<Arc<Bell>>,
    pub(super) enabled: bool,
    /// Index of its lane, and its place there.
    running: Option<(usize, PlaceGuard)>,
}

impl Vring {
    pub(super) fn new(enabled: bool) -> Self {
        Self { enabled, ..Self::default() }
    }

    pub(super) fn set_addr(&mut self, desc: u64, avail: u64, used: u64) {
        (self.config.desc, self.config.avail, self.config.used) = (desc, avail, used);
        self.has_addr = true;
    }

    pub(super) fn set_kick(&mut self, kick: Option<Arc<Kick>>) {
        (self.kick, self.kicked) = (kick, true);
    }

    /// Descriptors of the front end that it keeps.
    pub(super) fn descriptors(&self) -> usize {
        usize::from(self.kick.is_some()) + usize::from(self.call.is_some()) + usize::from(self.err.is_some())
    }

    pub(super) fn has_fd(&self, which: VringFd) -> bool {
        match which {
            VringFd::Kick => self.kick.is_some(),
            VringFd::Call => self.call.is_some(),
            VringFd::Err => self.err.is_some(),
        }
    }

    pub(super) fn may_start(&self) -> bool {
        self.running.is_none() && self.kicked && self.has_addr && self.config.size > 0
    }

    pub(super) fn started(&mut self, lane: usize, place: PlaceGuard) {
        self.running = Some((lane, place));
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub(super) fn lane(&self) -> Option<usize> {
        self.running.as_ref().map(|(lane, _)| *lane)
    }

    pub(super) fn base(&self) -> Base {
        self.base.unwrap_or(0)
    }

    /// It needs another kick to start again.
    pub(super) fn stopped(&mut self, base: Option<Base>) {
        self.base = base.or(self.base);
        self.refused();
    }

    pub(super) fn refused(&mut self) {
        self.running = None;
        self.kick = None;
        self.kicked = false;
    }
}
