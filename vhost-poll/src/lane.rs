//! What one session has on one reactor: a disk channel and the queues that were placed there.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use reactor::{Handle, Polled, Poller, PollerId, Turn};

use crate::bell::Bell;
use crate::disk::{Completion, Disk, DiskChannel};
use crate::fd::Kick;
use crate::queue::{Coalescing, Queue, QueueSetup, Scratch};
use crate::ring::Memory;
use crate::session::{Event, SessionKey};

/// Chains taken from a queue at a time. Drivers see those that are done before the next are taken: else a driver that
/// polls would find all of its requests done at once, this side then all of the next ones, and each would wait while
/// the other works.
const PIECE: usize = 8;
/// Pieces taken from a queue per turn.
const PIECES: usize = 8;

/// How long requests in flight may take when all queues are being stopped.
const STOP_TIME: Duration = Duration::from_secs(2);

/// The sendable side of a lane.
#[derive(Clone, Debug)]
pub(crate) struct LaneHandle {
    pub(crate) session: SessionKey,
    pub(crate) reactor: Handle,
}

/// The lanes of a reactor, by session.
struct Lanes<D: Disk>(RefCell<HashMap<u64, Rc<RefCell<Lane<D>>>>>);

/// What a queue that comes to its end is asked to do then.
#[derive(Debug)]
enum Draining {
    Stop,
    Memory(Memory),
}

struct Slot {
    queue: Queue,
    draining: Option<Draining>,
    watched: Option<RawFd>,
}

pub(crate) struct Lane<D: Disk> {
    session: SessionKey,
    poller: Option<PollerId>,
    disk: Option<D::Channel>,
    disk_fd: Option<RawFd>,
    /// By index of the vring.
    queues: Vec<Option<Slot>>,
    scratch: Scratch,
    done: Vec<Completion>,
    /// The disk is to be let go of.
    detaching: bool,
    /// Requests in flight, for the control thread to read.
    inflight: Arc<AtomicU32>,
    /// Of [`iobuf::losses`], when the session was last told.
    losses: u64,
    /// Since when all queues are being stopped and requests are in flight.
    stopping: Option<Instant>,
    /// The disk was told then to end them.
    aborted: bool,
}

struct LanePoller<D: Disk>(Rc<RefCell<Lane<D>>>);

impl<D: Disk> Poller for LanePoller<D> {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().poll(cx).into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().before_sleep().into()
    }

    fn deadline(&self) -> Option<Instant> {
        let lane = self.0.borrow();
        let queues = lane.queues.iter().flatten().map(|s| s.queue.deadline());
        let hurry = lane.stopping.filter(|_| !lane.aborted).map(|since| since + STOP_TIME);
        queues.chain([lane.disk.as_ref().and_then(DiskChannel::deadline), hurry]).flatten().min()
    }
}

impl<D: Disk> Lane<D> {
    fn poll(&mut self, cx: &mut Turn<'_>) -> bool {
        let mut busy = false;
        // While the disk is being let go of, requests wait in their rings.
        let pieces = if self.detaching { 0 } else { PIECES };
        for piece in 1..=pieces {
            let mut most = 0;
            for slot in self.queues.iter_mut().flatten() {
                most = most.max(slot.queue.fetch(&mut self.disk, &mut self.scratch, PIECE));
            }
            busy |= most > 0;
            if most < PIECE || piece == pieces {
                break;
            }
            self.complete();
            self.queues.iter_mut().flatten().for_each(|slot| slot.queue.show());
        }
        if let Some(disk) = &mut self.disk
            && busy
        {
            disk.kick();
        }
        busy |= self.complete();
        let mut ending = self.detaching;
        for slot in self.queues.iter_mut().flatten() {
            slot.queue.publish(cx.now);
            ending |= slot.draining.is_some();
        }
        if ending {
            self.hurry(cx.now);
            self.end(cx);
        }
        self.look_for_losses();
        if busy {
            let inflight: usize = self.queues.iter().flatten().map(|s| s.queue.outstanding()).sum();
            self.inflight.store(inflight as u32, Ordering::Relaxed);
        }
        busy
    }

    /// Ends what the disk has done. True if there was anything.
    #[inline]
    fn complete(&mut self) -> bool {
        if let Some(disk) = &mut self.disk {
            disk.poll(&mut self.done);
        }
        let any = !self.done.is_empty();
        for Completion { cookie, status } in self.done.drain(..) {
            // Queues stay until nothing of them is in flight.
            if let Some(Some(slot)) = self.queues.get_mut((cookie >> 16) as usize) {
                slot.queue.complete(cookie as u16, status);
            }
        }
        any
    }

    /// Memory of some front end is gone: the session knows whether it is its own.
    fn look_for_losses(&mut self) {
        let losses = iobuf::losses();
        if losses != self.losses {
            self.losses = losses;
            self.session.tell::<D>(Event::Loss);
        }
    }

