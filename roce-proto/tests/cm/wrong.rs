//! Messages from somebody else, or of no sense, and calls that a consumer should not make.

use roce_proto::Counter;
use roce_proto::cm::*;

use crate::states::{has, inject, is_disconnected, is_established, reply, unheard_request, watched};
use crate::world::*;

#[test]
fn forged_messages_touch_no_connection() {
    let mut world = World::pair();
    world.hosts.push(Host::new("10.0.0.66", 66, config()));
    let watch = watched(&mut world);
    world.establish();
    let (local, remote) = watch.get();
    let right = Ids { local: remote, remote: local };
    let wrong = Ids { local: remote ^ 1 << 20, ..right };
    let rej = |ids, of, reason| Rej { ids, of, reason, info_len: 0, info: [0; 72], private: [0; 148] };
    world.forget_events();

    // All right but the sender.
    inject(&mut world, 2, 0, Body::Dreq { ids: right, remote_qpn: 0x333 });
    inject(&mut world, 2, 0, Body::Rej(rej(right, 2, 28)));
    inject(&mut world, 2, 0, Body::Rej(rej(right, 0, 4)));
    inject(&mut world, 2, 0, Body::Drep(right));
    inject(&mut world, 2, 0, Body::Rtu(right));
    inject(&mut world, 2, 0, Body::Mra(Mra { ids: right, of: 1, timeout: 31 }));
    assert_eq!(world.hosts[0].count(Counter::CmWrongSource), 6);
    // From the peer's address with something to guess.
    inject(&mut world, 1, 0, Body::Dreq { ids: right, remote_qpn: 0x334 });
    inject(&mut world, 1, 0, Body::Dreq { ids: wrong, remote_qpn: 0x333 });
    inject(&mut world, 1, 0, Body::Rej(rej(wrong, 2, 28)));
    inject(&mut world, 1, 0, Body::Rej(rej(right, 0, 28)));
    inject(&mut world, 1, 0, Body::Drep(right));
    inject(&mut world, 1, 0, Body::Rtu(right));
    inject(&mut world, 1, 0, Body::Mra(Mra { ids: right, of: 1, timeout: 31 }));
    // "I gave up on my request", from one who has long had the answer.
    let mut gave_up = rej(Ids { remote: 0, ..right }, 2, reason::TIMEOUT);
    gave_up.info_len = 8;
    gave_up.info[..8].copy_from_slice(&world.hosts[1].guid.to_be_bytes());
    inject(&mut world, 1, 0, Body::Rej(gave_up));
    assert_eq!(world.hosts[0].count(Counter::CmStale), 8);
    world.run(60_000);
    assert!(world.hosts.iter().all(|host| host.log.is_empty()));
    assert_eq!(world.next(), None);

    // The right one works.
    inject(&mut world, 1, 0, Body::Dreq { ids: right, remote_qpn: 0x333 });
    assert!(has(&world.hosts[0], is_disconnected));
}

#[test]
fn a_reply_without_a_usable_queue_pair_is_refused() {
    let mut world = World::pair();
    let req = unheard_request(&mut world, 7);
    inject(&mut world, 0, 1, reply(&req, 0x999, 1));
    let unreachable = Action::Unreachable { conn: ConnId(7), why: Why::BadReply };
    assert_eq!(world.hosts[1].events(), [Action::QpError { conn: ConnId(7) }, unreachable]);
    assert_eq!(world.hosts[1].count(Counter::CmMalformed), 1);
}

#[test]
fn a_peer_that_lost_its_state_replaces_what_it_had() {
    let mut world = World::pair();
    let conn = world.establish();
    world.forget_events();
    // The same host, GUID and queue pair begin anew.
    world.hosts[1] = Host::new("10.0.0.2", 2, config());
    world.hosts[1].agent = {
        let identity = world.hosts[1].agent.identity();
        let mut random = Random(12345);
        Agent::new(identity, config(), Box::new(move || random.next()))
    };
    world.connect(1, 0, 7);
    world.run(5);
    let stale = |action: &Action| matches!(action, Action::Rejected { reason: reason::STALE_CONNECTION, .. });
    assert!(has(&world.hosts[1], stale), "{:?}", world.hosts[1].log);
    assert_eq!(world.hosts[0].events(), [Action::QpError { conn }, Action::Disconnected { conn }]);
    // And the next attempt finds nothing in its way.
    let params = ConnectParams { qp: connect_params(7).qp, ..connect_params(8) };
    let (src, dst) = (world.hosts[1].ip, "10.0.0.1:1234".parse().unwrap());
    world.hosts[1].agent.connect(world.now, ConnId(8), src, dst, &params).unwrap();
    world.run(5);
    world.hosts[0].request();
}

#[test]
fn nobody_else_can_replace_a_connection() {
    let mut world = World::pair();
    world.establish();
    world.forget_events();
    // Another host claims the GUID and the queue pair.
    let identity = world.hosts[1].agent.identity();
    let mut thief = Host::new("10.0.0.66", 66, config());
    let mut random = Random(12345);
    thief.agent = Agent::new(identity, config(), Box::new(move || random.next()));
    world.hosts.push(thief);
    world.connect(2, 0, 7);
    world.run(60_000);
    let stale = |action: &Action| matches!(action, Action::Rejected { reason: reason::STALE_CONNECTION, .. });
    assert!(has(&world.hosts[2], stale));
    assert!(world.hosts[0].log.is_empty() && world.hosts[1].log.is_empty());
}

