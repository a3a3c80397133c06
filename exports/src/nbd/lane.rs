//! One socket of a disk on its reactor: requests to the bdev, answers back, run to completion.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use std::cell::{Cell, RefCell};

use bdev::{Completions, Descriptor, IoChannel, IoRequest, Status};
use iobuf::Registry;
use nbd_poll::{Buffers, Connection, Incoming, MAX_IN_FLIGHT, RequestId};
use nbd_proto::request::Command;
use nbd_proto::request::Export;
use reactor::{Polled, Poller, PollerId, Turn};

use super::bridge;

/// How long requests in flight may take when the kernel has let go of the device: nobody waits for them any more.
const GRACE: Duration = Duration::from_secs(1);

/// How often a connection that waits for another one's stale requests looks again.
const FENCE_RETRY: Duration = Duration::from_millis(1);

/// The cookie of a reset; those of requests are below [`MAX_IN_FLIGHT`].
const RESET: u64 = u64::MAX;

/// What the lanes of a disk and the control thread share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The kernel sends nothing more: lanes take no more requests, and end.
    pub stop: AtomicBool,
    /// The kernel keeps the device and what it has not been answered, for the next run of the program.
    pub keep: AtomicBool,
    /// Connections that have broken off while the bdev still works on requests of theirs.
    ///
    /// The kernel sends such requests again on another connection. If that one were executed, answered, and followed by
    /// a newer write to the same place while the old one is still on its way to the device, the newer data would be
    /// lost. So nobody takes requests until the old ones have ended.
    fence: AtomicUsize,
}

/// What a lane is made of.
pub(super) struct Parts {
    pub socket: OwnedFd,
    pub export: Export,
    pub descriptor: Descriptor,
    pub registry: Arc<Registry>,
    pub shared: Arc<Shared>,
    /// Runs on the reactor when the lane has let go of everything.
    pub ended: Box<dyn FnOnce(Ended) + Send>,
}

/// How a lane ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// The kernel said good-bye, or the disk is being stopped.
    pub orderly: bool,
    /// In words.
    pub why: String,
}

/// A connection with a channel of its own.
struct Lane {
    // The channel goes before the connection, whose memory its I/O uses.
    channel: IoChannel,
    connection: Connection,
    shared: Arc<Shared>,
    /// Blocks that the connection was told of.
    blocks: u64,
    block_shift: u32,
    incoming: Vec<Incoming>,
    done: Completions,
    /// Taken when the channel was full.
    waiting: VecDeque<IoRequest>,
    /// By request id: a flush follows.
    then_flush: Box<[bool; MAX_IN_FLIGHT]>,
    /// This lane holds up the others.
    fencing: bool,
    ended: Option<Box<dyn FnOnce(Ended) + Send>>,
    /// Since when the disk is being stopped.
    stopping: Option<Instant>,
    /// Nothing is answered any more: the kernel asks the next run.
    silent: bool,
    id: Rc<Cell<Option<PollerId>>>,
    /// Keeps the reactor's pools alive.
    _buffers: Rc<Buffers>,
}

/// Pools of a reactor, while a lane uses them.
#[derive(Default)]
struct LocalBuffers(RefCell<Weak<Buffers>>);

fn buffers(cx: &mut Turn<'_>, registry: &Registry) -> Result<Rc<Buffers>, iobuf::MapError> {
    let local = cx.local::<LocalBuffers>().unwrap_or_else(|| {
        let local = Rc::<LocalBuffers>::default();
        cx.set_local(local.clone());
        local
    });
    if let Some(buffers) = local.0.borrow().upgrade() {
        return Ok(buffers);
    }
    let buffers = Rc::new(Buffers::new(registry)?);
    *local.0.borrow_mut() = Rc::downgrade(&buffers);
    Ok(buffers)
}

