//! One queue of a disk on its reactor: requests to the bdev, answers back, run to completion.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bdev::{Completions, Descriptor, IoChannel, IoRequest, Status};
use iobuf::Registry;
use reactor::{Handle, Polled, Poller, PollerId, Turn};
use ublk_poll::{CharDevice, Queue, QueueOptions, Request};

use super::bridge;
use super::target::Target;

/// What a lane is made from; crosses to its reactor.
pub(super) struct LaneSpec {
    pub(super) device: Arc<CharDevice>,
    pub(super) descriptor: Descriptor,
    pub(super) registry: Arc<Registry>,
    pub(super) options: QueueOptions,
    pub(super) control: Handle,
    /// Of the disk.
    pub(super) run: u64,
}

struct Lane {
    // Field order is drop order: the channel waits for its requests, then the queue's memory may go, then control
    // hears of it.
    channel: IoChannel,
    queue: Queue,
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
    _end: End,
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
    watch(cx, queue.wait_fd())?;
    let depth = usize::from(spec.options.depth);
    let id = Rc::new(Cell::new(None));
    let lane = Lane {
        queue,
        requests: Vec::with_capacity(depth),
        done: Vec::with_capacity(depth),
        deferred: VecDeque::with_capacity(depth),
        shift: channel.info().block_size.trailing_zeros(),
        blocks: channel.blocks(),
        channel,
        id: id.clone(),
        _end: End { control: spec.control, device: spec.device.id(), run: spec.run },
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
        if status != Status::Ok {
            tracing::debug!(bdev = self.channel.info().name, ?status, "I/O of a ublk disk failed");
        }
        self.queue.complete(cookie as u16, bridge::result(status));
    }

    /// Submits what came, and answers what has ended.
    fn turn(&mut self) -> bool {
        let mut requests = std::mem::take(&mut self.requests);
        let mut busy = self.queue.poll(&mut requests);
        for request in requests.drain(..) {
            self.submit(bridge::io_request(&request, self.shift));
        }
        self.requests = requests;
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
        self.queue.kick();
        busy
    }

    /// A device that was told of its new size sends requests up to it.
    fn follow_resize(&mut self) {
        let blocks = self.channel.blocks();
        if blocks != self.blocks {
            self.blocks = blocks;
            self.queue.resized(blocks << (self.shift - 9));
        }
    }

    fn end(&mut self, cx: &mut Turn<'_>) {
        // Once: the poller is dropped at the end of this turn.
        let Some(id) = self.id.take() else { return };
        if let Some(fd) = self.channel.wait_fd() {
            cx.unwatch(fd);
        }
        cx.unwatch(self.queue.wait_fd());
        cx.remove_poller(id);
    }
}

impl Poller for Lane {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.follow_resize();
        let busy = self.turn();
        if self.queue.is_over() && self.channel.inflight() == 0 {
            self.end(cx);
        }
        busy.into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        // Deferred requests are tried again after a completion; with nothing in flight none would come.
        let stuck = !self.deferred.is_empty() && self.channel.inflight() == 0;
        (stuck || self.queue.ready() || self.channel.ready()).into()
    }

    fn deadline(&self) -> Option<Instant> {
        self.channel.deadline()
    }
}
