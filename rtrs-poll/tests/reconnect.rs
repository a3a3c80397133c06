//! When attempts are made, when they end, and what a server must offer on the next one.

mod common;

use std::time::Duration;

use common::disk::{Store, usr};
use common::probe::Seen;
use common::{
    Connected, DEPTH, MAX_IO, TestClient, TestServer, break_qp, cut, no_heartbeat, once, path,
    server_options, session_options, wait_for,
};
use rtrs_poll::Options;
use rtrs_poll::client::{ControlError, Event, PathError, PathState, Reconnect, SessionEnd, SessionOptions};
use rtrs_proto::Errno;
use rtrs_proto::limits::Geometry;
use verbs::loopback::Fabric;

fn geometry(depth: u16, max_io: u32) -> Options {
    Options { geometry: Geometry::new(depth, max_io, 4096).expect("valid"), ..server_options(false) }
}

fn session_up(client: &TestClient) -> u64 {
    client.await_event(|e| match e {
        Event::SessionUp { generation, .. } => Some(*generation),
        _ => None,
    })
}

fn one_block(client: &TestClient, c: &Connected) {
    let (reactor, key) = c.keys[0];
    let write = c.memory.write(0, 4096, &usr(b'D', 0, 0), 1);
    client.on_lane(reactor, move |_, io| write.submit(io, key)).expect("up");
    assert_eq!(client.completion(), (1, Ok(())));
}

/// The server ends and starts again, with its disk as it was: a load goes on where it was.
#[test]
fn a_server_that_starts_again() {
    for rotate in [false, true] {
        let (fabric, disk) = (Fabric::new(), Store::new());
        let mut server = TestServer::with_store(&fabric, server_options(rotate), disk.clone());
        let client = TestClient::start(&fabric, 2);
        let c = client.connect(SessionOptions { connections: 3, reactors: vec![0, 1], ..session_options(2) });
        client.start_load(&c, 8);
        for generation in 2..5 {
            client.verify_more(&c, 50);
            drop(server);
            client.await_event(|e| matches!(e, Event::SessionDown { .. }).then_some(()));
            // While nobody listens.
            for _ in 0..3 {
                client.path_down();
            }
            server = TestServer::with_store(&fabric, server_options(rotate), disk.clone());
            assert_eq!(session_up(&client), generation);
            client.verify_more(&c, 50);
        }
        client.stop_load(&c);
    }
}

#[test]
fn attempts_are_counted_and_end() {
    let fabric = Fabric::new();
    let server = TestServer::start(&fabric, server_options(false));
    let client = TestClient::start(&fabric, 1);
    let delay = Duration::from_millis(16);
    let reconnect = Reconnect { delay, max_attempts: Some(3) };
    let c = client.connect(SessionOptions { reconnect, ..session_options(1) });
    drop(server);
    let mut delays = Vec::new();
    while delays.last() != Some(&None) {
        delays.push(client.path_down().2);
    }
    assert_eq!(delays.len(), 4, "the loss, and three attempts");
    assert!(delays[..3].iter().all(|d| d.is_some_and(|d| d >= delay && d < delay * 9 / 8)), "{delays:?}");
    client.await_event(|e| matches!(e, Event::SessionStalled { .. }).then_some(()));
    let info = client.path_info(c.id, c.path);
    assert_eq!(
        (info.state, info.stats.reconnects_failed, info.stats.reconnects_ok),
        (PathState::Closed, 3, 0)
    );
    assert!(info.last_error.is_some_and(|e| e.contains("nobody listens")));
    // Somebody sees to it; a success forgives all failures.
    let server = TestServer::start(&fabric, server_options(false));
    client.with(move |cl, cx| cl.reconnect_path(cx, c.id, c.path)).expect("closed");
    assert_eq!(session_up(&client), 2);
    drop(server);
    delays.clear();
    while delays.last() != Some(&None) {
        delays.push(client.path_down().2);
    }
    assert_eq!(delays.len(), 4);
}

/// The first connection is tried again like any other.
#[test]
fn a_server_that_comes_late() {
    let fabric = Fabric::new();
    let client = TestClient::start(&fabric, 1);
    let id = client.create(session_options(2));
    for _ in 0..6 {
        assert!(client.path_down().2.is_some());
    }
    let _server = TestServer::start(&fabric, server_options(false));
    assert_eq!(session_up(&client), 1);
    wait_for("both paths", || client.info(id).paths.iter().all(|p| p.state == PathState::Connected));
}