    /// A front end that stops its queues waits for that, and its guest can neither reset nor be unplugged: after a while what
    /// waits for a server that is away is given up.
    #[cold]
    fn hurry(&mut self, now: Instant) {
        let mut slots = self.queues.iter().flatten();
        let stops = slots.all(|s| matches!(s.draining, Some(Draining::Stop)));
        let inflight = self.queues.iter().flatten().any(|s| s.queue.outstanding() > 0);
        if !(stops && inflight) {
            (self.stopping, self.aborted) = (None, false);
            return;
        }
        let since = *self.stopping.get_or_insert(now);
        if !self.aborted && now.duration_since(since) >= STOP_TIME {
            self.aborted = true;
            self.queues.iter_mut().flatten().for_each(|s| s.queue.keeps_failed = true);
            if let Some(disk) = &mut self.disk {
                disk.abort();
            }
        }
    }

    /// Ends what waited for the last request in flight.
    #[cold]
    fn end(&mut self, cx: &mut Turn<'_>) {
        for index in 0..self.queues.len() {
            let Some(slot) = &mut self.queues[index] else { continue };
            // A queue that is not enabled cannot repeat anything; it stays in the memory of requests in flight.
            let waiting = if slot.queue.enabled { slot.queue.inflight() } else { slot.queue.outstanding() };
            if waiting > 0 {
                continue;
            }
            let event = match slot.draining.take() {
                None => continue,
                Some(Draining::Memory(memory)) => {
                    slot.queue.set_memory(memory);
                    slot.queue.draining = false;
                    Event::Swapped
                }
                Some(Draining::Stop) => {
                    let base = slot.queue.base();
                    self.remove(cx, index);
                    Event::Stopped { index: index as u16, base: Some(base) }
                }
            };
            self.session.tell::<D>(event);
        }
        let inflight: usize = self.queues.iter().flatten().map(|s| s.queue.outstanding()).sum();
        if self.detaching && inflight == 0 {
            self.detaching = false;
            self.drop_disk(cx);
            self.session.tell::<D>(Event::Detached);
        }
    }

    fn before_sleep(&mut self) -> bool {
        let mut busy = self.disk.as_ref().is_some_and(DiskChannel::ready);
        let full = self.disk.as_ref().is_some_and(DiskChannel::is_full);
        for slot in self.queues.iter_mut().flatten() {
            // What is in a ring while the disk is full has to wait for a completion, which wakes.
            busy |= slot.queue.arm() && !full && !self.detaching;
        }
        busy
    }

    fn start(&mut self, cx: &mut Turn<'_>, setup: QueueSetup) {
        let index = setup.index;
        let err = setup.err.is_some();
        match Queue::new(setup, cx.now) {
            Ok(queue) => {
                let at = usize::from(index);
                if self.queues.len() <= at {
                    self.queues.resize_with(at + 1, || None);
                }
                self.remove(cx, at);
                let mut slot = Slot { queue, draining: None, watched: None };
                slot.watch(cx);
                self.queues[at] = Some(slot);
                self.session.tell::<D>(Event::Started);
            }
            Err(why) => {
                tracing::debug!(queue = index, err, "a queue did not start");
                self.session.tell::<D>(Event::Refused { index, why });
            }
        }
    }

    fn remove(&mut self, cx: &mut Turn<'_>, index: usize) {
        if let Some(mut slot) = self.queues[index].take() {
            slot.unwatch(cx);
        }
    }

    fn drain(&mut self, index: u16, what: Draining) {
        match self.queues.get_mut(usize::from(index)) {
            Some(Some(slot)) => {
                slot.queue.draining = true;
                slot.draining = Some(what);
            }
            // Nothing there: nothing in flight.
            _ => self.session.tell::<D>(match what {
                Draining::Stop => Event::Stopped { index, base: None },
                Draining::Memory(_) => Event::Swapped,
            }),
        }
    }

    fn drop_disk(&mut self, cx: &mut Turn<'_>) {
        if let Some(fd) = self.disk_fd.take() {
            cx.unwatch(fd);
        }
        self.disk = None;
    }
}

impl Slot {
    fn watch(&mut self, cx: &mut Turn<'_>) {
        self.unwatch(cx);
        let Some(fd) = self.queue.kick.as_ref().map(|fd| fd.raw()) else { return };
        match cx.watch(fd) {
            Ok(()) => self.watched = Some(fd),
            // Then the queue is polled as one without a kick descriptor.
            Err(e) => {
                tracing::warn!("vhost: cannot wait for kicks: {e}");
                self.queue.kick = None;
            }
        }
    }

    fn unwatch(&mut self, cx: &mut Turn<'_>) {
        if let Some(fd) = self.watched.take() {
            cx.unwatch(fd);
        }
    }
}

