//! Hosts with an agent each, joined by a network that may lose, duplicate, delay and reorder; all from one seed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};

use roce_proto::cm::*;
use roce_proto::{Counter, Counters, Nanos, Psn};

pub const MS: Nanos = 1_000_000;
pub const PORT: u16 = 1234;

/// A small generator, good enough for tests. Source: Steele et al., SplitMix64.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
}

/// Names for connections, unique in the test process.
pub fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1_000_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

pub fn config() -> Config {
    Config::new(5, next_id)
}

pub struct Host {
    pub agent: Agent,
    pub guid: u64,
    pub ip: IpAddr,
    pub counters: Counters,
    /// Actions but messages, in order.
    pub log: Vec<Action>,
    pub mtu: u32,
    /// Messages to send, in order.
    outbox: Vec<(IpAddr, IpAddr, Box<MadBytes>)>,
}

impl Host {
    pub fn new(ip: &str, seed: u64, config: Config) -> Self {
        let mut random = Random(seed);
        let identity = Identity::new(random.next());
        let guid = identity.guid;
        let agent = Agent::new(identity, config, Box::new(move || random.next()));
        let (ip, counters) = (ip.parse().unwrap(), Counters::default());
        Self { agent, guid, ip, counters, log: Vec::new(), mtu: 1024, outbox: Vec::new() }
    }

    /// Takes the agent's actions.
    pub fn absorb(&mut self) {
        while let Some(action) = self.agent.next_action() {
            match action {
                Action::Send { src, dst, mad } => self.outbox.push((src, dst, mad)),
                other => self.log.push(other),
            }
        }
    }

    /// The messages to send.
    pub fn take(&mut self) -> Vec<(IpAddr, IpAddr, Box<MadBytes>)> {
        self.absorb();
        std::mem::take(&mut self.outbox)
    }

    /// As `take`, parsed, without addresses.
    pub fn sent(&mut self) -> Vec<Body> {
        self.take().iter().map(|(_, _, mad)| Message::parse(mad).expect("valid").body).collect()
    }

    pub fn receive(&mut self, now: Nanos, src: IpAddr, dst: IpAddr, mad: &MadBytes) {
        let mtu = self.mtu;
        self.agent.receive(now, src, dst, mad, |_, _| mtu, &self.counters);
        self.absorb();
    }

    pub fn count(&self, counter: Counter) -> u64 {
        self.counters.get(counter)
    }

    pub fn events(&mut self) -> Vec<Action> {
        self.absorb();
        std::mem::take(&mut self.log)
    }

    /// The name of the only new connection.
    pub fn request(&self) -> ConnId {
        let mut requests = self.log.iter().filter_map(|action| match action {
            Action::Request { conn, .. } => Some(*conn),
            _ => None,
        });
        let conn = requests.next().expect("a request");
        assert!(requests.next().is_none(), "one request only");
        conn
    }
}

/// What the network does to a message.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    /// One in so many is lost; 0: none.
    pub loss: u64,
    pub duplicates: u64,
    /// Extra delay up to this.
    pub jitter: Nanos,
}

pub struct World {
    pub now: Nanos,
    pub hosts: Vec<Host>,
    pub faults: Faults,
    /// Messages to lose by force: called for each.
    pub drop_if: Box<dyn FnMut(&Body) -> bool>,
    pub random: Random,
    wire: BTreeMap<(Nanos, u64), (IpAddr, IpAddr, Box<MadBytes>)>,
    sent: u64,
}

impl World {
    pub fn new(hosts: Vec<Host>) -> Self {
        Self {
            now: 1000 * MS,
            hosts,
            faults: Faults::default(),
            drop_if: Box::new(|_| false),
            random: Random(99),
            wire: BTreeMap::new(),
            sent: 0,
        }
    }

    /// Host 0 listens on PORT, host 1 is to connect.
    pub fn pair() -> Self {
        let hosts = vec![Host::new("10.0.0.1", 1, config()), Host::new("10.0.0.2", 2, config())];
        let mut world = Self::new(hosts);
        world.hosts[0].agent.listen(ListenerId(1), "0.0.0.0".parse().unwrap(), PORT, 8).unwrap();
        world
    }