#[test]
fn a_session_ends_when_it_has_been_lost_for_too_long() {
    let fabric = Fabric::new();
    let client = TestClient::start(&fabric, 1);
    // Never connected, after some attempts.
    let after = test_support::limit(2);
    client.create(SessionOptions { loss_timeout: Some(after), ..session_options(2) });
    let SessionEnd::LossTimeout { after: said, last } = client.session_end() else { panic!("another end") };
    assert_eq!(said, after);
    assert!(last.contains("nobody listens"), "{last}");
    // Lost; how long connecting takes is another question.
    let after = Duration::from_millis(100);
    let server = TestServer::start(&fabric, server_options(false));
    let c = client.connect(session_options(2));
    wait_for("both paths", || client.info(c.id).paths.iter().all(|p| p.state == PathState::Connected));
    client.with(move |cl, _| cl.set_loss_timeout(c.id, Some(after))).expect("there");
    std::thread::sleep(after * 2);
    one_block(&client, &c);
    assert!(break_qp(&fabric, 0));
    // One of two paths is no session.
    std::thread::sleep(after * 2);
    one_block(&client, &c);
    drop(server);
    assert!(matches!(client.session_end(), SessionEnd::LossTimeout { .. }));
    wait_for("the reactor to hear of it", || matches!(client.next_seen().1, Seen::Down));
    assert!(client.with(|cl, cx| cl.sessions(cx.now)).is_empty());
}

#[test]
fn how_to_reconnect_can_be_changed() {
    let fabric = Fabric::new();
    let client = TestClient::start(&fabric, 1);
    let id = client.create(session_options(1));
    client.path_down();
    let set = |reconnect| client.with(move |cl, _| cl.set_reconnect(id, reconnect));
    let forever = Reconnect { delay: Duration::from_secs(3600), max_attempts: None };
    set(forever).expect("good");
    let far = client.await_event(|e| match e {
        Event::PathDown { next_attempt: Some(n), .. } if *n >= Duration::from_secs(3600) => Some(*n),
        _ => None,
    });
    let left = client.info(id).paths[0].next_attempt.expect("one is due");
    assert!(left <= far && left > far - test_support::patience());
    assert!(matches!(
        set(Reconnect { max_attempts: Some(10_000), ..forever }),
        Err(ControlError::Options(_))
    ));
    // Not later than now, if somebody asks.
    set(Reconnect { delay: Duration::from_millis(5), max_attempts: Some(0) }).expect("good");
    let path = client.info(id).paths[0].id;
    client.with(move |cl, cx| cl.reconnect_path(cx, id, path)).expect("it rests");
    assert_eq!(client.path_down().2, None);
    client.await_event(|e| matches!(e, Event::SessionStalled { .. }).then_some(()));
    client.with(move |cl, _| cl.set_loss_timeout(id, Some(Duration::from_millis(1)))).expect("there");
    assert!(matches!(client.session_end(), SessionEnd::LossTimeout { .. }));
}

/// The server still executes requests of the lost path, so it refuses the path until they are done (-104).
#[test]
fn a_refused_reconnect_is_repeated() {
    let fabric = Fabric::new();
    let server = TestServer::start(&fabric, server_options(false));
    let client = TestClient::start(&fabric, 1);
    let c = client.connect(session_options(1));
    let (reactor, key) = c.keys[0];
    let hold = c.memory.read(0, 512, &usr(b'H', 0, 0), 3);
    client.on_lane(reactor, move |_, io| hold.submit(io, key)).expect("up");
    wait_for("the server to hold it", || server.held() == 1);
    assert!(break_qp(&fabric, 0));
    for _ in 0..3 {
        client.await_event(|e| match e {
            Event::PathDown { why: PathError::Refused { errno: Errno::ECONNRESET, .. }, .. } => Some(()),
            Event::SessionUp { generation: 2, .. } => panic!("the server has not let go yet"),
            _ => None,
        });
    }
    assert_eq!(client.completion(), (3, Err(Errno::ECONNABORTED)));
    server.release();
    assert_eq!(session_up(&client), 2);
}

/// A server that starts again has forgotten the session, and what is open in it. A path that reconnects must not join
/// as if nothing had happened, only because another one has not noticed yet.
#[test]
fn a_server_that_has_forgotten_the_session() {
    let fabric = Fabric::new();
    let server = TestServer::start(&fabric, server_options(false));
    let client = TestClient::start(&fabric, 1);
    let c = client.connect(SessionOptions { heartbeat: no_heartbeat(), ..session_options(2) });
    let second = client.info(c.id).paths[1].id;
    wait_for("both paths", || client.info(c.id).paths.iter().all(|p| p.state == PathState::Connected));
    cut(&fabric, 1);
    drop(server);
    let _server = TestServer::start(&fabric, server_options(false));
    let mut refused = 0;
    while refused < 3 {
        match client.event() {
            Event::PathDown { why: PathError::Refused { errno: Errno::ENXIO, .. }, path, .. } => {
                assert_eq!(path, c.path);
                refused += 1;
            }
            Event::PathDown { path, .. } => assert_eq!(path, c.path),
            Event::PathUp { path, .. } => assert!(path == second && refused == 0, "it joined"),
            other => panic!("{other:?}"),
        }
    }
    assert!(break_qp(&fabric, 1));
    client.await_event(|e| matches!(e, Event::SessionDown { .. }).then_some(()));
    assert_eq!(session_up(&client), 2);
    assert_eq!(client.path_info(c.id, c.path).state, PathState::Connected);
}