/// Starts a lane on this reactor.
///
/// # Errors
/// In words; `parts.ended` does not run then.
pub(super) fn start(cx: &mut Turn<'_>, parts: Parts) -> Result<(), String> {
    let buffers = buffers(cx, &parts.registry).map_err(|e| e.to_string())?;
    let channel = parts.descriptor.channel().map_err(|e| e.to_string())?;
    let connection = Connection::new(parts.socket, parts.export, Buffers::clone(&buffers))
        .map_err(|e| format!("no descriptors for a connection: {e}"))?;
    let fds = [Some(connection.wait_fd()), channel.wait_fd()];
    for fd in fds.into_iter().flatten() {
        cx.watch(fd).map_err(|e| format!("cannot watch a connection: {e}"))?;
    }
    let name = format!("nbd_{}", channel.info().name);
    let id = Rc::<Cell<Option<PollerId>>>::default();
    let lane = Lane {
        blocks: parts.export.size / u64::from(parts.export.block_size),
        block_shift: parts.export.block_size.trailing_zeros(),
        channel,
        connection,
        shared: parts.shared,
        incoming: Vec::with_capacity(MAX_IN_FLIGHT),
        done: Completions::with_capacity(MAX_IN_FLIGHT),
        waiting: VecDeque::with_capacity(MAX_IN_FLIGHT),
        then_flush: Box::new([false; MAX_IN_FLIGHT]),
        fencing: false,
        ended: Some(parts.ended),
        stopping: None,
        silent: false,
        id: id.clone(),
        _buffers: buffers,
    };
    id.set(Some(cx.add_poller(&name, Box::new(lane))));
    Ok(())
}

impl Lane {
    /// Takes requests and gives them to the bdev.
    fn take(&mut self) -> bool {
        if self.shared.stop.load(Ordering::Acquire) {
            self.connection.stop_receiving();
        }
        if self.connection.end().is_some() || self.is_fenced() {
            return false;
        }
        self.follow_resize();
        let mut incoming = std::mem::take(&mut self.incoming);
        let busy = self.connection.receive(&mut incoming);
        for mut request in incoming.drain(..) {
            let id = request.id;
            self.then_flush[id.0 as usize] = request.request.command() == (Command::Trim { fua: true });
            match bridge::io_request(&mut request, self.block_shift) {
                Some(io) => self.submit(io),
                None => self.connection.reply(id, Ok(())),
            }
        }
        self.incoming = incoming;
        busy
    }

    /// Another connection's stale requests are still on their way.
    fn is_fenced(&self) -> bool {
        self.shared.fence.load(Ordering::Acquire) > usize::from(self.fencing)
    }

    fn follow_resize(&mut self) {
        let blocks = self.channel.blocks();
        if blocks != self.blocks {
            self.blocks = blocks;
            self.connection.resize(blocks << self.block_shift);
        }
    }

    /// Submits, or keeps the request for later if the channel is full.
    fn submit(&mut self, request: IoRequest) {
        if !self.waiting.is_empty() {
            return self.waiting.push_back(request);
        }
        match self.channel.submit(request) {
            Ok(()) => {}
            // With nothing in flight no completion would bring it back.
            Err(r) if r.status == Status::Busy && self.channel.inflight() > 0 => {
                self.waiting.push_front(r.request);
            }
            Err(r) => self.finished(r.request.cookie, r.status),
        }
    }

    /// After completions there is room for what waited.
    fn resubmit(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        while let Some(request) = waiting.pop_front() {
            self.submit(request);
            if let Some(again) = self.waiting.pop_front() {
                waiting.push_front(again);
                break;
            }
        }
        self.waiting = waiting;
    }

    /// The bdev's turn.
    fn work(&mut self) -> bool {
        self.channel.kick();
        let mut done = std::mem::take(&mut self.done);
        self.channel.poll(&mut done);
        let any = !done.is_empty();
        for completion in done.drain(..) {
            self.finished(completion.cookie, completion.status);
        }
        self.done = done;
        if any && !self.waiting.is_empty() {
            self.resubmit();
        }
        any
    }

