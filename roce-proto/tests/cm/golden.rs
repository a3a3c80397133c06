//! Against bytes that Linux 6.12 sent: the REQ of its RTRS client over rxe, 10.9.9.1 to 10.9.9.2.

use proptest::prelude::*;
use roce_proto::cm::*;
use roce_proto::{Counter, Psn};

use crate::world::*;

const MAD: &str = "\
    01070203000000000000000271b48e170010000000000000178eb4710000000000000000010604d2000000fffe000001\
    00000000000000000000120000000000000000a0ea51d3a7ffff37f0ffffffff00000000000000000000ffff0a090901\
    00000000000000000000ffff0a0909026f0a900000400088000000000000000000000000000000000000000000000000\
    00000000000000000000000000000000000000000040bd490000000000000000000000000a0909010000000000000000\
    000000000a0909020000bd1b00020000030001006a2db8b8e5634906afc2ae54cb233589b8f010f4b8244495bede91f3\
    0d9414cd010000000000000000000000";

pub fn kernel_req() -> Box<MadBytes> {
    let byte = |i: usize| u8::from_str_radix(&MAD[2 * i..2 * i + 2], 16).unwrap();
    Box::new(std::array::from_fn(byte))
}

#[test]
fn the_request_of_the_kernel_reads_as_it_was_meant_and_writes_the_same() {
    let message = Message::parse(&kernel_req()).unwrap();
    assert_eq!(message.tid, 0x2_71b4_8e17);
    let Body::Req(req) = &message.body else { panic!("{message:?}") };
    assert_eq!((req.local_id, req.service_id, req.guid), (0x178e_b471, service_id(1234), 0xff_fe00_0001));
    assert_eq!((req.qpn, req.start_psn), (0x12, Psn::new(0xea_51d3)));
    assert_eq!((req.responder_resources, req.initiator_depth, req.transport), (0, 0, 0));
    assert_eq!((req.remote_timeout, req.local_timeout, req.max_retries), (20, 20, 15));
    assert_eq!((req.retry, req.rnr_retry, req.pkey, req.mtu_code), (7, 7, 0xffff, 3));
    let path = &req.primary;
    assert_eq!(address(path.local_gid).to_string(), "10.9.9.1");
    assert_eq!(address(path.remote_gid).to_string(), "10.9.9.2");
    assert_eq!((path.local_lid, path.remote_lid, path.flow_label), (0xffff, 0xffff, 0x6f0a9));
    assert_eq!((path.rate, path.traffic_class, path.hop_limit, path.ack_timeout), (0, 0, 64, 17));
    assert_eq!(req.alternate, Path::default());
    assert_eq!(req.private[..4], [0, 0x40, 0xbd, 0x49]);
    assert_eq!(message.encode(), kernel_req());
}

#[test]
fn a_connection_from_the_kernel_gets_a_reply_it_understands() {
    let mut host = Host::new("10.9.9.2", 1, config());
    host.agent.listen(ListenerId(1), host.ip, PORT, 8).unwrap();
    let kernel = "10.9.9.1".parse().unwrap();
    host.receive(0, kernel, host.ip, &kernel_req());
    let conn = host.request();
    let Action::Request { private, peer, own_peer, .. } = &host.log[0] else { panic!() };
    assert_eq!(private[..8], [0, 0, 0xbd, 0x1b, 0, 2, 0, 0], "RTRS's own magic, version and so on");
    assert_eq!((peer.to_string().as_str(), *own_peer), ("10.9.9.1:48457", false));
    host.agent.accept(0, conn, &accept_params(0x333)).unwrap();
    let (src, dst, mad) = host.take().pop().expect("a REP");
    assert_eq!((src, dst), (host.ip, kernel));
    assert_eq!(mad[..8], [1, 7, 2, 3, 0, 0, 0, 0]);
    assert_eq!(mad[8..16], kernel_req()[8..16], "the transaction of the REQ");
    assert_eq!(mad[16..18], [0, 0x13]);
    let body = &mad[24..];
    assert_eq!(body[3] & 0x7f, 5, "the tag");
    assert_eq!(body[4..8], [0x17, 0x8e, 0xb4, 0x71]);
    assert_eq!(body[12..15], [0, 3, 0x33]);
    assert_eq!(body[20..23], [0x12, 0x34, 0x56]);
    assert_eq!((body[24], body[25]), (0, 0), "the kernel wants no READs");
    assert_eq!((body[26], body[27]), (15 << 3, 5 << 5));
    assert_eq!(body[28..31], [0x72, 0x6e, 0x62]);
    assert_eq!(body[36..44], *b"welcome\0");
    let Some(Action::QpReady { attrs, .. }) = host.log.last() else { panic!() };
    assert_eq!((attrs.dest_qpn, attrs.send_psn, attrs.rnr_retry), (0x12, Psn::new(0xea_51d3), 7));
    assert_eq!((attrs.own_peer, attrs.serve_reads, attrs.issue_reads), (false, 0, 0));
}

