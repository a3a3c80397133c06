//! One queue pair against hand-made packets: one test per rule of IBTA 9.7 (and of Linux `rxe_resp.c`, `rxe_comp.c`).

use roce_proto::rc::{
    AccessError, Completion, Config, Memory, Op, Outgoing, Payload, PostError, Qp, ReceivedKind, SendRequest,
    State, Status,
};
use roce_proto::{Aeth, Counter, Counters, Headers, Nanos, Opcode, Psn, Reth};

const MTU: u32 = 256;
/// First PSN that the peer sends, and that we send.
const THEIRS: u32 = 0xff_fffe;
const OURS: u32 = 1000;
const KEY: u32 = 0xabc;
const MS: Nanos = 1_000_000;

#[derive(Default)]
struct Mem {
    written: Vec<(u64, usize)>,
    received: Vec<(u32, u32, usize)>,
    read: Vec<(u32, u32, usize)>,
    invalidated: Vec<u32>,
    refuse: bool,
}

impl Memory<u32, u32> for Mem {
    fn write(&mut self, rkey: u32, va: u64, payload: &[u8]) -> Result<(), AccessError> {
        self.check(rkey, va, payload.len() as u32, true)?;
        self.written.push((va, payload.len()));
        Ok(())
    }
    fn check(&mut self, rkey: u32, va: u64, len: u32, _write: bool) -> Result<(), AccessError> {
        let fits = va.checked_add(u64::from(len)).is_some_and(|end| end <= 1 << 20);
        if rkey == KEY && fits && !self.refuse { Ok(()) } else { Err(AccessError) }
    }
    fn receive(&mut self, into: &u32, offset: u32, payload: &[u8]) -> Result<(), AccessError> {
        self.received.push((*into, offset, payload.len()));
        if self.refuse { Err(AccessError) } else { Ok(()) }
    }
    fn read_into(&mut self, of: &u32, offset: u32, payload: &[u8]) -> Result<(), AccessError> {
        self.read.push((*of, offset, payload.len()));
        if self.refuse { Err(AccessError) } else { Ok(()) }
    }
    fn invalidate(&mut self, rkey: u32) -> Result<(), AccessError> {
        self.invalidated.push(rkey);
        if rkey == KEY { Ok(()) } else { Err(AccessError) }
    }
}

struct Bench {
    qp: Qp<u32, u32>,
    mem: Mem,
    counters: Counters,
    now: Nanos,
    done: Vec<Completion<u32, u32>>,
}

fn config() -> Config {
    Config {
        max_inflight: 1 << 20,
        initial_inflight: 1 << 20,
        min_rnr_timer: 14,
        ..Config::new(MTU, 77, Psn::new(OURS), Psn::new(THEIRS))
    }
}

impl Bench {
    fn with(config: Config) -> Self {
        let mut qp = Qp::new(32, 4);
        qp.connect(config, 0);
        Self { qp, mem: Mem::default(), counters: Counters::default(), now: 0, done: Vec::new() }
    }

    fn new() -> Self {
        Self::with(config())
    }

    fn receive(&mut self, headers: Headers, len: u32) {
        let (payload, pad) = (vec![7; len as usize], len.wrapping_neg() as u8 & 3);
        let done = &mut self.done;
        let out = &mut |c| done.push(c);
        self.qp.receive(self.now, &headers, &payload, pad, &mut self.mem, &self.counters, out);
    }

    /// A request `n` packets after the first one.
    fn request(&mut self, opcode: Opcode, n: u32, len: u32) {
        self.receive(request(opcode, n), len);
    }

    /// A write request with this message length at address 0x100.
    fn write(&mut self, opcode: Opcode, n: u32, len: u32, total: u32) {
        let reth = Reth { va: 0x100, rkey: KEY, len: total };
        self.receive(Headers { reth, imm: 5, ..request(opcode, n) }, len);
    }

    fn answer(&mut self, syndrome: u8, n: u32) {
        let aeth = Aeth { syndrome, msn: 0 };
        self.receive(Headers { aeth, psn: Psn::new(OURS + n), ..request(Opcode::Acknowledge, 0) }, 0);
    }

    fn read_response(&mut self, opcode: Opcode, n: u32, len: u32) {
        let aeth = Aeth { syndrome: 0x1f, msn: 0 };
        self.receive(Headers { aeth, psn: Psn::new(OURS + n), ..request(opcode, 0) }, len);
    }

    fn post(&mut self, op: Op, len: u32, data: u32) {
        self.qp.post_send(SendRequest { op, len, signaled: true, data }).expect("there is room");
    }

    fn next(&mut self) -> Option<Outgoing<u32>> {
        self.qp.next_packet(self.now, &self.counters)
    }

    fn all(&mut self) -> Vec<Outgoing<u32>> {
        std::iter::from_fn(|| self.next()).collect()
    }

    /// Syndrome, distance of the PSN from the peer's first one, and MSN of all that is answered now.
    fn answers(&mut self) -> Vec<(u8, i32, u32)> {
        self.qp.flush_acks();
        let answer = |p: Outgoing<u32>| {
            assert_eq!((p.headers.opcode, p.headers.dest_qpn), (Opcode::Acknowledge, 77));
            (p.headers.aeth.syndrome, p.headers.psn.since(Psn::new(THEIRS)), p.headers.aeth.msn)
        };
        self.all().into_iter().map(answer).collect()
    }

    /// Opcode and distance from our first PSN of all that is sent now.
    fn sends(&mut self) -> Vec<(Opcode, i32)> {
        self.all().into_iter().map(|p| (p.headers.opcode, p.headers.psn.since(Psn::new(OURS)))).collect()
    }

