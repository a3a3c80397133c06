//! Requests in flight on one connection, found by index.

use nbd_proto::framing::Framing;
use nbd_proto::reply::{MAX_EXTENTS, ReplyHead, Run, To, put_extent};
use nbd_proto::wire::ErrorCode;

use crate::Segments;
use crate::buffers::Data;

/// Most requests of one connection at a time: twice what the kernel's driver sends. Later ones stay in the socket.
pub const MAX_IN_FLIGHT: usize = 256;

/// Names a request of a connection until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u32);

/// One request.
#[derive(Debug, Default)]
struct Slot {
    to: To,
    /// Bytes of `data` that the device has: whole blocks.
    len: u32,
    /// Bytes of `data` in front of what the client sends or gets: those of the first block that are not in its range.
    before: u32,
    /// Data that a good answer carries, bytes.
    answer_len: u32,
    data: Data,
    reply: ReplyHead,
    /// Behind it, instead of data: the extents of `BLOCK_STATUS`.
    extents: Vec<u8>,
    used: bool,
}

/// All of a connection. They grow to the deepest queue that it has seen: most connections never have many.
#[derive(Debug)]
pub(crate) struct Slots {
    framing: Framing,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Requests with memory of their own.
    own: usize,
    /// Requests with memory.
    lent: usize,
}

impl Slots {
    pub(crate) fn new(framing: Framing) -> Self {
        Self { framing, slots: Vec::new(), free: Vec::new(), own: 0, lent: 0 }
    }

    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty() || self.slots.len() < MAX_IN_FLIGHT
    }

    /// A request has memory outside the pools.
    pub(crate) fn has_own(&self) -> bool {
        self.own > 0
    }

    /// A request or an answer has memory.
    pub(crate) fn has_data(&self) -> bool {
        self.lent > 0
    }

    /// A place for a request; `answer_len` bytes of `data` go out with a good answer, after the first `before`. The device
    /// has `len` bytes.
    ///
    /// # Panics
    /// Without room.
    pub(crate) fn enter(
        &mut self,
        to: To,
        (len, before): (u32, u32),
        answer_len: u32,
        data: Data,
    ) -> RequestId {
        let index = self.free.pop().unwrap_or_else(|| {
            assert!(self.slots.len() < MAX_IN_FLIGHT, "has_room was asked");
            self.slots.push(Slot::default());
            self.slots.len() as u32 - 1
        });
        self.own += usize::from(matches!(data, Data::Own(_)));
        self.lent += usize::from(!matches!(data, Data::None));
        let slot = &mut self.slots[index as usize];
        (slot.to, slot.len, slot.before, slot.answer_len) = (to, len, before, answer_len);
        (slot.data, slot.used) = (data, true);
        RequestId(index)
    }

    /// The request's memory for the device: whole blocks.
    ///
    /// # Safety
    /// As for [`Data::segments`]: the slot stays in use until the I/O has completed.
    pub(crate) unsafe fn segments(&self, id: RequestId) -> Segments {
        let slot = &self.slots[id.0 as usize];
        // SAFETY: the caller's promise.
        unsafe { slot.data.segments(0, slot.len as usize) }
    }

    /// Where the last `left` of the `len` bytes go that the client sends.
    ///
    /// # Safety
    /// As for [`Slots::segments`].
    pub(crate) unsafe fn payload(&self, id: RequestId, len: u32, left: u32) -> Segments {
        let slot = &self.slots[id.0 as usize];
        // SAFETY: the caller's promise.
        unsafe { slot.data.segments((slot.before + len - left) as usize, left as usize) }
    }

    /// Makes the answer of a request that was executed. False if there is no such request.
    ///
    /// Data that are all zeroes are told as a hole where the framing has one: looking costs as much as the zeroes are
    /// long, a fraction of what sending them would, and next to nothing where the first bytes are others.
    pub(crate) fn answer(&mut self, id: RequestId, result: Result<(), ErrorCode>) -> bool {
        let Some(slot) = self.slots.get_mut(id.0 as usize).filter(|s| s.used) else { return false };
        match result {
            // SAFETY: the slot keeps the memory; the device is done with it, and the client has not got it.
            Ok(()) if self.framing.has_chunks() && slot.answer_len > 0 && unsafe { is_zero(slot) } => {
                slot.reply = ReplyHead::hole(self.framing, slot.to, slot.answer_len);
                slot.answer_len = 0;
            }
            Ok(()) => slot.reply = ReplyHead::data(self.framing, slot.to, slot.answer_len),
            Err(error) => {
                let at = (slot.answer_len > 0).then_some(slot.to.offset);
                let why = nbd_proto::reply::text(error);
                slot.reply = ReplyHead::error(self.framing, slot.to, error, why, at);
                slot.answer_len = 0;
            }
        }
        if slot.answer_len == 0 {
            let data = std::mem::take(&mut slot.data);
            self.give_back(data);
        }
        true
    }

    /// Makes the answer of a request that was not executed.
    pub(crate) fn refuse(&mut self, id: RequestId, error: ErrorCode, why: &str) {
        let slot = &mut self.slots[id.0 as usize];
        slot.reply = ReplyHead::error(self.framing, slot.to, error, why, None);
    }

    /// Makes the answer of a `BLOCK_STATUS` request: at most [`MAX_EXTENTS`] of the runs, at least one. False if there
    /// is no such request. Allocates.
    pub(crate) fn answer_status(&mut self, id: RequestId, runs: &[Run], block_size: u32) -> bool {
        let Some(slot) = self.slots.get_mut(id.0 as usize).filter(|s| s.used) else { return false };
        slot.extents.clear();
        let mut count = 0;
        for run in runs.iter().take(MAX_EXTENTS) {
            count += 1;
            if !put_extent(self.framing, *run, block_size, &mut slot.extents) {
                break;
            }
        }
        slot.reply = ReplyHead::status(self.framing, slot.to, count);
        true
    }

    /// The answer's head, and what is behind it: extents or data.
    ///
    /// # Safety
    /// As for [`Data::segments`].
    pub(crate) unsafe fn reply(&self, id: RequestId) -> (&[u8], &[u8], Segments) {
        let slot = &self.slots[id.0 as usize];
        // SAFETY: the caller's promise.
        let data = unsafe { slot.answer() };
        (slot.reply.as_bytes(), &slot.extents, data)
    }

    /// Bytes of the answer, header included.
    pub(crate) fn reply_len(&self, id: RequestId) -> usize {
        let slot = &self.slots[id.0 as usize];
        slot.reply.as_bytes().len() + slot.extents.len() + slot.answer_len as usize
    }

    /// The answer is on its way, or nobody waits for it.
    pub(crate) fn release(&mut self, id: RequestId) {
        let slot = &mut self.slots[id.0 as usize];
        if std::mem::take(&mut slot.used) {
            let data = std::mem::take(&mut slot.data);
            // Thousands of them would stay otherwise, for clients that ask once.
            slot.extents = Vec::new();
            self.give_back(data);
            self.free.push(id.0);
        }
    }

    fn give_back(&mut self, data: Data) {
        self.own -= usize::from(matches!(data, Data::Own(_)));
        self.lent -= usize::from(!matches!(data, Data::None));
    }
}

