//! One queue of a disk on its reactor: requests to the bdev, answers back, run to completion.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bdev::{Completions, Descriptor, IoChannel, IoRequest, Status};
use iobuf::{Buffer, Registry};
use reactor::{Handle, Polled, Poller, PollerId, Turn};
use rustix::io::Errno;
use ublk_poll::{CharDevice, Queue, QueueOptions, Request};

use super::bridge;
use super::target::Target;

/// How long requests in flight may take when their disk is being stopped. After that they fail: the kernel does not let go
/// of a disk before they have ended, nor of a process that asked for that.
const GRACE: Duration = Duration::from_secs(5);
/// And after the bdev was told to end what it can.
const LAST_GRACE: Duration = Duration::from_secs(6);

/// The cookie of a reset; tags are 16 bits.
const RESET: u64 = 1 << 32;

/// How far the lanes of a disk are to go. Shared with the control thread, which wakes them when it changes it.
#[derive(Debug, Default)]
pub(super) struct Orders(AtomicU8);

const SERVE: u8 = 0;
const FINISH: u8 = 1;
const FAIL: u8 = 2;

impl Orders {
    /// What is in flight has [`GRACE`]; from its end on requests fail.
    pub(super) fn finish(&self) {
        self.0.fetch_max(FINISH, Ordering::Relaxed);
    }

    /// Requests fail, those in flight, too.
    pub(super) fn fail(&self) {
        self.0.fetch_max(FAIL, Ordering::Relaxed);
    }
}

/// What a lane is made from; crosses to its reactor.
pub(super) struct LaneSpec {
    pub(super) device: Arc<CharDevice>,
    pub(super) descriptor: Descriptor,
    pub(super) registry: Arc<Registry>,
    pub(super) options: QueueOptions,
    pub(super) control: Handle,
    /// Of the disk.
    pub(super) run: u64,
    pub(super) orders: Arc<Orders>,
}

/// What a lane does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Serving,
    /// Since when the disk is being stopped, and whether the bdev has been told to end what it can.
    Finishing(Instant, bool),
    /// Every request fails. What the bdev still has is nobody's any more.
    Failing,
}

struct Lane {
    // Field order is drop order: the channel waits for its requests, then the queue's memory may go, then control
    // hears of it.
    channel: IoChannel,
    /// Gone when the device is stopped, even if the bdev is not done.
    queue: Option<Queue>,
    /// What the bdev still has of failed requests.
    lent: Vec<Buffer>,
    mode: Mode,
    orders: Arc<Orders>,
    /// For `queue.poll`, kept to save the allocation.
    requests: Vec<Request>,
    /// For `channel.poll`.
    done: Completions,
    /// Requests that the channel was too full for, oldest first.
    deferred: VecDeque<IoRequest>,
    shift: u32,
    blocks: u64,
    /// Its own name on the reactor.
    id: Rc<Cell<Option<PollerId>>>,
    end: Option<End>,
}

/// Tells the control thread that a lane is gone.
struct End {
    control: Handle,
    device: u32,
    run: u64,
}

impl Drop for End {
    fn drop(&mut self) {
        let (device, run) = (self.device, self.run);
        Target::send(&self.control, move |target, cx| target.lane_ended(cx, device, run));
    }
}

/// Sets up a lane on the reactor of `cx`. `Ok`: every tag is fetched, and [`Target::lane_ended`] will be called once.
pub(super) fn start(cx: &mut Turn<'_>, spec: LaneSpec) -> Result<PollerId, String> {
    // This thread serves write-back of the host's page cache: when it needs memory, the kernel must not make it wait for
    // that very write-back (prctl(2), PR_SET_IO_FLUSHER). A process without CAP_SYS_RESOURCE lives with the risk.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!(%error, "not an I/O flusher");
    }
    let channel = spec.descriptor.channel().map_err(|e| e.to_string())?;
    let queue = Queue::new(spec.device.clone(), &spec.registry, spec.options)?;
    let watch = |cx: &mut Turn<'_>, fd| cx.watch(fd).map_err(|e| format!("cannot watch a queue: {e}"));
    if let Some(fd) = channel.wait_fd() {
        watch(cx, fd)?;
    }
    let queue_fd = queue.wait_fd();
    watch(cx, queue_fd)?;
    let depth = usize::from(spec.options.depth);
    let id = Rc::new(Cell::new(None));
    let lane = Lane {
        queue: Some(queue),
        lent: Vec::new(),
        mode: Mode::Serving,
        orders: spec.orders,
        requests: Vec::with_capacity(depth),
        done: Vec::with_capacity(depth),
        deferred: VecDeque::with_capacity(depth),
        shift: channel.info().block_size.trailing_zeros(),
        blocks: channel.blocks(),
        channel,
        id: id.clone(),
        end: Some(End { control: spec.control, device: spec.device.id(), run: spec.run }),
    };
    let name = format!("ublk_{}_{}", spec.device.id(), spec.options.queue);
    let poller = cx.add_poller(&name, Box::new(lane));
    id.set(Some(poller));
    Ok(poller)
}

impl Lane {
    fn submit(&mut self, request: IoRequest) {
        if !self.deferred.is_empty() {
            return self.deferred.push_back(request);
        }
        let _ = self.submit_now(request);
    }

    /// False: the channel is full, and the request waits at the head of the deferred.
    fn submit_now(&mut self, request: IoRequest) -> bool {
        match self.channel.submit(request) {
            Ok(()) => true,
            Err(rejected) if rejected.status == Status::Busy => {
                self.deferred.push_front(rejected.request);
                false
            }
            Err(rejected) => {
                self.answer(rejected.request.cookie, rejected.status);
                true
            }
        }
    }

