//! vhost-user-blk controllers in a whole program: RPC methods, bdevs of all kinds, and guests that use them.

use std::thread::JoinHandle;
use std::time::Duration;

use engine::log::LogControl;
use engine::{Error, Options};
use exports::vhost::Vhost;
use reactor::{Handle, IdlePolicy};
use rpc::{Client as RpcClient, Config, RpcError};
use serde_json::{Value, json};
use test_support::{Dir, patience, until};
use vhost_driver::{Disk, Options as Guest};

struct Program {
    dir: Dir,
    control: Handle,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Program {
    /// Malloc "M0" (512-byte blocks), "M4" (4096), null "N0", file "F0", and "slow", which takes 4 s, over "M1".
    fn start() -> Self {
        let dir = Dir::new("vhost-export");
        let file = dir.file("file", 4 << 20);
        let malloc = |name: &str, blocks: u32, size: u32| json!({ "method": "bdev_malloc_create", "params": { "name": name, "num_blocks": blocks, "block_size": size } });
        let config = json!({ "subsystems": [
            { "subsystem": "vhost_blk", "config": [
                { "method": "vhost_set_options", "params": { "socket_dir": dir.path(), "max_queues": 8 } },
            ]},
            { "subsystem": "bdev", "config": [
                malloc("M0", 8192, 512),
                malloc("M1", 8192, 512),
                malloc("M4", 1024, 4096),
                { "method": "bdev_null_create", "params": { "name": "N0", "num_blocks": 8192, "block_size": 512 } },
                { "method": "bdev_uring_create", "params": { "name": "F0", "filename": file, "block_size": 512 } },
                { "method": "bdev_delay_create", "params": { "name": "slow", "base_bdev_name": "M1",
                    "avg_read_latency": 4_000_000, "p99_read_latency": 4_000_000,
                    "avg_write_latency": 4_000_000, "p99_write_latency": 4_000_000 } },
            ]},
        ]});
        let socket = dir.join("rpc.sock");
        let (tx, rx) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let options = Options {
                program: "test",
                subsystems: vec![Box::new(Vhost::default())],
                cpumask: "0x1".parse().unwrap(),
                rpc_socket: socket,
                config: Some(Config::parse(config.to_string().into_bytes(), "test").unwrap()),
                wait_for_rpc: false,
                rpcs_allowed: None,
                ignore_init_errors: false,
                idle: IdlePolicy::Adaptive { spin: Duration::from_micros(20) },
                log: LogControl::detached(),
                on_ready: None,
                on_refusal: None,
            };
            engine::app::run(options, |control| tx.send(control.clone()).unwrap())
        });
        let Ok(control) = rx.recv() else { panic!("no start: {:?}", thread.join()) };
        let program = Self { dir, control, thread: Some(thread) };
        program.call("framework_wait_init", Value::Null).unwrap();
        program
    }

    fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        RpcClient::connect(self.dir.join("rpc.sock"))?.call(method, params)
    }

    fn create(&self, ctrlr: &str, bdev: &str, more: Value) -> Result<Value, RpcError> {
        let mut params = json!({ "ctrlr": ctrlr, "dev_name": bdev, "readonly": false, "packed_ring": true });
        for (key, value) in more.as_object().into_iter().flatten() {
            params[key] = value.clone();
        }
        self.call("vhost_create_blk_controller", params)
    }

    fn plug(&self, ctrlr: &str, guest: Guest) -> Disk {
        Disk::connect(&self.dir.join(ctrlr), guest).unwrap()
    }

    /// Ends the program as a signal would.
    fn stop(mut self) {
        self.control.send(|cx| {
            let handle = cx.handle().clone();
            engine::App::send(&handle, engine::App::shutdown);
        });
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

#[test]
fn guests_use_bdevs_of_all_kinds() {
    let program = Program::start();
    for (n, bdev) in ["M0", "M4", "F0"].into_iter().enumerate() {
        assert_eq!(program.create(bdev, bdev, json!({})), Ok(json!(true)));
        for packed in [false, true] {
            let mut disk = program.plug(bdev, Guest { packed, indirect: packed, ..Guest::default() });
            assert_eq!(disk.sectors().unwrap(), 8192, "{bdev}");
            let data: Vec<u8> = (0..65536u32).map(|i| (i * 7 + n as u32 + u32::from(packed)) as u8).collect();
            disk.write(64, &data).unwrap();
            disk.flush().unwrap();
            assert_eq!(disk.read(64, 65536).unwrap(), data, "{bdev}");
            // Write-zeroes of 8 blocks of 4096 bytes, and a discard of them.
            for kind in [13, 11] {
                let slot = disk.take(0).unwrap();
                let range = [&64u64.to_le_bytes()[..], &64u32.to_le_bytes(), &[0; 4]].concat();
                disk.ram.write(disk.request(0, slot).data, &range);
                assert!(disk.submit(0, slot, kind, 0, 16, true));
                disk.publish(0);
                assert_eq!(disk.wait(0).unwrap().1, 0, "{bdev}");
                assert_eq!(disk.read(64, 32768).unwrap(), vec![0; 32768], "{bdev}");
            }
            assert_eq!(disk.read(128, 512 * 8).unwrap(), data[32768..32768 + 4096], "{bdev}");
            let (slot, status) = disk.run(8, 0, 20, false).unwrap();
            assert_eq!((status, &disk.ram.read(disk.request(0, slot).data, 2)[..]), (0, bdev.as_bytes()));
        }
    }
    // Half a block of a 4096-byte disk, and past the end.
    let mut disk = program.plug("M4", Guest::default());
    assert_eq!(disk.run(0, 1, 512, false).unwrap().1, 1);
    assert_eq!(disk.run(0, 8192, 4096, false).unwrap().1, 1);
    program.stop();
}

/// What a balloon, free page reporting and virtio-mem do: a page of the guest leaves its file, and another comes in its
/// place. Data then goes to and comes from the page that is there now.
#[test]
fn memory_that_the_host_took_back_is_not_used() {
    let program = Program::start();
    program.create("F0", "F0", json!({})).unwrap();
    let mut disk = program.plug("F0", Guest::default());
    // The ring has seen the memory.
    disk.write(0, &[1; 4096]).unwrap();
    let slot = disk.take(0).unwrap();
    let data = disk.request(0, slot).data;
    for byte in [2, 3] {
        disk.ram.take_back(data & !4095, 8192);
        disk.ram.write(data, &[byte; 4096]);
        assert!(disk.submit(0, slot, 1, 0, 4096, true));
        disk.publish(0);
        assert_eq!(disk.wait(0).unwrap().1, 0);
        let file = std::fs::read(program.dir.join("file")).unwrap();
        assert!(file[..4096] == [byte; 4096], "the write took what the guest had there before: {}", file[0]);
        disk.ram.take_back(data & !4095, 8192);
        assert!(disk.submit(0, slot, 0, 0, 4096, false));
        disk.publish(0);
        assert_eq!(disk.wait(0).unwrap().1, 0);
        let seen = disk.ram.read(data, 4096);
        assert!(seen == [byte; 4096], "the read went where the guest does not look: {}", seen[0]);
    }
    program.stop();
}

#[test]
fn methods_answer_as_spdks() {
    let program = Program::start();
    let errno = |r: Result<Value, RpcError>| r.unwrap_err().code;
    let absolute = program.dir.join("elsewhere");
    assert_eq!(
        program.create("c0", "M0", json!({ "cpumask": "0x1", "transport": "vhost_user_blk" })),
        Ok(json!(true))
    );
    assert_eq!(
        program.create(absolute.to_str().unwrap(), "M4", json!({ "readonly": true })),
        Ok(json!(true))
    );
    assert_eq!(errno(program.create("c0", "M0", json!({}))), -17);
    assert_eq!(errno(program.create("c1", "nothing", json!({}))), -19);
    assert_eq!(errno(program.create("c1", "M0", json!({ "cpumask": "0x8000" }))), -22);
    assert_eq!(errno(program.create("c1", "M0", json!({ "transport": "vfio" }))), -32602);
    assert_eq!(errno(program.create(&"x".repeat(200), "M0", json!({}))), -36);
    assert_eq!(errno(program.create("file", "M0", json!({}))), -17, "a file is not replaced");
    let name = |ctrlr: &str| json!({ "ctrlr": ctrlr });
    assert_eq!(errno(program.call("vhost_delete_controller", name("c9"))), -19);
    assert_eq!(errno(program.call("vhost_get_controllers", json!({ "name": "c9" }))), -19);
    assert_eq!(
        program.call("virtio_blk_get_transports", Value::Null),
        Ok(json!([{ "name": "vhost_user_blk" }]))
    );
    let coalescing = json!({ "ctrlr": "c0", "delay_base_us": 100, "iops_threshold": 5000 });
    assert_eq!(program.call("vhost_controller_set_coalescing", coalescing), Ok(json!(true)));
    let mut disk = program.plug("c0", Guest { queues: 2, ..Guest::default() });
    disk.write(0, &[1; 512]).unwrap();
    let shown = program.call("vhost_get_controllers", json!({ "name": "c0" })).unwrap();
    let sessions = shown[0]["sessions"].clone();
    assert_eq!(
        shown[0],
        json!({
            "ctrlr": "c0", "cpumask": "0x1", "delay_base_us": 100, "iops_threshold": 5000,
            "socket": program.dir.join("c0"), "sessions": sessions, "limits": shown[0]["limits"],
            "backend_specific": { "block": { "readonly": false, "bdev": "M0", "transport": "vhost_user_blk" } },
        })
    );
    let limits = &shown[0]["limits"];
    assert_eq!((&limits["sessions"], &limits["descriptors_per_session"]), (&json!(64), &json!(64)));
    assert_eq!(limits["descriptors_used"], sessions[0]["descriptors"]);
    assert!(limits["descriptors"].as_u64() > limits["descriptors_used"].as_u64(), "{limits}");
    assert_eq!(sessions[0]["started"], true);
    assert_eq!(sessions[0]["max_queues"], 2);
    assert_eq!(sessions[0]["inflight_task_cnt"], 0);
    assert_eq!(sessions[0]["write_cache"], true);
    assert_eq!(errno(program.call("vhost_delete_controller", name("c0"))), -16, "a guest is connected");
    // What is saved makes it again.
    let saved = program.call("framework_get_config", json!({ "name": "vhost_blk" })).unwrap();
    let methods: Vec<&str> =
        saved.as_array().unwrap().iter().map(|c| c["method"].as_str().unwrap()).collect();
    assert_eq!(
        methods,
        [
            "vhost_set_options",
            "vhost_create_blk_controller",
            "vhost_create_blk_controller",
            "vhost_controller_set_coalescing"
        ]
    );
    drop(disk);
    // At once, though the program may not have seen yet that the guest is gone.
    assert_eq!(program.call("vhost_delete_controller", name("c0")), Ok(json!(true)));
    assert!(!program.dir.join("c0").exists());
    // Its bdev is free, and its name, too.
    assert_eq!(program.create("c0", "M0", json!({})), Ok(json!(true)));
    assert_eq!(program.call("bdev_malloc_delete", json!({ "name": "M4" })), Ok(json!(true)));
    program.stop();
}

#[test]
fn read_only_controllers_refuse_writes() {
    let program = Program::start();
    program.create("ro", "M0", json!({ "readonly": true })).unwrap();
    let mut disk = program.plug("ro", Guest::default());
    assert_eq!(disk.features & (1 << 5), 1 << 5);
    assert_eq!(disk.run(1, 0, 512, true).unwrap().1, 1);
    assert_eq!(disk.run(0, 0, 512, false).unwrap().1, 0);
    program.stop();
}

#[test]
fn resizes_and_removals_reach_the_guest() {
    use std::io::Read;
    let program = Program::start();
    program.create("null", "N0", json!({})).unwrap();
    let mut disk = program.plug("null", Guest::default());
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(patience())).unwrap();
    let request = vhost::vhost_user::message::FrontendReq::SET_BACKEND_REQ_FD;
    assert!(disk.front.send_acked(request, &[], &[std::os::fd::AsFd::as_fd(&theirs)]).unwrap());
    program.call("bdev_null_resize", json!({ "name": "N0", "new_size": 8 })).unwrap();
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message[0], 2, "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG");
    assert_eq!(disk.sectors().unwrap(), 16384);
    assert_eq!(disk.run(0, 16000, 512, false).unwrap().1, 0);
    // Deleting it answers once no reactor uses it; the guest gets errors from then on.
    assert_eq!(program.call("bdev_null_delete", json!({ "name": "N0" })), Ok(json!(true)));
    assert_eq!(disk.run(0, 0, 512, false).unwrap().1, 1);
    let shown = program.call("vhost_get_controllers", Value::Null).unwrap();
    assert_eq!(shown[0]["backend_specific"]["block"]["bdev"], Value::Null);
    program.stop();
}

#[test]
fn shutdown_completes_what_is_in_flight() {
    let program = Program::start();
    program.create("slow", "slow", json!({})).unwrap();
    let mut disk = program.plug("slow", Guest::default());
    for _ in 0..8 {
        let slot = disk.take(0).unwrap();
        assert!(disk.submit(0, slot, 1, 0, 512, true));
    }
    disk.publish(0);
    until("they are taken", || {
        let shown = program.call("vhost_get_controllers", Value::Null).unwrap();
        shown[0]["sessions"][0]["inflight_task_cnt"] == 8
    });
    program.stop();
    for _ in 0..8 {
        assert_eq!(disk.poll(0).map(|(_, status)| status), Some(0));
    }
    assert!(disk.front.is_closed());
}
