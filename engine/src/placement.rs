//! Where the next user of a reactor goes: to the one with the fewest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use reactor::Handle;

/// Users by reactor: queues, sockets, sessions, whatever an export binds to one core.
#[derive(Clone, Debug)]
pub struct Placement(Arc<[Reactor]>);

#[derive(Debug)]
struct Reactor {
    handle: Handle,
    users: AtomicUsize,
}

/// A user's place on a reactor, given back when dropped.
#[derive(Debug)]
pub struct Place {
    reactors: Arc<[Reactor]>,
    index: usize,
}

impl Placement {
    /// # Panics
    /// Without reactors.
    pub fn new(reactors: &[Handle]) -> Self {
        assert!(!reactors.is_empty(), "a program has at least one reactor");
        let reactor = |handle: &Handle| Reactor { handle: handle.clone(), users: AtomicUsize::new(0) };
        Self(reactors.iter().map(reactor).collect())
    }

    /// A place on the reactor with the fewest users; the first of several.
    pub fn take(&self) -> Place {
        let users = |i: &usize| self.0[*i].users.load(Ordering::Relaxed);
        let index = (0..self.0.len()).min_by_key(users).unwrap_or(0);
        self.0[index].users.fetch_add(1, Ordering::Relaxed);
        Place { reactors: self.0.clone(), index }
    }
}

impl Place {
    /// The reactor.
    pub fn reactor(&self) -> &Handle {
        &self.reactors[self.index].handle
    }

    /// Its place in [`App::reactors`](crate::App::reactors).
    pub fn index(&self) -> usize {
        self.index
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.reactors[self.index].users.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reactor::{IdlePolicy, Reactor as Core};

    #[test]
    fn fewest_first() {
        let cores: Vec<Core> =
            (0..2).map(|i| Core::new(&format!("r{i}"), None, IdlePolicy::Poll).unwrap()).collect();
        let placement = Placement::new(&cores.iter().map(Core::handle).collect::<Vec<_>>());
        let places: Vec<Place> = (0..3).map(|_| placement.take()).collect();
        assert_eq!(places.iter().map(Place::index).collect::<Vec<_>>(), [0, 1, 0]);
        assert_eq!(places[1].reactor().name(), "r1");
        assert_eq!(placement.take().index(), 1);
        drop(places);
        assert_eq!(placement.take().index(), 0);
    }
}
