//! One reactor's share of all mapped devices: what waits, what is under way, and what becomes of it.
//!
//! ```text
//!  submit ─▶ Device::queue ──cut──▶ Device::ready ──send──▶ in flight ──answer──▶ ChannelState::done ─▶ poll
//!                                       ▲                      │ session lost
//!                                       └──── Device::lost ◀───┘
//!                                        once it is open again
//! ```
//!
//! A request is cut into parts of what one message may carry. Everything that is not in flight waits here, in order,
//! while the device is not open at its server, so there is one place that holds, repeats, fails and aborts. Requests that
//! would overwrite what a lost path may still be writing wait in `Device::fenced`, before they are cut.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Completion, Completions, Flags, IoRequest, Op, Rejected, Segments, Status};
use iobuf::Pool;
use rnbd_proto::Errno;
use rtrs_poll::client::SessionId;

use super::data;
use super::fence::Fence;
use super::proxy::RemoteEnd;
use super::request::{ALL, Opened, Part, Request, status};
use super::slots::Slots;

/// Requests of one channel at once; more are refused with `Busy`.
pub(super) const MAX_REQUESTS: usize = 2048;
/// Parts of one request at once, so that a discard of the whole device leaves buffers to others.
const MAX_PARTS: u32 = 64;

/// What may be sent to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate<S = SessionId> {
    /// Everything.
    Open(Opened<S>),
    /// Nothing now: requests wait.
    Held {
        /// Since when.
        since: Instant,
    },
    /// Nothing: requests end so.
    Failed(Status),
}

/// A device with channels on this reactor.
#[derive(Debug)]
pub(super) struct Device<S = SessionId> {
    /// Its number in the whole process.
    pub disk: u64,
    pub block_shift: u32,
    /// How long requests wait while it is not open; `None`: until it is.
    pub fast_io_fail: Option<Duration>,
    pub gate: Gate<S>,
    /// Of the latest opening heard of.
    pub epoch: u64,
    /// Requests to be cut.
    pub queue: VecDeque<u32>,
    /// Parts to be sent.
    pub ready: VecDeque<u32>,
    /// Parts that a lost session has left unanswered.
    pub lost: VecDeque<u32>,
    /// From when those that change data may be repeated; `None`: at once.
    pub repeat_at: Option<Instant>,
    /// Ranges that must not be changed now.
    pub fence: Arc<Fence>,
    /// Requests, nothing of which was sent, that would change one.
    pub fenced: VecDeque<u32>,
    /// When to look whether one of them may go.
    pub fenced_until: Option<Instant>,
    /// There is something new in `lost`, or the device was opened.
    pub look: bool,
    pub inflight: usize,
    pub channels: u32,
    /// It is in [`Disks::active`].
    pub active: bool,
}

impl<S: Copy> Device<S> {
    pub fn new(disk: u64, block_shift: u32, fast_io_fail: Option<Duration>, gate: Gate<S>) -> Self {
        let epoch = if let Gate::Open(o) = &gate { o.epoch } else { 0 };
        Self {
            disk,
            block_shift,
            fast_io_fail,
            gate,
            epoch,
            queue: VecDeque::new(),
            ready: VecDeque::new(),
            lost: VecDeque::new(),
            repeat_at: None,
            fence: Arc::default(),
            fenced: VecDeque::new(),
            fenced_until: None,
            look: false,
            inflight: 0,
            channels: 0,
            active: false,
        }
    }

    /// When waiting ends, if it does.
    pub fn fail_at(&self) -> Option<Instant> {
        match (&self.gate, self.fast_io_fail) {
            (Gate::Held { since }, Some(patience)) => Some(*since + patience),
            _ => None,
        }
    }
}