/// A control thread's commands to a lane. All are messages, in order.
impl LaneHandle {
    /// Makes the lane, with a channel of `disk` if there is one to be had.
    pub(crate) fn open<D: Disk>(&self, disk: Option<Arc<D>>, inflight: Arc<AtomicU32>) {
        let session = self.session.clone();
        self.reactor.send(move |cx| {
            let channel = disk.map(|d| d.channel());
            let disk = channel
                .and_then(|c| c.inspect_err(|e| tracing::error!("vhost: requests will fail: {e}")).ok());
            let disk_fd = disk.as_ref().and_then(DiskChannel::wait_fd);
            let disk_fd = disk_fd.filter(|fd| cx.watch(*fd).is_ok());
            let id = session.id;
            let lane = Rc::new(RefCell::new(Lane::<D> {
                session,
                poller: None,
                disk,
                disk_fd,
                queues: Vec::new(),
                scratch: Scratch::new(),
                done: Vec::with_capacity(256),
                detaching: false,
                inflight,
                // Whatever was lost between the mapping and now is found at the first turn.
                losses: 0,
                stopping: None,
                aborted: false,
            }));
            let poller = cx.add_poller("vhost_blk", Box::new(LanePoller(lane.clone())));
            lane.borrow_mut().poller = Some(poller);
            let lanes = cx.local::<Lanes<D>>().unwrap_or_else(|| {
                let lanes = Rc::new(Lanes::<D>(RefCell::default()));
                cx.set_local(lanes.clone());
                lanes
            });
            lanes.0.borrow_mut().insert(id, lane);
        });
    }

    fn with<D: Disk>(&self, f: impl FnOnce(&mut Lane<D>, &mut Turn<'_>) + Send + 'static) {
        let id = self.session.id;
        self.reactor.send(move |cx| {
            let lane = cx.local::<Lanes<D>>().and_then(|l| l.0.borrow().get(&id).cloned());
            if let Some(lane) = lane {
                f(&mut lane.borrow_mut(), cx);
            }
        });
    }

    pub(crate) fn start<D: Disk>(&self, setup: QueueSetup) {
        self.with::<D>(move |lane, cx| lane.start(cx, setup));
    }

    pub(crate) fn stop<D: Disk>(&self, index: u16) {
        self.with::<D>(move |lane, _| lane.drain(index, Draining::Stop));
    }

    pub(crate) fn set_memory<D: Disk>(&self, index: u16, memory: Memory) {
        self.with::<D>(move |lane, _| lane.drain(index, Draining::Memory(memory)));
    }

    pub(crate) fn set_kick<D: Disk>(&self, index: u16, kick: Option<Arc<Kick>>) {
        self.change::<D>(index, |slot, cx| {
            // The old one must leave epoll before it is closed.
            slot.unwatch(cx);
            slot.queue.kick = kick;
            slot.watch(cx);
        });
    }

    pub(crate) fn set_call<D: Disk>(&self, index: u16, call: Option<Arc<Bell>>) {
        self.change::<D>(index, |slot, _| slot.queue.set_call(call));
    }

    pub(crate) fn set_err<D: Disk>(&self, index: u16, err: Option<Arc<Bell>>) {
        self.change::<D>(index, |slot, _| slot.queue.set_err(err));
    }

    pub(crate) fn set_enabled<D: Disk>(&self, index: u16, enabled: bool) {
        self.change::<D>(index, move |slot, _| slot.queue.enabled = enabled);
    }

    pub(crate) fn set_coalescing<D: Disk>(&self, config: Coalescing) {
        self.with::<D>(move |lane, _| {
            lane.queues.iter_mut().flatten().for_each(|s| s.queue.set_coalescing(config));
        });
    }

    fn change<D: Disk>(&self, index: u16, f: impl FnOnce(&mut Slot, &mut Turn<'_>) + Send + 'static) {
        self.with::<D>(move |lane, cx| {
            if let Some(Some(slot)) = lane.queues.get_mut(usize::from(index)) {
                f(slot, cx);
            }
        });
    }

    /// Lets go of the disk once nothing is in flight there; requests fail from now on. Answers `Detached`.
    pub(crate) fn detach<D: Disk>(&self) {
        self.with::<D>(|lane, _| lane.detaching = true);
    }

    /// Ends the lane, whose queues are stopped.
    pub(crate) fn close<D: Disk>(&self) {
        let id = self.session.id;
        self.reactor.send(move |cx| {
            let lane = cx.local::<Lanes<D>>().and_then(|l| l.0.borrow_mut().remove(&id));
            let Some(lane) = lane else { return };
            let mut lane = lane.borrow_mut();
            for index in 0..lane.queues.len() {
                lane.remove(cx, index);
            }
            lane.drop_disk(cx);
            if let Some(poller) = lane.poller.take() {
                cx.remove_poller(poller);
            }
            lane.session.tell::<D>(Event::Closed);
        });
    }
}
