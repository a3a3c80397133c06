//! The load program's library against a whole target, on a loopback fabric.

mod common;

use std::time::Duration;

use bdev::error;
use common::{Target, options};
use engine::App;
use perf::load::{self, LoadError, LoadOptions, Pattern};
use serde_json::{Value, json};

fn rotating(on: bool) -> Value {
    json!({ "queue_depth": 64, "rotate_rkeys": on })
}

#[test]
fn every_workload_runs_and_counts() {
    let target = Target::start("every", &rotating(false));
    for (name, pattern) in Pattern::ALL {
        let report = target.load(options(pattern, "m512")).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(report.is_good(), "{name}: {:?}", report.first_error);
        assert!(report.ios > 100 && (0.2..2.0).contains(&report.seconds), "{name}: {}", report.summary());
        assert!((report.iops - report.ios as f64 / report.seconds).abs() < 1.0, "{name}");
        let all = if pattern.writes() { 0 } else { report.ios };
        match pattern {
            Pattern::RandRw | Pattern::Verify => assert!(report.reads > 0 && report.reads < report.ios),
            _ => assert_eq!(report.reads, all, "{name}"),
        }
        let l = &report.latency_us;
        assert!(0.0 < l.min && l.min <= l.p50 && l.p50 <= l.p99 && l.p99 <= l.max, "{name}: {l:?}");
        assert!(report.cpu_seconds > 0.0 && report.reactor_cpu_seconds.len() == 1, "{name}");
        target.no_sessions();
    }
}

#[test]
fn verify_finds_good_data_good() {
    for (name, rotate) in [("static", false), ("rotating", true)] {
        let target = Target::start(name, &rotating(rotate));
        for (device, block_size) in [("m512", 512), ("m512", 65536), ("m4k", 4096)] {
            let report = target
                .load(LoadOptions { block_size, ..options(Pattern::Verify, device) })
                .unwrap_or_else(|e| panic!("{e}"));
            let v = report.verify.as_ref().expect("asked for");
            assert!(report.is_good(), "{:?} {:?}", report.first_error, v.mismatch);
            assert!(v.blocks_checked > v.blocks_checked_at_end && v.blocks_checked_at_end > 0, "{v:?}");
            assert_eq!(report.path.rotating_keys, rotate);
        }
    }
}

#[test]
fn several_cores_and_connections() {
    let target = Target::start("cores", &rotating(true));
    let cores: Vec<usize> =
        if std::thread::available_parallelism().is_ok_and(|n| n.get() > 1) { vec![0, 1] } else { vec![0] };
    let mut o = options(Pattern::Verify, "m512");
    (o.session.connections, o.session.reactors) = (5, (0..cores.len()).collect());
    let report = target.load(LoadOptions { cores: cores.clone(), ..o }).unwrap_or_else(|e| panic!("{e}"));
    assert!(report.is_good(), "{:?} {:?}", report.first_error, report.verify);
    assert_eq!(report.reactor_cpu_seconds.len(), cores.len());
}

/// More requests than the session has buffers: some wait, none is lost.
#[test]
fn a_queue_deeper_than_the_session() {
    let target = Target::start("deep", &json!({ "queue_depth": 8 }));
    let o = LoadOptions { queue_depth: 32, ..options(Pattern::Verify, "m512") };
    let report = target.load(o).unwrap_or_else(|e| panic!("{e}"));
    assert!(report.is_good(), "{:?} {:?}", report.first_error, report.verify);
    assert!(report.busy > 0 && report.ios > 100, "{}", report.summary());
}

#[test]
fn what_cannot_run_says_why() {
    let target = Target::start("refuse", &rotating(false));
    let good = || options(Pattern::RandRead, "m4k");
    for (o, say) in [
        (LoadOptions { device: "nothing".into(), ..good() }, "ENOENT"),
        (LoadOptions { device: String::new(), ..good() }, "1 to 254 bytes"),
        (LoadOptions { block_size: 512, ..good() }, "multiple of 4096"),
        (LoadOptions { block_size: 1 << 20, ..good() }, "multiple of 4096"),
        (LoadOptions { size: 4096, ..good() }, "fewer than"),
        (LoadOptions { cores: vec![5000], ..good() }, "core 5000"),
    ] {
        let e = target.load(o).expect_err(say).to_string();
        assert!(e.contains(say), "'{e}' should say '{say}'");
    }
    let mut nobody = good();
    nobody.session.paths[0].dst = "10.0.0.1:1".parse().expect("valid");
    let e = target.load(nobody).expect_err("nobody listens").to_string();
    assert!(e.contains("nobody listens"), "{e}");
    // None of them left anything behind.
    target.no_sessions();
    assert!(target.load(good()).is_ok_and(|r| r.is_good()));
}

