//! What each message does in each state, and lost messages one by one.

use roce_proto::cm::*;
use roce_proto::{Counter, Psn};

use crate::world::*;

fn is_rep(body: &Body) -> bool {
    matches!(body, Body::Rep(_))
}

/// Loses the first `n` messages that `which` picks.
fn lose_first(world: &mut World, n: usize, which: fn(&Body) -> bool) {
    let mut left = n;
    world.drop_if = Box::new(move |body| {
        let lose = left > 0 && which(body);
        left -= usize::from(lose);
        lose
    });
}

pub fn has(host: &Host, what: fn(&Action) -> bool) -> bool {
    host.log.iter().any(what)
}

pub fn is_established(action: &Action) -> bool {
    matches!(action, Action::Established { .. })
}

pub fn is_disconnected(action: &Action) -> bool {
    matches!(action, Action::Disconnected { .. })
}

/// A message from one host of the world to another, as if made by hand.
pub fn inject(world: &mut World, from: usize, to: usize, body: Body) {
    let (src, dst) = (world.hosts[from].ip, world.hosts[to].ip);
    let mad = Message { tid: 1, body }.encode();
    let now = world.now;
    world.hosts[to].receive(now, src, dst, &mad);
    world.collect();
}

/// Communication IDs of an established connection as host `from` would write them, found by watching.
pub fn watched(world: &mut World) -> std::rc::Rc<std::cell::Cell<(u32, u32)>> {
    let ids = std::rc::Rc::new(std::cell::Cell::new((0, 0)));
    let seen = ids.clone();
    world.drop_if = Box::new(move |body| {
        if let Body::Rep(rep) = body {
            seen.set((rep.ids.local, rep.ids.remote));
        }
        false
    });
    ids
}

#[test]
fn a_lost_request_reply_or_confirmation_is_made_good() {
    let kinds: [fn(&Body) -> bool; 3] =
        [|body| matches!(body, Body::Req(_)), is_rep, |body| matches!(body, Body::Rtu(_))];
    for which in kinds {
        let mut world = World::pair();
        lose_first(&mut world, 3, which);
        world.connect(1, 0, 7);
        world.run(5000);
        let conn = world.hosts[0].request();
        world.accept(0, conn, 0x333);
        world.run(10_000);
        for host in &world.hosts {
            let times = host.log.iter().filter(|action| is_established(action)).count();
            assert_eq!(times, 1, "{:?}", host.log);
        }
        assert!(world.hosts.iter().map(|host| host.count(Counter::CmRetries)).sum::<u64>() >= 3);
        assert_eq!(world.next(), None);
    }
}

#[test]
fn data_says_as_much_as_a_confirmation() {
    let mut world = World::pair();
    world.drop_if = Box::new(|body| matches!(body, Body::Rtu(_)));
    let conn = world.establish();
    assert!(!has(&world.hosts[0], is_established));
    world.hosts[0].agent.data_arrived(conn);
    world.hosts[0].agent.data_arrived(conn);
    world.run(20_000);
    assert_eq!(world.hosts[0].log.iter().filter(|action| is_established(action)).count(), 1);
    assert_eq!(world.next(), None);
}

#[test]
fn a_lost_disconnect_or_its_reply_is_made_good() {
    let kinds: [fn(&Body) -> bool; 2] =
        [|body| matches!(body, Body::Dreq { .. }), |body| matches!(body, Body::Drep(_))];
    for which in kinds {
        let mut world = World::pair();
        world.establish();
        lose_first(&mut world, 2, which);
        world.disconnect(1, ConnId(7));
        world.run(3000);
        for host in &world.hosts {
            assert_eq!(host.log.iter().filter(|action| is_disconnected(action)).count(), 1, "{:?}", host.log);
        }
        world.run(30_000);
        assert!(world.hosts.iter().all(|host| host.agent.connections() == 0));
    }
}

#[test]
fn both_sides_may_disconnect_at_once() {
    let mut world = World::pair();
    let conn = world.establish();
    world.disconnect(0, conn);
    world.disconnect(1, ConnId(7));
    world.run(30_000);
    for host in &world.hosts {
        assert_eq!(host.log.iter().filter(|action| is_disconnected(action)).count(), 1);
        assert_eq!(host.log.iter().filter(|action| matches!(action, Action::QpError { .. })).count(), 1);
        assert_eq!(host.agent.connections(), 0);
    }
}

