//! Many connections at once on bad networks: whatever is lost, both sides come to the same end in bounded time, every
//! consumer hears a story that makes sense, and nothing is left behind.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use proptest::prelude::*;
use roce_proto::cm::*;

use crate::world::*;

/// What one consumer has heard of a connection.
#[derive(Debug, Default)]
struct Story {
    ready: u32,
    errors: u32,
    established: u32,
    /// Rejected, Unreachable or Disconnected.
    ends: u32,
    free: u32,
    /// Own and the peer's queue pair.
    path: Option<[(IpAddr, u32); 2]>,
    destroyed: bool,
}

/// Reads the log of a host, answers requests, and checks each connection's story so far.
struct Consumer {
    host: usize,
    stories: HashMap<ConnId, Story>,
    qpns: HashMap<u32, ConnId>,
    next_qpn: u32,
}

impl Consumer {
    fn new(host: usize) -> Self {
        Self { host, stories: HashMap::new(), qpns: HashMap::new(), next_qpn: 0x8000 }
    }

    fn consume(&mut self, world: &mut World) {
        for action in world.hosts[self.host].events() {
            match action {
                Action::Request { conn, .. } => self.answer(world, conn),
                Action::QpReady { conn, attrs } => self.tell(conn, |story| {
                    story.ready += 1;
                    story.path = Some([(attrs.local, attrs.qpn), (attrs.peer, attrs.dest_qpn)]);
                }),
                Action::QpError { conn } => self.tell(conn, |story| story.errors += 1),
                Action::Established { conn, .. } => self.tell(conn, |story| {
                    story.established += 1;
                    assert_eq!((story.ready, story.ends, story.destroyed), (1, 0, false));
                }),
                Action::Rejected { conn, .. } | Action::Unreachable { conn, .. } => {
                    self.tell(conn, |story| {
                        story.ends += 1;
                        assert_eq!(story.established, 0);
                    })
                }
                Action::Disconnected { conn } => self.tell(conn, |story| story.ends += 1),
                Action::QpnFree { qpn } => {
                    let conn = self.qpns[&qpn];
                    self.tell(conn, |story| story.free += 1);
                }
                Action::Send { .. } => unreachable!("taken before"),
            }
        }
    }

    fn tell(&mut self, conn: ConnId, change: impl FnOnce(&mut Story)) {
        let story = self.stories.entry(conn).or_default();
        change(story);
        assert!(
            story.ready <= 1 && story.established <= 1 && story.ends <= 1 && story.free <= 1,
            "{story:?}"
        );
        assert!(story.errors <= 1, "{story:?}");
    }

    fn answer(&mut self, world: &mut World, conn: ConnId) {
        self.stories.insert(conn, Story::default());
        let agent = &mut world.hosts[self.host].agent;
        match world.random.next() % 5 {
            0 => {
                agent.reject(world.now, conn, b"no").unwrap();
                self.tell(conn, |story| story.ends += 1);
            }
            // Never answered.
            1 => (),
            _ => {
                self.next_qpn += 1;
                self.qpns.insert(self.next_qpn, conn);
                agent.accept(world.now, conn, &accept_params(self.next_qpn)).unwrap();
            }
        }
    }

    /// Now and then, in whatever state it is.
    fn end_something(&mut self, world: &mut World) {
        let dice = world.random.next() % 16;
        let mut known: Vec<_> = self.stories.keys().copied().collect();
        if dice > 2 || known.is_empty() {
            return;
        }
        known.sort();
        let conn = known[world.random.next() as usize % known.len()];
        let agent = &mut world.hosts[self.host].agent;
        if dice > 0 {
            match agent.disconnect(world.now, conn) {
                Ok(()) | Err(Error::Unknown) => (),
                Err(other) => panic!("{other}"),
            }
            return;
        }
        // What the agent had to say before comes first.
        world.hosts[self.host].absorb();
        self.consume(world);
        world.hosts[self.host].agent.destroy(world.now, conn);
        self.tell(conn, |story| {
            story.destroyed = true;
            story.ends = 1;
        });
    }

    fn connect(&mut self, world: &mut World, to: usize, n: u64) {
        world.connect(self.host, to, n);
        self.stories.insert(ConnId(n), Story::default());
        self.qpns.insert(0x100 + n as u32, ConnId(n));
    }
}

fn everything_ends(seed: u64, faults: Faults) {
    let hosts = (0..3).map(|i| Host::new(&format!("10.0.0.{}", i + 1), seed ^ i, config())).collect();
    let mut world = World::new(hosts);
    world.random = Random(seed);
    world.faults = faults;
    let mut consumers: Vec<_> = (0..3).map(Consumer::new).collect();
    for host in &mut world.hosts {
        host.agent.listen(ListenerId(1), "0.0.0.0".parse().unwrap(), PORT, 64).unwrap();
    }
    for n in 0..30 {
        let from = world.random.next() as usize % 3;
        // To itself, too.
        let to = world.random.next() as usize % 3;
        consumers[from].connect(&mut world, to, n);
        for _ in 0..20 {
            let until = world.now + world.random.next() % (200 * MS);
            world.step(until);
            for consumer in &mut consumers {
                consumer.consume(&mut world);
                consumer.end_something(&mut world);
            }
            world.collect();
        }
    }
    // Time for all that is not settled, then the end of what is.
    let settle = |world: &mut World, consumers: &mut Vec<Consumer>, ms: u64| {
        let until = world.now + ms * MS;
        while world.step(until) {
            consumers.iter_mut().for_each(|consumer| consumer.consume(world));
            world.collect();
        }
        world.now = until;
    };
    settle(&mut world, &mut consumers, 200_000);
    // If all tries of a disconnect are lost, one side is left alone; heartbeats above find that out.
    if faults.loss == 0 {
        let stories = consumers.iter().flat_map(|consumer| consumer.stories.values());
        let alive: HashSet<_> =
            stories.filter(|story| story.ends == 0).filter_map(|story| story.path).collect();
        for [own, peer] in &alive {
            assert!(alive.contains(&[*peer, *own]), "only {own:?} has the connection to {peer:?}");
        }
    }
    for consumer in &consumers {
        for (conn, story) in &consumer.stories {
            assert_eq!(story.established | story.ends, 1, "neither up nor down: {conn:?} {story:?}");
            let _ = world.hosts[consumer.host].agent.disconnect(world.now, *conn);
        }
    }
    world.collect();
    settle(&mut world, &mut consumers, 200_000);
    for consumer in &consumers {
        for (conn, story) in &consumer.stories {
            assert_eq!(story.ends, 1, "{conn:?} {story:?}");
            assert!(story.errors == 1 || story.ready == 0, "{conn:?} {story:?}");
        }
        let freed = consumer.stories.values().filter(|story| story.free == 1).count();
        assert_eq!(freed, consumer.qpns.len(), "every number comes back");
        assert_eq!(world.hosts[consumer.host].agent.connections(), 0);
    }
    assert_eq!(world.next(), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]
    #[test]
    fn any_network_leads_to_an_end(seed: u64, loss in 0u64..8, duplicates in 0u64..6, jitter_ms in 0u64..700) {
        let loss = if loss == 1 { 2 } else { loss };
        everything_ends(seed, Faults { loss, duplicates, jitter: jitter_ms * MS });
    }
}
