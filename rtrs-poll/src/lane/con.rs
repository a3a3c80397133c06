//! One connection on its reactor: what may be posted, and what waits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rtrs_proto::heartbeat::Heartbeat;
use rtrs_proto::response::{Last, Reply};
use verbs::{Qp, RecvWr, SendOp, SendWr, SgeList};

use super::tag::{self, ConKey};
use crate::path::{Counters, Path};

/// Receives posted by one call.
pub(super) const RECV_BATCH: usize = 64;

pub(super) struct Con {
    pub key: ConKey,
    pub cid: u16,
    // Dropped before `path`, whose memory the queue pair may use.
    pub qp: Option<Box<dyn Qp>>,
    pub path: Arc<Path>,
    /// Set when its completion queue failed.
    pub cq_lost: Arc<AtomicBool>,
    pub counters: Arc<Counters>,
    /// Con 0 of a path that is up.
    pub heartbeat: Option<Heartbeat>,
    /// Requests handed up and not yet answered.
    pub inflight: u32,
    /// The queue pair is lost or given up: answers are dropped.
    pub closing: bool,
    /// Its failure has been reported.
    pub reported: bool,
    /// A refused request of it has been logged; further ones are not news.
    pub warned: bool,
    /// On the lane's list of connections with something to post.
    pub dirty: bool,
    /// Receives consumed and not yet replaced.
    pub recvs_due: u32,
    sends: Vec<SendWr>,
    /// Answers that found the send queue full, with their buffer ids.
    waiting: VecDeque<(Reply, u16)>,
    sq_free: u32,
    sq_size: u32,
    unsignaled: u32,
    signal_every: u32,
    /// Draining, and the send queue was full when a last signal was wanted.
    tail_due: bool,
    recv_template: Box<[RecvWr; RECV_BATCH]>,
}

/// A connection's queue pair broke, in words.
pub(super) type Broken = String;

impl Con {
    pub fn new(
        key: ConKey,
        cid: u16,
        path: Arc<Path>,
        qp: Box<dyn Qp>,
        sq_size: u32,
        cq_lost: Arc<AtomicBool>,
    ) -> Self {
        let recv = RecvWr { wr_id: tag::recv(key), sges: SgeList::EMPTY };
        Self {
            key,
            cid,
            counters: path.add_counters(),
            path,
            cq_lost,
            qp: Some(qp),
            heartbeat: None,
            inflight: 0,
            closing: false,
            reported: false,
            warned: false,
            dirty: false,
            recvs_due: 0,
            sends: Vec::with_capacity(sq_size as usize),
            waiting: VecDeque::with_capacity(16),
            sq_free: sq_size,
            sq_size,
            unsignaled: 0,
            // At least four signals per queue length, so that the queue never stalls behind an unsignaled tail.
            signal_every: (sq_size / 4).clamp(1, 64),
            tail_due: false,
            recv_template: Box::new([recv; RECV_BATCH]),
        }
    }

    /// Posts what must be there before the connection is accepted: `n` empty receives, after the INFO_REQ buffer.
    pub fn post_first_receives(&mut self, n: u32) -> Result<(), Broken> {
        if self.cid == 0 {
            let sge = self.path.info_req_sge().ok_or("no room for INFO_REQ")?;
            let info = RecvWr { wr_id: tag::info_recv(self.key), sges: SgeList::one(sge) };
            self.qp_mut()?.post_recv(&[info]).map_err(|e| e.to_string())?;
        }
        self.recvs_due += n;
        self.post_receives()
    }

    fn qp_mut(&mut self) -> Result<&mut Box<dyn Qp>, Broken> {
        self.qp.as_mut().ok_or_else(|| "queue pair is gone".into())
    }

    fn post_receives(&mut self) -> Result<(), Broken> {
        while self.recvs_due > 0 {
            let n = (self.recvs_due as usize).min(RECV_BATCH);
            let Some(qp) = &mut self.qp else { return Ok(()) };
            qp.post_recv(&self.recv_template[..n]).map_err(|e| e.to_string())?;
            self.recvs_due -= n as u32;
        }
        Ok(())
    }

    /// Everything due goes out: receives first, so that an answer never overtakes the receive for the next request.
    pub fn post(&mut self) -> Result<(), Broken> {
        self.dirty = false;
        if self.closing {
            self.sends.clear();
            return Ok(());
        }
        self.post_receives()?;
        if self.sends.is_empty() {
            return Ok(());
        }
        let Some(qp) = &mut self.qp else { return Ok(()) };
        let result = qp.post_send(&self.sends).map_err(|e| e.to_string());
        self.sends.clear();
        result
    }

    /// Nothing is queued here or on the wire, as far as signals tell.
    pub fn is_drained(&self) -> bool {
        self.inflight == 0 && self.sends.is_empty() && self.waiting.is_empty() && self.sq_free == self.sq_size
    }

    /// A signaled request completed: it retires `n` entries of the send queue.
    pub fn retire(&mut self, n: u32) {
        self.sq_free = (self.sq_free + n).min(self.sq_size);
        self.push_tail();
        while let Some((reply, id)) = self.waiting.front().copied() {
            if !self.has_room(&reply) {
                return;
            }
            self.waiting.pop_front();
            self.push_reply(&reply, id);
        }
    }

