//! Two queue pairs, their memories and consumers, and the network between them, in virtual time. The same seed gives
//! the same run.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use roce_proto::rc::{
    AccessError, Completion, Config, Memory, Op, Outgoing, Payload, Qp, ReceivedKind, SendRequest, State,
};
use roce_proto::{Counter, Counters, Headers, Nanos};

/// Key and address of the memory that peers write, and of that which they read.
pub const WRITE_KEY: u32 = 0x1111_1111;
pub const READ_KEY: u32 = 0x2222_2222;
pub const BASE: u64 = u64::MAX - (1 << 30);
pub const AREA: usize = 1 << 18;

/// SplitMix64 by Sebastiano Vigna.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// 0..n
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    pub fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1000) < u64::from(per_mille)
    }
}

/// A message of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub op: Op,
    pub len: u32,
    pub signaled: bool,
}

impl Message {
    fn takes_receive(&self) -> bool {
        !matches!(self.op, Op::Write { .. } | Op::Read { .. })
    }
}

/// Byte `offset` of message `n`.
fn byte_of(side: usize, n: u32, offset: u32) -> u8 {
    let x = (n.wrapping_mul(0x9e37_79b9) ^ offset.wrapping_mul(0x85eb_ca6b)).wrapping_add(side as u32);
    (x ^ (x >> 13) ^ (x >> 24)) as u8
}

fn bytes_of(side: usize, n: u32, offset: u32, len: u32) -> Vec<u8> {
    (offset..offset + len).map(|o| byte_of(side, n, o)).collect()
}

fn read_area(side: usize) -> Vec<u8> {
    bytes_of(side, 0xffff, 0, AREA as u32)
}

/// What goes wrong on the way, per mille, and how long the way is.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    pub loss: u32,
    pub duplication: u32,
    pub reordering: u32,
    pub delay: Nanos,
    /// Bytes that wait at an end; more is dropped.
    pub buffer: usize,
}

/// What an end's program is like.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// Between turns.
    pub turn: Nanos,
    /// Per mille of turns after which it does not run for `pause`.
    pub pauses: u32,
    pub pause: Nanos,
    /// Receives are posted again only every so often.
    pub repost: Nanos,
    /// Per mille of turns whose newest packets cannot be sent.
    pub busy_socket: u32,
    pub sq_depth: u32,
    pub rq_depth: u32,
}

/// The memory of one end.
pub struct Mem {
    pub side: usize,
    pub written: Vec<u8>,
    readable: Vec<u8>,
    pub receives: Vec<Vec<u8>>,
    pub read: Vec<Vec<u8>>,
    pub invalidated: Vec<u32>,
}

fn range(va: u64, len: usize) -> Result<std::ops::Range<usize>, AccessError> {
    let start = va.checked_sub(BASE).ok_or(AccessError)? as usize;
    let end = start.checked_add(len).filter(|&end| end <= AREA).ok_or(AccessError)?;
    Ok(start..end)
}

impl Memory<u32, u32> for Mem {
    fn write(&mut self, rkey: u32, va: u64, payload: &[u8]) -> Result<(), AccessError> {
        self.check(rkey, va, payload.len() as u32, true)?;
        self.written[range(va, payload.len())?].copy_from_slice(payload);
        Ok(())
    }
    fn check(&mut self, rkey: u32, va: u64, len: u32, write: bool) -> Result<(), AccessError> {
        range(va, len as usize)?;
        if rkey == if write { WRITE_KEY } else { READ_KEY } { Ok(()) } else { Err(AccessError) }
    }
    fn receive(&mut self, into: &u32, offset: u32, payload: &[u8]) -> Result<(), AccessError> {
        self.receives[*into as usize][offset as usize..][..payload.len()].copy_from_slice(payload);
        Ok(())
    }
    fn read_into(&mut self, of: &u32, offset: u32, payload: &[u8]) -> Result<(), AccessError> {
        self.read[*of as usize][offset as usize..][..payload.len()].copy_from_slice(payload);
        Ok(())
    }
    fn invalidate(&mut self, rkey: u32) -> Result<(), AccessError> {
        self.invalidated.push(rkey);
        Ok(())
    }
}

