//! A queue pair, its consumer and its peer, all driven by a list of bytes. Shared by the property test and the fuzz
//! target `roce_qp`.

use roce_proto::rc::{
    AccessError, Completion, Config, MAX_PSNS, Memory, Op, Outgoing, Payload, Qp, SendRequest, State,
};
use roce_proto::{Aeth, Counter, Counters, Headers, Nanos, Opcode, Psn, Reth};

const KEY: u32 = 0x77;
const AREA: u64 = 20_000;
const CAPACITY: u32 = 3000;
const SQ_DEPTH: u32 = 6;
const RQ_DEPTH: u32 = 3;

const OPCODES: [Opcode; 23] = [
    Opcode::SendFirst,
    Opcode::SendMiddle,
    Opcode::SendLast,
    Opcode::SendLastImm,
    Opcode::SendOnly,
    Opcode::SendOnlyImm,
    Opcode::WriteFirst,
    Opcode::WriteMiddle,
    Opcode::WriteLast,
    Opcode::WriteLastImm,
    Opcode::WriteOnly,
    Opcode::WriteOnlyImm,
    Opcode::ReadRequest,
    Opcode::ReadResponseFirst,
    Opcode::ReadResponseMiddle,
    Opcode::ReadResponseLast,
    Opcode::ReadResponseOnly,
    Opcode::Acknowledge,
    Opcode::AtomicAcknowledge,
    Opcode::CompareSwap,
    Opcode::FetchAdd,
    Opcode::SendLastInvalidate,
    Opcode::SendOnlyInvalidate,
];

/// What happened at least once.
#[derive(Debug, Default)]
pub struct Seen {
    pub sent: bool,
    pub received: bool,
    pub read: bool,
    pub answered_reads: bool,
    pub errors: bool,
    pub retransmits: bool,
    pub rnr: bool,
}

impl Seen {
    pub fn merge(&mut self, other: &Self) {
        self.sent |= other.sent;
        self.received |= other.received;
        self.read |= other.read;
        self.answered_reads |= other.answered_reads;
        self.errors |= other.errors;
        self.retransmits |= other.retransmits;
        self.rnr |= other.rnr;
    }
    pub fn is_complete(&self) -> bool {
        self.sent
            && self.received
            && self.read
            && self.answered_reads
            && self.errors
            && self.retransmits
            && self.rnr
    }
}

/// Length of the send request `n`.
fn length_of(n: u32) -> u32 {
    (n.wrapping_mul(0x9e37_79b9) >> 16) % 9000
}

/// Checks that what it is asked for was allowed.
#[derive(Default)]
struct Guard {
    placed: bool,
    refuse: bool,
}

impl Memory<u32, u32> for Guard {
    fn write(&mut self, rkey: u32, va: u64, payload: &[u8]) -> Result<(), AccessError> {
        assert!(!payload.is_empty());
        self.check(rkey, va, payload.len() as u32, true)
    }
    fn check(&mut self, rkey: u32, va: u64, len: u32, _write: bool) -> Result<(), AccessError> {
        let fits = va.checked_add(u64::from(len)).is_some_and(|end| end <= AREA);
        if rkey == KEY && fits && !self.refuse { Ok(()) } else { Err(AccessError) }
    }
    fn receive(&mut self, _into: &u32, offset: u32, payload: &[u8]) -> Result<(), AccessError> {
        assert!(offset as usize + payload.len() <= CAPACITY as usize);
        if self.refuse { Err(AccessError) } else { Ok(()) }
    }
    fn read_into(&mut self, of: &u32, offset: u32, payload: &[u8]) -> Result<(), AccessError> {
        assert!(offset as usize + payload.len() <= length_of(*of) as usize);
        self.placed = true;
        if self.refuse { Err(AccessError) } else { Ok(()) }
    }
    fn invalidate(&mut self, rkey: u32) -> Result<(), AccessError> {
        if rkey == KEY { Ok(()) } else { Err(AccessError) }
    }
}

/// Checks the order of completions.
#[derive(Default)]
struct Consumer {
    posted: u32,
    completed: u32,
    receives_posted: u32,
    receives_done: u32,
    seen: Seen,
}

