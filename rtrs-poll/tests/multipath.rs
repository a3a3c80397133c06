//! Sessions over several paths: which one a request takes, and what becomes of it when its path is lost.

mod common;

use std::time::Duration;

use common::cms::Renamed;
use common::disk::{Store, usr};
use common::probe::{Memory, Seen};
use common::{
    Connected, DEPTH, TestClient, TestServer, break_qp, cut, no_heartbeat, path, restore, server_options,
    session_options, short_heartbeat, wait_for,
};
use rtrs_poll::Options;
use rtrs_poll::client::{
    ControlError, Event, PathError, PathId, PathInfo, PathState, Policy, SessionId, SessionOptions, Via,
};
use rtrs_proto::Errno;
use verbs::loopback::Fabric;

struct Scene {
    fabric: Fabric,
    server: TestServer,
    client: TestClient,
}

impl Scene {
    fn new(rotate: bool, reactors: usize) -> Self {
        let fabric = Fabric::new();
        let server = TestServer::start(&fabric, server_options(rotate));
        let client = TestClient::start(&fabric, reactors);
        Self { fabric, server, client }
    }

    /// Connects over the first `paths` paths and waits for all of them.
    fn connect(&self, options: SessionOptions) -> Connected {
        let paths = options.paths.len();
        let c = self.client.connect(options);
        self.wait_paths(c.id, paths);
        c
    }

    fn wait_paths(&self, id: SessionId, up: usize) {
        wait_for("all paths to be up", || self.up(id) == up);
    }

    fn up(&self, id: SessionId) -> usize {
        self.client.info(id).paths.iter().filter(|p| p.state == PathState::Connected).count()
    }

    fn path_ids(&self, c: &Connected) -> Vec<PathId> {
        self.client.info(c.id).paths.iter().map(|p| p.id).collect()
    }

    /// Requests that each path has in flight.
    fn inflight(&self, c: &Connected) -> Vec<u64> {
        self.client.info(c.id).paths.iter().map(|p| p.stats.inflight).collect()
    }

    fn requests(&self, c: &Connected) -> Vec<u64> {
        self.client.info(c.id).paths.iter().map(|p| p.stats.rd_cnt + p.stats.wr_cnt).collect()
    }

    fn failovers(&self, c: &Connected) -> u64 {
        self.client.info(c.id).paths.iter().map(|p| p.stats.failovers).sum()
    }

    /// Submits `count` requests on the first reactor that the server keeps.
    fn hold(&self, c: &Connected, count: u64, via: Via) {
        let before = self.server.held();
        let (reactor, key) = c.keys[0];
        let mut request = c.memory.read(0, 512, &usr(b'H', 0, 0), 0);
        request.via = via;
        self.client.on_lane(reactor, move |_, io| {
            for cookie in 0..count {
                request.cookie = cookie;
                request.submit(io, key).expect("room");
            }
        });
        wait_for("the server to hold them", || self.server.held() == before + count as usize);
    }

    /// Lets the server answer until every one of `count` requests has ended, each with success and once.
    fn all_succeed(&self, count: u64) {
        let mut cookies = Vec::new();
        wait_for("all requests to end", || {
            self.server.release();
            while let Ok((_, seen)) = self.client.seen.try_recv() {
                match seen {
                    Seen::Completed(cookie, Ok(())) => cookies.push(cookie),
                    other => panic!("requests fail over and succeed; {other:?}"),
                }
            }
            cookies.len() as u64 >= count
        });
        cookies.sort_unstable();
        assert!(cookies.into_iter().eq(0..count), "each ends once");
    }

    /// Waits until a path ends for a reason that says `say`, and will be tried again.
    fn down_because(&self, say: &str) {
        wait_for(say, || {
            let (_, why, next) = self.client.path_down();
            next.is_some() && why.to_string().contains(say)
        });
    }

    /// Nothing was heard on the control thread that says more than that paths come and go.
    fn session_stayed_up(&self) {
        while let Ok(event) = self.client.heard.try_recv() {
            assert!(matches!(event, Event::PathUp { .. } | Event::PathDown { .. }), "{event:?}");
        }
    }
}

fn two_reactors(paths: u8) -> SessionOptions {
    SessionOptions { connections: 5, reactors: vec![0, 1], ..session_options(paths) }
}

/// Whether the `rounds` of breaking paths under a load were enough: at least `least`, until one of them `caught` a request in
/// flight. That is up to chance.
fn enough(rounds: u64, least: u64, caught: bool) -> bool {
    assert!(rounds < 1000, "every request was answered when its path broke, {rounds} times");
    rounds >= least && caught
}