#[test]
fn a_dead_peer_is_given_up_in_bounded_time() {
    // Nobody answers a request.
    let mut world = World::pair();
    world.drop_if = Box::new(|_| true);
    world.connect(1, 0, 7);
    world.run(80_000);
    let unreachable = Action::Unreachable { conn: ConnId(7), why: Why::NoAnswer };
    let qpn = Action::QpnFree { qpn: 0x107 };
    assert_eq!(world.hosts[1].events(), [Action::QpError { conn: ConnId(7) }, unreachable, qpn]);
    assert_eq!(world.hosts[1].count(Counter::CmRetries), 15);

    // Nobody confirms a reply.
    let mut world = World::pair();
    world.drop_if = Box::new(|body| matches!(body, Body::Rtu(_)));
    let conn = world.establish();
    world.run(1);
    world.drop_if = Box::new(|_| true);
    world.run(80_000);
    let unreachable = Action::Unreachable { conn, why: Why::NoConfirmation };
    assert!(world.hosts[0].log.contains(&unreachable));
    assert_eq!(world.hosts[0].agent.connections(), 0);

    // Nobody answers a disconnect.
    let mut world = World::pair();
    let conn = world.establish();
    world.drop_if = Box::new(|_| true);
    world.disconnect(0, conn);
    world.run(30_000);
    assert!(has(&world.hosts[0], is_disconnected));
    assert_eq!(world.hosts[0].agent.connections(), 0);
}

#[test]
fn giving_up_a_reply_ends_what_the_peer_has() {
    let mut world = World::pair();
    // The reply arrives, no confirmation ever does.
    world.drop_if = Box::new(|body| matches!(body, Body::Rtu(_)));
    world.establish();
    world.run(80_000);
    assert!(has(&world.hosts[1], is_established) && has(&world.hosts[1], is_disconnected));
    assert!(world.hosts.iter().all(|host| host.agent.connections() == 0));
}

#[test]
fn a_slow_consumer_makes_us_ask_for_patience() {
    let mut world = World::pair();
    lose_first(&mut world, 1, |body| matches!(body, Body::Mra(_)));
    world.connect(1, 0, 7);
    world.run(20_000);
    let conn = world.hosts[0].request();
    let repeats = world.hosts[1].count(Counter::CmRetries);
    assert!((3..=4).contains(&repeats), "then it waits: {repeats}");
    world.accept(0, conn, 0x333);
    world.run(5);
    assert!(world.hosts.iter().all(|host| has(host, is_established)));
}

#[test]
fn a_request_that_is_never_answered_is_refused() {
    let mut world = World::pair();
    world.connect(1, 0, 7);
    world.run(59_000);
    let conn = world.hosts[0].request();
    world.run(3000);
    assert!(world.hosts[0].log.contains(&Action::Unreachable { conn, why: Why::Unanswered }));
    assert!(has(&world.hosts[1], |action| matches!(
        action,
        Action::Rejected { reason: reason::CONSUMER, .. }
    )));
    let late = world.hosts[0].agent.accept(world.now, conn, &accept_params(0x333));
    assert_eq!(late, Err(Error::WrongState));
}

#[test]
fn a_lost_refusal_is_repeated_and_the_consumer_not_asked_again() {
    let mut world = World::pair();
    lose_first(&mut world, 2, |body| matches!(body, Body::Rej(_)));
    world.connect(1, 0, 7);
    world.run(5);
    let conn = world.hosts[0].request();
    world.hosts[0].agent.reject(world.now, conn, b"no").unwrap();
    world.collect();
    world.hosts[0].agent.destroy(world.now, conn);
    world.run(5000);
    let rejected = world.hosts[1].log.iter().find_map(|action| match action {
        Action::Rejected { private, .. } => Some(private.clone()),
        _ => None,
    });
    assert!(rejected.expect("rejected").starts_with(b"no\0"));
    world.hosts[0].request();
}

