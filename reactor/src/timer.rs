//! One-shot timers of a reactor: a heap of deadlines with the closures to run.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Instant;

use crate::Turn;

/// Names a pending timer on its reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimerId(u64);

pub(crate) type Action = Box<dyn FnOnce(&mut Turn<'_>)>;

#[derive(Default)]
pub(crate) struct Timers {
    next_id: u64,
    heap: BinaryHeap<Reverse<(Instant, TimerId)>>,
    /// Cancelled ids stay in the heap until their time; their action is gone from here.
    actions: HashMap<TimerId, Action>,
}

impl Timers {
    pub(crate) fn add(&mut self, when: Instant, action: Action) -> TimerId {
        let id = TimerId(self.next_id);
        self.next_id += 1;
        self.heap.push(Reverse((when, id)));
        self.actions.insert(id, action);
        id
    }

    pub(crate) fn cancel(&mut self, id: TimerId) -> bool {
        self.actions.remove(&id).is_some()
    }

    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Action> {
        while let Some(Reverse((when, id))) = self.heap.peek().copied() {
            let cancelled = !self.actions.contains_key(&id);
            if when > now && !cancelled {
                return None;
            }
            self.heap.pop();
            if let Some(action) = self.actions.remove(&id) {
                return Some(action);
            }
        }
        None
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((when, _))| *when)
    }
}