#[test]
fn a_lost_path_ends_the_run_with_an_error() {
    let target = Target::start("lost", &rotating(false));
    let o = LoadOptions { time: Duration::from_secs(60), ..options(Pattern::RandRead, "m512") };
    let (cm, control) = (target.cm(), target.control.clone());
    let loading = std::thread::spawn(move || load::run(o, cm, |_| ()));
    while target.sessions() == 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(Duration::from_millis(50));
    App::send(&control, |app, cx| {
        let server = common::server(app).expect("initialised");
        server.borrow_mut().disconnect_path(cx, "load", None);
    });
    let report = loading.join().expect("no panic").unwrap_or_else(|e| panic!("{e}"));
    let why = report.first_error.as_deref().unwrap_or_default();
    assert!(!report.is_good() && why.contains("disconnected by the server"), "{why}");
}

#[test]
fn a_stopped_run_reports_what_it_measured() {
    let target = Target::start("stop", &rotating(true));
    for pattern in [Pattern::RandWrite, Pattern::Verify] {
        let o = LoadOptions { time: Duration::from_secs(60), ..options(pattern, "m512") };
        let stop_soon = |stopper: load::Stopper| {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                stopper.stop();
            });
        };
        let report = load::run(o, target.cm(), stop_soon).unwrap_or_else(|e| panic!("{e}"));
        assert!(report.is_good() && report.ios > 100, "{:?}", report.first_error);
        assert!((0.05..30.0).contains(&report.seconds), "{}", report.summary());
        assert_eq!(report.verify.map_or(0, |v| v.blocks_checked_at_end), 0);
        target.no_sessions();
    }
    let at_once = load::run(options(Pattern::RandRead, "m512"), target.cm(), |s| s.stop());
    assert!(matches!(at_once, Err(LoadError::Interrupted)));
}

/// Spoils reads, or writes, while a verifying run is under way.
#[test]
fn verify_finds_bad_data_bad() {
    for op in [bdev::Op::Read, bdev::Op::Write] {
        let target = Target::start(
            if op == bdev::Op::Read { "spoilt-read" } else { "spoilt-write" },
            &rotating(false),
        );
        target.app(|app| {
            error::create(&app.manager, "m4k", None).expect("an error bdev");
        });
        let o = LoadOptions { time: Duration::from_secs(60), ..options(Pattern::Verify, "EE_m4k") };
        let cm = target.cm();
        let loading = std::thread::spawn(move || load::run(o, cm, |_| ()));
        while target.sessions() == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(200));
        target.app(move |app| {
            let error = error::ErrorType::CorruptData { offset: 1024, value: 1 };
            // Several, because a spoilt block may be written again before it is read.
            let injection = error::Injection { op: Some(op), error, num: 32, queue_depth: 0 };
            error::inject(&app.manager, "EE_m4k", injection).expect("injected");
        });
        let report = loading.join().expect("no panic").unwrap_or_else(|e| panic!("{e}"));
        let mismatch = report.verify.as_ref().and_then(|v| v.mismatch.as_ref()).expect("found");
        assert!(!report.is_good() && mismatch.contains("data mismatch at byte"), "{mismatch}");
    }
}

#[test]
fn a_request_that_fails_ends_the_run_with_its_errno() {
    let target = Target::start("fails", &rotating(false));
    target.app(|app| {
        error::create(&app.manager, "m4k", None).expect("an error bdev");
        let failure = error::ErrorType::Failure;
        let injection = error::Injection { op: Some(bdev::Op::Read), error: failure, num: 1, queue_depth: 0 };
        error::inject(&app.manager, "EE_m4k", injection).expect("injected");
    });
    let o = LoadOptions { time: Duration::from_secs(60), ..options(Pattern::RandRead, "EE_m4k") };
    let report = target.load(o).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(report.errors, 1);
    assert!(report.first_error.as_ref().is_some_and(|e| e.contains("EIO")), "{:?}", report.first_error);
}