/// Paths break by turns under a load that checks every byte: no request is lost, none ends twice, none fails.
#[test]
fn requests_of_a_broken_path_go_by_another() {
    for rotate in [false, true] {
        let s = Scene::new(rotate, 2);
        let c = s.connect(two_reactors(2));
        s.client.start_load(&c, 8);
        let mut rounds = 0;
        while !enough(rounds, 12, s.failovers(&c) > 0) {
            s.client.verify_more(&c, 50);
            assert!(break_qp(&s.fabric, (rounds % 2) as u8));
            rounds += 1;
            let (_, why, next) = s.client.path_down();
            assert!(matches!(why, PathError::Lost(_)) && next.is_some(), "{why}");
            s.client.verify_more(&c, 50);
            s.wait_paths(c.id, 2);
        }
        let counts = s.client.stop_load(&c);
        assert_eq!(counts.aborted, 0, "{counts:?}");
        s.session_stayed_up();
        let info = s.client.info(c.id);
        assert_eq!((info.generation, s.inflight(&c)), (1, vec![0, 0]));
        assert!(info.paths.iter().map(|p| p.stats.reconnects_ok).sum::<u64>() >= 12);
    }
}

/// The same where nobody tells: heartbeats find out.
#[test]
fn requests_of_a_cut_path_go_by_another() {
    let fabric = Fabric::new();
    // The server has to notice, too, before it lets the path come back.
    let server = TestServer::start(&fabric, Options { heartbeat: short_heartbeat(), ..server_options(true) });
    let client = TestClient::start(&fabric, 1);
    let s = Scene { fabric, server, client };
    let c = s.connect(SessionOptions { heartbeat: short_heartbeat(), ..session_options(2) });
    s.client.start_load(&c, 8);
    for round in 0..2 {
        s.client.verify_more(&c, 50);
        cut(&s.fabric, round % 2);
        s.down_because("no heartbeat");
        s.client.verify_more(&c, 50);
        // Attempts fail, and go on.
        s.down_because("unreachable");
        s.down_because("unreachable");
        restore(&s.fabric, round % 2);
        s.wait_paths(c.id, 2);
    }
    assert_eq!(s.client.stop_load(&c).aborted, 0);
    s.session_stayed_up();
    assert!(s.client.info(c.id).paths.iter().all(|p| p.stats.reconnects_failed > 0));
}

/// The server is executing them when their path breaks, and answers on the other one.
#[test]
fn held_requests_fail_over_and_end_once() {
    for (via, count) in [(Via::Io, u64::from(DEPTH)), (Via::Service, 3)] {
        let s = Scene::new(false, 1);
        let c = s.connect(session_options(2));
        s.hold(&c, count, via);
        let before = s.inflight(&c);
        assert_eq!(before.iter().sum::<u64>(), count);
        assert!(before.iter().all(|n| *n > 0), "min-inflight uses both: {before:?}");
        assert!(break_qp(&s.fabric, 0));
        s.client.path_down();
        wait_for("requests to move", || s.failovers(&c) == before[0]);
        s.all_succeed(count);
        s.wait_paths(c.id, 2);
        assert_eq!(s.inflight(&c), [0, 0]);
        s.session_stayed_up();
    }
}

/// Both paths break at once: requests end with ECONNABORTED, once, and the load makes them anew when it can.
#[test]
fn the_session_comes_back_after_all_paths_are_lost() {
    for rotate in [false, true] {
        let s = Scene::new(rotate, 2);
        let c = s.connect(two_reactors(2));
        s.client.start_load(&c, 8);
        let mut rounds = 0;
        while !enough(rounds, 4, s.client.load_counts(&c).aborted > 0) {
            rounds += 1;
            let generation = rounds + 1;
            s.client.verify_more(&c, 50);
            assert!(break_qp(&s.fabric, 0) && break_qp(&s.fabric, 1));
            s.client.await_event(|e| {
                matches!(e, Event::SessionDown { session } if *session == c.id).then_some(())
            });
            let up = s.client.await_event(|e| match e {
                Event::SessionUp { generation, session } if session.id == c.id => Some(*generation),
                _ => None,
            });
            assert_eq!(up, generation);
            s.client.verify_more(&c, 50);
            s.wait_paths(c.id, 2);
        }
        s.client.stop_load(&c);
        assert_eq!(s.inflight(&c), [0, 0]);
    }
}

