//! Requests that a listener must not take: each with the reason it is told, or silence where an answer would go to
//! somebody who did not ask.

use roce_proto::Counter;
use roce_proto::cm::*;

use crate::golden::kernel_req;
use crate::world::*;

fn listening() -> Host {
    let mut host = Host::new("10.9.9.2", 1, config());
    host.agent.listen(ListenerId(1), host.ip, PORT, 8).unwrap();
    host
}

fn good() -> Req {
    match Message::parse(&kernel_req()).unwrap().body {
        Body::Req(req) => req,
        other => panic!("{other:?}"),
    }
}

fn send(host: &mut Host, from: &str, req: Req) {
    let mad = Message { tid: 77, body: Body::Req(req) }.encode();
    host.receive(0, from.parse().unwrap(), host.ip, &mad);
}

#[test]
fn bad_requests_are_refused_with_the_reason() {
    type Change = fn(&mut Req);
    let table: &[(&str, u16, Change)] = &[
        ("another port", reason::INVALID_SERVICE_ID, |r| r.service_id += 1),
        ("port 0", reason::INVALID_SERVICE_ID, |r| r.service_id = service_id(0)),
        ("another port space", reason::INVALID_SERVICE_ID, |r| r.service_id = 0x0111 << 16 | 1234),
        ("another kind of service", reason::INVALID_SERVICE_ID, |r| r.service_id |= 1 << 63),
        ("UC", reason::INVALID_TRANSPORT, |r| r.transport = 1),
        ("RD", reason::INVALID_TRANSPORT, |r| r.transport = 2),
        ("extended transport", reason::INVALID_TRANSPORT, |r| r.transport = 3),
        ("to another host", reason::INVALID_GID, |r| r.primary.remote_gid[15] = 9),
        ("to nobody", reason::INVALID_GID, |r| r.primary.remote_gid = [0; 16]),
        ("another partition", reason::INVALID_GID, |r| r.pkey = 0x1234),
        ("alternate path", reason::INVALID_ALTERNATE_GID, |r| r.alternate.local_lid = 0xffff),
        ("alternate address", reason::INVALID_ALTERNATE_GID, |r| r.alternate.remote_gid[3] = 1),
        ("queue pair 0", reason::UNSUPPORTED, |r| r.qpn = 0),
        ("queue pair 1", reason::UNSUPPORTED, |r| r.qpn = 1),
        ("multicast queue pair", reason::UNSUPPORTED, |r| r.qpn = 0xff_ffff),
        ("MTU code 0", reason::INVALID_MTU, |r| r.mtu_code = 0),
        ("MTU code 6", reason::INVALID_MTU, |r| r.mtu_code = 6),
        ("more than the path carries", reason::INVALID_MTU, |r| r.mtu_code = 4),
        ("no header of rdma_cm", reason::CONSUMER, |r| r.private = [0; 92]),
        ("a later header", reason::CONSUMER, |r| r.private[0] = 1),
        ("IP version 5", reason::CONSUMER, |r| r.private[1] = 0x50),
        ("header from elsewhere", reason::CONSUMER, |r| r.private[19] = 9),
        ("header to elsewhere", reason::CONSUMER, |r| r.private[35] = 9),
    ];
    for (what, reason, change) in table {
        let mut host = listening();
        let mut req = good();
        change(&mut req);
        send(&mut host, "10.9.9.1", req);
        let sent = host.sent();
        let [Body::Rej(rej)] = &sent[..] else { panic!("{what}: {sent:?}") };
        assert_eq!((rej.reason, rej.of), (*reason, 0), "{what}");
        assert_eq!(rej.ids, Ids { local: 0, remote: good().local_id }, "{what}");
        if *reason == reason::INVALID_GID {
            assert_eq!(
                (rej.info_len, &rej.info[..16]),
                (16, &gid(host.ip)[..]),
                "{what}: names the right one"
            );
        }
        assert_eq!(host.count(Counter::CmRejected), 1, "{what}");
        assert!(
            host.log.is_empty() && host.agent.connections() == 0 && host.agent.deadline().is_none(),
            "{what}"
        );
    }
}

