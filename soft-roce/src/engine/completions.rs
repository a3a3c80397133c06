//! The completion queue of an engine.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use verbs::Wc;

use crate::udp::sys;

/// Entries that have memory ahead of time, at most.
const MADE_READY: usize = 32768;

/// Work completions that the user has not fetched.
pub struct Completions {
    queue: VecDeque<Wc>,
    entries: usize,
    /// Requests of all queue pairs.
    promised: usize,
    overrun: bool,
    /// The next completion is to be announced.
    armed: bool,
    bell: OwnedFd,
}

impl Completions {
    /// # Errors
    /// Out of file descriptors.
    pub fn new(entries: u32) -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let entries = entries as usize;
        Ok(Self { queue: VecDeque::new(), entries, promised: 0, overrun: false, armed: false, bell })
    }

    /// A queue pair comes that may have `requests` completions waiting. Makes room, so that [`Completions::push`] does not
    /// allocate, unless more wait than ever do where somebody polls.
    pub fn promise(&mut self, requests: usize) {
        self.promised += requests;
        let wanted = self.promised.min(self.entries).min(MADE_READY);
        self.queue.reserve(wanted.saturating_sub(self.queue.len()));
    }

    /// Such a queue pair is gone.
    pub fn withdraw(&mut self, requests: usize) {
        self.promised -= requests;
    }

    /// Adds a completion. One too many, and the queue is lost.
    pub fn push(&mut self, wc: Wc) {
        if self.queue.len() >= self.entries {
            self.overrun = true;
        } else {
            self.queue.push_back(wc);
        }
        if std::mem::take(&mut self.armed) {
            sys::notify(self.bell.as_fd());
        }
    }

    /// Completions were lost.
    pub fn is_overrun(&self) -> bool {
        self.overrun
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Moves completions to the start of `out`.
    pub fn take(&mut self, out: &mut [Wc]) -> usize {
        let n = out.len().min(self.queue.len());
        for (to, from) in out.iter_mut().zip(self.queue.drain(..n)) {
            *to = from;
        }
        n
    }

    /// The next completion rings the bell; rings before are forgotten.
    pub fn arm(&mut self) {
        sys::drain(self.bell.as_fd());
        self.armed = true;
    }

    /// Readable when a completion came after [`Completions::arm`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
