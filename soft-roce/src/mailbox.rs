//! Messages from the control thread, or from a thread whose socket got what was another's, to an engine.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::queue::SegQueue;
use rustix::event::{EventfdFlags, eventfd};

use crate::udp::sys;

/// Any thread pushes, one takes out. Its descriptor becomes readable with the first message.
pub struct Mailbox<T> {
    queue: SegQueue<T>,
    /// Something may be in the queue. Looking here costs a turn nothing while nobody writes.
    pending: AtomicBool,
    wake: OwnedFd,
}

impl<T> Mailbox<T> {
    /// # Errors
    /// Out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { queue: SegQueue::new(), pending: AtomicBool::new(false), wake })
    }

    /// Appends a message and wakes the reader.
    pub fn push(&self, message: T) {
        self.queue.push(message);
        // The swap comes after the push, so whoever clears the flag finds the message.
        if !self.pending.swap(true, Ordering::AcqRel) {
            sys::notify(self.wake.as_fd());
        }
    }

    /// Appends a message unless `limit` are waiting already.
    pub fn push_below(&self, limit: usize, message: T) {
        if self.queue.len() < limit {
            self.push(message);
        }
    }

    /// A message may be waiting. Clears the mark: take all with [`Mailbox::pop`] then.
    pub fn check(&self) -> bool {
        self.pending.load(Ordering::Relaxed) && self.pending.swap(false, Ordering::AcqRel)
    }

    /// The oldest message.
    pub fn pop(&self) -> Option<T> {
        self.queue.pop()
    }

    /// Messages are left for another time.
    pub fn later(&self) {
        self.pending.store(true, Ordering::Release);
        sys::notify(self.wake.as_fd());
    }

    /// Readable when something was pushed since [`Mailbox::quiet`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Makes the descriptor readable without a message.
    pub fn wake(&self) {
        sys::notify(self.wake.as_fd());
    }

    /// Forgets that something was pushed. Look for messages once more after it.
    pub fn quiet(&self) {
        sys::drain(self.wake.as_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_in_order_and_wake() {
        let mailbox = Mailbox::new().unwrap();
        assert!(!mailbox.check());
        for i in 0..3 {
            mailbox.push(i);
        }
        mailbox.push_below(3, 99);
        assert!(mailbox.check() && !mailbox.check());
        assert_eq!(std::iter::from_fn(|| mailbox.pop()).collect::<Vec<_>>(), [0, 1, 2]);
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(mailbox.fd(), &mut count), Ok(8));
        assert!(rustix::io::read(mailbox.fd(), &mut count).is_err(), "would block");
    }
}
