//! The end of descriptors that a front end has sent.
//!
//! Whoever closes the last descriptor of a TCP socket waits for its peer, for as long as the front end has said (SO_LINGER);
//! one of a file in FUSE is flushed by the front end's own process; and a Unix socket takes with it what was sent through it
//! and never received. So a thread of its own closes what a session leaves, and what makes that wait makes nobody else wait.
//! Eventfds and memory are closed where they are: nothing of them waits.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use reactor::descriptors::Lease;

/// Threads that close what sessions of one controller have left. Clones are the same number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Closing(Arc<AtomicUsize>);

impl Closing {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Closes `descriptors` in a thread, and gives `lease` back when it has.
    pub(crate) fn close(&self, descriptors: Vec<OwnedFd>, lease: Lease) {
        let count = Count::of(&self.0);
        // Shared, so that they are not closed here if there is no thread.
        let left = Arc::new(Mutex::new(Some((descriptors, lease, count))));
        let theirs = left.clone();
        let close = move || drop(theirs.lock().unwrap_or_else(PoisonError::into_inner).take());
        let thread = std::thread::Builder::new().name("vhost-close".into()).spawn(close);
        if let Err(e) = thread {
            tracing::error!(
                "vhost: descriptors of a front end stay open, there is no thread to close them: {e}"
            );
            std::mem::forget(left);
        }
    }
}

struct Count(Arc<AtomicUsize>);

impl Count {
    fn of(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter.clone())
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reactor::descriptors::Pool;

    #[test]
    fn what_is_left_is_closed_and_given_back() {
        let (pool, closing) = (Pool::new(64), Closing::default());
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut lease = pool.share().lease();
        assert!(lease.set(2));
        closing.close(vec![theirs.into()], lease);
        test_support::until("all is given back", || pool.used() == 0 && closing.count() == 0);
        assert_eq!(std::io::Read::read(&mut &ours, &mut [0]).unwrap(), 0);
    }
}
