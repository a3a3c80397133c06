//! What RTRS relies on, of every provider: `crate::world` says which one.

use std::thread;
use std::time::Duration;

use crate::common::*;
use crate::world;
use verbs::*;

fn is_error(status: WcStatus) -> bool {
    matches!(status, WcStatus::Error(_))
}

#[test]
fn private_data_and_addresses_reach_both_sides() {
    let world = world();
    let (server, client) = pair(&world, &Setup::new(7001));
    assert!(server.private.starts_with(b"hello"));
    assert!(client.private.starts_with(b"welcome"));
    let (local, peer) = server.path.unwrap();
    assert_eq!((local, peer.ip()), (world.addr(7001), world.client_ip));
    assert_eq!(server.cm.local_addr(server.listener.unwrap()), Some(world.addr(7001)));
}

#[test]
fn the_source_address_is_what_the_server_sees() {
    let world = world();
    let mut cm = world.cm();
    cm.listen(world.addr(7002), 8).unwrap();
    let mut client = resolved(&world, &Setup::new(7002), Some(world.client_ip));
    client.cm.connect(client.id, FOREVER, &[7; 56]).unwrap();
    match event(&mut *cm, "request") {
        CmEvent::ConnectRequest { peer, private, .. } => {
            assert_eq!(peer.ip(), world.client_ip);
            assert_eq!(private[..56], [7; 56]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn sends_arrive_in_order_in_posted_receives() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7003));
    for i in 0..4 {
        server.recv(i, 4096);
    }
    client.fill(OUT, b"abcdefgh");
    client.post(10, SendOp::Send, 8);
    client.post(11, SendOp::SendImm(0x1234_5678), 3);
    client.post(12, SendOp::Send, 0);
    for id in 10..13 {
        client.expect_send(id);
    }
    let got: Vec<_> = server.wcs(3).iter().map(|w| (w.wr_id, w.op, w.byte_len, w.imm)).collect();
    assert_eq!(
        got,
        [(0, WcOp::Recv, 8, None), (1, WcOp::Recv, 3, Some(0x1234_5678)), (2, WcOp::Recv, 0, None)]
    );
    assert_eq!(server.bytes(IN, 8), b"abcdefgh");
    assert_eq!(server.bytes(IN + 4096, 4), b"abc\0");
}

#[test]
fn scatter_entries_are_gathered_and_scattered() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7004));
    let mut into = server.sge(IN + 100, 5);
    assert!(into.push(server.mr.sge(IN + 5000, 100).unwrap()));
    server.qp.post_recv(&[RecvWr { wr_id: 1, sges: into }]).unwrap();
    client.fill(OUT, b"abc");
    client.fill(OUT + 9000, b"defgh");
    let mut from = client.sge(OUT, 3);
    assert!(from.push(client.mr.sge(OUT + 9000, 5).unwrap()));
    client.qp.post_send(&[SendWr { wr_id: 2, op: SendOp::Send, sges: from, signaled: true }]).unwrap();
    assert_eq!(server.wc().byte_len, 8);
    assert_eq!(server.bytes(IN + 100, 6), b"abcde\0");
    assert_eq!(server.bytes(IN + 5000, 4), b"fgh\0");
}

#[test]
fn writes_land_and_only_the_immediate_is_seen() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7005));
    server.recv(1, 0);
    let data: Vec<u8> = (0..60_000u32).map(|i| (i % 251) as u8).collect();
    client.fill(OUT, &data);
    let (addr, rkey) = (server.addr(IN), server.mr.rkey());
    let mut first = client.wr(10, SendOp::Write { addr, rkey }, 60_000);
    first.signaled = false;
    let imm = SendOp::WriteImm { addr: addr + 60_000, rkey, imm: 0xdead_beef };
    let second = client.wr(11, imm, 1000);
    client.qp.post_send(&[first, second]).unwrap();
    client.expect_send(11);
    let wc = server.wc();
    assert_eq!((wc.wr_id, wc.op, wc.byte_len, wc.imm), (1, WcOp::RecvWriteImm, 1000, Some(0xdead_beef)));
    assert_eq!(server.bytes(IN, 60_000), data);
    assert_eq!(server.bytes(IN + 60_000, 1001), [&data[..1000], &[0]].concat());
    server.silent();
    client.silent();
}