/// One channel's requests.
#[derive(Debug)]
pub(super) struct ChannelState {
    pub device: u32,
    pub requests: usize,
    pub done: Completions,
    /// Where completions go, for a channel of another thread.
    pub remote: Option<RemoteEnd>,
    /// Its user is gone; it lives until its requests have ended.
    pub closed: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Disks<S = SessionId> {
    pub(super) devices: Slots<Device<S>>,
    pub(super) channels: Slots<ChannelState>,
    pub(super) requests: Slots<Request>,
    pub(super) parts: Slots<Part>,
    /// Devices that are open and have something to send.
    pub(super) active: VecDeque<u32>,
    /// Made with the first channel.
    pub(super) pool: Option<Pool>,
    /// Remote channels with completions to announce.
    pub(super) announce: Vec<u32>,
    /// Something met a full session with nothing in flight to wait for.
    pub(super) retry_at: Option<Instant>,
    /// Devices whose server did not know them, for the control thread: number and epoch.
    pub(super) unknown: Vec<(u64, u64)>,
    /// For the pieces of one part.
    pub(super) scratch: Segments,
    /// Whatever memory a request has can be sent from and read into.
    pub(super) any_memory: bool,
    /// Zeroing can keep the space allocated ([`Flags::NO_UNMAP`]).
    pub(super) keeps_space: bool,
}

impl<S> Default for Disks<S> {
    fn default() -> Self {
        Self {
            devices: Slots::default(),
            channels: Slots::default(),
            requests: Slots::default(),
            parts: Slots::default(),
            active: VecDeque::new(),
            pool: None,
            announce: Vec::new(),
            retry_at: None,
            unknown: Vec::new(),
            scratch: Segments::new(),
            any_memory: false,
            keeps_space: false,
        }
    }
}

impl<S: Copy + Eq> Disks<S> {
    /// The device of disk `disk`.
    pub fn find(&self, disk: u64) -> Option<u32> {
        self.devices.iter().find(|(_, d)| d.disk == disk).map(|(i, _)| i)
    }

    /// A channel to `device`, which must be there.
    pub fn open_channel(&mut self, device: u32, remote: Option<RemoteEnd>) -> u32 {
        if let Some(d) = self.devices.get_mut(device) {
            d.channels += 1;
        }
        let done = Vec::with_capacity(64);
        self.channels.insert(ChannelState { device, requests: 0, done, remote, closed: false })
    }

    /// The channel's user is gone: what was not sent ends now, what is in flight when it is answered.
    pub fn close_channel(&mut self, channel: u32) {
        if let Some(c) = self.channels.get_mut(channel) {
            c.closed = true;
        }
        self.end_unsent(|r| r.channel == channel, Status::Aborted);
        self.forget_channel(channel);
    }

    /// Drops a closed channel without requests, and its device with the last one.
    fn forget_channel(&mut self, channel: u32) {
        let over = |c: &ChannelState| c.closed && c.requests == 0;
        if !self.channels.get(channel).is_some_and(over) {
            return;
        }
        let Some(gone) = self.channels.remove(channel) else { return };
        if let Some(device) = self.devices.get_mut(gone.device) {
            device.channels -= 1;
            if device.channels == 0 {
                self.devices.remove(gone.device);
                self.active.retain(|d| *d != gone.device);
            }
        }
    }

    /// As [`bdev::Channel::submit`].
    #[allow(clippy::result_large_err)]
    pub fn submit(&mut self, channel: u32, r: IoRequest) -> Result<(), Rejected> {
        let refuse = |request, status| Err(Rejected { request, status });
        let Some(c) = self.channels.get_mut(channel).filter(|c| !c.closed) else {
            return refuse(r, Status::Gone);
        };
        let Some(device) = self.devices.get_mut(c.device) else { return refuse(r, Status::Gone) };
        if r.op == Op::Reset {
            return self.reset(channel, r.cookie);
        }
        if c.requests >= MAX_REQUESTS {
            return refuse(r, Status::Busy);
        }
        if let Gate::Failed(status) = device.gate {
            return refuse(r, status);
        }
        c.requests += 1;
        let request = Request {
            channel,
            cookie: r.cookie,
            device: c.device,
            op: r.op,
            flags: r.flags,
            offset: r.lba << device.block_shift,
            len: r.blocks << device.block_shift,
            segments: r.segments,
            cut: 0,
            parts: 0,
            listed: true,
            once: false,
            status: Status::Ok,
        };
        device.queue.push_back(self.requests.insert(request));
        let device = c.device;
        self.activate(device);
        Ok(())
    }

    /// Ends what waits; what is in flight ends by itself, and is not repeated.
    #[allow(clippy::result_large_err)]
    fn reset(&mut self, channel: u32, cookie: u64) -> Result<(), Rejected> {
        self.end_unsent(|r| r.channel == channel, Status::Aborted);
        if let Some(c) = self.channels.get_mut(channel) {
            c.done.push(Completion { cookie, status: Status::Ok });
            if c.remote.is_some() {
                self.announce.push(channel);
            }
        }
        Ok(())
    }

