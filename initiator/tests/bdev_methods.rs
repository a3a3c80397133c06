//! `bdev_rnbd_*` in a whole program: a configuration with a server that is away, strictness, and what is saved.

mod world;

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use engine::app::{self, App, Options};
use engine::log::LogControl;
use reactor::{Handle, IdlePolicy};
use rnbd_initiator::bdev::BdevRnbd;
use serde_json::{Value, json};
use test_support::Dir;
use verbs::loopback::Fabric;
use world::{Net, Target, malloc, until};

struct Program {
    control: Handle,
    thread: Option<JoinHandle<()>>,
    _dir: Dir,
}

impl Program {
    fn start(fabric: &Fabric, calls: &Value) -> Self {
        let config = json!({"subsystems": [{"subsystem": "bdev", "config": calls}]});
        let config = rpc::Config::parse(config.to_string().into_bytes(), "test").unwrap();
        let (tx, rx) = mpsc::channel();
        let dir = Dir::new("rnbd-methods");
        let (rpc_socket, fabric) = (dir.join("i"), fabric.clone());
        let thread = std::thread::spawn(move || {
            let options = Options {
                program: "initiator",
                subsystems: vec![Box::new(BdevRnbd::new(vec![fabric.cm()]))],
                cpumask: "0x1".parse().unwrap(),
                rpc_socket,
                config: Some(config),
                wait_for_rpc: false,
                rpcs_allowed: None,
                ignore_init_errors: false,
                idle: IdlePolicy::Adaptive { spin: Duration::from_micros(20) },
                log: LogControl::detached(),
                on_ready: None,
                on_refusal: None,
            };
            app::run(options, |control| tx.send(control.clone()).unwrap()).unwrap();
        });
        let program = Self { control: rx.recv().unwrap(), thread: Some(thread), _dir: dir };
        program.ok("framework_wait_init", Value::Null);
        program
    }

    fn call(&self, method: &str, params: Value) -> Result<Value, rpc::RpcError> {
        world::call(&self.control, method, params)
    }

