//! bdev_nbd under a verifying load, with servers of every dialect that break off, stand still, and lie.

mod nbd;
#[path = "world/mod.rs"]
mod world;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bdev::{Flags, IoRequest, Mode, Op, Segments, Status};
use nbd::{Client, FLAGS, Server, Speaks};
use rnbd_initiator::bdev::nbd::{Dialect, NbdError, NbdParams, Timeouts};
use world::load::{Load, Outcome};
use world::until;

const SIZE: usize = 4 << 20;

fn params(client: &Client, server: &Server, speaks: Speaks) -> NbdParams {
    let p = client.params(server);
    match speaks {
        Speaks::Y1997 => NbdParams { dialect: Dialect::Original, size: Some(SIZE as u64), ..p },
        _ => p,
    }
}

#[test]
fn every_dialect_carries_the_same_data() {
    let client = Client::new();
    for (speaks, handshake, dialect, connections) in [
        (Speaks::Y1997, "1997", "1997", 1),
        (Speaks::Oldstyle, "oldstyle", "simple", client.reactors.len()),
        (Speaks::Newstyle, "newstyle", "simple", client.reactors.len()),
        (Speaks::Simple, "fixed newstyle", "simple", client.reactors.len()),
        (Speaks::Structured, "fixed newstyle", "structured", client.reactors.len()),
        (Speaks::Extended, "fixed newstyle", "extended", client.reactors.len()),
    ] {
        let server = Server::start(speaks, SIZE);
        server.mood.reorder.store(true, Relaxed);
        assert_eq!(client.create(params(&client, &server, speaks)).unwrap(), "N", "{speaks:?}");
        let d = client.device();
        let agreed = d.agreed.as_ref().unwrap();
        assert_eq!((agreed.style, agreed.framing.name(), d.state), (handshake, dialect, "open"));
        assert_eq!(d.bdev.unwrap().1, SIZE as u64 / 512);
        until("all connections", || client.up() == connections);
        let loads: Vec<Load> =
            client.reactors.iter().take(1).map(|r| Load::start(&client.manager, r, "N", 32, 32)).collect();
        loads.iter().for_each(|l| l.goes_on(3000));
        loads.into_iter().for_each(|l| l.stop().good());
        client.delete(false).unwrap();
    }
}

/// Connections are cut again and again, with what has arrived executed or not, by an end or a reset: no request fails,
/// and no data are wrong.
#[test]
fn cuts_are_not_noticed() {
    let client = Client::new();
    for speaks in [Speaks::Y1997, Speaks::Simple, Speaks::Structured, Speaks::Extended] {
        let server = Server::start(speaks, SIZE);
        server.mood.reorder.store(true, Relaxed);
        client.create(params(&client, &server, speaks)).unwrap();
        let load = Load::start(&client.manager, &client.reactors[0], "N", 32, 32);
        load.goes_on(200);
        for (execute, reset) in [(false, false), (true, false), (false, true), (true, true)] {
            server.mood.execute_before_cut.store(execute, Relaxed);
            server.mood.reset.store(reset, Relaxed);
            let before = server.connections.load(Relaxed);
            server.mood.cut_after.store(100, Relaxed);
            until("three cuts", || server.connections.load(Relaxed) >= before + 3);
            server.mood.cut_after.store(0, Relaxed);
            load.goes_on(200);
        }
        load.stop().good();
        assert!(client.device().connections.iter().any(|c| c.reconnects > 0));
        client.delete(false).unwrap();
    }
}