#[test]
fn each_policy_chooses_its_path() {
    let s = Scene::new(false, 1);
    let c = s.connect(SessionOptions {
        policy: Policy::RoundRobin,
        heartbeat: no_heartbeat(),
        ..session_options(3)
    });
    s.hold(&c, 12, Via::Io);
    assert_eq!(s.inflight(&c), [4, 4, 4], "round-robin");
    s.hold(&c, 3, Via::Service);
    assert_eq!(s.inflight(&c), [5, 5, 5], "round-robin");
    // One path gets a request more; the next ones go elsewhere.
    s.hold(&c, 1, Via::Io);
    s.client.with(move |cl, _| cl.set_policy(c.id, Policy::MinInflight)).expect("there");
    s.hold(&c, 5, Via::Io);
    assert_eq!(s.inflight(&c), [7, 7, 7], "min-inflight");
    s.server.release();
    (0..21).for_each(|_| assert_eq!(s.client.completion().1, Ok(())));
    // No heartbeat has come back: all are the same, so the first is taken.
    s.client.with(move |cl, _| cl.set_policy(c.id, Policy::MinLatency)).expect("there");
    s.hold(&c, 6, Via::Io);
    assert_eq!(s.inflight(&c), [6, 0, 0], "min-latency");
    assert_eq!(s.client.info(c.id).policy, Policy::MinLatency);
    s.server.release();
}

/// One request each would otherwise all go by the first path.
#[test]
fn reactors_with_little_to_do_take_different_paths() {
    let s = Scene::new(false, 2);
    let c = s.connect(two_reactors(2));
    for (cookie, &(reactor, key)) in (0..).zip(&c.keys) {
        let request = c.memory.read(0, 512, &usr(b'H', 0, 0), cookie);
        s.client.on_lane(reactor, move |_, io| request.submit(io, key).expect("room"));
    }
    wait_for("the server to hold both", || s.server.held() == 2);
    assert_eq!(s.inflight(&c), [1, 1], "min-inflight");
    s.all_succeed(2);
}

#[test]
fn min_latency_goes_by_the_last_heartbeat() {
    let s = Scene::new(false, 1);
    let heartbeat = rtrs_proto::heartbeat::Config { interval_ns: 200_000_000, missed_max: 600 };
    let c = s.connect(SessionOptions { policy: Policy::MinLatency, heartbeat, ..session_options(2) });
    let latencies = || s.client.info(c.id).paths.iter().map(|p| p.latency_ns).collect::<Vec<_>>();
    wait_for("heartbeats", || latencies().iter().all(|l| *l > 0));
    wait_for("a time between two heartbeats", || {
        let (before, requests) = (latencies(), s.requests(&c));
        s.hold(&c, 4, Via::Io);
        s.server.release();
        (0..4).for_each(|_| assert_eq!(s.client.completion().1, Ok(())));
        let more: Vec<u64> = s.requests(&c).iter().zip(requests).map(|(a, b)| a - b).collect();
        let fastest = usize::from(before[1] < before[0]);
        before == latencies() && more[fastest] == 4 && more[1 - fastest] == 0
    });
}

#[test]
fn paths_are_added_and_removed_under_load() {
    let s = Scene::new(true, 2);
    let c = s.connect(two_reactors(1));
    s.client.start_load(&c, 8);
    for n in 1..4 {
        let new = s.client.with(move |cl, cx| cl.add_path(cx, c.id, path(n))).expect("another way");
        assert_eq!(s.client.path_up(), new);
        s.client.verify_more(&c, 100);
        let refused = s.client.with(move |cl, cx| cl.add_path(cx, c.id, path(n)));
        assert!(matches!(refused, Err(ControlError::PathExists(_))), "{refused:?}");
        // All but the newest go.
        for old in s.path_ids(&c).into_iter().filter(|p| *p != new) {
            s.client.with(move |cl, cx| cl.remove_path(cx, c.id, old)).expect("there");
            let removed = s.client.await_event(|e| match e {
                Event::PathRemoved { path, .. } => Some(*path),
                Event::SessionDown { .. } => panic!("one path is left"),
                _ => None,
            });
            assert_eq!(removed, old);
        }
        s.client.verify_more(&c, 100);
        assert_eq!(s.path_ids(&c), [new]);
        wait_for("the server to know", || s.server.with(|srv, cx| srv.sessions(cx.now)[0].paths.len()) == 1);
    }
    assert_eq!(s.client.stop_load(&c).aborted, 0);
}

