//! A whole target in this process, and loads for it.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::app::{self, App, Options};
use engine::log::LogControl;
use perf::load::{self, LoadError, LoadOptions, Pattern, Report};
use reactor::{Handle, IdlePolicy};
use rnbd_target::rnbd::{RnbdState, Server};
use rtrs_poll::client::{PathSpec, Reconnect, SessionOptions};
use serde_json::{Value, json};
use test_support::{Dir, until};
use verbs::Cm;
use verbs::loopback::Fabric;

/// How target and load reach each other.
pub struct Net {
    /// Of the target.
    pub server: Box<dyn Cm>,
    /// Those of the loads.
    pub client: Box<dyn Fn() -> Box<dyn Cm>>,
    pub provider: &'static str,
    pub server_ip: IpAddr,
    pub client_ip: IpAddr,
}

impl Net {
    pub fn loopback() -> Self {
        let fabric = Fabric::new();
        let (server_ip, client_ip) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        Self {
            server: fabric.cm(),
            client: Box::new(move || fabric.cm()),
            provider: "loopback",
            server_ip,
            client_ip,
        }
    }
}

pub struct Target {
    client: Box<dyn Fn() -> Box<dyn Cm>>,
    provider: &'static str,
    addresses: (IpAddr, IpAddr),
    pub control: Handle,
    thread: Option<JoinHandle<()>>,
    _dir: Dir,
}

impl Target {
    /// A target on a loopback fabric, see [`Target::start_on`].
    pub fn start(options: &Value) -> Self {
        Self::start_on(Net::loopback(), options)
    }

    /// A target with the 8 MiB devices `m512` and `m4k`, named after their blocks, and `EE_flaky`, whose requests can be made
    /// to fail.
    pub fn start_on(net: Net, options: &Value) -> Self {
        let config = json!({"subsystems": [
            {"subsystem": "bdev", "config": [
                {"method": "bdev_malloc_create", "params": {"name": "m512", "num_blocks": 16384, "block_size": 512}},
                {"method": "bdev_malloc_create", "params": {"name": "m4k", "num_blocks": 2048, "block_size": 4096}},
                {"method": "bdev_malloc_create", "params": {"name": "flaky", "num_blocks": 2048, "block_size": 4096}},
                {"method": "bdev_error_create", "params": {"base_name": "flaky"}},
            ]},
            {"subsystem": "rnbd", "config": [
                {"method": "rnbd_set_options", "params": options},
                {"method": "rnbd_create_export", "params": {"device_path": "m512", "bdev_name": "m512"}},
                {"method": "rnbd_create_export", "params": {"device_path": "m4k", "bdev_name": "m4k"}},
                {"method": "rnbd_create_export", "params": {"device_path": "EE_flaky", "bdev_name": "EE_flaky"}},
                {"method": "rnbd_create_listener",
                 "params": {"traddr": net.server_ip.to_string(), "trsvcid": "1234", "provider": net.provider}},
            ]},
        ]});
        let target = Self::serve(net, &config);
        target.wait_for_listener();
        target
    }

    /// A target with this configuration.
    pub fn serve(net: Net, config: &Value) -> Self {
        let dir = Dir::new("load");
        let rpc_socket = dir.join("rpc.sock");
        let config = rpc::Config::parse(config.to_string().into_bytes(), "test").expect("valid");
        let (cm, (tx, rx)) = (net.server, mpsc::channel());
        let thread = std::thread::spawn(move || {
            let options = Options {
                program: rnbd_target::PROGRAM,
                subsystems: rnbd_target::subsystems(vec![cm]),
                cpumask: "0x1".parse().expect("valid"),
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
            app::run(options, |handle| tx.send(handle.clone()).expect("the test waits for it"))
                .expect("the target runs to its end");
        });
        let control = rx.recv().expect("the target starts");
        let (provider, addresses) = (net.provider, (net.server_ip, net.client_ip));
        Self { client: net.client, provider, addresses, control, thread: Some(thread), _dir: dir }
    }

    pub fn app<R: Send + 'static>(&self, f: impl FnOnce(&mut App) -> R + Send + 'static) -> R {
        let (tx, rx) = mpsc::channel();
        App::send(&self.control, move |app, _| tx.send(f(app)).expect("the test waits for it"));
        rx.recv().expect("the control thread answers")
    }

    fn wait_for_listener(&self) {
        let listening = |app: &mut App| server(app).is_some_and(|s| !s.borrow().listeners().is_empty());
        until("a listener", || self.app(listening));
    }

    pub fn sessions(&self) -> usize {
        self.app(|app| server(app).map_or(0, |s| s.borrow().sessions(Instant::now()).len()))
    }

    /// The server hears of a disconnect a little later than the client says it.
    pub fn no_sessions(&self) {
        until("the session is ended in order", || self.sessions() == 0);
    }

    /// Waits until a load is at work.
    pub fn at_work(&self) {
        until("requests", || {
            self.app(|app| {
                let sessions = server(app).map_or(Vec::new(), |s| s.borrow().sessions(Instant::now()));
                sessions.iter().flat_map(|s| &s.paths).any(|p| p.stats.rd_cnt + p.stats.wr_cnt > 200)
            })
        });
    }

    /// A connection manager for a load.
    pub fn cm(&self) -> Box<dyn Cm> {
        (self.client)()
    }

    pub fn load(&self, mut options: LoadOptions) -> Result<Report, LoadError> {
        let path = &mut options.session.paths[0];
        path.dst.set_ip(self.addresses.0);
        path.src = Some(self.addresses.1);
        path.providers = vec![self.provider.into()];
        load::run(options, self.cm(), |_| ())
    }
}

/// Its RTRS server, once it is initialised.
pub fn server(app: &App) -> Option<Rc<RefCell<Server>>> {
    app.state::<RnbdState>()?.borrow().server.clone()
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

pub fn options(pattern: Pattern, device: &str) -> LoadOptions {
    let dst = "10.0.0.1:1234".parse().expect("valid");
    let path = PathSpec::new("loopback", dst).from("10.0.0.2".parse().expect("valid"));
    let reconnect = Reconnect { max_attempts: Some(0), ..Reconnect::default() };
    let session = SessionOptions { reconnect, ..SessionOptions::new("load", vec![path]) };
    LoadOptions {
        session,
        device: device.into(),
        pattern,
        read_percent: 50,
        block_size: 4096,
        queue_depth: 16,
        time: Duration::from_millis(200),
        warm_up: Duration::from_millis(20),
        size: 0,
        seed: 1,
        cores: vec![0],
        idle: IdlePolicy::Adaptive { spin: Duration::from_micros(20) },
    }
}