/// The server stands still for longer than it is waited for, with writes in its socket that it executes later: none of
/// them may undo what was written after they were repeated.
#[test]
fn late_writes_undo_nothing() {
    let client = Client::new();
    let server = Server::start(Speaks::Simple, SIZE);
    let p = client.params(&server);
    let timeouts = Timeouts { io: Some(Duration::from_millis(200)), ..p.timeouts };
    client.create(NbdParams { timeouts, connections: Some(1), ..p }).unwrap();
    let load = Load::start(&client.manager, &client.reactors[0], "N", 32, 32);
    for _ in 0..3 {
        load.goes_on(300);
        let before = server.connections.load(Relaxed);
        server.mood.stall.begin();
        until("a stall", || server.mood.stall.stands());
        until("another connection", || server.connections.load(Relaxed) > before);
        server.mood.stall.end();
    }
    load.goes_on(1000);
    load.stop().good();
    assert!(client.device().connections[0].reconnects >= 3);
    client.delete(false).unwrap();
}

/// Something in between cuts connections, and the server executes what it has of them a little later: sooner than the
/// client repeats it. A server that is later than that, on a machine with other work, shows nothing.
#[test]
fn what_a_cut_leaves_at_the_server_undoes_nothing() {
    let client = Client::new();
    until("a server that is only a little late", || {
        let (latest_ms, outcome) = executed_late(&client);
        let soon = latest_ms < 200;
        if soon {
            outcome.good();
        }
        soon
    });
}

/// How late, and what came of it.
fn executed_late(client: &Client) -> (u64, Outcome) {
    let server = Server::start(Speaks::Simple, SIZE);
    let p = client.params(&server);
    client.create(NbdParams { connections: Some(4), ..p }).unwrap();
    server.mood.execute_before_cut.store(true, Relaxed);
    server.mood.late_ms.store(60, Relaxed);
    let load = Load::start(&client.manager, &client.reactors[0], "N", 16, 8);
    let before = server.connections.load(Relaxed);
    server.mood.cut_after.store(200, Relaxed);
    until("eight cuts", || server.connections.load(Relaxed) >= before + 8);
    server.mood.cut_after.store(0, Relaxed);
    load.goes_on(500);
    let outcome = load.stop();
    client.delete(false).unwrap();
    (server.mood.latest_ms.load(Relaxed), outcome)
}

#[test]
fn one_of_several_connections_is_enough() {
    let client = Client::new();
    let server = Server::start(Speaks::Structured, SIZE);
    let p = client.params(&server);
    client.create(NbdParams { connections: Some(4), ..p }).unwrap();
    until("four connections", || client.up() == 4);
    let load = Load::start(&client.manager, &client.reactors[0], "N", 32, 32);
    server.mood.cut_after.store(300, Relaxed);
    load.goes_on(3000);
    server.mood.cut_after.store(0, Relaxed);
    load.stop().good();
    until("four connections again", || client.up() == 4);
    // Without CAN_MULTI_CONN there is only one.
    client.delete(false).unwrap();
    server.flags.store(FLAGS & !0x100, Relaxed);
    let p = client.params(&server);
    client.create(NbdParams { connections: Some(4), ..p }).unwrap();
    assert_eq!(client.device().connections.len(), 1);
    client.delete(false).unwrap();
}

#[test]
fn io_waits_for_its_time_and_no_longer() {
    let client = Client::new();
    let server = Server::start(Speaks::Simple, SIZE);
    let p = client.params(&server);
    let timeouts = Timeouts { fast_io_fail: Some(Duration::from_millis(400)), ..p.timeouts };
    client.create(NbdParams { timeouts, connections: Some(1), ..p }).unwrap();
    let load = Load::start(&client.manager, &client.reactors[0], "N", 4, 8);
    load.goes_on(50);
    server.mood.closed.store(true, Relaxed);
    server.mood.cut_after.store(1, Relaxed);
    client.wait_state("closed");
    // Nothing else ends them now.
    let done = load.done();
    until("requests fail", || load.done() > done);
    let outcome = load.stop();
    assert!(matches!(outcome.failed, Some((_, Status::TimedOut))), "{outcome:?}");
    assert_eq!(outcome.mismatch, None);
    // When the server is back, everything goes on.
    server.mood.cut_after.store(0, Relaxed);
    server.mood.closed.store(false, Relaxed);
    client.wait_state("open");
    let load = Load::start(&client.manager, &client.reactors[0], "N", 4, 8);
    load.goes_on(200);
    load.stop().good();
    client.delete(false).unwrap();
}