/// A packet on the way.
#[derive(Clone)]
struct Packet {
    headers: Headers,
    payload: Vec<u8>,
    pad: u8,
}

pub struct End {
    pub qp: Qp<u32, u32>,
    pub mem: Mem,
    pub counters: Counters,
    pub script: Vec<Message>,
    pub completions: Vec<Completion<u32, u32>>,
    /// Capacity of a receive.
    capacity: u32,
    habits: Habits,
    posted: u32,
    receives_taken: u32,
    next_repost: Nanos,
    inbox: VecDeque<Packet>,
    inbox_bytes: usize,
    runs_at: Nanos,
}

impl End {
    fn new(
        side: usize,
        script: Vec<Message>,
        peer_script: &[Message],
        config: Config,
        habits: Habits,
    ) -> Self {
        let capacity = peer_script.iter().map(|m| m.len).max().unwrap_or(0);
        let mut qp = Qp::new(habits.sq_depth, habits.rq_depth);
        qp.connect(config, 0);
        let read =
            script.iter().map(|m| vec![0; if matches!(m.op, Op::Read { .. }) { m.len as usize } else { 0 }]);
        Self {
            qp,
            mem: Mem {
                side,
                written: vec![0; AREA],
                readable: read_area(side),
                receives: Vec::new(),
                read: read.collect(),
                invalidated: Vec::new(),
            },
            counters: Counters::default(),
            completions: Vec::new(),
            capacity,
            habits,
            posted: 0,
            receives_taken: 0,
            next_repost: 0,
            inbox: VecDeque::new(),
            inbox_bytes: 0,
            runs_at: 0,
            script,
        }
    }

    fn all_posted(&self) -> bool {
        self.posted as usize == self.script.len()
    }

    /// Everything posted here was acknowledged: the last message is always signaled.
    fn is_done(&self) -> bool {
        self.all_posted()
            && (self.script.is_empty()
                || self.completions.iter().rev().any(
                    |c| matches!(c, Completion::Sent { data } if *data as usize == self.script.len() - 1),
                ))
    }

    fn wants_to_run(&self, now: Nanos) -> Nanos {
        let receives_open = (self.mem.receives.len() as u32 - self.receives_taken) < self.habits.rq_depth;
        let mut at = self.qp.deadline().unwrap_or(Nanos::MAX);
        if receives_open {
            at = at.min(self.next_repost);
        }
        if !self.inbox.is_empty() || self.qp.wants_to_send(now) {
            at = now;
        }
        at.max(self.runs_at)
    }

    fn outgoing(&mut self, packet: &Outgoing<u32>) -> Packet {
        let payload = match packet.payload {
            Payload::None => Vec::new(),
            Payload::Send { data, offset, len } => {
                assert!(len > 0 && offset + len <= self.script[data as usize].len);
                bytes_of(self.mem.side, data, offset, len)
            }
            Payload::Memory { rkey, va, len } => {
                assert_eq!(rkey, READ_KEY);
                self.mem.readable[range(va, len as usize).expect("was checked")].to_vec()
            }
        };
        let pad = (payload.len() as u32).wrapping_neg() as u8 & 3;
        Packet { headers: packet.headers, payload, pad }
    }
}

/// Number, arrival, for whom.
type Arrival = Reverse<(Nanos, u64, usize)>;

/// Says which packets of which end are lost, beside those that the network loses.
pub type DropIf = Box<dyn FnMut(usize, &Headers) -> bool>;

pub struct World {
    pub now: Nanos,
    rng: Rng,
    network: Network,
    pub ends: [End; 2],
    arrivals: BinaryHeap<Arrival>,
    on_the_way: Vec<Option<Packet>>,
    pub drop_if: DropIf,
    pub overflows: u64,
}

impl World {
    pub fn new(
        seed: u64,
        network: Network,
        scripts: [Vec<Message>; 2],
        configs: [Config; 2],
        habits: [Habits; 2],
    ) -> Self {
        let [a, b] = scripts;
        let left = End::new(0, a.clone(), &b, configs[0], habits[0]);
        let right = End::new(1, b, &a, configs[1], habits[1]);
        Self {
            now: 0,
            rng: Rng(seed),
            network,
            ends: [left, right],
            arrivals: BinaryHeap::new(),
            on_the_way: Vec::new(),
            drop_if: Box::new(|_, _| false),
            overflows: 0,
        }
    }

