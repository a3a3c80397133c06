//! Requests and replies, as a client sees them: which request the next bytes belong to, and what became of it.
//!
//! ```text
//!           simple reply, chunk ─▶ Event::Done                      ┌─────────────────────────┐
//!  ┌──────┐ OFFSET_HOLE         ─▶ Event::Zero                      │ the data of which READ, │
//!  │ Head │◀──────────────────────────────────────────────────────  │ and where in its memory │
//!  │      │──── simple reply to READ, OFFSET_DATA ─▶ Data{id, at, left} ── all there ─▶ Event::Done, or none
//!  └──────┘──── ERROR, ERROR_OFFSET ─▶ Skip{left} ── all there ─▶ Event::Done, or none
//! ```
//!
//! A read that is answered in chunks has ended well only if every byte of it came exactly once: what a server leaves
//! out would otherwise be whatever the memory held before, and what it sends twice makes one of the two wrong.

mod request;
mod violation;

use zerocopy::FromBytes;

use super::cover::{Cover, Misfit};
use crate::framing::Framing;
use crate::wire::{
    EXTENDED_REPLY_LEN, EXTENDED_REPLY_MAGIC, ErrorHead, ExtendedReply, Hole, ORIGINAL_MAX_SIZE,
    ORIGINAL_REPLY_LEN, OriginalReply, SIMPLE_REPLY_LEN, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_LEN,
    STRUCTURED_REPLY_MAGIC, SimpleReply, StructuredReply, chunk, cmd,
};

pub use request::{Ask, Command, Head};
use request::{encode, words};
pub use violation::Violation;

/// Requests of one connection at a time; as many as the kernel's client has by default.
pub const MAX_IN_FLIGHT: usize = 128;
/// Bytes that [`Replies::head`] needs at most.
pub const MAX_HEAD: usize = EXTENDED_REPLY_LEN + size_of::<Hole>();
/// Most error chunks of one reply.
pub const MAX_ERRORS: u32 = 64;
/// Longest text of an error chunk ("Conventions").
const MAX_TEXT: u16 = 4096;

/// Why a request cannot be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsendable {
    /// [`MAX_IN_FLIGHT`] are under way: again after an answer.
    Full,
    /// The dialect has no words for it.
    Dialect,
}

/// A request in flight, by its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u32);

/// Whose bytes come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// [`Replies::head`]'s.
    Head,
    /// READ data: the next `left` bytes go to byte `at` of the request's memory, and so on.
    Data {
        /// The request.
        id: RequestId,
        /// First byte in its memory.
        at: u32,
        /// Bytes.
        left: u32,
    },
    /// Text of an error, for [`Replies::skipped`].
    Skip {
        /// Bytes.
        left: u32,
    },
}

/// What bytes meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request is over. Its place is free.
    Done {
        /// The place it had.
        id: RequestId,
        /// Of [`Ask`].
        token: u64,
        /// The server's error number, not 0.
        result: Result<(), u32>,
    },
    /// So many bytes of a READ's memory are zeroes.
    Zero {
        /// The request.
        id: RequestId,
        /// First byte in its memory.
        at: u32,
        /// Bytes.
        len: u32,
        /// With that it is over: as in [`Event::Done`].
        done: Option<(u64, Result<(), u32>)>,
    },
}

#[derive(Clone, Copy, Debug)]
enum State {
    Head,
    Data { slot: u32, at: u32, left: u32, done: bool },
    Skip { slot: u32, left: u32, done: bool },
}

#[derive(Debug, Default)]
struct Slot {
    used: bool,
    /// Moves each time the place is used, so that a late second answer is not taken for that of a later request.
    generation: u32,
    token: u64,
    command: u16,
    offset: u64,
    len: u32,
    /// The first error of the reply.
    error: u32,
    errors: u32,
    cover: Cover,
}

/// The requests in flight of one connection. Nothing is allocated for one, unless its answer comes in pieces.
#[derive(Debug)]
pub struct Replies {
    framing: Framing,
    state: State,
    slots: Box<[Slot]>,
    free: Vec<u32>,
}

impl Replies {
    /// A connection whose next byte is the first of a reply.
    pub fn new(framing: Framing) -> Self {
        Self {
            framing,
            state: State::Head,
            slots: std::iter::repeat_with(Slot::default).take(MAX_IN_FLIGHT).collect(),
            free: (0..MAX_IN_FLIGHT as u32).rev().collect(),
        }
    }