    fn has_room(&self, reply: &Reply) -> bool {
        // One more for the window bind that precedes a rotating key's message.
        self.sq_free as usize > reply.wr_count()
    }

    /// Queues the answer to buffer `id`, behind earlier ones if the send queue is full.
    ///
    /// # Errors
    /// More answers wait than an honest client has requests: it posts no receives but goes on asking.
    pub fn reply(&mut self, reply: Reply, id: u16) -> Result<(), Broken> {
        if self.waiting.is_empty() && self.has_room(&reply) {
            self.push_reply(&reply, id);
        } else if self.waiting.len() < self.path.geometry.queue_depth() as usize {
            self.waiting.push_back((reply, id));
        } else {
            return Err("the client does not take its answers".into());
        }
        Ok(())
    }

    fn push_reply(&mut self, reply: &Reply, id: u16) {
        let data =
            reply.data.and_then(|d| self.path.chunk_sge(id, d.len.get()).map(|sge| (d, SgeList::one(sge))));
        let mut last_op = SendOp::WriteImm { addr: 0, rkey: 0, imm: reply.imm };
        let mut last_sges = SgeList::EMPTY;
        match (data, reply.last) {
            (Some((d, sges)), Last::WriteDataImm) => {
                last_op = SendOp::WriteImm { addr: d.addr.get(), rkey: d.key.get(), imm: reply.imm };
                last_sges = sges;
            }
            (Some((d, sges)), _) => self.push(SendOp::Write { addr: d.addr.get(), rkey: d.key.get() }, sges),
            (None, _) => {}
        }
        if let Some(key) = reply.inval {
            self.push(SendOp::SendInvalidate(key), SgeList::EMPTY);
        }
        if reply.last == Last::SendRkeyImm {
            last_op = SendOp::SendImm(reply.imm);
            last_sges = self.renew_key(id);
        }
        self.push(last_op, last_sges);
    }

    /// Gives chunk `id` its next key, and stages the message that tells the client.
    fn renew_key(&mut self, id: u16) -> SgeList {
        let rkey = self.bind(id, true).unwrap_or(0);
        let sge = self.path.stage_rkey_rsp(id, &zerocopy::transmute!(Reply::rkey_rsp(id, rkey)));
        sge.map_or(SgeList::EMPTY, SgeList::one)
    }

    /// Binds the window of chunk `id` (`open`), or leaves it without a valid key. Only while keys rotate.
    pub fn bind(&mut self, id: u16, open: bool) -> Option<u32> {
        let Self { path, qp, .. } = self;
        let qp = qp.as_mut()?;
        let bound = path.with_window(id, |window, mr, offset, len| {
            qp.bind_window(window, mr, offset, if open { len } else { 0 })
        })?;
        let key = bound
            .inspect_err(|error| tracing::warn!(peer = %path.peer, %error, id, "a key could not be changed"))
            .ok()?;
        self.sq_free = self.sq_free.saturating_sub(1);
        self.unsignaled += 1;
        Some(key)
    }

    /// Queues one work request; the caller has seen to it that there is room.
    pub fn push(&mut self, op: SendOp, sges: SgeList) {
        self.sq_free = self.sq_free.saturating_sub(1);
        self.unsignaled += 1;
        let signaled = self.unsignaled >= self.signal_every;
        let retires = if signaled { std::mem::take(&mut self.unsignaled) } else { 0 };
        self.sends.push(SendWr { wr_id: tag::send(self.key, retires), op, sges, signaled });
    }

    /// From now on every work request is signaled, so that [`Con::is_drained`] becomes true.
    pub fn start_draining(&mut self) {
        self.signal_every = 1;
        self.tail_due = self.unsignaled > 0 && !self.closing;
        self.push_tail();
    }

    /// Signals what went out unsignaled, as nothing else may follow: by a write of no bytes and without immediate,
    /// which the peer's software never sees (IBTA C9-88: its address and key are not looked at).
    fn push_tail(&mut self) {
        if self.tail_due && self.sq_free > 0 {
            self.tail_due = false;
            self.push(SendOp::Write { addr: 0, rkey: 0 }, SgeList::EMPTY);
        }
    }

    /// Room for one message outside of replies (heartbeats); keeps some for replies.
    pub fn can_beat(&self) -> bool {
        !self.closing && self.sq_free > 2
    }

    /// Gives up: waiting answers are dropped.
    pub fn close(&mut self) {
        self.closing = true;
        self.heartbeat = None;
        self.waiting.clear();
        self.sends.clear();
    }

    /// Sends INFO_RSP, the first message of the server.
    pub fn send_info_rsp(&mut self, message: &[u8]) -> Result<(), Broken> {
        let sge = self.path.stage_info_rsp(message).ok_or("INFO_RSP does not fit its buffer")?;
        self.push(SendOp::Send, SgeList::one(sge));
        Ok(())
    }
}
