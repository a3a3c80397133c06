//! The client against this crate's server, over one path: data both ways, a full queue, keys that rotate, and every
//! kind of end.

mod common;

use std::time::Duration;

use common::disk::usr;
use common::probe::{Kind, Memory, Request, Seen};
use common::{
    Connected, DEPTH, MAX_IO, TestClient, TestServer, break_qp, cut, ends, once, server_options,
    session_options, short_heartbeat, wait_for,
};
use rtrs_poll::Options;
use rtrs_poll::client::{
    ControlError, Event, Limits, PathError, PathSpec, PathState, PathStats, Refused, SessionOptions, Via,
};
use rtrs_proto::Errno;
use rtrs_proto::response::ReadStyle;
use verbs::loopback::Fabric;

fn pattern(len: u32, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed).collect()
}

fn start(options: Options, reactors: usize) -> (Fabric, TestServer, TestClient) {
    let fabric = Fabric::new();
    let server = TestServer::start(&fabric, options);
    let client = TestClient::start(&fabric, reactors);
    (fabric, server, client)
}

/// Submits on the first reactor and waits for the result.
fn run(client: &TestClient, c: &Connected, request: Request) -> Result<(), Errno> {
    let (reactor, key) = c.keys[0];
    let cookie = request.cookie;
    client.on_lane(reactor, move |_, io| request.submit(io, key)).expect("room");
    let (got, result) = client.completion();
    assert_eq!(got, cookie);
    result
}

/// Every kind of server, every number of connections: what is written is read back, and nothing beyond.
#[test]
fn data_goes_both_ways() {
    let kinds = [
        (false, ReadStyle::Invalidate),
        (false, ReadStyle::OneMessage),
        (true, ReadStyle::Invalidate),
        (true, ReadStyle::OneMessage),
    ];
    for (rotate, reads) in kinds {
        let (_fabric, server, client) = start(Options { reads, ..server_options(rotate) }, 1);
        for connections in [1, 2, 5] {
            let c = client.connect(SessionOptions { connections, ..session_options(1) });
            assert_eq!(c.session.limits, Limits { queue_depth: DEPTH, max_io_size: MAX_IO, max_pieces: 3 });
            assert_eq!(client.path_info(c.id, c.path).rotating_keys, rotate);
            for (seed, len) in [512, 4096, 4608, MAX_IO].into_iter().enumerate() {
                let data = pattern(len, seed as u8);
                c.memory.fill(0, &data);
                assert_eq!(run(&client, &c, c.memory.write(0, len, &usr(b'D', 0, 512), 1)), Ok(()));
                c.memory.fill(1 << 20, &vec![0xee; len as usize + 512]);
                assert_eq!(run(&client, &c, c.memory.read(1 << 20, len, &usr(b'D', 0, 512), 2)), Ok(()));
                let got = c.memory.bytes(1 << 20, len as usize + 512);
                assert!(got[..len as usize] == data, "{len} bytes, rotating {rotate}, {reads:?}");
                assert!(got[len as usize..].iter().all(|b| *b == 0xee), "bytes behind the read were written");
            }
            assert_eq!(client.path_info(c.id, c.path).stats.inflight, 0);
            client.close(c.id);
            assert!(matches!(client.next_seen(), (0, Seen::Down)));
            wait_for("the server to forget the path", || server.sessions() == 0);
        }
    }
}

#[test]
fn a_write_gathers_its_pieces() {
    let (_fabric, _server, client) = start(server_options(false), 1);
    let c = client.connect(session_options(1));
    let (_, key) = c.keys[0];
    let data = pattern(12288, 3);
    let mut pieces = Vec::new();
    // In memory they lie apart and backwards, and pieces without bytes are among them.
    for (i, part) in data.chunks(4096).enumerate() {
        let at = (10 - i) * 8192;
        c.memory.fill(at, part);
        pieces.extend([c.memory.segment(at, 4096), c.memory.segment(at, 0)]);
    }
    let usr = usr(b'D', 0, 0).to_vec();
    let write = Request { via: Via::Io, usr: usr.clone(), kind: Kind::Write(pieces.clone()), cookie: 1 };
    assert_eq!(run(&client, &c, write.clone()), Ok(()));
    assert_eq!(run(&client, &c, c.memory.read(1 << 20, 12288, &usr, 2)), Ok(()));
    assert!(c.memory.bytes(1 << 20, 12288) == data);
    pieces.push(c.memory.segment(0, 512));
    let four = Request { kind: Kind::Write(pieces), ..write };
    let refused = client.on_lane(0, move |_, io| four.submit(io, key));
    assert_eq!(refused, Err(Refused::Pieces { got: 4, most: 3 }));
}

