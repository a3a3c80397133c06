//! RNBD on one reactor: I/O messages to bdev requests, completions to replies.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bdev::{Completions, Flags, IoChannel, IoRequest, Op, Segments, Status};
use iobuf::Segment;
use reactor::{Handle, Polled, Turn};
use rnbd_proto::device::DevGeometry;
use rnbd_proto::errno::Errno;
use rnbd_proto::io::{Data, IoOp, IoReq};
use rnbd_proto::session::DeviceId;
use rnbd_proto::wire::{MSG_IO_V1_LEN, MsgIo, msg_type};
use rtrs_poll::{Incoming, Io, Lane, ReqId, Upper};
use rtrs_proto::request::Direction;
use zerocopy::{FromZeros, IntoBytes};

use super::control::{Admin, Control};
use super::geometry::{errno, geometry};
use super::shared::{DeviceKey, Shared};

/// The upper layer of an RTRS lane.
pub struct RnbdLane {
    control: Handle,
    shared: Arc<Shared>,
    /// By session key, then by [`DeviceId::index`]: place in `devices`.
    sessions: Vec<Vec<Option<(DeviceId, u32)>>>,
    devices: Vec<Option<Device>>,
    /// Places of devices with requests in flight; only these are polled.
    active: Vec<u32>,
    /// By [`ReqId`].
    requests: Vec<InFlight>,
    done: Completions,
}

struct Device {
    key: DeviceKey,
    channel: IoChannel,
    read_only: bool,
    geometry: DevGeometry,
    block_shift: u32,
    /// Blocks that `geometry` was made for.
    blocks: u64,
    inflight: u32,
    /// Taken when the channel was full.
    waiting: VecDeque<IoRequest>,
    /// Run when nothing is in flight any more; new I/O is refused meanwhile.
    closing: Option<Closed>,
}

/// Tells the control thread that a reactor let go of a device.
type Closed = Box<dyn FnOnce() + Send>;

#[derive(Clone, Default)]
struct InFlight {
    device: u32,
    /// What follows the flush of a request with PREFLUSH.
    then: Option<Box<IoRequest>>,
}

impl RnbdLane {
    /// A lane that asks `control` and finds devices in `shared`.
    pub fn new(control: Handle, shared: Arc<Shared>) -> Self {
        Self {
            control,
            shared,
            sessions: Vec::new(),
            devices: Vec::new(),
            active: Vec::new(),
            requests: Vec::new(),
            done: Vec::with_capacity(256),
        }
    }

    fn io(&mut self, cx: &mut Turn<'_>, io: &mut Io, incoming: &Incoming<'_>) -> Result<(), Errno> {
        let msg = parse_io(incoming.usr).ok_or(Errno::EINVAL)?;
        let id = DeviceId::from_wire(msg.device_id.get());
        let place = self.find(cx, (incoming.session, id)).ok_or(Errno::ENOTCONN)?;
        let device = self.devices[place as usize].as_mut().ok_or(Errno::ENOTCONN)?;
        if device.closing.is_some() {
            return Err(Errno::ENOTCONN);
        }
        device.follow_resize();
        let checked = IoReq::check(&msg, &device.geometry, data_of(incoming)).map_err(|bad| {
            tracing::debug!(bdev = device.channel.info().name, %bad, "I/O refused");
            bad.errno()
        })?;
        let request = device.request(&checked, incoming.data, incoming.req)?;
        self.submit(place, request, checked.preflush() && checked.op() != IoOp::Flush, io);
        Ok(())
    }

    /// Hands a request to its device; `flush_first` puts a flush before it.
    fn submit(&mut self, place: u32, request: IoRequest, flush_first: bool, io: &mut Io) {
        let req = ReqId(request.cookie as u32);
        if self.requests.len() <= req.0 as usize {
            self.requests.resize(req.0 as usize + 1, InFlight::default());
        }
        let (request, then) = if flush_first {
            let flush = bare(Op::Flush, request.cookie);
            (flush, Some(Box::new(request)))
        } else {
            (request, None)
        };
        self.requests[req.0 as usize] = InFlight { device: place, then };
        let Some(device) = self.devices[place as usize].as_mut() else { return };
        if device.inflight == 0 {
            self.active.push(place);
        }
        device.inflight += 1;
        if let Err((req, status)) = device.submit(request) {
            self.finished(req, status, io);
        }
    }

    /// The place of a device, opened on this reactor at first use.
    fn find(&mut self, cx: &mut Turn<'_>, key: DeviceKey) -> Option<u32> {
        let (session, id) = key;
        let known = self.sessions.get(session as usize).and_then(|s| s.get(id.index())?.as_ref());
        match known {
            Some((known, place)) if *known == id => Some(*place),
            _ => self.open(cx, key),
        }
    }

