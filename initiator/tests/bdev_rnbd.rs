//! bdev_rnbd against a whole target: I/O, losses, resizes, refusals, and what is left at the end.

mod world;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bdev::{Completions, Flags, IoChannel, IoRequest, Op, Segments, Status};
use iobuf::Region;
use rnbd_initiator::bdev::{Maps, State};
use rnbd_proto::open::AccessMode;
use rtrs_poll::client::{PathState, Reconnect};
use serde_json::json;
use test_support::{limit, patience, recv};
use world::load::Load;
use world::{Initiator, Net, Target, disk_dir, malloc, null, until, uring};

/// Reads and writes of every shape on every reactor.
fn verified_io(net: &Net, rotate: bool) {
    let target = Target::start(
        net,
        &[malloc("m512", 512), malloc("m4k", 4096)],
        json!({"queue_depth": 64, "rotate_rkeys": rotate}),
    );
    let initiator = Initiator::new(net);
    for (device, sizes) in [("m512", &[1, 7, 128, 500][..]), ("m4k", &[1, 9, 60])] {
        assert_eq!(initiator.map(initiator.params(device, device)).unwrap(), device);
        for &blocks in sizes {
            let loads: Vec<Load> = initiator
                .reactors
                .iter()
                .take(1)
                .map(|r| Load::start(&initiator.manager, r, device, 8, blocks))
                .collect();
            loads.iter().for_each(|l| l.goes_on(200));
            loads.into_iter().for_each(|l| l.stop().good());
        }
        initiator.unmap(device, false).unwrap();
    }
    until("the session has gone", || target.paths().is_empty());
    assert_eq!(initiator.sessions(), [""; 0]);
}

#[test]
fn io_of_all_shapes() {
    verified_io(&Net::loopback(), false);
}

#[test]
fn io_of_all_shapes_with_rotating_keys() {
    verified_io(&Net::loopback(), true);
}

#[test]
fn io_of_all_shapes_over_soft_roce() {
    verified_io(&Net::soft_roce(), false);
}

#[test]
fn two_reactors_at_once() {
    let net = Net::loopback();
    let target = Target::start(&net, &[malloc("a", 512), malloc("b", 512)], json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    initiator.map(initiator.params("a", "a")).unwrap();
    initiator.map(initiator.params("b", "b")).unwrap();
    assert_eq!(target.paths().len(), 1, "one session for both");
    let load = |name: &str, i: usize| {
        let reactor = &initiator.reactors[i % initiator.reactors.len()];
        Load::start(&initiator.manager, reactor, name, 16, 20)
    };
    let loads = [load("a", 0), load("b", 1)];
    loads.iter().for_each(|l| l.goes_on(500));
    loads.into_iter().for_each(|l| l.stop().good());
    initiator.unmap("a", false).unwrap();
    assert_eq!(target.paths().len(), 1);
    initiator.unmap("b", false).unwrap();
    until("the session has gone", || target.paths().is_empty());
}

/// The only path goes again and again; nothing fails, nothing is lost.
fn lost_paths(net: &Net, losses: usize) {
    let target = Target::start(net, &[malloc("m", 512)], json!({"queue_depth": 32}));
    let initiator = Initiator::new(net);
    initiator.map(initiator.params("m", "m")).unwrap();
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "m", 16, 24);
    for _ in 0..losses {
        load.goes_on(100);
        assert_eq!(target.disconnect(""), 1);
        until("it is back", || target.paths().len() == 1);
    }
    load.goes_on(100);
    load.stop().good();
    let session = initiator.run(|m| m.sessions(Instant::now(), None).pop()).unwrap();
    assert!(session.info.unwrap().generation > losses as u64, "it was connected anew each time");
    initiator.unmap("m", false).unwrap();
}

#[test]
fn a_lost_path_is_no_error() {
    lost_paths(&Net::loopback(), 10);
}

#[test]
fn a_lost_path_is_no_error_over_soft_roce() {
    lost_paths(&Net::soft_roce(), 3);
}

/// Paths that the initiator uses.
fn connected(initiator: &Initiator) -> usize {
    let info = initiator.run(|m| m.sessions(Instant::now(), None).pop()).and_then(|s| s.info);
    let paths = info.iter().flat_map(|i| &i.paths);
    paths.filter(|p| p.state == PathState::Connected).count()
}