    fn finished(&mut self, cookie: u64, status: Status) {
        if cookie == RESET || self.silent {
            return;
        }
        if std::mem::take(&mut self.then_flush[cookie as usize]) && status == Status::Ok {
            return self.submit(bridge::flush(cookie));
        }
        if status != Status::Ok {
            tracing::debug!(bdev = self.channel.info().name, ?status, "I/O failed");
        }
        self.connection.reply(RequestId(cookie as u32), bridge::answer(status));
    }

    /// Holds up the other lanes while requests of a connection that broke off are in flight.
    fn fence(&mut self) {
        let orderly = matches!(self.connection.end(), None | Some(nbd_poll::End::Disconnect));
        let stale = !orderly && self.connection.in_flight() > 0;
        if stale != self.fencing {
            self.fencing = stale;
            if stale {
                // Nobody waits for them; those who come next do.
                self.channel.cut_short(|_| true);
                self.shared.fence.fetch_add(1, Ordering::AcqRel);
            } else {
                self.shared.fence.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Ends the lane if there is nothing left to do.
    fn end(&mut self, cx: &mut Turn<'_>) {
        if !self.connection.is_done() {
            return self.leave(cx);
        }
        let Some(end) = self.connection.end() else { return };
        let orderly = matches!(end, nbd_poll::End::Disconnect);
        let why = end.to_string();
        self.report(cx, Ended { orderly, why });
        for fd in [Some(self.connection.wait_fd()), self.channel.wait_fd()].into_iter().flatten() {
            cx.unwatch(fd);
        }
        if let Some(id) = self.id.take() {
            cx.remove_poller(id);
        }
    }

    /// Says, once, that the disk need not wait for this lane.
    fn report(&mut self, cx: &mut Turn<'_>, how: Ended) {
        // The poller is dropped after this turn, before any message of a later one.
        if let Some(ended) = self.ended.take() {
            cx.handle().clone().send(move |_| ended(how));
        }
    }

    /// The disk is stopped, and the bdev still has requests of it: it is told to end what it can, and after a while only the
    /// lane waits for it.
    fn leave(&mut self, cx: &mut Turn<'_>) {
        if self.ended.is_none() || !self.shared.stop.load(Ordering::Acquire) {
            return;
        }
        let keep = self.shared.keep.load(Ordering::Relaxed);
        match self.stopping {
            None if keep => self.stopping = Some(cx.now),
            None => {
                self.stopping = Some(cx.now);
                // Refused if the bdev is gone, which has ended them then.
                let _ = self.channel.submit(IoRequest::reset(RESET));
            }
            Some(since) if cx.now.duration_since(since) >= GRACE => {
                let (bdev, requests) = (&self.channel.info().name, self.connection.in_flight());
                if keep {
                    // What the end of the program makes of them is no answer.
                    self.silent = true;
                } else {
                    tracing::warn!(bdev, requests, "an NBD disk is stopped although requests have not ended");
                }
                self.report(cx, Ended { orderly: true, why: "the disk is stopped".into() });
            }
            Some(_) => {}
        }
    }
}

impl Poller for Lane {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        if self.id.get().is_none() {
            return Polled::Idle;
        }
        let mut busy = self.take();
        busy |= self.work();
        self.connection.send();
        self.fence();
        self.end(cx);
        busy.into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        let fenced = self.connection.end().is_none() && self.is_fenced();
        (self.channel.ready() || (self.connection.before_sleep() && !fenced)).into()
    }

    fn deadline(&self) -> Option<Instant> {
        let fence = self.is_fenced().then(|| Instant::now() + FENCE_RETRY);
        let grace = self.stopping.filter(|_| self.ended.is_some()).map(|since| since + GRACE);
        self.channel.deadline().into_iter().chain(fence).chain(grace).min()
    }
}

impl Drop for Lane {
    /// The reactor stops: what is in flight ends before its memory goes (the channel's own drop waits for the device).
    fn drop(&mut self) {
        if self.fencing {
            self.shared.fence.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