impl Slot {
    /// The data of the answer.
    ///
    /// # Safety
    /// As for [`Data::segments`].
    unsafe fn answer(&self) -> Segments {
        // SAFETY: the caller's promise.
        unsafe { self.data.segments(self.before as usize, self.answer_len as usize) }
    }
}

/// Whether all the data of the answer are zeroes.
///
/// # Safety
/// Nobody writes to the memory of `slot` meanwhile.
unsafe fn is_zero(slot: &Slot) -> bool {
    // SAFETY: the slot keeps its memory for as long as it is borrowed.
    let segments = unsafe { slot.answer() };
    segments.iter().all(|s| {
        // SAFETY: `len` bytes that the slot owns; the caller vouches that nobody writes.
        let bytes = unsafe { std::slice::from_raw_parts(s.as_ptr(), s.len as usize) };
        let (start, rest) = bytes.split_at(bytes.len().min(16));
        // If the start is zero and everything equals what is 16 bytes before it, everything is.
        start.iter().all(|b| *b == 0) && *rest == bytes[..rest.len()]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Buffers;

    #[test]
    fn zeroes_are_found_and_nothing_else_is() {
        let buffers = Buffers::new(&iobuf::Registry::default()).unwrap();
        let mut slots = Slots::new(Framing::Structured);
        for (len, at) in
            [(512, None), (512, Some(0)), (512, Some(511)), (300_000, None), (300_000, Some(299_999))]
        {
            let mut data = buffers.take(len).unwrap();
            data.fill(0);
            if let Some(at) = at {
                data.poke(at, 1);
            }
            let id = slots.enter(To { cookie: 1, offset: 0 }, (len as u32, 0), len as u32, data);
            assert!(slots.answer(id, Ok(())));
            let hole = slots.reply_len(id) == 32;
            assert_eq!(hole, at.is_none(), "{len} {at:?}");
            slots.release(id);
        }
        assert_eq!(buffers.in_use(), (0, 0));
    }
}
