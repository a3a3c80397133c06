//! What only the in-process provider promises: limits that tests can shrink, faults on demand, windows that a peer
//! can invalidate.

mod common;

use common::*;
use verbs::loopback::{Config, Fabric};
use verbs::*;

fn paths(server: &End) -> (std::net::SocketAddr, std::net::SocketAddr) {
    server.path.unwrap()
}

#[test]
fn a_window_key_is_invalidated_with_the_send() {
    for windows in [WindowKind::PerDomain, WindowKind::PerQp] {
        let mut config = Config::default();
        config.device.windows = windows;
        let world = World::loopback(Fabric::with_config(config));
        let setup = Setup { access: WINDOWS, ..Setup::new(1) };
        let (mut server, mut client) = pair(&world, &setup);
        let mut window = client.device.clone().alloc_window().unwrap();
        let key = client.qp.bind_window(&mut window, &client.mr, 0, 4096).unwrap();
        client.recv(1, 64);
        server.post(10, SendOp::Write { addr: client.addr(0), rkey: key }, 8);
        server.post(11, SendOp::SendInvalidate(key), 8);
        server.post(12, SendOp::Write { addr: client.addr(0), rkey: key }, 8);
        assert_eq!(client.wc().invalidated, Some(key));
        server.expect_send(10);
        server.expect_send(11);
        assert_eq!(server.wc().status, WcStatus::Error(wc_status::REM_ACCESS_ERR));
    }
}

#[test]
fn type_2b_windows_are_good_on_one_queue_pair_only() {
    let mut config = Config::default();
    config.device.windows = WindowKind::PerQp;
    let world = World::loopback(Fabric::with_config(config));
    let setup = Setup { access: WINDOWS, ..Setup::new(1) };
    let (mut server, mut client) = pair(&world, &setup);
    // A second connection between the same two hosts.
    let device = server.device.clone();
    let id = client.cm.resolve(None, world.addr(1), std::time::Duration::ZERO).unwrap();
    assert!(matches!(event(&mut *client.cm, "resolution"), CmEvent::Resolved(_)));
    let mut client2 = client.cm.create_qp(id, &CAPS, &client.cq.handle()).unwrap();
    client.cm.connect(id, FOREVER, b"").unwrap();
    let CmEvent::ConnectRequest { id, .. } = event(&mut *server.cm, "request") else {
        panic!("not a request")
    };
    let _server2 = server.cm.create_qp(id, &CAPS, &server.cq.handle()).unwrap();
    server.cm.accept(id, FOREVER, b"").unwrap();
    let mut window = device.alloc_window().unwrap();
    let rkey = server.qp.bind_window(&mut window, &server.mr, 0, 4096).unwrap();
    let op = SendOp::Write { addr: server.addr(0), rkey };
    client.post(1, op, 4);
    client.expect_send(1);
    let wr = client.wr(2, op, 4);
    client2.post_send(&[wr]).unwrap();
    assert_eq!(client.wc().status, WcStatus::Error(wc_status::REM_ACCESS_ERR));
}

#[test]
fn local_invalidate_closes_a_window_and_refuses_regions() {
    let world = World::loopback(Fabric::new());
    let (mut server, mut client) = pair(&world, &Setup { access: WINDOWS, ..Setup::new(1) });
    let mut window = server.device.clone().alloc_window().unwrap();
    let key = server.qp.bind_window(&mut window, &server.mr, 0, 4096).unwrap();
    server.post(1, SendOp::LocalInvalidate(key), 0);
    server.expect_send(1);
    client.post(2, SendOp::Write { addr: server.addr(0), rkey: key }, 4);
    assert_eq!(client.wc().status, WcStatus::Error(wc_status::REM_ACCESS_ERR));
    let (mut server, _client) = pair(&World::loopback(Fabric::new()), &Setup::new(1));
    server.post(3, SendOp::LocalInvalidate(server.mr.rkey()), 0);
    assert_eq!(server.wc().status, WcStatus::Error(wc_status::LOC_QP_OP_ERR));
}

#[test]
fn send_slots_come_back_with_a_polled_completion_only() {
    let (mut server, mut client) = pair(&World::loopback(Fabric::new()), &Setup::new(1));
    let (addr, rkey) = (server.addr(0), server.mr.rkey());
    let mut quiet = client.wr(1, SendOp::Write { addr, rkey }, 1);
    quiet.signaled = false;
    client.qp.post_send(&[quiet; 15]).unwrap();
    client.post(2, SendOp::Write { addr, rkey }, 1);
    assert_eq!(client.qp.post_send(&[quiet]).unwrap_err().source.raw_os_error(), Some(12), "not polled yet");
    client.expect_send(2);
    client.qp.post_send(&[quiet; 16]).unwrap();
    let error = client.qp.post_send(&[quiet]).unwrap_err();
    assert_eq!(error.accepted, 0, "nothing signaled: these slots never come back");
    for i in 0..16 {
        server.recv(i, 0);
    }
    assert!(server.qp.post_recv(&[RecvWr { wr_id: 16, sges: SgeList::EMPTY }]).is_err());
}