#[test]
fn requests_without_data_on_both_connections() {
    for rotate in [false, true] {
        let (_fabric, _server, client) = start(server_options(rotate), 1);
        let c = client.connect(session_options(1));
        for via in [Via::Service, Via::Io] {
            for kind in [Kind::Read(None), Kind::Write(Vec::new())] {
                let request = Request { via, usr: usr(b'D', 0, 0).to_vec(), kind: kind.clone(), cookie: 5 };
                assert_eq!(run(&client, &c, request), Ok(()), "{via:?} {kind:?}");
            }
        }
        let stats = PathStats { rd_cnt: 2, rd_bytes: 32, wr_cnt: 2, wr_bytes: 32, ..PathStats::default() };
        assert_eq!(client.path_info(c.id, c.path).stats, stats);
        client.with(move |cl, _| cl.reset_stats(c.id, c.path)).expect("there");
        assert_eq!(client.path_info(c.id, c.path).stats, PathStats::default());
    }
}

#[test]
fn errors_come_back_and_leave_the_buffer_alone() {
    for rotate in [false, true] {
        let (_fabric, _server, client) = start(server_options(rotate), 1);
        let c = client.connect(session_options(1));
        c.memory.fill(0, &[0xaa; 4096]);
        let read = c.memory.read(0, 4096, &usr(b'E', 61, 0), 1);
        assert_eq!(run(&client, &c, read), Err(Errno::ENODATA));
        assert!(c.memory.bytes(0, 4096) == [0xaa; 4096]);
        assert_eq!(run(&client, &c, c.memory.write(0, 4096, &usr(b'E', 28, 0), 2)), Err(Errno::ENOSPC));
        // What a lost session says, no server can say.
        let aborted = c.memory.write(0, 4096, &usr(b'E', 103, 0), 2);
        assert_eq!(run(&client, &c, aborted), Err(Errno::EREMOTEIO));
        assert_eq!(run(&client, &c, c.memory.write(0, 4096, &usr(b'D', 0, 0), 3)), Ok(()));
    }
}

/// All buffer ids in use is an ordinary answer, and each one that comes back serves again.
#[test]
fn a_full_queue_says_busy() {
    for (rotate, reactors, connections) in [(false, 1, 2), (true, 1, 3), (false, 2, 5), (false, 1, 1)] {
        let (_fabric, server, client) = start(server_options(rotate), reactors);
        let reactors_used = (0..reactors).collect();
        let c = client.connect(SessionOptions { connections, reactors: reactors_used, ..session_options(1) });
        assert_eq!(c.keys.len(), reactors);
        for _ in 0..3 {
            let mut taken = 0;
            for &(reactor, key) in &c.keys {
                let hold = c.memory.write(0, 512, &usr(b'H', 0, 0), 9);
                let share = usize::from(c.session.share(reactor));
                taken += client.on_lane(reactor, move |_, io| {
                    assert_eq!(io.free(key), share);
                    let n = (0..1000).take_while(|_| hold.submit(io, key).is_ok()).count();
                    assert_eq!(hold.submit(io, key), Err(Refused::Busy));
                    assert_eq!((io.inflight(key), io.free(key)), (n, 0));
                    n
                });
            }
            assert_eq!(taken, usize::from(DEPTH));
            wait_for("the server to have them all", || server.held() == taken);
            assert_eq!(client.path_info(c.id, c.path).stats.inflight, taken as u64);
            server.release();
            (0..taken).for_each(|_| assert_eq!(client.completion(), (9, Ok(()))));
        }
    }
}

/// Many rounds of all ids at once: send queue, receives and keys come round many times.
#[test]
fn a_long_run_at_full_depth() {
    const ROUNDS: u32 = 20_000;
    for rotate in [false, true] {
        let (_fabric, _server, client) = start(server_options(rotate), 1);
        let c = client.connect(session_options(1));
        let (_, key) = c.keys[0];
        let request = |cookie: u64| {
            let (at, usr) = (cookie as usize * 4096, usr(b'D', 0, cookie * 4096));
            if cookie.is_multiple_of(2) {
                c.memory.read(at, 4096, &usr, cookie)
            } else {
                c.memory.write(at, 4096, &usr, cookie)
            }
        };
        let requests: Vec<Request> = (0..u64::from(DEPTH)).map(request).collect();
        client.on_lane(0, move |probe, io| {
            requests.iter().for_each(|r| r.submit(io, key).expect("an id for each"));
            probe.repeat = (requests, ROUNDS);
        });
        let mut cookies: Vec<u64> = (0..DEPTH).map(|_| client.completion().0).collect();
        cookies.sort_unstable();
        assert!(cookies.into_iter().eq(0..u64::from(DEPTH)), "each request ends once");
        let stats = client.path_info(c.id, c.path).stats;
        assert_eq!((stats.rd_cnt + stats.wr_cnt, stats.inflight), (u64::from(ROUNDS) + u64::from(DEPTH), 0));
    }
}

