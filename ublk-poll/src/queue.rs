//! The requests of one queue, on one reactor.
//!
//! Per turn: [`Queue::poll`], [`Queue::complete`] for what has ended, [`Queue::kick`] once. Nothing is allocated after
//! [`Queue::new`], and the core never waits: copies of data run inside the one io_uring_enter of a turn, because the char
//! device is open with O_NONBLOCK.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use iobuf::{Buffer, Pool, Registry};
use libublk_rs_sys as sys;
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::abi::{self, IoCmd};
use crate::chardev::{CharDevice, Descriptors};
use crate::request::{self, Bounds, Op, Request};
use crate::tag::{Buffers, State, Tag};

/// What a queue is made with: what the kernel granted ([`crate::DevInfo`]) and was told ([`crate::Geometry`]).
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// Number of the queue.
    pub queue: u16,
    /// Tags.
    pub depth: u16,
    /// Largest read or write, bytes, whole pages.
    pub max_io: u32,
    /// The device has user copy.
    pub user_copy: bool,
    /// Logical block, bytes.
    pub block_size: u32,
    /// Size of the device, 512-byte units.
    pub sectors: u64,
}

/// Counts of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Requests taken.
    pub requests: u64,
    /// Requests that waited for a buffer.
    pub waited: u64,
    /// Descriptors that made no sense.
    pub bad: u64,
}

/// One queue of a device. `!Send`: the driver demands that all commands of a queue come from one thread.
pub struct Queue {
    // Field order is drop order: the ring before the buffers that its entries point to.
    ring: IoUring,
    tags: Vec<Tag>,
    buffers: Buffers,
    /// Tags in state `Waiting`, oldest first.
    waiting: VecDeque<u16>,
    /// Requests for the next `poll` to hand out.
    ready: Vec<Request>,
    descriptors: Descriptors,
    device: Arc<CharDevice>,
    options: QueueOptions,
    bounds: Bounds,
    dead: usize,
    /// Of requests that were answered while their owner still had them.
    lent: Vec<Buffer>,
    /// Tags in state `CopyIn` or `CopyOut`.
    copying: usize,
    unsent: bool,
    fault: Option<Errno>,
    stats: QueueStats,
}

/// The registered char device.
const DEVICE: types::Fixed = types::Fixed(0);

impl Queue {
    /// Sets the queue up and fetches every tag; use and drop it on this thread.
    ///
    /// # Errors
    /// What failed, in words: memory, io_uring, or the driver's refusal.
    pub fn new(device: Arc<CharDevice>, registry: &Registry, options: QueueOptions) -> Result<Self, String> {
        let QueueOptions { queue, depth, max_io, user_copy, .. } = options;
        let id = device.id();
        let descriptors = Descriptors::map(&device, queue, depth)
            .map_err(|e| format!("cannot map the descriptors of queue {queue} of /dev/ublkc{id}: {e}"))?;
        let ring = crate::ring::build(u32::from(depth)).map_err(|e| crate::ring::explain(&e))?;
        ring.submitter().register_files(&[device.as_raw_fd()]).map_err(|e| crate::ring::explain(&e))?;
        let buffers = Buffers::new(registry, depth, max_io, user_copy).map_err(|e| e.to_string())?;
        let mut this = Self {
            ring,
            tags: (0..depth).map(Tag::new).collect(),
            buffers,
            waiting: VecDeque::with_capacity(depth.into()),
            ready: Vec::with_capacity(depth.into()),
            descriptors,
            device,
            options,
            bounds: Bounds {
                block_mask: u64::from(options.block_size >> 9).max(1) - 1,
                sectors: options.sectors,
                max_sectors: max_io >> 9,
            },
            dead: 0,
            lent: Vec::new(),
            copying: 0,
            unsent: false,
            fault: None,
            stats: QueueStats::default(),
        };
        this.fetch_all();
        match this.fault {
            // Refused FETCHes end at once.
            Some(errno) => Err(format!("/dev/ublkc{id} does not take requests for queue {queue}: {errno}")),
            None => Ok(this),
        }
    }