    pub fn connect(&mut self, host: usize, to: usize, conn: u64) {
        let dst = SocketAddr::new(self.hosts[to].ip, PORT);
        let from = &mut self.hosts[host];
        from.agent.connect(self.now, ConnId(conn), from.ip, dst, &connect_params(conn as u32)).unwrap();
        self.collect();
    }

    /// Puts what the agents want to send on the wire.
    pub fn collect(&mut self) {
        for host in &mut self.hosts {
            for (src, dst, mad) in host.take() {
                let body = Message::parse(&mad).expect("agents send valid messages").body;
                if (self.drop_if)(&body) {
                    continue;
                }
                let faults = self.faults;
                if faults.loss > 0 && self.random.one_in(faults.loss) {
                    continue;
                }
                let copies = 1 + u64::from(faults.duplicates > 0 && self.random.one_in(faults.duplicates));
                for _ in 0..copies {
                    self.sent += 1;
                    let delay = MS + if faults.jitter > 0 { self.random.next() % faults.jitter } else { 0 };
                    self.wire.insert((self.now + delay, self.sent), (src, dst, mad.clone()));
                }
            }
        }
    }

    /// Time of the next event.
    pub fn next(&self) -> Option<Nanos> {
        let wire = self.wire.first_key_value().map(|((at, _), _)| *at);
        self.hosts.iter().filter_map(|host| host.agent.deadline()).chain(wire).min()
    }

    /// One moment in which something happens, not after `until`; false if there is none.
    pub fn step(&mut self, until: Nanos) -> bool {
        let Some(at) = self.next().filter(|at| *at <= until) else { return false };
        self.now = self.now.max(at);
        while let Some(entry) = self.wire.first_entry()
            && entry.key().0 <= self.now
        {
            let (src, dst, mad) = entry.remove();
            if let Some(host) = self.hosts.iter_mut().find(|host| host.ip == dst) {
                host.receive(self.now, src, dst, &mad);
            }
        }
        for host in &mut self.hosts {
            host.agent.on_time(self.now, &host.counters);
        }
        self.collect();
        true
    }

    /// Lets `ms` pass.
    pub fn run(&mut self, ms: u64) {
        let until = self.now + ms * MS;
        self.collect();
        while self.step(until) {}
        self.now = until;
    }

    /// Connection 7 from host 1 to host 0, established; the name at host 0.
    pub fn establish(&mut self) -> ConnId {
        self.connect(1, 0, 7);
        self.run(5);
        let conn = self.hosts[0].request();
        self.accept(0, conn, 0x333);
        self.run(5);
        conn
    }

    pub fn accept(&mut self, host: usize, conn: ConnId, qpn: u32) {
        self.hosts[host].agent.accept(self.now, conn, &accept_params(qpn)).unwrap();
        self.collect();
    }

    pub fn disconnect(&mut self, host: usize, conn: ConnId) {
        self.hosts[host].agent.disconnect(self.now, conn).unwrap();
        self.collect();
    }

    pub fn destroy(&mut self, host: usize, conn: ConnId) {
        self.hosts[host].agent.destroy(self.now, conn);
        self.collect();
    }

    pub fn forget_events(&mut self) {
        self.hosts.iter_mut().for_each(|host| host.log.clear());
    }
}

pub fn connect_params(n: u32) -> ConnectParams<'static> {
    ConnectParams {
        qp: QpFacts { qpn: 0x100 + n, start_psn: Psn::new(0xabc000 + n) },
        mtu: 1024,
        retry: 7,
        rnr_retry: 6,
        reads: Depths { serve: 4, issue: 9 },
        private: b"hello",
    }
}

pub fn accept_params(qpn: u32) -> AcceptParams<'static> {
    AcceptParams {
        ack_delay: 15,
        qp: QpFacts { qpn, start_psn: Psn::new(0x123456) },
        rnr_retry: 5,
        reads: Depths { serve: 3, issue: 3 },
        private: b"welcome",
    }
}
