//! How other threads reach a reactor.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::queue::SegQueue;
use rustix::event::EventfdFlags;

use crate::Turn;
use crate::stats::{ReactorStats, TimeStats};
use crate::waker::SleepFlag;

/// Work for a reactor, run between two turns.
pub type Message = Box<dyn FnOnce(&mut Turn<'_>) + Send>;

/// What a reactor does when a turn found no work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Polls for ever: lowest latency, one full core.
    Poll,
    /// Polls while there is work and for `spin` after it, then sleeps until a descriptor fires or a timer is due.
    Adaptive {
        /// How long to keep polling after the last work.
        spin: Duration,
    },
}

const POLL_FOREVER: u64 = u64::MAX;

/// The sendable side of a reactor. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle(pub(crate) Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) core: Option<usize>,
    pub(crate) queue: Mailbox,
    pub(crate) sleep: SleepFlag,
    pub(crate) eventfd: OwnedFd,
    pub(crate) stop: AtomicBool,
    /// The reactor is gone: nobody runs messages any more.
    ended: AtomicBool,
    /// Spin time in ns, or `POLL_FOREVER`.
    policy: AtomicU64,
    pub(crate) time: TimeStats,
}

/// `SegQueue` with the `Debug` that boxed closures lack.
pub(crate) struct Mailbox(pub(crate) SegQueue<Message>);

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mailbox({} messages)", self.0.len())
    }
}

impl Handle {
    pub(crate) fn new(name: String, core: Option<usize>, policy: IdlePolicy) -> rustix::io::Result<Self> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let handle = Self(Arc::new(Shared {
            name,
            core,
            queue: Mailbox(SegQueue::new()),
            sleep: SleepFlag::new(),
            eventfd,
            stop: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            policy: AtomicU64::new(0),
            time: TimeStats::default(),
        }));
        handle.set_policy(policy);
        Ok(handle)
    }

    /// Runs `message` on the reactor, soon. Messages of one sender run in the order sent. After the reactor has
    /// stopped they are dropped unrun.
    pub fn send(&self, message: impl FnOnce(&mut Turn<'_>) + Send + 'static) {
        self.0.queue.0.push(Box::new(message));
        self.wake();
    }

    /// Makes the reactor look at its queues if it sleeps.
    pub fn wake(&self) {
        if self.0.sleep.take_sleeping() {
            if self.0.ended.load(Ordering::Acquire) {
                return self.discard();
            }
            // Nonblocking: EAGAIN means that the counter is already at its end, so the reactor wakes anyway.
            let _ = rustix::io::write(&self.0.eventfd, &1u64.to_ne_bytes());
        }
    }

    /// The reactor is gone. Messages that were not run, and later ones, are dropped: most hold a handle, so that they would
    /// keep the mailbox, and it them.
    pub(crate) fn end(&self) {
        self.0.ended.store(true, Ordering::Release);
        self.discard();
    }

    /// As a reactor that goes to sleep, but for good: whoever sends finds it sleeping, and looks at the queue itself.
    fn discard(&self) {
        self.0.sleep.announce();
        while let Some(message) = self.0.queue.0.pop() {
            drop(message);
        }
    }

    /// Ends the reactor's loop after the present turn; its pollers are dropped on its own thread.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// Changes the idle policy, at any time.
    pub fn set_policy(&self, policy: IdlePolicy) {
        let spin = match policy {
            IdlePolicy::Poll => POLL_FOREVER,
            IdlePolicy::Adaptive { spin } => (spin.as_nanos() as u64).min(POLL_FOREVER - 1),
        };
        self.0.policy.store(spin, Ordering::Relaxed);
        self.wake();
    }

    /// The idle policy in force.
    pub fn policy(&self) -> IdlePolicy {
        match self.0.policy.load(Ordering::Relaxed) {
            POLL_FOREVER => IdlePolicy::Poll,
            ns => IdlePolicy::Adaptive { spin: Duration::from_nanos(ns) },
        }
    }

    /// As given at creation.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The core it is pinned to.
    pub fn core(&self) -> Option<usize> {
        self.0.core
    }

    /// Busy and idle time so far.
    pub fn stats(&self) -> ReactorStats {
        self.0.time.read()
    }
}
