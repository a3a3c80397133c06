//! Answers and connections of a lane: what the upper layer may touch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rtrs_proto::errno::Errno;
use rtrs_proto::heartbeat::Hb;
use rtrs_proto::imm;
use rtrs_proto::request::Refused;
use rtrs_proto::response::{Keys, plan, plan_refusal};
use verbs::{SendOp, SgeList};

use super::con::Con;
use super::requests::Requests;
use super::tag::ConKey;
use super::{Held, Reports};
use crate::path::Path;
use crate::upper::ReqId;

/// Everything of a lane except the upper layer, which gets it as argument.
pub struct Io {
    pub(super) cons: Vec<Option<Con>>,
    pub(super) generations: Vec<u32>,
    pub(super) reqs: Requests,
    /// Connections with something to post.
    pub(super) dirty: Vec<u32>,
    /// Connections to look at after this turn: closing ones, draining ones.
    pub(super) lingering: Vec<u32>,
    pub(super) reports: Arc<dyn Reports>,
    /// Origin of the heartbeat machines' clock.
    pub(super) epoch: Instant,
    pub(super) next_beat: Option<Instant>,
}

impl Io {
    pub(super) fn new(reports: Arc<dyn Reports>, epoch: Instant) -> Self {
        Self {
            cons: Vec::new(),
            generations: Vec::new(),
            reqs: Requests::default(),
            dirty: Vec::new(),
            lingering: Vec::new(),
            reports,
            epoch,
            next_beat: None,
        }
    }

    pub(super) fn con(&mut self, key: ConKey) -> Option<&mut Con> {
        self.cons.get_mut(key.index as usize)?.as_mut().filter(|c| c.key == key)
    }

    pub(super) fn free_key(&mut self) -> ConKey {
        let index = self.cons.iter().position(Option::is_none).unwrap_or_else(|| {
            self.cons.push(None);
            self.generations.push(0);
            self.cons.len() - 1
        });
        self.generations[index] = (self.generations[index] + 1) & 0xff_ffff;
        ConKey { index: index as u32, generation: self.generations[index] }
    }

    pub(super) fn mark(&mut self, key: ConKey) {
        let Some(con) = self.con(key) else { return };
        if !con.dirty {
            con.dirty = true;
            self.dirty.push(key.index);
        }
    }

    pub(super) fn linger(&mut self, index: u32) {
        if !self.lingering.contains(&index) {
            self.lingering.push(index);
        }
    }

    /// Answers request `req`, exactly once: `Ok` sends the first bytes of its data room if it is a read.
    ///
    /// The client may reuse the buffer at once; the caller must not touch its memory any more.
    pub fn reply(&mut self, req: ReqId, result: Result<(), Errno>) {
        let (key, request) = self.reqs.remove(req);
        let Some(con) = self.con(key) else { return };
        con.inflight -= 1;
        // Before the answer is posted: the client may send the next request with this id right after it.
        con.path.session.release(request.id);
        if con.closing {
            return;
        }
        let answer = plan(con.path.policy, &request, result);
        match con.reply(answer, request.id) {
            Ok(()) => self.mark(key),
            Err(why) => self.broken(key, &why),
        }
    }

    /// As [`Io::reply`] with `message` as data; EMSGSIZE if the client's room for it is too small.
    pub fn reply_message(&mut self, req: ReqId, message: &[u8]) {
        let (key, request) = self.reqs.peek(req);
        let Some(con) = self.con(key) else { return self.reply(req, Err(Errno::ECONNRESET)) };
        let fits = message.len() <= request.data_len as usize && con.path.copy_in(request.id, message);
        self.reply(req, if fits { Ok(()) } else { Err(Errno::EMSGSIZE) });
    }

    /// The path that request `req` came by, and with it its session and addresses.
    pub fn path(&mut self, req: ReqId) -> Option<&Arc<Path>> {
        let (key, _) = self.reqs.peek(req);
        self.con(key).map(|c| &c.path)
    }

    pub(super) fn refuse(&mut self, key: ConKey, id: u16, refused: &Refused, errno: Errno) {
        let Some(con) = self.con(key) else { return };
        if std::mem::replace(&mut con.warned, true) {
            tracing::debug!(peer = %con.path.peer, id, %refused, %errno, "request refused");
        } else {
            tracing::warn!(peer = %con.path.peer, id, %refused, %errno, "request refused; later ones show at DEBUG");
        }
        let policy = con.path.policy;
        if policy.keys == Keys::Rotating && con.path.session.acquire(id, con.path.tag).is_err() {
            return self.broken(key, "malformed request on a buffer in use");
        }
        let rotating = policy.keys == Keys::Rotating;
        let answer = plan_refusal(policy, id, refused, errno);
        let Some(con) = self.con(key) else { return };
        if rotating {
            con.path.session.release(id);
        }
        match con.reply(answer, id) {
            Ok(()) => self.mark(key),
            Err(why) => self.broken(key, &why),
        }
    }