    /// Puts an open device with work on the list of [`Disks::run`].
    pub(super) fn activate(&mut self, device: u32) {
        let Some(d) = self.devices.get_mut(device) else { return };
        if matches!(d.gate, Gate::Open(_)) && !std::mem::replace(&mut d.active, true) {
            self.active.push_back(device);
        }
    }

    /// Moves completions to `done`; true if there are any.
    pub fn poll_channel(&mut self, channel: u32, done: &mut Completions) -> bool {
        let Some(c) = self.channels.get_mut(channel) else { return false };
        let any = !c.done.is_empty();
        done.append(&mut c.done);
        any
    }

    /// Completions wait for [`Disks::poll_channel`].
    pub fn has_completions(&self, channel: u32) -> bool {
        self.channels.get(channel).is_some_and(|c| !c.done.is_empty())
    }

    /// Cuts the next part of a device's queue into `ready`. False: there is none to cut.
    pub(super) fn cut(&mut self, device: u32, open: &Opened<S>, now: Instant) -> bool {
        loop {
            let Some(d) = self.devices.get_mut(device) else { return false };
            let Some(&place) = d.queue.front() else { return false };
            let Some(r) = self.requests.get_mut(place) else { return false };
            if r.cut == 0
                && d.fence.is_up()
                && r.op.modifies()
                && let Some(until) = d.fence.until(r.offset, r.len, now)
            {
                r.listed = false;
                d.queue.pop_front();
                d.fenced.push_back(place);
                d.fenced_until = Some(d.fenced_until.map_or(until, |at| at.min(until)));
                continue;
            }
            if r.parts >= MAX_PARTS {
                // It goes on when one of its parts ends.
                r.listed = false;
                d.queue.pop_front();
                continue;
            }
            let Some(len) = next_part(r, open, self.keeps_space) else {
                self.end_request_parts(place, Status::Unsupported);
                continue;
            };
            let part = Part { request: place, from: r.cut, len, bounce: None, epoch: 0 };
            r.cut += u64::from(len);
            r.parts += 1;
            if r.cut >= r.len {
                r.cut = ALL;
                r.listed = false;
                d.queue.pop_front();
            }
            d.ready.push_back(self.parts.insert(part));
            return true;
        }
    }

    /// A message was answered, or its session was lost (ECONNABORTED).
    pub fn completed(&mut self, cookie: u64, result: Result<(), Errno>) {
        let place = cookie as u32;
        let Some(part) = self.parts.get_mut(place) else { return };
        let Some(r) = self.requests.get(part.request) else { return };
        let device = r.device;
        let Some(d) = self.devices.get_mut(device) else { return };
        d.inflight -= 1;
        let outcome = match result {
            Ok(()) => take_data(part, r),
            Err(Errno::ECONNABORTED | Errno::ENOTCONN)
                if r.status == Status::Ok && !r.once && !matches!(d.gate, Gate::Failed(_)) =>
            {
                // The caller still has the data; the buffer may serve others meanwhile.
                part.bounce = None;
                if result == Err(Errno::ENOTCONN) {
                    d.ready.push_back(place);
                    self.server_lost_device(device);
                } else {
                    d.lost.push_back(place);
                    d.look = true;
                    self.activate(device);
                }
                return;
            }
            Err(errno) => status(errno),
        };
        self.part_ended(place, outcome);
    }

    /// A message has lost its way, `way`, and is about to go by another one.
    pub fn failing_over(&mut self, cookie: u64, way: u64) {
        let Some(part) = self.parts.get(cookie as u32) else { return };
        let Some(r) = self.requests.get(part.request).filter(|r| r.op.modifies()) else { return };
        if let Some(d) = self.devices.get(r.device) {
            d.fence.raise(way, r.offset + part.from, part.len.into());
        }
    }

    /// The server does not know the device (any more): nothing was done. It must be opened again.
    fn server_lost_device(&mut self, device: u32) {
        let Some(d) = self.devices.get_mut(device) else { return };
        if let Gate::Open(open) = d.gate {
            self.unknown.push((d.disk, open.epoch));
            self.hold(device, Instant::now());
        }
    }