#[test]
fn our_request_has_every_field_where_the_kernel_has_it() {
    let mut world = World::pair();
    let host = &mut world.hosts[1];
    let to = "10.0.0.1:1234".parse().unwrap();
    host.agent.connect(0, ConnId(1), host.ip, to, &connect_params(1)).unwrap();
    let (_, _, mad) = host.take().pop().unwrap();
    let body = &mad[24..];
    assert_eq!(body[8..16], [0, 0, 0, 0, 1, 6, 0x04, 0xd2]);
    assert_eq!(body[16..19], [0x72, 0x6e, 0x62]);
    assert_eq!(body[32..35], [0, 1, 1]);
    assert_eq!((body[35], body[39]), (4, 9));
    assert_eq!(body[43], 20 << 3);
    assert_eq!(body[44..47], [0xab, 0xc0, 1]);
    assert_eq!((body[47], body[50], body[51]), (16 << 3 | 7, 3 << 4 | 6, 15 << 4));
    assert_eq!(body[48..50], [0xff, 0xff]);
    assert_eq!((body[93], body[94], body[95]), (64, 0, 17 << 3));
    assert_eq!(body[96..140], [0; 44], "no alternate path");
    assert_eq!(body[140..142], [0, 0x40]);
    assert_eq!((&body[156..160], &body[172..176]), (&[10, 0, 0, 2][..], &[10, 0, 0, 1][..]));
    assert_eq!(body[176..182], *b"hello\0");
}

#[test]
fn what_is_not_for_us_is_counted_as_malformed() {
    let mut host = Host::new("10.9.9.2", 1, config());
    let from = "10.9.9.1".parse().unwrap();
    // Base version, class, class version, method (and its R bit), LAP, APR, SIDR, an unknown attribute.
    let broken =
        [(0, 2), (1, 3), (2, 1), (3, 1), (3, 0x83), (17, 0x19), (17, 0x1a), (17, 0x17), (17, 0x18), (16, 1)];
    for (at, value) in broken {
        let mut mad = kernel_req();
        mad[at] = value;
        assert_eq!(Route::of(&mad), None);
        host.receive(0, from, host.ip, &mad);
    }
    assert_eq!(host.count(Counter::CmMalformed), broken.len() as u64);
    assert!(host.take().is_empty() && host.log.is_empty());
}

#[test]
fn messages_find_the_process_they_are_for() {
    let body = |body| Route::of(&Message { tid: 1, body }.encode());
    let ids = Ids { local: 0x1000, remote: 0x12345 };
    assert_eq!(Route::of(&kernel_req()), Some(Route::Port(1234)));
    assert_eq!(body(Body::Rtu(ids)), Some(Route::CommId(0x12345)));
    assert_eq!(body(Body::Dreq { ids, remote_qpn: 5 }), Some(Route::CommId(0x12345)));
    assert_eq!(tag_of(0x12345), 0x45);
    let rej = Rej { ids, of: 2, reason: 4, info_len: 8, info: [0; 72], private: [0; 148] };
    assert_eq!(body(Body::Rej(rej.clone())), Some(Route::CommId(0x12345)));
    let unknown = Ids { local: 0x1000, remote: 0 };
    assert_eq!(body(Body::Rej(Rej { ids: unknown, ..rej })), Some(Route::Any));
}

#[test]
fn mtu_codes_and_services_are_those_of_the_standard() {
    assert_eq!([1, 2, 3, 4, 5].map(mtu_bytes), [256, 512, 1024, 2048, 4096].map(Some));
    assert_eq!([0, 6, 15].map(mtu_bytes), [None; 3]);
    assert_eq!(
        [255, 256, 1404, 4095, 4096, 9000].map(mtu_code),
        [None, Some(1), Some(3), Some(4), Some(5), Some(5)]
    );
    assert_eq!(service_id(1234), 0x0106_04d2);
    assert_eq!(
        (service_port(0x0106_04d2), service_port(0x0111_04d2), service_port(1 << 32 | 0x0106_04d2)),
        (Some(1234), None, None)
    );
}

proptest! {
    /// Reserved fields are lost, everything else survives.
    #[test]
    fn messages_survive_writing(bytes in proptest::collection::vec(any::<u8>(), 256), kind in 0x10u8..0x17) {
        let mut mad: MadBytes = bytes.try_into().unwrap();
        mad[..4].copy_from_slice(&[1, 7, 2, 3]);
        mad[16..18].copy_from_slice(&[0, kind]);
        let message = Message::parse(&mad).expect("any bytes are a message of the kind");
        prop_assert_eq!(Message::parse(&message.encode()).unwrap(), message);
    }
}