    /// Reports the first failure of a connection.
    pub(super) fn broken(&mut self, key: ConKey, why: &str) {
        let Some(con) = self.con(key) else { return };
        if con.reported {
            return;
        }
        con.reported = true;
        let (tag, why) = (con.path.tag, format!("con {}: {why}", con.cid));
        self.reports.path_broken(tag, why);
    }

    /// Reports every connection on the completion queue with this flag.
    pub(super) fn broken_on(&mut self, lost: &Arc<AtomicBool>, why: &str) {
        let on_it = self.cons.iter().flatten().filter(|c| Arc::ptr_eq(&c.cq_lost, lost));
        let keys: Vec<ConKey> = on_it.map(|c| c.key).collect();
        for key in keys {
            self.broken(key, why);
        }
    }

    pub(super) fn hb_acked(&mut self, key: ConKey, now: Instant) {
        let now = nanos(now, self.epoch);
        let Some(con) = self.con(key) else { return };
        let Some(hb) = &mut con.heartbeat else { return };
        hb.on_ack(now);
        con.path.latency_ns.store(hb.latency_ns().unwrap_or(0), Ordering::Relaxed);
    }

    /// Ticks the heartbeats that are due.
    pub(super) fn beat(&mut self, now: Instant) {
        if self.next_beat.is_none_or(|due| due > now) {
            return;
        }
        let t = nanos(now, self.epoch);
        for i in 0..self.cons.len() {
            let Some(con) = &mut self.cons[i] else { continue };
            let Some(hb) = &mut con.heartbeat else { continue };
            if con.path.traffic.swap(false, Ordering::Relaxed) {
                hb.on_traffic();
            }
            let key = con.key;
            match hb.poll(t) {
                Hb::Nothing => {}
                Hb::SendMsg if con.can_beat() => {
                    con.push(SendOp::WriteImm { addr: 0, rkey: 0, imm: imm::HB_MSG }, SgeList::EMPTY);
                    self.mark(key);
                }
                Hb::SendMsg => {}
                Hb::Dead => self.broken(key, "no heartbeat from the client"),
            }
        }
        self.find_next_beat();
    }

    /// See [`Heartbeat::probe`]; `key` is con 0 of a path that is up, or was.
    pub(super) fn probe(&mut self, key: ConKey, now: Instant, patience: Duration) {
        let t = nanos(now, self.epoch);
        if let Some(heartbeat) = self.con(key).and_then(|c| c.heartbeat.as_mut()) {
            heartbeat.probe(t, patience.as_nanos() as u64);
            self.find_next_beat();
        }
    }

    pub(super) fn find_next_beat(&mut self) {
        let beats = self.cons.iter().flatten().filter_map(|c| c.heartbeat.as_ref()?.deadline());
        self.next_beat = beats.min().map(|ns| self.epoch + Duration::from_nanos(ns));
    }

    /// Posts what is due on every dirty connection.
    pub(super) fn post(&mut self) {
        for i in 0..self.dirty.len() {
            let index = self.dirty[i] as usize;
            let Some(con) = &mut self.cons[index] else { continue };
            let key = con.key;
            if let Err(why) = con.post() {
                self.broken(key, &why);
            }
        }
        self.dirty.clear();
    }

    /// Lets go of closed connections, and reports drained ones.
    pub(super) fn settle(&mut self, held: &[Held]) {
        let mut i = 0;
        while i < self.lingering.len() {
            let index = self.lingering[i] as usize;
            let done = match &mut self.cons[index] {
                None => true,
                Some(con) if con.closing => con.inflight == 0,
                Some(con) => con.is_drained() && !held.iter().any(|h| h.con == con.key),
            };
            if !done {
                i += 1;
                continue;
            }
            self.lingering.swap_remove(i);
            self.finish(index);
        }
    }

    pub(super) fn finish(&mut self, index: usize) {
        let Some(con) = &mut self.cons[index] else { return };
        let (tag, cid) = (con.path.tag, con.cid);
        if !con.closing {
            return self.reports.con_drained(tag, cid);
        }
        // The queue pair goes before the memory that it may still be using.
        con.qp = None;
        let depth = con.path.geometry.queue_depth() as usize;
        self.reqs.withdraw(depth);
        self.cons[index] = None;
        self.find_next_beat();
        self.reports.con_closed(tag, cid);
    }
}

pub(super) fn nanos(now: Instant, epoch: Instant) -> u64 {
    now.saturating_duration_since(epoch).as_nanos() as u64
}
