//! The data path of a reactor that serves the session: requests go into its [`Disks`], which its lane empties each
//! turn, and completions come out of them.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::thread::LocalKey;

use bdev::{Channel, Completions, IoRequest, Rejected, Status};
use iobuf::{MapError, Pool, Registry};
use rnbd_proto::Errno;
use rtrs_poll::client::SessionId;

use super::disk::RemoteDisk;
use super::disks::{Device, Disks};
use super::fence::Fence;
use super::proxy::RemoteEnd;

/// Buffers per reactor for what cannot go out of its own memory.
const BOUNCE_BUFFERS: u32 = 32;
/// Bytes of each: a longer part becomes several.
const BOUNCE_SIZE: usize = 128 << 10;

/// Where a thread keeps its lane of one kind.
pub type LaneKey<S> = LocalKey<RefCell<Weak<Here<S>>>>;

/// What names a way to a server, and with that a kind of lane: RTRS sessions, NBD connections.
pub trait Link: Copy + Eq + Send + Sync + 'static {
    /// Any memory can be sent from and read into; otherwise what is not registered goes through bounce buffers.
    const ANY_MEMORY: bool;
    /// Servers understand a zeroing that keeps the space allocated.
    const KEEPS_SPACE: bool;

    /// A bdev makes channels on the thread that asks, and has no other way to learn whose lane is there
    /// ([`bdev::Bdev::channel`]). Set and cleared by the lane itself.
    fn key() -> &'static LaneKey<Self>;
}

impl Link for SessionId {
    const ANY_MEMORY: bool = false;
    const KEEPS_SPACE: bool = false;

    fn key() -> &'static LaneKey<Self> {
        thread_local! {
            static HERE: RefCell<Weak<Here>> = const { RefCell::new(Weak::new()) };
        }
        &HERE
    }
}

/// Takes messages back that are in flight, by their cookies: nothing of them comes any more, neither answers nor data.
pub(super) type Abandon = Box<dyn Fn(&[u64])>;

/// What a reactor has of bdev_rnbd, or of bdev_nbd.
pub struct Here<S = SessionId> {
    disks: RefCell<Disks<S>>,
    registry: Arc<Registry>,
    /// Channels of other threads: their number and that of theirs in `disks`.
    remote: RefCell<Vec<(u64, u32)>>,
    /// See [`Here::set_abandon`].
    abandon: RefCell<Option<Abandon>>,
    /// Of the reactor, in the list that sessions go by.
    pub index: usize,
}

impl<S: Link> Here<S> {
    /// For the thread's lane, which owns it: the last one wins.
    pub fn install(index: usize, registry: Arc<Registry>) -> Rc<Self> {
        let disks = Disks { any_memory: S::ANY_MEMORY, keeps_space: S::KEEPS_SPACE, ..Disks::default() };
        let here = Rc::new(Self {
            disks: disks.into(),
            registry,
            remote: RefCell::default(),
            abandon: RefCell::default(),
            index,
        });
        S::key().with(|h| *h.borrow_mut() = Rc::downgrade(&here));
        here
    }

    /// Of this thread.
    pub fn get() -> Option<Rc<Self>> {
        S::key().with(|h| h.borrow().upgrade())
    }

    /// Runs `f` on that of this thread, if there is one.
    pub fn with(f: impl FnOnce(&Self)) {
        if let Some(here) = Self::get() {
            f(&here);
        }
    }

