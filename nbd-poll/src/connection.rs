//! The server's end of one socket in the transmission phase.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use nbd_proto::framing::Agreed;
use nbd_proto::reply::{Run, To};
use nbd_proto::request::{Command, Export, Request};
use nbd_proto::transmission::{Event, Transmission, Violation, Want};
use nbd_proto::wire::ErrorCode;

use crate::Segments;
use crate::buffers::{Buffers, Place};
use crate::listener::Socket;
use crate::outbox::Outbox;
use crate::slots::{RequestId, Slots};
use crate::staging::Staging;
use crate::stream::{Moved, Stream};
use crate::tls::pipe::Pipe;

/// Most bytes that one request may carry.
pub const MAX_PAYLOAD: u32 = nbd_proto::request::DEFAULT_MAX_PAYLOAD;

/// System calls of one [`Connection::receive`], so that one connection cannot keep the core.
const CALLS_PER_TURN: usize = 16;
/// Requests of one [`Connection::receive`].
const REQUESTS_PER_TURN: usize = 64;
/// Pieces of one read: a request's buffers and the staging behind them.
const MAX_PIECES: usize = 10;

/// Why a connection has ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client said good-bye; what is in flight is still answered.
    #[error("the client has disconnected")]
    Disconnect,
    /// The client closed the socket between two requests.
    #[error("the client has closed the connection")]
    Closed,
    /// The client closed the socket in the middle of a request.
    #[error("the client has closed the connection in the middle of a request")]
    Truncated,
    /// The client does not speak NBD.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The client has begun a request and does not go on with it.
    #[error("a request was begun, and nothing of the rest has come in time")]
    Stalled,
    /// The client reads its answers, or sends the data of a write, too slowly, and others wait for the memory.
    #[error("it goes on too slowly with a request or its answers, and others wait for their memory")]
    Slow,
    /// The socket failed, or there is no memory for a very long request.
    #[error("the connection has failed: {0}")]
    Failed(#[from] io::Error),
}

/// A request for the upper layer, which answers it once with [`Connection::reply`].
#[derive(Debug)]
pub struct Incoming {
    /// For the answer.
    pub id: RequestId,
    /// What to do.
    pub request: Request,
    /// `READ`: where the data shall go. `WRITE`: where they are. Else empty. As long as the blocks that the range lies in
    /// ([`Request::cover`]); of a `WRITE`, what is not in the range has no meaning yet. The connection keeps the memory
    /// until the answer is given, and longer.
    pub segments: Segments,
}

/// One socket with its requests. It belongs to one reactor.
///
/// Per turn: [`receive`](Self::receive), the upper layer's work, [`reply`](Self::reply) to whatever is done,
/// [`send`](Self::send). Drop it only when [`in_flight`](Self::in_flight) is 0: until then devices may use its memory.
#[derive(Debug)]
pub struct Connection {
    pipe: Pipe,
    machine: Transmission,
    staging: Staging,
    slots: Slots,
    outbox: Outbox,
    buffers: Buffers,
    /// The write whose payload is being read.
    writing: Option<RequestId>,
    /// A request for which there is no memory now.
    waiting: Option<Request>,
    /// While that is a long one.
    place: Place,
    /// Bytes of payloads that have come, ever.
    taken: u64,
    /// Requests that the upper layer has.
    in_flight: usize,
    end: Option<End>,
}