    fn ok(&self, method: &str, params: Value) -> Value {
        self.call(method, params).unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    fn saved(&self, subsystem: &str) -> Vec<Value> {
        let calls = self.ok("framework_get_config", json!({"name": subsystem}));
        let of_ours = |c: &&Value| c["method"] == "bdev_rnbd_map";
        calls.as_array().unwrap().iter().filter(of_ours).cloned().collect()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        App::send(&self.control, |app, cx| app.shutdown(cx));
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the program panicked");
    }
}

fn map(name: &str, device: &str) -> Value {
    json!({"name": name, "sessname": "h", "device_path": device, "provider": "loopback", "connect_timeout_sec": 5,
        "paths": [{"src": "10.0.0.101", "dst": "10.0.0.1"}], "reconnect_delay_sec": 1})
}

#[test]
fn a_server_that_is_away_does_not_prevent_the_start() {
    let fabric = Fabric::new();
    let program = Program::start(&fabric, &json!([{"method": "bdev_rnbd_map", "params": map("d", "m")}]));
    let device = program.ok("bdev_rnbd_get_devices", json!({"name": "d"}));
    assert_eq!(device[0]["state"], "init");
    assert!(device[0]["last_error"].as_str().unwrap().contains("nobody listens"), "{device}");
    // It is saved though there is no bdev.
    assert_eq!((program.saved("bdev").len(), program.saved("bdev_rnbd").len()), (0, 1));
    // The same call now is refused, and leaves nothing.
    let e = program.call("bdev_rnbd_map", map("e", "other")).unwrap_err();
    assert!(e.message.contains("nobody listens") && e.data.unwrap()["hint"].is_string());
    assert_eq!(program.ok("bdev_rnbd_get_devices", json!({})).as_array().unwrap().len(), 1);
    let target = Target::start(&Net::Loopback(fabric.clone()), &[malloc("m", 512)], json!({}));
    until("it is open", || program.ok("bdev_rnbd_get_devices", json!({}))[0]["state"] == "open");
    let (saved, none) = (program.saved("bdev"), program.saved("bdev_rnbd"));
    assert_eq!((saved.len(), none.len()), (1, 0));
    let bdev = program.ok("bdev_get_bdevs", json!({"name": "d"}));
    assert_eq!(bdev[0]["product_name"], "RNBD disk");
    assert_eq!(bdev[0]["driver_specific"]["rnbd"]["state"], "open", "{bdev}");
    let uuid = bdev[0]["uuid"].clone();
    drop(program);
    // What was saved makes it again, as it was.
    let program = Program::start(&fabric, &json!(saved));
    assert_eq!(program.ok("bdev_get_bdevs", json!({"name": "d"}))[0]["uuid"], uuid);
    assert_eq!(program.saved("bdev"), saved);
    drop(target);
}

#[test]
fn calls_and_refusals() {
    let fabric = Fabric::new();
    let target = Target::start(&Net::Loopback(fabric.clone()), &[malloc("m", 512)], json!({}));
    let program = Program::start(&fabric, &json!([]));
    let error = |method: &str, params: Value| {
        let e = program.call(method, params).expect_err(method);
        (e.code, e.message, e.data.unwrap_or_default())
    };
    let (code, text, _) = error("bdev_rnbd_map", json!({"name": "d", "sessname": "s", "device": "m"}));
    assert!(code == -32602 && text.contains("device_path"), "{text}");
    let (code, text, data) =
        error("bdev_rnbd_map", json!({"name": "d", "sessname": "s", "device_path": "m"}));
    assert!(code == -6 && data["hint"].as_str().unwrap().contains("paths"), "{text}");
    let (code, text, _) = error(
        "bdev_rnbd_map",
        json!({"name": "d", "sessname": "s", "device_path": "m", "paths": ["ip:nowhere"]}),
    );
    assert!(code == -32602 && text.contains("paths[0]") && text.contains("IP address"), "{text}");
    let (code, text, _) = error("bdev_rnbd_map", {
        let mut p = map("d", "m");
        p["provider"] = "carrier-pigeon".into();
        p
    });
    assert!(code == -19 && text.contains("rdma-core or soft-roce"), "{text}");
    assert_eq!(program.ok("bdev_rnbd_map", map("d", "m")), "d");
    let (code, _, data) = error("bdev_rnbd_map", map("e", "m"));
    assert!(code == -17 && data["hint"].is_string());
    let sessions = program.ok("bdev_rnbd_get_sessions", json!({"session": "h"}));
    let path = &sessions[0]["paths"][0];
    assert_eq!(
        (&path["state"], &path["path"]),
        (&json!("connected"), &json!("10.0.0.101@10.0.0.1")),
        "{sessions}"
    );
    assert_eq!(sessions[0]["devices"], json!(["d"]));
    assert_eq!(error("bdev_rnbd_get_sessions", json!({"session": "x"})).0, -6);
    let add = json!({"session": "h", "path": "ip:10.0.0.102@ip:10.0.0.2"});
    assert_eq!(program.ok("bdev_rnbd_add_path", add.clone()), true);
    program.ok(
        "bdev_rnbd_set_options",
        json!({"session": "h", "mpath_policy": "round_robin", "max_reconnect_attempts": 9}),
    );
    let sessions = program.ok("bdev_rnbd_get_sessions", json!({}));
    assert_eq!(
        (&sessions[0]["mpath_policy"], &sessions[0]["max_reconnect_attempts"]),
        (&json!("round_robin"), &json!(9))
    );
    assert_eq!(
        program.saved("bdev")[0]["params"]["paths"].as_array().unwrap().len(),
        2,
        "added paths are saved"
    );
    program.ok("bdev_rnbd_disconnect_path", add.clone());
    let path = json!({"session": "h", "path": {"src": "10.0.0.102", "dst": "10.0.0.2"}});
    // The server refuses it until it has closed the path, too, and is asked again meanwhile.
    program.ok("bdev_rnbd_reconnect_path", path);
    let stats = program.ok("bdev_rnbd_get_path_stats", json!({"session": "h"}));
    assert_eq!(stats.as_array().unwrap().len(), 2, "{stats}");
    program.ok("bdev_rnbd_reset_path_stats", json!({}));
    program.ok("bdev_rnbd_remove_path", add);
    assert_eq!(program.ok("bdev_rnbd_resize", json!({"name": "d"})), 16384);
    assert_eq!(error("bdev_rnbd_remap", json!({"name": "d"})).0, -114);
    assert_eq!(error("bdev_rnbd_unmap", json!({"name": "x"})).0, -19);
    assert_eq!(program.ok("bdev_rnbd_unmap", json!({"name": "d"})), true);
    assert_eq!(program.ok("bdev_rnbd_get_sessions", json!({})), json!([]));
    until("the server has forgotten it", || target.paths().is_empty());
}