#[test]
fn destroying_tells_the_peer_in_every_state_and_nobody_here() {
    let mut world = World::pair();
    // A REQ is out.
    world.connect(1, 0, 7);
    world.run(5);
    let conn = world.hosts[0].request();
    world.forget_events();
    world.destroy(1, ConnId(7));
    world.run(5);
    let [Action::Rejected { conn: told, reason: reason::TIMEOUT, .. }] = world.hosts[0].events()[..] else {
        panic!()
    };
    assert_eq!(told, conn);
    assert_eq!(world.hosts[1].events(), [Action::QpError { conn: ConnId(7) }]);

    // A request waits.
    world.connect(1, 0, 8);
    world.run(5);
    let conn = world.hosts[0].request();
    world.forget_events();
    world.destroy(0, conn);
    world.run(5);
    assert!(has(&world.hosts[1], |action| matches!(
        action,
        Action::Rejected { reason: reason::CONSUMER, .. }
    )));
    assert!(world.hosts[0].events().is_empty());
    world.forget_events();

    // A REP is out; it arrives, or it does not.
    for (n, lost) in [(9, false), (10, true)] {
        lose_first(&mut world, usize::from(lost), is_rep);
        world.connect(1, 0, n);
        world.run(5);
        let conn = world.hosts[0].request();
        world.accept(0, conn, 0x300 + n as u32);
        world.destroy(0, conn);
        world.forget_events();
        world.run(5000);
        let told = world.hosts[1].events();
        let disconnected = told.iter().any(is_disconnected);
        let rejected =
            told.iter().any(|action| matches!(action, Action::Rejected { reason: reason::CONSUMER, .. }));
        assert_eq!((disconnected, rejected), (!lost, lost), "{told:?}");
        assert!(!world.hosts[0].log.iter().any(is_disconnected));
        world.forget_events();
    }

    // Established.
    lose_first(&mut world, 0, is_rep);
    world.connect(1, 0, 11);
    world.run(5);
    let conn = world.hosts[0].request();
    world.accept(0, conn, 0x400);
    world.run(5);
    world.forget_events();
    world.destroy(1, ConnId(11));
    world.run(5);
    assert!(has(&world.hosts[0], is_disconnected));
    assert_eq!(world.hosts[1].events(), [Action::QpError { conn: ConnId(11) }]);
    assert_eq!(world.hosts[1].agent.disconnect(world.now, ConnId(11)), Err(Error::Unknown));
    world.run(30_000);
    assert!(world.hosts.iter().all(|host| host.agent.connections() == 0));
}

#[test]
fn a_reply_to_a_forgotten_request_is_refused() {
    let mut world = World::pair();
    world.connect(1, 0, 7);
    world.run(5);
    let conn = world.hosts[0].request();
    // The abort is lost, the reply comes after it: first within the time wait, then after it.
    for wait in [10, 30_000] {
        let mut world = World::pair();
        world.connect(1, 0, 7);
        world.run(5);
        let conn = world.hosts[0].request();
        lose_first(&mut world, 1, |body| matches!(body, Body::Rej(_)));
        world.destroy(1, ConnId(7));
        world.run(wait);
        world.accept(0, conn, 0x333);
        world.run(5);
        let invalid =
            |action: &Action| matches!(action, Action::Rejected { reason: reason::INVALID_COMM_ID, .. });
        assert!(has(&world.hosts[0], invalid), "{:?}", world.hosts[0].log);
        assert!(world.hosts[1].count(Counter::CmStale) > 0);
    }
    // A request that is withdrawn cannot be accepted.
    world.destroy(1, ConnId(7));
    world.run(5);
    let late = world.hosts[0].agent.accept(world.now, conn, &accept_params(0x333));
    assert_eq!(late, Err(Error::WrongState));
}

/// Host 1 asks host 0, which never hears it; the request.
pub fn unheard_request(world: &mut World, conn: u64) -> Req {
    let from = &mut world.hosts[1];
    let dst = "10.0.0.1:1234".parse().unwrap();
    from.agent.connect(world.now, ConnId(conn), from.ip, dst, &connect_params(conn as u32)).unwrap();
    match from.sent().pop() {
        Some(Body::Req(req)) => req,
        other => panic!("{other:?}"),
    }
}

pub fn reply(to: &Req, local: u32, qpn: u32) -> Body {
    Body::Rep(Rep {
        ids: Ids { local, remote: to.local_id },
        qpn,
        start_psn: Psn::new(0),
        responder_resources: 0,
        initiator_depth: 0,
        ack_delay: 15,
        rnr_retry: 7,
        guid: 5,
        private: [0; 196],
    })
}

