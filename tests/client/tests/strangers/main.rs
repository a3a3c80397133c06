//! What strangers get of a target with default options, over soft-roce between addresses of the loopback device; the last
//! column of the table in docs/threat-model.md names tests of these.

mod defaults;
mod identity;
mod names;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use engine::app::{self, App, Options};
use engine::log::LogControl;
use reactor::{Handle, IdlePolicy};
use rnbd_proto::errno::Errno;
use rnbd_proto::wire::Flags;
use serde_json::{Value, json};
use test_client::outcome::ConnectError;
use test_client::rnbd::CallError;
use test_client::{Client, Opts, Outcome};
use test_support::{Dir, limit, patience, until, until_some};

/// A target in this process, on address 1 of a network of its own; its control socket.
struct Target {
    network: [u8; 3],
    dir: Dir,
    control: Handle,
    thread: Option<JoinHandle<Result<(), app::Error>>>,
}

/// A call of a configuration.
fn call(method: &str, params: Value) -> Value {
    json!({"method": method, "params": params})
}

fn malloc(name: &str) -> Value {
    call("bdev_malloc_create", json!({"name": name, "num_blocks": 2048, "block_size": 512}))
}

fn export(path: &str, bdev: &str, allow: Value) -> Value {
    call("rnbd_create_export", json!({"device_path": path, "bdev_name": bdev, "allow": allow}))
}

/// An entry of an allow list.
fn addr(address: IpAddr) -> Value {
    json!({"addr": address.to_string()})
}

fn listener(network: [u8; 3]) -> Value {
    let address = test_support::address(network, 1).to_string();
    call("rnbd_create_listener", json!({"traddr": address, "provider": "soft-roce"}))
}

impl Target {
    /// Carries these calls out, then listens.
    fn start(calls: impl FnOnce([u8; 3], &Dir) -> Vec<Value>) -> Self {
        let target = Self::start_with(|network, dir| {
            let mut calls = calls(network, dir);
            calls.push(listener(network));
            calls
        });
        target.rpc("framework_wait_init", Value::Null);
        target
    }

    /// Carries these calls out; returns at once.
    fn start_with(calls: impl FnOnce([u8; 3], &Dir) -> Vec<Value>) -> Self {
        let (network, dir) = (test_support::network(), Dir::new("strangers"));
        let mut calls = calls(network, &dir);
        // Small ones, for many sessions.
        calls.insert(0, call("rnbd_set_options", json!({"queue_depth": 16, "max_io_size": 61440})));
        let config = json!({"subsystems": [{"subsystem": "rnbd", "config": calls}]}).to_string();
        let config = rpc::Config::parse(config.into_bytes(), "test").unwrap();
        let rpc_socket = dir.join("rpc.sock");
        let (tx, rx) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let options = Options {
                program: rnbd_target::PROGRAM,
                subsystems: rnbd_target::subsystems(Vec::new()),
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
            app::run(options, |control| tx.send(control.clone()).unwrap())
        });
        let control = rx.recv().expect("the target starts");
        Self { network, dir, control, thread: Some(thread) }
    }

    /// Address `last` of its network; the target is 1.
    fn address(&self, last: u8) -> IpAddr {
        test_support::address(self.network, last).into()
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("rpc.sock")
    }

    fn try_rpc(&self, method: &str, params: Value) -> Result<Value, rpc::RpcError> {
        let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        assert!(!ended, "the target has ended");
        let mut client = until_some("its socket is there", || rpc::Client::connect(self.socket()).ok());
        client.set_timeout(Some(patience())).unwrap();
        client.call(method, params)
    }

    fn rpc(&self, method: &str, params: Value) -> Value {
        self.try_rpc(method, params).unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    /// Makes a call as a configuration names it.
    fn make(&self, call: Value) {
        self.rpc(call["method"].as_str().unwrap(), call["params"].clone());
    }

    /// A client at address `last`.
    fn opts(&self, name: &str, last: u8) -> Opts {
        Opts { src: Some(self.address(last)), timeout: patience(), ..Opts::new(name) }
    }

    fn try_connect(&self, opts: Opts) -> Result<Client, ConnectError> {
        let dst = SocketAddr::new(self.address(1), 1234);
        let client = Client::connect(soft_roce::open().unwrap(), dst, opts)?;
        Ok(client)
    }

    /// The first path of a session of this name from address `last`.
    fn connect(&self, name: &str, last: u8) -> Client {
        self.try_connect(self.opts(name, last)).unwrap()
    }

    /// What a new session of this name from address `last` gets when it opens `device`: 0 ro, 1 rw.
    fn open(&self, name: &str, last: u8, device: &str, mode: u8) -> Result<(), Errno> {
        let mut client = self.connect(name, last);
        let result = open(&mut client, device, mode).map(drop);
        client.disconnect();
        drop(client);
        // The next one may want the name.
        until("the session is gone", || !self.sessions().contains(&name.to_owned()));
        result
    }

    /// Names of the sessions.
    fn sessions(&self) -> Vec<String> {
        let rows = self.rpc("rnbd_get_sessions", json!({}));
        rows.as_array().unwrap().iter().map(|row| row["session"].as_str().unwrap().to_owned()).collect()
    }

    /// The row of a session in rnbd_get_sessions.
    fn session(&self, name: &str) -> Value {
        self.rpc("rnbd_get_sessions", json!({"session": name}))[0].clone()
    }

    fn options(&self) -> Value {
        let config = self.rpc("framework_get_config", json!({"name": "rnbd"}));
        config[0]["params"].clone()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        App::send(&self.control, |app, cx| app.shutdown(cx));
        let ended = thread.join();
        if !std::thread::panicking() {
            ended.expect("the target does not panic").expect("the target runs to its end");
        }
    }
}

/// Opens a device: its id, or the errno.
fn open(client: &mut Client, device: &str, mode: u8) -> Result<u32, Errno> {
    match client.open(device, mode) {
        Ok(opened) => Ok(opened.device_id.get()),
        Err(CallError::Outcome(Outcome::Errno(errno))) => Err(Errno::from_raw(errno.get().into()).unwrap()),
        Err(other) => panic!("OPEN of {device}: {other}"),
    }
}

/// Writes a block, and reads it.
fn use_disk(client: &mut Client, device: u32, byte: u8) {
    assert_eq!(client.write(device, 0, &[byte; 4096], Flags::empty()).unwrap(), Outcome::Ok);
    assert_eq!(client.read(device, 0, 4096).unwrap(), [byte; 4096]);
}

/// What becomes of a path that the server does not want.
fn turned_away(result: Result<Client, ConnectError>) {
    match result {
        Err(ConnectError::Rejected(_) | ConnectError::Closed) => {}
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("the path came up"),
    }
}

/// Long enough for what must not happen to show, if it happens at all.
fn a_moment() -> Duration {
    limit(1) / 4
}