    fn submit_deferred(&mut self) {
        while let Some(request) = self.deferred.pop_front() {
            if !self.submit_now(request) {
                return;
            }
        }
    }

    fn answer(&mut self, cookie: u64, status: Status) {
        // Those of failed requests have been answered.
        let Some(queue) = self.queue.as_mut().filter(|_| self.mode != Mode::Failing) else { return };
        if cookie == RESET {
            return;
        }
        if status != Status::Ok {
            tracing::debug!(bdev = self.channel.info().name, ?status, "I/O of a ublk disk failed");
        }
        queue.complete(cookie as u16, bridge::result(status));
    }

    /// Submits what came, and answers what has ended.
    fn turn(&mut self) -> bool {
        let mut busy = self.take();
        if !self.deferred.is_empty() {
            self.submit_deferred();
        }
        if self.channel.inflight() > 0 {
            self.channel.kick();
            let mut done = std::mem::take(&mut self.done);
            busy |= self.channel.poll(&mut done);
            for c in done.drain(..) {
                self.answer(c.cookie, c.status);
            }
            self.done = done;
        }
        if let Some(queue) = &mut self.queue {
            queue.kick();
        }
        busy
    }

    /// Requests that have come.
    fn take(&mut self) -> bool {
        let Some(queue) = &mut self.queue else { return false };
        let mut requests = std::mem::take(&mut self.requests);
        let busy = queue.poll(&mut requests);
        for request in requests.drain(..) {
            if self.mode == Mode::Failing {
                if let Some(queue) = &mut self.queue {
                    queue.complete(request.tag, Err(Errno::IO));
                }
            } else {
                self.submit(bridge::io_request(&request, self.shift));
            }
        }
        self.requests = requests;
        busy
    }

    /// A device that was told of its new size sends requests up to it.
    fn follow_resize(&mut self) {
        let blocks = self.channel.blocks();
        if blocks != self.blocks {
            self.blocks = blocks;
            if let Some(queue) = &mut self.queue {
                queue.resized(blocks << (self.shift - 9));
            }
        }
    }

    /// Does what the control thread has ordered.
    fn obey(&mut self, now: Instant) {
        let order = self.orders.0.load(Ordering::Relaxed);
        match self.mode {
            _ if order == SERVE => {}
            Mode::Serving if order == FINISH => self.mode = Mode::Finishing(now, false),
            Mode::Serving => self.fail(),
            Mode::Finishing(since, told) => {
                let waited = now.duration_since(since);
                if order == FAIL || waited >= LAST_GRACE || self.is_clear() {
                    self.fail();
                } else if waited >= GRACE && !told {
                    self.abort();
                    self.mode = Mode::Finishing(since, true);
                }
            }
            Mode::Failing => {}
        }
    }

    /// Nothing that came is unanswered.
    fn is_clear(&self) -> bool {
        self.deferred.is_empty() && self.queue.as_ref().is_none_or(|q| q.inflight() == 0)
    }

    /// Lets the bdev end what waits, for instance for a server that is away.
    fn abort(&mut self) {
        // Refused if the bdev is gone, which has ended them then.
        let _ = self.channel.submit(IoRequest::reset(RESET));
    }

    /// From now on every request fails, and the control thread hears of it.
    fn fail(&mut self) {
        self.mode = Mode::Failing;
        self.deferred.clear();
        if let Some(queue) = &mut self.queue {
            let late = queue.inflight();
            queue.abandon();
            self.lent = queue.lent();
            if late > 0 {
                let bdev = &self.channel.info().name;
                tracing::warn!(
                    bdev,
                    requests = late,
                    "a ublk disk is stopped: requests that did not end fail"
                );
            }
        }
        if self.channel.inflight() > 0 {
            self.abort();
        }
        self.report();
    }

    /// Tells the control thread that nothing of this lane keeps the kernel waiting any more.
    fn report(&self) {
        let Some(end) = &self.end else { return };
        let (device, run) = (end.device, end.run);
        Target::send(&end.control, move |target, cx| target.lane_fails(cx, device, run));
    }

    /// The device is stopped: lets go of it, and of the lane itself once the bdev is done.
    fn end(&mut self, cx: &mut Turn<'_>) {
        if let Some(queue) = self.queue.take_if(|q| q.is_over()) {
            cx.unwatch(queue.wait_fd());
            drop(queue);
            if self.mode != Mode::Failing {
                self.mode = Mode::Failing;
                self.report();
            }
            self.end = None;
        }
        if self.queue.is_some() || self.channel.inflight() > 0 {
            return;
        }
        // Once: the poller is dropped at the end of this turn.
        let Some(id) = self.id.take() else { return };
        if let Some(fd) = self.channel.wait_fd() {
            cx.unwatch(fd);
        }
        cx.remove_poller(id);
    }
}

impl Poller for Lane {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.follow_resize();
        let busy = self.turn();
        self.obey(cx.now);
        self.end(cx);
        busy.into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        // Deferred requests are tried again after a completion; with nothing in flight none would come.
        let stuck = !self.deferred.is_empty() && self.channel.inflight() == 0;
        (stuck || self.queue.as_mut().is_some_and(Queue::ready) || self.channel.ready()).into()
    }

    fn deadline(&self) -> Option<Instant> {
        let grace = match self.mode {
            Mode::Finishing(since, told) => Some(since + if told { LAST_GRACE } else { GRACE }),
            Mode::Serving | Mode::Failing => None,
        };
        self.channel.deadline().into_iter().chain(grace).min()
    }
}
