//! A request of `rnbd-perf` allocates nothing: a run that does more of them allocates no more.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use engine::app::{self, Options};
use engine::log::LogControl;
use perf::job::{Job, Perf, Progress, RunOptions, Workload};
use perf::result::RunResult;
use reactor::IdlePolicy;
use serde_json::json;
use test_support::{Counting, all_allocations};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of a whole run from the beginning of the program to its end, and what it did.
fn run(workload: Workload, time: Duration) -> (u64, RunResult) {
    let config = json!({"subsystems": [{"subsystem": "bdev", "config": [
        {"method": "bdev_malloc_create", "params": {"name": "M0", "num_blocks": 4096, "block_size": 512}}]}]});
    let job = Job {
        name: "job".into(),
        target: "M0".parse().expect("a name"),
        workload,
        block_size: 4096,
        queue_depth: 32,
        read_percent: 50,
        offset: 0,
        size: 0,
        rate_iops: None,
        cores: None,
    };
    let options = RunOptions {
        jobs: vec![job],
        every_core: false,
        time,
        warm_up: Duration::from_millis(50),
        // One interval, however long the run is.
        interval: Duration::from_secs(60),
        fill: false,
        seed: 1,
        keep_going: false,
        patience: Duration::ZERO,
        label: String::new(),
        case: String::new(),
        command: Vec::new(),
        progress: Progress::Quiet,
    };
    let result = Rc::new(RefCell::new(None));
    let keep = result.clone();
    let report = move |r: &RunResult| {
        *keep.borrow_mut() = Some(r.clone());
        Ok(())
    };
    let dir = test_support::Dir::new("rnbd-perf-allocations");
    let before = all_allocations();
    let (perf, start) = Perf::new(options, Box::new(report));
    let options = Options {
        program: "rnbd-perf",
        subsystems: vec![Box::new(perf)],
        cpumask: "0x1".parse().expect("valid"),
        rpc_socket: dir.join("rpc.sock"),
        config: Some(rpc::Config::parse(config.to_string().into_bytes(), "test").expect("valid")),
        wait_for_rpc: false,
        rpcs_allowed: None,
        ignore_init_errors: false,
        idle: IdlePolicy::Adaptive { spin: Duration::from_micros(50) },
        log: LogControl::detached(),
        on_ready: Some(start),
        on_refusal: None,
    };
    app::run(options, |_| ()).unwrap_or_else(|e| panic!("{workload:?}: {e}"));
    let allocations = all_allocations() - before;
    let result = result.borrow_mut().take().expect("a result");
    (allocations, result)
}

#[test]
fn longer_runs_allocate_no_more() {
    for workload in [Workload::RandRead, Workload::RandRw, Workload::Verify] {
        // What is allocated once only.
        run(workload, Duration::from_millis(50));
        let (short, a) = run(workload, Duration::from_millis(100));
        // A machine with other work may let a run do next to nothing.
        let (long, more) = test_support::until_some("a run of many requests", || {
            let (n, b) = run(workload, Duration::from_millis(1500));
            let more = b.totals.ios.saturating_sub(a.totals.ios);
            (more > 1000).then_some((n, more))
        });
        assert!(long < short + 200, "{workload:?}: {short} allocations, and {long} for {more} requests more");
    }
}