#[test]
fn limits_are_enforced() {
    let mut config = Config::default();
    config.device =
        DeviceInfo { max_qp_wr: 16, max_cqe: 64, max_sge: 2, max_mr_bytes: 131072, ..config.device };
    config.device.windows = WindowKind::Unsupported;
    let world = World::loopback(Fabric::with_config(config));
    let (_server, mut client) = pair(&world, &Setup::new(1));
    let device = client.device.clone();
    assert!(device.clone().create_cq(65).is_err());
    assert!(device.clone().register(iobuf::Region::new(131073).unwrap(), ALL).is_err());
    assert!(device.clone().alloc_window().is_err());
    let id = client.cm.resolve(None, world.addr(1), std::time::Duration::ZERO).unwrap();
    for caps in [QpCaps { max_send_wr: 17, ..CAPS }, QpCaps { max_recv_sge: 3, ..CAPS }] {
        assert!(client.cm.create_qp(id, &caps, &client.cq.handle()).is_err());
    }
    let other_host = world.cm();
    drop(other_host);
    let foreign = pair(&World::loopback(Fabric::new()), &Setup::new(1)).0;
    assert!(client.cm.create_qp(id, &CAPS, &foreign.cq.handle()).is_err(), "a queue of another fabric");
}

#[test]
fn an_overrun_completion_queue_loses_its_queue_pairs() {
    let world = World::loopback(Fabric::new());
    let (server, mut client) = pair(&world, &Setup { cqe: 4, ..Setup::new(1) });
    let wr = client.wr(1, SendOp::Write { addr: server.addr(0), rkey: server.mr.rkey() }, 1);
    client.qp.post_send(&[wr; 5]).unwrap();
    let mut out = [Wc::default(); 8];
    assert_eq!(client.cq.poll(&mut out).unwrap(), 4, "what fitted");
    assert!(client.cq.poll(&mut out).is_err());
    assert!(client.qp.set_min_rnr_timer(1).is_err(), "not connected any more");
}

#[test]
fn a_cut_is_silent_until_restored() {
    let fabric = Fabric::new();
    let (mut server, mut client) = pair(&World::loopback(fabric.clone()), &Setup::new(1));
    server.recv(1, 64);
    let (local, peer) = paths(&server);
    fabric.cut(local, peer);
    client.post(10, SendOp::Send, 4);
    client.silent();
    server.silent();
    fabric.restore(peer, local);
    client.expect_send(10);
    assert_eq!(server.wc().wr_id, 1);
    fabric.cut(peer, local);
    client.post(11, SendOp::Send, 4);
    client.cm.disconnect(client.id).unwrap();
    assert_eq!(client.wc().status, WcStatus::Flushed);
    client.disconnected();
    assert!(server.cm.poll().unwrap().is_none(), "the peer never hears of it");
}

#[test]
fn a_broken_queue_pair_fails_first_and_flushes_the_rest() {
    let fabric = Fabric::new();
    let (mut server, mut client) = pair(&World::loopback(fabric.clone()), &Setup::new(1));
    let (local, peer) = paths(&server);
    server.recv(1, 64);
    server.post(2, SendOp::Send, 4);
    server.post(3, SendOp::Send, 4);
    assert!(fabric.break_qp(local, peer));
    let got = statuses(&server.wcs(3));
    let broken = WcStatus::Error(wc_status::RETRY_EXC_ERR);
    assert_eq!(got, [(1, WcStatus::Flushed), (2, broken), (3, WcStatus::Flushed)]);
    assert!(server.cm.poll().unwrap().is_none());
    client.post(4, SendOp::Send, 4);
    assert_eq!(client.wc().status, broken, "nobody answers the other side");
    assert!(!fabric.break_qp(local, local));
}

#[test]
fn removed_devices_break_everything() {
    let fabric = Fabric::new();
    let (mut server, _client) = pair(&World::loopback(fabric.clone()), &Setup::new(1));
    server.recv(1, 4);
    fabric.remove_devices();
    assert_eq!(server.wc().status, WcStatus::Flushed);
    let ids: Vec<CmId> = (0..2).map(|_| event(&mut *server.cm, "removal").id()).collect();
    assert!(ids.contains(&server.id) && ids.contains(&server.listener.unwrap()));
}

#[test]
fn a_finite_rnr_retry_ends() {
    let params = ConnParams { rnr_retry: 2, ..ConnParams::FOREVER };
    let (_server, mut client) = pair(&World::loopback(Fabric::new()), &Setup { params, ..Setup::new(1) });
    client.post(1, SendOp::Send, 4);
    assert_eq!(client.wc().status, WcStatus::Error(wc_status::RNR_RETRY_EXC_ERR));
}

#[test]
fn the_backlog_bounds_unseen_requests() {
    let world = World::loopback(Fabric::new());
    let mut cm = world.cm();
    let listener = cm.listen(world.addr(1), 1).unwrap();
    let mut clients: Vec<End> = (0..2).map(|_| resolved(&world, &Setup::new(1), None)).collect();
    for c in &mut clients {
        c.cm.connect(c.id, FOREVER, b"").unwrap();
    }
    assert!(clients[0].cm.poll().unwrap().is_none());
    assert!(matches!(clients[1].cm.poll().unwrap(), Some(CmEvent::Rejected { .. })));
    cm.destroy(listener);
    assert!(
        matches!(clients[0].cm.poll().unwrap(), Some(CmEvent::Rejected { .. })),
        "unseen requests end too"
    );
}

#[test]
fn a_client_that_gives_up_is_reported() {
    let world = World::loopback(Fabric::new());
    let mut cm = world.cm();
    cm.listen(world.addr(1), 8).unwrap();
    let mut client = resolved(&world, &Setup::new(1), None);
    client.cm.connect(client.id, FOREVER, b"").unwrap();
    client.cm.destroy(client.id);
    let CmEvent::ConnectRequest { id, .. } = event(&mut *cm, "request") else { panic!("not a request") };
    assert!(matches!(cm.poll().unwrap(), Some(CmEvent::Failed { id: got, .. }) if got == id));
    assert!(cm.accept(id, FOREVER, b"").is_err());
}
