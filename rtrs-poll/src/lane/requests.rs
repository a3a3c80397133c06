//! Requests handed up and not yet answered, found by slot.

use rtrs_proto::request::Request;

use super::tag::ConKey;
use crate::upper::ReqId;

/// Fewer slots are not worth giving up.
const LEAST: usize = 1024;

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

    /// Such a connection is gone. Its room serves the next one, until there is far more than anybody may need.
    pub fn withdraw(&mut self, depth: usize) {
        self.promised -= depth;
        if self.slots.len() > 4 * self.promised.max(LEAST) {
            self.shrink_to(2 * self.promised.max(LEAST));
        }
    }

    /// Gives up free slots at the end, down to `len`.
    fn shrink_to(&mut self, len: usize) {
        let used = self.slots.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.slots.truncate(used.max(len));
        self.slots.shrink_to_fit();
        self.free.retain(|index| (*index as usize) < self.slots.len());
        self.free.shrink_to(self.slots.len());
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

#[cfg(test)]
mod tests {
    use rtrs_proto::request::Direction;

    use super::*;

    #[test]
    fn room_for_a_burst_is_given_up() {
        let mut requests = Requests::default();
        (0..100).for_each(|_| requests.promise(512));
        let request = Request { id: 0, direction: Direction::Write, data_len: 0, usr_len: 0 };
        let key = ConKey { index: 0, generation: 1 };
        let kept = requests.insert(key, request);
        (0..99).for_each(|_| requests.withdraw(512));
        assert_eq!(requests.peek(kept).0, key);
        assert_eq!(requests.slots.len(), 100 * 512, "the one that is kept is the last one");
        requests.remove(kept);
        requests.withdraw(512);
        assert_eq!((requests.slots.len(), requests.free.len()), (2 * LEAST, 2 * LEAST));
    }
}