    /// As agreed.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Requests without an answer.
    pub fn in_flight(&self) -> usize {
        MAX_IN_FLIGHT - self.free.len()
    }

    /// The tokens of requests without an answer.
    pub fn tokens(&self) -> impl Iterator<Item = u64> + '_ {
        self.slots.iter().filter(|s| s.used).map(|s| s.token)
    }

    /// Takes a request, whose head must be sent next, followed by a write's data.
    ///
    /// # Errors
    /// [`Unsendable`].
    pub fn enter(&mut self, ask: &Ask) -> Result<(RequestId, Head), Unsendable> {
        let (command, flags) = words(ask.command);
        if matches!(self.framing, Framing::Original { .. }) {
            let end = ask.offset.saturating_add(ask.len.into());
            if !matches!(command, cmd::READ | cmd::WRITE) || end > ORIGINAL_MAX_SIZE {
                return Err(Unsendable::Dialect);
            }
        }
        let index = self.free.pop().ok_or(Unsendable::Full)?;
        let slot = &mut self.slots[index as usize];
        slot.used = true;
        slot.generation = slot.generation.wrapping_add(1);
        (slot.token, slot.command, slot.offset, slot.len) = (ask.token, command, ask.offset, ask.len);
        (slot.error, slot.errors) = (0, 0);
        slot.cover.clear();
        let cookie = u64::from(slot.generation) << 32 | u64::from(index);
        Ok((RequestId(index), encode(self.framing, command, flags, cookie, ask.offset, ask.len)))
    }

    /// Whose bytes come next.
    pub fn want(&self) -> Want {
        match self.state {
            State::Head => Want::Head,
            State::Data { slot, at, left, .. } => Want::Data { id: RequestId(slot), at, left },
            State::Skip { left, .. } => Want::Skip { left },
        }
    }

    /// Looks at the head of a reply, and of its payload, at the front of `input`: how many bytes it has, and what they
    /// mean. `None`: more bytes, please; [`MAX_HEAD`] always do.
    ///
    /// # Errors
    /// [`Violation`]: close the connection.
    ///
    /// # Panics
    /// If no head is wanted.
    pub fn head(&mut self, input: &[u8]) -> Result<Option<(usize, Option<Event>)>, Violation> {
        assert!(matches!(self.state, State::Head), "no head is wanted in {:?}", self.state);
        let Some(magic) = input.first_chunk::<4>() else { return Ok(None) };
        match (self.framing, u32::from_be_bytes(*magic)) {
            (Framing::Original { reply_magic }, found) if found == reply_magic => self.original(input),
            (Framing::Simple | Framing::Structured, SIMPLE_REPLY_MAGIC) => self.simple(input),
            (Framing::Structured, STRUCTURED_REPLY_MAGIC) => {
                let Ok((h, payload)) = StructuredReply::ref_from_prefix(input) else { return Ok(None) };
                let slot = self.find(h.cookie.get())?;
                let chunk =
                    Chunk { slot, flags: h.flags.get(), kind: h.kind.get(), length: h.length.get().into() };
                self.chunk(STRUCTURED_REPLY_LEN, &chunk, payload)
            }
            (Framing::Extended, EXTENDED_REPLY_MAGIC) => {
                let Ok((h, payload)) = ExtendedReply::ref_from_prefix(input) else { return Ok(None) };
                let slot = self.find(h.cookie.get())?;
                let asked = self.slots[slot as usize].offset;
                if h.offset.get() != asked {
                    return Err(Violation::Echo { asked, found: h.offset.get() });
                }
                let chunk = Chunk { slot, flags: h.flags.get(), kind: h.kind.get(), length: h.length.get() };
                self.chunk(EXTENDED_REPLY_LEN, &chunk, payload)
            }
            (framing, found) => Err(Violation::Magic { found, dialect: framing.name() }),
        }
    }

    /// `n` more bytes of [`Want::Data`] are where they belong.
    ///
    /// # Errors
    /// As for [`Replies::head`].
    ///
    /// # Panics
    /// If fewer are wanted.
    pub fn data(&mut self, n: u32) -> Result<Option<Event>, Violation> {
        let State::Data { slot, at, left, done } = self.state else {
            panic!("no data is wanted in {:?}", self.state)
        };
        let left = left.checked_sub(n).expect("at most as many bytes as are wanted");
        if left > 0 {
            self.state = State::Data { slot, at: at + n, left, done };
            return Ok(None);
        }
        self.state = State::Head;
        if done { self.end(slot).map(Some) } else { Ok(None) }
    }

    /// `n` more bytes of [`Want::Skip`] were read.
    ///
    /// # Errors
    /// As for [`Replies::head`].
    ///
    /// # Panics
    /// If fewer are wanted.
    pub fn skipped(&mut self, n: u32) -> Result<Option<Event>, Violation> {
        let State::Skip { slot, left, done } = self.state else {
            panic!("nothing is to be skipped in {:?}", self.state)
        };
        let left = left.checked_sub(n).expect("at most as many bytes as are wanted");
        if left > 0 {
            self.state = State::Skip { slot, left, done };
            return Ok(None);
        }
        self.state = State::Head;
        if done { self.end(slot).map(Some) } else { Ok(None) }
    }

    /// The connection is gone: takes every request in flight out, by its token.
    pub fn drain(&mut self, mut lost: impl FnMut(u64)) {
        self.state = State::Head;
        for (index, slot) in self.slots.iter_mut().enumerate().filter(|(_, s)| s.used) {
            slot.used = false;
            self.free.push(index as u32);
            lost(slot.token);
        }
    }

    /// The request that a cookie names.
    fn find(&self, cookie: u64) -> Result<u32, Violation> {
        let index = cookie as u32;
        match self.slots.get(index as usize) {
            Some(slot) if slot.used && u64::from(slot.generation) == cookie >> 32 => Ok(index),
            _ => Err(Violation::Cookie(cookie)),
        }
    }

    fn original(&mut self, input: &[u8]) -> Result<Option<(usize, Option<Event>)>, Violation> {
        let Ok((h, _)) = OriginalReply::ref_from_prefix(input) else { return Ok(None) };
        let slot = self.find(h.handle.get())?;
        Ok(Some((ORIGINAL_REPLY_LEN, self.plain(slot, h.error.get()))))
    }

    fn simple(&mut self, input: &[u8]) -> Result<Option<(usize, Option<Event>)>, Violation> {
        let Ok((h, _)) = SimpleReply::ref_from_prefix(input) else { return Ok(None) };
        let slot = self.find(h.cookie.get())?;
        if self.framing == Framing::Structured && self.slots[slot as usize].command == cmd::READ {
            return Err(Violation::SimpleRead);
        }
        Ok(Some((SIMPLE_REPLY_LEN, self.plain(slot, h.error.get()))))
    }

    /// A reply that is all there is to say, but for the data of a READ.
    fn plain(&mut self, slot: u32, error: u32) -> Option<Event> {
        let s = &mut self.slots[slot as usize];
        s.error = error;
        if s.command == cmd::READ && error == 0 && s.len > 0 {
            // The whole range in one piece.
            let whole = s.cover.add(0, s.len);
            debug_assert_eq!(whole, Ok(()), "nothing was answered before");
            self.state = State::Data { slot, at: 0, left: s.len, done: true };
            return None;
        }
        Some(self.done(slot))
    }

    fn chunk(
        &mut self,
        head: usize,
        c: &Chunk,
        payload: &[u8],
    ) -> Result<Option<(usize, Option<Event>)>, Violation> {
        if c.flags & !chunk::FLAG_DONE != 0 {
            return Err(Violation::Flags(c.flags));
        }
        let command = self.slots[c.slot as usize].command;
        let (more, event) = match c.kind {
            chunk::NONE if c.length != 0 => return Err(c.bad_length()),
            chunk::NONE if !c.is_last() => return Err(Violation::NotDone),
            chunk::NONE => (0, Some(self.end(c.slot)?)),
            chunk::OFFSET_DATA if command == cmd::READ => {
                if c.length <= 8 {
                    return Err(c.bad_length());
                }
                let Some(offset) = payload.first_chunk::<8>() else { return Ok(None) };
                self.offset_data(c, u64::from_be_bytes(*offset))?;
                (8, None)
            }
            chunk::OFFSET_HOLE if command == cmd::READ => {
                if c.length != size_of::<Hole>() as u64 {
                    return Err(c.bad_length());
                }
                let Ok((hole, _)) = Hole::ref_from_prefix(payload) else { return Ok(None) };
                (size_of::<Hole>(), Some(self.hole(c, hole.offset.get(), hole.size.get())?))
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                if c.length < size_of::<ErrorHead>() as u64 {
                    return Err(c.bad_length());
                }
                let Ok((error, _)) = ErrorHead::ref_from_prefix(payload) else { return Ok(None) };
                let event = self.error(c, error.error.get(), error.message_len.get())?;
                (size_of::<ErrorHead>(), event)
            }
            kind => return Err(Violation::Kind { kind, command: name(command) }),
        };
        Ok(Some((head + more, event)))
    }

    fn offset_data(&mut self, c: &Chunk, offset: u64) -> Result<(), Violation> {
        let (at, left) = self.cover(c.slot, offset, c.length - 8)?;
        self.state = State::Data { slot: c.slot, at, left, done: c.is_last() };
        Ok(())
    }

    fn hole(&mut self, c: &Chunk, offset: u64, size: u32) -> Result<Event, Violation> {
        if size == 0 {
            return Err(Violation::Length { kind: c.kind, length: 0 });
        }
        let (at, len) = self.cover(c.slot, offset, size.into())?;
        let done = match c.is_last().then(|| self.end(c.slot)).transpose()? {
            Some(Event::Done { token, result, .. }) => Some((token, result)),
            _ => None,
        };
        Ok(Event::Zero { id: RequestId(c.slot), at, len, done })
    }

    /// Marks a range of the export as answered: where it lies in the memory of the request.
    fn cover(&mut self, slot: u32, offset: u64, len: u64) -> Result<(u32, u32), Violation> {
        let s = &mut self.slots[slot as usize];
        let outside = Violation::Outside { offset, len, asked: s.offset, asked_len: s.len };
        let at = offset.checked_sub(s.offset).ok_or(outside)?;
        if at.checked_add(len).is_none_or(|end| end > u64::from(s.len)) {
            return Err(outside);
        }
        // Both are at most `s.len`.
        let (at, len) = (at as u32, len as u32);
        s.cover.add(at, len).map_err(|misfit| match misfit {
            Misfit::Overlap => Violation::Overlap(offset),
            Misfit::Fragments => Violation::Fragments,
        })?;
        Ok((at, len))
    }

    fn error(&mut self, c: &Chunk, error: u32, text: u16) -> Result<Option<Event>, Violation> {
        if error == 0 {
            return Err(Violation::NoError);
        }
        let rest = c.length - size_of::<ErrorHead>() as u64;
        let fits = match c.kind {
            chunk::ERROR => rest == u64::from(text),
            chunk::ERROR_OFFSET => rest == u64::from(text) + 8,
            // Types to come begin alike and may go on; the longest that makes sense is taken.
            _ => rest >= u64::from(text) && rest <= u64::from(text) + 4096,
        };
        if !fits || text > MAX_TEXT {
            return Err(Violation::Text { text, length: c.length });
        }
        let s = &mut self.slots[c.slot as usize];
        s.errors += 1;
        if s.errors > MAX_ERRORS {
            return Err(Violation::Errors);
        }
        if s.error == 0 {
            s.error = error;
        }
        match (rest, c.is_last()) {
            (0, true) => self.end(c.slot).map(Some),
            (0, false) => Ok(None),
            (_, done) => {
                self.state = State::Skip { slot: c.slot, left: rest as u32, done };
                Ok(None)
            }
        }
    }

    /// The last chunk of a reply has come.
    fn end(&mut self, slot: u32) -> Result<Event, Violation> {
        let s = &self.slots[slot as usize];
        if s.command == cmd::READ && s.error == 0 && s.len > 0 && !s.cover.is_whole(s.len) {
            return Err(Violation::Missing(s.len));
        }
        Ok(self.done(slot))
    }

    fn done(&mut self, slot: u32) -> Event {
        let s = &mut self.slots[slot as usize];
        s.used = false;
        self.free.push(slot);
        let result = if s.error == 0 { Ok(()) } else { Err(s.error) };
        Event::Done { id: RequestId(slot), token: s.token, result }
    }
}

/// Head of a chunk of either dialect.
struct Chunk {
    slot: u32,
    flags: u16,
    kind: u16,
    length: u64,
}

impl Chunk {
    fn is_last(&self) -> bool {
        self.flags & chunk::FLAG_DONE != 0
    }

    fn bad_length(&self) -> Violation {
        Violation::Length { kind: self.kind, length: self.length }
    }
}

fn name(command: u16) -> &'static str {
    match command {
        cmd::READ => "READ",
        cmd::WRITE => "WRITE",
        cmd::FLUSH => "FLUSH",
        cmd::TRIM => "TRIM",
        cmd::WRITE_ZEROES => "WRITE_ZEROES",
        _ => "a request",
    }
}

#[cfg(test)]
mod tests;