    fn pass(&mut self, time: Nanos) {
        self.now += time;
        let done = &mut self.done;
        self.qp.on_time(self.now, &self.counters, &mut |c| done.push(c));
    }

    fn sent(&self) -> Vec<u32> {
        let data =
            |c: &Completion<u32, u32>| if let Completion::Sent { data } = c { Some(*data) } else { None };
        self.done.iter().filter_map(data).collect()
    }
}

fn request(opcode: Opcode, n: u32) -> Headers {
    Headers {
        opcode,
        solicited: false,
        ack_req: true,
        dest_qpn: 3,
        psn: Psn::new(THEIRS).plus(n),
        reth: Reth::default(),
        aeth: Aeth::default(),
        imm: 0,
        inv_rkey: KEY,
    }
}

const WRITE: Op = Op::Write { va: 0x100, rkey: KEY };
const READ: Op = Op::Read { va: 0x100, rkey: KEY };

// The responder.

#[test]
fn one_nak_per_gap_and_none_after_reordering_within_a_batch() {
    let mut b = Bench::new();
    b.write(Opcode::WriteOnly, 0, 4, 4);
    b.write(Opcode::WriteOnly, 2, 4, 4);
    b.write(Opcode::WriteOnly, 3, 4, 4);
    assert_eq!(b.answers(), [(0x1f, 0, 1), (0x60, 1, 1)], "progress first, then the gap");
    b.write(Opcode::WriteOnly, 4, 4, 4);
    assert_eq!(b.answers(), []);
    b.write(Opcode::WriteOnly, 1, 4, 4);
    b.write(Opcode::WriteOnly, 3, 4, 4);
    assert_eq!(b.answers(), [(0x1f, 1, 2), (0x60, 2, 2)], "another gap");
    b.write(Opcode::WriteOnly, 2, 4, 4);
    b.write(Opcode::WriteOnly, 4, 4, 4);
    b.write(Opcode::WriteOnly, 3, 4, 4);
    assert_eq!(b.answers(), [(0x1f, 3, 4)], "the gap closed before anybody complained");
    assert_eq!(b.counters.get(Counter::OutOfOrder), 5);
}

#[test]
fn operations_out_of_sequence_or_not_supported_are_invalid() {
    use Opcode::*;
    let (none, send, write): (&[_], &[_], &[_]) = (&[], &[SendFirst], &[WriteFirst]);
    let cases = [
        (none, SendMiddle),
        (none, SendLast),
        (none, SendLastImm),
        (none, SendLastInvalidate),
        (none, WriteMiddle),
        (none, WriteLast),
        (none, WriteLastImm),
        (none, CompareSwap),
        (none, FetchAdd),
        (send, SendFirst),
        (send, SendOnly),
        (send, WriteMiddle),
        (send, WriteOnly),
        (send, ReadRequest),
        (write, WriteFirst),
        (write, WriteOnlyImm),
        (write, SendLast),
        (write, ReadRequest),
    ];
    for (before, opcode) in cases {
        let mut b = Bench::new();
        b.qp.post_recv(1, 1 << 20).unwrap();
        b.qp.post_recv(2, 1 << 20).unwrap();
        for &first in before {
            b.write(first, 0, MTU, 4 * MTU);
        }
        let n = before.len() as u32;
        b.write(opcode, n, MTU, MTU);
        assert_eq!(b.qp.state(), State::Error, "{before:?} {opcode:?}");
        assert_eq!(b.answers(), [(0x61, n as i32, 0)], "{before:?} {opcode:?}");
        assert_eq!(b.done.len(), 2);
        assert_eq!(b.done[1], Completion::RecvFailed { data: 2, status: Status::Flushed });
        if before == send {
            assert_eq!(b.done[0], Completion::RecvFailed { data: 1, status: Status::RemoteInvalidRequest });
        }
        b.request(SendOnly, n, 1);
        assert_eq!(b.answers(), [], "a broken queue pair is silent");
        assert_eq!(b.counters.get(Counter::WrongState), 1);
    }
}

#[test]
fn reads_are_refused_if_none_were_agreed_on_and_beyond_the_agreed_number() {
    for depth in [0u32, 2] {
        let mut b = Bench::with(Config { serve_reads: depth as u8, ..config() });
        for n in 0..=depth {
            assert_eq!(b.qp.state(), State::Ready);
            b.write(Opcode::ReadRequest, n, 0, 4);
        }
        assert_eq!((b.qp.state(), b.counters.get(Counter::InvalidRequest)), (State::Error, 1));
        assert_eq!(b.answers(), [(0x61, depth as i32, depth)]);
    }
}

#[test]
fn without_a_receive_nothing_is_placed_and_the_packet_may_come_again() {
    for opcode in [Opcode::SendOnly, Opcode::SendFirst, Opcode::WriteOnlyImm] {
        let mut b = Bench::new();
        let total = if opcode == Opcode::SendFirst { 2 * MTU } else { MTU };
        b.write(opcode, 0, MTU, total);
        b.write(opcode, 1, MTU, total);
        assert_eq!(b.answers(), [(0x20 | 14, 0, 0)], "and silence about what was behind it");
        assert!(b.mem.written.is_empty() && b.mem.received.is_empty());
        assert_eq!(b.counters.get(Counter::NotReady), 1);
        b.qp.set_min_rnr_timer(3);
        b.write(opcode, 0, MTU, total);
        assert_eq!(b.answers(), [(0x23, 0, 0)]);
        b.qp.post_recv(1, 1 << 20).unwrap();
        b.write(opcode, 0, MTU, total);
        assert_eq!(b.mem.written.len() + b.mem.received.len(), 1);
        assert_eq!(b.answers(), [(0x1f, 0, u32::from(opcode != Opcode::SendFirst))]);
    }
    let mut b = Bench::new();
    b.write(Opcode::WriteFirst, 0, MTU, MTU + 4);
    b.write(Opcode::WriteLastImm, 1, 4, 0);
    assert_eq!((b.answers(), b.mem.written.len()), (vec![(0x2e, 1, 0)], 1));
}

