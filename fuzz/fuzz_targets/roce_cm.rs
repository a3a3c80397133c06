//! Any messages from any address, in any state of an agent whose consumer does anything: no panic, one story per
//! connection, every queue pair number given back, nothing left behind.
#![no_main]

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};

use libfuzzer_sys::fuzz_target;
use roce_proto::cm::*;
use roce_proto::{Counters, Psn};

static NEXT_ID: AtomicU64 = AtomicU64::new(0);
const PORT: u16 = 1234;
const MS: u64 = 1_000_000;
const LIMITS: (u32, usize) = (6, 5);

/// What the consumer was told of a connection.
#[derive(Default)]
struct Story {
    destroyed: bool,
    rejected: bool,
    ready: bool,
    error: bool,
    established: bool,
    ended: bool,
}

struct Driver {
    agent: Agent,
    counters: Counters,
    now: u64,
    stories: HashMap<ConnId, Story>,
    order: Vec<ConnId>,
    /// Taken by the agent and not given back.
    qpns: HashMap<u32, ConnId>,
    next_qpn: u32,
    /// Messages the agent sent: material for answers.
    sent: Vec<Message>,
}

/// Bytes of the input, zero at its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().map_or((0, self.0), |(first, rest)| (*first, rest));
        self.0 = rest;
        first
    }

    fn pick<'t, T>(&mut self, from: &'t [T]) -> Option<&'t T> {
        let n = usize::from(self.byte());
        from.get(n.checked_rem(from.len())?)
    }
}

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fuzz_target!(|input: &[u8]| {
    NEXT_ID.store(1 << 32, Ordering::Relaxed);
    let next_id = || NEXT_ID.fetch_add(1, Ordering::Relaxed);
    let mut config = Config::new(3, next_id);
    (config.max_half_open, config.max_half_open_per_source, config.max_time_wait) = (LIMITS.0, 4, LIMITS.1);
    let mut seed = 0u64;
    let random = move || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        seed
    };
    let mut driver = Driver {
        agent: Agent::new(Identity::new(1 << 40), config, Box::new(random)),
        counters: Counters::default(),
        now: 0,
        stories: HashMap::new(),
        order: Vec::new(),
        qpns: HashMap::new(),
        next_qpn: 2,
        sent: Vec::new(),
    };
    driver.agent.listen(ListenerId(0), ip(1), PORT, 3).expect("the first listener");
    let mut input = Input(input);
    for _ in 0..100 {
        if input.0.is_empty() {
            break;
        }
        driver.step(&mut input);
        driver.drain();
    }
    driver.finish();
});

impl Driver {
    fn step(&mut self, input: &mut Input) {
        let op = input.byte();
        match op % 10 {
            0 => self.raw(input),
            1 | 2 => self.request(input),
            3 => self.answer(input),
            4 => self.echo(input),
            5 => self.connect(input),
            6 => self.accept(input),
            7 => self.wait(u64::from(input.byte()) * 40 * MS),
            8 => self.consumer(input),
            _ => self.wait(self.agent.deadline().map_or(0, |at| at.saturating_sub(self.now))),
        }
    }

    fn receive(&mut self, from: u8, mad: &MadBytes) {
        self.agent.receive(self.now, ip(from), ip(1), mad, |_, _| 2048, &self.counters);
    }

    fn raw(&mut self, input: &mut Input) {
        let mut mad: MadBytes = std::array::from_fn(|_| input.byte());
        let from = mad[255] % 3 + 1;
        // Most of them are messages.
        if mad[254] & 7 != 0 {
            mad[..4].copy_from_slice(&[1, 7, 2, 3]);
            (mad[16], mad[17]) = (0, 0x10 + mad[17] % 7);
        }
        self.receive(from, &mad);
    }

