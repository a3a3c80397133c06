//! File descriptors as a budget: how many there are, and what those who serve strangers may have of them.
//!
//! ```text
//!   the limit (RLIMIT_NOFILE, raised at start)
//!   ├── reserve: RPC socket, RDMA, reactors, disks and files             a quarter, 64 to 4096
//!   └── the rest, in equal shares: NBD server, vhost-user controllers
//! ```
//! A stranger who fills his share finds an end there, and whatever lives on the reserve goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// More are asked for by nobody here, and the kernel's table has 8 bytes for each.
const MOST: u64 = 1 << 20;
/// Without a limit, or with one that cannot be read.
const UNKNOWN: usize = 1024;
const RESERVE: std::ops::RangeInclusive<usize> = 64..=4096;

/// Who has a share of what the reserve leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Connections of NBD clients: two descriptors each, and handshakes.
    Nbd,
    /// Front ends of virtual machines, with what they send.
    Vhost,
}

impl Part {
    const COUNT: usize = 2;
}

/// What a process may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    limit: usize,
}

impl Budget {
    /// Of this process, as its soft limit is now.
    pub fn of_process() -> Self {
        let limit = getrlimit(Resource::Nofile).current;
        Self::new(limit.map_or(UNKNOWN, |n| usize::try_from(n).unwrap_or(usize::MAX)))
    }

    /// Of a process that may have `limit` descriptors.
    pub fn new(limit: usize) -> Self {
        Self { limit }
    }

    /// Raises the soft limit of this process to the hard one, or to a million, if it is lower. What it has become.
    pub fn raise() -> Self {
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let wanted = maximum.unwrap_or(MOST).min(MOST);
        if current.is_some_and(|n| n < wanted) {
            // A refusal leaves the limit as it was, and the budget follows it.
            let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
        }
        Self::of_process()
    }

    /// Descriptors that there may be.
    pub fn limit(self) -> usize {
        self.limit
    }

    /// What strangers never get.
    pub fn reserve(self) -> usize {
        (self.limit / 4).clamp(*RESERVE.start(), *RESERVE.end()).min(self.limit)
    }

    /// What `part` may have, descriptors.
    pub fn share(self, part: Part) -> usize {
        match part {
            Part::Nbd | Part::Vhost => (self.limit - self.reserve()) / Part::COUNT,
        }
    }
}

/// Descriptors that several users share. Clones are the same pool.
#[derive(Clone, Debug)]
pub struct Pool {
    total: usize,
    used: Arc<AtomicUsize>,
}

impl Pool {
    /// `total` descriptors.
    pub fn new(total: usize) -> Self {
        Self { total, used: Arc::default() }
    }

    /// How many there are, lent or not.
    pub fn total(&self) -> usize {
        self.total
    }

    /// How many are lent.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// A part of it, for one user.
    pub fn share(&self) -> Share {
        Share { pool: self.clone(), used: Arc::default() }
    }
}

/// What one user of a [`Pool`] has. It may have as much as it leaves for others: one alone gets half, two a third each, so
/// that there is always something for one more. Clones are the same user.
#[derive(Clone, Debug)]
pub struct Share {
    pool: Pool,
    used: Arc<AtomicUsize>,
}

impl Share {
    /// How many it has.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// How many it may have as things are now.
    pub fn limit(&self) -> usize {
        let left = self.pool.total.saturating_sub(self.pool.used());
        self.used().max((left + self.used()) / 2)
    }

    /// None yet, to be grown.
    pub fn lease(&self) -> Lease {
        Lease { share: self.clone(), count: 0 }
    }
}

/// Descriptors that are lent; they go back when it is dropped.
#[derive(Debug)]
pub struct Lease {
    share: Share,
    count: usize,
}

impl Lease {
    /// How many it is.
    pub fn count(&self) -> usize {
        self.count
    }

    /// All of it, for somebody else to give back.
    pub fn take(&mut self) -> Self {
        let count = std::mem::take(&mut self.count);
        Self { share: self.share.clone(), count }
    }

    /// Makes it `count`. False, and nothing changes, if the share has not so many more. For one thread: two that grow leases
    /// of one pool at once may together exceed it by what they asked for.
    #[must_use]
    pub fn set(&mut self, count: usize) -> bool {
        let Share { pool, used } = &self.share;
        let more = count.saturating_sub(self.count);
        let left = pool.total.saturating_sub(pool.used());
        if more > 0 && used.load(Ordering::Relaxed) + more > left {
            return false;
        }
        for counter in [used, &pool.used] {
            counter.fetch_add(count, Ordering::Relaxed);
            counter.fetch_sub(self.count, Ordering::Relaxed);
        }
        self.count = count;
        true
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        for counter in [&self.share.used, &self.share.pool.used] {
            counter.fetch_sub(self.count, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_comes_first() {
        for (limit, reserve, share) in [
            (0, 0, 0),
            (40, 40, 0),
            (256, 64, 96),
            (1024, 256, 384),
            (20_000, 4096, 7952),
            (1 << 20, 4096, 522_240),
        ] {
            let budget = Budget::new(limit);
            assert_eq!((budget.reserve(), budget.share(Part::Nbd)), (reserve, share), "{limit}");
            assert_eq!(budget.share(Part::Nbd), budget.share(Part::Vhost));
            assert!(reserve + Part::COUNT * share <= limit);
        }
    }

    #[test]
    fn raising_never_lowers() {
        let before = Budget::of_process();
        let raised = Budget::raise();
        assert!(raised.limit() >= before.limit());
        assert_eq!(raised, Budget::of_process());
        assert_eq!(raised, Budget::raise());
    }

    #[test]
    fn one_user_leaves_something_for_the_next() {
        let pool = Pool::new(256);
        let grow = |share: &Share| -> Lease {
            let mut lease = share.lease();
            while lease.set(lease.count() + 1) {}
            lease
        };
        let users: Vec<Share> = (0..5).map(|_| pool.share()).collect();
        let leases: Vec<Lease> = users.iter().map(grow).collect();
        assert_eq!(leases.iter().map(Lease::count).collect::<Vec<_>>(), [128, 64, 32, 16, 8]);
        assert_eq!((pool.used(), users[1].used()), (248, 64));
        assert_eq!((users[0].limit(), users[1].limit(), pool.share().limit()), (128, 64, 4));
        let mut last = pool.share().lease();
        assert!(last.set(4) && !last.set(9) && last.set(2));
        drop(leases);
        assert_eq!((pool.used(), users[1].used()), (2, 0));
        assert!(last.set(128));
        let other = last.take();
        assert_eq!((pool.used(), last.count(), other.count()), (128, 0, 128));
        drop(other);
        assert_eq!(pool.used(), 0);
    }
}