#[test]
fn wrong_lengths_are_invalid() {
    use Opcode::*;
    // Packets before: opcode, bytes, message length; then the bad one.
    type Part = (Opcode, u32, u32);
    let cases: &[(&[Part], Part)] = &[
        (&[], (SendFirst, MTU - 4, 0)),
        (&[], (SendFirst, MTU + 4, 0)),
        (&[], (SendOnly, MTU + 4, 0)),
        (&[(SendFirst, MTU, 0)], (SendMiddle, MTU - 4, 0)),
        (&[(SendFirst, MTU, 0)], (SendLast, 0, 0)),
        (&[(SendFirst, MTU, 0)], (SendLast, MTU + 1, 0)),
        (&[], (WriteFirst, MTU, MTU)),
        (&[], (WriteFirst, MTU - 4, 2 * MTU)),
        (&[], (WriteFirst, MTU, (1 << 31) + 1)),
        (&[], (WriteOnly, 8, 12)),
        (&[], (WriteOnly, 12, 8)),
        (&[], (WriteOnly, MTU + 4, MTU + 4)),
        (&[], (WriteOnly, 0, 4)),
        (&[(WriteFirst, MTU, MTU + 8)], (WriteMiddle, MTU, 0)),
        (&[(WriteFirst, MTU, MTU + 8)], (WriteLast, 12, 0)),
        (&[(WriteFirst, MTU, MTU + 8)], (WriteLast, 4, 0)),
        (&[(WriteFirst, MTU, 3 * MTU)], (WriteLast, 0, 0)),
        (&[(WriteFirst, MTU, 2 * MTU)], (WriteMiddle, MTU, 0)),
        (&[], (ReadRequest, 0, (1 << 31) + 1)),
        (&[], (ReadRequest, 4, 4)),
    ];
    for (before, bad) in cases {
        let mut b = Bench::new();
        b.qp.post_recv(1, 1 << 20).unwrap();
        for (n, &(opcode, len, total)) in (0..).zip(*before) {
            b.write(opcode, n, len, total);
            assert_eq!(b.qp.state(), State::Ready);
        }
        let (written, n) = (b.mem.written.len(), before.len() as u32);
        b.write(bad.0, n, bad.1, bad.2);
        assert_eq!(b.answers(), [(0x61, n as i32, 0)], "{before:?} {bad:?}");
        assert_eq!((b.qp.state(), b.mem.written.len()), (State::Error, written));
    }
}

#[test]
fn wrong_pad_of_a_write_is_invalid() {
    let mut b = Bench::new();
    let headers = Headers { reth: Reth { va: 0, rkey: KEY, len: 5 }, ..request(Opcode::WriteOnly, 0) };
    b.qp.receive(0, &headers, &[0; 5], 2, &mut b.mem, &b.counters, &mut |_| {});
    assert_eq!(b.answers(), [(0x61, 0, 0)]);
}

#[test]
fn a_send_that_is_longer_than_its_receive_is_invalid() {
    let mut b = Bench::new();
    b.qp.post_recv(1, MTU + 3).unwrap();
    b.request(Opcode::SendFirst, 0, MTU);
    b.request(Opcode::SendLast, 1, 4);
    assert_eq!(b.done, [Completion::RecvFailed { data: 1, status: Status::LocalLength }]);
    assert_eq!((b.answers(), b.mem.received.len()), (vec![(0x61, 1, 0)], 1));
}

#[test]
fn bad_keys_and_bounds_are_access_errors_unless_nothing_is_accessed() {
    let cases = [
        (Opcode::WriteOnly, 4, Reth { va: 0, rkey: KEY + 1, len: 4 }),
        (Opcode::WriteOnly, 4, Reth { va: u64::MAX - 1, rkey: KEY, len: 4 }),
        (Opcode::WriteFirst, MTU, Reth { va: (1 << 20) - u64::from(MTU), rkey: KEY, len: MTU + 1 }),
        (Opcode::ReadRequest, 0, Reth { va: 0, rkey: KEY + 1, len: 4 }),
    ];
    for (opcode, len, reth) in cases {
        let mut b = Bench::new();
        b.qp.post_recv(1, 0).unwrap();
        b.receive(Headers { reth, ..request(opcode, 0) }, len);
        assert_eq!(b.answers(), [(0x62, 0, 0)], "{opcode:?}");
        assert!(b.mem.written.is_empty());
        assert_eq!(
            b.done,
            [Completion::RecvFailed { data: 1, status: Status::Flushed }],
            "it had no receive"
        );
        assert_eq!(b.counters.get(Counter::AccessError), 1);
    }
    let mut b = Bench::new();
    b.receive(Headers { reth: Reth { va: 9, rkey: 1, len: 0 }, ..request(Opcode::WriteOnly, 0) }, 0);
    assert_eq!(b.answers(), [(0x1f, 0, 1)]);
}

#[test]
fn a_key_that_goes_away_in_the_middle_stops_the_rest() {
    let mut b = Bench::new();
    b.write(Opcode::WriteFirst, 0, MTU, 2 * MTU);
    b.mem.refuse = true;
    b.write(Opcode::WriteLast, 1, MTU, 0);
    assert_eq!((b.answers(), b.mem.written.len()), (vec![(0x62, 1, 0)], 1));
}