#[test]
fn an_immediate_without_data_needs_no_key() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7006));
    server.recv(1, 0);
    client.post(10, SendOp::WriteImm { addr: 0, rkey: 0, imm: 5 }, 0);
    client.expect_send(10);
    let wc = server.wc();
    assert_eq!((wc.status, wc.op, wc.byte_len, wc.imm), (WcStatus::Success, WcOp::RecvWriteImm, 0, Some(5)));
}

#[test]
fn reads_fetch_from_the_peer() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7036));
    let data: Vec<u8> = (0..50_000u32).map(|i| (i % 253) as u8).collect();
    server.fill(OUT, &data);
    let op = SendOp::Read { addr: server.addr(OUT), rkey: server.mr.rkey() };
    let sges = client.sge(IN + 8, 50_000);
    client.qp.post_send(&[SendWr { wr_id: 1, op, sges, signaled: true }]).unwrap();
    client.expect_send(1);
    assert_eq!(client.bytes(IN, 50_009), [&[0; 8][..], &data, &[0]].concat());
    server.silent();
}

#[test]
fn reading_without_the_right_is_refused() {
    let setup = Setup { access: Access { local_write: true, ..Access::default() }, ..Setup::new(7037) };
    let (server, mut client) = pair(&world(), &setup);
    let op = SendOp::Read { addr: server.addr(OUT), rkey: server.mr.rkey() };
    client.fill(OUT, &[7; 8]);
    client.post(1, op, 8);
    client.expect_own_error(1, wc_status::REM_ACCESS_ERR);
    assert_eq!(client.bytes(OUT, 8), [7; 8]);
}

#[test]
fn reading_that_was_not_agreed_upon_is_refused() {
    let params = ConnParams { read_depth: 0, ..FOREVER };
    let (server, mut client) = pair(&world(), &Setup { params, ..Setup::new(7038) });
    let op = SendOp::Read { addr: server.addr(OUT), rkey: server.mr.rkey() };
    let wr = client.wr(1, op, 8);
    // Refused at once, or by the peer.
    if client.qp.post_send(&[wr]).is_ok() {
        assert_ne!(client.wc().status, WcStatus::Success);
    }
}

#[test]
fn a_sender_waits_for_receives_and_keeps_order() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7007));
    server.qp.set_min_rnr_timer(1).unwrap();
    let (addr, rkey) = (server.addr(IN), server.mr.rkey());
    client.fill(OUT, b"xyz");
    client.post(10, SendOp::WriteImm { addr, rkey, imm: 1 }, 1);
    client.post(11, SendOp::WriteImm { addr, rkey, imm: 2 }, 2);
    client.silent();
    server.recv(1, 0);
    client.expect_send(10);
    assert_eq!(server.wc().imm, Some(1));
    client.silent();
    server.recv(2, 0);
    client.expect_send(11);
    assert_eq!(server.wc().imm, Some(2));
    assert_eq!(server.bytes(IN, 3), b"xy\0");
}

#[test]
fn unsignaled_sends_are_silent() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7008));
    server.recv(1, 64);
    server.recv(2, 64);
    let mut quiet = client.wr(10, SendOp::Send, 4);
    quiet.signaled = false;
    let loud = client.wr(11, SendOp::Send, 4);
    client.qp.post_send(&[quiet, loud]).unwrap();
    client.expect_send(11);
    client.silent();
    assert_eq!(server.wcs(2).iter().map(|w| w.wr_id).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn a_receive_that_is_too_small_breaks_both_sides() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7009));
    server.recv(1, 16);
    server.recv(2, 16);
    client.post(10, SendOp::Send, 17);
    client.post(11, SendOp::Send, 1);
    let sent = statuses(&client.wcs(2));
    let received = statuses(&server.wcs(2));
    if client.is_rxe() {
        // It names other errors, on both sides (rxe_resp.c, RESPST_ERR_LENGTH).
        assert!(is_error(sent[0].1) && is_error(received[0].1), "{sent:?} {received:?}");
    } else {
        assert_eq!(sent[0], (10, WcStatus::Error(wc_status::REM_INV_REQ_ERR)));
        assert_eq!(received[0], (1, WcStatus::Error(wc_status::LOC_LEN_ERR)));
    }
    assert_eq!((sent[1], received[1]), ((11, WcStatus::Flushed), (2, WcStatus::Flushed)));
}