#[test]
fn a_disconnected_path_is_left_alone() {
    let s = Scene::new(false, 1);
    let c = s.connect(session_options(2));
    let paths = s.path_ids(&c);
    let first = paths[0];
    let disconnect = || s.client.with(move |cl, cx| cl.disconnect_path(cx, c.id, first));
    disconnect().expect("there");
    let (down, why, next) = s.client.path_down();
    assert!(down == first && matches!(why, PathError::Disconnected) && next.is_none(), "{why}");
    disconnect().expect("once more changes nothing");
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(s.client.path_info(c.id, first).state, PathState::Closed);
    s.hold(&c, 4, Via::Io);
    assert_eq!(s.inflight(&c), [0, 4]);
    let reconnect = |p| s.client.with(move |cl, cx| cl.reconnect_path(cx, c.id, p));
    reconnect(first).expect("closed");
    assert!(matches!(reconnect(first), Err(ControlError::Busy { .. }) | Ok(())));
    wait_for("both", || s.up(c.id) == 2);
    // One that is connected goes down first; its requests move.
    reconnect(paths[1]).expect("connected");
    wait_for("requests to move", || s.inflight(&c)[0] == 4);
    s.all_succeed(4);
    wait_for("it to reconnect", || s.client.path_info(c.id, paths[1]).stats.reconnects_ok == 1);
    s.session_stayed_up();
    client_refuses_what_is_gone(&s, &c, first);
}

#[test]
fn a_path_that_is_to_go_is_emptied_first() {
    let s = Scene::new(false, 1);
    let c = s.connect(session_options(2));
    let first = s.path_ids(&c)[0];
    s.hold(&c, 4, Via::Io);
    assert_eq!(s.inflight(&c), [2, 2]);
    s.client.with(move |cl, cx| cl.disconnect_path(cx, c.id, first)).expect("there");
    s.hold(&c, 3, Via::Io);
    assert_eq!(s.inflight(&c), [2, 5], "it gets nothing new");
    s.server.release();
    (0..7).for_each(|_| assert_eq!(s.client.completion().1, Ok(())));
    let (down, why, _) = s.client.path_down();
    assert!(down == first && matches!(why, PathError::Disconnected), "{why}");
    assert_eq!(s.failovers(&c), 0);
    s.session_stayed_up();
}

/// Ids are never used again.
fn client_refuses_what_is_gone(s: &Scene, c: &Connected, path: PathId) {
    let id = c.id;
    s.client.with(move |cl, cx| cl.remove_path(cx, id, path)).expect("there");
    s.client.await_event(|e| matches!(e, Event::PathRemoved { .. }).then_some(()));
    let gone = s.client.with(move |cl, cx| cl.disconnect_path(cx, id, path));
    assert_eq!(gone, Err(ControlError::NoPath));
    s.client.close(id);
    let gone = s.client.with(move |cl, cx| cl.reconnect_path(cx, id, path));
    assert_eq!(gone, Err(ControlError::NoSession));
}

/// Without any path the session stalls, and another one revives it.
#[test]
fn the_last_path_may_be_removed() {
    let s = Scene::new(false, 1);
    let c = s.connect(session_options(1));
    s.client.with(move |cl, cx| cl.remove_path(cx, c.id, c.path)).expect("there");
    s.client.await_event(|e| matches!(e, Event::SessionStalled { .. }).then_some(()));
    assert!(s.path_ids(&c).is_empty() && !s.client.info(c.id).connected);
    wait_for("the server to forget", || s.server.sessions() == 0);
    s.client.with(move |cl, cx| cl.add_path(cx, c.id, path(1))).expect("another way");
    let generation = s.client.await_event(|e| match e {
        Event::SessionUp { generation, .. } => Some(*generation),
        _ => None,
    });
    assert_eq!(generation, 2);
}

/// Two devices have keys of their own; requests fail over between them.
#[test]
fn a_session_over_two_devices() {
    let fabric = Fabric::new();
    let server = TestServer::start(&fabric, server_options(true));
    let cm = |name| Box::new(Renamed { name, inner: fabric.cm(), has_device: true }) as Box<dyn verbs::Cm>;
    let client = TestClient::with_cms(vec![cm("one"), cm("two")], 2);
    let mut options = two_reactors(2);
    options.paths[0].providers = vec!["one".into()];
    options.paths[1].providers = vec!["two".into()];
    let s = Scene { fabric, server, client };
    let c = s.connect(options);
    let used: Vec<String> = s.client.info(c.id).paths.iter().map(|p| p.provider.clone()).collect();
    assert_eq!(used, ["one", "two"]);
    s.client.start_load(&c, 8);
    let mut rounds = 0;
    while !enough(rounds, 6, s.failovers(&c) > 0) {
        s.client.verify_more(&c, 50);
        assert!(break_qp(&s.fabric, (rounds % 2) as u8));
        rounds += 1;
        s.client.path_down();
        s.client.verify_more(&c, 50);
        s.wait_paths(c.id, 2);
    }
    assert_eq!(s.client.stop_load(&c).aborted, 0);
    s.client.close(c.id);
}