#[test]
fn messages_are_reported_with_what_they_carry() {
    let mut b = Bench::new();
    for n in 1..=4 {
        b.qp.post_recv(n, 1 << 20).unwrap();
    }
    assert!(!b.qp.heard_from_peer());
    b.request(Opcode::SendFirst, 0, MTU);
    assert!(b.qp.heard_from_peer());
    b.receive(Headers { imm: 9, solicited: true, ..request(Opcode::SendLastImm, 1) }, 3);
    b.request(Opcode::SendOnlyInvalidate, 2, 0);
    b.write(Opcode::WriteFirst, 3, MTU, MTU + 1);
    b.write(Opcode::WriteLastImm, 4, 1, 0);
    b.request(Opcode::SendOnly, 5, 2);
    let received = |data, kind, len, imm, invalidated| Completion::Received {
        data,
        kind,
        len,
        imm,
        invalidated,
        solicited: data == 1,
    };
    let expected = [
        received(1, ReceivedKind::Recv, MTU + 3, Some(9), None),
        received(2, ReceivedKind::Recv, 0, None, Some(KEY)),
        received(3, ReceivedKind::RecvWriteImm, MTU + 1, Some(5), None),
        received(4, ReceivedKind::Recv, 2, None, None),
    ];
    assert_eq!(b.done, expected);
    assert_eq!(b.mem.received, [(1, 0, 256), (1, 256, 3), (4, 0, 2)]);
    assert_eq!(b.mem.written, [(0x100, 256), (0x200, 1)]);
    assert_eq!(b.answers(), [(0x1f, 5, 4)], "one acknowledgement for all");
}

#[test]
fn invalidation_of_a_foreign_key_is_an_access_error() {
    let mut b = Bench::new();
    b.qp.post_recv(1, 0).unwrap();
    b.receive(Headers { inv_rkey: 4, ..request(Opcode::SendOnlyInvalidate, 0) }, 0);
    assert_eq!(b.done, [Completion::RecvFailed { data: 1, status: Status::RemoteAccess }]);
    assert_eq!(b.answers(), [(0x62, 0, 0)]);
}

#[test]
fn own_memory_that_refuses_a_send_is_an_operational_error() {
    let mut b = Bench::new();
    b.qp.post_recv(1, 10).unwrap();
    b.mem.refuse = true;
    b.request(Opcode::SendOnly, 0, 1);
    assert_eq!(b.done, [Completion::RecvFailed { data: 1, status: Status::LocalProtection }]);
    assert_eq!(b.answers(), [(0x63, 0, 0)]);
}

#[test]
fn acknowledgements_of_messages_wait_and_those_inside_messages_do_not() {
    let mut b = Bench::new();
    b.write(Opcode::WriteFirst, 0, MTU, 2 * MTU);
    assert_eq!(b.all().len(), 1);
    b.now = 500;
    b.write(Opcode::WriteLast, 1, MTU, 0);
    assert_eq!((b.all().len(), b.qp.deadline()), (0, Some(20_500)));
    assert!(!b.qp.wants_to_send(20_499) && b.qp.wants_to_send(20_500));
    b.now = 20_500;
    assert_eq!(b.all().len(), 1);
    assert_eq!(b.qp.deadline(), None);
    let quiet = Headers { ack_req: false, ..request(Opcode::WriteOnly, 2) };
    b.receive(quiet, 0);
    assert_eq!((b.answers(), b.qp.deadline()), (vec![], None), "nobody asked");
}

#[test]
fn duplicates_are_acknowledged_and_not_executed() {
    let mut b = Bench::new();
    b.request(Opcode::WriteOnly, u32::MAX, 0);
    assert_eq!(b.answers(), [], "nothing was executed yet that could be acknowledged");
    b.qp.post_recv(1, 10).unwrap();
    b.qp.post_recv(2, 10).unwrap();
    b.request(Opcode::SendOnly, 0, 4);
    b.write(Opcode::WriteOnly, 1, 4, 4);
    assert_eq!(b.answers(), [(0x1f, 1, 2)]);
    b.receive(Headers { ack_req: false, ..request(Opcode::SendOnly, 0) }, 4);
    b.write(Opcode::WriteOnly, 1, 4, 4);
    assert_eq!(b.answers(), [(0x1f, 1, 2)], "of the newest, once");
    assert_eq!((b.done.len(), b.mem.received.len(), b.mem.written.len()), (1, 1, 1));
    assert_eq!(b.counters.get(Counter::Duplicate), 3);
}

#[test]
fn reads_are_answered_before_what_came_after_them_is_acknowledged() {
    let mut b = Bench::new();
    b.write(Opcode::ReadRequest, 0, 0, 2 * MTU + 1);
    b.write(Opcode::WriteOnly, 3, 4, 4);
    b.write(Opcode::ReadRequest, 4, 0, 0);
    b.write(Opcode::WriteOnly, 6, 4, 4);
    let all = b.all();
    let shape: Vec<_> =
        all.iter().map(|p| (p.headers.opcode, p.headers.psn.since(Psn::new(THEIRS)))).collect();
    let expected = [
        (Opcode::ReadResponseFirst, 0),
        (Opcode::ReadResponseMiddle, 1),
        (Opcode::ReadResponseLast, 2),
        (Opcode::ReadResponseOnly, 4),
        (Opcode::Acknowledge, 5),
    ];
    assert_eq!(shape, expected);
    assert_eq!(all[0].payload, Payload::Memory { rkey: KEY, va: 0x100, len: MTU });
    assert_eq!(all[2].payload, Payload::Memory { rkey: KEY, va: 0x300, len: 1 });
    assert_eq!(all[3].payload, Payload::None);
    let msns: Vec<_> = all.iter().map(|p| p.headers.aeth.msn).collect();
    assert_eq!(msns, [1, 0, 1, 3, 3]);
    assert_eq!(all[4].headers.aeth.syndrome, 0x60, "5 is missing");
}