#[test]
fn a_device_is_given_up_and_comes_back() {
    let client = Client::new();
    let server = Server::start(Speaks::Extended, SIZE);
    let p = client.params(&server);
    let timeouts = Timeouts { ctrlr_loss: Some(Duration::from_millis(300)), ..p.timeouts };
    client.create(NbdParams { timeouts, connections: Some(1), ..p }).unwrap();
    let load = Load::start(&client.manager, &client.reactors[0], "N", 4, 8);
    load.goes_on(50);
    server.mood.closed.store(true, Relaxed);
    server.mood.cut_after.store(1, Relaxed);
    until("the end", || client.device().given_up);
    until("failures", || load.done() > 0);
    let outcome = load.stop();
    assert!(matches!(outcome.failed, Some((_, Status::Gone | Status::Aborted))), "{outcome:?}");
    assert!(matches!(client.reconnect(), Err(NbdError::Connect { .. })), "nobody is there");
    server.mood.cut_after.store(0, Relaxed);
    server.mood.closed.store(false, Relaxed);
    until("a connection", || client.reconnect().is_ok() || client.device().state == "open");
    let load = Load::start(&client.manager, &client.reactors[0], "N", 4, 8);
    load.goes_on(200);
    load.stop().good();
    assert!(matches!(client.reconnect(), Err(NbdError::Already { .. })));
    client.delete(false).unwrap();
}

#[test]
fn announced_ends_and_errors() {
    let client = Client::new();
    let server = Server::start(Speaks::Structured, SIZE);
    client.create(client.params(&server)).unwrap();
    let load = Load::start(&client.manager, &client.reactors[0], "N", 8, 8);
    load.goes_on(100);
    // ESHUTDOWN is no failure: the request is repeated on another connection.
    let before = server.connections.load(Relaxed);
    server.mood.error.store(108, Relaxed);
    until("another connection", || server.connections.load(Relaxed) > before);
    load.goes_on(100);
    // ENOSPC is one, and not of the connection.
    let before = server.connections.load(Relaxed);
    server.mood.error.store(28, Relaxed);
    load.goes_on(500);
    assert_eq!(server.connections.load(Relaxed), before);
    let outcome = load.stop();
    assert!(matches!(outcome.failed, Some((Op::Write | Op::Read, Status::NoSpace))), "{outcome:?}");
    assert_eq!((outcome.failures, outcome.mismatch), (1, None));
    client.delete(false).unwrap();
}

#[test]
fn the_size_follows_and_the_nature_must_not_change() {
    let client = Client::new();
    let server = Server::start(Speaks::Simple, SIZE);
    let p = client.params(&server);
    client.create(NbdParams { connections: Some(1), ..p }).unwrap();
    let load = Load::start(&client.manager, &client.reactors[0], "N", 4, 8);
    load.goes_on(50);
    server.disk.lock().unwrap().resize(SIZE * 2, 0);
    server.mood.cut_after.store(10, Relaxed);
    until("the new size", || load.resized() == SIZE as u64 / 256);
    server.mood.cut_after.store(0, Relaxed);
    load.goes_on(50);
    load.stop().good();
    server.flags.store(FLAGS | 2, Relaxed);
    server.mood.cut_after.store(1, Relaxed);
    let load = Load::start(&client.manager, &client.reactors[0], "N", 4, 8);
    until("the end", || client.device().given_up);
    assert!(client.device().last_error.unwrap().contains("read-only now"));
    assert!(load.stop().failed.is_some());
    client.delete(false).unwrap();
}

