//! A whole program in a thread, with a temporary directory for its socket and files.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use engine::app::{self, Options};
use engine::log::LogControl;
use reactor::{Handle, IdlePolicy};
use rpc::{Client, Config, RpcError};
use serde_json::{Value, json};
use verbs::loopback::Fabric;

/// The program.
pub struct Target {
    dir: Dir,
    thread: JoinHandle<Result<(), app::Error>>,
    /// Its control thread.
    pub control: Handle,
}

/// A directory that goes away with its last clone.
pub type Dir = Arc<test_support::Dir>;

/// A fresh directory.
pub fn dir() -> Dir {
    Arc::new(test_support::Dir::new("rnbd-rpc-test"))
}

impl Target {
    /// With the calls of a configuration's bdev part.
    pub fn start(calls: &[Value]) -> Self {
        let config = json!({"subsystems": [{"subsystem": "bdev", "config": calls}]});
        Self::start_in(dir(), &config.to_string(), false)
    }

    /// In state start-up.
    pub fn start_waiting() -> Self {
        Self::start_in(dir(), r#"{"subsystems": []}"#, true)
    }

    /// With a configuration, in a directory that may hold files for it.
    pub fn start_in(dir: Dir, config: &str, wait_for_rpc: bool) -> Self {
        let config = Config::parse(config.as_bytes().to_vec(), "test").unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        let rpc_socket = dir.join("rpc.sock");
        let run = move || {
            let options = Options {
                program: rnbd_target::PROGRAM,
                subsystems: rnbd_target::subsystems(vec![Fabric::new().cm()]),
                cpumask: "0x1".parse().unwrap(),
                rpc_socket,
                config: Some(config),
                wait_for_rpc,
                rpcs_allowed: None,
                ignore_init_errors: false,
                idle: IdlePolicy::Adaptive { spin: Duration::from_micros(100) },
                log: LogControl::detached(),
                on_ready: None,
                on_refusal: None,
            };
            app::run(options, |control| tx.send(control.clone()).unwrap())
        };
        let thread = std::thread::Builder::new().name("control".into()).spawn(run).unwrap();
        let Ok(control) = rx.recv() else { panic!("no start: {:?}", thread.join()) };
        let target = Self { dir, thread, control };
        if !wait_for_rpc {
            target.call("framework_wait_init", Value::Null).unwrap_or_else(|e| panic!("{e}"));
        }
        target
    }

    /// A connection of its own.
    pub fn client(&self) -> Client {
        Client::connect(self.dir.join("rpc.sock")).unwrap()
    }

    /// One call.
    pub fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        self.client().call(method, params)
    }

    /// A file of zeroes.
    pub fn file(&self, name: &str, len: u64) -> PathBuf {
        self.dir.file(name, len)
    }

    /// Ends it as an operator would, which must succeed; its directory.
    pub fn stop(self) -> Dir {
        let killed = self.call("spdk_kill_instance", json!({"sig_name": "SIGTERM"})).unwrap();
        assert_eq!(killed, true);
        self.thread.join().unwrap().unwrap();
        assert!(!self.dir.join("rpc.sock").exists(), "the socket is left behind");
        self.dir
    }
}