impl Consumer {
    fn take(&mut self, completion: Completion<u32, u32>) {
        match completion {
            Completion::Sent { data } | Completion::SendFailed { data, .. } => {
                assert!(data >= self.completed && data < self.posted, "out of order, or twice");
                self.completed = data + 1;
                let sent = matches!(completion, Completion::Sent { .. });
                assert!(!sent || data % 3 != 0, "was not signaled");
                self.seen.sent |= sent;
            }
            Completion::Received { data, .. } | Completion::RecvFailed { data, .. } => {
                assert!(data == self.receives_done && data < self.receives_posted);
                self.receives_done = data + 1;
                self.seen.received |= matches!(completion, Completion::Received { .. });
            }
        }
    }
}

/// All of it.
pub struct Driver<'a> {
    input: &'a [u8],
    qp: Qp<u32, u32>,
    guard: Guard,
    consumer: Consumer,
    counters: Counters,
    now: Nanos,
    mtu: u32,
    start: Psn,
    /// PSNs near which the peer sends: requests, responses.
    near: [u32; 2],
    batch: Vec<Headers>,
}

impl<'a> Driver<'a> {
    pub fn new(input: &'a [u8]) -> Self {
        let mut driver = Self {
            input,
            qp: Qp::new(SQ_DEPTH, RQ_DEPTH),
            guard: Guard::default(),
            consumer: Consumer::default(),
            counters: Counters::default(),
            now: 0,
            mtu: 256,
            start: Psn::new(0),
            near: [0, 0],
            batch: Vec::new(),
        };
        driver.mtu = 256 << (driver.byte() % 5);
        driver.near = [0xff_fff0 + u32::from(driver.byte()), 0xff_fff0 + u32::from(driver.byte())];
        driver.start = Psn::new(driver.near[1]);
        let config = Config {
            serve_reads: driver.byte() % 5,
            issue_reads: driver.byte() % 5,
            retry: driver.byte() % 8,
            rnr_retry: driver.byte() % 8,
            ack_timeout: driver.byte(),
            max_inflight: u32::from(driver.byte()) << 9,
            ..Config::new(driver.mtu, 5, driver.start, Psn::new(driver.near[0]))
        };
        driver.qp.connect(config, 0);
        driver
    }

    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.input.split_first() else { return 0 };
        self.input = rest;
        first
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Uses up the input.
    pub fn run(mut self) -> Seen {
        while !self.input.is_empty() {
            match self.byte() % 16 {
                0..=6 => self.packet(),
                7 => self.post(),
                8 => self.post_receive(),
                9..=11 => self.send(),
                12 => self.take_back(),
                13 => self.pass(),
                14 => self.qp.flush_acks(),
                _ => self.seldom(),
            }
        }
        self.finish()
    }

    /// A packet that is often plausible: near the expected PSN, of a fitting length, with a valid key.
    fn packet(&mut self) {
        let opcode = OPCODES[usize::from(self.byte()) % OPCODES.len()];
        let is_response =
            (Opcode::ReadResponseFirst as u8..=Opcode::AtomicAcknowledge as u8).contains(&(opcode as u8));
        let which = usize::from(is_response);
        let base = self.near[which];
        let psn = match self.byte() {
            0..200 => {
                self.near[which] = base.wrapping_add(1);
                base
            }
            d @ 200..250 => base.wrapping_add(u32::from(d)).wrapping_sub(225),
            _ => self.word(),
        };
        let len = match self.byte() % 8 {
            0..4 => self.mtu,
            4 => 0,
            5 | 6 => u32::from(self.byte()),
            _ => self.word() % (self.mtu + 8),
        };
        let total = match self.byte() % 8 {
            0..3 => len,
            3..6 => len + (u32::from(self.byte()) << 3),
            _ => self.word(),
        };
        let syndrome = [0x1f, 0x1f, 0x1f, 0x60, 0x21, self.byte()][usize::from(self.byte() % 6)];
        let odd = self.byte();
        let headers = Headers {
            opcode,
            solicited: odd & 1 != 0,
            ack_req: odd & 2 != 0,
            dest_qpn: 9,
            psn: Psn::new(psn),
            reth: Reth {
                va: if odd & 0x1c == 0 {
                    u64::MAX - u64::from(self.byte())
                } else {
                    u64::from(self.word() % 20_000)
                },
                rkey: if odd & 0xe0 == 0 { 1 } else { KEY },
                len: total,
            },
            aeth: Aeth { syndrome, msn: 0 },
            imm: 0,
            inv_rkey: if odd & 0xc0 == 0 { 1 } else { KEY },
        };
        let pad = if odd == 7 { 3 } else { len.wrapping_neg() as u8 & 3 };
        let (payload, consumer) = (vec![0; len as usize], &mut self.consumer);
        let out = &mut |c| consumer.take(c);
        self.qp.receive(self.now, &headers, &payload, pad, &mut self.guard, &self.counters, out);
    }

