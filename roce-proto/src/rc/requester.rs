//! The sending half: cuts send requests into packets, repeats what was lost, completes what was acknowledged.
//!
//! Packets are numbered by a 64-bit `seq` whose low 24 bits are the PSN, so that only the edge to the wire knows of
//! the wrap. `una <= next <= sent`: oldest unacknowledged, next to send, one past the newest ever sent. Going back is
//! `next = una`. Every request knows the seqs of its packets from the start, and the costs (bytes with overhead) before
//! it, so that what is in flight is a subtraction.

use super::config::{Config, MAX_MESSAGE, MAX_READS};
use super::ring::Ring;
use super::types::{Completion, Op, Outgoing, Payload, PostError, SendRequest, Status};
use super::window::{MAX_PSNS, PACKET_OVERHEAD, Rtt, Window};
use crate::{Counter, Counters, Headers, Nanos, Opcode, Psn, Reth};

/// A timer that is not running.
pub(super) const NEVER: Nanos = Nanos::MAX;

/// A posted request. It has the packets `first..end`.
#[derive(Clone, Copy)]
struct Wqe<S> {
    first: u64,
    end: u64,
    /// Cost of everything posted before it.
    cost: u64,
    op: Op,
    len: u32,
    signaled: bool,
    data: S,
}

impl<S> Wqe<S> {
    fn is_read(&self) -> bool {
        matches!(self.op, Op::Read { .. })
    }

    /// Offset of the packet `seq`, which must not be before the request's first.
    fn offset(&self, seq: u64, mtu_shift: u32) -> u32 {
        ((seq - self.first) << mtu_shift).min(u64::from(self.len)) as u32
    }

    /// Cost of everything before the packet `seq`.
    fn cost_before(&self, seq: u64, mtu_shift: u32) -> u64 {
        self.cost + u64::from(self.offset(seq, mtu_shift)) + (seq - self.first) * u64::from(PACKET_OVERHEAD)
    }
}

/// READ requests on the way: where each ends. A repeated request must end where the first one did, because the peer
/// recognises it by that. Numbers of requests only grow; `una <= next <= sent` as for packets.
struct ReadRequests {
    ends: [u64; MAX_READS as usize],
    una: u32,
    next: u32,
    sent: u32,
    limit: u32,
}

impl ReadRequests {
    fn slot(&mut self, n: u32) -> &mut u64 {
        &mut self.ends[n as usize % usize::from(MAX_READS)]
    }

    /// Everything before `una` has arrived.
    fn arrived(&mut self, una: u64) {
        while self.una != self.sent && *self.slot(self.una) <= una {
            self.una = self.una.wrapping_add(1);
            if self.next.wrapping_sub(self.una) > u32::from(MAX_READS) {
                self.next = self.una;
            }
        }
    }
}

/// What a response did.
pub(super) enum Outcome {
    /// Nothing that others need to know.
    Fine,
    /// The queue pair breaks; the oldest request fails with this.
    Fatal(Status),
}

pub(super) struct Requester<S> {
    queue: Ring<Wqe<S>>,
    /// Number of the request that `next` belongs to.
    cursor: u32,
    mtu_shift: u32,
    dest_qpn: u32,
    una: u64,
    next: u64,
    sent: u64,
    /// Packets before this one are repeats.
    repeat_until: u64,
    /// First packet of the next posted request, and the cost of everything before it.
    post_seq: u64,
    post_cost: u64,
    una_cost: u64,
    next_cost: u64,
    /// Window or READ limit stops sending until a response comes.
    blocked: bool,
    /// Packets since an acknowledgement was asked for, and after how many to ask.
    unasked: u32,
    ack_interval: u32,
    reads: ReadRequests,
    window: Window,
    rtt: Rtt,
    /// A packet whose round trip is measured, and when it left.
    sample: Option<(u64, Nanos)>,
    timeout_at: Nanos,
    /// Nothing may be sent before: the peer had no receive. 0 when not waiting.
    rnr_until: Nanos,
    /// Where the last recovery started, and until when complaints about the same packet are ignored.
    gap: u64,
    gap_until: Nanos,
    /// Losses before this packet are one event for the window.
    window_cut_until: u64,
    /// Recoveries without progress, and when there was progress.
    tries: u32,
    progress_at: Nanos,
    retry: u32,
    patience: Nanos,
    rnr_retry: u8,
    rnr_left: u8,
}