/// The write must fail with a remote access error and touch nothing.
fn refused_write(port: u16, access: Access, target: impl Fn(&End, &End) -> (u64, u32)) {
    let setup = Setup { access, ..Setup::new(port) };
    let (mut server, mut client) = pair(&world(), &setup);
    client.fill(OUT, &[9; 64]);
    let (addr, rkey) = target(&server, &client);
    server.recv(1, 16);
    client.post(10, SendOp::Write { addr, rkey }, 64);
    let wc = client.wc();
    assert_eq!(wc.status, WcStatus::Error(wc_status::REM_ACCESS_ERR));
    assert!(server.bytes(0, server.mr.region().len()).iter().all(|b| *b == 0));
    assert_eq!(server.wc().status, WcStatus::Flushed, "the responder's queue pair breaks too");
}

#[test]
fn writes_with_a_wrong_key_are_refused() {
    refused_write(7010, ALL, |server, _| (server.addr(0), server.mr.rkey() ^ 0x0100_0001));
}

#[test]
fn writes_past_the_end_are_refused() {
    refused_write(7011, ALL, |server, _| {
        (server.addr(0) + server.mr.region().len() as u64 - 63, server.mr.rkey())
    });
}

#[test]
fn writes_before_the_start_are_refused() {
    refused_write(7012, ALL, |server, _| (server.addr(0) - 1, server.mr.rkey()));
}

#[test]
fn writes_without_the_right_are_refused() {
    refused_write(7013, WINDOWS, |server, _| (server.addr(0), server.mr.rkey()));
}

#[test]
fn a_wrong_local_key_is_our_own_error() {
    let (_server, mut client) = pair(&world(), &Setup::new(7014));
    let mut sge = client.mr.sge(OUT, 8).unwrap();
    sge.lkey ^= 0x0100_0000;
    let wr = SendWr { wr_id: 1, op: SendOp::Send, sges: SgeList::one(sge), signaled: false };
    client.qp.post_send(&[wr]).unwrap();
    client.expect_own_error(1, wc_status::LOC_PROT_ERR);
}

#[test]
fn disconnect_flushes_both_sides_and_is_idempotent() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7015));
    for i in 0..3 {
        server.recv(i, 64);
        client.recv(i, 64);
    }
    client.cm.disconnect(client.id).unwrap();
    client.cm.disconnect(client.id).unwrap();
    server.disconnected();
    server.cm.disconnect(server.id).unwrap();
    client.disconnected();
    for end in [&mut server, &mut client] {
        let flushed = statuses(&end.wcs(3));
        assert_eq!(flushed, [0, 1, 2].map(|i| (i, WcStatus::Flushed)));
        end.post(10, SendOp::Send, 4);
        let late = end.wc();
        assert_eq!((late.wr_id, late.status), (10, WcStatus::Flushed));
        if !end.is_rxe() {
            end.qp.post_recv(&[RecvWr { wr_id: 9, sges: SgeList::EMPTY }]).unwrap();
            let late = end.wc();
            assert_eq!((late.wr_id, late.status), (9, WcStatus::Flushed));
        }
    }
}

#[test]
fn sends_that_wait_for_a_receive_flush_on_disconnect() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7016));
    client.post(1, SendOp::Send, 4);
    client.post(2, SendOp::Send, 4);
    client.silent();
    client.cm.disconnect(client.id).unwrap();
    assert_eq!(statuses(&client.wcs(2)), [(1, WcStatus::Flushed), (2, WcStatus::Flushed)]);
    server.disconnected();
}