impl Connection {
    /// As [`Connection::with`], in the simple framing: the kernel's.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(socket: OwnedFd, export: Export, buffers: Buffers) -> io::Result<Self> {
        Self::with(socket.into(), export, Agreed::default(), buffers)
    }

    /// Serves `export` on `socket`, whose next byte is the first of a request. `export.max_payload` is at most
    /// [`MAX_PAYLOAD`].
    ///
    /// # Errors
    /// No descriptors left.
    pub fn with(socket: Socket, export: Export, agreed: Agreed, buffers: Buffers) -> io::Result<Self> {
        let export = Export { max_payload: export.max_payload.min(MAX_PAYLOAD), ..export };
        Ok(Self {
            pipe: match socket {
                Socket::Plain(socket) => Pipe::Plain(Stream::new(socket)?),
                Socket::Tls(tls) => Pipe::Tls(tls.0),
            },
            machine: Transmission::with(export, agreed),
            staging: Staging::new(agreed.framing.request_len()),
            slots: Slots::new(agreed.framing),
            outbox: Outbox::new(),
            place: buffers.place(),
            buffers,
            writing: None,
            waiting: None,
            taken: 0,
            in_flight: 0,
            end: None,
        })
    }

    /// Reads what has arrived, within a budget, and appends complete requests to `out`. True if anything moved.
    pub fn receive(&mut self, out: &mut Vec<Incoming>) -> bool {
        let before = out.len();
        let mut calls = 0;
        while self.digest(out) && calls < CALLS_PER_TURN && out.len() - before < REQUESTS_PER_TURN {
            match self.read(out) {
                Ok((Moved::Some(_), full)) => {
                    calls += 1;
                    // The socket had no more: asking it again would cost a system call to hear that.
                    if !full {
                        self.digest(out);
                        break;
                    }
                }
                Ok((Moved::WouldBlock, _)) => break,
                Ok((Moved::End, _)) => {
                    let between = self.staging.is_empty() && self.machine.want() == Want::Header;
                    self.finish(if between { End::Closed } else { End::Truncated });
                }
                Err(e) => self.finish(End::Failed(e)),
            }
        }
        calls > 0 || out.len() > before
    }

    /// Answers a request. The answer leaves with the next [`Connection::send`].
    pub fn reply(&mut self, id: RequestId, result: Result<(), ErrorCode>) {
        if !self.slots.answer(id, result) {
            debug_assert!(false, "an answer to no request: {id:?}");
            return;
        }
        self.answered(id);
    }

    /// Answers a `BLOCK_STATUS` request with what is at its offset; `runs` are whole blocks, and at least one. Control
    /// path: it allocates.
    pub fn reply_status(&mut self, id: RequestId, runs: &[Run]) {
        debug_assert!(!runs.is_empty());
        if self.slots.answer_status(id, runs, self.machine.export().block_size) {
            self.answered(id);
        }
    }

    fn answered(&mut self, id: RequestId) {
        self.in_flight -= 1;
        if self.answers() { self.outbox.push(id) } else { self.slots.release(id) }
    }

    /// Sends what was answered, as far as the socket takes it. Cheap when there is nothing.
    pub fn send(&mut self) {
        if self.outbox.is_empty() && !self.pipe.has_output() {
            return;
        }
        match self.outbox.send(&mut self.pipe, &mut self.slots) {
            Ok(true) => {}
            Ok(false) => self.finish(End::Closed),
            Err(e) => self.finish(End::Failed(e)),
        }
    }

    /// Why no more requests come; `None` while they do.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Requests that were handed out and not answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Ended, and nothing is left to be answered or sent.
    pub fn is_done(&self) -> bool {
        let sent = self.outbox.is_empty() && !(self.answers() && self.pipe.has_output());
        self.end.is_some() && self.in_flight == 0 && sent
    }

    /// A request has begun and the rest of it has not come: the client holds memory and may take its time.
    pub fn is_mid_request(&self) -> bool {
        let begun = self.machine.want() != Want::Header
            || !self.staging.is_empty() && self.staging.header().is_none();
        // Where it is us who do not go on, the client is waited for by nobody.
        self.end.is_none() && self.waiting.is_none() && self.slots.has_room() && begun
    }

    /// Memory waits for the client: to send the rest of a write, or to read its answers. How many bytes of either have gone,
    /// ever. `None`: none does.
    #[inline]
    pub fn keeps_waiting(&self) -> Option<u64> {
        let waits = self.writing.is_some() || self.outbox.is_blocked() && self.slots.has_data();
        waits.then(|| self.taken + self.outbox.total())
    }

    /// The client has let its time pass: `why` is [`End::Stalled`] or [`End::Slow`].
    pub fn time_out(&mut self, why: End) {
        if self.end.is_none() {
            self.finish(why);
        }
    }

    /// A request waits until others give their memory back: look again when one has been answered.
    pub fn waits_for_memory(&self) -> bool {
        self.waiting.is_some()
    }

    /// Takes no more requests; those in flight are answered.
    pub fn stop_receiving(&mut self) {
        if self.end.is_none() {
            self.finish(End::Disconnect);
        }
    }

    /// The size of the export changed, bytes.
    pub fn resize(&mut self, size: u64) {
        self.machine.resize(size);
    }

    /// For epoll: readable when there is something to do. The same for the connection's life.
    pub fn wait_fd(&self) -> RawFd {
        self.pipe.wait_fd()
    }

    /// The core is about to sleep: makes [`Connection::wait_fd`] fire for what can go on. True if something can at
    /// once. Requests that wait for memory or a free slot go on when others are answered.
    pub fn before_sleep(&mut self) -> bool {
        let open = self.end.is_none() && self.waiting.is_none() && self.slots.has_room();
        self.pipe.want(open, self.outbox.is_blocked() || self.pipe.has_output());
        // What TLS has decrypted shows in no socket.
        let decrypted = open && self.pipe.has_input();
        let staged = !self.staging.is_empty() && self.machine.want() != Want::Header;
        let sendable = !self.outbox.is_empty() && !self.outbox.is_blocked();
        // Answers that left meanwhile may have given back what a request waits for.
        let admissible = self.waiting.is_some_and(|request| self.has_memory_for(&request));
        decrypted || admissible || sendable || (open && (staged || self.staging.header().is_some()))
    }

    /// [`Connection::wait_fd`] need not fire until the next [`Connection::before_sleep`]: the connection is asked anyway.
    /// Saves its peer the notification with every message.
    pub fn unwatch(&mut self) {
        self.pipe.want(false, false);
    }

    /// Answers still reach the client.
    fn answers(&self) -> bool {
        matches!(self.end, None | Some(End::Disconnect))
    }

    /// Works off what is staged. True if more may be read now.
    fn digest(&mut self, out: &mut Vec<Incoming>) -> bool {
        let before = out.len();
        loop {
            if self.end.is_some() || !self.admit_waiting(out) || out.len() - before >= REQUESTS_PER_TURN {
                return false;
            }
            match self.machine.want() {
                Want::Nothing => return false,
                Want::Header => {
                    let Some(header) = self.staging.header() else { return true };
                    if !self.slots.has_room() {
                        return false;
                    }
                    let result = self.machine.header(header);
                    self.staging.consume(self.machine.header_len());
                    match result {
                        Ok(Some(event)) => self.event(event, out),
                        Ok(None) => self.staging.follow(u32::MAX),
                        Err(violation) => self.finish(End::Violation(violation)),
                    }
                }
                Want::Parameters { left } => {
                    let staged = self.staging.peek(left as usize);
                    if staged.is_empty() {
                        return true;
                    }
                    let (n, event) = (staged.len(), self.machine.parameters(staged));
                    self.staging.consume(n);
                    if let Some(event) = event {
                        self.event(event, out);
                    }
                }
                Want::Payload { left } | Want::Discard { left } => {
                    if self.staging.is_empty() {
                        return true;
                    }
                    let n = self.take_staged(left);
                    if let Some(event) = self.machine.payload(n) {
                        self.event(event, out);
                    }
                }
            }
        }
    }

    /// Moves staged bytes to where the payload belongs; returns how many.
    fn take_staged(&mut self, left: u32) -> u32 {
        let pieces = self.payload_pieces();
        let staged = self.staging.peek(left as usize);
        let (n, mut rest) = (staged.len(), staged);
        for piece in &pieces {
            let (now, later) = rest.split_at(rest.len().min(piece.iov_len));
            // SAFETY: the piece lies in the memory of the write's slot, which nobody else uses before the request is
            // handed out, and is at least as long as `now`; the staging buffer is elsewhere.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast(), now.len()) };
            rest = later;
        }
        self.staging.consume(n);
        self.taken += n as u64;
        n as u32
    }

    /// What is missing of the payload of the present write.
    fn payload_pieces(&self) -> smallvec::SmallVec<[libc::iovec; MAX_PIECES]> {
        let mut pieces = smallvec::SmallVec::new();
        let (Some(id), Some(request), Want::Payload { left }) =
            (self.writing, self.machine.writing(), self.machine.want())
        else {
            return pieces;
        };
        // SAFETY: the slot is in use until its request has been answered.
        let rest = unsafe { self.slots.payload(id, request.payload_len(), left) };
        pieces.extend(
            rest.iter().map(|s| libc::iovec { iov_base: s.as_ptr().cast(), iov_len: s.len as usize }),
        );
        pieces
    }

    /// One system call: the rest of a payload where it belongs, and what follows into the staging. Also whether there was
    /// as much as asked for.
    fn read(&mut self, out: &mut Vec<Incoming>) -> io::Result<(Moved, bool)> {
        // Nobody reads it, so nothing needs to be in it.
        let mut discarded = std::mem::MaybeUninit::<[u8; 4096]>::uninit();
        let mut pieces = self.payload_pieces();
        let mut payload: usize = pieces.iter().map(|p| p.iov_len).sum();
        if let Want::Discard { left } = self.machine.want() {
            payload = size_of_val(&discarded).min(left as usize);
            pieces.push(libc::iovec { iov_base: discarded.as_mut_ptr().cast(), iov_len: payload });
        }
        let ahead = self.staging.room();
        // After half a payload comes the other half.
        if !matches!(self.machine.want(), Want::Discard { left } if left as usize > payload) {
            pieces.push(libc::iovec { iov_base: ahead.as_mut_ptr().cast(), iov_len: ahead.len() });
        }
        // SAFETY: the payload's pieces are as in `take_staged`; the others are exclusively borrowed until here.
        let moved = unsafe { self.pipe.read(&pieces) }?;
        let asked: usize = pieces.iter().map(|p| p.iov_len).sum();
        let full = moved == Moved::Some(asked);
        if let Moved::Some(n) = moved {
            let of_payload = n.min(payload);
            self.staging.filled(n - of_payload);
            self.taken += of_payload as u64;
            if of_payload > 0
                && let Some(event) = self.machine.payload(of_payload as u32)
            {
                self.event(event, out);
            }
        }
        Ok((moved, full))
    }

    fn event(&mut self, event: Event, out: &mut Vec<Incoming>) {
        match event {
            Event::Writing(request) => {
                self.staging.follow(request.payload_len());
                self.waiting = Some(request);
            }
            Event::Request(request) => match self.writing.take() {
                Some(id) => self.hand_out(id, request, out),
                None => {
                    self.staging.follow(0);
                    self.waiting = Some(request);
                }
            },
            Event::Refused(refusal) => {
                tracing::debug!(%refusal, "NBD");
                let to = To { cookie: refusal.cookie, offset: refusal.offset };
                let id = self.slots.enter(to, (0, 0), 0, crate::buffers::Data::None);
                self.slots.refuse(id, refusal.error, refusal.why);
                self.outbox.push(id);
            }
            Event::Disconnect => self.finish(End::Disconnect),
        }
    }

    /// Gives memory to the request that waits for it. False if there is none.
    fn admit_waiting(&mut self, out: &mut Vec<Incoming>) -> bool {
        let Some(request) = self.waiting else { return true };
        let (len, before) = self.memory_for(&request);
        if Buffers::is_own(len) && (self.slots.has_own() || !self.buffers.may_own(len, &mut self.place)) {
            return false;
        }
        let pooled = self.buffers.take(len);
        // Clients that do not read their answers may keep the pools for ever: a connection that has nothing else to
        // wait for goes on without them.
        let stuck = self.in_flight == 0 && self.outbox.is_empty();
        let Some(data) = pooled.or_else(|| stuck.then(|| self.buffers.own(len)).flatten()) else {
            if Buffers::is_own(len) {
                self.finish(End::Failed(io::ErrorKind::OutOfMemory.into()));
            }
            return false;
        };
        self.waiting = None;
        let answer_len = if request.command() == Command::Read { request.data_len() } else { 0 };
        let to = To { cookie: request.cookie(), offset: request.offset() };
        let id = self.slots.enter(to, (len as u32, before), answer_len, data);
        if request.payload_len() > 0 {
            self.writing = Some(id);
        } else {
            self.hand_out(id, request, out);
        }
        true
    }

    /// Whether [`Connection::admit_waiting`] would find memory now.
    fn has_memory_for(&self, request: &Request) -> bool {
        let (len, _) = self.memory_for(request);
        let stuck = self.in_flight == 0 && self.outbox.is_empty();
        if Buffers::is_own(len) {
            !self.slots.has_own() && self.buffers.could_own(len, &self.place)
        } else {
            stuck || self.buffers.has(len)
        }
    }

    /// Bytes of memory for a request, the blocks of its data; and how many of them are in front of its range.
    fn memory_for(&self, request: &Request) -> (usize, u32) {
        let (len, export) = (request.data_len(), self.machine.export());
        if len == 0 || !export.any_range {
            return (len as usize, 0);
        }
        let cover = request.cover(export.block_size);
        (cover.len as usize, cover.before)
    }

    fn hand_out(&mut self, id: RequestId, request: Request, out: &mut Vec<Incoming>) {
        // SAFETY: the slot keeps the memory until the request is answered.
        let segments = unsafe { self.slots.segments(id) };
        self.in_flight += 1;
        out.push(Incoming { id, request, segments });
    }

    /// No more requests; the first reason counts, except that a client that is gone takes no answers.
    fn finish(&mut self, end: End) {
        if !matches!(end, End::Disconnect) {
            self.outbox.clear(&mut self.slots);
            self.pipe.forget();
        }
        if let Some(id) = self.writing.take() {
            self.slots.release(id);
        }
        self.waiting = None;
        self.place.leave();
        match &self.end {
            None => self.end = Some(end),
            Some(End::Disconnect) => self.end = Some(end),
            Some(_) => {}
        }
    }
}
