//! The RPC methods of a whole program without RDMA: each with right and wrong parameters, the life cycle, and that
//! what was saved can be loaded.

mod common;

use std::rc::Rc;
use std::time::{Duration, Instant};

use bdev::{Flags, IoRequest, Mode, Op};
use common::Target;
use engine::App;
use serde_json::{Value, json};
use test_support::{patience, recv, until};

/// Code and message of the refusal.
fn refused(t: &Target, method: &str, params: Value) -> (i64, String) {
    let e = t.call(method, params.clone()).expect_err(&format!("{method} {params}"));
    assert_eq!(e.data.as_ref().unwrap()["method"], method, "{e}");
    (e.code, e.message)
}

fn ok(t: &Target, method: &str, params: Value) -> Value {
    t.call(method, params.clone()).unwrap_or_else(|e| panic!("{method} {params}: {e}"))
}

fn names(t: &Target) -> Vec<String> {
    let list = ok(t, "bdev_get_bdevs", json!({}));
    list.as_array().unwrap().iter().map(|b| b["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn no_method_takes_unknown_parameters() {
    let t = Target::start(&[]);
    let startup = Target::start_waiting();
    let subsystems: Vec<_> = rnbd_target::subsystems(Vec::new()).into_iter().map(Rc::from).collect();
    for m in engine::methods::table(&subsystems).methods() {
        let at = if m.states.contains(rpc::State::Runtime) { &t } else { &startup };
        let e = at.call(m.name, json!({"no_such_parameter": 1})).unwrap_err();
        assert_eq!(e.code, -32602, "{}: {e}", m.name);
    }
    t.stop();
    ok(&startup, "framework_start_init", Value::Null);
    startup.stop();
}

#[test]
fn parameters_as_spdk_rpc_sends_them() {
    let t = Target::start(&[]);
    let file = t.file("disk.img", 1 << 20);
    let calls = [
        (
            "bdev_malloc_create",
            json!({"num_blocks": 131072, "block_size": 512, "name": "M0", "md_interleave": false,
            "dif_is_head_of_md": false}),
            json!("M0"),
        ),
        (
            "bdev_malloc_create",
            json!({"num_blocks": 8, "block_size": 512, "md_interleave": false,
            "dif_is_head_of_md": false}),
            json!("Malloc0"),
        ),
        (
            "bdev_null_create",
            json!({"num_blocks": 204800, "block_size": 512, "name": "N0",
            "dif_is_head_of_md": false}),
            json!("N0"),
        ),
        ("bdev_null_resize", json!({"name": "N0", "new_size": 7}), json!(true)),
        ("bdev_uring_create", json!({"filename": file, "name": "U0", "block_size": 512}), json!("U0")),
        ("bdev_uring_rescan", json!({"name": "U0"}), json!(true)),
        ("bdev_uring_delete", json!({"name": "U0"}), json!(true)),
        (
            "bdev_aio_create",
            json!({"filename": file, "name": "A0", "block_size": 512, "readonly": false,
            "fallocate": false, "nowait": false}),
            json!("A0"),
        ),
        ("bdev_aio_rescan", json!({"name": "A0"}), json!(true)),
        (
            "bdev_delay_create",
            json!({"base_bdev_name": "N0", "name": "D0", "avg_read_latency": 10,
            "p99_read_latency": 20, "avg_write_latency": 10, "p99_write_latency": 20}),
            json!("D0"),
        ),
        (
            "bdev_delay_update_latency",
            json!({"delay_bdev_name": "D0", "latency_type": "p99_read",
            "latency_us": 30}),
            json!(true),
        ),
        ("bdev_error_create", json!({"base_name": "M0"}), json!(true)),
        (
            "bdev_error_inject_error",
            json!({"name": "EE_M0", "io_type": "read", "error_type": "failure", "num": 3}),
            json!(true),
        ),
        (
            "bdev_error_inject_error",
            json!({"name": "EE_M0", "io_type": "write", "error_type": "corrupt_data",
            "corrupt_offset": 3, "corrupt_value": 1}),
            json!(true),
        ),
        (
            "bdev_error_inject_error",
            json!({"name": "EE_M0", "io_type": "clear", "error_type": "failure"}),
            json!(true),
        ),
        ("bdev_error_resume_pending", json!({"name": "EE_M0"}), json!(true)),
        ("bdev_examine", json!({"name": "M0"}), json!(true)),
        ("bdev_wait_for_examine", Value::Null, json!(true)),
        ("bdev_set_qos_limit", json!({"name": "M0", "rw_ios_per_sec": 0}), json!(true)),
        ("bdev_set_qd_sampling_period", json!({"name": "M0", "period": 0}), json!(true)),
        ("bdev_reset_iostat", json!({"name": "M0", "mode": "all"}), json!(true)),
        ("framework_set_scheduler", json!({"name": "static"}), json!(true)),
        ("log_set_level", json!({"level": "WARNING"}), json!(true)),
        ("log_get_print_level", Value::Null, json!("WARNING")),
        ("log_set_print_level", json!({"level": "INFO"}), json!(true)),
        ("log_get_level", Value::Null, json!("INFO")),
        ("log_set_flag", json!({"flag": "bdev"}), json!(true)),
        ("log_clear_flag", json!({"flag": "all"}), json!(true)),
        ("log_enable_timestamps", json!({"enabled": false}), json!(true)),
        ("framework_wait_init", Value::Null, json!(true)),
        ("notify_get_types", Value::Null, json!(["bdev_register", "bdev_unregister", "bdev_resize"])),
    ];
    for (method, params, result) in calls {
        assert_eq!(ok(&t, method, params), result, "{method}");
    }
    assert_eq!(names(&t), ["M0", "Malloc0", "N0", "A0", "D0", "EE_M0"]);
    let row = &ok(&t, "bdev_get_bdevs", json!({"name": "D0", "timeout": 100}))[0];
    assert_eq!(row["num_blocks"], 7 * 2048);
    assert_eq!(row["driver_specific"]["delay"]["p99_read_latency"], 30);
    let base = &ok(&t, "bdev_get_bdevs", json!({"name": "N0"}))[0];
    assert_eq!((&base["claimed"], &base["claim_type"]), (&json!(true), &json!("exclusive_write")));
    assert_eq!(base["supported_io_types"]["unmap"], true);
    assert!(ok(&t, "log_get_flags", Value::Null).as_object().unwrap().values().all(|f| f == false));
    for (method, name) in [
        ("bdev_error_delete", "EE_M0"),
        ("bdev_delay_delete", "D0"),
        ("bdev_aio_delete", "A0"),
        ("bdev_null_delete", "N0"),
        ("bdev_malloc_delete", "M0"),
        ("bdev_malloc_delete", "Malloc0"),
    ] {
        assert_eq!(ok(&t, method, json!({"name": name})), true);
    }
    assert!(names(&t).is_empty());
    t.stop();
}

/// As when a target that was killed with I/O in flight is started again at once.
#[test]
fn a_file_that_is_let_go_of_in_time_is_taken() {
    let target = Target::start(&[]);
    let file = target.file("disk", 1 << 20);
    let held = std::fs::File::open(&file).unwrap();
    held.lock().unwrap();
    std::thread::scope(|s| {
        let params = json!({"filename": file, "name": "U0", "block_size": 512});
        let made = s.spawn(|| target.call("bdev_uring_create", params));
        std::thread::sleep(std::time::Duration::from_millis(200));
        // Nobody else is kept waiting.
        assert_eq!(target.call("bdev_get_bdevs", Value::Null), Ok(json!([])));
        drop(held);
        assert_eq!(made.join().unwrap(), Ok(json!("U0")));
    });
}

#[test]
fn refusals_have_spdks_codes_and_name_what_is_wrong() {
    let t = Target::start(&[]);
    ok(&t, "bdev_null_create", json!({"name": "N0", "num_blocks": 8, "block_size": 512}));
    ok(
        &t,
        "bdev_delay_create",
        json!({"base_bdev_name": "N0", "name": "D0", "avg_read_latency": 1,
        "p99_read_latency": 1, "avg_write_latency": 1, "p99_write_latency": 1}),
    );
    let cases = [
        ("bdev_null_create", json!({"name": "N0", "num_blocks": 8, "block_size": 512}), -17, "N0"),
        ("bdev_null_create", json!({"name": "N1", "num_blocks": 8, "block_size": 500}), -22, "block_size"),
        ("bdev_null_create", json!({"name": "N1", "num_blocks": 0, "block_size": 512}), -22, "num_blocks"),
        (
            "bdev_null_create",
            json!({"name": "N1", "num_blocks": -1, "block_size": 512}),
            -32602,
            "num_blocks",
        ),
        ("bdev_null_create", json!({"name": "N1", "block_size": 512}), -32602, "num_blocks"),
        (
            "bdev_null_create",
            json!({"name": "N1", "num_blocks": 8, "block_size": 512, "md_size": 8}),
            -95,
            "md_size",
        ),
        ("bdev_malloc_create", json!({"num_blocks": 8, "block_size": 512, "uuid": "x"}), -32602, "uuid"),
        ("bdev_malloc_create", json!({"num_blocks": 8, "block_size": 512, "numa_id": 1}), -95, "numa_id"),
        ("bdev_malloc_delete", json!({"name": "N0"}), -19, "Null disk"),
        ("bdev_null_delete", json!({"name": "N7"}), -19, "N7"),
        ("bdev_null_resize", json!({"name": "N0", "new_size": 0}), -22, "new_size"),
        ("bdev_null_resize", json!({"name": "D0", "new_size": 1}), -19, "delay"),
        ("bdev_uring_create", json!({"name": "U0", "filename": "/nonexistent/x"}), -2, "/nonexistent/x"),
        ("bdev_uring_rescan", json!({"name": "N0"}), -19, "N0"),
        (
            "bdev_delay_create",
            json!({"base_bdev_name": "N0", "name": "D1", "avg_read_latency": 1,
            "p99_read_latency": 1, "avg_write_latency": 1, "p99_write_latency": 1}),
            -16,
            "D0",
        ),
        (
            "bdev_delay_update_latency",
            json!({"delay_bdev_name": "D0", "latency_type": "p50", "latency_us": 1}),
            -32602,
            "p99_read",
        ),
        (
            "bdev_delay_update_latency",
            json!({"delay_bdev_name": "D0", "latency_type": "avg_read",
            "latency_us": 9}),
            -22,
            "avg_read_latency",
        ),
        ("bdev_error_create", json!({"base_name": "N0"}), -16, "D0"),
        (
            "bdev_error_inject_error",
            json!({"name": "D0", "io_type": "all", "error_type": "failure"}),
            -19,
            "D0",
        ),
        (
            "bdev_error_inject_error",
            json!({"name": "D0", "io_type": "all", "error_type": "nvme_failure"}),
            -95,
            "error_type",
        ),
        ("bdev_get_bdevs", json!({"name": "N7"}), -19, "N7"),
        ("bdev_get_iostat", json!({"names": ["N0", "N7"]}), -19, "N7"),
        ("bdev_get_iostat", json!({"per_channel": true}), -22, "names"),
        ("bdev_reset_iostat", json!({"mode": "error"}), -95, "maxmin"),
        ("bdev_get_histogram", json!({"name": "N0"}), -22, "bdev_enable_histogram"),
        ("bdev_get_histogram_borders", json!({"name": "N0", "borders": [2, 1]}), -22, "ascending"),
        (
            "bdev_enable_histogram",
            json!({"name": "N0", "enable": true, "granularity": 30}),
            -22,
            "granularity",
        ),
        (
            "bdev_enable_histogram",
            json!({"name": "N0", "enable": true, "opc": "copy"}),
            -32602,
            "write_zeroes",
        ),
        (
            "bdev_enable_histogram",
            json!({"name": "N0", "enable": true, "min_nsec": 5, "max_nsec": 5}),
            -22,
            "max_nsec",
        ),
        ("bdev_set_qos_limit", json!({"name": "N0", "r_mbytes_per_sec": 10}), -95, "r_mbytes_per_sec"),
        ("bdev_set_qos_limit", json!({"name": "N0"}), -22, "w_mbytes_per_sec"),
        ("bdev_set_qd_sampling_period", json!({"name": "N0", "period": 10}), -95, "period"),
        ("bdev_set_options", json!({}), -1, "before framework is initialized"),
        ("framework_get_config", json!({"name": "nvmf"}), -32602, "rnbd"),
        ("framework_set_scheduler", json!({"name": "dynamic"}), -22, "static"),
        ("framework_set_idle_policy", json!({"policy": "sleep"}), -32602, "adaptive"),
        ("framework_set_idle_policy", json!({"policy": "poll", "spin_us": 1}), -22, "spin_us"),
        ("framework_set_idle_policy", json!({"policy": "poll", "reactor": 77}), -19, "77"),
        ("framework_get_reactors", json!({"x": 1}), -32602, "requires no parameters"),
        ("log_set_level", json!({"level": "LOUD"}), -32602, "NOTICE"),
        ("log_set_flag", json!({"flag": "nvme"}), -32602, "rtrs"),
        ("spdk_kill_instance", json!({"sig_name": "SIGFOO"}), -32602, "SIGTERM"),
    ];
    for (method, params, code, part) in cases {
        let (got, message) = refused(&t, method, params.clone());
        assert_eq!(got, code, "{method} {params}: {message}");
        assert!(message.contains(part), "{method} {params}: {message}");
    }
    assert_eq!(names(&t), ["N0", "D0"], "nothing was left behind");
    t.stop();
}

#[test]
fn a_caller_can_wait_for_a_bdev() {
    let t = Target::start(&[]);
    let start = Instant::now();
    assert_eq!(refused(&t, "bdev_get_bdevs", json!({"name": "N0", "timeout": 100})).0, -19);
    assert!(start.elapsed() >= Duration::from_millis(100));
    let mut other = t.client();
    let waiting =
        std::thread::spawn(move || other.call("bdev_get_bdevs", json!({"name": "N0", "timeout": 120_000})));
    // The program serves others meanwhile.
    ok(&t, "bdev_null_create", json!({"name": "N0", "num_blocks": 8, "block_size": 512}));
    assert_eq!(waiting.join().unwrap().unwrap()[0]["name"], "N0");
    t.stop();
}

/// Discards the first blocks of a bdev ten times on the control thread, and keeps the channel open.
fn discard_ten_times(t: &Target, bdev: &'static str) {
    let (tx, rx) = std::sync::mpsc::channel();
    App::send(&t.control, move |app, cx| {
        let descriptor = app.manager.open(bdev, Mode::ReadWrite, Box::new(|_| ())).unwrap();
        let mut channel = descriptor.channel().unwrap();
        let mut done = Vec::new();
        for cookie in 0..10 {
            let (op, flags, segments) = (Op::Discard, Flags::NONE, Default::default());
            channel.submit(IoRequest { op, flags, lba: 0, blocks: 8, segments, cookie }).unwrap();
            channel.kick();
            while !channel.poll(&mut done) {}
        }
        assert!(done.iter().all(|c| c.status == bdev::Status::Ok));
        cx.set_local(std::rc::Rc::new(std::cell::RefCell::new(Some((channel, descriptor)))));
        tx.send(()).unwrap();
    });
    rx.recv().unwrap();
}

fn close_channel(t: &Target) {
    type Open = std::cell::RefCell<Option<(bdev::IoChannel, bdev::Descriptor)>>;
    App::send(&t.control, |_, cx| drop(cx.local::<Open>().unwrap().take()));
}

#[test]
fn statistics_count_what_was_done() {
    let t = Target::start(&[]);
    ok(&t, "bdev_malloc_create", json!({"name": "M0", "num_blocks": 64, "block_size": 512}));
    ok(&t, "bdev_null_create", json!({"name": "N0", "num_blocks": 64, "block_size": 512}));
    assert_eq!(ok(&t, "bdev_enable_histogram", json!({"name": "M0", "enable": true})), true);
    discard_ten_times(&t, "M0");

    let stat = ok(&t, "bdev_get_iostat", json!({"per_channel": false}));
    assert_eq!(stat["tick_rate"], 1_000_000_000);
    assert_eq!(stat["bdevs"].as_array().unwrap().len(), 2);
    let row = &stat["bdevs"][0];
    assert_eq!(
        (&row["name"], &row["num_unmap_ops"], &row["bytes_unmapped"]),
        (&json!("M0"), &json!(10), &json!(40960))
    );
    let ticks = |name: &str| row[name].as_u64().unwrap();
    assert!(ticks("max_unmap_latency_ticks") >= ticks("min_unmap_latency_ticks"));
    assert_eq!((ticks("num_read_ops"), ticks("min_read_latency_ticks")), (0, 0));

    let stat = ok(&t, "bdev_get_iostat", json!({"per_channel": true, "names": ["M0"]}));
    assert_eq!(stat["name"], "M0");
    assert_eq!(stat["channels"][0]["num_unmap_ops"], 10);
    // One core, so the control thread is the second.
    assert_eq!(stat["channels"][0]["thread_id"], 2);
    let io = ok(&t, "thread_get_io_channels", Value::Null);
    assert_eq!(io["threads"][1]["io_channels"], json!([{"name": "M0", "ref": 1}]));

    let h = ok(&t, "bdev_get_histogram", json!({"name": "M0"}));
    assert_eq!(histogram_total(&h), 10);
    let counts = ok(&t, "bdev_get_histogram_borders", json!({"name": "M0", "borders": [0, 60_000_000]}));
    assert_eq!(counts["borders_count"][1], 10);
    assert_eq!(counts["borders_count"][2], 10);
    ok(&t, "bdev_get_iostat", json!({"names": ["M0"], "reset_mode": "all"}));
    let stat = ok(&t, "bdev_get_iostat", json!({"names": ["M0"]}));
    assert_eq!(stat["bdevs"][0]["num_unmap_ops"], 0);

    deletion_waits_for_the_last_user(&t);
    t.stop();
}

fn histogram_total(h: &Value) -> u64 {
    use base64::Engine;
    let bytes = base64::engine::general_purpose::STANDARD.decode(h["histogram"].as_str().unwrap()).unwrap();
    let ranges = h["max_range"].as_u64().unwrap() - h["min_range"].as_u64().unwrap() + 1;
    assert_eq!(bytes.len() as u64, 8 * (ranges << h["granularity"].as_u64().unwrap()));
    bytes.chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).sum()
}

fn deletion_waits_for_the_last_user(t: &Target) {
    let mut other = t.client();
    other.set_timeout(Some(patience())).unwrap();
    let (tx, rx) = std::sync::mpsc::channel();
    let deleting =
        std::thread::spawn(move || tx.send(other.call("bdev_malloc_delete", json!({"name": "M0"}))));
    let gone = || t.call("bdev_get_bdevs", json!({"name": "M0"})).is_err();
    until("M0 is being removed", gone);
    assert!(rx.try_recv().is_err(), "a channel is open still");
    let (code, message) =
        refused(t, "bdev_null_create", json!({"name": "M0", "num_blocks": 8, "block_size": 512}));
    assert_eq!(code, -17, "{message}");
    assert!(message.contains("being removed"), "{message}");
    close_channel(t);
    assert_eq!(recv(&rx).unwrap(), true);
    deleting.join().unwrap().unwrap();
    let events = ok(t, "notify_get_notifications", json!({"id": 1, "max": 2}));
    assert_eq!(
        events,
        json!([{"type": "bdev_register", "ctx": "N0", "id": 1}, {"type": "bdev_unregister", "ctx": "M0", "id": 2}])
    );
}

#[test]
fn spdk_top_gets_what_it_asks_for() {
    let t = Target::start(&[]);
    let reactors = ok(&t, "framework_get_reactors", Value::Null);
    let r = &reactors["reactors"][0];
    assert_eq!((&reactors["pid"], &r["lcore"]), (&json!(std::process::id()), &json!(0)));
    assert!(r["tid"].as_i64().unwrap() > 0);
    let thread = &r["lw_threads"][0];
    assert_eq!((&thread["cpumask"], &thread["id"]), (&json!("0x1"), &json!(1)));
    let stats = ok(&t, "thread_get_stats", Value::Null);
    let pollers = ok(&t, "thread_get_pollers", Value::Null);
    for list in [&stats["threads"], &pollers["threads"]] {
        assert_eq!((&list[0]["name"], &list[1]["name"]), (&json!("reactor_0"), &json!("control")));
    }
    let control = &pollers["threads"][1]["active_pollers"];
    let rpc = control.as_array().unwrap().iter().find(|p| p["name"] == "rpc").unwrap();
    assert!(
        rpc["busy_count"].as_u64().unwrap() > 0 && rpc["run_count"].as_u64() >= rpc["busy_count"].as_u64()
    );
    assert_eq!(stats["threads"][1]["active_pollers_count"], control.as_array().unwrap().len());
    assert_eq!(ok(&t, "framework_get_scheduler", Value::Null)["scheduler_name"], "static");
    let version = ok(&t, "spdk_get_version", Value::Null);
    assert_eq!(version["version"], concat!("rnbd-target v", env!("CARGO_PKG_VERSION")));
    t.stop();
}

#[test]
fn a_bdev_is_known_by_its_uuid_too() {
    let t = Target::start(&[]);
    let uuid = "7f5a2b4e-9b1c-4a5e-8f64-0a1b2c3d4e5f";
    let malloc = |name: &str| json!({"name": name, "num_blocks": 64, "block_size": 512, "uuid": uuid});
    ok(&t, "bdev_malloc_create", malloc("M0"));
    let rows = ok(&t, "bdev_get_bdevs", json!({"name": uuid}));
    assert_eq!((&rows[0]["name"], &rows[0]["aliases"]), (&json!("M0"), &json!([uuid])));
    let (code, text) = refused(&t, "bdev_malloc_create", malloc("M1"));
    assert_eq!(code, -17, "{text}");
    ok(&t, "rnbd_create_export", json!({"device_path": "disk", "bdev_name": uuid}));
    ok(&t, "bdev_malloc_delete", json!({"name": uuid}));
    ok(&t, "bdev_malloc_create", malloc("M1"));
    t.stop();
}

#[test]
fn idle_policy_is_set_and_shown() {
    let t = Target::start(&[]);
    let set = |params| ok(&t, "framework_set_idle_policy", params);
    let get = || ok(&t, "framework_get_idle_policy", Value::Null);
    set(json!({"policy": "adaptive", "spin_us": 7}));
    assert_eq!(get(), json!([{"reactor": 0, "policy": "adaptive", "spin_us": 7}]));
    set(json!({"policy": "adaptive", "reactor": 0}));
    assert_eq!(get()[0]["spin_us"], 7, "what is absent stays");
    set(json!({"policy": "poll"}));
    assert_eq!(get(), json!([{"reactor": 0, "policy": "poll"}]));
    let config = ok(&t, "framework_get_config", json!({"name": "reactor"}));
    assert_eq!(config, json!([{"method": "framework_set_idle_policy", "params": {"policy": "poll"}}]));
    t.stop();
}

/// What `save_config` of SPDK's client writes.
fn save(t: &Target, with_batches: bool) -> Value {
    let list = ok(t, "framework_get_subsystems", Value::Null);
    let subsystem = |s: &Value| {
        let config =
            ok(t, "framework_get_config", json!({"name": s["subsystem"], "with_batches": with_batches}));
        json!({"subsystem": s["subsystem"], "config": config})
    };
    json!({"subsystems": list.as_array().unwrap().iter().map(subsystem).collect::<Vec<_>>()})
}

#[test]
fn what_was_saved_can_be_loaded() {
    let a = Target::start(&[]);
    let file = a.file("disk.img", 1 << 20);
    let image = a.file("image.img", 1 << 20);
    let address = test_support::address(test_support::network(), 1).to_string();
    for (method, params) in [
        ("bdev_null_create", json!({"name": "N0", "num_blocks": 64, "block_size": 512})),
        ("bdev_null_create", json!({"name": "N1", "num_blocks": 64, "block_size": 4096})),
        ("bdev_malloc_create", json!({"num_blocks": 64, "block_size": 512, "physical_block_size": 4096})),
        ("bdev_uring_create", json!({"name": "U0", "filename": file})),
        ("bdev_aio_create", json!({"name": "A0", "filename": image, "block_size": 4096, "readonly": true})),
        (
            "bdev_delay_create",
            json!({"base_bdev_name": "N1", "name": "D0", "avg_read_latency": 1,
            "p99_read_latency": 2, "avg_write_latency": 3, "p99_write_latency": 4}),
        ),
        ("bdev_error_create", json!({"base_name": "D0"})),
        ("framework_set_idle_policy", json!({"policy": "adaptive", "spin_us": 50})),
        (
            "rnbd_create_export",
            json!({"device_path": "disk0", "bdev_name": "EE_D0",
            "allow": [{"addr": "10.0.0.0/8"}, {"session": "s"}]}),
        ),
        ("rnbd_create_export", json!({"device_path": "sub/image", "bdev_name": "A0", "read_only": true})),
        ("rnbd_create_listener", json!({"traddr": "192.0.2.1", "provider": "loopback"})),
        ("rnbd_create_listener", json!({"traddr": address, "provider": "auto", "ack_delay": 18})),
        ("bdev_null_create", json!({"name": "Gone", "num_blocks": 64, "block_size": 512})),
        ("rnbd_create_export", json!({"device_path": "gone", "bdev_name": "Gone"})),
        ("bdev_null_delete", json!({"name": "Gone"})),
    ] {
        ok(&a, method, params);
    }
    let (saved, batched) = (save(&a, false), save(&a, true));
    let bdevs = ok(&a, "bdev_get_bdevs", json!({}));
    let calls = saved["subsystems"].as_array().unwrap().iter().flat_map(|s| s["config"].as_array().unwrap());
    let listener =
        json!({"adrfam": "ipv4", "traddr": address, "trsvcid": "1234", "provider": "auto", "ack_delay": 18});
    assert!(calls.clone().any(|c| c["params"] == listener), "the choice, not what came of it: {saved}");
    assert!(!calls.clone().any(|c| c["params"]["device_path"] == "gone"), "the next start would refuse it");
    assert!(saved["subsystems"][1]["config"].as_array().unwrap().iter().all(Value::is_object));
    let batch = &batched["subsystems"][1]["config"][0];
    assert_eq!(batch.as_array().unwrap().len(), 2, "both null bdevs: {batch}");
    // The files are locked until then.
    let dir = a.stop();
    for config in [saved.clone(), batched] {
        let b = Target::start_in(dir.clone(), &config.to_string(), false);
        assert_eq!(save(&b, false), saved);
        assert_eq!(ok(&b, "bdev_get_bdevs", json!({})), bdevs);
        b.stop();
    }
}

#[test]
fn wait_for_rpc_goes_through_both_states() {
    let t = Target::start_waiting();
    let current = |t: &Target| ok(t, "rpc_get_methods", json!({"current": true}));
    let has = |list: &Value, name: &str| list.as_array().unwrap().iter().any(|n| n == name);
    let list = current(&t);
    assert!(has(&list, "framework_start_init") && !has(&list, "bdev_null_create"));
    assert_eq!(refused(&t, "bdev_get_bdevs", json!({})).0, -1);
    ok(&t, "bdev_set_options", json!({"bdev_io_pool_size": 65535, "bdev_io_cache_size": 256}));
    let (code, _) = refused(&t, "bdev_set_options", json!({"bdev_io_pool_size": 1, "bdev_io_cache_size": 2}));
    assert_eq!(code, -32602);
    let mut other = t.client();
    let waiting = std::thread::spawn(move || other.call("framework_wait_init", Value::Null));
    assert_eq!(ok(&t, "framework_start_init", Value::Null), true);
    assert_eq!(waiting.join().unwrap().unwrap(), true);
    let list = current(&t);
    assert!(!has(&list, "framework_start_init") && has(&list, "bdev_null_create"));
    t.stop();
}

#[test]
fn shipped_configurations_load() {
    let mut count = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../configs")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap();
        // Those of rnbd-initiator are loaded by its tests.
        if !(name.starts_with("target") && name.ends_with(".json")) {
            continue;
        }
        count += 1;
        let dir = common::dir();
        let file = |name: &str| dir.file(name, 1 << 20).display().to_string();
        // What this machine may not have: an RDMA device, disks and paths.
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text
            .replace("\"provider\": \"auto\"", "\"provider\": \"loopback\"")
            .replace("/dev/nvme0n1", &file("disk.img"))
            .replace("/srv/rnbd/image.img", &file("image.img"));
        let t = Target::start_in(dir, &text, false);
        assert!(
            !ok(&t, "rnbd_get_listeners", Value::Null).as_array().unwrap().is_empty(),
            "{}",
            path.display()
        );
        assert!(!ok(&t, "rnbd_get_exports", json!({})).as_array().unwrap().is_empty(), "{}", path.display());
        let saved = save(&t, false);
        let dir = t.stop();
        let again = Target::start_in(dir, &saved.to_string(), false);
        assert_eq!(save(&again, false), saved, "{}", path.display());
        again.stop();
    }
    assert!(count >= 2, "only {count} configurations found");
}