#[test]
fn both_reactors_do_io_and_one_has_con_0() {
    let (_fabric, _server, client) = start(server_options(true), 2);
    let c = client.connect(SessionOptions { connections: 5, reactors: vec![1, 0], ..session_options(1) });
    assert_eq!(c.session.reactors, [1, 0]);
    for &(reactor, key) in &c.keys {
        let write = c.memory.write(reactor * 4096, 4096, &usr(b'D', 0, reactor as u64 * 4096), 7);
        let service = Request { via: Via::Service, kind: Kind::Read(None), cookie: 8, ..write.clone() };
        let (io, admin) =
            client.on_lane(reactor, move |_, io| (write.submit(io, key), service.submit(io, key)));
        assert_eq!((io, admin), (Ok(()), if reactor == 1 { Ok(()) } else { Err(Refused::NoServiceCon) }));
        // By different connections, so in any order.
        let mut cookies: Vec<u64> = (0..=reactor).map(|_| client.completion().0).collect();
        cookies.sort_unstable();
        assert_eq!(cookies, [7, 8][..=reactor]);
    }
}

#[test]
fn requests_that_fit_no_chunk_are_refused() {
    let (_fabric, _server, client) = start(server_options(false), 1);
    let c = client.connect(session_options(1));
    let (_, key) = c.keys[0];
    let too_much = c.memory.write(0, MAX_IO + 512, &usr(b'D', 0, 0), 1);
    let too_wordy = c.memory.write(0, 512, &[0; rtrs_poll::MAX_USR_LEN + 1], 1);
    let too_far = c.memory.read(0, 4 << 20, &usr(b'D', 0, 0), 1);
    let refused = client.on_lane(0, move |_, io| {
        let refused = [too_much, too_wordy, too_far].map(|r| r.submit(io, key).map_err(Refused::errno));
        (refused, io.inflight(key))
    });
    assert_eq!(refused, ([Err(Errno::EMSGSIZE); 3], 0));
    let longest = c.memory.write(0, 512, &[b'D'; rtrs_poll::MAX_USR_LEN], 1);
    assert_eq!(run(&client, &c, longest), Err(Errno::ENOSPC));
}

/// Memory outside the registry is refused; what comes into it works soon after; what leaves it is given back.
#[test]
fn only_registered_memory_is_used() {
    let (_fabric, _server, client) = start(server_options(false), 1);
    let c = client.connect(session_options(1));
    let (_, key) = c.keys[0];
    let usr = usr(b'D', 0, 0);
    let stray = Memory::unregistered();
    for request in [stray.write(0, 512, &usr, 1), stray.read(0, 512, &usr, 1)] {
        assert_eq!(client.on_lane(0, move |_, io| request.submit(io, key)), Err(Refused::Unregistered));
    }
    let late = Memory::new(&client.registry);
    let request = late.read(0, 512, &usr, 4);
    wait_for("new memory to be registered", || {
        let request = request.clone();
        client.on_lane(0, move |_, io| request.submit(io, key)).is_ok()
    });
    assert_eq!(client.completion(), (4, Ok(())));
    let regions = |client: &TestClient| client.registry.snapshot().regions.iter().flatten().count();
    assert_eq!(regions(&client), 2);
    drop(late);
    client.with(|cl, _| cl.refresh_memory());
    wait_for("memory to be given back", || regions(&client) == 1);
    assert_eq!(run(&client, &c, c.memory.read(0, 512, &usr, 5)), Ok(()));
    client.close(c.id);
    drop(c);
    wait_for("all memory to be given back", || regions(&client) == 0);
}

/// Holds all but one buffer id at the server.
fn hold_some(client: &TestClient, server: &TestServer, c: &Connected) -> usize {
    let count = send_some(client, c);
    wait_for("the server to hold them", || server.held() == count);
    count
}

