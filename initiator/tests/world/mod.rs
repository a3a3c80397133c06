//! Targets and initiators in this process, on a loopback fabric or over soft-roce.
#![allow(dead_code, reason = "every test binary uses its own part")]

pub mod load;

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bdev::Manager;
use engine::app::{self, App, Options};
use engine::log::LogControl;
use iobuf::Registry;
use reactor::{Handle, IdlePolicy, Reactor, Team};
use rnbd_initiator::bdev::{DeviceInfo, MapError, MapParams, Maps, PathParam, State};
use rnbd_target::rnbd::{Rnbd, RnbdState};
use rpc::RpcError;
use rtrs_poll::client::Reconnect;
use serde_json::{Value, json};
pub use test_support::until;
use test_support::{Dir, patience, recv};
use verbs::Cm;
use verbs::loopback::Fabric;

/// How targets and initiators reach each other.
#[derive(Clone)]
pub enum Net {
    Loopback(Fabric),
    /// Over UDP between addresses of this network.
    SoftRoce([u8; 3]),
}

impl Net {
    pub fn loopback() -> Self {
        Self::Loopback(Fabric::new())
    }

    pub fn soft_roce() -> Self {
        Self::SoftRoce(test_support::network())
    }

    pub fn provider(&self) -> &'static str {
        match self {
            Self::Loopback(_) => "loopback",
            Self::SoftRoce(_) => "soft-roce",
        }
    }

    fn cms(&self) -> Vec<Box<dyn Cm>> {
        match self {
            Self::Loopback(fabric) => vec![fabric.cm()],
            Self::SoftRoce(_) => Vec::new(),
        }
    }

    /// The `n`th address of the server, or of the client.
    pub fn address(&self, server: bool, n: u8) -> IpAddr {
        let last = if server { 1 + n } else { 101 + n };
        match self {
            Self::Loopback(_) => [10, 0, 0, last].into(),
            Self::SoftRoce(network) => test_support::address(*network, last).into(),
        }
    }

    /// The `n`th path.
    pub fn path(&self, n: u8) -> PathParam {
        PathParam { src: Some(self.address(false, n)), dst: self.address(true, n), port: None }
    }
}

/// A directory on a disk, where direct I/O works.
pub fn disk_dir() -> Dir {
    Dir::new_in(Path::new(env!("CARGO_TARGET_TMPDIR")), "rnbd")
}

pub fn malloc(name: &str, block_size: u32) -> Value {
    let num_blocks = (8 << 20) / block_size;
    json!({"method": "bdev_malloc_create",
        "params": {"name": name, "num_blocks": num_blocks, "block_size": block_size}})
}

pub fn uring(name: &str, file: &Path) -> Value {
    json!({"method": "bdev_uring_create", "params": {"name": name, "filename": file, "block_size": 512}})
}

pub fn null(name: &str, num_blocks: u64, block_size: u32) -> Value {
    json!({"method": "bdev_null_create",
        "params": {"name": name, "num_blocks": num_blocks, "block_size": block_size}})
}

/// An rnbd-target in a thread.
pub struct Target {
    pub control: Handle,
    thread: Option<JoinHandle<()>>,
    _dir: Dir,
}

