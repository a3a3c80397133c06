//! What one reactor has of a session, and which path a request takes.

use std::sync::Arc;
use std::time::Duration;

use super::con::Con;
use super::link::Link;
use super::permits::Permits;
use super::slab::{Key, Slab};
use crate::client::error::Refused;
use crate::client::options::Policy;
use crate::client::path::PathId;
use crate::client::session::Session;
use crate::client::upper::Via;

/// A session on its way to its reactors.
#[derive(Clone)]
pub(in crate::client) struct SessionSetup {
    pub session: Arc<Session>,
    /// Which of the session's reactors it is.
    pub index: usize,
    pub policy: Policy,
    pub io_timeout: Option<Duration>,
}

pub(super) struct LaneSession {
    pub session: Arc<Session>,
    pub permits: Permits,
    /// Live links, in the order in which their paths were added.
    pub links: Vec<(PathId, Key)>,
    pub policy: Policy,
    pub io_timeout: Option<Duration>,
    /// Which of the session's reactors it is; the first has con 0.
    index: usize,
    /// Between `session_up` and `session_down`.
    pub up: bool,
    /// Whose turn it is.
    cursor: usize,
}

impl LaneSession {
    pub fn new(setup: SessionSetup) -> Self {
        let SessionSetup { session, index, policy, io_timeout } = setup;
        let (first, count) = session.ids(index);
        Self {
            permits: Permits::new(first, count),
            links: Vec::new(),
            policy,
            io_timeout,
            index,
            up: false,
            cursor: 0,
            session,
        }
    }

    /// What it takes is another thing now. It is down, so it has no request that knows the former ids.
    pub fn renew(&mut self, setup: SessionSetup) {
        debug_assert!(!self.up && self.links.is_empty() && self.permits.inflight() == 0);
        *self = Self::new(setup);
    }

    pub fn add_link(&mut self, path: PathId, link: Key) {
        let at = self.links.partition_point(|(p, _)| *p < path);
        self.links.insert(at, (path, link));
    }

    pub fn remove_link(&mut self, link: Key) {
        self.links.retain(|(_, l)| *l != link);
    }

    /// The link and connection for a request.
    pub fn choose(
        &mut self,
        links: &mut Slab<Link>,
        cons: &mut Slab<Con>,
        via: Via,
    ) -> Result<(Key, Key), Refused> {
        if via == Via::Service && self.index > 0 {
            return Err(Refused::NoServiceCon);
        }
        let first = self.first_choice(links).ok_or(Refused::Down)?;
        let mut con_of = |link: Key| {
            let con = links.get(link).filter(|l| l.is_usable())?.con_with_room(cons, via)?;
            Some((link, con))
        };
        if let Some(found) = con_of(first) {
            return Ok(found);
        }
        // Its queues are full: any other will do.
        self.links.iter().find_map(|(_, link)| con_of(*link)).ok_or(Refused::Busy)
    }

    /// By policy, among all that may be used.
    fn first_choice(&mut self, links: &mut Slab<Link>) -> Option<Key> {
        let n = self.links.len();
        let mut usable =
            |key: Key| links.get(key).filter(|l| l.is_usable()).map(|l| (l.inflight, l.path.latency_ns()));
        match self.policy {
            _ if n == 1 => Some(self.links[0].1).filter(|k| usable(*k).is_some()),
            Policy::RoundRobin => {
                let found =
                    (1..=n).map(|i| (self.cursor + i) % n).find(|i| usable(self.links[*i].1).is_some())?;
                self.cursor = found;
                Some(self.links[found].1)
            }
            Policy::MinInflight => self.least(|k| usable(k).map(|(inflight, _)| inflight.into())),
            Policy::MinLatency => self.least(|k| usable(k).map(|(_, latency)| latency)),
        }
    }

    /// The first of those with the least value, counted from the reactor's own favourite.
    fn least(&self, mut value: impl FnMut(Key) -> Option<u64>) -> Option<Key> {
        let n = self.links.len();
        let all = (0..n).map(|i| self.links[(self.index + i) % n].1);
        let valued = all.filter_map(|k| Some((value(k)?, k)));
        valued.min_by_key(|(v, _)| *v).map(|(_, k)| k)
    }
}