#[test]
fn a_reply_in_the_name_of_another_connection_is_ignored() {
    let mut world = World::pair();
    let requests = [7, 8].map(|n| unheard_request(&mut world, n));
    inject(&mut world, 0, 1, reply(&requests[0], 100, 0x500));
    inject(&mut world, 0, 1, reply(&requests[1], 100, 0x501));
    assert_eq!(world.hosts[1].count(Counter::CmStale), 1);
    assert_eq!(world.hosts[1].log.iter().filter(|action| is_established(action)).count(), 1);
    // Its queue pair is another matter: the peer must have lost it.
    inject(&mut world, 0, 1, reply(&requests[1], 101, 0x500));
    let stale = |action: &Action| {
        matches!(action, Action::Rejected { conn: ConnId(8), reason: reason::STALE_CONNECTION, .. })
    };
    assert!(has(&world.hosts[1], stale));
    assert!(world.hosts[1].log.contains(&Action::QpError { conn: ConnId(7) }));
}

#[test]
fn a_request_in_flight_is_the_peers_alone() {
    let mut world = World::pair();
    world.hosts.push(Host::new("10.0.0.66", 66, config()));
    let req = unheard_request(&mut world, 7);
    inject(&mut world, 1, 0, Body::Req(req.clone()));
    world.hosts[0].request();
    world.run(1500);
    let repeats = world.hosts[0].count(Counter::CmRetries);
    // Neither repeated nor withdrawn by somebody else.
    inject(&mut world, 2, 0, Body::Req(req.clone()));
    let ids = Ids { local: req.local_id, remote: 0 };
    let mut info = [0; 72];
    info[..8].copy_from_slice(&req.guid.to_be_bytes());
    let rej = Rej { ids, of: 2, reason: reason::TIMEOUT, info_len: 8, info, private: [0; 148] };
    inject(&mut world, 2, 0, Body::Rej(rej.clone()));
    assert_eq!(world.hosts[0].count(Counter::CmWrongSource), 2);
    assert_eq!((world.hosts[0].log.len(), world.hosts[0].count(Counter::CmRetries)), (1, repeats));
    inject(&mut world, 1, 0, Body::Rej(rej));
    assert!(has(&world.hosts[0], |action| matches!(
        action,
        Action::Rejected { reason: reason::TIMEOUT, .. }
    )));
}

#[test]
fn wrong_calls_are_refused_and_change_nothing() {
    let mut world = World::pair();
    let now = world.now;
    let (src, dst) = (world.hosts[1].ip, "10.0.0.1:1234".parse().unwrap());
    let agent = &mut world.hosts[1].agent;
    let good = connect_params(1);
    let qp = |qpn| QpFacts { qpn, ..good.qp };
    for bad in [
        ConnectParams { mtu: 0, ..good },
        ConnectParams { mtu: 255, ..good },
        ConnectParams { mtu: 1500, ..good },
        ConnectParams { mtu: 8192, ..good },
        ConnectParams { qp: qp(0), ..good },
        ConnectParams { qp: qp(1), ..good },
        ConnectParams { qp: qp(0xff_ffff), ..good },
        ConnectParams { qp: qp(1 << 24), ..good },
    ] {
        assert_eq!(agent.connect(now, ConnId(1), src, dst, &bad), Err(Error::Invalid));
    }
    assert_eq!(agent.connect(now, ConnId(1), "::1".parse().unwrap(), dst, &good), Err(Error::Invalid));
    let long = ConnectParams { private: &[1; 57], ..good };
    assert_eq!(agent.connect(now, ConnId(1), src, dst, &long), Err(Error::PrivateTooLong(56)));
    assert_eq!((agent.connections(), agent.next_action()), (0, None));
    agent.connect(now, ConnId(1), src, dst, &ConnectParams { private: &[1; 56], ..good }).unwrap();
    assert_eq!(agent.connect(now, ConnId(1), src, dst, &good), Err(Error::Exists));
    assert_eq!(agent.accept(now, ConnId(1), &accept_params(9)), Err(Error::WrongState));
    assert_eq!(agent.reject(now, ConnId(1), b""), Err(Error::WrongState));
    assert_eq!(agent.accept(now, ConnId(2), &accept_params(9)), Err(Error::Unknown));
    assert_eq!(agent.reject(now, ConnId(2), b""), Err(Error::Unknown));
    assert_eq!(agent.disconnect(now, ConnId(2)), Err(Error::Unknown));
    agent.destroy(now, ConnId(2));
    world.run(5);
    let conn = world.hosts[0].request();
    let agent = &mut world.hosts[0].agent;
    let long = AcceptParams { private: &[1; 197], ..accept_params(9) };
    assert_eq!(agent.accept(now, conn, &long), Err(Error::PrivateTooLong(196)));
    assert_eq!(agent.accept(now, conn, &accept_params(1)), Err(Error::Invalid));
    assert_eq!(agent.reject(now, conn, &[1; 149]), Err(Error::PrivateTooLong(148)));
    agent.accept(now, conn, &AcceptParams { private: &[1; 196], ..accept_params(9) }).unwrap();
    assert_eq!(agent.accept(now, conn, &accept_params(9)), Err(Error::WrongState));
}