impl<S: Copy> Requester<S> {
    pub(super) fn new(depth: u32) -> Self {
        let config = Config::new(1024, 0, Psn::default(), Psn::default());
        let mut requester = Self {
            queue: Ring::new(depth),
            cursor: 0,
            mtu_shift: 0,
            dest_qpn: 0,
            una: 0,
            next: 0,
            sent: 0,
            repeat_until: 0,
            post_seq: 0,
            post_cost: 0,
            una_cost: 0,
            next_cost: 0,
            blocked: false,
            unasked: 0,
            ack_interval: 1,
            reads: ReadRequests { ends: [0; MAX_READS as usize], una: 0, next: 0, sent: 0, limit: 0 },
            window: Window::new(&config),
            rtt: Rtt::new(&config),
            sample: None,
            timeout_at: NEVER,
            rnr_until: 0,
            gap: 0,
            gap_until: 0,
            window_cut_until: 0,
            tries: 0,
            progress_at: 0,
            retry: 0,
            patience: 0,
            rnr_retry: 0,
            rnr_left: 0,
        };
        requester.connect(&config, 0);
        requester
    }

    /// Sets everything but the queue, which is empty.
    pub(super) fn connect(&mut self, config: &Config, now: Nanos) {
        // Far enough from 0 that seqs before the first one exist.
        let start = (1 << 24) + u64::from(config.send_psn.get());
        self.mtu_shift = config.mtu_shift();
        self.dest_qpn = config.dest_qpn;
        (self.una, self.next, self.sent, self.post_seq) = (start, start, start, start);
        self.reads.limit = u32::from(config.issue_reads.min(MAX_READS));
        self.window = Window::new(config);
        self.ack_interval = self.window.ack_interval();
        self.rtt = Rtt::new(config);
        self.progress_at = now;
        (self.retry, self.patience) = match config.give_up {
            0 => (u32::from(config.retry), (u64::from(config.retry) + 1) * 4 * config.timeout()),
            // Not at the first timeout: after a pause of this process, that one is late.
            give_up => (1, give_up),
        };
        (self.rnr_retry, self.rnr_left) = (config.rnr_retry, config.rnr_retry);
    }

    pub(super) fn post(&mut self, request: &SendRequest<S>) -> Result<(), PostError> {
        if request.len > MAX_MESSAGE {
            return Err(PostError::TooLong);
        }
        let is_read = matches!(request.op, Op::Read { .. });
        if is_read && self.reads.limit == 0 {
            return Err(PostError::NoReads);
        }
        let mtu = 1u64 << self.mtu_shift;
        let packets = ((u64::from(request.len) + mtu - 1) >> self.mtu_shift).max(1);
        let wqe = Wqe {
            first: self.post_seq,
            end: self.post_seq + packets,
            cost: self.post_cost,
            op: request.op,
            len: request.len,
            signaled: request.signaled,
            data: request.data,
        };
        if !self.queue.push(wqe) {
            return Err(PostError::Full);
        }
        self.post_seq = wqe.end;
        self.post_cost += u64::from(request.len) + packets * u64::from(PACKET_OVERHEAD);
        Ok(())
    }