#[test]
fn a_read_is_answered_again_from_where_the_peer_wants() {
    let mut b = Bench::new();
    b.write(Opcode::ReadRequest, 0, 0, 4 * MTU);
    b.write(Opcode::ReadRequest, 4, 0, MTU);
    assert_eq!(b.all().len(), 5);
    let again = |va, len, n| Headers { reth: Reth { va, rkey: KEY, len }, ..request(Opcode::ReadRequest, n) };
    b.receive(again(0x300, 2 * MTU, 2), 0);
    b.write(Opcode::ReadRequest, 4, 0, MTU);
    let opcodes: Vec<_> =
        b.all().iter().map(|p| (p.headers.opcode, p.headers.psn.since(Psn::new(THEIRS)))).collect();
    use Opcode::*;
    assert_eq!(opcodes, [(ReadResponseFirst, 2), (ReadResponseLast, 3), (ReadResponseOnly, 4)]);
    for (va, len, n) in [(0x2ff, 2 * MTU, 2), (0x300, 2 * MTU + 1, 2), (0x100, MTU, 2)] {
        b.receive(again(va, len, n), 0);
        assert_eq!(b.all().len(), 0, "outside of what was granted");
    }
    b.receive(Headers { reth: Reth { va: 0x100, rkey: KEY + 1, len: 4 }, ..request(ReadRequest, 0) }, 0);
    assert_eq!((b.all().len(), b.qp.state()), (0, State::Ready));
}

#[test]
fn a_new_read_displaces_the_repetition_of_an_old_one() {
    let mut b = Bench::with(Config { serve_reads: 1, ..config() });
    b.write(Opcode::ReadRequest, 0, 0, MTU);
    assert_eq!(b.all().len(), 1);
    // The network repeats the request, while the answer was good and the peer goes on.
    b.write(Opcode::ReadRequest, 0, 0, MTU);
    b.write(Opcode::ReadRequest, 1, 0, MTU);
    assert_eq!(b.qp.state(), State::Ready);
    let psns: Vec<_> = b.all().iter().map(|p| p.headers.psn.since(Psn::new(THEIRS))).collect();
    assert_eq!(psns, [1]);
}

#[test]
fn a_read_whose_memory_is_gone_is_refused_late() {
    let mut b = Bench::new();
    b.write(Opcode::ReadRequest, 0, 0, 2 * MTU);
    let first = b.next().unwrap();
    let Bench { qp, counters, .. } = &mut b;
    qp.refuse_read(&first.headers, counters, &mut |_| {});
    assert_eq!((b.answers(), b.qp.state()), (vec![(0x62, 0, 1)], State::Error));
}

#[test]
fn an_acknowledgement_survives_the_end_of_the_connection() {
    let mut b = Bench::new();
    b.write(Opcode::WriteOnly, 0, 4, 4);
    b.qp.fail(&mut |_| {});
    assert_eq!(b.answers(), [(0x1f, 0, 1)]);
    assert_eq!(b.qp.deadline(), None);
}

// The requester.

#[test]
fn messages_are_cut_into_packets_of_the_mtu() {
    let mut b = Bench::new();
    b.post(Op::WriteImm { va: 0x100, rkey: KEY, imm: 6 }, 2 * MTU + 1, 1);
    b.post(Op::SendInvalidate(8), 2 * MTU, 2);
    b.post(Op::SendImm(9), 0, 3);
    let all = b.all();
    use Opcode::*;
    let expected = [
        (WriteFirst, false, Some((0, MTU))),
        (WriteMiddle, false, Some((MTU, MTU))),
        (WriteLastImm, true, Some((2 * MTU, 1))),
        (SendFirst, false, Some((0, MTU))),
        (SendLastInvalidate, true, Some((MTU, MTU))),
        (SendOnlyImm, true, None),
    ];
    assert_eq!(all.len(), expected.len());
    for (n, (p, (opcode, ack_req, payload))) in (0..).zip(all.iter().zip(expected)) {
        assert_eq!((p.headers.opcode, p.headers.ack_req), (opcode, ack_req));
        assert_eq!((p.headers.psn, p.headers.dest_qpn), (Psn::new(OURS + n), 77));
        let place =
            if let Payload::Send { offset, len, .. } = p.payload { Some((offset, len)) } else { None };
        assert_eq!(place, payload);
    }
    assert_eq!(all[0].headers.reth, Reth { va: 0x100, rkey: KEY, len: 2 * MTU + 1 });
    assert_eq!((all[1].headers.reth, all[2].headers.imm, all[4].headers.inv_rkey), (Reth::default(), 6, 8));
    assert_eq!(all[5].headers.imm, 9);
}

#[test]
fn acknowledgements_are_cumulative_and_others_are_ignored() {
    let mut b = Bench::new();
    for n in 0..4 {
        b.qp.post_send(SendRequest { op: WRITE, len: 4, signaled: n != 1, data: n }).unwrap();
    }
    b.answer(0x1f, 0);
    assert_eq!(b.sent(), [], "it was not sent yet");
    assert_eq!(b.all().len(), 4);
    b.answer(0x1f, 4);
    b.answer(0x1f, 0xff_ffff);
    assert_eq!((b.sent(), b.counters.get(Counter::StaleResponse)), (vec![], 3));
    b.answer(0x1f, 2);
    assert_eq!(b.sent(), [0, 2]);
    b.answer(0x1f, 1);
    b.answer(0x60, 1);
    assert_eq!((b.sends(), b.counters.get(Counter::SeqNakReceived)), (vec![], 0));
    b.answer(0x05, 3);
    assert_eq!((b.sent(), b.qp.deadline()), (vec![0, 2, 3], None));
}