#[test]
fn one_of_two_paths_is_enough() {
    let net = Net::loopback();
    let target = Target::start(&net, &[malloc("m", 512)], json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    let mut params = initiator.params("m", "m");
    params.session.paths.push(net.path(1));
    initiator.map(params).unwrap();
    until("both are there", || connected(&initiator) == 2);
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "m", 16, 24);
    // Often everything is answered when the path goes, so go on until it was not.
    let (begin, mut round) = (Instant::now(), 0);
    let info = loop {
        load.goes_on(100);
        let server = net.address(true, round % 2).to_string();
        assert_eq!(target.disconnect(&format!("@ip:{server}")), 1, "{:?}", target.paths());
        load.goes_on(50);
        assert_eq!(initiator.device("m").state, State::Open);
        // The server has a path before the client uses it.
        until("both are back", || target.paths().len() == 2 && connected(&initiator) == 2);
        round += 1;
        let info = initiator.run(|m| m.sessions(Instant::now(), None).pop()).unwrap().info.unwrap();
        if round >= 10 && info.paths.iter().any(|p| p.stats.failovers > 0) {
            break info;
        }
        assert!(
            begin.elapsed() < patience(),
            "no request was ever in flight when its path went, {round} times"
        );
    };
    load.stop().good();
    assert_eq!(info.generation, 1, "the session was never lost");
}

/// The server dies with requests in flight, and is started again on the same file, as it was or with other limits.
#[test]
fn a_server_that_is_killed_and_comes_back() {
    let (net, dir) = (Net::loopback(), disk_dir());
    let bdevs = [uring("u", &dir.file("u", 4 << 20))];
    let mut target = Target::start(&net, &bdevs, json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    initiator.map(initiator.params("d", "u")).unwrap();
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "d", 16, 16);
    let more = json!({"queue_depth": 128, "max_io_size": 131_072});
    let less = json!({"queue_depth": 4, "max_io_size": 4096});
    for options in [json!({"queue_depth": 32}), more, less] {
        load.goes_on(200);
        target.kill();
        initiator.wait_state("d", State::Closed);
        let (done, waited) = (load.done(), Instant::now());
        std::thread::sleep(Duration::from_millis(300));
        assert!(load.done() <= done + 16 && load.ended().is_none(), "requests wait");
        target = Target::start(&net, &bdevs, options);
        load.goes_on(200);
        println!("outage of {:?}", waited.elapsed());
    }
    load.stop().good();
    drop(target);
}

#[test]
fn io_fails_fast_after_its_time_and_works_again() {
    let (net, dir) = (Net::loopback(), disk_dir());
    let bdevs = [uring("u", &dir.file("u", 4 << 20))];
    let target = Target::start(&net, &bdevs, json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    let mut params = initiator.params("d", "u");
    let fast = Duration::from_millis(1500);
    params.fast_io_fail = Some(fast);
    initiator.map(params).unwrap();
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "d", 8, 16);
    load.goes_on(50);
    let before = Instant::now();
    target.kill();
    initiator.wait_state("d", State::Closed);
    let done = load.done();
    until("requests fail", || load.done() > done + 7);
    let after = before.elapsed();
    assert!(after >= fast, "never early: {after:?}");
    load.ask_to_stop();
    let outcome = load.outcome();
    assert!(matches!(outcome.failed, Some((_, Status::TimedOut))), "{outcome:?}");
    let target = Target::start(&net, &bdevs, json!({"queue_depth": 32}));
    initiator.wait_state("d", State::Open);
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "d", 8, 16);
    load.goes_on(100);
    load.stop().good();
    drop(target);
}

#[test]
fn a_session_is_given_up_and_mapped_anew() {
    let (net, dir) = (Net::loopback(), disk_dir());
    let bdevs = [uring("u", &dir.file("u", 4 << 20))];
    let target = Target::start(&net, &bdevs, json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    let mut params = initiator.params("d", "u");
    // Longer than a server that is there takes to answer.
    params.session.ctrlr_loss = Some(limit(5));
    // What was given up stays fenced for so long, as no path of the new session is known to the server.
    params.session.stale_io = Duration::from_secs(1);
    initiator.map(params).unwrap();
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "d", 8, 16);
    load.goes_on(50);
    target.kill();
    until("it is given up", || initiator.device("d").given_up);
    let device = initiator.device("d");
    assert_eq!(device.state, State::Closed);
    assert!(device.last_error.as_ref().unwrap().contains("no path within"), "{device:?}");
    load.ask_to_stop();
    assert!(matches!(load.outcome().failed, Some((_, Status::Gone))));
    let why = initiator.remap("d").unwrap_err();
    assert_eq!(why.errno(), 104, "nobody listens: {why}");
    let target = Target::start(&net, &bdevs, json!({"queue_depth": 32}));
    assert_eq!(initiator.remap("d").unwrap(), "d");
    assert_eq!(initiator.remap("d").unwrap_err().errno(), 114, "it is open");
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "d", 8, 16);
    load.goes_on(100);
    load.stop().good();
    drop(target);
}

