//! The load program's library against a whole target, on a loopback fabric.

mod common;

use std::sync::mpsc;
use std::time::Duration;

use bdev::error;
use common::{Target, options};
use engine::App;
use perf::load::{self, LoadError, LoadOptions, Pattern, Report};
use serde_json::{Value, json};
use test_support::{recv, until_some};

/// Longer than any of these runs needs.
const LONG: Duration = Duration::from_secs(3600);

/// A run, again if a machine with other work has let it do next to nothing.
fn some_load(target: &Target, options: impl Fn() -> LoadOptions) -> Report {
    until_some("a run of some requests", || {
        let report = target.load(options()).unwrap_or_else(|e| panic!("{e}"));
        target.no_sessions();
        (report.ios > 100 || !report.is_good()).then_some(report)
    })
}

fn rotating(on: bool) -> Value {
    json!({ "queue_depth": 64, "rotate_rkeys": on })
}

#[test]
fn every_workload_runs_and_counts() {
    let target = Target::start(&rotating(false));
    for (name, pattern) in Pattern::ALL {
        let report = some_load(&target, || options(pattern, "m512"));
        assert!(report.is_good(), "{name}: {:?}", report.first_error);
        assert!(report.seconds >= 0.2, "{name}: {}", report.summary());
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
    for rotate in [false, true] {
        let target = Target::start(&rotating(rotate));
        for (device, block_size) in [("m512", 512), ("m512", 65536), ("m4k", 4096)] {
            let report =
                some_load(&target, || LoadOptions { block_size, ..options(Pattern::Verify, device) });
            let v = report.verify.as_ref().expect("asked for");
            assert!(report.is_good(), "{:?} {:?}", report.first_error, v.mismatch);
            assert!(v.blocks_checked > v.blocks_checked_at_end && v.blocks_checked_at_end > 0, "{v:?}");
            assert_eq!(report.path.rotating_keys, rotate);
        }
    }
}

#[test]
fn several_cores_and_connections() {
    let target = Target::start(&rotating(true));
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
    let target = Target::start(&json!({ "queue_depth": 8 }));
    let o = || LoadOptions { queue_depth: 32, ..options(Pattern::Verify, "m512") };
    let report = some_load(&target, o);
    assert!(report.is_good(), "{:?} {:?}", report.first_error, report.verify);
    assert!(report.busy > 0, "{}", report.summary());
}

#[test]
fn what_cannot_run_says_why() {
    let target = Target::start(&rotating(false));
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
    let target = Target::start(&rotating(false));
    let o = LoadOptions { time: LONG, ..options(Pattern::RandRead, "m512") };
    let (cm, control) = (target.cm(), target.control.clone());
    let loading = std::thread::spawn(move || load::run(o, cm, |_| ()));
    target.at_work();
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
    let target = Target::start(&rotating(true));
    for pattern in [Pattern::RandWrite, Pattern::Verify] {
        let o = LoadOptions { time: LONG, ..options(pattern, "m512") };
        let (cm, (tx, stopper)) = (target.cm(), mpsc::channel());
        let loading = std::thread::spawn(move || load::run(o, cm, move |s| tx.send(s).expect("wanted")));
        let stopper: load::Stopper = recv(&stopper);
        target.at_work();
        // As long as there is nothing measured, after the warm-up, there is nothing to report.
        std::thread::sleep(Duration::from_millis(300));
        stopper.stop();
        let report = loading.join().expect("no panic").unwrap_or_else(|e| panic!("{e}"));
        assert!(report.is_good() && report.ios > 0, "{:?}", report.first_error);
        assert!(report.seconds < LONG.as_secs_f64(), "{}", report.summary());
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
        let target = Target::start(&rotating(false));
        let o = LoadOptions { time: LONG, ..options(Pattern::Verify, "EE_flaky") };
        let cm = target.cm();
        let loading = std::thread::spawn(move || load::run(o, cm, |_| ()));
        target.at_work();
        target.app(move |app| {
            let error = error::ErrorType::CorruptData { offset: 1024, value: 1 };
            // Several, because a spoilt block may be written again before it is read.
            let injection = error::Injection { op: Some(op), error, num: 32, queue_depth: 0 };
            error::inject(&app.manager, "EE_flaky", injection).expect("injected");
        });
        let report = loading.join().expect("no panic").unwrap_or_else(|e| panic!("{e}"));
        let mismatch = report.verify.as_ref().and_then(|v| v.mismatch.as_ref()).expect("found");
        assert!(!report.is_good() && mismatch.contains("data mismatch at byte"), "{mismatch}");
    }
}

#[test]
fn a_request_that_fails_ends_the_run_with_its_errno() {
    let target = Target::start(&rotating(false));
    target.app(|app| {
        let failure = error::ErrorType::Failure;
        let injection = error::Injection { op: Some(bdev::Op::Read), error: failure, num: 1, queue_depth: 0 };
        error::inject(&app.manager, "EE_flaky", injection).expect("injected");
    });
    let o = LoadOptions { time: LONG, ..options(Pattern::RandRead, "EE_flaky") };
    let report = target.load(o).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(report.errors, 1);
    assert!(report.first_error.as_ref().is_some_and(|e| e.contains("EIO")), "{:?}", report.first_error);
}