impl Target {
    /// With `bdevs`, all of them exported by their names, listening on two addresses; `options`: of rnbd_set_options.
    pub fn start(net: &Net, bdevs: &[Value], options: Value) -> Self {
        let listener = |n| {
            let traddr = net.address(true, n).to_string();
            json!({"method": "rnbd_create_listener", "params": {"traddr": traddr, "provider": net.provider()}})
        };
        let export = |bdev: &Value| {
            let params = &bdev["params"];
            // That of an error bdev is made of its base's.
            let name = params["name"].as_str().map(str::to_owned);
            let name = name.unwrap_or_else(|| format!("EE_{}", params["base_name"].as_str().unwrap()));
            json!({"method": "rnbd_create_export", "params": {"device_path": name, "bdev_name": name}})
        };
        let mut rnbd = vec![json!({"method": "rnbd_set_options", "params": options})];
        rnbd.extend(bdevs.iter().map(export));
        rnbd.extend([listener(0), listener(1)]);
        let config = json!({"subsystems": [
            {"subsystem": "bdev", "config": bdevs},
            {"subsystem": "rnbd", "config": rnbd},
        ]});
        let config = rpc::Config::parse(config.to_string().into_bytes(), "test").unwrap();
        let (tx, rx) = mpsc::channel();
        let dir = Dir::new("rnbd-target");
        let (rpc_socket, net) = (dir.join("t"), net.clone());
        let thread = std::thread::spawn(move || {
            let options = Options {
                program: rnbd_target::PROGRAM,
                subsystems: vec![Box::new(Rnbd::new(net.cms()))],
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
        let control = rx.recv().unwrap();
        let target = Self { control, thread: Some(thread), _dir: dir };
        target.call("framework_wait_init", Value::Null).unwrap();
        target
    }

    pub fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        call(&self.control, method, params)
    }

    /// Paths of all sessions: session, name.
    pub fn paths(&self) -> Vec<(String, String)> {
        let rows = self.call("rnbd_get_path_stats", json!({})).unwrap();
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        rows.as_array().unwrap().iter().map(|r| (text(&r["session"]), text(&r["path"]))).collect()
    }

    /// Disconnects every path that has `part` in its name.
    pub fn disconnect(&self, part: &str) -> usize {
        let paths = self.paths();
        let chosen: Vec<_> = paths.into_iter().filter(|(_, path)| path.contains(part)).collect();
        for (session, path) in &chosen {
            // It may be going already.
            let _ = self.call("rnbd_disconnect_path", json!({"session": session, "path": path}));
        }
        chosen.len()
    }

    /// Ends it as an operator does.
    pub fn stop(mut self) {
        App::send(&self.control, |app, cx| app.shutdown(cx));
        self.thread.take().unwrap().join().unwrap();
    }

    /// Requests are never answered again, and connections end without notice: as near to a killed process as a thread
    /// can come.
    pub fn kill(mut self) {
        App::send(&self.control, |app, cx| {
            let server = app.state::<RnbdState>().and_then(|s| s.borrow().server.clone());
            if let Some(server) = server {
                server.borrow_mut().abort(cx);
            }
            cx.handle().stop();
        });
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        App::send(&self.control, |app, cx| app.shutdown(cx));
        if thread.join().is_err() && !std::thread::panicking() {
            panic!("the target panicked");
        }
    }
}

/// Calls a method of a program in this process.
pub fn call(control: &Handle, method: &str, params: Value) -> Result<Value, RpcError> {
    let (tx, rx) = mpsc::channel();
    let method = method.to_owned();
    App::send(control, move |app, _| {
        app.call(&method, &params, move |_, _, result| tx.send(result).unwrap());
    });
    recv(&rx)
}

/// bdev_rnbd on a control thread and reactors of its own, without a program around it.
pub struct Initiator {
    pub manager: Arc<Manager>,
    pub control: Handle,
    pub reactors: Vec<Handle>,
    pub net: Net,
    thread: Option<JoinHandle<()>>,
}

impl Initiator {
    pub fn new(net: &Net) -> Self {
        Self::with(net, Manager::new(Registry::new()))
    }

    pub fn with(net: &Net, manager: Arc<Manager>) -> Self {
        let (tx, rx) = mpsc::channel();
        let (m, n) = (manager.clone(), net.clone());
        let thread = std::thread::spawn(move || {
            let mut control =
                Reactor::new("control", None, IdlePolicy::Adaptive { spin: Duration::ZERO }).unwrap();
            let cores = if std::thread::available_parallelism().is_ok_and(|n| n.get() > 1) {
                &[0, 1][..]
            } else {
                &[0]
            };
            let team = Team::start(cores, IdlePolicy::Adaptive { spin: Duration::from_micros(20) }).unwrap();
            control.setup(|cx| Maps::install(cx, m, team.handles(), n.cms()).unwrap());
            tx.send((control.handle(), team.handles().to_vec())).unwrap();
            control.run();
            drop(team);
        });
        let (control, reactors) = rx.recv().unwrap();
        Self { manager, control, reactors, net: net.clone(), thread: Some(thread) }
    }

    /// Runs `f` on the control thread.
    pub fn run<R: Send + 'static>(&self, f: impl FnOnce(&mut Maps) -> R + Send + 'static) -> R {
        let (tx, rx) = mpsc::channel();
        Maps::send(&self.control, move |m, _| tx.send(f(m)).unwrap());
        recv(&rx)
    }

    /// Short delays, one path.
    pub fn params(&self, name: &str, device_path: &str) -> MapParams {
        let mut p = MapParams::new(name, "host1", device_path, vec![self.net.path(0)]);
        p.session.provider = self.net.provider().into();
        p.session.reconnect = Reconnect { delay: Duration::from_millis(50), max_attempts: None };
        p.session.connect_timeout = patience();
        p.resize_check = None;
        p
    }

    pub fn map(&self, params: MapParams) -> Result<String, MapError> {
        recv(&self.start_map(params))
    }

    pub fn start_map(&self, params: MapParams) -> mpsc::Receiver<Result<String, MapError>> {
        let (tx, rx) = mpsc::channel();
        Maps::send(&self.control, move |m, cx| m.map(cx, params, Box::new(move |r| tx.send(r).unwrap())));
        rx
    }

    pub fn unmap(&self, name: &str, force: bool) -> Result<(), MapError> {
        let (name, (tx, rx)) = (name.to_owned(), mpsc::channel());
        Maps::send(&self.control, move |m, cx| {
            m.unmap(cx, &name, force, Box::new(move |r| tx.send(r).unwrap()));
        });
        recv(&rx)
    }

    pub fn remap(&self, name: &str) -> Result<String, MapError> {
        let (name, (tx, rx)) = (name.to_owned(), mpsc::channel());
        Maps::send(&self.control, move |m, cx| m.remap(cx, &name, Box::new(move |r| tx.send(r).unwrap())));
        recv(&rx)
    }

    pub fn resize(&self, name: &str, blocks: Option<u64>) -> Result<u64, MapError> {
        let (name, (tx, rx)) = (name.to_owned(), mpsc::channel());
        Maps::send(&self.control, move |m, cx| {
            m.resize(cx, &name, blocks, Box::new(move |r| tx.send(r).unwrap()));
        });
        recv(&rx)
    }

    pub fn device(&self, name: &str) -> DeviceInfo {
        let name = name.to_owned();
        self.run(move |m| m.devices(Some(&name)).pop()).expect("mapped")
    }

    pub fn wait_state(&self, name: &str, state: State) {
        until(format_args!("{name} is {}", state.name()), || self.device(name).state == state);
    }

    /// Names of all sessions.
    pub fn sessions(&self) -> Vec<String> {
        self.run(|m| m.sessions(Instant::now(), None).into_iter().map(|s| s.name).collect())
    }
}

impl Drop for Initiator {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        Maps::send(&self.control, |m, cx| m.shutdown(cx, |cx| cx.handle().stop()));
        if thread.join().is_err() && !std::thread::panicking() {
            panic!("the initiator panicked");
        }
    }
}