    pub(super) fn has_requests(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(super) fn wants_to_send(&self, now: Nanos) -> bool {
        !self.blocked && self.cursor != self.queue.tail() && now >= self.rnr_until
    }

    /// When [`Requester::on_time`] has something to do.
    pub(super) fn deadline(&self) -> Nanos {
        if self.rnr_until != 0 { self.rnr_until } else { self.timeout_at }
    }

    /// The next packet, if there is one that may go out now.
    pub(super) fn next_packet(&mut self, now: Nanos, counters: &Counters) -> Option<Outgoing<S>> {
        if !self.wants_to_send(now) {
            return None;
        }
        let wqe = *self.queue.get(self.cursor)?;
        let packet = match wqe.op {
            Op::Read { va, rkey } => self.read_request(&wqe, va, rkey),
            _ => self.data_packet(&wqe),
        };
        let (outgoing, after, cost) = match packet {
            Some(packet) => packet,
            None => {
                self.blocked = true;
                return None;
            }
        };
        self.rnr_until = 0;
        if self.next < self.repeat_until {
            counters.count(Counter::Retransmits);
        } else if self.sample.is_none() && outgoing.headers.ack_req {
            self.sample = Some((self.next, now));
        }
        if self.timeout_at == NEVER {
            self.timeout_at = now + self.rtt.timer();
            if self.next == self.sent {
                self.progress_at = now;
            }
        }
        self.unasked = if outgoing.headers.ack_req { 0 } else { self.unasked + 1 };
        self.next = after;
        self.next_cost += cost;
        self.sent = self.sent.max(after);
        if after == wqe.end {
            self.cursor = self.cursor.wrapping_add(1);
        }
        Some(outgoing)
    }

    /// A packet of a SEND or WRITE, the seq after it, and its cost; `None` if the window is closed.
    fn data_packet(&self, wqe: &Wqe<S>) -> Option<(Outgoing<S>, u64, u64)> {
        let offset = wqe.offset(self.next, self.mtu_shift);
        let len = (wqe.len - offset).min(1 << self.mtu_shift);
        let cost = u64::from(len + PACKET_OVERHEAD);
        let after = self.next + 1;
        let flight = self.next_cost + cost - self.una_cost;
        if self.next != self.una && (flight > self.window.size() || after - self.una > MAX_PSNS) {
            return None;
        }
        let (first, last) = (self.next == wqe.first, after == wqe.end);
        // Nothing may be behind this one for long: without an answer to it the window would stay closed.
        let closing = flight + self.window.packet() > self.window.size() || after - self.una >= MAX_PSNS;
        let mut headers = Headers {
            opcode: Opcode::SendMiddle,
            solicited: last && !matches!(wqe.op, Op::Write { .. }),
            ack_req: last || closing || self.unasked + 1 >= self.ack_interval,
            ..self.headers(self.next)
        };
        headers.opcode = match wqe.op {
            Op::Send => by_place(first, last, SEND, Opcode::SendLast, Opcode::SendOnly),
            Op::SendImm(_) => by_place(first, last, SEND, Opcode::SendLastImm, Opcode::SendOnlyImm),
            Op::SendInvalidate(_) => {
                by_place(first, last, SEND, Opcode::SendLastInvalidate, Opcode::SendOnlyInvalidate)
            }
            Op::Write { .. } => by_place(first, last, WRITE, Opcode::WriteLast, Opcode::WriteOnly),
            Op::WriteImm { .. } => by_place(first, last, WRITE, Opcode::WriteLastImm, Opcode::WriteOnlyImm),
            Op::Read { .. } => unreachable!("has its own function"),
        };
        match wqe.op {
            Op::SendImm(imm) if last => headers.imm = imm,
            Op::SendInvalidate(rkey) if last => headers.inv_rkey = rkey,
            Op::WriteImm { imm, .. } if last => headers.imm = imm,
            _ => {}
        }
        if let (true, Op::Write { va, rkey } | Op::WriteImm { va, rkey, .. }) = (first, wqe.op) {
            headers.reth = Reth { va, rkey, len: wqe.len };
        }
        let payload = if len == 0 { Payload::None } else { Payload::Send { data: wqe.data, offset, len } };
        Some((Outgoing { headers, payload }, after, cost))
    }

    /// A READ request for as many responses as the window has room for, the seq after them, and their cost.
    fn read_request(&mut self, wqe: &Wqe<S>, va: u64, rkey: u32) -> Option<(Outgoing<S>, u64, u64)> {
        let end = if self.reads.next != self.reads.sent {
            *self.reads.slot(self.reads.next)
        } else {
            let end = self.next + self.responses_wanted(wqe)?;
            *self.reads.slot(self.reads.sent) = end;
            self.reads.sent = self.reads.sent.wrapping_add(1);
            end
        };
        self.reads.next = self.reads.next.wrapping_add(1);
        let offset = wqe.offset(self.next, self.mtu_shift);
        let headers = Headers {
            opcode: Opcode::ReadRequest,
            ack_req: true,
            reth: Reth {
                va: va.wrapping_add(u64::from(offset)),
                rkey,
                len: wqe.offset(end, self.mtu_shift) - offset,
            },
            ..self.headers(self.next)
        };
        let cost = wqe.cost_before(end, self.mtu_shift) - wqe.cost_before(self.next, self.mtu_shift);
        Some((Outgoing { headers, payload: Payload::None }, end, cost))
    }

    /// How many responses a new READ request shall ask for; `None`: none now.
    fn responses_wanted(&self, wqe: &Wqe<S>) -> Option<u64> {
        if self.reads.sent.wrapping_sub(self.reads.una) >= self.reads.limit {
            return None;
        }
        let left = wqe.end - self.next;
        let flight = self.next_cost - self.una_cost;
        let room = (self.window.size().saturating_sub(flight) / self.window.packet())
            .min(MAX_PSNS.saturating_sub(self.next - self.una));
        // Many small requests are slower than a pause, but nothing outstanding means that nothing will make room.
        match left.min(room) {
            0 if self.next == self.una => Some(1),
            n if n == left || n >= 8 || (n > 0 && self.next == self.una) => Some(n),
            _ => None,
        }
    }

    fn headers(&self, seq: u64) -> Headers {
        Headers {
            opcode: Opcode::Acknowledge,
            solicited: false,
            ack_req: false,
            dest_qpn: self.dest_qpn,
            psn: Psn::new(seq as u32),
            reth: Reth::default(),
            aeth: crate::Aeth::default(),
            imm: 0,
            inv_rkey: 0,
        }
    }

    /// Takes back the newest packet that [`Requester::next_packet`] gave, if it is not obsolete by now.
    pub(super) fn unsent(&mut self, psn: Psn) {
        let seq = self.seq(psn);
        if seq < self.una || seq >= self.next {
            return;
        }
        if self.queue.get(self.cursor).is_none_or(|wqe| wqe.first > seq) {
            self.cursor = self.cursor.wrapping_sub(1);
        }
        let Some(wqe) = self.queue.get(self.cursor) else { return };
        self.next_cost = wqe.cost_before(seq, self.mtu_shift);
        let is_read = wqe.is_read();
        self.next = seq;
        if is_read {
            self.reads.next = self.reads.next.wrapping_sub(1);
        }
        if seq >= self.repeat_until {
            self.sent = seq;
            if is_read {
                self.reads.sent = self.reads.sent.wrapping_sub(1);
            }
        }
        if self.sample.is_some_and(|(sampled, _)| sampled >= seq) {
            self.sample = None;
        }
        if self.next == self.una {
            self.timeout_at = NEVER;
        }
        self.blocked = false;
    }

    /// The seq nearest to `una` that has this PSN.
    fn seq(&self, psn: Psn) -> u64 {
        self.una.wrapping_add_signed(i64::from(psn.since(Psn::new(self.una as u32))))
    }

    /// An acknowledgement of any kind.
    pub(super) fn acknowledge(
        &mut self,
        now: Nanos,
        headers: &Headers,
        counters: &Counters,
        sent: &mut impl FnMut(S),
    ) -> Outcome {
        let seq = self.seq(headers.psn);
        if seq < self.una || seq >= self.sent {
            counters.count(Counter::StaleResponse);
            return Outcome::Fine;
        }
        let syndrome = headers.aeth.syndrome;
        match (syndrome >> 5, syndrome & 31) {
            (0, _) => {
                if self.done_before(seq + 1, now, sent) {
                    return Outcome::Fine;
                }
                self.go_back_for_gap(now, counters)
            }
            (1, code) => {
                self.done_before(seq, now, sent);
                counters.count(Counter::RnrNakReceived);
                self.not_ready(seq, super::config::rnr_wait(code), now)
            }
            (3, 0) => {
                self.done_before(seq, now, sent);
                counters.count(Counter::SeqNakReceived);
                self.go_back_for_gap(now, counters)
            }
            (3, code @ 1..=3) => {
                self.done_before(seq, now, sent);
                Outcome::Fatal(match code {
                    1 => Status::RemoteInvalidRequest,
                    2 => Status::RemoteAccess,
                    _ => Status::RemoteOperation,
                })
            }
            _ => {
                counters.count(Counter::StaleResponse);
                Outcome::Fine
            }
        }
    }

    /// A READ response. `place` puts it at an offset of a request's memory; false if that memory refuses.
    pub(super) fn read_response(
        &mut self,
        now: Nanos,
        headers: &Headers,
        payload: &[u8],
        counters: &Counters,
        place: impl FnOnce(&S, u32) -> bool,
        sent: &mut impl FnMut(S),
    ) -> Outcome {
        let seq = self.seq(headers.psn);
        let has_aeth = headers.opcode != Opcode::ReadResponseMiddle;
        if seq < self.una || seq >= self.sent || (has_aeth && headers.aeth.syndrome >> 5 != 0) {
            counters.count(Counter::StaleResponse);
            return Outcome::Fine;
        }
        // Requests are executed in order, so this one acknowledges those before it.
        if !self.done_before(seq, now, sent) {
            return self.go_back_for_gap(now, counters);
        }
        let mtu_shift = self.mtu_shift;
        let wanted = self.queue.front().filter(|wqe| wqe.is_read() && seq >= wqe.first).map(|wqe| {
            let offset = wqe.offset(seq, mtu_shift);
            (wqe, offset, (wqe.len - offset).min(1 << mtu_shift))
        });
        let Some((wqe, offset, len)) = wanted.filter(|&(_, _, len)| len as usize == payload.len()) else {
            counters.count(Counter::StaleResponse);
            return Outcome::Fine;
        };
        if len > 0 && !place(&wqe.data, offset) {
            return Outcome::Fatal(Status::LocalProtection);
        }
        let before = self.una_cost;
        if seq + 1 == wqe.end {
            self.complete_front(sent);
        }
        self.advance(seq + 1, before, now);
        Outcome::Fine
    }

    /// The peer has executed everything before `seq`, which is at most `sent`. False if that includes a READ whose
    /// responses are missing.
    fn done_before(&mut self, seq: u64, now: Nanos, sent: &mut impl FnMut(S)) -> bool {
        if seq <= self.una {
            return true;
        }
        let (before, mut upto) = (self.una_cost, seq);
        while let Some(wqe) = self.queue.front() {
            if wqe.is_read() {
                upto = upto.min(wqe.first.max(self.una));
                break;
            }
            if wqe.end > seq {
                break;
            }
            self.complete_front(sent);
        }
        if upto > self.una {
            self.advance(upto, before, now);
        }
        upto == seq
    }

    fn complete_front(&mut self, sent: &mut impl FnMut(S)) {
        if let Some(wqe) = self.queue.pop()
            && wqe.signaled
        {
            sent(wqe.data);
        }
    }

    /// Moves `una` on: there is progress. Completed requests are already gone; `before` was `una_cost`.
    fn advance(&mut self, una: u64, before: u64, now: Nanos) {
        let flight = self.next_cost.saturating_sub(before);
        self.una = una;
        self.una_cost = match self.queue.front() {
            Some(wqe) => wqe.cost_before(una.max(wqe.first), self.mtu_shift),
            None => self.post_cost,
        };
        self.reads.arrived(una);
        if self.next <= una {
            (self.next, self.next_cost) = (una, self.una_cost);
            self.cursor = self.queue.head();
        }
        if let Some((seq, at)) = self.sample
            && una > seq
        {
            self.rtt.measured(now.saturating_sub(at));
            self.sample = None;
        }
        self.window.acked(self.una_cost - before, flight);
        self.ack_interval = self.window.ack_interval();
        self.rtt.progress();
        (self.tries, self.progress_at, self.rnr_left) = (0, now, self.rnr_retry);
        self.blocked = false;
        self.timeout_at = if self.next == una { NEVER } else { now + self.rtt.timer() };
    }

    fn go_back(&mut self) {
        self.repeat_until = self.sent;
        (self.next, self.next_cost) = (self.una, self.una_cost);
        self.cursor = self.queue.head();
        self.reads.next = self.reads.una;
        self.sample = None;
        self.unasked = 0;
        self.blocked = false;
        self.timeout_at = NEVER;
    }

    /// The packet `una` was lost. One loss causes several complaints: only the first counts.
    fn go_back_for_gap(&mut self, now: Nanos, counters: &Counters) -> Outcome {
        if self.rnr_until != 0 || (self.gap == self.una && now < self.gap_until) {
            return Outcome::Fine;
        }
        if self.gap == self.una {
            self.tries += 1;
            if self.is_exhausted(now, counters) {
                return Outcome::Fatal(Status::RetryExceeded);
            }
        }
        (self.gap, self.gap_until) = (self.una, now + self.rtt.settling());
        if self.una >= self.window_cut_until {
            self.window_cut_until = self.sent;
            self.window.lost(self.next_cost - self.una_cost);
            self.ack_interval = self.window.ack_interval();
        }
        self.go_back();
        Outcome::Fine
    }

    /// The peer had no receive for the packet `seq`.
    fn not_ready(&mut self, seq: u64, wait: Nanos, now: Nanos) -> Outcome {
        // An old one, or a READ before it has no answer yet: that comes first.
        if seq != self.una || self.rnr_until != 0 {
            return Outcome::Fine;
        }
        if self.rnr_retry < 7 {
            let Some(left) = self.rnr_left.checked_sub(1) else {
                return Outcome::Fatal(Status::RnrRetryExceeded);
            };
            self.rnr_left = left;
        }
        self.go_back();
        self.rnr_until = now + wait;
        // It answers, so it lives.
        self.progress_at = self.rnr_until;
        self.tries = 0;
        Outcome::Fine
    }

    /// The time is `now`.
    pub(super) fn on_time(&mut self, now: Nanos, counters: &Counters) -> Outcome {
        if self.rnr_until != 0 {
            if now >= self.rnr_until {
                self.rnr_until = 0;
            }
            return Outcome::Fine;
        }
        if now < self.timeout_at {
            return Outcome::Fine;
        }
        counters.count(Counter::Timeouts);
        self.tries += 1;
        if self.is_exhausted(now, counters) {
            return Outcome::Fatal(Status::RetryExceeded);
        }
        self.rtt.back_off();
        self.window.silence(self.next_cost - self.una_cost, self.tries == 1);
        self.ack_interval = self.window.ack_interval();
        self.window_cut_until = self.sent;
        (self.gap, self.gap_until) = (self.una, now + self.rtt.settling());
        self.go_back();
        Outcome::Fine
    }

    fn is_exhausted(&self, now: Nanos, counters: &Counters) -> bool {
        let exhausted = self.tries > self.retry && now.saturating_sub(self.progress_at) >= self.patience;
        if exhausted {
            counters.count(Counter::RetriesExceeded);
        }
        exhausted
    }

    /// Fails the oldest request with `status` and all others as flushed; nothing is sent any more.
    pub(super) fn flush<R>(&mut self, status: Status, out: &mut impl FnMut(Completion<S, R>)) {
        let mut status = status;
        while let Some(wqe) = self.queue.pop() {
            out(Completion::SendFailed { data: wqe.data, status });
            status = Status::Flushed;
        }
        self.cursor = self.queue.tail();
        self.timeout_at = NEVER;
        self.rnr_until = 0;
    }
}

const SEND: [Opcode; 2] = [Opcode::SendFirst, Opcode::SendMiddle];
const WRITE: [Opcode; 2] = [Opcode::WriteFirst, Opcode::WriteMiddle];

fn by_place(first: bool, last: bool, inner: [Opcode; 2], at_end: Opcode, alone: Opcode) -> Opcode {
    match (first, last) {
        (true, true) => alone,
        (false, true) => at_end,
        (true, false) => inner[0],
        (false, false) => inner[1],
    }
}
