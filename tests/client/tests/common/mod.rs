//! A whole target in this process, on a loopback fabric.

// Each test program uses its part of this.
#![allow(dead_code)]

pub mod lazy;

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use bdev::{delay, malloc};
use engine::app::{self, App, Options};
use engine::log::LogControl;
use reactor::{Handle, IdlePolicy};
use serde_json::{Value, json};
use test_client::{Place, place};
use test_support::{Dir, limit, patience, until};
use verbs::Cm;
use verbs::loopback::Fabric;

/// After which paths that do not come up are closed: longer than one that comes up takes.
pub fn half_open() -> Duration {
    limit(2)
}

/// Latency of `slow`.
pub const DELAY: Duration = Duration::from_millis(120);
const MAX_SESSIONS: usize = 8;
const MAX_CONNECTIONS: usize = 160;

pub struct Target {
    pub fabric: Fabric,
    control: Handle,
    thread: Option<JoinHandle<()>>,
    rpc: Mutex<rpc::Client>,
    _dir: Dir,
}

impl Target {
    /// Starts a target with the devices of the table. `options` are added to `rnbd_set_options`.
    pub fn start(name: &str, options: &Value) -> Self {
        let fabric = Fabric::new();
        let dir = Dir::new(&format!("hostile-{name}"));
        let socket = dir.join("rpc.sock");
        let mut set = json!({
            // Not a power of two, so that ids beyond it can be said.
            "queue_depth": 24, "max_io_size": 61440, "max_hdr_size": 4096,
            "half_open_timeout_ms": half_open().as_millis() as u64,
            "max_sessions": MAX_SESSIONS, "max_paths": 150, "max_connections": MAX_CONNECTIONS,
            // One address plays all clients.
            "max_share_percent": 100,
        });
        for (k, v) in options.as_object().expect("options are an object") {
            set[k] = v.clone();
        }
        let config = json!({"subsystems": [{"subsystem": "rnbd", "config": [
            {"method": "rnbd_set_options", "params": set},
            {"method": "rnbd_create_listener",
             "params": {"adrfam": "ipv4", "traddr": "10.0.0.1", "trsvcid": "1234", "provider": "loopback"}},
        ]}]});
        let config =
            rpc::Config::parse(config.to_string().into_bytes(), "test").expect("a valid configuration");
        let (cm, path) = (fabric.cm(), socket.clone());
        let (tx, rx) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let options = Options {
                program: rnbd_target::PROGRAM,
                subsystems: rnbd_target::subsystems(vec![cm]),
                cpumask: "0x3".parse().expect("a valid mask"),
                rpc_socket: path,
                config: Some(config),
                wait_for_rpc: false,
                rpcs_allowed: None,
                ignore_init_errors: false,
                idle: IdlePolicy::Adaptive { spin: Duration::from_micros(20) },
                log: LogControl::detached(),
                on_ready: None,
                on_refusal: None,
            };
            let ran = app::run(options, |handle| tx.send(handle.clone()).expect("the test waits for it"));
            ran.expect("the target runs to its end");
        });
        let control = rx.recv().expect("the target starts");
        let rpc = rpc_when_listening(&socket);
        let target = Self { fabric, control, thread: Some(thread), rpc: Mutex::new(rpc), _dir: dir };
        target.make_devices();
        target
    }

    fn make_devices(&self) {
        let (tx, rx) = mpsc::channel();
        App::send(&self.control, move |app, _| {
            for (name, block_size) in [("m512", 512), ("m4k", 4096), ("slow-base", 512), ("witness", 512)] {
                let num_blocks = (8 << 20) / u64::from(block_size);
                let params = malloc::Params {
                    name: Some(name.into()),
                    num_blocks,
                    block_size,
                    physical_block_size: None,
                    uuid: None,
                };
                malloc::create(&app.manager, params).expect("a malloc bdev");
            }
            let us = DELAY.as_micros() as u64;
            let latencies = delay::Latencies { avg_read: us, p99_read: us, avg_write: us, p99_write: us };
            let params = delay::Params {
                name: "slow".into(),
                base_bdev_name: "slow-base".into(),
                uuid: None,
                latencies,
            };
            delay::create(&app.manager, params).expect("a delay bdev");
            tx.send(()).expect("the test waits for it");
        });
        rx.recv().expect("the control thread answers");
    }

    /// Adds a device of the test's own.
    pub fn register(&self, device: Arc<dyn bdev::Bdev>) {
        let (tx, rx) = mpsc::channel();
        App::send(&self.control, move |app, _| {
            tx.send(app.manager.register(device)).expect("the test waits for it");
        });
        rx.recv().expect("the control thread answers").expect("a good device");
    }

    /// Returns when every reactor has looked at all that had come before.
    pub fn reactors_have_turned(&self) {
        // A message is run before the pollers of its turn, so the second one comes after those of the first one's.
        for _ in 0..2 {
            let (tx, rx) = mpsc::channel();
            App::send(&self.control, move |app, _| {
                for reactor in &app.reactors {
                    let tx = tx.clone();
                    reactor.send(move |_| tx.send(()).expect("the test waits for it"));
                }
            });
            // Until the last sender is gone.
            while rx.recv().is_ok() {}
        }
    }

    pub fn call(&self, method: &str, params: Value) -> Value {
        let mut rpc = self.rpc.lock().expect("one user at a time");
        rpc.call(method, params).unwrap_or_else(|e| panic!("{method}: {e}"))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        App::send(&self.control, |app, cx| app.shutdown(cx));
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Err(_)) = ended
            && !std::thread::panicking()
        {
            panic!("the target panicked");
        }
    }
}

impl Place for Target {
    fn cm(&self) -> Result<Box<dyn Cm>, Box<dyn Error>> {
        Ok(self.fabric.try_cm()?)
    }
    fn dst(&self) -> SocketAddr {
        SocketAddr::new(Ipv4Addr::new(10, 0, 0, 1).into(), 1234)
    }
    fn src(&self, n: usize) -> Option<IpAddr> {
        Some(Ipv4Addr::new(10, 1, (n / 250) as u8, (n % 250 + 1) as u8).into())
    }
    fn src_count(&self) -> usize {
        1000
    }
    fn timeout(&self) -> Duration {
        patience()
    }
    fn half_open(&self) -> Duration {
        half_open()
    }
    fn delay(&self) -> Duration {
        DELAY
    }
    fn limits(&self) -> Option<(usize, usize)> {
        Some((MAX_SESSIONS, MAX_CONNECTIONS))
    }
    fn exact_windows(&self) -> bool {
        true
    }
    fn paths(&self) -> Result<Vec<String>, Box<dyn Error>> {
        Ok(place::session_of_each_path(&self.call("rnbd_get_sessions", Value::Null)))
    }
}

/// The last call of the configuration has been made.
fn rpc_when_listening(socket: &Path) -> rpc::Client {
    let mut rpc = rpc::Client::connect(socket).expect("the target listens on its socket");
    until(
        "the target listens",
        || matches!(rpc.call("rnbd_get_listeners", Value::Null), Ok(Value::Array(list)) if !list.is_empty()),
    );
    rpc
}

/// File descriptors of this process.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("Linux").count()
}
