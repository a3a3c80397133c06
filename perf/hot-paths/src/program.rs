//! A whole program in this process: one control thread, one reactor.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use engine::Subsystem;
use engine::app::{self, App, Options};
use engine::log::LogControl;
use reactor::{Handle, IdlePolicy};
use serde_json::{Value, json};

pub struct Program {
    pub control: Handle,
    /// Sleeps as soon as it has no work.
    pub reactor: Handle,
    dir: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Program {
    /// With null bdev "disk" and what `config` adds, a list of subsystems. `config` gets a directory for sockets.
    pub fn start(
        subsystems: fn() -> Vec<Box<dyn Subsystem>>,
        config: impl FnOnce(&Path) -> Vec<Value>,
    ) -> Self {
        let dir = std::env::temp_dir().join(format!("hot-paths-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("cannot create {}: {e}", dir.display()));
        let disk = json!({ "name": "disk", "num_blocks": 1 << 20, "block_size": 512 });
        let mut all = vec![json!({ "subsystem": "bdev", "config": [
            { "method": "bdev_null_create", "params": disk },
        ]})];
        all.extend(config(&dir));
        let text = json!({ "subsystems": all }).to_string();
        let rpc_socket = dir.join("rpc.sock");
        let (tx, rx) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let options = Options {
                program: "hot-paths",
                subsystems: subsystems(),
                cpumask: "0x1".parse().expect("a mask"),
                rpc_socket,
                config: Some(rpc::Config::parse(text.into_bytes(), "hot-paths").expect("JSON")),
                wait_for_rpc: false,
                rpcs_allowed: None,
                ignore_init_errors: false,
                idle: IdlePolicy::Adaptive { spin: Duration::ZERO },
                log: LogControl::detached(),
                on_ready: None,
                on_refusal: None,
            };
            let started = app::run(options, |control| tx.send(control.clone()).expect("somebody waits"));
            started.unwrap_or_else(|e| panic!("the program does not run: {e}"));
        });
        let control = rx.recv().expect("a start");
        let (tx, ready) = mpsc::channel();
        App::send(&control, move |app, _| {
            let reactor = app.reactors[0].clone();
            app.call("framework_wait_init", &Value::Null, move |_, _, result| {
                let _ = tx.send(result.map(|_| reactor));
            });
        });
        let reactor = test_support::recv(&ready).expect("it initialises");
        Self { control, reactor, dir, thread: Some(thread) }
    }

    /// Where its sockets are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Runs `f` on the control thread.
    pub fn on_app<R: Send + 'static>(&self, f: impl FnOnce(&mut App) -> R + Send + 'static) -> R {
        let (tx, rx) = mpsc::channel();
        App::send(&self.control, move |app, _| {
            let _ = tx.send(f(app));
        });
        test_support::recv(&rx)
    }

    /// Runs `f` on the reactor.
    pub fn on_reactor<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut reactor::Turn<'_>) -> R + Send + 'static,
    ) -> R {
        let (tx, rx) = mpsc::channel();
        self.reactor.send(move |cx| {
            let _ = tx.send(f(cx));
        });
        test_support::recv(&rx)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        App::send(&self.control, |app, cx| app.shutdown(cx));
        let ended = self.thread.take().map(JoinHandle::join);
        let _ = std::fs::remove_dir_all(&self.dir);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "the program panicked");
    }
}
