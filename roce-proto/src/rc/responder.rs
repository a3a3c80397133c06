//! The receiving half: executes requests in order and owes answers. Checks and their order are those of IBTA 9.7.4 and
//! of Linux `rxe_resp.c`. Packets are numbered as in the requester, around `expected`.

use super::ack::{
    ACK, NAK_INVALID_REQUEST, NAK_REMOTE_ACCESS, NAK_REMOTE_OPERATION, NAK_SEQUENCE, Owed, RNR_NAK,
};
use super::config::{Config, MAX_MESSAGE};
use super::reads::Reads;
use super::ring::Ring;
use super::types::{Completion, Memory, Outgoing, Payload, PostError, ReceivedKind, Status};
use crate::{Aeth, Counter, Counters, Headers, Nanos, Opcode, Psn, Reth};

/// A posted receive.
#[derive(Clone, Copy)]
struct Receive<R> {
    data: R,
    capacity: u32,
}

/// The message of which packets have been executed, but not yet the last one.
#[derive(Clone, Copy)]
enum Inbound {
    None,
    /// Into the oldest receive, up to here.
    Send {
        offset: u32,
    },
    /// What remains to be written, and the bytes of the whole message.
    Write {
        rest: Reth,
        total: u32,
    },
}

/// What a request packet is a part of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Send,
    Write,
    Read,
    Unsupported,
}

/// Kind, first of its message, last of its message.
fn shape(opcode: Opcode) -> (Kind, bool, bool) {
    use Opcode as O;
    match opcode {
        O::SendFirst => (Kind::Send, true, false),
        O::SendMiddle => (Kind::Send, false, false),
        O::SendLast | O::SendLastImm | O::SendLastInvalidate => (Kind::Send, false, true),
        O::SendOnly | O::SendOnlyImm | O::SendOnlyInvalidate => (Kind::Send, true, true),
        O::WriteFirst => (Kind::Write, true, false),
        O::WriteMiddle => (Kind::Write, false, false),
        O::WriteLast | O::WriteLastImm => (Kind::Write, false, true),
        O::WriteOnly | O::WriteOnlyImm => (Kind::Write, true, true),
        O::ReadRequest => (Kind::Read, true, true),
        _ => (Kind::Unsupported, true, true),
    }
}

fn has_imm(opcode: Opcode) -> bool {
    use Opcode as O;
    matches!(opcode, O::SendLastImm | O::SendOnlyImm | O::WriteLastImm | O::WriteOnlyImm)
}

fn has_invalidate(opcode: Opcode) -> bool {
    matches!(opcode, Opcode::SendLastInvalidate | Opcode::SendOnlyInvalidate)
}

/// Why a request was not executed.
enum Refusal {
    /// For want of a receive: may come again.
    NotReady,
    /// Breaks the queue pair: NAK syndrome, and status of the receive that the message had, if any.
    Fatal(u8, Status),
}

const INVALID: Refusal = Refusal::Fatal(NAK_INVALID_REQUEST, Status::RemoteInvalidRequest);
const ACCESS: Refusal = Refusal::Fatal(NAK_REMOTE_ACCESS, Status::RemoteAccess);

pub(super) struct Responder<R> {
    queue: Ring<Receive<R>>,
    mtu_shift: u32,
    dest_qpn: u32,
    expected: u64,
    msn: u32,
    inbound: Inbound,
    /// Packets from ahead were complained about, or the expected one was sent away: it is to come first.
    complained: bool,
    owed: Owed,
    reads: Reads,
    serves_reads: bool,
    min_rnr_timer: u8,
    heard: bool,
}

impl<R: Copy> Responder<R> {
    pub(super) fn new(depth: u32) -> Self {
        Self {
            queue: Ring::new(depth),
            mtu_shift: 8,
            dest_qpn: 0,
            expected: 1 << 24,
            msn: 0,
            inbound: Inbound::None,
            complained: false,
            owed: Owed::new(0),
            reads: Reads::new(0),
            serves_reads: false,
            min_rnr_timer: 0,
            heard: false,
        }
    }