#[test]
fn odd_but_harmless_requests_are_taken() {
    type Change = fn(&mut Req);
    let table: &[(&str, Change)] = &[
        ("limited member of the partition", |r| r.pkey = 0x7fff),
        ("no acknowledgement timeout", |r| r.primary.ack_timeout = 0),
        ("local LIDs 0, as without routers", |r| (r.primary.local_lid, r.primary.remote_lid) = (0, 0)),
        ("no retries", |r| (r.retry, r.rnr_retry, r.max_retries) = (0, 0, 0)),
        ("communication ID 0", |r| r.local_id = 0),
        ("least MTU", |r| r.mtu_code = 1),
        ("traffic class, hop limit, rate, label", |r| {
            (r.primary.traffic_class, r.primary.hop_limit, r.primary.rate, r.primary.flow_label) =
                (0xff, 0, 63, 0)
        }),
    ];
    for (what, change) in table {
        let mut host = listening();
        let mut req = good();
        change(&mut req);
        send(&mut host, "10.9.9.1", req.clone());
        let conn = host.request();
        host.agent.accept(0, conn, &accept_params(0x333)).unwrap();
        assert!(matches!(host.sent()[..], [Body::Rep(_)]), "{what}");
        let Some(Action::QpReady { attrs, .. }) = host.log.last() else { panic!("{what}") };
        assert!((1..=31).contains(&attrs.ack_timeout), "{what}");
        assert_eq!((attrs.retry, attrs.rnr_retry), (req.retry, req.rnr_retry), "{what}");
    }
}

#[test]
fn requests_in_a_false_name_are_not_answered() {
    let mut host = listening();
    send(&mut host, "10.9.9.3", good());
    let mut req = good();
    req.primary.local_gid[15] = 7;
    send(&mut host, "10.9.9.1", req);
    let mut req = good();
    req.primary.local_gid = gid("0.0.0.0".parse().unwrap());
    send(&mut host, "0.0.0.0", req);
    let mut req = good();
    req.primary.local_gid = gid("224.0.0.1".parse().unwrap());
    send(&mut host, "224.0.0.1", req);
    assert_eq!(host.count(Counter::CmWrongSource), 4);
    assert!(host.sent().is_empty() && host.log.is_empty() && host.agent.connections() == 0);
}

#[test]
fn refusing_strangers_has_its_limits() {
    let mut host = listening();
    for i in 0..1000 {
        let req = Req { service_id: 5, local_id: i, ..good() };
        send(&mut host, "10.9.9.1", req);
    }
    let limit = u64::from(config().stranger_rate_per_source);
    assert_eq!(host.sent().len() as u64, limit);
    assert_eq!((host.count(Counter::CmRejected), host.count(Counter::CmLimited)), (limit, 1000 - limit));
}

#[test]
fn ipv6_is_served_as_well() {
    let mut world = World::new(vec![Host::new("fd00::1", 1, config()), Host::new("fd00::2", 2, config())]);
    world.hosts[0].agent.listen(ListenerId(1), "::".parse().unwrap(), PORT, 8).unwrap();
    world.establish();
    assert!(matches!(world.hosts[1].log.last(), Some(Action::Established { .. })));
    let Action::Request { peer, local, .. } = &world.hosts[0].log[0] else { panic!() };
    assert_eq!((peer.ip(), local.to_string().as_str()), (world.hosts[1].ip, "[fd00::1]:1234"));
}

#[test]
fn listeners_take_their_addresses_only() {
    let agent = || Host::new("10.0.0.1", 1, config()).agent;
    let listen =
        |agent: &mut Agent, id, ip: &str, port| agent.listen(ListenerId(id), ip.parse().unwrap(), port, 1);
    // Whether a second listener fits beside the first.
    for (first, second, fits) in [
        ("10.0.0.1", "10.0.0.2", true),
        ("10.0.0.1", "10.0.0.1", false),
        ("10.0.0.1", "0.0.0.0", false),
        ("0.0.0.0", "10.0.0.1", false),
        ("0.0.0.0", "fd00::1", true),
        ("::", "10.0.0.1", false),
        ("10.0.0.1", "::", false),
        ("::", "0.0.0.0", false),
        ("10.0.0.1", "::ffff:10.0.0.1", false),
    ] {
        let mut agent = agent();
        listen(&mut agent, 1, first, PORT).unwrap();
        let second = listen(&mut agent, 2, second, PORT);
        assert_eq!(second, if fits { Ok(PORT) } else { Err(Error::InUse) }, "{first} {second:?}");
        agent.unlisten(ListenerId(1));
        agent.unlisten(ListenerId(2));
        assert_eq!(listen(&mut agent, 3, "::", PORT), Ok(PORT), "free again");
        assert_eq!(listen(&mut agent, 3, "::", 1), Err(Error::Exists));
    }
    let mut agent = agent();
    let ports = [1, 2].map(|id| listen(&mut agent, id, "::", 0).unwrap());
    assert!(ports[0] != ports[1] && ports.iter().all(|port| *port >= 32768));
}