/// As many, which the server will hold, without waiting for that.
fn send_some(client: &TestClient, c: &Connected) -> usize {
    let (reactor, key) = c.keys[0];
    let count = usize::from(DEPTH) - 1;
    let requests: Vec<Request> =
        (0..count as u64).map(|cookie| c.memory.read(0, 4096, &usr(b'H', 0, 0), cookie)).collect();
    client.on_lane(reactor, move |_, io| requests.iter().for_each(|r| r.submit(io, key).expect("room")));
    count
}

/// Every request ends exactly once with ECONNABORTED, then the session goes down, and takes no more.
fn all_fail(client: &TestClient, c: &Connected, count: usize) {
    let mut cookies = Vec::new();
    loop {
        match client.next_seen().1 {
            Seen::Completed(cookie, Err(Errno::ECONNABORTED)) => cookies.push(cookie),
            Seen::Down => break,
            other => panic!("requests of a lost session end with ECONNABORTED, not {other:?}"),
        }
    }
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..count as u64), "each ends once");
    let (reactor, key) = c.keys[0];
    let late = c.memory.write(0, 512, &usr(b'D', 0, 0), 1);
    assert_eq!(client.on_lane(reactor, move |_, io| late.submit(io, key)), Err(Refused::Down));
}

/// What is heard of the end of a session's only path, which is not tried again; returns the reason.
fn one_path_down(client: &TestClient, c: &Connected) -> PathError {
    // In any order: the path's queue pairs go at the same time as the session's requests.
    let (mut why, mut down) = (None, false);
    while why.is_none() || !down {
        match client.event() {
            Event::PathDown { path, why: reason, next_attempt: None, .. } if path == c.path => {
                why = Some(reason)
            }
            Event::SessionDown { session } if session == c.id => down = true,
            Event::PathUp { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(client.event(), Event::SessionStalled { session } if session == c.id));
    let info = client.info(c.id);
    assert!(!info.connected);
    assert_eq!((info.paths[0].state, info.paths[0].stats.inflight), (PathState::Closed, 0));
    why.expect("heard")
}

#[test]
fn the_server_closes() {
    let (_fabric, server, client) = start(server_options(false), 1);
    let c = client.connect(once());
    let count = hold_some(&client, &server, &c);
    assert_eq!(server.with(|s, cx| s.disconnect_path(cx, "test", None)), 1);
    all_fail(&client, &c, count);
    assert_eq!(one_path_down(&client, &c).errno(), Errno::ECONNRESET);
    server.release();
    // The same session can come back.
    wait_for("the server to forget the path", || server.sessions() == 0);
    client.with(move |cl, cx| cl.reconnect_path(cx, c.id, c.path)).expect("closed");
    let c = client.wait_up(c.id, c.memory);
    assert_eq!(run(&client, &c, c.memory.write(0, 512, &usr(b'D', 0, 0), 1)), Ok(()));
    let info = client.info(c.id);
    assert_eq!((info.generation, info.paths[0].stats.reconnects_ok), (2, 1));
}

#[test]
fn the_client_disconnects() {
    let (_fabric, server, client) = start(server_options(true), 1);
    let c = client.connect(session_options(1));
    let count = hold_some(&client, &server, &c);
    client.with(move |cl, cx| cl.disconnect_path(cx, c.id, c.path)).expect("there");
    all_fail(&client, &c, count);
    assert!(matches!(one_path_down(&client, &c), PathError::Disconnected));
    server.release();
    wait_for("the server to hear of it", || server.sessions() == 0);
}

#[test]
fn closing_a_session_fails_its_requests() {
    let (_fabric, server, client) = start(server_options(true), 1);
    let c = client.connect(session_options(1));
    let count = hold_some(&client, &server, &c);
    client.close(c.id);
    all_fail(&client, &c, count);
    let again = client.with(move |cl, cx| cl.close_session(cx, c.id));
    assert_eq!(again, Err(ControlError::NoSession));
    server.release();
    wait_for("the server to hear of it", || server.sessions() == 0);
}

#[test]
fn the_server_vanishes() {
    let (fabric, server, client) = start(server_options(false), 1);
    let c = client.connect(SessionOptions { heartbeat: short_heartbeat(), ..once() });
    let count = hold_some(&client, &server, &c);
    cut(&fabric, 0);
    all_fail(&client, &c, count);
    let why = one_path_down(&client, &c).to_string();
    assert!(why.contains("no heartbeat"), "{why}");
}

#[test]
fn a_queue_pair_breaks() {
    let (fabric, server, client) = start(server_options(false), 1);
    let c = client.connect(once());
    let count = hold_some(&client, &server, &c);
    assert!(break_qp(&fabric, 0));
    all_fail(&client, &c, count);
    let why = one_path_down(&client, &c).to_string();
    assert!(why.contains("has ended") || why.contains("work completion"), "{why}");
}

#[test]
fn the_device_goes_away() {
    let (fabric, server, client) = start(server_options(false), 1);
    let c = client.connect(once());
    let count = hold_some(&client, &server, &c);
    fabric.remove_devices();
    all_fail(&client, &c, count);
    one_path_down(&client, &c);
}

/// Heartbeats are answered, requests are not.
#[test]
fn a_request_that_is_never_answered_resets_the_path() {
    let (_fabric, _server, client) = start(server_options(false), 1);
    let c = client.connect(SessionOptions { io_timeout: Some(Duration::from_millis(100)), ..once() });
    let count = send_some(&client, &c);
    all_fail(&client, &c, count);
    let why = one_path_down(&client, &c).to_string();
    assert!(why.contains("no answer to the I/O request in buffer"), "{why}");
}

#[test]
fn heartbeats_keep_an_idle_path_up() {
    let server_side = Options { heartbeat: short_heartbeat(), ..server_options(true) };
    let (_fabric, server, client) = start(server_side, 1);
    let c = client.connect(SessionOptions { heartbeat: short_heartbeat(), ..once() });
    // Longer than either side would wait for the other.
    let h = short_heartbeat();
    std::thread::sleep(Duration::from_nanos(h.interval_ns) * (h.missed_max + 3));
    assert!(client.path_info(c.id, c.path).latency_ns > 0);
    assert_eq!(server.sessions(), 1);
    assert_eq!(run(&client, &c, c.memory.write(0, 512, &usr(b'D', 0, 0), 1)), Ok(()));
}

#[test]
fn connecting_fails_with_a_reason() {
    let (fabric, server, client) = start(server_options(false), 1);
    let (src, dst) = ends(0);
    let nobody = PathSpec::new("loopback", std::net::SocketAddr::new(dst.ip(), 1)).from(src);
    let (why, errno) = client.connect_fails(SessionOptions { paths: vec![nobody], ..once() });
    assert_eq!((why.contains("nobody listens"), errno), (true, Errno::ECONNRESET), "{why}");

    // A name that another client has is found out after INFO_REQ, and not told.
    let other = TestClient::start(&fabric, 1);
    let first = other.connect(session_options(1));
    let (why, errno) = client.connect_fails(once());
    assert_eq!(errno, Errno::ECONNRESET, "the server closes after INFO_REQ: {why}");
    // None of this harms the one that is up.
    assert_eq!(run(&other, &first, first.memory.write(0, 512, &usr(b'D', 0, 0), 1)), Ok(()));
    wait_for("the server to forget the others", || server.sessions() == 1);
    cut(&fabric, 1);
    let cut_off = SessionOptions { name: "other".into(), paths: vec![common::path(1)], ..once() };
    let (why, _) = client.connect_fails(cut_off);
    assert!(why.contains("unreachable"), "{why}");
}

#[test]
fn options_that_cannot_work_are_refused_at_once() {
    let (_fabric, _server, client) = start(server_options(false), 1);
    let refused = |options: SessionOptions| {
        client.with(move |c, cx| c.create_session(cx, options)).expect_err("cannot work")
    };
    assert_eq!(refused(SessionOptions { name: "a/b".into(), ..once() }).errno(), Errno::EINVAL);
    let elsewhere = PathSpec::new("x", ends(0).1);
    let why = refused(SessionOptions { paths: vec![elsewhere], ..once() }).to_string();
    assert!(why.contains("'x' is not available; available: loopback"), "{why}");
    let twice = SessionOptions { paths: vec![common::path(0), common::path(0)], ..once() };
    assert_eq!(refused(twice).errno(), Errno::EEXIST);
    let mixed = PathSpec::new("loopback", ends(0).1).from("::1".parse().expect("valid"));
    let why = refused(SessionOptions { paths: vec![mixed], ..once() }).to_string();
    assert!(why.contains("both IPv6"), "{why}");
    let c = client.connect(once());
    assert_eq!(refused(once()), ControlError::SessionExists("test".into()));
    client.close(c.id);
}

#[test]
fn shutdown_ends_every_path_first() {
    let (_fabric, server, client) = start(server_options(false), 1);
    client.connect(session_options(1));
    let (tx, rx) = std::sync::mpsc::channel();
    client.with(move |cl, cx| cl.shutdown(cx, move |_| tx.send(()).expect("the test waits for it")));
    test_support::recv(&rx);
    client.session_end();
    wait_for("the server to hear of it", || server.sessions() == 0);
}