    fn post(&mut self) {
        let (va, n) = (u64::from(self.byte()), self.consumer.posted);
        let op = match self.byte() % 6 {
            0 => Op::Send,
            1 => Op::SendImm(1),
            2 => Op::SendInvalidate(2),
            3 => Op::Write { va, rkey: 3 },
            4 => Op::WriteImm { va, rkey: 3, imm: 4 },
            _ => Op::Read { va, rkey: 3 },
        };
        // Some are unsignaled.
        let request = SendRequest { op, len: length_of(n), signaled: !n.is_multiple_of(3), data: n };
        if self.qp.post_send(request).is_ok() {
            self.consumer.posted += 1;
        }
    }

    fn post_receive(&mut self) {
        if self.qp.post_recv(self.consumer.receives_posted, CAPACITY).is_ok() {
            self.consumer.receives_posted += 1;
        }
    }

    fn send(&mut self) {
        for _ in 0..=self.byte() % 64 {
            let Some(packet) = self.qp.next_packet(self.now, &self.counters) else { break };
            self.check(&packet);
            if let Payload::Memory { .. } = packet.payload {
                self.consumer.seen.answered_reads = true;
            }
            self.batch.push(packet.headers);
        }
    }

    fn check(&self, packet: &Outgoing<u32>) {
        assert_eq!(packet.headers.dest_qpn, 5);
        match packet.payload {
            Payload::None => {}
            Payload::Send { data, offset, len } => {
                assert!((self.consumer.completed..self.consumer.posted).contains(&data), "is no longer ours");
                assert!(len > 0 && len <= self.mtu && offset + len <= length_of(data));
            }
            Payload::Memory { rkey, va, len } => {
                assert!(rkey == KEY && len > 0 && len <= self.mtu && va + u64::from(len) <= AREA);
            }
        }
    }

    /// Some of the newest packets could not be sent.
    fn take_back(&mut self) {
        for _ in 0..self.byte() % 8 {
            let Some(headers) = self.batch.pop() else { break };
            self.qp.unsent(&headers);
        }
        self.batch.clear();
    }

    fn pass(&mut self) {
        let wait = 1u64 << (self.byte() % 34);
        self.now += match self.qp.deadline() {
            Some(at) if at > self.now && self.byte() < 128 => at - self.now,
            _ => wait,
        };
        let consumer = &mut self.consumer;
        self.qp.on_time(self.now, &self.counters, &mut |c| consumer.take(c));
    }

    fn seldom(&mut self) {
        let consumer = &mut self.consumer;
        match self.input.first() {
            Some(0..3) => self.qp.fail(&mut |c| consumer.take(c)),
            Some(3..6) => self.guard.refuse = !self.guard.refuse,
            Some(&code @ 6..9) => self.qp.set_min_rnr_timer(code),
            Some(9..200) => self.near[1] = self.start.get(),
            _ => {}
        }
    }

    fn finish(mut self) -> Seen {
        // A window's worth, all READ answers and an acknowledgement: then it must pause.
        let most = MAX_PSNS + 16 * (AREA / 256 + 1) + 1;
        let packets =
            (0..=most).take_while(|_| self.qp.next_packet(self.now, &self.counters).is_some()).count();
        assert!(packets as u64 <= most);
        let mut seen = std::mem::take(&mut self.consumer.seen);
        seen.errors = self.qp.state() == State::Error;
        seen.read = self.guard.placed;
        seen.retransmits = self.counters.get(Counter::Retransmits) > 0;
        seen.rnr = self.counters.get(Counter::NotReady) > 0 && self.counters.get(Counter::RnrNakReceived) > 0;
        let consumer = &mut self.consumer;
        self.qp.fail(&mut |c| consumer.take(c));
        assert_eq!(self.consumer.receives_done, self.consumer.receives_posted, "all receives come back");
        assert!(matches!(self.qp.deadline(), None | Some(0)));
        seen
    }
}