    fn put_on_wire(&mut self, from: usize, packet: Packet) {
        if (self.drop_if)(from, &packet.headers) || self.rng.chance(self.network.loss) {
            return;
        }
        let copies = if self.rng.chance(self.network.duplication) { 2 } else { 1 };
        for copy in 0..copies {
            let late = copy > 0 || self.rng.chance(self.network.reordering);
            let extra = if late { self.rng.below(10 * self.network.delay) } else { 0 };
            let number = self.on_the_way.len() as u64;
            self.arrivals.push(Reverse((self.now + self.network.delay + extra, number, 1 - from)));
            self.on_the_way.push(Some(packet.clone()));
        }
    }

    fn arrive(&mut self) {
        while let Some(&Reverse((at, number, to))) = self.arrivals.peek()
            && at <= self.now
        {
            self.arrivals.pop();
            let packet = self.on_the_way[number as usize].take().expect("arrives once");
            let end = &mut self.ends[to];
            let size = packet.payload.len() + 512;
            if end.inbox_bytes + size > self.network.buffer {
                self.overflows += 1;
                continue;
            }
            end.inbox_bytes += size;
            end.inbox.push_back(packet);
        }
    }

    /// One turn of an end's program.
    fn turn(&mut self, side: usize) {
        let (now, rng) = (self.now, &mut self.rng);
        let end = &mut self.ends[side];
        let mut done = Vec::new();
        if now >= end.next_repost {
            while (end.mem.receives.len() as u32 - end.receives_taken) < end.habits.rq_depth {
                let n = end.mem.receives.len() as u32;
                end.qp.post_recv(n, end.capacity).expect("the queue has room");
                end.mem.receives.push(vec![0xee; end.capacity as usize]);
            }
            end.next_repost = now + 1 + rng.below(end.habits.repost);
        }
        for _ in 0..64 {
            let Some(p) = end.inbox.pop_front() else { break };
            end.inbox_bytes -= p.payload.len() + 512;
            end.qp.receive(now, &p.headers, &p.payload, p.pad, &mut end.mem, &end.counters, &mut |c| {
                done.push(c)
            });
        }
        if end.qp.deadline().is_some_and(|at| at <= now) {
            end.qp.on_time(now, &end.counters, &mut |c| done.push(c));
        }
        while let Some(m) = end.script.get(end.posted as usize) {
            let request = SendRequest { op: m.op, len: m.len, signaled: m.signaled, data: end.posted };
            if end.qp.post_send(request).is_err() {
                break;
            }
            end.posted += 1;
        }
        end.receives_taken += done.iter().filter(|c| matches!(c, Completion::Received { .. })).count() as u32;
        end.completions.extend(done);
        if rng.chance(100) {
            end.qp.flush_acks();
        }
        let mut batch = Vec::new();
        while batch.len() < 64
            && let Some(packet) = end.qp.next_packet(now, &end.counters)
        {
            batch.push(packet);
        }
        if rng.chance(end.habits.busy_socket) {
            let keep = rng.below(batch.len() as u64 + 1) as usize;
            for packet in batch.drain(keep..).rev() {
                end.qp.unsent(&packet.headers);
            }
        }
        let pause = if rng.chance(end.habits.pauses) { rng.below(end.habits.pause) } else { 0 };
        end.runs_at = now + 1 + end.habits.turn + pause;
        let packets: Vec<_> = batch.iter().map(|packet| end.outgoing(packet)).collect();
        for packet in packets {
            self.put_on_wire(side, packet);
        }
    }

    /// Runs until `limit` or until both scripts are done; true if done.
    pub fn run(&mut self, limit: Nanos) -> bool {
        while self.now < limit {
            self.arrive();
            for side in 0..2 {
                if self.ends[side].wants_to_run(self.now) <= self.now {
                    self.turn(side);
                }
            }
            if self.ends.iter().all(|end| end.is_done() || end.qp.state() == State::Error) {
                return true;
            }
            let arrival = self.arrivals.peek().map_or(Nanos::MAX, |&Reverse((at, ..))| at);
            let runs = self.ends.iter().map(|end| end.wants_to_run(self.now)).min().unwrap_or(Nanos::MAX);
            self.now = arrival.min(runs).max(self.now + 1);
        }
        false
    }

