//! What peers can make an agent hold and send.

use roce_proto::Counter;
use roce_proto::cm::*;

use crate::golden::kernel_req;
use crate::world::*;

/// The request number `n` of a host.
fn request(host: &mut Host, from: [u8; 4], n: u32) {
    let Body::Req(mut req) = Message::parse(&kernel_req()).unwrap().body else { panic!() };
    (req.local_id, req.qpn) = (n, 0x1000 + n);
    req.primary.local_gid = gid(from.into());
    req.private[16..20].copy_from_slice(&from);
    let mad = Message { tid: 1, body: Body::Req(req) }.encode();
    host.receive(0, from.into(), host.ip, &mad);
}

fn host(config: Config, backlog: u32) -> Host {
    let mut host = Host::new("10.9.9.2", 1, config);
    host.agent.listen(ListenerId(1), host.ip, PORT, backlog).unwrap();
    host
}

fn requests(host: &mut Host) -> Vec<ConnId> {
    let events = host.events();
    let names = events.iter().filter_map(|action| match action {
        Action::Request { conn, .. } => Some(*conn),
        _ => None,
    });
    names.collect()
}

#[test]
fn the_backlog_counts_what_the_consumer_has_not_answered() {
    let mut host = host(config(), 3);
    (0..5).for_each(|n| request(&mut host, [10, 9, 9, 1], n));
    let conns = requests(&mut host);
    assert_eq!((conns.len(), host.count(Counter::CmLimited)), (3, 2));
    assert!(host.sent().is_empty(), "the others may come again");
    host.agent.accept(0, conns[0], &accept_params(0x300)).unwrap();
    host.agent.reject(0, conns[1], b"").unwrap();
    (3..9).for_each(|n| request(&mut host, [10, 9, 9, 1], n));
    assert_eq!(requests(&mut host).len(), 2);
    // The listener goes, its requests do not.
    host.agent.unlisten(ListenerId(1));
    host.agent.accept(0, conns[2], &accept_params(0x301)).unwrap();
}

#[test]
fn what_the_backlog_turned_away_counts_nowhere() {
    let mut host = host(Config { max_half_open: 3, ..config() }, 1);
    (0..50).for_each(|n| request(&mut host, [10, 9, 9, 1], n));
    for n in 0..3 {
        let conns = requests(&mut host);
        assert_eq!(conns.len(), 1);
        host.agent.accept(0, conns[0], &accept_params(0x300 + n)).unwrap();
        request(&mut host, [10, 9, 9, 1], 100 + n);
    }
    assert!(requests(&mut host).is_empty(), "three are half open");
}

#[test]
fn a_peer_may_use_its_number_again_after_the_time_wait() {
    let mut host = host(config(), 8);
    request(&mut host, [10, 9, 9, 1], 5);
    let conn = requests(&mut host)[0];
    host.agent.reject(0, conn, b"").unwrap();
    request(&mut host, [10, 9, 9, 1], 5);
    assert!(requests(&mut host).is_empty());
    let end = host.agent.deadline().unwrap();
    host.agent.on_time(end, &host.counters);
    assert_eq!(host.agent.connections(), 0);
    request(&mut host, [10, 9, 9, 1], 5);
    assert_eq!(requests(&mut host).len(), 1);
}

#[test]
fn half_open_connections_are_limited_per_source_and_in_all() {
    let limits = Config { max_half_open: 10, max_half_open_per_source: 4, ..config() };
    let mut host = host(limits, 100);
    (0..50).for_each(|n| request(&mut host, [10, 9, 9, 1], n));
    let flood = requests(&mut host);
    assert_eq!(flood.len(), 4);
    for last in 3..8 {
        (0..3).for_each(|n| request(&mut host, [10, 9, 9, last], 100 * u32::from(last) + n));
    }
    assert_eq!(requests(&mut host).len(), 6);
    // Accepting changes nothing, the peer's confirmation does.
    host.agent.accept(0, flood[0], &accept_params(0x300)).unwrap();
    request(&mut host, [10, 9, 9, 9], 901);
    assert_eq!(requests(&mut host).len(), 0);
    host.agent.data_arrived(flood[0]);
    request(&mut host, [10, 9, 9, 9], 901);
    assert_eq!(requests(&mut host).len(), 1);
}

#[test]
fn half_open_connections_age_out() {
    let mut host = host(config(), 100);
    (0..40).for_each(|n| request(&mut host, [10, 9, 9, 1], n));
    for (i, conn) in requests(&mut host).into_iter().enumerate() {
        if i % 2 == 0 {
            host.agent.accept(0, conn, &accept_params(0x300 + i as u32)).unwrap();
        }
    }
    while let Some(at) = host.agent.deadline() {
        assert!(at < 120_000 * MS, "they would stay for long");
        host.agent.on_time(at, &host.counters);
        host.take();
    }
    assert_eq!(host.agent.connections(), 0);
    assert_eq!(host.log.iter().filter(|action| matches!(action, Action::Unreachable { .. })).count(), 40);
    assert_eq!(host.log.iter().filter(|action| matches!(action, Action::QpnFree { .. })).count(), 20);
}

#[test]
fn ended_connections_are_remembered_up_to_a_number() {
    let mut host = host(Config { max_time_wait: 16, ..config() }, 100);
    for n in 0..1000 {
        request(&mut host, [10, 9, 9, 1], n);
        let conn = requests(&mut host)[0];
        host.agent.reject(0, conn, b"").unwrap();
        host.agent.destroy(0, conn);
    }
    assert_eq!(host.agent.connections(), 16);
    // The latest are.
    host.take();
    request(&mut host, [10, 9, 9, 1], 999);
    assert!(requests(&mut host).is_empty() && matches!(host.sent()[..], [Body::Rej(_)]));
}

#[test]
fn strangers_cannot_make_us_talk_much() {
    let mut host = host(config(), 100);
    let ids = Ids { local: 5, remote: 6 };
    for i in 0..10_000u32 {
        let mad = Message { tid: 1, body: Body::Dreq { ids, remote_qpn: 7 } }.encode();
        host.receive(0, i.to_be_bytes().into(), host.ip, &mad);
    }
    assert_eq!(host.sent().len() as u32, config().stranger_rate);
    assert_eq!(host.count(Counter::CmLimited), 10_000 - u64::from(config().stranger_rate));
}

#[test]
fn communication_ids_carry_the_tag_and_differ() {
    let mut host = Host::new("10.0.0.1", 3, Config::new(0x55, next_id));
    let mut seen = std::collections::HashSet::new();
    for n in 0..500 {
        let to = "10.0.0.2:1234".parse().unwrap();
        host.agent.connect(0, ConnId(n), host.ip, to, &connect_params(n as u32)).unwrap();
        let Some(Body::Req(req)) = host.sent().pop() else { panic!() };
        assert_eq!(tag_of(req.local_id), 0x55);
        assert!(seen.insert(req.local_id));
    }
    let bits = seen.iter().fold((0, !0), |(or, and), id| (or | id, and & id));
    assert_eq!((bits.0, bits.1), (!0x7f | 0x55, 0x55), "all other bits vary");
}

#[test]
fn identities_are_recognised_and_differ() {
    let (a, b) = (Identity::new(!0), Identity::new(0));
    assert!(is_own_guid(a.guid) && is_own_guid(b.guid) && a != b);
    assert_eq!(a.guid.to_be_bytes()[..3], [0x72, 0x6e, 0x62]);
    assert!(!is_own_guid(0x0000_00ff_fe00_0001));
}