#[test]
fn deleting_in_use() {
    let client = Client::new();
    let server = Server::start(Speaks::Simple, SIZE);
    client.create(client.params(&server)).unwrap();
    assert!(matches!(client.create(client.params(&server)), Err(NbdError::NameExists(_))));
    let load = Load::start(&client.manager, &client.reactors[0], "N", 4, 8);
    load.goes_on(50);
    assert!(matches!(client.delete(false), Err(NbdError::InUse { users: 1, .. })));
    load.goes_on(50);
    let deleted = std::thread::scope(|s| {
        let deleting = s.spawn(|| client.delete(true));
        // Its bdev was removed, so it ends.
        drop(load.stop());
        deleting.join().unwrap()
    });
    deleted.unwrap();
    assert!(client.manager.get("N").is_err());
    client.create(client.params(&server)).unwrap();
    client.delete(false).unwrap();
}

#[test]
fn what_prevents_a_device_is_said_and_nothing_stays() {
    let client = Client::new();
    let server = Server::start(Speaks::Simple, 100);
    let e = client.create(client.params(&server)).unwrap_err();
    assert!(e.to_string().contains("it has 100 bytes, which is no block of 512"), "{e}");
    server.mood.closed.store(true, Relaxed);
    let e = client.create(client.params(&server)).unwrap_err();
    assert!(e.to_string().contains("has closed the connection"), "{e}");
    let p = client.params(&server);
    assert!(client.create(NbdParams { keep_trying: true, ..p }).is_ok());
    assert_eq!(client.device().state, "init");
    client.delete(false).unwrap();
    let p = client.params(&server);
    client.create(NbdParams { keep_trying: true, ..p }).unwrap();
    server.disk.lock().unwrap().resize(SIZE, 0);
    server.mood.closed.store(false, Relaxed);
    client.wait_state("open");
    client.delete(false).unwrap();
}

/// A user goes without waiting: its memory is not touched any more, and everybody else goes on.
#[test]
fn a_channel_is_dropped_with_requests_in_flight() {
    let client = Client::new();
    let server = Server::start(Speaks::Simple, SIZE);
    let p = client.params(&server);
    client.create(NbdParams { connections: Some(1), ..p }).unwrap();
    let memory = iobuf::Region::new(1 << 20).unwrap();
    assert!(memory.copy_in(0, &[0xee; 1 << 20]));
    let descriptor = client.manager.open("N", Mode::ReadWrite, Box::new(|_| ())).unwrap();
    server.disk.lock().unwrap().fill(1);
    server.mood.stall.begin();
    let (m, reactor) = (memory.clone(), &client.reactors[0]);
    let (sent, wait) = std::sync::mpsc::channel();
    reactor.send(move |cx| {
        let mut channel = descriptor.channel().unwrap();
        for i in 0..8u64 {
            // SAFETY: the test keeps the memory.
            let segment = unsafe { m.segment(i as usize * 65536, 65536) }.unwrap();
            let (op, flags) = (Op::Read, Flags::NONE);
            let segments = Segments::from_slice(&[segment]);
            let r = IoRequest { op, flags, lba: i * 128, blocks: 128, segments, cookie: i };
            channel.submit(r).unwrap();
        }
        channel.kick();
        cx.set_local(Rc::new(RefCell::new(Some(channel))));
        sent.send(()).unwrap();
    });
    wait.recv().unwrap();
    // The first request is read before the server stands still.
    until("a stall", || server.mood.stall.stands());
    let before = server.connections.load(Relaxed);
    let (gone, wait) = std::sync::mpsc::channel();
    reactor.send(move |cx| {
        let channel = cx.local::<RefCell<Option<bdev::IoChannel>>>().unwrap();
        drop(channel.borrow_mut().take());
        gone.send(()).unwrap();
    });
    wait.recv().unwrap();
    let mut there = vec![0; 1 << 20];
    assert!(memory.copy_out(0, &mut there));
    until("another connection", || server.connections.load(Relaxed) > before);
    server.mood.stall.end();
    let load = Load::start(&client.manager, &client.reactors[0], "N", 8, 8);
    load.goes_on(500);
    load.stop().good();
    let mut later = vec![0; 1 << 20];
    assert!(memory.copy_out(0, &mut later));
    assert!(there == later, "memory was written after its user had it back");
    client.delete(false).unwrap();
}
