//! Channels for threads that have no lane: requests go to a reactor of the session as messages, completions come back
//! through a queue and an eventfd.
//!
//! Reactors that serve the session use [`super::channel::LocalChannel`]; this is for the control thread, for reactors
//! without a connection of their own, and for whoever else opens a bdev. It costs an allocation per batch.

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bdev::{Channel, Completion, Completions, IoRequest, Rejected, Status};
use crossbeam::queue::SegQueue;
use reactor::Handle;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::channel::{Here, Link};
use super::disk::RemoteDisk;
use super::disks::MAX_REQUESTS;

/// What both sides share.
#[derive(Debug)]
pub(super) struct Shared {
    done: SegQueue<Completion>,
    event: OwnedFd,
    /// The reactor has let go of the channel: nothing will complete any more.
    gone: AtomicBool,
    /// Requests that have ended after their user had gone.
    ended: AtomicUsize,
}

impl Shared {
    fn signal(&self) {
        // Nonblocking: EAGAIN means that the counter is at its end, so the reader wakes anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// The reactor's side. Dropped, it tells the other one.
#[derive(Debug)]
pub(super) struct RemoteEnd(Arc<Shared>);

impl RemoteEnd {
    /// Hands over completions.
    pub fn complete(&self, done: &mut Completions) {
        done.drain(..).for_each(|c| self.0.done.push(c));
        self.0.signal();
    }

    /// A request has ended whose user had gone.
    pub fn ended(&self) {
        self.0.ended.fetch_add(1, Ordering::AcqRel);
        self.0.signal();
    }
}

impl Drop for RemoteEnd {
    fn drop(&mut self) {
        self.0.gone.store(true, Ordering::Release);
        self.0.signal();
    }
}

/// The user's side.
pub(super) struct ProxyChannel<S: Link> {
    home: Handle,
    /// Names the channel to its reactor.
    number: u64,
    shared: Arc<Shared>,
    batch: Vec<IoRequest>,
    /// Taken and not yet completed.
    inflight: usize,
    link: PhantomData<S>,
}

impl<S: Link> ProxyChannel<S> {
    /// A channel to `disk` by way of `home`, whose lane opens it.
    pub fn open(disk: Arc<RemoteDisk<S>>, home: Handle) -> rustix::io::Result<Self> {
        let shared = Arc::new(Shared {
            done: SegQueue::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            gone: AtomicBool::new(false),
            ended: AtomicUsize::new(0),
        });
        let number = disk.next_proxy();
        let end = RemoteEnd(shared.clone());
        home.send(move |_| Here::<S>::with(|here| here.open_remote(&disk, number, end)));
        Ok(Self { home, number, shared, batch: Vec::new(), inflight: 0, link: PhantomData })
    }

    fn send(&self, batch: Vec<IoRequest>) {
        let number = self.number;
        self.home.send(move |_| Here::<S>::with(|here| here.submit_remote(number, batch)));
    }
}

impl<S: Link> Channel for ProxyChannel<S> {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        if self.shared.gone.load(Ordering::Acquire) {
            return Err(Rejected { request, status: Status::Gone });
        }
        // The lane would have to give it back later than it may.
        if self.inflight >= MAX_REQUESTS {
            return Err(Rejected { request, status: Status::Busy });
        }
        self.inflight += 1;
        self.batch.push(request);
        Ok(())
    }

    fn kick(&mut self) {
        if !self.batch.is_empty() {
            let batch = std::mem::take(&mut self.batch);
            self.send(batch);
        }
    }

    fn poll(&mut self, done: &mut Completions) -> bool {
        let before = done.len();
        while let Some(c) = self.shared.done.pop() {
            done.push(c);
        }
        self.inflight -= done.len() - before;
        if self.shared.done.is_empty() {
            let _ = rustix::io::read(&self.shared.event, &mut [0u8; 8]);
        }
        done.len() > before
    }

    fn wait_fd(&self) -> Option<RawFd> {
        Some(self.shared.event.as_raw_fd())
    }

    fn ready(&self) -> bool {
        !self.shared.done.is_empty()
    }
}

impl<S: Link> Drop for ProxyChannel<S> {
    /// Waits until the session has let go of the memory of requests: what was not sent is aborted at once, the rest is
    /// answered or lost.
    fn drop(&mut self) {
        let number = self.number;
        self.inflight -= self.batch.len();
        self.home.send(move |_| Here::<S>::with(|here| here.close_remote(number)));
        let (shared, inflight) = (&self.shared, self.inflight);
        let over = || {
            shared.gone.load(Ordering::Acquire)
                || shared.done.len() + shared.ended.load(Ordering::Acquire) >= inflight
        };
        let timeout = Timespec::try_from(Duration::from_secs(1)).ok();
        while !over() {
            let _ = rustix::io::read(&shared.event, &mut [0u8; 8]);
            if over() {
                break;
            }
            // An early end of the wait only means another look.
            let _ = poll(&mut [PollFd::new(&shared.event, PollFlags::IN)], timeout.as_ref());
        }
    }
}
