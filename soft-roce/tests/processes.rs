//! Two processes of one user on one address. Two [`SoftRoce`] in one process are as good as that: they share nothing.

#[path = "../../verbs/tests/common/mod.rs"]
mod common;

use std::cell::Cell;
use std::net::IpAddr;
use std::sync::OnceLock;

use common::{End, IN, OUT, Setup, World, event, pair, until};
use soft_roce::{Options, SoftRoce};
use verbs::*;

/// The same for all.
fn address() -> IpAddr {
    static NETWORK: OnceLock<[u8; 3]> = OnceLock::new();
    test_support::address(*NETWORK.get_or_init(test_support::network), 1).into()
}

fn host() -> SoftRoce {
    SoftRoce::new(Options { progress_thread: true, ..Options::default() }).unwrap()
}

/// Server and client, each with a host of its own, on the same address.
fn world() -> World {
    let hosts = [host(), host()];
    let turn = Cell::new(0);
    let open = move || {
        turn.set(turn.get() + 1);
        hosts[(turn.get() - 1) % 2].cm().unwrap()
    };
    World::new(open, &format!("{0},{0}", address()))
}

fn transfer(from: &mut End, to: &mut End) {
    let data: Vec<u8> = (0..50_000u32).map(|i| (i % 241) as u8).collect();
    to.recv(3, 0);
    from.fill(OUT, &data);
    let op = SendOp::WriteImm { addr: to.addr(IN), rkey: to.mr.rkey(), imm: 9 };
    from.post(1, op, 50_000);
    from.expect_send(1);
    assert_eq!(to.wc().imm, Some(9));
    assert_eq!(to.bytes(IN, 50_000), data);
}

fn exchange(server: &mut End, client: &mut End) {
    transfer(server, client);
    transfer(client, server);
}

#[test]
fn processes_share_an_address() {
    let world = world();
    // Both listen, so requests must find the right one.
    let (mut a, mut b) = pair(&world, &Setup::new(7201));
    exchange(&mut a, &mut b);
    let other = self::world();
    let (mut c, mut d) = pair(&other, &Setup::new(7202));
    exchange(&mut c, &mut d);
    exchange(&mut a, &mut b);
    // Those who came first go; the others' sockets move up in the group.
    drop((a, b));
    drop(world);
    exchange(&mut c, &mut d);
    c.cm.disconnect(c.id).unwrap();
    d.disconnected();
}

#[test]
fn a_port_has_one_listener_among_all_processes() {
    let (a, b) = (host(), host());
    let addr = (address(), 7203).into();
    let (mut first, mut second) = (a.cm().unwrap(), b.cm().unwrap());
    let id = first.listen(addr, 8).unwrap();
    let error = second.listen(addr, 8).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::EADDRINUSE), "{error}");
    first.destroy(id);
    second.listen(addr, 8).unwrap();
}

#[test]
fn nobody_listening_is_still_told_so() {
    let (a, b) = (host(), host());
    let (mut server, mut client) = (a.cm().unwrap(), b.cm().unwrap());
    server.listen((address(), 7204).into(), 8).unwrap();
    let id = client.resolve(None, (address(), 7205).into(), std::time::Duration::ZERO).unwrap();
    assert!(matches!(event(&mut *client, "resolution"), CmEvent::Resolved(_)));
    let device = client.device(id).unwrap();
    let cq = device.create_cq(16).unwrap();
    let _qp = client.create_qp(id, &common::CAPS, &cq.handle()).unwrap();
    client.connect(id, common::FOREVER, b"").unwrap();
    let reason = until("rejection", || match client.poll().unwrap() {
        Some(CmEvent::Rejected { reason, .. }) => Some(reason),
        _ => None,
    });
    assert_eq!(reason, RejectReason::INVALID_SERVICE_ID);
}
