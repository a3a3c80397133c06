//! Answers on their way out: as many as fit in one system call, in the order in which they were given.

use std::collections::VecDeque;
use std::io;

use smallvec::SmallVec;

use crate::slots::{RequestId, Slots};
use crate::stream::Moved;
use crate::tls::pipe::Pipe;

/// Pieces of one call: 32 answers with their headers and data in one segment each.
const MAX_PIECES: usize = 64;

/// Answers that are not (wholly) sent.
#[derive(Debug)]
pub(crate) struct Outbox {
    /// As long as the slots are many, at most.
    queue: VecDeque<RequestId>,
    /// Bytes of the first that are sent.
    sent: usize,
    /// Bytes sent, ever.
    total: u64,
    /// The socket is full.
    blocked: bool,
}

impl Outbox {
    pub(crate) fn new() -> Self {
        Self { queue: VecDeque::new(), sent: 0, total: 0, blocked: false }
    }

    pub(crate) fn push(&mut self, id: RequestId) {
        self.queue.push_back(id);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes of answers that were sent, ever.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Sends until there is nothing left or the socket is full. `Ok(false)`: the peer is gone.
    pub(crate) fn send(&mut self, pipe: &mut Pipe, slots: &mut Slots) -> io::Result<bool> {
        self.blocked = false;
        while !self.queue.is_empty() {
            let mut pieces = self.gather(slots);
            // SAFETY: headers and data belong to slots, which are only released below, after the call; the device is
            // done with the data, so nobody changes it.
            match unsafe { pipe.write(&mut pieces) }? {
                Moved::Some(n) => self.advance(n, slots),
                Moved::WouldBlock => {
                    self.blocked = true;
                    break;
                }
                Moved::End => return Ok(false),
            }
        }
        // TLS takes what its buffer holds, and the socket may take less.
        if !self.blocked && pipe.has_output() {
            self.blocked = !pipe.flush()?;
        }
        Ok(true)
    }

    /// Lists the pieces of as many answers as there is room for, less what is sent.
    fn gather(&self, slots: &Slots) -> SmallVec<[libc::iovec; MAX_PIECES]> {
        let (mut pieces, mut skip) = (SmallVec::new(), self.sent);
        for id in &self.queue {
            // SAFETY: the slot stays in use until the answer is sent.
            let (head, extents, data) = unsafe { slots.reply(*id) };
            let own = [head, extents].map(|b| (b.as_ptr().cast_mut(), b.len()));
            for (base, len) in own.into_iter().chain(data.iter().map(|s| (s.as_ptr(), s.len as usize))) {
                if skip >= len {
                    skip -= len;
                    continue;
                }
                if pieces.len() == MAX_PIECES {
                    return pieces;
                }
                // `skip` is less than `len`, so this stays inside the piece.
                let base = base.wrapping_add(skip);
                pieces.push(libc::iovec { iov_base: base.cast(), iov_len: len - skip });
                skip = 0;
            }
        }
        pieces
    }

    /// `n` more bytes are sent.
    fn advance(&mut self, n: usize, slots: &mut Slots) {
        self.sent += n;
        self.total += n as u64;
        while let Some(id) = self.queue.front().copied() {
            let len = slots.reply_len(id);
            if self.sent < len {
                return;
            }
            self.sent -= len;
            slots.release(id);
            self.queue.pop_front();
        }
        debug_assert_eq!(self.sent, 0);
    }

    /// Nobody waits for the answers any more.
    pub(crate) fn clear(&mut self, slots: &mut Slots) {
        for id in self.queue.drain(..) {
            slots.release(id);
        }
        self.sent = 0;
        self.blocked = false;
    }
}