#[test]
fn resizes_are_noticed() {
    let net = Net::loopback();
    let target = Target::start(&net, &[null("n", 20480, 512)], json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    let mut params = initiator.params("d", "n");
    params.resize_check = Some(Duration::from_millis(100));
    initiator.map(params).unwrap();
    let blocks = |i: &Initiator| i.device("d").size.unwrap().0;
    assert_eq!(blocks(&initiator), 20480);
    let user = initiator.manager.open("d", bdev::Mode::ReadOnly, Box::new(|_| ())).unwrap();
    target.call("bdev_null_resize", json!({"name": "n", "new_size": 20})).unwrap();
    until("it grows", || blocks(&initiator) == 40960);
    assert_eq!(user.blocks(), 40960);
    // A choice of one's own holds until another is made.
    assert_eq!(initiator.resize("d", Some(1000)).unwrap(), 1000);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(blocks(&initiator), 1000);
    let e = initiator.resize("d", Some(40961)).unwrap_err();
    assert!(e.errno() == 22 && e.to_string().contains("1 to 40960"), "{e}");
    assert_eq!(initiator.resize("d", None).unwrap(), 40960);
    // While the session was away.
    target.call("bdev_null_resize", json!({"name": "n", "new_size": 30})).unwrap();
    target.disconnect("");
    until("it grows again", || blocks(&initiator) == 61440);
    drop(user);
}

/// What a server offers under a name may become something else.
#[test]
fn another_block_size_fails_the_device_in_words() {
    let net = Net::loopback();
    let target = Target::start(&net, &[null("n", 4096, 512)], json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    initiator.map(initiator.params("d", "n")).unwrap();
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "d", 4, 8);
    load.goes_on(10);
    target.stop();
    let target = Target::start(&net, &[null("n", 4096, 4096)], json!({"queue_depth": 32}));
    until("it is given up", || initiator.device("d").given_up);
    let device = initiator.device("d");
    assert!(device.last_error.as_ref().unwrap().contains("4096 bytes now, and was 512"), "{device:?}");
    load.ask_to_stop();
    assert!(matches!(load.outcome().failed, Some((_, Status::Gone))));
    initiator.unmap("d", false).unwrap();
    initiator.map(initiator.params("d", "n")).unwrap();
    assert_eq!(initiator.device("d").size, Some((4096, 4096)));
    drop(target);
}

#[test]
fn access_modes_and_refusals() {
    let net = Net::loopback();
    let target = Target::start(&net, &[malloc("m", 512), malloc("l", 512)], json!({"queue_depth": 32}));
    target
        .call("rnbd_create_export", json!({"device_path": "locked", "bdev_name": "l", "read_only": true}))
        .unwrap();
    let initiator = Initiator::new(&net);
    let mut ro = initiator.params("ro", "m");
    ro.mode = AccessMode::ReadOnly;
    initiator.map(ro).unwrap();
    let e = initiator.manager.open("ro", bdev::Mode::ReadWrite, Box::new(|_| ())).unwrap_err();
    assert!(matches!(e, bdev::Error::ReadOnly { .. }), "{e}");
    let errno = |name: &str, device: &str, session: &str| {
        let mut p = initiator.params(name, device);
        p.sessname = session.into();
        let e = initiator.map(p).unwrap_err();
        (e.errno(), e.to_string(), e.hint().unwrap_or_default())
    };
    let (n, text, hint) = errno("x", "locked", "host2");
    assert_eq!(n, 30, "{text}");
    assert!(hint.contains("access_mode ro"), "{hint}");
    let (n, text, hint) = errno("x", "nothing", "host1");
    assert_eq!(n, 2, "{text}");
    assert!(text.contains("nothing") && hint.contains("dev_search_path"), "{text} {hint}");
    assert_eq!(errno("x", "m", "host1").0, 17, "mapped twice in one session");
    assert_eq!(errno("ro", "other", "host1").0, 17, "the name is taken");
    let mut p = initiator.params("x", "m");
    (p.sessname, p.session.paths) = ("host3".into(), Vec::new());
    let e = initiator.map(p).unwrap_err();
    assert!(e.errno() == 6 && e.hint().unwrap().contains("paths"), "{e}");
    let mut p = initiator.params("x", "m");
    (p.sessname, p.session.port) = ("host4".into(), 9);
    let e = initiator.map(p).unwrap_err();
    assert!(e.errno() == 104 && e.to_string().contains("nobody listens"), "{e}");
    assert!(e.to_string().contains("path 10.0.0.101@10.0.0.1:9: con 0"), "{e}");
    // Two writers.
    let mut p = initiator.params("w1", "m");
    p.sessname = "host5".into();
    initiator.map(p).unwrap();
    let (n, text, hint) = errno("w2", "m", "host6");
    assert!(n == 1 && hint.contains("another client"), "{text} {hint}");
    assert_eq!(initiator.unmap("nothing", false).unwrap_err().errno(), 19);
    until("nothing is left of what failed", || initiator.sessions() == ["host1", "host5"]);
    until("nor at the server", || target.paths().len() == 2);
}

#[test]
fn unmap_under_load() {
    let net = Net::loopback();
    let target = Target::start(&net, &[malloc("m", 512)], json!({"queue_depth": 8}));
    let initiator = Initiator::new(&net);
    for round in 0..6 {
        initiator.map(initiator.params("d", "m")).unwrap();
        let load = Load::start(&initiator.manager, &initiator.reactors[0], "d", 16, 64);
        load.goes_on(20);
        assert_eq!(initiator.unmap("d", false).unwrap_err().errno(), 16, "it is in use");
        if round % 2 == 1 {
            // Without a session nothing would let the requests go.
            target.disconnect("");
        }
        initiator.unmap("d", true).unwrap();
        let outcome = load.outcome();
        assert_eq!(outcome.mismatch, None);
        until("the session has gone", || target.paths().is_empty());
    }
}

#[test]
fn a_mapping_that_keeps_trying_waits_for_its_server() {
    let net = Net::loopback();
    let initiator = Initiator::new(&net);
    let mut params = initiator.params("d", "m");
    params.keep_trying = true;
    assert_eq!(initiator.map(params).unwrap(), "d");
    let device = initiator.device("d");
    assert_eq!((device.state, device.size), (State::Init, None));
    assert!(device.last_error.unwrap().contains("nobody listens"));
    assert_eq!(initiator.remap("d").unwrap_err().errno(), 16);
    let target = Target::start(&net, &[malloc("x", 512)], json!({}));
    until("the server does not know it", || {
        initiator.device("d").last_error.is_some_and(|e| e.contains("ENOENT"))
    });
    target.call("bdev_malloc_create", json!({"name": "m", "num_blocks": 2048, "block_size": 512})).unwrap();
    target.call("rnbd_create_export", json!({"device_path": "m", "bdev_name": "m"})).unwrap();
    initiator.wait_state("d", State::Open);
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "d", 4, 16);
    load.goes_on(8);
    // The server takes it away, and gives it back.
    target.call("rnbd_force_close", json!({"session": "host1", "device_path": "m"})).unwrap();
    load.goes_on(100);
    load.stop().good();
    initiator.unmap("d", false).unwrap();
}