/// A server that starts again with other options is as good: the session takes what it offers, and a load goes on.
#[test]
fn a_server_that_starts_again_with_other_limits() {
    for rotate in [false, true] {
        let (fabric, disk) = (Fabric::new(), Store::new());
        let options = |depth, max_io| Options { rotate_rkeys: rotate, ..geometry(depth, max_io) };
        let mut server = TestServer::with_store(&fabric, options(DEPTH, MAX_IO), disk.clone());
        let client = TestClient::start(&fabric, 3);
        let c =
            client.connect(SessionOptions { connections: 4, reactors: vec![0, 1, 2], ..session_options(2) });
        client.start_load(&c, 16);
        let steps = [
            (DEPTH + 1, MAX_IO),
            (DEPTH - 1, MAX_IO + 4096),
            (128, 4096),
            // Fewer than the load has requests, then than reactors: the latter is no good, and told again and again.
            (5, MAX_IO),
            (2, MAX_IO),
            (DEPTH, MAX_IO),
        ];
        let mut generation = 1;
        for (depth, max_io) in steps {
            client.verify_more(&c, 50);
            drop(server);
            client.await_event(|e| matches!(e, Event::SessionDown { .. }).then_some(()));
            server = TestServer::with_store(&fabric, options(depth, max_io), disk.clone());
            if depth == 2 {
                for _ in 0..3 {
                    let why = client.await_event(|e| match e {
                        Event::PathDown { why: PathError::Misfit(why), next_attempt: Some(_), .. } => {
                            Some(why.clone())
                        }
                        _ => None,
                    });
                    assert!(why.contains("3 reactors cannot share a queue depth of 2"), "{why}");
                }
                drop(server);
                server = TestServer::with_store(&fabric, options(depth + 1, max_io), disk.clone());
            }
            generation += 1;
            assert_eq!(session_up(&client), generation);
            let limits = client.info(c.id).limits.expect("it is up");
            assert_eq!((limits.queue_depth, limits.max_io_size), (depth.max(3), max_io));
            wait_for("both paths", || {
                client.info(c.id).paths.iter().all(|p| p.state == PathState::Connected)
            });
        }
        client.verify_more(&c, 50);
        client.stop_load(&c);
    }
}

#[test]
fn every_reactor_needs_a_buffer() {
    let fabric = Fabric::new();
    let _server = TestServer::start(&fabric, geometry(8, 4096));
    let crowd = TestClient::start(&fabric, 9);
    let options = SessionOptions { connections: 10, reactors: (0..9).collect(), ..once() };
    let (why, errno) = crowd.connect_fails(options);
    assert_eq!(errno, Errno::EINVAL);
    assert!(why.contains("9 reactors cannot share a queue depth of 8"), "{why}");
}

/// Lets a reactor of a client stand still until what is returned is dropped.
fn stall(client: &TestClient) -> std::sync::mpsc::Sender<()> {
    let (release, until) = std::sync::mpsc::channel::<()>();
    let (standing, stands) = std::sync::mpsc::channel();
    client.reactors[0].handle.send(move |_| {
        let _ = standing.send(());
        let _ = until.recv();
    });
    test_support::recv(&stands);
    release
}

/// What a crashed client has left keeps its name only until somebody at the same address wants it.
#[test]
fn a_client_that_starts_again_after_a_crash_gets_its_name() {
    let fabric = Fabric::new();
    let options = Options { heartbeat: no_heartbeat(), ..server_options(false) };
    let server = TestServer::start(&fabric, options);
    let (crashed, again) = (TestClient::start(&fabric, 1), TestClient::start(&fabric, 1));
    let crashed_options = SessionOptions { heartbeat: no_heartbeat(), ..session_options(2) };
    let c = crashed.connect(SessionOptions { reconnect: once().reconnect, ..crashed_options });
    wait_for("both paths", || crashed.info(c.id).paths.iter().all(|p| p.state == PathState::Connected));
    let release = stall(&crashed);
    let c = again.connect(SessionOptions { name_timeout: test_support::patience(), ..session_options(1) });
    one_block(&again, &c);
    assert_eq!(server.sessions(), 1, "both paths of the other one are gone");
    drop(release);
    crashed.await_event(|e| matches!(e, Event::SessionStalled { .. }).then_some(()));
}

/// A client that answers keeps its name, and so does one at another address, whether it answers or not.
#[test]
fn nobody_takes_the_name_of_a_client_that_is_there() {
    let fabric = Fabric::new();
    let options = Options { heartbeat: no_heartbeat(), ..server_options(false) };
    let _server = TestServer::start(&fabric, options);
    let (first, second) = (TestClient::start(&fabric, 1), TestClient::start(&fabric, 1));
    let c = first.connect(SessionOptions { heartbeat: no_heartbeat(), ..once() });
    let refused = |paths| {
        let (why, errno) =
            second.connect_fails(SessionOptions { paths, name_timeout: test_support::limit(4), ..once() });
        assert_eq!(errno, Errno::ECONNRESET, "as the kernel's client");
        assert!(why.contains("when it heard the session's name"), "{why}");
    };
    refused(vec![path(0)]);
    let release = stall(&first);
    refused(vec![path(1)]);
    drop(release);
    one_block(&first, &c);
    let info = first.info(c.id);
    assert!(info.connected && info.generation == 1);
}