#[test]
fn a_reject_carries_its_reason_and_data() {
    let world = world();
    let mut cm = world.cm();
    cm.listen(world.addr(7017), 8).unwrap();
    let mut client = resolved(&world, &Setup::new(7017), None);
    client.cm.connect(client.id, FOREVER, b"hi").unwrap();
    let CmEvent::ConnectRequest { id, .. } = event(&mut *cm, "request") else { panic!("not a request") };
    cm.reject(id, b"go away").unwrap();
    cm.destroy(id);
    match event(&mut *client.cm, "rejection") {
        CmEvent::Rejected { id, reason, private } => {
            assert_eq!((id, reason), (client.id, RejectReason::CONSUMER));
            assert!(private.starts_with(b"go away"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn nobody_listening_is_a_reject_by_the_transport() {
    let world = world();
    let mut client = resolved(&world, &Setup::new(7018), None);
    client.cm.connect(client.id, FOREVER, b"").unwrap();
    match event(&mut *client.cm, "rejection") {
        CmEvent::Rejected { reason, .. } => assert_eq!(reason, RejectReason::INVALID_SERVICE_ID),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_address_in_use_is_refused_in_words() {
    let world = world();
    let (mut a, mut b) = (world.cm(), world.cm());
    let first = a.listen(world.addr(7019), 8).unwrap();
    let error = b.listen(world.addr(7019), 8).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(98), "{error}");
    assert!(error.to_string().contains("7019"), "{error}");
    a.destroy(first);
    b.listen(world.addr(7019), 8).expect("free again");
}

#[test]
fn port_zero_becomes_a_port_that_works() {
    let world = world();
    let mut cm = world.cm();
    let listener = cm.listen(world.addr(0), 8).unwrap();
    let port = cm.local_addr(listener).unwrap().port();
    assert_ne!(port, 0);
    let mut client = resolved(&world, &Setup::new(port), None);
    client.cm.connect(client.id, FOREVER, b"").unwrap();
    assert!(matches!(event(&mut *cm, "request"), CmEvent::ConnectRequest { .. }));
}

#[test]
fn a_listener_on_any_ipv6_takes_ipv4() {
    let world = world();
    let mut cm = world.cm();
    let listener = cm.listen("[::]:7020".parse().unwrap(), 8).unwrap();
    let mut client = resolved(&world, &Setup::new(7020), None);
    client.cm.connect(client.id, FOREVER, b"").unwrap();
    match event(&mut *cm, "request") {
        CmEvent::ConnectRequest { listener: l, local, .. } => {
            assert_eq!(l, listener);
            assert_eq!(local.ip().to_canonical(), world.ip);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn destroying_one_end_disconnects_the_other() {
    let (mut server, client) = pair(&world(), &Setup::new(7021));
    let End { qp, mut cm, id, .. } = client;
    cm.destroy(id);
    drop(qp);
    server.disconnected();
    assert!(cm.poll().unwrap().is_none(), "no events of a destroyed connection");
}

#[test]
fn armed_queues_and_channels_wake_a_sleeper() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7022));
    server.recv(1, 64);
    server.cq.arm().unwrap();
    assert_eq!(server.cq.poll(&mut [Wc::default()]).unwrap(), 0);
    assert!(!readable(server.cq.wait_fd(), Duration::ZERO));
    client.post(2, SendOp::Send, 4);
    assert!(readable(server.cq.wait_fd(), test_support::patience()));
    assert_eq!(server.wc().wr_id, 1);
    server.cq.arm().unwrap();
    assert!(!readable(server.cq.wait_fd(), Duration::ZERO), "arming consumes old notifications");
    client.cm.disconnect(client.id).unwrap();
    assert!(readable(server.cm.wait_fd(), test_support::patience()));
    server.disconnected();
    assert!(!readable(server.cm.wait_fd(), Duration::ZERO));
}

fn readable(fd: i32, timeout: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    // SAFETY: the provider object that owns the descriptor outlives this call in every caller.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: 0 };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

#[test]
fn a_dropped_queue_pair_takes_its_work_along() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7023));
    server.recv(1, 64);
    let End { qp, mut cq, mr, .. } = server;
    drop(qp);
    drop(mr);
    client.post(10, SendOp::Send, 4);
    client.cm.disconnect(client.id).unwrap();
    assert!(client.wc().status != WcStatus::Success, "nobody was there to receive it");
    let mut out = [Wc::default(); 4];
    let n = cq.poll(&mut out).unwrap();
    assert!(out[..n].iter().all(|wc| wc.status != WcStatus::Success), "{out:?}");
}

#[test]
fn two_threads_exchange_messages_and_drop_their_ends() {
    const ROUNDS: u64 = 300;
    let (mut server, mut client) = pair(&world(), &Setup::new(7030));
    server.recv(0, 64);
    let echo = thread::spawn(move || {
        let mut seen = 0;
        while seen < ROUNDS {
            let wc = server.wc();
            assert_eq!(wc.status, WcStatus::Success);
            if wc.op == WcOp::Recv {
                assert_eq!(server.bytes(IN, 8), seen.to_le_bytes());
                server.fill(OUT, &(seen * 3).to_le_bytes());
                server.recv(0, 64);
                server.post(1, SendOp::Send, 8);
                seen += 1;
            }
        }
        server.expect_send(1);
    });
    for i in 0..ROUNDS {
        client.recv(0, 64);
        client.fill(OUT, &i.to_le_bytes());
        client.post(1, SendOp::Send, 8);
        assert!(client.wcs(2).iter().all(|w| w.status == WcStatus::Success));
        assert_eq!(client.bytes(IN, 8), (i * 3).to_le_bytes());
    }
    echo.join().unwrap();
    client.disconnected();
}

#[test]
fn a_batch_beyond_one_piece_keeps_its_order() {
    let caps = QpCaps { max_send_wr: 256, max_recv_wr: 256, ..CAPS };
    let (mut server, mut client) = pair(&world(), &Setup { caps, cqe: 512, ..Setup::new(7031) });
    let wrs: Vec<RecvWr> = (0..200).map(|wr_id| RecvWr { wr_id, sges: SgeList::EMPTY }).collect();
    server.qp.post_recv(&wrs).unwrap();
    let wr = |i: u32| SendWr {
        wr_id: u64::from(i),
        op: SendOp::WriteImm { addr: 0, rkey: 0, imm: i },
        sges: SgeList::EMPTY,
        signaled: i % 50 == 49,
    };
    client.qp.post_send(&(0..200).map(wr).collect::<Vec<_>>()).unwrap();
    for i in [49, 99, 149, 199] {
        client.expect_send(i);
    }
    let mut got = Vec::new();
    while got.len() < 200 {
        let mut out = [Wc::default(); 128];
        let n = until("completions", || Some(server.cq.poll(&mut out).unwrap()).filter(|n| *n > 0));
        got.extend(out[..n].iter().map(|w| (w.wr_id, w.imm)));
    }
    assert_eq!(got, (0..200u32).map(|i| (u64::from(i), Some(i))).collect::<Vec<_>>());
}

#[test]
fn connections_leave_no_descriptors_behind() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let world = world();
    let mut before = 0;
    for i in 0..6 {
        let (mut server, mut client) = pair(&world, &Setup { access: WINDOWS, ..Setup::new(7033) });
        if server.device.info().windows != WindowKind::Unsupported {
            let mut window = server.device.clone().alloc_window().unwrap();
            server.qp.bind_window(&mut window, &server.mr, 0, 4096).unwrap();
            settle_bind(&mut server, &mut client);
        }
        drop(client);
        server.disconnected();
        drop(server);
        // The first round opens the device for good.
        if i == 0 {
            before = open();
        }
    }
    // Tests beside this one come and go, too.
    until("return to the former number of descriptors", || (open() <= before).then_some(()));
}

/// A second connection between the hosts of `server` and `client`, on the same completion queues.
fn second_connection(
    world: &World,
    port: u16,
    server: &mut End,
    client: &mut End,
) -> (Box<dyn Qp>, Box<dyn Qp>) {
    let id = client.cm.resolve(Some(world.client_ip), world.addr(port), test_support::limit(30)).unwrap();
    assert!(matches!(event(&mut *client.cm, "resolution"), CmEvent::Resolved(got) if got == id));
    let theirs = client.cm.create_qp(id, &CAPS, &client.cq.handle()).unwrap();
    client.cm.connect(id, FOREVER, b"").unwrap();
    let CmEvent::ConnectRequest { id, .. } = event(&mut *server.cm, "request") else {
        panic!("not a request")
    };
    let ours = server.cm.create_qp(id, &CAPS, &server.cq.handle()).unwrap();
    server.cm.accept(id, FOREVER, b"").unwrap();
    // The client first: its side of the handshake goes on when its events are fetched.
    for end in [client, server] {
        assert!(matches!(event(&mut *end.cm, "establishment"), CmEvent::Established { .. }));
    }
    (ours, theirs)
}

#[test]
fn a_window_of_the_domain_is_good_on_another_queue_pair() {
    let world = world();
    let (mut server, mut client) = pair(&world, &Setup { access: WINDOWS, ..Setup::new(7032) });
    if server.device.info().windows != WindowKind::PerDomain {
        return;
    }
    let (_ours, mut theirs) = second_connection(&world, 7032, &mut server, &mut client);
    assert_ne!(theirs.num(), client.qp.num());
    let mut window = server.device.clone().alloc_window().unwrap();
    let rkey = server.qp.bind_window(&mut window, &server.mr, 0, 4096).unwrap();
    settle_bind(&mut server, &mut client);
    client.fill(OUT, b"other");
    let wr = client.wr(1, SendOp::Write { addr: server.addr(0), rkey }, 5);
    theirs.post_send(&[wr]).unwrap();
    let wc = client.wc();
    assert_eq!((wc.wr_id, wc.status, wc.qp_num), (1, WcStatus::Success, theirs.num()));
    assert_eq!(server.bytes(0, 5), b"other");
}

#[test]
fn a_full_send_queue_refuses_the_rest() {
    let (_server, mut client) = pair(&world(), &Setup::new(7024));
    // Nothing is received, so nothing completes. Devices may round the size up, but not without limit.
    let wrs: Vec<SendWr> = (0..4096).map(|i| client.wr(i, SendOp::Send, 1)).collect();
    let error = client.qp.post_send(&wrs).unwrap_err();
    assert!((16..4096).contains(&error.accepted), "{}", error.accepted);
    assert_eq!(error.source.raw_os_error(), Some(12), "{error}");
}

/// Client writes through a window; `None` if the device has no windows.
fn window_pair(port: u16) -> Option<(End, End, Window)> {
    let setup = Setup { access: WINDOWS, ..Setup::new(port) };
    let (server, client) = pair(&world(), &setup);
    if server.device.info().windows == WindowKind::Unsupported {
        return None;
    }
    let window = server.device.clone().alloc_window().expect("window");
    Some((server, client, window))
}

/// Windows work when a local send after the bind has completed.
fn settle_bind(server: &mut End, client: &mut End) {
    client.recv(15, 16);
    server.post(99, SendOp::Send, 1);
    server.expect_send(99);
    assert_eq!(client.wc().wr_id, 15);
}

#[test]
fn windows_open_their_range_under_a_fresh_key() {
    let Some((mut server, mut client, mut window)) = window_pair(7025) else { return };
    let first = server.qp.bind_window(&mut window, &server.mr, 4096, 4096).unwrap();
    assert_eq!(first, window.rkey);
    settle_bind(&mut server, &mut client);
    client.fill(OUT, b"window");
    client.post(1, SendOp::Write { addr: server.addr(4096 + 4090), rkey: first }, 6);
    client.expect_send(1);
    assert_eq!(server.bytes(4096 + 4090, 6), b"window");
    let second = server.qp.bind_window(&mut window, &server.mr, 0, 4096).unwrap();
    assert_ne!(first, second);
    settle_bind(&mut server, &mut client);
    client.post(2, SendOp::Write { addr: server.addr(0), rkey: second }, 6);
    client.expect_send(2);
    client.post(3, SendOp::Write { addr: server.addr(0), rkey: first }, 6);
    assert!(is_error(client.wc().status), "the former key is gone");
}

#[test]
fn windows_end_where_they_end() {
    let Some((mut server, mut client, mut window)) = window_pair(7026) else { return };
    if server.is_rxe() {
        eprintln!(
            "skipped: rxe checks the bounds of the region under a window only (rxe_resp.c, check_rkey)"
        );
        return;
    }
    let key = server.qp.bind_window(&mut window, &server.mr, 4096, 4096).unwrap();
    settle_bind(&mut server, &mut client);
    client.post(1, SendOp::Write { addr: server.addr(8191), rkey: key }, 2);
    assert_eq!(client.wc().status, WcStatus::Error(wc_status::REM_ACCESS_ERR));
    assert_eq!(server.bytes(8191, 2), [0, 0]);
}

#[test]
fn an_unbound_window_opens_nothing() {
    let Some((mut server, mut client, mut window)) = window_pair(7027) else { return };
    let key = server.qp.bind_window(&mut window, &server.mr, 0, 4096).unwrap();
    let none = server.qp.bind_window(&mut window, &server.mr, 0, 0).unwrap();
    settle_bind(&mut server, &mut client);
    assert_ne!(key, none);
    client.post(1, SendOp::Write { addr: server.addr(0), rkey: none }, 2);
    assert!(is_error(client.wc().status));
}

#[test]
fn binding_to_memory_without_the_right_fails() {
    let (mut server, _client) = pair(&world(), &Setup::new(7028));
    if server.device.info().windows == WindowKind::Unsupported {
        return;
    }
    let mut window = server.device.clone().alloc_window().unwrap();
    // Refused at once or by completion, as the device likes.
    if server.qp.bind_window(&mut window, &server.mr, 0, 4096).is_ok() {
        server.expect_own_error(BIND_WR_ID, wc_status::MW_BIND_ERR);
    }
}

#[test]
fn ordinary_regions_cannot_be_invalidated_by_the_peer() {
    let (mut server, mut client) = pair(&world(), &Setup::new(7029));
    server.recv(1, 64);
    let key = server.mr.rkey();
    client.post(10, SendOp::SendInvalidate(key), 4);
    assert!(is_error(server.wc().status));
}