    /// Sets everything but the queue.
    pub(super) fn connect(&mut self, config: &Config) {
        self.mtu_shift = config.mtu_shift();
        self.dest_qpn = config.dest_qpn;
        // Far enough from 0 that seqs before the first one exist.
        self.expected = (1 << 24) + u64::from(config.recv_psn.get());
        self.owed = Owed::new(config.ack_delay);
        self.reads = Reads::new(config.serve_reads);
        self.serves_reads = config.serve_reads > 0;
        self.min_rnr_timer = config.min_rnr_timer & 31;
    }

    pub(super) fn set_min_rnr_timer(&mut self, code: u8) {
        self.min_rnr_timer = code & 31;
    }

    pub(super) fn post(&mut self, data: R, capacity: u32) -> Result<(), PostError> {
        if self.queue.push(Receive { data, capacity }) { Ok(()) } else { Err(PostError::Full) }
    }

    pub(super) fn has_receives(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(super) fn heard(&self) -> bool {
        self.heard
    }

    pub(super) fn hurry(&mut self) {
        self.owed.hurry();
    }

    pub(super) fn wants_to_send(&self, now: Nanos) -> bool {
        self.reads.is_pending() || self.owed.due() <= now
    }

    /// When an acknowledgement becomes due.
    pub(super) fn deadline(&self) -> Nanos {
        self.owed.due()
    }

    /// A request packet. A status: the queue pair breaks, and the receive that [`Responder::flush`] gives first fails
    /// with it.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn request<S>(
        &mut self,
        now: Nanos,
        headers: &Headers,
        payload: &[u8],
        pad: u8,
        memory: &mut impl Memory<S, R>,
        counters: &Counters,
        out: &mut impl FnMut(Completion<S, R>),
    ) -> Option<Status> {
        let ahead = headers.psn.since(Psn::new(self.expected as u32));
        if ahead > 0 {
            counters.count(Counter::OutOfOrder);
            if !self.complained {
                self.complained = true;
                self.owed.nak(NAK_SEQUENCE, self.expected);
            }
            return None;
        }
        if ahead < 0 {
            let seq = self.expected.wrapping_add_signed(i64::from(ahead));
            self.duplicate(seq, headers, memory, counters);
            return None;
        }
        self.complained = false;
        let (kind, first, last) = shape(headers.opcode);
        let executed = match (kind, self.inbound) {
            (Kind::Send, Inbound::None) if first => self.send(0, last, headers, payload, memory, out),
            (Kind::Send, Inbound::Send { offset }) if !first => {
                self.send(offset, last, headers, payload, memory, out)
            }
            (Kind::Write, Inbound::None) if first => {
                self.write((headers.reth, headers.reth.len), (true, last), headers, payload, pad, memory, out)
            }
            (Kind::Write, Inbound::Write { rest, total }) if !first => {
                self.write((rest, total), (false, last), headers, payload, pad, memory, out)
            }
            (Kind::Read, Inbound::None) => self.read(headers, payload, memory),
            _ => Err(INVALID),
        };
        match executed {
            Ok(()) => {
                self.acknowledge(now, headers, kind, last);
                None
            }
            Err(Refusal::NotReady) => {
                counters.count(Counter::NotReady);
                self.complained = true;
                self.owed.nak(RNR_NAK | self.min_rnr_timer, self.expected);
                None
            }
            Err(Refusal::Fatal(syndrome, status)) => {
                let access = syndrome == NAK_REMOTE_ACCESS;
                counters.count(if access { Counter::AccessError } else { Counter::InvalidRequest });
                self.owed.nak(syndrome, self.expected);
                let has_receive = kind == Kind::Send || has_imm(headers.opcode);
                let had_receive = matches!(self.inbound, Inbound::Send { .. });
                Some(if has_receive || had_receive { status } else { Status::Flushed })
            }
        }
    }

    /// The expected packet was executed.
    fn acknowledge(&mut self, now: Nanos, headers: &Headers, kind: Kind, last: bool) {
        self.heard = true;
        self.owed.executed();
        if last {
            self.msn = (self.msn + 1) & (Psn::MODULUS - 1);
        }
        if kind == Kind::Read {
            let packets = (u64::from(headers.reth.len) + (1 << self.mtu_shift) - 1) >> self.mtu_shift;
            let end = self.expected + packets.max(1);
            self.reads.push(self.expected, end, headers.reth, self.msn);
            self.expected = end;
            return;
        }
        self.expected += 1;
        if headers.ack_req {
            if last { self.owed.message(now) } else { self.owed.now() }
        }
    }

