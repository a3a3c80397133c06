//! One connection on its reactor: what may be posted, and what waits to be.

use verbs::{Qp, RecvWr, SendOp, SendWr, Sge, SgeList};

use super::memory::LinkMemory;
use super::slab::Key;
use super::tag::{self, Tag};

/// Entries of the send queue that requests leave to heartbeats.
const RESERVED: u32 = 4;

/// Sizes of a connection, from which its queues were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::client) struct ConSizes {
    /// Of the send queue.
    pub send_wr: u32,
    /// Receives to keep posted, INFO_RSP's not counted.
    pub receives: u32,
    /// Requests without an answer at once: fewer than receives, as heartbeats take some.
    pub max_inflight: u32,
    /// Pieces of one send, the header's included.
    pub send_sge: u32,
}

impl ConSizes {
    /// Pieces of data that one request may have.
    pub fn max_pieces(&self) -> usize {
        (self.send_sge as usize).min(SgeList::MAX).saturating_sub(1)
    }
}

/// A connection's queue pair broke, in words.
pub(super) type Broken = String;

pub(super) struct Con {
    pub key: Key,
    pub cid: u16,
    /// Its link on this lane.
    pub link: Key,
    qp: Box<dyn Qp>,
    sizes: ConSizes,
    /// Requests without an answer.
    pub inflight: u32,
    /// On the lane's list of connections with something to post.
    pub dirty: bool,
    /// Number of its first receive among the link's.
    first_receive: u32,
    recvs: Vec<RecvWr>,
    sends: Vec<SendWr>,
    sq_free: u32,
    unsignaled: u32,
    signal_every: u32,
}

impl Con {
    pub fn new(key: Key, link: Key, cid: u16, qp: Box<dyn Qp>, sizes: ConSizes, first_receive: u32) -> Self {
        Self {
            key,
            cid,
            link,
            qp,
            sizes,
            inflight: 0,
            dirty: false,
            first_receive,
            recvs: Vec::with_capacity(sizes.receives as usize),
            sends: Vec::with_capacity(sizes.send_wr as usize),
            sq_free: sizes.send_wr,
            unsignaled: 0,
            // At least four signals per queue length, so that the queue never stalls behind an unsignaled tail.
            signal_every: (sizes.send_wr / 4).clamp(1, 64),
        }
    }

    /// Posts INFO_RSP's receive, if this is con 0, and then all others.
    pub fn post_first_receives(&mut self, memory: &LinkMemory, keyed: bool) -> Result<(), Broken> {
        if self.cid == 0 {
            let sge = memory.info_rsp_sge().ok_or("no room for INFO_RSP")?;
            let info = RecvWr { wr_id: tag::pack(Tag::InfoRecv, self.key), sges: SgeList::one(sge) };
            self.qp.post_recv(&[info]).map_err(|e| e.to_string())?;
        }
        for n in 0..self.sizes.receives {
            self.renew_receive(memory, self.first_receive + n, keyed);
        }
        self.post_receives()
    }

    /// Queues receive number `n` of the link again. `keyed`: with room for a key message.
    pub fn renew_receive(&mut self, memory: &LinkMemory, n: u32, keyed: bool) {
        let sges =
            if keyed { memory.key_sge(n).map_or(SgeList::EMPTY, SgeList::one) } else { SgeList::EMPTY };
        self.recvs.push(RecvWr { wr_id: tag::pack(Tag::Recv(n), self.key), sges });
    }

    fn post_receives(&mut self) -> Result<(), Broken> {
        if self.recvs.is_empty() {
            return Ok(());
        }
        let result = self.qp.post_recv(&self.recvs).map_err(|e| e.to_string());
        self.recvs.clear();
        result
    }

    /// Everything due goes out: receives first, so that an answer always finds one.
    pub fn post(&mut self) -> Result<(), Broken> {
        self.dirty = false;
        self.post_receives()?;
        if self.sends.is_empty() {
            return Ok(());
        }
        let result = self.qp.post_send(&self.sends).map_err(|e| e.to_string());
        self.sends.clear();
        result
    }

    /// A signaled send completed: it retires `n` entries of the queue.
    pub fn retire(&mut self, n: u32) {
        self.sq_free = (self.sq_free + n).min(self.sizes.send_wr);
    }

    /// Room for another request, and a receive for its answer.
    pub fn has_room(&self) -> bool {
        self.sq_free > RESERVED && self.inflight < self.sizes.max_inflight
    }

    /// Room for a heartbeat or its answer.
    pub fn can_beat(&self) -> bool {
        self.sq_free > 0
    }

    /// Queues one work request; the caller has seen to it that there is room.
    pub fn push(&mut self, op: SendOp, sges: SgeList) {
        self.sq_free = self.sq_free.saturating_sub(1);
        self.unsignaled += 1;
        let signaled = self.unsignaled >= self.signal_every;
        let retires = if signaled { std::mem::take(&mut self.unsignaled) } else { 0 };
        self.sends.push(SendWr { wr_id: tag::pack(Tag::Send(retires), self.key), op, sges, signaled });
    }

    /// Queues an immediate without data.
    pub fn push_imm(&mut self, imm: u32) {
        self.push(SendOp::WriteImm { addr: 0, rkey: 0, imm }, SgeList::EMPTY);
    }

    /// Queues INFO_REQ, the first message of a path.
    pub fn push_info_req(&mut self, sge: Sge) {
        self.push(SendOp::Send, SgeList::one(sge));
    }
}
