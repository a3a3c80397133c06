//! The program `rnbd-perf` as users call it: runs on bdevs of every kind, what they find, and what they leave behind.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{Net, Target};
use perf::result::RunResult;
use serde_json::{Value, json};
use test_support::{listens, until, until_some};

/// A folder that goes away.
struct Dir(test_support::Dir);

impl Dir {
    fn new() -> Self {
        Self(test_support::Dir::new("rnbd-perf"))
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("a file of the test");
        path
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("UTF-8").to_owned()
    }
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rnbd-perf"));
    command.stdin(Stdio::null());
    command
}

fn perf(args: &[&str]) -> Output {
    program().args(args).output().expect("the program runs")
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn read(path: &str) -> RunResult {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A short run with a result, and what the program said.
fn run(dir: &Dir, args: &[&str]) -> (RunResult, Output) {
    let json = dir.path("out.json");
    let short = ["-t", "0.3", "--warm-up", "0.05", "--interval", "0.1", "--spin-us", "50", "--json", &json];
    let out = perf(&[args, &short].concat());
    assert!(Path::new(&json).exists(), "{args:?}: {}", stderr(&out));
    (read(&json), out)
}

/// Requests that a short run makes on any machine that lets it run.
const FEW: u64 = 50;

/// As [`run`], again if a machine with other work has let it do next to nothing.
fn run_some(dir: &Dir, args: &[&str]) -> (RunResult, Output) {
    until_some("a run of some requests", || {
        let (r, out) = run(dir, args);
        let ended = r.totals.ios >= FEW || !out.status.success() && r.totals.ios == 0;
        ended.then_some((r, out))
    })
}

fn good_run(dir: &Dir, args: &[&str]) -> RunResult {
    let (result, out) = run_some(dir, args);
    assert!(out.status.success() && result.is_good(), "{args:?}: {}", stderr(&out));
    result
}

fn config(calls: &[Value]) -> String {
    json!({"subsystems": [{"subsystem": "bdev", "config": calls}]}).to_string()
}

fn malloc(name: &str) -> Value {
    json!({"method": "bdev_malloc_create", "params": {"name": name, "num_blocks": 4096, "block_size": 512}})
}

fn null() -> Value {
    json!({"method": "bdev_null_create", "params": {"name": "Null0", "num_blocks": 1 << 20, "block_size": 512}})
}

#[test]
fn every_workload_runs_and_is_counted() {
    let dir = Dir::new();
    let c = dir.file("c.json", &config(&[malloc("M0")]));
    for (name, workload) in perf::job::Workload::ALL {
        let r = good_run(&dir, &["-c", &c, "-T", "M0", "-w", name, "-q", "4", "--label", "x"]);
        let t = &r.totals;
        assert!(t.ios >= FEW && t.seconds >= 0.2, "{name}: {t:?}");
        assert!(
            (t.iops - t.ios as f64 / t.seconds).abs() < 1.0 && t.reads + t.writes == t.ios,
            "{name}: {t:?}"
        );
        assert_eq!(
            (t.reads > 0, t.writes > 0),
            match workload {
                w if w.is_mixed() => (true, true),
                w => (name.contains("read"), !name.contains("read") && w.name() == name),
            },
            "{name}"
        );
        assert_eq!(t.bytes, if workload.has_data() { t.ios * 4096 } else { 0 }, "{name}");
        let l = &t.latency_us;
        assert!(0.0 < l.min && l.min <= l.p50 && l.p50 <= l.p99 && l.p99 <= l.max, "{name}: {l:?}");
        assert_eq!(
            (r.format.as_str(), r.label.as_str(), r.case.contains(name)),
            (perf::result::FORMAT, "x", true)
        );
        assert!(
            !r.timeline.is_empty() && r.timeline.is_sorted_by(|a, b| a.at < b.at),
            "{name}: {:?}",
            r.timeline
        );
        assert_eq!((r.cpu.reactors.len(), r.jobs.len(), r.jobs[0].cores.as_slice()), (1, 1, &[0][..]));
        assert!(r.cpu.process_seconds > 0.0 && r.machine.cpus > 0 && !r.git.revision.is_empty());
    }
}

/// What scripts rely on.
#[test]
fn the_json_has_its_shape() {
    let dir = Dir::new();
    let c = dir.file("c.json", &config(&[null()]));
    let out = perf(&["-c", &c, "-T", "Null0", "-t", "0.2", "--json", "-"]);
    assert!(out.status.success(), "{}", stderr(&out));
    let v: Value = serde_json::from_slice(&out.stdout).expect("nothing but JSON on standard output");
    assert!(v["iops"].as_f64().is_some_and(|n| n >= 0.0), "{v}");
    for key in [
        "format",
        "label",
        "case",
        "git",
        "started",
        "command",
        "machine",
        "mib_s",
        "ios",
        "seconds",
        "errors",
        "latency_us",
        "percentiles",
        "cpu",
        "timeline",
        "jobs",
    ] {
        assert!(!v[key].is_null(), "{key} is missing");
    }
    for key in ["cpu", "cpus", "kernel", "governor"] {
        assert!(!v["machine"][key].is_null(), "machine.{key} is missing");
    }
    assert!(stderr(&out).contains("IOPS"), "the summary goes where JSON does not");
}

#[test]
fn a_device_is_filled_before_it_is_read() {
    let dir = Dir::new();
    let c = dir.file("c.json", &config(&[malloc("M0")]));
    for more in [&[][..], &["--offset", "64k", "--size", "1M", "-C"]] {
        let r = good_run(&dir, &[&["-c", &c, "-T", "M0", "-w", "read", "--fill"], more].concat());
        assert!(r.totals.reads > 10 && r.totals.writes == 0, "{:?}", r.totals);
    }
    // It really writes: with a bdev that cannot, it fails.
    let layer = json!({"method": "bdev_error_create", "params": {"base_name": "M0"}});
    let c = dir.file("c.json", &config(&[malloc("M0"), layer, inject("write", "failure", 1)]));
    let out = perf(&["-c", &c, "-T", "EE_M0", "--fill", "-t", "0.2"]);
    assert!(!out.status.success() && stderr(&out).contains("Write at byte"), "{}", stderr(&out));
}

#[test]
fn several_jobs_from_a_file() {
    let dir = Dir::new();
    let c = dir.file("c.json", &config(&[null(), malloc("M0")]));
    let jobs =
        "[global]\nbs=8k\niodepth=4\n[fast]\nfilename=Null0\n[slow]\nfilename=M0\nrw=write\nrate_iops=2000\n";
    let j = dir.file("jobs.ini", jobs);
    let r = good_run(&dir, &["-c", &c, "-j", &j]);
    let [fast, slow] = &r.jobs[..] else { panic!("two jobs: {:?}", r.jobs) };
    assert_eq!((fast.name.as_str(), fast.block_size, slow.workload.as_str()), ("fast", 8192, "write"));
    assert_eq!(fast.totals.ios + slow.totals.ios, r.totals.ios);
    assert!(slow.totals.ios as f64 <= most(2000.0, 4, slow.totals.seconds), "{:?}", slow.totals);
    assert!(slow.totals.writes == slow.totals.ios && fast.totals.reads == fast.totals.ios);
}

/// Requests at a rate: a tenth of a second may be caught up with, and a queue may be counted that was filled before.
fn most(rate: f64, depth: u32, seconds: f64) -> f64 {
    rate * (seconds + 0.1) + f64::from(depth) + 1.0
}

#[test]
fn a_rate_is_held() {
    let dir = Dir::new();
    let c = dir.file("c.json", &config(&[null()]));
    // Reactors that sleep between requests, and ones that do not.
    for (rate, how) in [("1000", &["--spin-us", "0"][..]), ("50000", &[])] {
        let json = dir.path("rate.json");
        let args = ["-c", &c, "-T", "Null0", "-q", "8", "--rate-iops", rate, "-t", "1", "--json", &json];
        let out = perf(&[&args, how].concat());
        assert!(out.status.success(), "{}", stderr(&out));
        let r = read(&json);
        let wanted: f64 = rate.parse().expect("a number");
        assert!(r.totals.ios as f64 <= most(wanted, 8, r.totals.seconds), "{rate}: {:?}", r.totals);
        println!("{} IOPS of {rate}", r.totals.iops);
        assert_eq!(r.jobs[0].rate_iops, Some(wanted));
    }
}

fn inject(op: &str, error: &str, num: u32) -> Value {
    json!({"method": "bdev_error_inject_error", "params": {"name": "EE_M0", "io_type": op, "error_type": error,
        "num": num, "corrupt_offset": 1040, "corrupt_value": 1}})
}

#[test]
fn verify_finds_good_data_good() {
    let dir = Dir::new();
    let c = dir.file("c.json", &config(&[malloc("M0")]));
    for (bs, depth) in [("512", "1"), ("4k", "16"), ("64k", "8")] {
        let r = good_run(&dir, &["-c", &c, "-T", "M0", "-w", "verify", "-o", bs, "-q", depth]);
        let v = r.verify.expect("asked for");
        assert!(v.blocks_checked > v.blocks_checked_at_end && v.blocks_checked_at_end > 0, "{v:?}");
    }
}

#[test]
fn verify_finds_bad_data_bad() {
    let dir = Dir::new();
    let layer = json!({"method": "bdev_error_create", "params": {"base_name": "M0"}});
    for op in ["read", "write"] {
        let spoil = inject(op, "corrupt_data", 1_000_000);
        let c = dir.file("c.json", &config(&[malloc("M0"), layer.clone(), spoil]));
        let (r, out) = run(&dir, &["-c", &c, "-T", "EE_M0", "-w", "verify", "--size", "64k", "-q", "4"]);
        let mismatch = r.verify.and_then(|v| v.mismatch).unwrap_or_else(|| panic!("{op}: not found"));
        assert!(
            mismatch.contains("altered data") && mismatch.contains("data mismatch at byte"),
            "{mismatch}"
        );
        assert!(!out.status.success() && stderr(&out).contains(&mismatch), "{}", stderr(&out));
    }
    // Nothing is kept there: neither what was written nor anything else comes back.
    let c = dir.file("c.json", &config(&[null()]));
    let (r, out) = run(&dir, &["-c", &c, "-T", "Null0", "-w", "verify"]);
    let mismatch = r.verify.and_then(|v| v.mismatch).unwrap_or_default();
    assert!(!out.status.success() && mismatch.contains("a read that brought no data"), "{mismatch}");
}

#[test]
fn a_failed_request_ends_the_run_or_is_counted() {
    let dir = Dir::new();
    let layer = json!({"method": "bdev_error_create", "params": {"base_name": "M0"}});
    let c = dir.file("c.json", &config(&[malloc("M0"), layer, inject("read", "failure", 3)]));
    let (r, out) = run(&dir, &["-c", &c, "-T", "EE_M0", "-q", "1"]);
    assert!(!out.status.success() && r.totals.errors == 1, "{:?}", r.totals);
    let said = stderr(&out);
    assert!(
        said.contains("1 requests failed") && said.contains("Read at byte") && said.contains("io_error"),
        "{said}"
    );
    let (r, out) = run_some(&dir, &["-c", &c, "-T", "EE_M0", "-q", "1", "--keep-going"]);
    assert!(!out.status.success() && r.totals.errors == 3 && r.totals.ios >= FEW, "{:?}", r.totals);
}

#[test]
fn what_cannot_run_says_why() {
    let dir = Dir::new();
    let c = dir.file("c.json", &config(&[null(), malloc("M0")]));
    for (args, says) in [
        (&["-c", &c, "-T", "Nothing", "--wait", "0.1"][..], "no bdev named Nothing; there is"),
        (&["-c", &c, "-T", "M0", "-o", "4M"], "too few for blocks"),
        (&["-c", &c, "-T", "Null0", "-m", "[999]"], "core 999"),
        (&["-c", "/nonexistent", "-T", "Null0"], "/nonexistent"),
        (&["-T", "vhost:/nonexistent"], "vhost:/nonexistent"),
        (&["-T", "nbd+unix:///?socket=/nonexistent"], "/nonexistent"),
        (&["-c", &c, "-T", "Null0", "--json", "/nonexistent/x", "-t", "0.1"], "cannot write /nonexistent/x"),
        (&["-c", &c, "-T", "Null0", "-w", "fast"], "use read, write"),
    ] {
        let out = perf(args);
        assert!(!out.status.success() && stderr(&out).contains(says), "{args:?}: {}", stderr(&out));
    }
}

#[test]
fn a_signal_ends_the_run_with_its_result() {
    let dir = Dir::new();
    let c = dir.file("c.json", &config(&[malloc("M0")]));
    for workload in ["randread", "verify"] {
        let json = dir.path("signal.json");
        let args = ["-c", &c, "-T", "M0", "-w", workload, "-t", "3600", "--warm-up", "0", "--spin-us", "50"];
        let more = ["--interval", "0.2", "--progress", "--json", &json];
        let child = program().args(args).args(more).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = child.expect("the program runs");
        // The program tells of each interval: it is at work.
        let mut said = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        for _ in 0..2 {
            while !line.contains("IOPS") {
                line.clear();
                assert!(said.read_line(&mut line).expect("UTF-8") > 0, "it ended early");
            }
            line.clear();
        }
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("a signal");
        said.read_to_string(&mut line).expect("UTF-8");
        assert!(child.wait().expect("it ends").success(), "{line}");
        let r = read(&json);
        assert!(r.is_good() && r.totals.ios > 0 && r.totals.seconds < 3600.0, "{workload}: {:?}", r.totals);
        let _ = std::fs::remove_file(&json);
    }
}

/// Servers of this project as targets: NBD over a unix socket, RNBD over soft-roce, vhost-user-blk.
#[test]
fn remote_devices_are_verified() {
    let dir = Dir::new();
    let (nbd, vhost) = (dir.path("nbd.sock"), dir.path("vhost.sock"));
    let network = test_support::network();
    let [address, client] = [1, 2].map(|last| test_support::address(network, last).to_string());
    let served = json!({"subsystems": [
        {"subsystem": "bdev", "config": [malloc("M0"), malloc("M1"), malloc("M2")]},
        {"subsystem": "vhost_blk", "config": [
            {"method": "vhost_create_blk_controller", "params": {"ctrlr": vhost, "dev_name": "M0", "packed_ring": true}}]},
        {"subsystem": "nbd_server", "config": [
            {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "M1"}},
            {"method": "nbd_server_add_listener", "params": {"path": nbd}}]},
        {"subsystem": "rnbd", "config": [
            {"method": "rnbd_create_export", "params": {"device_path": "M2", "bdev_name": "M2"}},
            {"method": "rnbd_create_listener", "params": {"traddr": address, "provider": "soft-roce"}}]},
    ]});
    let target = Target::serve(Net::loopback(), &served);
    target.app(|_| ());
    until("the servers listen", || listens(&nbd) && Path::new(&vhost).exists());
    let rnbd = format!("rnbd://{client}@{address}/M2?provider=soft-roce");
    let devices = [
        format!("vhost:{vhost}"),
        format!("vhost:{vhost}?packed&inflight"),
        format!("vhost:{vhost}?indirect&queues=2"),
        format!("nbd+unix:///disk?socket={nbd}"),
        rnbd,
    ];
    for device in &devices {
        let r = good_run(&dir, &["-T", device, "-w", "verify", "-q", "8", "--size", "1M"]);
        let v = r.verify.expect("asked for");
        assert!(v.blocks_checked > 10 && v.blocks_checked_at_end > 0, "{device}: {v:?}");
        let r = good_run(&dir, &["-T", device, "-w", "flush", "-q", "2"]);
        assert!(r.totals.ios > 5, "{device}: {:?}", r.totals);
    }
    for workload in ["unmap", "write_zeroes"] {
        let r = good_run(&dir, &["-T", &devices[0], "-w", workload, "-q", "4", "-o", "64k"]);
        assert!(r.totals.writes > 5, "{workload}: {:?}", r.totals);
    }
}

#[test]
fn reports_are_made_of_results_and_of_nothing_else() {
    let dir = Dir::new();
    let c = dir.file("c.json", &config(&[null()]));
    let mut files = Vec::new();
    for label in ["<script>alert(1)</script>", "b"] {
        for n in 0..2 {
            let file = dir.path(&format!("{}-{n}.json", label.len()));
            let args = [
                "-c",
                &c,
                "-T",
                "Null0",
                "-t",
                "0.3",
                "--interval",
                "0.1",
                "--label",
                label,
                "--case",
                "\"><img src=x>",
            ];
            let out = perf(&[&args[..], &["--spin-us", "50", "--json", &file]].concat());
            assert!(out.status.success(), "{}", stderr(&out));
            files.push(file);
        }
    }
    let (page, plots) = (dir.path("report.html"), dir.path("plots"));
    let mut args = vec!["report", "-o", &page, "--svg", &plots, "--baseline", "b", "--title", "<b>"];
    args.extend(files.iter().map(String::as_str));
    let out = perf(&args);
    assert!(out.status.success(), "{}", stderr(&out));
    let html = std::fs::read_to_string(&page).expect("a page");
    for what in [
        "&lt;script&gt;alert(1)",
        "&lt;img src=x&gt;",
        "<title>&lt;b&gt;</title>",
        "<svg",
        "against <b>b</b>",
    ] {
        assert!(html.contains(what), "{what} is missing");
    }
    for what in ["<script", "<img", "href=\"http", "src="] {
        assert!(
            !html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "").replace("src=x&gt;", "").contains(what),
            "{what}"
        );
    }
    let pictures: Vec<_> = std::fs::read_dir(&plots).expect("a folder").flatten().map(|e| e.path()).collect();
    assert!(
        pictures.len() >= 4 && pictures.iter().all(|p| p.extension().is_some_and(|e| e == "svg")),
        "{pictures:?}"
    );
    std::fs::remove_file(&page).expect("it was there");

    let bad = dir.file("bad.json", "{\"format\": \"rnbd-perf-1\", \"iops\": -1}");
    for (args, says) in [
        (&["report"][..], "Name files"),
        (&["report", &bad, "-o", &page], "bad.json"),
        (&["report", "/nonexistent", "-o", &page], "/nonexistent"),
        (&["report", &files[0], "-o", &page, "--baseline", "z"], "no run has this label"),
    ] {
        let out = perf(args);
        assert!(!out.status.success() && stderr(&out).contains(says), "{args:?}: {}", stderr(&out));
        assert!(!Path::new(&page).exists(), "{args:?}: a page was written all the same");
    }
}