    /// An executed packet came again: it is answered again, not executed again.
    fn duplicate<S>(
        &mut self,
        seq: u64,
        headers: &Headers,
        memory: &mut impl Memory<S, R>,
        counters: &Counters,
    ) {
        counters.count(Counter::Duplicate);
        if !self.heard {
            // From before this connection: there is nothing to acknowledge.
            return;
        }
        if shape(headers.opcode).0 != Kind::Read {
            self.owed.now();
        } else if headers.reth.len == 0
            || memory.check(headers.reth.rkey, headers.reth.va, headers.reth.len, false).is_ok()
        {
            self.reads.again(seq, &headers.reth, self.mtu_shift);
        }
    }

    /// A packet of a SEND that belongs at `offset`.
    fn send<S>(
        &mut self,
        offset: u32,
        last: bool,
        headers: &Headers,
        payload: &[u8],
        memory: &mut impl Memory<S, R>,
        out: &mut impl FnMut(Completion<S, R>),
    ) -> Result<(), Refusal> {
        let Some(receive) = self.queue.front() else { return Err(Refusal::NotReady) };
        let (mtu, only) = (1 << self.mtu_shift, matches!(self.inbound, Inbound::None));
        let fits =
            if last { payload.len() <= mtu && (only || !payload.is_empty()) } else { payload.len() == mtu };
        if !fits {
            return Err(INVALID);
        }
        let end = offset + payload.len() as u32;
        if end > receive.capacity {
            return Err(Refusal::Fatal(NAK_INVALID_REQUEST, Status::LocalLength));
        }
        if !payload.is_empty() && memory.receive(&receive.data, offset, payload).is_err() {
            return Err(Refusal::Fatal(NAK_REMOTE_OPERATION, Status::LocalProtection));
        }
        if !last {
            self.inbound = Inbound::Send { offset: end };
            return Ok(());
        }
        let invalidated = has_invalidate(headers.opcode).then_some(headers.inv_rkey);
        if let Some(rkey) = invalidated
            && memory.invalidate(rkey).is_err()
        {
            return Err(ACCESS);
        }
        self.received(ReceivedKind::Recv, end, headers, invalidated, out);
        Ok(())
    }

    /// A packet of a WRITE, of which `rest` remains with this packet, and which is (first, last) of its message.
    #[allow(clippy::too_many_arguments)]
    fn write<S>(
        &mut self,
        (rest, total): (Reth, u32),
        (first, last): (bool, bool),
        headers: &Headers,
        payload: &[u8],
        pad: u8,
        memory: &mut impl Memory<S, R>,
        out: &mut impl FnMut(Completion<S, R>),
    ) -> Result<(), Refusal> {
        let takes_receive = has_imm(headers.opcode);
        if takes_receive && self.queue.is_empty() {
            return Err(Refusal::NotReady);
        }
        let (mtu, len) = (1 << self.mtu_shift, payload.len() as u32);
        let fits = if last {
            len == rest.len && len <= mtu && (first || len > 0)
        } else {
            len == mtu && rest.len > mtu && total <= MAX_MESSAGE
        };
        if !fits || u32::from(pad) != len.wrapping_neg() & 3 {
            return Err(INVALID);
        }
        // The only packet of a message is checked as a whole when it is placed.
        if first && !last && memory.check(rest.rkey, rest.va, rest.len, true).is_err() {
            return Err(ACCESS);
        }
        if len > 0 && memory.write(rest.rkey, rest.va, payload).is_err() {
            return Err(ACCESS);
        }
        if !last {
            let rest = Reth { va: rest.va.wrapping_add(u64::from(len)), len: rest.len - len, ..rest };
            self.inbound = Inbound::Write { rest, total };
        } else if takes_receive {
            self.received(ReceivedKind::RecvWriteImm, total, headers, None, out);
        } else {
            self.inbound = Inbound::None;
        }
        Ok(())
    }

    fn read<S>(
        &mut self,
        headers: &Headers,
        payload: &[u8],
        memory: &mut impl Memory<S, R>,
    ) -> Result<(), Refusal> {
        let Reth { va, rkey, len } = headers.reth;
        if !self.serves_reads || self.reads.is_full() || len > MAX_MESSAGE || !payload.is_empty() {
            return Err(INVALID);
        }
        if len > 0 && memory.check(rkey, va, len, false).is_err() {
            return Err(ACCESS);
        }
        Ok(())
    }

