//! Requests handed up and not yet answered, found by slot.

use rtrs_proto::request::Request;

use super::tag::ConKey;
use crate::upper::ReqId;

#[derive(Default)]
pub(super) struct Requests {
    slots: Vec<Option<(ConKey, Request)>>,
    free: Vec<u32>,
    promised: usize,
}

impl Requests {
    /// A connection that may have `depth` requests in flight comes: makes room, so that `insert` does not allocate.
    pub fn promise(&mut self, depth: usize) {
        self.promised += depth;
        self.grow_to(self.promised);
    }

    /// Such a connection is gone; its room serves the next one.
    pub fn withdraw(&mut self, depth: usize) {
        self.promised -= depth;
    }

    fn grow_to(&mut self, len: usize) {
        while self.slots.len() < len {
            self.free.push(self.slots.len() as u32);
            self.slots.push(None);
        }
    }

    pub fn insert(&mut self, con: ConKey, request: Request) -> ReqId {
        if self.free.is_empty() {
            // Cannot happen while each connection's ids are below its queue depth; growing is the safe answer.
            self.grow_to(self.slots.len() + 1);
        }
        let index = self.free.pop().expect("grow_to has just made a free slot");
        self.slots[index as usize] = Some((con, request));
        ReqId(index)
    }

    pub fn peek(&self, req: ReqId) -> (ConKey, Request) {
        self.slots[req.0 as usize].expect("a ReqId is used only until its reply")
    }

    pub fn remove(&mut self, req: ReqId) -> (ConKey, Request) {
        let entry = self.slots[req.0 as usize].take().expect("a request is answered exactly once");
        self.free.push(req.0);
        entry
    }
}