    fn fetch_all(&mut self) {
        for tag in 0..self.options.depth {
            if !self.options.user_copy {
                self.tags[usize::from(tag)].buffer = self.buffers.take(self.options.max_io);
            }
            self.command(tag, sys::UBLK_U_IO_FETCH_REQ, 0);
        }
        self.send();
        self.drain();
    }

    /// Appends requests that have come; true if there was any work. Never blocks.
    pub fn poll(&mut self, requests: &mut Vec<Request>) -> bool {
        let work = self.unsent || self.ring.submission().taskrun();
        if work {
            self.send();
        }
        let any = self.drain();
        requests.append(&mut self.ready);
        any
    }

    /// Answers a request that [`Queue::poll`] handed out.
    ///
    /// `result`: success of the whole request, or how it failed. Its memory is the queue's again.
    pub fn complete(&mut self, tag: u16, result: Result<(), Errno>) {
        let Some(t) = self.tags.get_mut(usize::from(tag)).filter(|t| t.state == State::Owner) else {
            // Each request is handed out once, so this is a fault of the caller; the driver would refuse it too.
            debug_assert!(false, "tag {tag} was not handed out");
            return;
        };
        match result {
            Ok(()) if t.request.op == Op::Read && self.options.user_copy => {
                t.copied = 0;
                t.state = State::CopyOut;
                self.copying += 1;
                self.copy(tag);
            }
            Ok(()) => {
                let bytes = t.bytes() as i32;
                self.commit(tag, bytes);
            }
            Err(errno) => self.commit(tag, -errno.raw_os_error()),
        }
    }

    /// Answers what the owner has, and what waits for memory, with EIO. The owner may still use its memory, which
    /// [`Queue::lent`] gives away, and calls [`Queue::complete`] for none of it; it will do nothing for later requests but
    /// answer them.
    pub fn abandon(&mut self) {
        let scratch = (!self.options.user_copy)
            .then(|| {
                Pool::new(&Registry::default(), self.options.depth.into(), self.options.max_io as usize).ok()
            })
            .flatten();
        self.waiting.clear();
        for tag in 0..self.options.depth {
            let t = &mut self.tags[usize::from(tag)];
            match t.state {
                State::Owner => {
                    self.lent.extend(t.buffer.take());
                    // Without user copy the kernel would write the next request's data into the old one's buffer. With no
                    // memory left the driver refuses the tag, which is as good now.
                    t.buffer = scratch.as_ref().and_then(Pool::take);
                }
                State::Waiting => {}
                State::Kernel | State::CopyIn | State::CopyOut | State::Dead => continue,
            }
            self.commit(tag, -Errno::IO.raw_os_error());
        }
    }

    /// Memory of requests that were answered while their owner still had them: to be kept until the owner is done.
    pub fn lent(&mut self) -> Vec<Buffer> {
        std::mem::take(&mut self.lent)
    }

    /// Hands answers and copies to the kernel: one io_uring_enter. Once per turn.
    pub fn kick(&mut self) {
        if self.unsent {
            self.send();
        }
    }

    /// Requests may reach up to `sectors`, 512-byte units, from now on. They may always reach where they could before: a
    /// kernel that does not know of a smaller size yet sends them, and the owner refuses them.
    pub fn resized(&mut self, sectors: u64) {
        self.bounds.sectors = self.bounds.sectors.max(sectors);
    }

    /// Readable while the kernel has something for this queue.
    pub fn wait_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// True while there is work for the next turn, so the core must not sleep.
    pub fn ready(&mut self) -> bool {
        self.unsent
            || !self.ready.is_empty()
            || self.ring.submission().taskrun()
            || !self.ring.completion().is_empty()
    }