#[test]
fn a_sequence_nak_repeats_from_there_once() {
    let mut b = Bench::new();
    b.post(WRITE, 5 * MTU, 1);
    b.post(Op::Send, 1, 2);
    assert_eq!(b.all().len(), 6);
    b.answer(0x60, 2);
    use Opcode::*;
    let rest = [(WriteMiddle, 2), (WriteMiddle, 3), (WriteLast, 4), (SendOnly, 5)];
    assert_eq!(b.sends(), rest);
    b.answer(0x60, 2);
    assert_eq!(b.sends(), [], "the complaint was heard");
    b.now += 2 * MS;
    b.answer(0x60, 2);
    assert_eq!(b.sends(), rest, "lost again");
    assert_eq!(b.counters.get(Counter::Retransmits), 8);
    b.answer(0x1f, 5);
    assert_eq!(b.sent(), [1, 2]);
}

#[test]
fn an_acknowledgement_that_comes_late_saves_the_repetition() {
    let mut b = Bench::new();
    b.post(WRITE, 4 * MTU, 1);
    b.post(WRITE, 4, 2);
    assert_eq!(b.all().len(), 5);
    b.pass(20 * MS);
    b.answer(0x1f, 3);
    assert_eq!((b.sends(), b.sent()), (vec![(Opcode::WriteOnly, 4)], vec![1]));
}

#[test]
fn rnr_naks_are_waited_out_even_if_sequence_naks_follow() {
    let mut b = Bench::new();
    for n in 0..3 {
        b.post(Op::Send, 4, n);
    }
    assert_eq!(b.all().len(), 3);
    b.answer(0x20 | 14, 1);
    b.answer(0x60, 1);
    b.answer(0x20 | 14, 1);
    assert_eq!((b.sent(), b.sends(), b.qp.deadline()), (vec![0], vec![], Some(1_280_000)));
    b.pass(1_279_999);
    assert_eq!(b.sends(), []);
    b.pass(1);
    assert_eq!(b.sends(), [(Opcode::SendOnly, 1), (Opcode::SendOnly, 2)]);
    b.answer(0x1f, 2);
    assert_eq!(b.sent(), [0, 1, 2]);
}

#[test]
fn rnr_retries_run_out_unless_they_are_seven() {
    for (rnr_retry, naks) in [(0, 1), (2, 3), (7, 1000)] {
        let mut b = Bench::with(Config { rnr_retry, ..config() });
        b.post(Op::Send, 4, 1);
        b.post(Op::Send, 4, 2);
        for n in 0..naks {
            assert_eq!(b.qp.state(), State::Ready, "after {n}");
            assert_eq!(b.all().len(), 2);
            b.answer(0x21, 0);
            b.pass(10_000);
        }
        if rnr_retry == 7 {
            assert_eq!(b.qp.state(), State::Ready);
        } else {
            let failed = |data, status| Completion::SendFailed { data, status };
            assert_eq!(b.done, [failed(1, Status::RnrRetryExceeded), failed(2, Status::Flushed)]);
        }
    }
}

#[test]
fn fatal_naks_fail_the_request_they_name() {
    for (syndrome, status) in
        [(0x61, Status::RemoteInvalidRequest), (0x62, Status::RemoteAccess), (0x63, Status::RemoteOperation)]
    {
        let mut b = Bench::new();
        b.qp.post_recv(9, 0).unwrap();
        for n in 0..3 {
            b.post(WRITE, 4, n);
        }
        assert_eq!(b.all().len(), 3);
        b.answer(syndrome, 1);
        let expected = [
            Completion::Sent { data: 0 },
            Completion::SendFailed { data: 1, status },
            Completion::SendFailed { data: 2, status: Status::Flushed },
            Completion::RecvFailed { data: 9, status: Status::Flushed },
        ];
        assert_eq!((b.done.as_slice(), b.qp.state()), (&expected[..], State::Error));
        assert_eq!(b.sends(), []);
    }
}

#[test]
fn reserved_syndromes_are_ignored() {
    let mut b = Bench::new();
    b.post(WRITE, 4, 1);
    assert_eq!(b.all().len(), 1);
    for syndrome in [0x40, 0x64, 0x7f, 0x80, 0xff] {
        b.answer(syndrome, 0);
    }
    assert_eq!((b.qp.state(), b.done.len(), b.counters.get(Counter::StaleResponse)), (State::Ready, 0, 5));
}

#[test]
fn silence_is_answered_with_repetition_and_then_given_up() {
    let mut b = Bench::with(Config { retry: 2, ack_timeout: 14, ..config() });
    b.post(WRITE, 4, 1);
    let started = b.now;
    let mut packets = 0;
    while b.qp.state() == State::Ready {
        packets += b.all().len();
        let deadline = b.qp.deadline().expect("somebody must watch the clock");
        b.pass(deadline - b.now);
    }
    assert_eq!(b.done, [Completion::SendFailed { data: 1, status: Status::RetryExceeded }]);
    // 3 tries × 4 × 67.1 ms.
    let patience = 12 * (4096 << 14);
    assert!((patience..patience + 70 * MS).contains(&(b.now - started)), "{} ms", (b.now - started) / MS);
    assert!((10..20).contains(&packets), "{packets}");
    assert_eq!(b.counters.get(Counter::RetriesExceeded), 1);
}