#[test]
fn paths_come_and_go() {
    let net = Net::loopback();
    let target = Target::start(&net, &[malloc("m", 512)], json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    initiator.map(initiator.params("m", "m")).unwrap();
    type Answer = Result<(), rnbd_initiator::bdev::MapError>;
    let control = initiator.control.clone();
    let path_call = |what: &'static str, path: rnbd_initiator::bdev::PathParam| -> Answer {
        let (tx, rx) = mpsc::channel();
        let name = format!("{}@{}", path.src.unwrap(), path.dst);
        rnbd_initiator::bdev::Maps::send(&control, move |m, cx| {
            let done = Box::new(move |r| tx.send(r).unwrap());
            match what {
                "add" => m.add_path(cx, "host1", path, done),
                "remove" => m.remove_path(cx, "host1", &name, done),
                "disconnect" => m.disconnect_path(cx, "host1", &name, done),
                _ => m.reconnect_path(cx, "host1", &name, done),
            }
        });
        recv(&rx)
    };
    let load = Load::start(&initiator.manager, &initiator.reactors[0], "m", 16, 24);
    path_call("add", net.path(1)).unwrap();
    assert_eq!(path_call("add", net.path(1)).unwrap_err().errno(), 17);
    assert_eq!(target.paths().len(), 2);
    for n in [0, 1] {
        path_call("disconnect", net.path(n)).unwrap();
        path_call("disconnect", net.path(n)).unwrap();
        load.goes_on(50);
        path_call("reconnect", net.path(n)).unwrap();
        load.goes_on(50);
    }
    path_call("remove", net.path(0)).unwrap();
    assert_eq!(path_call("remove", net.path(0)).unwrap_err().errno(), 19);
    load.goes_on(50);
    // One that cannot be connected is not kept.
    let e = path_call("add", net.path(7)).unwrap_err();
    assert_eq!(e.errno(), 104, "{e}");
    let names = |i: &Initiator| {
        let info = i.run(|m| m.sessions(Instant::now(), None).pop()).unwrap().info.unwrap();
        info.paths.iter().map(|p| p.dst.ip()).collect::<Vec<_>>()
    };
    until("only the second is left", || names(&initiator) == [net.address(true, 1)]);
    // All of them down on request: requests wait.
    path_call("disconnect", net.path(1)).unwrap();
    initiator.wait_state("m", State::Closed);
    std::thread::sleep(Duration::from_millis(200));
    assert!(!initiator.device("m").given_up && load.ended().is_none());
    path_call("reconnect", net.path(1)).unwrap();
    load.goes_on(50);
    load.stop().good();
    let stats = initiator.run(|m| m.path_stats(Instant::now(), Some("host1"), None)).unwrap();
    assert!(stats.len() == 1 && stats[0].2.wr_cnt > 0, "{stats:?}");
    initiator.run(|m| m.reset_path_stats(Instant::now(), None, None)).unwrap();
    assert_eq!(initiator.run(|m| m.path_stats(Instant::now(), None, None)).unwrap()[0].2.wr_cnt, 0);
}

