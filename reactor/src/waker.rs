//! The handshake between a reactor that goes to sleep and a sender that has work for it.
//!
//! Sender: enqueue, then `take_sleeping`, and if it was set, write the eventfd. Reactor: `announce`, then look at the
//! queue once more, then sleep. Both orders go through sequentially consistent operations, so at least one side sees
//! the other: either the reactor finds the message or the sender finds it sleeping (checked with Loom below).

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

#[derive(Debug)]
pub(crate) struct SleepFlag(AtomicBool);

impl SleepFlag {
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Reactor: "I will sleep unless I find something now."
    pub(crate) fn announce(&self) {
        self.0.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Reactor: awake again.
    pub(crate) fn clear(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    /// Sender, after enqueueing: true if this caller must wake the reactor. One read in the usual case.
    pub(crate) fn take_sleeping(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::SeqCst) && self.0.swap(false, Ordering::SeqCst)
    }
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    /// Whatever the interleaving: a message is seen before sleeping, or its sender writes the eventfd.
    #[test]
    fn no_lost_wakeup() {
        loom::model(|| {
            let flag = Arc::new(SleepFlag::new());
            let queue = Arc::new(AtomicUsize::new(0));
            let wakeups = Arc::new(AtomicUsize::new(0));
            let sender = {
                let (flag, queue, wakeups) = (flag.clone(), queue.clone(), wakeups.clone());
                loom::thread::spawn(move || {
                    queue.fetch_add(1, Ordering::Release);
                    if flag.take_sleeping() {
                        wakeups.fetch_add(1, Ordering::Release);
                    }
                })
            };
            flag.announce();
            let seen = queue.load(Ordering::Acquire) > 0;
            sender.join().unwrap();
            assert!(seen || wakeups.load(Ordering::Acquire) == 1);
        });
    }
}