/// The first provider has no device there: the second one serves, and is kept.
#[test]
fn providers_are_tried_in_order() {
    let fabric = Fabric::new();
    let _server = TestServer::start(&fabric, server_options(false));
    let none = Box::new(Renamed { name: "none", inner: fabric.cm(), has_device: false });
    let client = TestClient::with_cms(vec![none, fabric.cm()], 1);
    let mut options = session_options(1);
    options.paths[0].providers = vec!["absent".into(), "none".into(), "loopback".into()];
    let c = client.connect(options.clone());
    assert_eq!(client.path_info(c.id, c.path).provider, "loopback");
    assert!(break_qp(&fabric, 0));
    client.await_event(|e| matches!(e, Event::SessionUp { generation: 2, .. }).then_some(()));
    client.close(c.id);
    // Where none serves, all of them have their say.
    cut(&fabric, 0);
    let (why, _) = client.connect_fails(options);
    assert!(why.contains("resolve") && why.contains("unreachable"), "{why}");
}

/// As long as no path has been up, one is tried after the other; the others join the session that it made.
#[test]
fn any_path_may_be_the_first() {
    let s = Scene::new(false, 1);
    cut(&s.fabric, 0);
    let c = s.client.connect(session_options(3));
    s.wait_paths(c.id, 2);
    assert_ne!(s.client.path_info(c.id, c.path).state, PathState::Connected);
    restore(&s.fabric, 0);
    s.wait_paths(c.id, 3);
    assert_eq!(s.client.info(c.id).generation, 1);
    assert_eq!(s.server.sessions(), 1);
}

/// A path to some other server does not make a session there.
#[test]
fn a_path_to_another_server_is_refused() {
    let s = Scene::new(false, 1);
    let other = TestServer::listening(&s.fabric, server_options(false), Store::new(), 4..6);
    let c = s.connect(session_options(1));
    s.client.with(move |cl, cx| cl.add_path(cx, c.id, path(4))).expect("another way");
    for _ in 0..3 {
        let (_, why, next) = s.client.path_down();
        assert_eq!((why.errno(), next.is_some()), (Errno::ENXIO, true), "{why}");
        assert!(why.to_string().contains("is it another server?"), "{why}");
    }
    // Nor does it while the right server cannot be reached.
    cut(&s.fabric, 0);
    assert!(break_qp(&s.fabric, 0));
    s.client.await_event(|e| matches!(e, Event::SessionDown { .. }).then_some(()));
    for _ in 0..4 {
        s.client.path_down();
    }
    assert_eq!(other.sessions(), 0);
    restore(&s.fabric, 0);
    s.client.await_event(|e| matches!(e, Event::SessionUp { generation: 2, .. }).then_some(()));
}

#[test]
fn sessions_do_not_disturb_each_other() {
    let s = Scene::new(false, 2);
    let a = s.connect(two_reactors(2));
    let b = s.client.create(SessionOptions { name: "other".into(), ..two_reactors(2) });
    let b = s.client.wait_up(b, Memory::new(&s.client.registry));
    s.wait_paths(b.id, 2);
    s.client.start_load(&a, 8);
    for round in 1..4 {
        s.client.verify_more(&a, 50);
        for path in s.path_ids(&b) {
            s.client.with(move |cl, cx| cl.reconnect_path(cx, b.id, path)).expect("connected");
        }
        // Not as it was before they went.
        wait_for("the other session to be back", || {
            let info = s.client.info(b.id);
            let back = |p: &PathInfo| p.state == PathState::Connected && p.stats.reconnects_ok == round;
            info.connected && info.paths.iter().all(back)
        });
    }
    s.client.close(b.id);
    s.client.verify_more(&a, 50);
    assert_eq!(s.client.stop_load(&a).aborted, 0);
    let stats: Vec<_> = s.client.info(a.id).paths.iter().map(|p| p.stats).collect();
    assert!(stats.iter().all(|p| p.reconnects_ok == 0 && p.failovers == 0), "{stats:?}");
}