/// Malloc disk "m", and "EE_m" over it, which can be told to keep requests.
fn holding() -> [serde_json::Value; 2] {
    [malloc("m", 512), json!({"method": "bdev_error_create", "params": {"base_name": "m"}})]
}

/// "EE_m" keeps the next `num` requests of each kind.
fn hold(target: &Target, num: u32) {
    let params = json!({"name": "EE_m", "io_type": "all", "error_type": "pending", "num": num});
    target.call("bdev_error_inject_error", params).unwrap();
}

/// "EE_m" does what it has kept, and keeps nothing more.
fn let_go(target: &Target) {
    let clear = json!({"name": "EE_m", "io_type": "clear", "error_type": "failure"});
    target.call("bdev_error_inject_error", clear).unwrap();
    target.call("bdev_error_resume_pending", json!({"name": "EE_m"})).unwrap();
}

fn request(op: Op, memory: &Arc<Region>, lba: u64, blocks: usize, cookie: u64) -> IoRequest {
    // SAFETY: tests keep the memory to their end.
    let segments = Segments::from_iter(unsafe { memory.segment(0, blocks * 512) });
    IoRequest { op, flags: Flags::NONE, lba, blocks: blocks as u64, segments, cookie }
}

fn inflight(initiator: &Initiator) -> u64 {
    let stats = initiator.run(|m| m.path_stats(Instant::now(), Some("host1"), None)).unwrap();
    stats.iter().map(|(_, _, s)| s.inflight).sum()
}