    /// The reactor's devices and requests. Not to be kept borrowed.
    pub(super) fn disks(&self) -> std::cell::RefMut<'_, Disks<S>> {
        self.disks.borrow_mut()
    }

    fn open(&self, disk: &RemoteDisk<S>, remote: Option<RemoteEnd>) -> Result<u32, MapError> {
        let mut disks = self.disks.borrow_mut();
        if disks.pool.is_none() && !S::ANY_MEMORY {
            disks.pool = Some(Pool::new(&self.registry, BOUNCE_BUFFERS, BOUNCE_SIZE)?);
        }
        let device = match disks.find(disk.number()) {
            Some(device) => device,
            None => {
                let (gate, patience) = disk.gate(self.index);
                let shift = bdev::Bdev::info(disk).block_size.trailing_zeros();
                let device = Device::new(disk.number(), shift, patience, gate);
                disks.devices.insert(Device { fence: disk.fence().clone(), ..device })
            }
        };
        Ok(disks.open_channel(device, remote))
    }

    /// How the lane lets go of what is in flight when its user leaves without waiting.
    pub(super) fn set_abandon(&self, abandon: Abandon) {
        *self.abandon.borrow_mut() = Some(abandon);
    }

    /// Ends what a closed channel has in flight. False: this lane cannot.
    fn abandon(&self, left: &[u64]) -> bool {
        let abandon = self.abandon.borrow();
        let Some(abandon) = &*abandon else { return false };
        abandon(left);
        let mut disks = self.disks.borrow_mut();
        for part in left {
            // What others write there next must not be undone by it either.
            disks.failing_over(*part, Fence::NO_WAY);
            disks.completed(*part, Err(Errno::ECANCELED));
        }
        true
    }

    /// A channel of another thread.
    pub(super) fn open_remote(&self, disk: &RemoteDisk<S>, number: u64, end: RemoteEnd) {
        // Without memory `end` is dropped, which its user hears.
        match self.open(disk, Some(end)) {
            Ok(channel) => self.remote.borrow_mut().push((number, channel)),
            Err(e) => tracing::error!("no bounce buffers: {e}"),
        }
    }

    fn remote(&self, number: u64) -> Option<u32> {
        self.remote.borrow().iter().find(|(n, _)| *n == number).map(|(_, channel)| *channel)
    }

    /// Requests of another thread.
    pub fn submit_remote(&self, number: u64, batch: Vec<IoRequest>) {
        let Some(channel) = self.remote(number) else { return };
        let mut disks = self.disks.borrow_mut();
        for request in batch {
            if let Err(rejected) = disks.submit(channel, request) {
                disks.refuse_remote(channel, rejected.request.cookie, rejected.status);
            }
        }
    }

    /// That thread has dropped its channel.
    pub fn close_remote(&self, number: u64) {
        if let Some(channel) = self.remote(number) {
            self.remote.borrow_mut().retain(|(n, _)| *n != number);
            self.disks.borrow_mut().close_channel(channel);
        }
    }
}

/// A channel on a reactor that has a lane.
pub(super) struct LocalChannel<S: Link> {
    here: Rc<Here<S>>,
    channel: u32,
    /// The device outlives its channels.
    _disk: Arc<RemoteDisk<S>>,
}

impl<S: Link> LocalChannel<S> {
    pub fn open(disk: Arc<RemoteDisk<S>>, here: Rc<Here<S>>) -> Result<Self, MapError> {
        let channel = here.open(&disk, None)?;
        Ok(Self { here, channel, _disk: disk })
    }
}

impl<S: Link> Channel for LocalChannel<S> {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        self.here.disks.borrow_mut().submit(self.channel, request)
    }

    /// The lane sends at its next turn, which comes before any sleep.
    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Completions) -> bool {
        self.here.disks.borrow_mut().poll_channel(self.channel, done)
    }

    fn ready(&self) -> bool {
        self.here.disks.borrow().has_completions(self.channel)
    }
}

impl<S: Link> Drop for LocalChannel<S> {
    /// What was not sent is dropped. Answers to the rest can only come in on this very thread, so they cannot be waited
    /// for; instead the lane cuts the connections that carry it, after which nobody touches its memory any more. Others
    /// lose a path by that, so a [`bdev::IoChannel`] is better dropped when nothing is in flight.
    fn drop(&mut self) {
        let mut disks = self.here.disks.borrow_mut();
        disks.close_channel(self.channel);
        let left = disks.inflight_of(self.channel);
        drop(disks);
        if left.is_empty() {
            return;
        }
        let left_behind = left.len();
        if self.here.abandon(&left) {
            tracing::warn!(
                left_behind,
                "an I/O channel was dropped with requests in flight: their paths are reset"
            );
        } else {
            tracing::error!(
                left_behind,
                "an I/O channel was dropped with requests in flight, which cannot be ended"
            );
        }
    }
}

/// A channel could not be made.
pub(super) fn refused<S: Link>(disk: &RemoteDisk<S>, reason: String) -> bdev::ChannelError {
    bdev::ChannelError { bdev: bdev::Bdev::info(disk).name.clone(), reason }
}

/// As [`Disks::submit`] would have it.
impl<S: Copy + Eq> Disks<S> {
    fn refuse_remote(&mut self, channel: u32, cookie: u64, status: Status) {
        let Some(c) = self.channels.get_mut(channel) else { return };
        c.done.push(bdev::Completion { cookie, status });
        self.announce.push(channel);
    }

    /// Parts that are left of a closed channel: those that the server has.
    fn inflight_of(&self, channel: u32) -> Vec<u64> {
        let of_it = |request| self.requests.get(request).is_some_and(|r| r.channel == channel);
        self.parts.iter().filter(|(_, p)| of_it(p.request)).map(|(i, _)| u64::from(i)).collect()
    }

    /// Hands completions to the threads that wait for them. At the end of each turn.
    pub fn announce(&mut self) {
        while let Some(channel) = self.announce.pop() {
            let Some(c) = self.channels.get_mut(channel) else { continue };
            if let (Some(remote), false) = (&c.remote, c.done.is_empty()) {
                remote.complete(&mut c.done);
            }
        }
    }
}