#[test]
fn a_silent_peer_is_given_up_when_it_was_asked_for() {
    let mut b = Bench::with(Config { give_up: 1000 * MS, ..config() });
    b.qp.post_recv(9, 10).unwrap();
    // It was idle before: that is not silence.
    b.pass(60_000 * MS);
    b.post(WRITE, 4, 1);
    let started = b.now;
    while b.qp.state() == State::Ready {
        b.all();
        let deadline = b.qp.deadline().expect("somebody must watch the clock");
        b.pass(deadline - b.now);
    }
    let why = Completion::SendFailed { data: 1, status: Status::RetryExceeded };
    assert_eq!(
        b.done,
        [why, Completion::RecvFailed { data: 9, status: Status::Flushed }],
        "the reason comes first"
    );
    let took = (b.now - started) / MS;
    assert!((1000..=1250).contains(&took), "{took} ms");
}

#[test]
fn who_did_not_run_does_not_give_up_the_peer() {
    let mut b = Bench::with(Config { give_up: 1000 * MS, ..config() });
    b.post(WRITE, 4, 1);
    b.all();
    // Of this process, not of the peer: its answer is about to be read.
    b.pass(30_000 * MS);
    b.all();
    b.answer(0x1f, 0);
    assert_eq!((b.sent().len(), b.qp.state()), (1, State::Ready));
}

#[test]
fn progress_renews_patience() {
    let mut b = Bench::with(Config { retry: 0, ack_timeout: 14, ..config() });
    for n in 0..30 {
        b.post(WRITE, 4, n);
    }
    for n in 0..30 {
        b.all();
        b.pass(250 * MS);
        b.answer(0x1f, n);
    }
    assert_eq!((b.sent().len(), b.qp.state()), (30, State::Ready));
}

#[test]
fn reads_are_placed_and_complete_in_order() {
    let mut b = Bench::new();
    b.post(WRITE, 4, 1);
    b.post(READ, 2 * MTU + 4, 2);
    b.post(WRITE, 4, 3);
    assert_eq!(b.sends(), [(Opcode::WriteOnly, 0), (Opcode::ReadRequest, 1), (Opcode::WriteOnly, 4)]);
    b.read_response(Opcode::ReadResponseFirst, 1, MTU);
    assert_eq!(b.sent(), [1], "the response speaks for what was before it");
    b.read_response(Opcode::ReadResponseMiddle, 2, MTU - 4);
    b.read_response(Opcode::ReadResponseMiddle, 2, MTU);
    b.read_response(Opcode::ReadResponseLast, 3, MTU);
    b.read_response(Opcode::ReadResponseLast, 3, 4);
    b.read_response(Opcode::ReadResponseOnly, 4, 4);
    assert_eq!(b.mem.read, [(2, 0, 256), (2, 256, 256), (2, 512, 4)]);
    assert_eq!((b.sent(), b.counters.get(Counter::StaleResponse)), (vec![1, 2], 3));
    b.answer(0x1f, 4);
    assert_eq!(b.sent(), [1, 2, 3]);
}

#[test]
fn missing_read_responses_are_asked_for_again() {
    for hint in 0..2 {
        let mut b = Bench::new();
        b.post(READ, 4 * MTU, 1);
        b.post(WRITE, 4, 2);
        assert_eq!(b.all().len(), 2);
        b.read_response(Opcode::ReadResponseFirst, 0, MTU);
        match hint {
            0 => b.read_response(Opcode::ReadResponseMiddle, 2, MTU),
            _ => b.answer(0x1f, 4),
        }
        let again = b.all();
        assert_eq!(again[0].headers.psn, Psn::new(OURS + 1));
        assert_eq!(again[0].headers.reth, Reth { va: 0x200, rkey: KEY, len: 3 * MTU });
        assert_eq!(again[1].headers.psn, Psn::new(OURS + 4));
        assert_eq!((b.sent(), b.mem.read.len()), (vec![], 1));
    }
}

#[test]
fn long_reads_are_asked_for_in_pieces_and_not_more_than_agreed() {
    let mut b = Bench::with(Config { issue_reads: 2, max_inflight: 12 * (MTU + 512), ..config() });
    b.post(READ, 40 * MTU, 1);
    let first = b.all();
    assert_eq!((first.len(), first[0].headers.reth.len), (1, 12 * MTU));
    for n in 0..12 {
        b.read_response(Opcode::ReadResponseMiddle, n, MTU);
    }
    let second = b.all();
    assert_eq!(second[0].headers.reth.va, 0x100 + 12 * u64::from(MTU));
    assert_eq!(second[0].headers.psn, Psn::new(OURS + 12));
    let mut b = Bench::with(Config { issue_reads: 2, ..config() });
    for n in 0..4 {
        b.post(READ, 4, n);
    }
    assert_eq!(b.all().len(), 2);
    b.read_response(Opcode::ReadResponseOnly, 0, 4);
    assert_eq!(b.all().len(), 1);
}

#[test]
fn own_memory_that_refuses_a_response_fails_the_read() {
    let mut b = Bench::new();
    b.post(READ, 4, 1);
    assert_eq!(b.all().len(), 1);
    b.mem.refuse = true;
    b.read_response(Opcode::ReadResponseOnly, 0, 4);
    assert_eq!(b.done, [Completion::SendFailed { data: 1, status: Status::LocalProtection }]);
}

