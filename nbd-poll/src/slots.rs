//! Requests in flight on one connection, found by index.

use nbd_proto::wire::{ErrorCode, SIMPLE_REPLY_LEN, SimpleReply};
use zerocopy::IntoBytes;

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
    cookie: u64,
    /// Data that a good answer carries, bytes.
    answer_len: usize,
    data: Data,
    reply: [u8; SIMPLE_REPLY_LEN],
    used: bool,
}

/// All of a connection, made when it is.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Box<[Slot]>,
    free: Vec<u32>,
    /// Requests with memory of their own.
    own: usize,
}

impl Slots {
    pub(crate) fn new() -> Self {
        let slots = std::iter::repeat_with(Slot::default).take(MAX_IN_FLIGHT).collect();
        Self { slots, free: (0..MAX_IN_FLIGHT as u32).rev().collect(), own: 0 }
    }

    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// A request has memory outside the pools.
    pub(crate) fn has_own(&self) -> bool {
        self.own > 0
    }

    /// A place for a request; `answer_len` bytes of `data` go out with a good answer.
    ///
    /// # Panics
    /// Without room.
    pub(crate) fn enter(&mut self, cookie: u64, answer_len: usize, data: Data) -> RequestId {
        let index = self.free.pop().expect("has_room was asked");
        self.own += usize::from(matches!(data, Data::Own(_)));
        self.slots[index as usize] =
            Slot { cookie, answer_len, data, reply: [0; SIMPLE_REPLY_LEN], used: true };
        RequestId(index)
    }

    /// The request's memory, its first `len` bytes.
    ///
    /// # Safety
    /// As for [`Data::segments`]: the slot stays in use until the I/O has completed.
    pub(crate) unsafe fn segments(&self, id: RequestId, len: usize) -> Segments {
        // SAFETY: the caller's promise.
        unsafe { self.slots[id.0 as usize].data.segments(len) }
    }

    /// Makes the answer. False if there is no such request.
    pub(crate) fn answer(&mut self, id: RequestId, result: Result<(), ErrorCode>) -> bool {
        let Some(slot) = self.slots.get_mut(id.0 as usize).filter(|s| s.used) else { return false };
        slot.reply.copy_from_slice(SimpleReply::new(slot.cookie, result).as_bytes());
        if result.is_err() {
            slot.answer_len = 0;
        }
        if slot.answer_len == 0 {
            let data = std::mem::take(&mut slot.data);
            self.give_back(data);
        }
        true
    }

    /// The answer's header and data.
    ///
    /// # Safety
    /// As for [`Data::segments`].
    pub(crate) unsafe fn reply(&self, id: RequestId) -> (&[u8; SIMPLE_REPLY_LEN], Segments) {
        let slot = &self.slots[id.0 as usize];
        // SAFETY: the caller's promise.
        (&slot.reply, unsafe { slot.data.segments(slot.answer_len) })
    }

    /// Bytes of the answer, header included.
    pub(crate) fn reply_len(&self, id: RequestId) -> usize {
        SIMPLE_REPLY_LEN + self.slots[id.0 as usize].answer_len
    }

    /// The answer is on its way, or nobody waits for it.
    pub(crate) fn release(&mut self, id: RequestId) {
        let slot = &mut self.slots[id.0 as usize];
        if std::mem::take(&mut slot.used) {
            let data = std::mem::take(&mut slot.data);
            self.give_back(data);
            self.free.push(id.0);
        }
    }

    fn give_back(&mut self, data: Data) {
        self.own -= usize::from(matches!(data, Data::Own(_)));
    }
}
