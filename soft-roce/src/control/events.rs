//! Events that wait for the connection managers they are for.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use verbs::{CmEvent, CmId};

use crate::udp::sys;

/// A queue per connection manager.
#[derive(Default)]
pub struct Mailboxes {
    queues: HashMap<u32, Queue>,
    next: u32,
}

struct Queue {
    events: VecDeque<CmEvent>,
    /// Readable while there are events.
    bell: Arc<OwnedFd>,
}

impl Mailboxes {
    /// A new owner of events, and its descriptor.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn add(&mut self) -> io::Result<(u32, Arc<OwnedFd>)> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let owner = self.next;
        self.next += 1;
        self.queues.insert(owner, Queue { events: VecDeque::new(), bell: bell.clone() });
        Ok((owner, bell))
    }

    pub fn remove(&mut self, owner: u32) {
        self.queues.remove(&owner);
    }

    pub fn push(&mut self, owner: u32, event: CmEvent) {
        if let Some(queue) = self.queues.get_mut(&owner) {
            queue.events.push_back(event);
            sys::notify(queue.bell.as_fd());
        }
    }

    pub fn pop(&mut self, owner: u32) -> Option<CmEvent> {
        let queue = self.queues.get_mut(&owner)?;
        let event = queue.events.pop_front();
        if queue.events.is_empty() {
            sys::drain(queue.bell.as_fd());
        }
        event
    }

    /// Forgets the events of one connection or listener.
    pub fn forget(&mut self, owner: u32, id: CmId) {
        if let Some(queue) = self.queues.get_mut(&owner) {
            queue.events.retain(|event| event.id() != id);
            if queue.events.is_empty() {
                sys::drain(queue.bell.as_fd());
            }
        }
    }

    /// Connections that `listener` was asked for, and nobody has seen.
    pub fn forget_requests_of(&mut self, owner: u32, listener: CmId) -> Vec<CmId> {
        let Some(queue) = self.queues.get_mut(&owner) else { return Vec::new() };
        let requests = queue.events.iter().filter_map(|event| match event {
            CmEvent::ConnectRequest { listener: l, id, .. } if *l == listener => Some(*id),
            _ => None,
        });
        requests.collect()
    }
}