#[test]
fn patience_is_granted_once_per_request_and_ends() {
    let mut world = World::pair();
    let begin = world.now;
    let req = unheard_request(&mut world, 7);
    let mra = Body::Mra(Mra { ids: Ids { local: 9, remote: req.local_id }, of: 0, timeout: 22 });
    world.drop_if = Box::new(|_| true);
    inject(&mut world, 0, 1, mra.clone());
    let first = world.next().unwrap() - begin;
    assert!((17_000 * MS..18_000 * MS).contains(&first), "{first}");
    world.now += 5000 * MS;
    inject(&mut world, 0, 1, mra.clone());
    assert_eq!((world.next().unwrap() - begin, world.hosts[1].count(Counter::CmStale)), (first, 1));
    // After each repeat it is granted again, until all has taken too long.
    while !has(&world.hosts[1], |action| matches!(action, Action::Unreachable { .. })) {
        world.step(u64::MAX);
        inject(&mut world, 0, 1, mra.clone());
    }
    assert_eq!(world.now - begin, config().give_up_after);
    assert_eq!(world.hosts[1].count(Counter::CmRetries), 4);
}

#[test]
fn a_withdrawn_acceptance_is_a_refusal_to_who_never_heard_it() {
    let mut world = World::pair();
    world.connect(1, 0, 7);
    world.run(5);
    let conn = world.hosts[0].request();
    // Only a repeated REQ gets through, while the DREQ is still being repeated.
    world.drop_if = Box::new(|body| matches!(body, Body::Rep(_) | Body::Dreq { .. }));
    world.accept(0, conn, 0x333);
    world.disconnect(0, conn);
    world.run(1000);
    assert!(has(&world.hosts[1], |action| matches!(
        action,
        Action::Rejected { reason: reason::CONSUMER, .. }
    )));
}

#[test]
fn an_unknown_disconnect_is_answered() {
    let mut world = World::pair();
    let ids = Ids { local: 0x111, remote: 0x222 };
    let (src, dst) = (world.hosts[1].ip, world.hosts[0].ip);
    let mad = Message { tid: 0x77, body: Body::Dreq { ids, remote_qpn: 5 } }.encode();
    world.hosts[0].receive(world.now, src, dst, &mad);
    let (from, to, answer) = world.hosts[0].take().pop().expect("a DREP");
    assert_eq!((from, to), (dst, src));
    assert_eq!(*Message::parse(&answer).unwrap().encode(), *answer);
    assert_eq!(Message::parse(&answer).unwrap(), Message { tid: 0x77, body: Body::Drep(ids.flip()) });
    assert_eq!(world.hosts[0].count(Counter::CmStale), 1);
}

#[test]
fn a_refusal_after_establishment_ends_the_connection() {
    let mut world = World::pair();
    let watch = watched(&mut world);
    let conn = world.establish();
    let (local, remote) = watch.get();
    let ids = Ids { local: remote, remote: local };
    world.forget_events();
    let rej = Rej { ids, of: 2, reason: 28, info_len: 0, info: [0; 72], private: [0; 148] };
    inject(&mut world, 1, 0, Body::Rej(rej));
    assert_eq!(world.hosts[0].events(), [Action::QpError { conn }, Action::Disconnected { conn }]);
}

#[test]
fn both_ends_may_be_in_one_agent() {
    let mut world = World::new(vec![Host::new("127.0.0.1", 1, config())]);
    world.hosts[0].agent.listen(ListenerId(1), "127.0.0.1".parse().unwrap(), PORT, 8).unwrap();
    for (n, active_ends) in [(7, true), (8, false)] {
        world.connect(0, 0, n);
        world.run(5);
        let conn = world.hosts[0].request();
        world.accept(0, conn, 0x333 + n as u32);
        world.run(5);
        assert_eq!(world.hosts[0].log.iter().filter(|action| is_established(action)).count(), 2);
        world.forget_events();
        world.disconnect(0, if active_ends { ConnId(n) } else { conn });
        world.run(5);
        let events = world.hosts[0].events();
        for end in [ConnId(n), conn] {
            assert!(
                events.contains(&Action::Disconnected { conn: end })
                    && events.contains(&Action::QpError { conn: end })
            );
        }
        world.run(30_000);
        assert_eq!(world.hosts[0].agent.connections(), 0);
        world.forget_events();
    }
    // An attempt that is given up.
    world.connect(0, 0, 9);
    world.run(5);
    let conn = world.hosts[0].request();
    world.destroy(0, ConnId(9));
    world.run(5);
    assert!(
        world.hosts[0]
            .log
            .iter()
            .any(|action| matches!(action, Action::Rejected { conn: c, .. } if *c == conn))
    );
}
