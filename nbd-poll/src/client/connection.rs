//! The client's end of one connection in the transmission phase.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::time::Instant;

use iobuf::Segment;
use nbd_proto::client::{
    Ask, Command, Event, Framing, Head, MAX_HEAD, MAX_IN_FLIGHT, Replies, RequestId, Unsendable, Want,
};
use nbd_proto::wire::{EXTENDED_REPLY_LEN, SIMPLE_REPLY_LEN, STRUCTURED_REPLY_LEN};
use smallvec::SmallVec;

use super::ahead::Ahead;
use super::dial::Dialled;
use super::remains::{End, Remains};
use crate::Segments;
use crate::stream::Moved;
use crate::tls::pipe::Pipe;

/// System calls of one [`Connection::receive`], so that one connection cannot keep the core.
const CALLS_PER_TURN: usize = 16;
/// Pieces of one read: a request's memory and what is read ahead.
const READ_PIECES: usize = 17;
/// Pieces of one write: 32 requests with their heads and data in one segment each.
const WRITE_PIECES: usize = 64;
/// Answers up to this many bytes are read ahead and copied: less than another system call costs.
const SHORT: u32 = 8 << 10;

/// A request that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Of [`Ask`].
    pub token: u64,
    /// The server's error number, not 0.
    pub result: Result<(), u32>,
}

#[derive(Debug, Default)]
struct Slot {
    head: Option<Head>,
    /// Where data come from or go to; empty for the rest.
    segments: Segments,
    /// Bytes on the wire: head and, for a write, data.
    wire: usize,
    /// For a write, data behind the head.
    payload: bool,
    sent: bool,
    /// A read whose answer is long.
    long: bool,
}

/// One connection with its requests. It belongs to one reactor.
///
/// Per turn: [`submit`](Self::submit), [`send`](Self::send), [`receive`](Self::receive). After [`end`](Self::end) has
/// something, [`lost`](Self::lost) gives back what is in flight, and nothing touches its memory any more.
#[derive(Debug)]
pub struct Connection {
    pipe: Pipe,
    replies: Replies,
    ahead: Ahead,
    slots: Box<[Slot]>,
    /// To be sent, in order.
    queue: VecDeque<RequestId>,
    /// Bytes of the first that are sent.
    sent: usize,
    blocked: bool,
    /// Reads with a long answer in flight.
    long: usize,
    /// When the server was last heard of, or the first request went out to a quiet one.
    heard: Instant,
    end: Option<End>,
}

impl Connection {
    /// A connection from [`super::Dial`].
    pub fn new(dialled: Dialled, now: Instant) -> Self {
        Self {
            pipe: dialled.pipe,
            replies: Replies::new(dialled.agreed.framing),
            ahead: Ahead::new(),
            slots: std::iter::repeat_with(Slot::default).take(MAX_IN_FLIGHT).collect(),
            queue: VecDeque::with_capacity(MAX_IN_FLIGHT),
            sent: 0,
            blocked: false,
            long: 0,
            heard: now,
            end: None,
        }
    }

    /// Takes a request; it leaves with the next [`Connection::send`]. `data`: memory of `ask.len` bytes for READ and
    /// WRITE, else empty.
    ///
    /// # Errors
    /// [`Unsendable`]; and `Full` after the end.
    ///
    /// # Safety
    /// `data` stays valid until the request has come out of [`Connection::receive`] or [`Connection::lost`], or the
    /// connection is dropped, and nobody else writes there meanwhile.
    pub unsafe fn submit(&mut self, ask: &Ask, data: &[Segment], now: Instant) -> Result<(), Unsendable> {
        debug_assert!(
            data.iter().map(|s| u64::from(s.len)).sum::<u64>()
                == if matches!(ask.command, Command::Read | Command::Write { .. }) {
                    ask.len.into()
                } else {
                    0
                }
        );
        if self.end.is_some() {
            return Err(Unsendable::Full);
        }
        if self.replies.in_flight() == 0 {
            self.heard = now;
        }
        let (id, head) = self.replies.enter(ask)?;
        let payload = matches!(ask.command, Command::Write { .. });
        let slot = &mut self.slots[id.0 as usize];
        slot.segments.clear();
        slot.segments.extend_from_slice(data);
        slot.wire = head.len() + if payload { ask.len as usize } else { 0 };
        (slot.head, slot.payload, slot.sent) = (Some(head), payload, false);
        slot.long = ask.command == Command::Read && ask.len > SHORT;
        self.long += usize::from(slot.long);
        self.queue.push_back(id);
        Ok(())
    }