    fn open(&mut self, cx: &mut Turn<'_>, key: DeviceKey) -> Option<u32> {
        let found = self.shared.find(key)?;
        let channel = found.descriptor.channel().map_err(|e| tracing::error!("{e}")).ok()?;
        if let Some(fd) = channel.wait_fd() {
            cx.watch(fd).map_err(|e| tracing::error!("cannot watch an I/O channel: {e}")).ok()?;
        }
        let blocks = found.descriptor.blocks();
        let info = found.descriptor.info();
        let device = Device {
            key,
            geometry: geometry(info, blocks, found.read_only).ok()?,
            read_only: found.read_only,
            block_shift: info.block_size.trailing_zeros(),
            blocks,
            channel,
            inflight: 0,
            waiting: VecDeque::new(),
            closing: None,
        };
        let place = self.devices.iter().position(Option::is_none).unwrap_or(self.devices.len());
        if place == self.devices.len() {
            self.devices.push(None);
        }
        self.devices[place] = Some(device);
        self.active.reserve(self.devices.len());
        self.enter(key, place as u32);
        Some(place as u32)
    }

    fn enter(&mut self, (session, id): DeviceKey, place: u32) {
        if self.sessions.len() <= session as usize {
            self.sessions.resize_with(session as usize + 1, Vec::new);
        }
        let table = &mut self.sessions[session as usize];
        if table.len() <= id.index() {
            table.resize(id.index() + 1, None);
        }
        table[id.index()] = Some((id, place));
    }

    /// Control: let go of a device; `closed` runs once its I/O is done.
    pub(super) fn close_device(&mut self, cx: &mut Turn<'_>, key: DeviceKey, closed: Closed) {
        let (session, id) = key;
        let entry = self.sessions.get_mut(session as usize).and_then(|s| s.get_mut(id.index()));
        if let Some(entry) = entry.filter(|e| e.is_some_and(|(known, _)| known == id)) {
            *entry = None;
        }
        // By key, not by that table: its place may have gone to a later device already.
        let is_it = |d: &Option<Device>| d.as_ref().is_some_and(|d| d.key == key && d.closing.is_none());
        let Some(place) = self.devices.iter().position(is_it) else { return closed() };
        if let Some(device) = &mut self.devices[place] {
            device.closing = Some(closed);
            device.channel.cut_short(|_| true);
        }
        self.let_go(cx, place as u32);
    }

    /// Drops a closing device that has nothing in flight.
    fn let_go(&mut self, cx: &mut Turn<'_>, place: u32) {
        let slot = &mut self.devices[place as usize];
        if !slot.as_ref().is_some_and(|d| d.closing.is_some() && d.inflight == 0) {
            return;
        }
        let Some(mut device) = slot.take() else { return };
        if let Some(fd) = device.channel.wait_fd() {
            cx.unwatch(fd);
        }
        let closed = device.closing.take();
        drop(device);
        if let Some(closed) = closed {
            closed();
        }
    }

    /// Polls one device; true if anything completed.
    fn poll_device(&mut self, place: u32, io: &mut Io) -> bool {
        let Some(device) = self.devices[place as usize].as_mut() else { return false };
        device.channel.kick();
        let mut done = std::mem::take(&mut self.done);
        done.clear();
        device.channel.poll(&mut done);
        let any = !done.is_empty();
        for c in &done {
            self.finished(ReqId(c.cookie as u32), c.status, io);
        }
        self.done = done;
        if any {
            self.resubmit(place, io);
        }
        any
    }

    /// After completions there is room for what waited.
    fn resubmit(&mut self, place: u32, io: &mut Io) {
        loop {
            let Some(device) = self.devices[place as usize].as_mut() else { return };
            let Some(request) = device.waiting.pop_front() else { return };
            let before = device.waiting.len();
            if let Err((req, status)) = device.submit_again(request) {
                self.finished(req, status, io);
            } else if self.devices[place as usize].as_ref().is_some_and(|d| d.waiting.len() > before) {
                return;
            }
        }
    }

    /// A bdev request ended: go on with what it preceded, or answer the client.
    fn finished(&mut self, req: ReqId, status: Status, io: &mut Io) {
        let entry = &mut self.requests[req.0 as usize];
        let place = entry.device;
        let then = entry.then.take().filter(|_| status == Status::Ok);
        let Some(device) = self.devices[place as usize].as_mut() else { return };
        if let Some(next) = then {
            match device.submit(*next) {
                Ok(()) => return,
                Err((req, status)) => return self.finished(req, status, io),
            }
        }
        device.inflight -= 1;
        if status != Status::Ok {
            tracing::debug!(bdev = device.channel.info().name, ?status, "I/O failed");
        }
        io.reply(req, errno(status));
    }

    fn admin(&mut self, io: &mut Io, cx: &Turn<'_>, incoming: &Incoming<'_>) {
        let req = incoming.req;
        let Some(path) = io.path(req) else { return };
        let (session, peer) = (path.session.clone(), path.peer.ip());
        let (reactor, usr) = (cx.handle().clone(), incoming.usr.to_vec());
        let answer = move |answer: Result<Vec<u8>, Errno>| {
            Lane::<Self>::with_upper(&reactor, move |_, _, io| match answer {
                Ok(message) if message.is_empty() => io.reply(req, Ok(())),
                Ok(message) => io.reply_message(req, &message),
                Err(errno) => io.reply(req, Err(errno)),
            });
        };
        let room = data_of(incoming);
        Control::send(&self.control, move |control, cx| {
            control.admin(cx, Admin { session, peer, usr, room, answer: Box::new(answer) });
        });
    }
}