    /// One part is over.
    pub(super) fn part_ended(&mut self, place: u32, outcome: Status) {
        let Some(part) = self.parts.remove(place) else { return };
        let Some(r) = self.requests.get_mut(part.request) else { return };
        r.parts -= 1;
        if let Some(d) = self.devices.get(r.device).filter(|d| d.fence.is_up() && r.op.modifies()) {
            d.fence.answered(r.offset + part.from, part.len.into(), Instant::now());
        }
        if outcome != Status::Ok {
            self.end_request_parts(part.request, outcome);
        } else if !r.listed && r.cut != ALL {
            // Others went ahead while it had enough parts.
            r.listed = true;
            let device = r.device;
            if let Some(d) = self.devices.get_mut(device) {
                d.queue.push_front(part.request);
            }
            self.activate(device);
        }
        self.finish_if_over(part.request);
    }

    /// Nothing more is cut from a request, which fails with `status` unless it has failed already.
    pub(super) fn end_request_parts(&mut self, request: u32, status: Status) {
        let Some(r) = self.requests.get_mut(request) else { return };
        if r.status == Status::Ok {
            r.status = status;
        }
        r.cut = ALL;
        let (listed, device) = (std::mem::take(&mut r.listed), r.device);
        if let Some(d) = self.devices.get_mut(device) {
            let list = if listed { &mut d.queue } else { &mut d.fenced };
            list.retain(|q| *q != request);
        }
        self.finish_if_over(request);
    }

    fn finish_if_over(&mut self, request: u32) {
        if !self.requests.get(request).is_some_and(Request::is_over) {
            return;
        }
        let Some(r) = self.requests.remove(request) else { return };
        let Some(c) = self.channels.get_mut(r.channel) else { return };
        c.requests -= 1;
        if c.closed {
            if let Some(remote) = &c.remote {
                remote.ended();
            }
            return self.forget_channel(r.channel);
        }
        if c.remote.is_some() && c.done.is_empty() {
            self.announce.push(r.channel);
        }
        c.done.push(Completion { cookie: r.cookie, status: r.status });
    }

    /// Ends with `status` what of the requests that `wanted` selects is not in flight. Parts in flight end when they
    /// are answered, and are not repeated.
    pub(super) fn end_unsent(&mut self, wanted: impl Fn(&Request) -> bool, status: Status) {
        let chosen: Vec<u32> = self.requests.iter().filter(|(_, r)| wanted(r)).map(|(i, _)| i).collect();
        let Self { devices, parts, .. } = self;
        let of_chosen =
            |part: &u32| parts.get(*part).is_some_and(|p| chosen.binary_search(&p.request).is_ok());
        let mut unsent = Vec::new();
        for (_, d) in devices.iter_mut() {
            for list in [&mut d.ready, &mut d.lost] {
                unsent.extend(list.iter().copied().filter(of_chosen));
                list.retain(|p| !of_chosen(p));
            }
        }
        unsent.into_iter().for_each(|part| self.part_ended(part, status));
        for request in chosen {
            match self.requests.get_mut(request) {
                Some(r) if r.cut == ALL => r.once = true,
                _ => self.end_request_parts(request, status),
            }
        }
    }
}

/// Bytes of the next part of `r`; `None` if the server does not do such a thing.
fn next_part<S>(r: &Request, open: &Opened<S>, keeps_space: bool) -> Option<u32> {
    if r.op == Op::Flush {
        return Some(0);
    }
    // Servers of RNBD 2.0 do not know such a flag, so zeroes are written instead, which `IoChannel` does.
    if r.op == Op::WriteZeroes && r.flags.has(Flags::NO_UNMAP) && !keeps_space {
        return None;
    }
    let limit = open.limits.of(r.op);
    (limit > 0).then(|| u64::from(limit).min(r.len - r.cut) as u32)
}

/// Hands out what a read has brought.
fn take_data(part: &Part, r: &Request) -> Status {
    match &part.bounce {
        Some(buffer) if r.op == Op::Read => {
            // SAFETY: the request has not completed: its part is only just ending.
            let copied = unsafe { data::drain(buffer, &r.segments, part.from, part.len) };
            if copied { Status::Ok } else { Status::IoError }
        }
        _ => Status::Ok,
    }
}

/// Whether a message of `op` with `flags` is to be on stable storage when it is answered.
pub(super) fn is_fua(op: Op, flags: Flags) -> bool {
    op == Op::Write && flags.has(Flags::FUA)
}

#[cfg(test)]
mod tests;