    /// Sends what was submitted, as far as the socket takes it. Cheap when there is nothing. True if anything moved.
    pub fn send(&mut self) -> bool {
        if self.end.is_some() || (self.queue.is_empty() && !self.pipe.has_output()) {
            return false;
        }
        match self.try_send() {
            Ok(any) => any,
            Err(end) => {
                self.finish(end);
                true
            }
        }
    }

    fn try_send(&mut self) -> Result<bool, End> {
        self.blocked = !self.pipe.flush()?;
        let mut any = false;
        while !self.blocked && !self.queue.is_empty() {
            let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; WRITE_PIECES];
            let count = self.gather(&mut pieces);
            // SAFETY: heads belong to slots that are in use; data are the submitter's, who keeps them until the request
            // is over, which it is not before it was sent (`Early`).
            match unsafe { self.pipe.write(&mut pieces[..count]) }? {
                Moved::Some(n) => {
                    any = true;
                    self.advance(n);
                }
                Moved::WouldBlock => self.blocked = true,
                Moved::End => return Err(End::Closed),
            }
        }
        self.blocked |= self.pipe.has_output();
        Ok(any)
    }

    /// Lists the pieces of as many requests as there is room for, less what is sent; returns how many pieces.
    fn gather(&self, pieces: &mut [libc::iovec; WRITE_PIECES]) -> usize {
        let (mut count, mut skip) = (0, self.sent);
        for id in &self.queue {
            let slot = &self.slots[id.0 as usize];
            let Some(head) = &slot.head else { continue };
            let data = if slot.payload { &slot.segments[..] } else { &[] };
            let head = (head.as_ptr().cast_mut(), head.len());
            for (base, len) in std::iter::once(head).chain(data.iter().map(|s| (s.as_ptr(), s.len as usize)))
            {
                if skip >= len {
                    skip -= len;
                    continue;
                }
                if count == WRITE_PIECES {
                    return count;
                }
                // `skip` is less than `len`, so this stays inside the piece.
                pieces[count] = libc::iovec { iov_base: base.wrapping_add(skip).cast(), iov_len: len - skip };
                skip = 0;
                count += 1;
            }
        }
        count
    }

    /// `n` more bytes are sent.
    fn advance(&mut self, n: usize) {
        self.sent += n;
        while let Some(id) = self.queue.front() {
            let slot = &mut self.slots[id.0 as usize];
            if self.sent < slot.wire {
                return;
            }
            self.sent -= slot.wire;
            slot.sent = true;
            self.queue.pop_front();
        }
        debug_assert_eq!(self.sent, 0);
    }

    /// Reads what has arrived, within a budget, and appends what is over to `done`. True if anything moved.
    pub fn receive(&mut self, now: Instant, done: &mut Vec<Done>) -> bool {
        let mut calls = 0;
        while self.end.is_none() && calls < CALLS_PER_TURN {
            match self.digest(done).and_then(|()| self.read(done)) {
                Ok(Moved::Some(_)) => calls += 1,
                Ok(Moved::WouldBlock) => break,
                Ok(Moved::End) => {
                    let between = self.ahead.is_empty() && self.replies.want() == Want::Head;
                    self.finish(if between { End::Closed } else { End::Truncated });
                    return true;
                }
                Err(end) => {
                    self.finish(end);
                    return true;
                }
            }
        }
        if calls > 0 {
            self.heard = now;
        }
        calls > 0
    }

    /// Works off what was read ahead.
    fn digest(&mut self, done: &mut Vec<Done>) -> Result<(), End> {
        loop {
            let event = match self.replies.want() {
                Want::Head => {
                    let Some((n, event)) = self.replies.head(self.ahead.peek(usize::MAX))? else {
                        return Ok(());
                    };
                    self.ahead.consume(n);
                    event
                }
                _ if self.ahead.is_empty() => return Ok(()),
                Want::Data { id, at, left } => {
                    let n = self.take_ahead(id, at, left);
                    self.replies.data(n)?
                }
                Want::Skip { left } => {
                    let n = self.ahead.peek(left as usize).len();
                    self.ahead.consume(n);
                    self.replies.skipped(n as u32)?
                }
            };
            self.event(event, done)?;
        }
    }

    /// Copies data that were read ahead to where they belong; returns how many bytes.
    fn take_ahead(&mut self, id: RequestId, at: u32, left: u32) -> u32 {
        let mut rest = self.ahead.peek(left as usize);
        let n = rest.len();
        for piece in range(&self.slots[id.0 as usize].segments, at, n as u32) {
            let (now, later) = rest.split_at(piece.iov_len);
            // SAFETY: the piece lies in the memory of a request in flight, which its submitter keeps and nobody else
            // writes; it is as long as `now`, and the buffer is elsewhere.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast(), now.len()) };
            rest = later;
        }
        debug_assert!(rest.is_empty(), "a request has memory for all of its range");
        self.ahead.consume(n);
        n as u32
    }

    /// One system call: the rest of an answer's data where it belongs, and what follows into the buffer.
    fn read(&mut self, done: &mut Vec<Done>) -> Result<Moved, End> {
        let mut pieces: SmallVec<[libc::iovec; READ_PIECES]> = SmallVec::new();
        let (mut direct, mut whole) = (0, true);
        if let Want::Data { id, at, left } = self.replies.want() {
            for piece in range(&self.slots[id.0 as usize].segments, at, left).take(READ_PIECES - 1) {
                direct += piece.iov_len;
                pieces.push(piece);
            }
            whole = direct == left as usize;
        }
        // After a part of an answer comes its rest.
        if whole {
            let most = self.read_ahead();
            let room = self.ahead.room(most);
            pieces.push(libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() });
        }
        // SAFETY: data pieces are as in `take_ahead`; the buffer is exclusively borrowed until here.
        let moved = unsafe { self.pipe.read(&pieces) }?;
        if let Moved::Some(n) = moved {
            let data = n.min(direct);
            self.ahead.filled(n - data);
            if data > 0 {
                let event = self.replies.data(data as u32)?;
                self.event(event, done)?;
            }
        }
        Ok(moved)
    }

    /// How much may be read ahead: while long answers are due the head of the next one, which is somewhat longer if it
    /// turns out not to be that of data.
    fn read_ahead(&self) -> usize {
        let head = match self.replies.framing() {
            _ if self.long == 0 => return usize::MAX,
            Framing::Original { .. } | Framing::Simple => SIMPLE_REPLY_LEN,
            Framing::Structured => STRUCTURED_REPLY_LEN + 8,
            Framing::Extended => EXTENDED_REPLY_LEN + 8,
        };
        if self.ahead.peek(head).len() < head { head } else { MAX_HEAD }
    }

    fn event(&mut self, event: Option<Event>, done: &mut Vec<Done>) -> Result<(), End> {
        match event {
            None => Ok(()),
            Some(Event::Done { id, token, result }) => self.over(id, Done { token, result }, done),
            Some(Event::Zero { id, at, len, done: over }) => {
                for piece in range(&self.slots[id.0 as usize].segments, at, len) {
                    // SAFETY: as in `take_ahead`.
                    unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
                }
                over.map_or(Ok(()), |(token, result)| self.over(id, Done { token, result }, done))
            }
        }
    }

    /// A request is over. One that was not sent completely would have its data go out of memory that is given back.
    fn over(&mut self, id: RequestId, over: Done, done: &mut Vec<Done>) -> Result<(), End> {
        let slot = &mut self.slots[id.0 as usize];
        self.long -= usize::from(std::mem::take(&mut slot.long));
        slot.head = None;
        // Given back all the same: the connection ends, and nothing is sent any more.
        done.push(over);
        if slot.sent { Ok(()) } else { Err(End::Early) }
    }

    /// Why it has ended; `None` while it lives.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Ends it here, for the reason given. What is in flight comes out of [`Connection::lost`].
    pub fn give_up(&mut self, why: impl Into<String>) {
        self.finish(End::GivenUp(why.into()));
    }

    /// Says good-bye (DISC) as far as the socket takes it, when nothing is in flight, and ends the connection.
    pub fn disconnect(&mut self) {
        if self.end.is_none() && self.replies.in_flight() == 0 && !self.blocked {
            let head = Head::disconnect(self.replies.framing());
            if !head.is_empty() {
                let mut pieces =
                    [libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() }];
                // SAFETY: `head` lives until behind the call, which only reads it. Whether it arrives does not matter.
                let _ = unsafe { self.pipe.write(&mut pieces) };
            }
        }
        self.pipe.close_notify();
        self.give_up("closed here");
    }

    /// Takes out what is in flight, by its token. After the end; nothing touches its memory any more.
    pub fn lost(&mut self, lost: impl FnMut(u64)) {
        debug_assert!(self.end.is_some(), "a connection that lives loses nothing");
        self.long = 0;
        self.replies.drain(lost);
    }

    /// Requests that were submitted and are not over.
    pub fn in_flight(&self) -> usize {
        self.replies.in_flight()
    }

    /// Whether a request with one of these tokens is in flight. Looks through all of them.
    pub fn carries(&self, tokens: &[u64]) -> bool {
        self.replies.tokens().any(|token| tokens.contains(&token))
    }

    /// As agreed.
    pub fn framing(&self) -> Framing {
        self.replies.framing()
    }

    /// Since when a server that has something to answer has not been heard of.
    pub fn silent_since(&self) -> Option<Instant> {
        (self.end.is_none() && self.replies.in_flight() > 0).then_some(self.heard)
    }

    /// For epoll: readable when there is something to do. The same for the connection's life.
    pub fn wait_fd(&mut self) -> RawFd {
        self.pipe.wait_fd()
    }

    /// The core is about to sleep: makes [`Connection::wait_fd`] fire for what can go on. True if something can at
    /// once.
    pub fn before_sleep(&mut self) -> bool {
        if self.end.is_some() {
            return false;
        }
        self.pipe.want(true, self.blocked);
        self.pipe.has_input() || (!self.queue.is_empty() && !self.blocked)
    }

    fn finish(&mut self, end: End) {
        if self.end.is_none() {
            self.queue.clear();
            self.sent = 0;
            self.blocked = false;
            self.end = Some(end);
        }
    }

    /// Drops it; what was not sent is thrown away, and the server hears of a reset.
    pub fn abort(mut self) {
        self.pipe.reset_on_close();
    }

    /// After [`End`] that is not the server's: waits for the server to close its side.
    pub fn into_remains(mut self) -> Remains {
        self.pipe.shut_down_write();
        self.pipe.want(true, false);
        Remains { pipe: self.pipe }
    }
}

/// Bytes `at..at + len` of a request's memory, as pieces.
fn range(segments: &[Segment], at: u32, len: u32) -> impl Iterator<Item = libc::iovec> + '_ {
    let (mut skip, mut left) = (at as usize, len as usize);
    segments.iter().filter_map(move |s| {
        let whole = s.len as usize;
        let from = skip.min(whole);
        skip -= from;
        let n = (whole - from).min(left);
        left -= n;
        // `from` is less than the segment's length wherever `n` is not 0.
        (n > 0).then(|| libc::iovec { iov_base: s.as_ptr().wrapping_add(from).cast(), iov_len: n })
    })
}

#[cfg(test)]
mod tests;