    /// A request that is good but for what the input changes.
    fn request(&mut self, input: &mut Input) {
        let [from, id, qpn, flaw] = [(); 4].map(|()| input.byte());
        let from = from % 3 + 1;
        let mut private = [0; 92];
        private[1] = 0x40;
        private[16..20].copy_from_slice(&[10, 0, 0, from]);
        private[32..36].copy_from_slice(&[10, 0, 0, 1]);
        let path = Path {
            local_gid: gid(ip(from)),
            remote_gid: gid(ip(1)),
            ack_timeout: flaw & 31,
            ..Path::default()
        };
        let mut req = Req {
            local_id: u32::from(id & 7),
            service_id: service_id(PORT),
            guid: 0x11 + u64::from(id >> 7),
            qpn: u32::from(qpn & 7) + 2,
            responder_resources: flaw,
            initiator_depth: qpn,
            remote_timeout: 20,
            transport: 0,
            start_psn: Psn::new(u32::from(qpn)),
            local_timeout: id & 31,
            retry: 7,
            rnr_retry: 7,
            pkey: 0xffff,
            mtu_code: 3,
            max_retries: qpn >> 4,
            primary: path,
            alternate: Path::default(),
            private,
        };
        match flaw {
            250 => req.qpn = 0xff_ffff,
            251 => req.mtu_code = id,
            252 => req.private[usize::from(id % 92)] ^= qpn,
            253 => req.transport = 1,
            254 => req.primary.local_gid[15] ^= 1,
            255 => req.service_id ^= 1,
            _ => (),
        }
        self.receive(from, &Message { tid: 1, body: Body::Req(req) }.encode());
    }

    /// Something that answers, more or less, a message of the agent.
    fn answer(&mut self, input: &mut Input) {
        let [kind, of, a, b, from] = [(); 5].map(|()| input.byte());
        let Some(message) = input.pick(&self.sent) else { return };
        let (ids, qpn) = match &message.body {
            Body::Req(req) => (Ids { local: req.local_id, remote: u32::from(a & 7) }, req.qpn),
            Body::Rep(rep) => (rep.ids, rep.qpn),
            Body::Dreq { ids, remote_qpn } => (*ids, *remote_qpn),
            Body::Rtu(ids) | Body::Drep(ids) => (*ids, u32::from(b)),
            Body::Mra(mra) => (mra.ids, u32::from(b)),
            Body::Rej(rej) => (rej.ids, u32::from(b)),
        };
        let ids = ids.flip();
        let mut info = [0; 72];
        info[7] = 0x11 + (b & 1);
        let body = match kind % 7 {
            0 => Body::Rtu(ids),
            1 => Body::Drep(ids),
            2 => Body::Dreq { ids, remote_qpn: qpn },
            3 => Body::Mra(Mra { ids, of: of & 3, timeout: a & 31 }),
            4 => Body::Rej(Rej {
                ids,
                of: of & 3,
                reason: u16::from(a & 31),
                info_len: 8,
                info,
                private: [b; 148],
            }),
            _ => Body::Rep(Rep {
                ids,
                qpn: u32::from(b & 7) + 1,
                start_psn: Psn::new(7),
                responder_resources: a,
                initiator_depth: b,
                ack_delay: a & 31,
                rnr_retry: 7,
                guid: 0x11 + u64::from(of & 1),
                private: [a; 196],
            }),
        };
        let mad = Message { tid: message.tid, body }.encode();
        self.receive(from % 3 + 1, &mad);
    }

    /// A message of the agent comes back to it: the other end of a connection to itself, or a reflection.
    fn echo(&mut self, input: &mut Input) {
        let from = if input.byte() < 200 { 1 } else { 2 };
        let Some(mad) = input.pick(&self.sent).map(Message::encode) else { return };
        self.receive(from, &mad);
    }

    fn new_qpn(&mut self) -> QpFacts {
        self.next_qpn += 1;
        QpFacts { qpn: self.next_qpn, start_psn: Psn::new(9) }
    }