    /// A message is complete and takes the oldest receive.
    fn received<S>(
        &mut self,
        kind: ReceivedKind,
        len: u32,
        headers: &Headers,
        invalidated: Option<u32>,
        out: &mut impl FnMut(Completion<S, R>),
    ) {
        self.inbound = Inbound::None;
        let Some(receive) = self.queue.pop() else { return };
        out(Completion::Received {
            data: receive.data,
            kind,
            len,
            imm: has_imm(headers.opcode).then_some(headers.imm),
            invalidated,
            solicited: headers.solicited,
        });
    }

    /// The answer that is due, if any: READ responses first, for an ACK or NAK claims that all before it was answered.
    pub(super) fn next_packet<S>(&mut self, now: Nanos) -> Option<Outgoing<S>> {
        if let Some(response) = self.reads.next(self.mtu_shift) {
            if response.seq + 1 == self.expected {
                self.owed.told();
            }
            let opcode = match (response.first, response.last) {
                (true, true) => Opcode::ReadResponseOnly,
                (true, false) => Opcode::ReadResponseFirst,
                (false, false) => Opcode::ReadResponseMiddle,
                (false, true) => Opcode::ReadResponseLast,
            };
            let aeth = match opcode {
                Opcode::ReadResponseMiddle => Aeth::default(),
                _ => Aeth { syndrome: ACK, msn: response.msn },
            };
            let payload = match response.len {
                0 => Payload::None,
                len => Payload::Memory { rkey: response.rkey, va: response.va, len },
            };
            return Some(Outgoing { headers: self.headers(opcode, response.seq, aeth), payload });
        }
        if self.owed.due() > now {
            return None;
        }
        let (syndrome, seq) = self.owed.take().unwrap_or((ACK, self.expected - 1));
        let aeth = Aeth { syndrome, msn: self.msn };
        Some(Outgoing { headers: self.headers(Opcode::Acknowledge, seq, aeth), payload: Payload::None })
    }

    fn headers(&self, opcode: Opcode, seq: u64, aeth: Aeth) -> Headers {
        Headers {
            opcode,
            solicited: false,
            ack_req: false,
            dest_qpn: self.dest_qpn,
            psn: Psn::new(seq as u32),
            reth: Reth::default(),
            aeth,
            imm: 0,
            inv_rkey: 0,
        }
    }

    /// The seq nearest to `expected` that has this PSN.
    fn seq(&self, psn: Psn) -> u64 {
        self.expected.wrapping_add_signed(i64::from(psn.since(Psn::new(self.expected as u32))))
    }

    /// Takes back the newest answer.
    pub(super) fn unsent(&mut self, headers: &Headers) {
        let seq = self.seq(headers.psn);
        if headers.opcode != Opcode::Acknowledge {
            let first = matches!(headers.opcode, Opcode::ReadResponseFirst | Opcode::ReadResponseOnly);
            self.reads.unsent(seq, first);
            // The response may have spoken for later packets, too.
            self.owed.now();
        } else if headers.aeth.syndrome == ACK {
            self.owed.now();
        } else if seq == self.expected || headers.aeth.syndrome > NAK_SEQUENCE {
            // A fatal one is the last word, whatever came meanwhile.
            self.owed.nak(headers.aeth.syndrome, seq);
        }
    }

    /// A READ response cannot be given: the key is gone.
    pub(super) fn refuse_read(&mut self, psn: Psn, counters: &Counters) {
        counters.count(Counter::AccessError);
        let seq = self.seq(psn);
        self.owed.nak(NAK_REMOTE_ACCESS, seq);
    }

    /// Fails the oldest receive with `status` and all others as flushed. What is owed can still be sent, but READ
    /// responses, and an ACK that would claim that they were sent.
    pub(super) fn flush<S>(&mut self, status: Status, out: &mut impl FnMut(Completion<S, R>)) {
        if self.reads.is_pending() {
            self.owed.told();
        }
        self.reads.clear();
        self.owed.hurry();
        self.inbound = Inbound::None;
        let mut status = status;
        while let Some(receive) = self.queue.pop() {
            out(Completion::RecvFailed { data: receive.data, status });
            status = Status::Flushed;
        }
    }
}