    /// Every tag has ended: the device is stopped, and the queue may be dropped.
    pub fn is_over(&self) -> bool {
        self.dead == self.tags.len()
    }

    /// Requests that the owner has or that are being copied.
    pub fn inflight(&self) -> usize {
        self.tags.iter().filter(|t| !matches!(t.state, State::Kernel | State::Dead)).count()
    }

    /// How the driver refused a command, if it did. The tag is lost then.
    pub fn fault(&self) -> Option<Errno> {
        self.fault
    }

    /// Counts so far.
    pub fn stats(&self) -> QueueStats {
        self.stats
    }

    fn drain(&mut self) -> bool {
        let mut any = false;
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            any = true;
            let (tag, result) = (entry.user_data() as u16, entry.result());
            // The number is ours, given with an entry; its range is checked all the same.
            match self.tags.get(usize::from(tag)).map(|t| t.state) {
                Some(State::Kernel) => self.command_ended(tag, result),
                Some(State::CopyIn | State::CopyOut) => self.copy_ended(tag, result),
                state => tracing::error!(tag, ?state, "a completion for nothing in flight"),
            }
        }
        any
    }

    /// FETCH or COMMIT_AND_FETCH ended: a request, or the end of the tag.
    fn command_ended(&mut self, tag: u16, result: i32) {
        if result != sys::UBLK_IO_RES_OK as i32 {
            return self.tag_lost(tag, result);
        }
        self.stats.requests += 1;
        let desc = self.descriptors.read(tag);
        match request::parse(tag, &desc, &self.bounds) {
            Ok(request) => {
                self.tags[usize::from(tag)].request = request;
                self.begin(tag);
            }
            Err(reason) => {
                self.stats.bad += 1;
                tracing::error!(device = self.device.id(), tag, %reason, "bad request from the ublk driver");
                self.commit(tag, -Errno::IO.raw_os_error());
            }
        }
    }

    #[cold]
    fn tag_lost(&mut self, tag: u16, result: i32) {
        self.tags[usize::from(tag)].state = State::Dead;
        self.dead += 1;
        if result != sys::UBLK_IO_RES_ABORT {
            let errno = if result < 0 { Errno::from_raw_os_error(-result) } else { Errno::PROTO };
            let (device, queue) = (self.device.id(), self.options.queue);
            tracing::error!(device, queue, tag, error = %errno, "the ublk driver refused a command");
            self.fault.get_or_insert(errno);
        }
    }

    /// Finds a buffer for the request, or lets it wait for one.
    fn begin(&mut self, tag: u16) {
        let t = &mut self.tags[usize::from(tag)];
        if self.options.user_copy && t.request.op.has_data() {
            t.buffer = self.buffers.take(t.bytes());
            if t.buffer.is_none() {
                t.state = State::Waiting;
                self.stats.waited += 1;
                return self.waiting.push_back(tag);
            }
        }
        self.start(tag);
    }

    /// The request has its buffer.
    fn start(&mut self, tag: u16) {
        let t = &mut self.tags[usize::from(tag)];
        if t.request.op == Op::Write && self.options.user_copy {
            t.copied = 0;
            t.state = State::CopyIn;
            self.copying += 1;
            return self.copy(tag);
        }
        self.hand_out(tag);
    }

    fn hand_out(&mut self, tag: u16) {
        let t = &mut self.tags[usize::from(tag)];
        t.state = State::Owner;
        let data = if t.request.op.has_data() { t.segment() } else { None };
        self.ready.push(Request { data, ..t.request });
    }

    fn copy_ended(&mut self, tag: u16, result: i32) {
        let t = &mut self.tags[usize::from(tag)];
        let reading = t.state == State::CopyOut;
        let ended = t.copy_ended(result);
        if ended == Ok(false) {
            return self.copy(tag);
        }
        self.copying -= 1;
        match ended {
            Ok(_) if reading => {
                let bytes = self.tags[usize::from(tag)].bytes() as i32;
                self.commit(tag, bytes);
            }
            Ok(_) => self.hand_out(tag),
            Err(errno) => {
                let (device, queue) = (self.device.id(), self.options.queue);
                tracing::error!(device, queue, tag, error = %errno, "cannot copy data of a ublk request");
                self.commit(tag, -Errno::IO.raw_os_error());
            }
        }
    }

    /// Queues the copy of what is left.
    fn copy(&mut self, tag: u16) {
        let t = &self.tags[usize::from(tag)];
        let (addr, len) = t.rest();
        let position = abi::data_position(self.options.queue, tag) + u64::from(t.copied);
        // Plain addresses: the driver refuses registered buffers here (`user_backed_iter` in ublk_drv.c).
        let entry = match t.state {
            State::CopyIn => opcode::Read::new(DEVICE, addr, len).offset(position).build(),
            _ => opcode::Write::new(DEVICE, addr, len).offset(position).build(),
        };
        self.push(tag, entry);
    }

    /// Answers the request and asks for the tag's next one.
    fn commit(&mut self, tag: u16, result: i32) {
        let t = &mut self.tags[usize::from(tag)];
        t.state = State::Kernel;
        if self.options.user_copy {
            t.buffer = None;
        }
        self.command(tag, sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, result);
        self.serve_waiting();
    }

    /// Gives freed buffers to those that wait longest.
    fn serve_waiting(&mut self) {
        while let Some(&tag) = self.waiting.front() {
            let t = &mut self.tags[usize::from(tag)];
            t.buffer = self.buffers.take(t.bytes());
            if t.buffer.is_none() {
                return;
            }
            self.waiting.pop_front();
            self.start(tag);
        }
    }

    fn command(&mut self, tag: u16, code: u32, result: i32) {
        let addr = self.tags[usize::from(tag)].address();
        let command = IoCmd { q_id: self.options.queue, tag, result, addr };
        let mut bytes = [0; 16];
        bytes.copy_from_slice(command.as_bytes());
        self.push(tag, opcode::UringCmd16::new(DEVICE, code).cmd(bytes).build());
    }

    fn push(&mut self, tag: u16, entry: squeue::Entry) {
        let entry = entry.user_data(u64::from(tag));
        self.unsent = true;
        loop {
            // SAFETY: an entry points to nothing but the tag's buffer, which stays in the tag until the completion;
            // `Drop` waits for copies, and leaks buffers that a FETCH still names.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // One entry per tag at most, so the queue can only be full of entries that a failing `send` left.
            self.send();
            std::thread::yield_now();
        }
    }

    fn send(&mut self) {
        match self.ring.submit() {
            Ok(_) => self.unsent = !self.ring.submission().is_empty(),
            // The kernel is short of memory: again at the next poll.
            Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::INTR | Errno::AGAIN | Errno::BUSY)) => {}
            Err(e) => {
                tracing::error!(device = self.device.id(), error = %e, "io_uring_enter of a ublk queue failed");
            }
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // Copies run in the kernel only where it moved them to a worker thread; their memory must outlive them.
        while self.copying > 0 {
            let _ = self.ring.submit_and_wait(1);
            while let Some(entry) = self.ring.completion().next() {
                let t = self.tags.get(usize::from(entry.user_data() as u16));
                let copy = t.is_some_and(|t| matches!(t.state, State::CopyIn | State::CopyOut));
                self.copying -= usize::from(copy);
            }
        }
        if !self.is_over() {
            // The device is not stopped: the program leaves it to the kernel, for another run. FETCHes end some time after
            // the ring is closed, and the driver copies into their buffers until then. They use the registered file, for
            // whose end `unregister_files` would wait.
            if !self.options.user_copy {
                self.tags.iter_mut().for_each(|t| std::mem::forget(t.buffer.take()));
            }
            return;
        }
        // Closing a ring lets go of its files some time later; DEL_DEV waits for that.
        let _ = self.ring.submitter().unregister_files();
    }
}