    fn connect(&mut self, input: &mut Input) {
        let conn = ConnId(self.order.len() as u64);
        let dst = SocketAddr::new(ip(input.byte() % 3 + 1), PORT);
        let qp = self.new_qpn();
        let reads = Depths { serve: 1, issue: 1 };
        let params = ConnectParams { qp, mtu: 1024, retry: 7, rnr_retry: 7, reads, private: b"x" };
        self.agent.connect(self.now, conn, ip(1), dst, &params).expect("all is valid");
        self.qpns.insert(qp.qpn, conn);
        self.begin(conn);
    }

    fn begin(&mut self, conn: ConnId) {
        assert!(self.stories.insert(conn, Story::default()).is_none());
        self.order.push(conn);
    }

    fn accept(&mut self, input: &mut Input) {
        let Some(conn) = input.pick(&self.order).copied() else { return };
        let qp = self.new_qpn();
        let params = AcceptParams { qp, rnr_retry: 7, reads: Depths::default(), private: b"y" };
        if self.agent.accept(self.now, conn, &params).is_ok() {
            self.qpns.insert(qp.qpn, conn);
        }
    }

    fn consumer(&mut self, input: &mut Input) {
        let op = input.byte();
        let Some(conn) = input.pick(&self.order).copied() else { return };
        let story = self.stories.get_mut(&conn).expect("begun");
        match op % 4 {
            0 => story.rejected |= self.agent.reject(self.now, conn, b"z").is_ok(),
            1 => {
                let known = self.agent.disconnect(self.now, conn).is_ok();
                assert!(!(known && story.destroyed));
            }
            2 => self.agent.data_arrived(conn),
            _ => {
                self.agent.destroy(self.now, conn);
                story.destroyed = true;
            }
        }
    }

    fn wait(&mut self, time: u64) {
        self.now += time;
        self.agent.on_time(self.now, &self.counters);
        assert!(self.agent.deadline().is_none_or(|at| at > self.now));
    }

    fn drain(&mut self) {
        while let Some(action) = self.agent.next_action() {
            self.heed(action);
        }
    }

    fn heed(&mut self, action: Action) {
        let (conn, event) = match &action {
            Action::Send { src, mad, .. } => {
                assert_eq!(*src, ip(1));
                self.sent.push(Message::parse(mad).expect("a valid message"));
                return;
            }
            Action::QpnFree { qpn } => {
                assert!(self.qpns.remove(qpn).is_some());
                return;
            }
            Action::Request { conn, .. } => {
                self.begin(*conn);
                return;
            }
            Action::QpReady { conn, attrs } => {
                assert!((256..=4096).contains(&attrs.mtu) && (1..=31).contains(&attrs.ack_timeout));
                assert_eq!(self.qpns[&attrs.qpn], *conn);
                (*conn, false)
            }
            Action::QpError { conn } => (*conn, false),
            Action::Established { conn, .. }
            | Action::Rejected { conn, .. }
            | Action::Unreachable { conn, .. }
            | Action::Disconnected { conn } => (*conn, true),
        };
        let story = self.stories.get_mut(&conn).expect("nobody hears of unknown connections");
        assert!(!event || !(story.destroyed || story.ended || story.rejected));
        let state = match action {
            Action::QpReady { .. } => &mut story.ready,
            Action::QpError { .. } => &mut story.error,
            Action::Established { .. } => {
                assert!(story.ready && !story.error);
                &mut story.established
            }
            _ => &mut story.ended,
        };
        assert!(!std::mem::replace(state, true));
    }

    fn finish(mut self) {
        for conn in self.order.clone() {
            self.agent.destroy(self.now, conn);
            self.stories.get_mut(&conn).expect("begun").destroyed = true;
        }
        self.drain();
        while let Some(at) = self.agent.deadline() {
            assert!(at < self.now + 200_000 * MS, "stays for long");
            self.wait(at - self.now);
            self.drain();
        }
        assert!(self.agent.connections() == 0 && self.qpns.is_empty());
        assert!(self.stories.values().all(|story| story.error || !story.ready));
        // The accounts of half-open connections and of the backlog are even: as many as ever are let in.
        for n in 0..3 {
            self.request(&mut Input(&[1, n, n, 8]));
        }
        assert_eq!(self.agent.connections(), 3);
    }
}
