//! Connections between two agents on a perfect network.

use roce_proto::Psn;
use roce_proto::cm::*;

use crate::world::*;

#[test]
fn a_connection_is_made_with_everything_both_sides_said() {
    let mut world = World::pair();
    world.connect(1, 0, 7);
    world.run(5);
    let events = world.hosts[0].events();
    let [Action::Request { listener, conn, private, local, peer, own_peer, mtu, reads }] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!((*listener, *own_peer, *mtu), (ListenerId(1), true, 1024));
    assert!(private.starts_with(b"hello\0"));
    assert_eq!((local.ip(), local.port(), peer.ip()), (world.hosts[0].ip, PORT, world.hosts[1].ip));
    assert!(peer.port() >= 32768);
    assert_eq!(*reads, Depths { serve: 9, issue: 4 });

    world.accept(0, *conn, 0x333);
    world.run(5);
    let passive = Attributes {
        local: world.hosts[0].ip,
        peer: world.hosts[1].ip,
        qpn: 0x333,
        dest_qpn: 0x107,
        send_psn: Psn::new(0xabc007),
        recv_psn: Psn::new(0x123456),
        mtu: 1024,
        ack_timeout: 17,
        retry: 7,
        rnr_retry: 6,
        serve_reads: 3,
        issue_reads: 3,
        own_peer: true,
    };
    assert_eq!(
        world.hosts[0].events(),
        [
            Action::QpReady { conn: *conn, attrs: passive },
            Action::Established { conn: *conn, private: Vec::new() }
        ]
    );
    let active = Attributes {
        local: passive.peer,
        peer: passive.local,
        qpn: passive.dest_qpn,
        dest_qpn: passive.qpn,
        send_psn: passive.recv_psn,
        recv_psn: passive.send_psn,
        rnr_retry: 5,
        serve_reads: 3,
        issue_reads: 3,
        ..passive
    };
    let events = world.hosts[1].events();
    let [Action::QpReady { attrs, .. }, Action::Established { conn: ConnId(7), private }] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!(*attrs, active);
    assert!(private.starts_with(b"welcome\0"));
    assert_eq!(world.next(), None, "nothing is left to do");
}

#[test]
fn queue_pairs_are_ready_before_the_peer_is_told() {
    let mut world = World::pair();
    world.connect(1, 0, 7);
    world.run(5);
    let conn = world.hosts[0].request();
    let [passive, active] = &mut world.hosts[..] else { unreachable!() };
    passive.agent.accept(world.now, conn, &accept_params(0x333)).unwrap();
    assert!(matches!(passive.agent.next_action(), Some(Action::QpReady { .. })));
    let Some(Action::Send { src, dst, mad }) = passive.agent.next_action() else { panic!("no REP") };
    active.agent.receive(world.now, src, dst, &mad, |_, _| 1024, &active.counters);
    assert!(matches!(active.agent.next_action(), Some(Action::QpReady { .. })));
    let Some(Action::Send { mad, .. }) = active.agent.next_action() else { panic!("no RTU") };
    assert!(matches!(Message::parse(&mad).unwrap().body, Body::Rtu(_)));
}

#[test]
fn a_disconnect_reaches_both_consumers_and_frees_the_numbers() {
    for (first, second) in [(0, 1), (1, 0)] {
        let mut world = World::pair();
        let conns = [world.establish(), ConnId(7)];
        world.forget_events();
        world.disconnect(first, conns[first]);
        world.disconnect(first, conns[first]);
        assert_eq!(world.hosts[first].events(), [Action::QpError { conn: conns[first] }]);
        world.run(5);
        assert_eq!(world.hosts[first].events(), [Action::Disconnected { conn: conns[first] }]);
        assert_eq!(
            world.hosts[second].events(),
            [Action::QpError { conn: conns[second] }, Action::Disconnected { conn: conns[second] }]
        );
        world.disconnect(second, conns[second]);
        world.run(500);
        for host in &mut world.hosts {
            assert_eq!((host.events(), host.agent.connections()), (vec![], 1), "still in time wait");
        }
        world.run(5000);
        assert_eq!(world.hosts[0].events(), [Action::QpnFree { qpn: 0x333 }]);
        assert_eq!(world.hosts[1].events(), [Action::QpnFree { qpn: 0x107 }]);
        assert!(world.hosts.iter().all(|host| host.agent.connections() == 0));
        assert_eq!(world.next(), None);
    }
}

#[test]
fn a_refusal_carries_reason_and_data() {
    let mut world = World::pair();
    world.connect(1, 0, 7);
    world.run(5);
    let conn = world.hosts[0].request();
    world.hosts[0].agent.reject(world.now, conn, b"go away").unwrap();
    world.run(5);
    let events = world.hosts[1].events();
    let [Action::QpError { .. }, Action::Rejected { conn: ConnId(7), reason: reason::CONSUMER, private }] =
        &events[..]
    else {
        panic!("{events:?}");
    };
    assert!(private.starts_with(b"go away\0"));
    world.run(40_000);
    assert_eq!(world.hosts[1].events(), [Action::QpnFree { qpn: 0x107 }]);
    assert!(world.hosts.iter().all(|host| host.agent.connections() == 0));
}

#[test]
fn nobody_listening_is_reason_8() {
    let mut world = World::pair();
    world.hosts[0].agent.unlisten(ListenerId(1));
    world.connect(1, 0, 7);
    world.run(5);
    let events = world.hosts[1].events();
    assert!(
        matches!(
            events[..],
            [Action::QpError { .. }, Action::Rejected { reason: reason::INVALID_SERVICE_ID, .. }]
        ),
        "{events:?}"
    );
    assert_eq!(world.hosts[0].agent.connections(), 0);
}

#[test]
fn an_agent_may_move_to_the_thread_that_runs_it() {
    let agent = World::pair().hosts.remove(0).agent;
    let port = std::thread::spawn(move || {
        let mut agent = agent;
        agent.listen(ListenerId(2), "::1".parse().unwrap(), PORT, 1)
    });
    assert_eq!(port.join().unwrap(), Ok(PORT));
}