    /// Everything arrived exactly once, in order, with the right bytes, and completed in order.
    pub fn check(&self) {
        for (side, end) in self.ends.iter().enumerate() {
            let failed = |c: &&Completion<u32, u32>| {
                matches!(c, Completion::SendFailed { .. } | Completion::RecvFailed { .. })
            };
            let why = end.completions.iter().find(failed);
            assert_eq!(end.qp.state(), State::Ready, "side {side}: {why:?}, {} ms", self.now / 1_000_000);
            check_sent(end);
            check_received(side, &self.ends[1 - side], end);
            check_memory(side, &self.ends[1 - side], end);
        }
    }

    pub fn count(&self, counter: Counter) -> u64 {
        self.ends.iter().map(|end| end.counters.get(counter)).sum()
    }
}

fn check_sent(end: &End) {
    let sent: Vec<u32> = end
        .completions
        .iter()
        .filter_map(|c| match c {
            Completion::Sent { data } => Some(*data),
            Completion::SendFailed { .. } | Completion::RecvFailed { .. } => panic!("{c:?}"),
            Completion::Received { .. } => None,
        })
        .collect();
    let signaled: Vec<u32> = (0..).zip(&end.script).filter(|(_, m)| m.signaled).map(|(n, _)| n).collect();
    assert_eq!(sent, signaled, "each signaled request completes once, in order");
}

/// `end`, which is `side`, got what `peer` sent.
fn check_received(side: usize, peer: &End, end: &End) {
    let mut received = end.completions.iter().filter(|c| matches!(c, Completion::Received { .. }));
    let messages = (0..).zip(&peer.script).filter(|(_, m)| m.takes_receive());
    for (next, (n, m)) in (0u32..).zip(messages) {
        let Some(Completion::Received { data, kind, len, imm, invalidated, .. }) = received.next() else {
            panic!("message {n} did not arrive")
        };
        let (want_kind, want_imm, want_invalidated) = match m.op {
            Op::SendImm(imm) => (ReceivedKind::Recv, Some(imm), None),
            Op::SendInvalidate(rkey) => (ReceivedKind::Recv, None, Some(rkey)),
            Op::WriteImm { imm, .. } => (ReceivedKind::RecvWriteImm, Some(imm), None),
            _ => (ReceivedKind::Recv, None, None),
        };
        assert_eq!((*data, *len), (next, m.len), "receives are taken in order");
        assert_eq!((*kind, *imm, *invalidated), (want_kind, want_imm, want_invalidated));
        if want_kind == ReceivedKind::Recv {
            let got = &end.mem.receives[next as usize][..m.len as usize];
            assert_eq!(got, bytes_of(1 - side, n, 0, m.len), "bytes of message {n}");
        }
    }
    assert!(received.next().is_none(), "more messages than were sent");
}

fn check_memory(side: usize, peer: &End, end: &End) {
    let (mut written, mut invalidated) = (vec![0; AREA], Vec::new());
    for (n, m) in (0..).zip(&peer.script) {
        match m.op {
            Op::Write { va, .. } | Op::WriteImm { va, .. } if m.len > 0 => {
                written[range(va, m.len as usize).expect("scripts stay inside")].copy_from_slice(&bytes_of(
                    1 - side,
                    n,
                    0,
                    m.len,
                ));
            }
            Op::SendInvalidate(rkey) => invalidated.push(rkey),
            _ => {}
        }
    }
    assert!(end.mem.written == written, "memory is as if all writes were done once, in order");
    assert_eq!(end.mem.invalidated, invalidated);
    let area = read_area(1 - side);
    for (m, got) in end.script.iter().zip(&end.mem.read) {
        if let (Op::Read { va, .. }, true) = (m.op, m.len > 0) {
            assert!(got[..] == area[range(va, m.len as usize).expect("inside")], "bytes of a READ");
        }
    }
}
