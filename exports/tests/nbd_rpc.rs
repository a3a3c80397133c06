//! `nbd_*` in a whole program, as far as it goes without root and without the kernel's driver. The rest is in the VM
//! scenarios nbd-*.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use engine::app::{self, Options};
use engine::log::LogControl;
use exports::nbd::Nbd;
use reactor::IdlePolicy;
use rpc::{Client, Config, RpcError};
use serde_json::{Value, json};
use test_support::Dir;

struct Program {
    dir: Dir,
    thread: JoinHandle<Result<(), app::Error>>,
}

impl Program {
    fn start() -> Self {
        let dir = Dir::new("nbd-rpc-test");
        let calls = json!([
            {"method": "bdev_null_create", "params": {"name": "N0", "num_blocks": 64, "block_size": 512}},
            {"method": "bdev_null_create", "params": {"name": "Big", "num_blocks": 64, "block_size": 8192}}]);
        let config = json!({"subsystems": [{"subsystem": "bdev", "config": calls}]}).to_string();
        let rpc_socket = dir.join("rpc.sock");
        let (tx, rx) = std::sync::mpsc::channel();
        let run = move || {
            let options = Options {
                program: "nbd-rpc-test",
                subsystems: vec![Box::new(Nbd::default())],
                cpumask: "0x1".parse().unwrap(),
                rpc_socket,
                config: Some(Config::parse(config.into_bytes(), "test").unwrap()),
                wait_for_rpc: false,
                rpcs_allowed: None,
                ignore_init_errors: false,
                idle: IdlePolicy::Adaptive { spin: Duration::from_micros(100) },
                log: LogControl::detached(),
                on_ready: None,
                on_refusal: None,
            };
            app::run(options, |_| tx.send(()).unwrap())
        };
        let thread = std::thread::spawn(run);
        rx.recv().expect("a start");
        let program = Self { dir, thread };
        program.call("framework_wait_init", Value::Null).unwrap();
        program
    }

    fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        Client::connect(self.dir.join("rpc.sock")).unwrap().call(method, params)
    }

    fn refused(&self, method: &str, params: Value, code: i64, word: &str) {
        let error = self.call(method, params).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(word), "no \"{word}\" in: {error}");
    }

    fn stop(self) {
        self.call("spdk_kill_instance", json!({"sig_name": "SIGTERM"})).unwrap();
        self.thread.join().unwrap().unwrap();
    }
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    let p = Program::start();
    let start = |members: Value| {
        let mut params = json!({"bdev_name": "N0", "nbd_device": "/dev/nbd0"});
        params.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
        params
    };
    let method = "nbd_start_disk";
    p.refused(method, start(json!({"bdev_name": "Nix"})), -19, "no bdev named Nix");
    p.refused(method, start(json!({"bdev_name": "Big"})), -22, "the kernel's NBD takes 512 to 4096");
    for device in ["/dev/sda", "nbd", "/dev/nbd1p1", "", "/dev/null"] {
        p.refused(method, start(json!({"nbd_device": device})), -19, "is no NBD device; /dev/nbd0 is one");
    }
    for connections in [0, 65] {
        p.refused(method, start(json!({"connections": connections})), -32602, "1 to 64 is right");
    }
    p.refused(method, start(json!({"timeout_sec": 86401})), -32602, "0 to 86400 seconds");
    p.refused(method, start(json!({"read_only": true})), -32602, "readonly");
    p.refused("nbd_stop_disk", json!({"nbd_device": "/dev/nbd3"}), -19, "serves no disk on /dev/nbd3");
    p.refused("nbd_get_disks", json!({"nbd_device": "/dev/nbd3"}), -19, "serves no disk on /dev/nbd3");
    assert_eq!(p.call("nbd_get_disks", json!({})), Ok(json!([])));
    assert_eq!(p.call("framework_get_config", json!({"name": "nbd"})), Ok(json!([])));
    p.stop();
}

#[test]
fn without_the_driver_a_start_says_so_and_leaves_nothing() {
    if nbd_poll::kernel::netlink::Netlink::open().is_ok() || PathBuf::from("/sys/block/nbd0").exists() {
        eprintln!("SKIPPED: this host has the NBD driver, and a test must not make devices on it");
        return;
    }
    let p = Program::start();
    for control in ["auto", "netlink", "ioctl"] {
        let params = json!({"bdev_name": "N0", "control": control});
        p.refused("nbd_start_disk", params, -19, "modprobe nbd");
    }
    // The bdev was let go of.
    assert_eq!(p.call("bdev_null_delete", json!({"name": "N0"})), Ok(json!(true)));
    p.stop();
}