impl Upper for RnbdLane {
    fn request(&mut self, cx: &mut Turn<'_>, io: &mut Io, incoming: Incoming<'_>) {
        let kind = incoming.usr.first_chunk::<2>().map(|b| u16::from_le_bytes(*b));
        match kind {
            Some(msg_type::IO) => {
                if let Err(errno) = self.io(cx, io, &incoming) {
                    io.reply(incoming.req, Err(errno));
                }
            }
            Some(msg_type::SESS_INFO | msg_type::OPEN | msg_type::CLOSE) => self.admin(io, cx, &incoming),
            _ => {
                tracing::debug!(?kind, len = incoming.usr.len(), "unknown RNBD message");
                io.reply(incoming.req, Err(Errno::EINVAL));
            }
        }
    }

    fn poll(&mut self, cx: &mut Turn<'_>, io: &mut Io) -> bool {
        let mut busy = false;
        let mut i = 0;
        while i < self.active.len() {
            let place = self.active[i];
            busy |= self.poll_device(place, io);
            if self.devices[place as usize].as_ref().is_some_and(|d| d.inflight > 0) {
                i += 1;
                continue;
            }
            self.active.swap_remove(i);
            self.let_go(cx, place);
        }
        busy
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        let ready = |p: &u32| self.devices[*p as usize].as_ref().is_some_and(|d| d.channel.ready());
        self.active.iter().any(ready).into()
    }

    fn deadline(&self) -> Option<Instant> {
        self.active.iter().filter_map(|p| self.devices[*p as usize].as_ref()?.channel.deadline()).min()
    }
}

impl Device {
    /// Keeps `geometry` in step with the bdev's size.
    fn follow_resize(&mut self) {
        let blocks = self.channel.blocks();
        if blocks == self.blocks {
            return;
        }
        if let Ok(g) = geometry(self.channel.info(), blocks, self.read_only) {
            self.geometry = g;
            self.blocks = blocks;
        }
    }

    fn request(&self, io: &IoReq, data: Option<Segment>, req: ReqId) -> Result<IoRequest, Errno> {
        let mut flags = Flags::NONE;
        let op = match io.op() {
            IoOp::Read => Op::Read,
            IoOp::Write => Op::Write,
            IoOp::Flush => return Ok(bare(Op::Flush, req.0.into())),
            IoOp::Discard => Op::Discard,
            IoOp::SecureErase => Op::SecureErase,
            IoOp::WriteZeroes => Op::WriteZeroes,
        };
        if io.fua() && matches!(op, Op::Write | Op::WriteZeroes) {
            flags = flags | Flags::FUA;
        }
        if io.no_unmap() && op == Op::WriteZeroes {
            flags = flags | Flags::NO_UNMAP;
        }
        let mut segments = Segments::new();
        if op.has_data() {
            let segment = data.filter(|s| s.len >= io.len()).ok_or(Errno::EINVAL)?;
            segments.push(Segment { len: io.len(), ..segment });
        }
        Ok(IoRequest {
            op,
            flags,
            lba: io.offset() >> self.block_shift,
            blocks: u64::from(io.len()) >> self.block_shift,
            segments,
            cookie: req.0.into(),
        })
    }

    /// Submits, or keeps the request for later if the channel is full.
    fn submit(&mut self, request: IoRequest) -> Result<(), (ReqId, Status)> {
        if !self.waiting.is_empty() {
            self.waiting.push_back(request);
            return Ok(());
        }
        self.submit_again(request)
    }

    /// As `submit`, for the one at the head of the queue.
    fn submit_again(&mut self, request: IoRequest) -> Result<(), (ReqId, Status)> {
        match self.channel.submit(request) {
            Ok(()) => Ok(()),
            // With nothing in flight no completion would bring it back.
            Err(r) if r.status == Status::Busy && self.channel.inflight() > 0 => {
                self.waiting.push_front(r.request);
                Ok(())
            }
            Err(r) => Err((ReqId(r.request.cookie as u32), r.status)),
        }
    }
}

fn bare(op: Op, cookie: u64) -> IoRequest {
    IoRequest { op, flags: Flags::NONE, lba: 0, blocks: 0, segments: Segments::new(), cookie }
}

/// An I/O message of either version: the first one lacks `prio` and the padding.
fn parse_io(usr: &[u8]) -> Option<MsgIo> {
    if usr.len() < MSG_IO_V1_LEN {
        return None;
    }
    let mut msg = MsgIo::new_zeroed();
    let n = usr.len().min(size_of::<MsgIo>());
    msg.as_mut_bytes()[..n].copy_from_slice(&usr[..n]);
    Some(msg)
}

fn data_of(incoming: &Incoming<'_>) -> Data {
    match (incoming.direction, incoming.data) {
        (Direction::Write, Some(s)) => Data::In(s.len),
        (Direction::Read { desc: Some(desc), .. }, _) => Data::Out(desc.len.get()),
        (Direction::Write, None) | (Direction::Read { desc: None, .. }, _) => Data::None,
    }
}