/// Its memory is its owner's again, though the server has not answered.
fn a_dropped_channel_lets_go(net: &Net) {
    struct Kept(RefCell<Option<IoChannel>>);
    let target = Target::start(net, &holding(), json!({"queue_depth": 32}));
    let initiator = Initiator::new(net);
    initiator.map(initiator.params("m", "EE_m")).unwrap();
    hold(&target, 4);
    let memory = initiator.manager.registry().map(65536).unwrap();
    let descriptor = initiator.manager.open("m", bdev::Mode::ReadWrite, Box::new(|_| ())).unwrap();
    let reactor = initiator.reactors[0].clone();
    let (m, d) = (memory.clone(), descriptor.clone());
    reactor.send(move |cx| {
        let mut channel = d.channel().unwrap();
        for cookie in 0..4 {
            channel.submit(request(Op::Read, &m, cookie * 128, 128, cookie)).unwrap();
        }
        channel.kick();
        cx.set_local(Rc::new(Kept(RefCell::new(Some(channel)))));
    });
    until("they are under way", || inflight(&initiator) == 4);
    let (tx, dropped) = mpsc::channel();
    reactor.send(move |cx| {
        let kept = cx.local::<Kept>().unwrap();
        drop(kept.0.borrow_mut().take());
        tx.send(()).unwrap();
    });
    // Nobody waits for the server, which has not answered yet.
    recv(&dropped);
    assert_eq!(inflight(&initiator), 0);
    let pattern = vec![0xa5; 65536];
    assert!(memory.copy_in(0, &pattern));
    drop(descriptor);
    let_go(&target);
    // The path is lost and comes back, and others go on.
    let load = Load::start(&initiator.manager, &reactor, "m", 4, 16);
    load.goes_on(8);
    load.stop().good();
    let mut now = vec![0; 65536];
    assert!(memory.copy_out(0, &mut now));
    assert!(now == pattern, "late data in memory that was given back");
    initiator.unmap("m", false).unwrap();
    drop(target);
}

#[test]
fn a_channel_that_is_dropped_lets_go_of_its_memory() {
    a_dropped_channel_lets_go(&Net::loopback());
}

#[test]
fn a_channel_that_is_dropped_lets_go_of_its_memory_over_soft_roce() {
    a_dropped_channel_lets_go(&Net::soft_roce());
}

/// While a path is away, what was in flight there is not overwritten; everything else goes on.
#[test]
fn a_lost_path_fences_what_it_carried() {
    let net = Net::loopback();
    let target = Target::start(&net, &holding(), json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    let mut params = initiator.params("m", "EE_m");
    params.session.paths.push(net.path(1));
    // Longer than this test takes.
    params.session.reconnect = Reconnect { delay: 10 * patience(), max_attempts: None };
    params.session.stale_io = 10 * patience();
    initiator.map(params).unwrap();
    until("both are there", || connected(&initiator) == 2);
    let memory = initiator.manager.registry().map(4096).unwrap();
    let descriptor = initiator.manager.open("m", bdev::Mode::ReadWrite, Box::new(|_| ())).unwrap();
    let mut channel = descriptor.channel().unwrap();
    let mut done = Completions::new();
    let mut wait = |channel: &mut IoChannel, cookies: &[u64]| {
        until(format_args!("{cookies:?} complete"), || {
            channel.poll(&mut done) && done.len() == cookies.len()
        });
        let mut got: Vec<_> = done.drain(..).map(|c| (c.cookie, c.status)).collect();
        got.sort_unstable_by_key(|(c, _)| *c);
        assert_eq!(got, cookies.iter().map(|c| (*c, Status::Ok)).collect::<Vec<_>>());
    };
    hold(&target, 2);
    // By the first path and by the second.
    channel.submit(request(Op::Write, &memory, 0, 8, 1)).unwrap();
    channel.submit(request(Op::Write, &memory, 100, 8, 2)).unwrap();
    channel.kick();
    until("they are under way", || inflight(&initiator) == 2);
    let lost = format!("@ip:{}", net.address(true, 0));
    assert_eq!(target.disconnect(&lost), 1);
    until("one of them is lost", || connected(&initiator) == 1);
    let_go(&target);
    wait(&mut channel, &[1, 2]);
    let (first, second) = (request(Op::Write, &memory, 4, 8, 3), request(Op::Write, &memory, 104, 8, 4));
    channel.submit(first).unwrap();
    channel.submit(second).unwrap();
    channel.submit(request(Op::Read, &memory, 0, 8, 5)).unwrap();
    channel.kick();
    wait(&mut channel, &[4, 5]);
    // Nothing ends it, so there is nothing to wait for.
    std::thread::sleep(Duration::from_millis(100));
    assert!(!channel.poll(&mut Completions::new()), "it would overwrite what the lost path may still write");
    let name = format!("{}@{}", net.address(false, 0), net.address(true, 0));
    let (tx, rx) = mpsc::channel();
    Maps::send(&initiator.control, move |m, cx| {
        m.reconnect_path(cx, "host1", &name, Box::new(move |r| tx.send(r).unwrap()));
    });
    recv(&rx).unwrap();
    wait(&mut channel, &[3]);
    drop(channel);
    drop(descriptor);
    initiator.unmap("m", false).unwrap();
}