#[test]
fn packets_that_were_not_sent_come_out_again_as_if_new() {
    let mut b = Bench::new();
    b.post(WRITE, 3 * MTU, 1);
    b.post(READ, 2 * MTU, 2);
    b.post(WRITE, 0, 3);
    b.write(Opcode::ReadRequest, 0, 0, 2 * MTU);
    b.write(Opcode::ReadRequest, 2, 0, MTU);
    let mut all = b.all();
    assert_eq!(all.len(), 8);
    for keep in (0..8).rev() {
        for p in all.drain(keep..).rev() {
            b.qp.unsent(&p.headers);
        }
        let again = b.all();
        assert_eq!(again.len(), 8 - keep);
        all.extend(again);
    }
    for answer in [true, false] {
        let is_answer = |p: &&Outgoing<u32>| matches!(p.payload, Payload::Memory { .. }) == answer;
        let psns: Vec<_> = all.iter().filter(is_answer).map(|p| p.headers.psn.get()).collect();
        let expected =
            if answer { vec![0xff_fffe, 0xff_ffff, 0] } else { vec![1000, 1001, 1002, 1003, 1005] };
        assert_eq!(psns, expected);
    }
    assert_eq!(b.counters.get(Counter::Retransmits), 0);
    for p in all.iter().rev() {
        b.qp.unsent(&p.headers);
    }
    assert_eq!(b.qp.deadline(), Some(0), "only the acknowledgement is waited for");
    b.answer(0x1f, 0);
    assert_eq!(b.counters.get(Counter::StaleResponse), 1, "it is not on the way");
}

#[test]
fn a_repeated_answer_that_was_not_sent_takes_no_place() {
    let mut b = Bench::with(Config { serve_reads: 1, ..config() });
    b.write(Opcode::ReadRequest, 0, 0, 2 * MTU);
    assert_eq!(b.all().len(), 2);
    // The network has doubled the request. The peer has its answer, and goes on while ours is still held up.
    b.write(Opcode::ReadRequest, 0, 0, 2 * MTU);
    for p in b.all().iter().rev() {
        b.qp.unsent(&p.headers);
    }
    b.write(Opcode::ReadRequest, 2, 0, MTU);
    assert_eq!((b.qp.state(), b.all().len()), (State::Ready, 1), "the new answer is what counts");
}

#[test]
fn naks_that_were_not_sent_come_out_again() {
    let mut b = Bench::new();
    b.write(Opcode::WriteOnly, 3, 4, 4);
    let nak = b.next().unwrap();
    b.qp.unsent(&nak.headers);
    assert_eq!(b.next(), Some(nak));
    b.write(Opcode::WriteOnly, 0, 4, 4);
    b.qp.unsent(&nak.headers);
    assert_eq!(b.answers(), [(0x1f, 0, 1)], "the NAK is obsolete");
}

#[test]
fn the_window_bounds_what_is_on_the_way_and_asks_for_acknowledgements() {
    let small = Config { max_inflight: 8 * (MTU + 512), initial_inflight: 4 * (MTU + 512), ..config() };
    let mut b = Bench::with(small);
    b.post(WRITE, 100 * MTU, 1);
    let all = b.all();
    assert_eq!(all.len(), 4);
    assert!(all[3].headers.ack_req, "without an answer nothing would go on");
    assert!(!b.qp.wants_to_send(b.now));
    b.answer(0x1f, 3);
    assert_eq!(b.all().len(), 8, "it grows");
    let mut b = Bench::new();
    b.post(WRITE, 1000 * MTU, 1);
    let all = b.all();
    assert_eq!(all.len(), 256);
    let asks: Vec<_> = (0..).zip(&all).filter(|(_, p)| p.headers.ack_req).map(|(n, _)| n).collect();
    assert_eq!(asks, [31, 63, 95, 127, 159, 191, 223, 255]);
}

#[test]
fn answers_and_requests_take_turns() {
    let mut b = Bench::new();
    b.post(WRITE, 10 * MTU, 1);
    b.write(Opcode::ReadRequest, 0, 0, 10 * MTU);
    let answers = b.all()[..10].iter().filter(|p| matches!(p.payload, Payload::Memory { .. })).count();
    assert_eq!(answers, 5);
}

#[test]
fn posting_says_why_not() {
    let mut qp = Qp::<u32, u32>::new(2, 1);
    let send = |op, len| SendRequest { op, len, signaled: false, data: 0 };
    assert_eq!(qp.post_send(send(WRITE, 0)), Err(PostError::WrongState));
    assert_eq!((qp.post_recv(1, 0), qp.post_recv(2, 0)), (Ok(()), Err(PostError::Full)));
    qp.connect(Config { issue_reads: 0, ..config() }, 0);
    assert_eq!(qp.post_send(send(READ, 0)), Err(PostError::NoReads));
    assert_eq!(qp.post_send(send(WRITE, (1 << 31) + 1)), Err(PostError::TooLong));
    assert_eq!((qp.post_send(send(WRITE, 1 << 31)), qp.post_send(send(WRITE, 0))), (Ok(()), Ok(())));
    assert_eq!(qp.post_send(send(WRITE, 0)), Err(PostError::Full));
}

#[test]
fn what_is_posted_after_an_error_is_flushed() {
    let mut b = Bench::new();
    b.qp.fail(&mut |_| {});
    assert_eq!(b.qp.deadline(), None);
    b.post(WRITE, 4, 1);
    b.qp.post_recv(2, 4).unwrap();
    assert_eq!((b.sends(), b.qp.deadline()), (vec![], Some(0)));
    b.pass(0);
    let receive = Completion::RecvFailed { data: 2, status: Status::Flushed };
    assert_eq!(b.done, [receive, Completion::SendFailed { data: 1, status: Status::Flushed }]);
    assert_eq!(b.qp.deadline(), None);
}
