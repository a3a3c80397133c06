//! The NBD server in a whole program, with clients that do what no library would: leave in the middle, wait, flood.

mod any_range;
mod fair;
mod strangers;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use engine::log::LogControl;
use engine::{App, Error, Options};
use exports::nbd_server::NbdServer;
use nbd_proto::wire::{REQUEST_MAGIC, RequestHeader, SimpleReply, cmd, cmd_flag};
use reactor::{Handle, IdlePolicy};
use rpc::{Client as RpcClient, Config, RpcError};
use serde_json::{Value, json};
use test_support::{Dir, patience, until};
use zerocopy::{FromBytes, IntoBytes};

const EIO: u32 = 5;

struct Program {
    dir: Dir,
    control: Handle,
    thread: JoinHandle<Result<(), Error>>,
}

impl Program {
    /// Malloc disk "M0" of 1 MiB, "slow" over it, which takes `write_ms` for a write, and an export of that. `options`
    /// are those of the server.
    fn start(cpumask: &str, write_ms: u64, options: Value) -> Self {
        let dir = Dir::new("nbd-server");
        let config = config(dir.path(), write_ms * 1000, options);
        let cpumask = cpumask.parse().unwrap();
        let rpc_socket = dir.join("rpc.sock");
        let (tx, rx) = std::sync::mpsc::channel();
        let run = move || {
            let options = Options {
                program: "test",
                subsystems: vec![Box::new(NbdServer::default())],
                cpumask,
                rpc_socket,
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
        };
        let thread = std::thread::spawn(run);
        let Ok(control) = rx.recv() else { panic!("no start: {:?}", thread.join()) };
        let program = Self { dir, control, thread };
        program.call("framework_wait_init", Value::Null).unwrap();
        program
    }

    fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        RpcClient::connect(self.dir.join("rpc.sock")).unwrap().call(method, params)
    }

    /// A client whose export is "slow".
    fn client(&self) -> Client {
        let mut client = self.stranger();
        client.0.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04slow").unwrap();
        assert_eq!(&client.read(18), b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(client.read(10)[..8], (1_u64 << 20).to_be_bytes());
        client
    }

    /// A client that has not said anything.
    fn stranger(&self) -> Client {
        let client = Client(UnixStream::connect(self.dir.join("nbd.sock")).unwrap());
        client.0.set_read_timeout(Some(patience())).unwrap();
        client
    }

    /// Puts an error injecting layer between "slow" and its export.
    fn spoil(&self) {
        self.call("nbd_server_delete_export", json!({"name": "slow"})).unwrap();
        self.call("bdev_error_create", json!({"base_name": "slow"})).unwrap();
        let export = json!({"name": "slow", "bdev_name": "EE_slow"});
        assert_eq!(self.call("nbd_server_create_export", export), Ok(json!("slow")));
    }

    /// The next write ends like this.
    fn inject(&self, error_type: &str) {
        let inject = json!({"name": "EE_slow", "io_type": "write", "error_type": error_type, "num": 1});
        self.call("bdev_error_inject_error", inject).unwrap();
    }

    fn connections(&self) -> Vec<Value> {
        match self.call("nbd_server_get_connections", Value::Null).unwrap() {
            Value::Array(rows) => rows,
            other => panic!("{other}"),
        }
    }

    /// Waits until the server has taken as many writes, over all connections.
    fn wait_for_writes(&self, count: u64) {
        until(format_args!("{count} writes"), || {
            let all: u64 = self.connections().iter().map(|c| c["num_write_ops"].as_u64().unwrap()).sum();
            all >= count
        });
    }

    fn shut_down(&self) {
        App::send(&self.control, App::shutdown);
    }

    /// Waits for the end, which must be a good one.
    fn end(self) {
        self.thread.join().unwrap().unwrap();
        assert!(!self.dir.join("nbd.sock").exists());
    }
}

fn config(dir: &std::path::Path, write_us: u64, options: Value) -> Value {
    let call = |method: &str, params: Value| json!({"method": method, "params": params});
    json!({"subsystems": [
        {"subsystem": "bdev", "config": [
            call("bdev_malloc_create", json!({"name": "M0", "num_blocks": 2048, "block_size": 512})),
            call("bdev_delay_create", json!({
                "name": "slow", "base_bdev_name": "M0", "avg_read_latency": 0, "p99_read_latency": 0,
                "avg_write_latency": write_us, "p99_write_latency": write_us,
            })),
        ]},
        {"subsystem": "nbd_server", "config": [
            call("nbd_server_set_options", options),
            call("nbd_server_create_export", json!({"name": "slow", "bdev_name": "slow"})),
            call("nbd_server_add_listener", json!({"path": dir.join("nbd.sock")})),
        ]},
    ]})
}

struct Client(UnixStream);

impl Client {
    fn read(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        let header = RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            length: len.into(),
        };
        self.0.write_all(header.as_bytes()).unwrap();
    }

    fn write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        self.request(cmd::WRITE, 0, cookie, offset, data.len() as u32);
        self.0.write_all(data).unwrap();
    }

    /// Cookie and error of the next reply.
    fn reply(&mut self) -> (u64, u32) {
        let reply = SimpleReply::read_from_bytes(&self.read(16)).unwrap();
        assert_eq!(reply.magic.get(), 0x6744_6698);
        (reply.cookie.get(), reply.error.get())
    }

    fn read_at(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.request(cmd::READ, 0, 1, offset, len);
        assert_eq!(self.reply(), (1, 0));
        self.read(len as usize)
    }

    /// The server has closed.
    fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0))
    }
}

#[test]
fn a_shutdown_answers_what_is_in_flight() {
    let program = Program::start("0x1", 300, json!({}));
    let mut client = program.client();
    let idle = program.client();
    let haggling = program.stranger();
    (0..8).for_each(|n| client.write(n, n * 512, &[n as u8 + 1; 512]));
    program.wait_for_writes(8);
    program.shut_down();
    let mut replies: Vec<(u64, u32)> = (0..8).map(|_| client.reply()).collect();
    replies.sort_unstable();
    assert_eq!(replies, (0..8).map(|n| (n, 0)).collect::<Vec<_>>());
    assert!(client.is_closed());
    program.end();
    drop((idle, haggling));
}

#[test]
fn deleting_an_export_waits_for_its_requests() {
    let program = Program::start("0x1", 300, json!({}));
    let mut client = program.client();
    client.write(7, 0, &[1; 512]);
    program.wait_for_writes(1);
    assert_eq!(program.call("nbd_server_delete_export", json!({"name": "slow"})), Ok(json!(true)));
    // Nobody has the bdev open any more, and the write was answered before.
    assert_eq!(program.connections(), Vec::<Value>::new());
    client.0.set_nonblocking(true).unwrap();
    assert_eq!(client.reply(), (7, 0));
    assert!(client.is_closed());
    assert_eq!(program.call("bdev_delay_delete", json!({"name": "slow"})), Ok(json!(true)));
    program.shut_down();
    program.end();
}

#[test]
fn disconnecting_answers_when_the_connection_is_gone() {
    let program = Program::start("0x1", 200, json!({}));
    let (mut one, mut other) = (program.client(), program.client());
    one.write(7, 0, &[1; 512]);
    program.wait_for_writes(1);
    let busy = program.connections().into_iter().find(|c| c["num_write_ops"] == 1).unwrap();
    assert_eq!(program.call("nbd_server_disconnect", json!({"id": busy["id"]})), Ok(json!(true)));
    assert_eq!((one.reply(), one.is_closed()), ((7, 0), true));
    assert_eq!(other.read_at(0, 512), [1; 512]);
    assert_eq!(program.connections().len(), 1);
    program.shut_down();
    assert!(other.is_closed());
    program.end();
}

/// A client that lost its connection repeats its requests on another one, and goes on from there.
#[test]
fn nothing_overtakes_the_requests_of_a_broken_connection() {
    for cpumask in ["0x1", "0x3"] {
        let program = Program::start(cpumask, 0, json!({}));
        program.spoil();
        let (mut broken, mut other) = (program.client(), program.client());
        program.inject("pending");
        broken.write(1, 0, &[0xaa; 512]);
        program.wait_for_writes(1);
        drop(broken);
        // The connection itself stays until its request is done.
        until("the client is missed", || program.connections().iter().any(|c| c["state"] == "lost"));
        assert_eq!(program.connections().len(), 2);
        // A read takes no time, but must find what the write leaves.
        other.request(cmd::READ, 0, 1, 0, 512);
        other.0.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(other.0.read(&mut [0]).is_err(), "{cpumask}: the read overtakes the write");
        other.0.set_read_timeout(Some(patience())).unwrap();
        program.call("bdev_error_resume_pending", json!({"name": "EE_slow"})).unwrap();
        assert_eq!(other.reply(), (1, 0));
        assert_eq!(other.read(512), [0xaa; 512], "{cpumask}");
        assert_eq!(program.client().read_at(0, 512), [0xaa; 512]);
        program.shut_down();
        program.end();
    }
}

#[test]
fn errors_of_the_device_reach_the_client_and_are_counted() {
    let program = Program::start("0x1", 0, json!({}));
    program.spoil();
    let mut client = program.client();
    program.inject("failure");
    client.write(1, 0, &[1; 512]);
    assert_eq!(client.reply(), (1, EIO));
    client.write(2, 0, &[2; 512]);
    assert_eq!(client.reply(), (2, 0));
    assert_eq!(program.connections()[0]["num_errors"], 1);
    program.shut_down();
    program.end();
}

#[test]
fn a_device_that_never_answers_does_not_keep_the_program() {
    let program = Program::start("0x1", 0, json!({}));
    program.spoil();
    let mut client = program.client();
    program.inject("pending");
    client.write(1, 0, &[1; 512]);
    program.wait_for_writes(1);
    program.shut_down();
    // Nothing ends it, so there is nothing to wait for.
    std::thread::sleep(Duration::from_millis(100));
    assert!(!program.thread.is_finished(), "it waits for the write");
    // As a second signal does.
    program.shut_down();
    program.end();
    assert!(client.is_closed());
}

#[test]
fn trim_and_zeroes_with_fua() {
    let program = Program::start("0x1", 1, json!({}));
    let mut client = program.client();
    client.write(1, 0, &[9; 16384]);
    assert_eq!(client.reply(), (1, 0));
    client.request(cmd::TRIM, cmd_flag::FUA, 2, 0, 4096);
    assert_eq!(client.reply(), (2, 0));
    client.request(cmd::WRITE_ZEROES, cmd_flag::FUA | cmd_flag::NO_HOLE, 3, 4096, 4096);
    assert_eq!(client.reply(), (3, 0));
    client.request(cmd::FLUSH, 0, 4, 0, 0);
    assert_eq!(client.reply(), (4, 0));
    assert_eq!(client.read_at(4096, 8192), [vec![0; 4096], vec![9; 4096]].concat());
    client.request(cmd::DISC, 0, 0, 0, 0);
    assert!(client.is_closed());
    until("no connection", || program.connections().is_empty());
    program.shut_down();
    program.end();
}

#[test]
fn connections_spread_over_reactors_and_have_a_limit() {
    let program = Program::start("0x3", 0, json!({"max_connections": 4}));
    let mut clients: Vec<Client> = (0..4).map(|_| program.client()).collect();
    until("four connections", || program.connections().len() == 4);
    let reactor = |c: &Value| c["reactor"].as_str().unwrap().to_owned();
    let mut reactors: Vec<String> = program.connections().iter().map(reactor).collect();
    reactors.sort();
    assert_eq!(reactors, ["reactor_0", "reactor_0", "reactor_1", "reactor_1"]);
    assert!(program.stranger().is_closed(), "a fifth one");
    for (n, client) in (0..).zip(&mut clients) {
        client.write(n, n * 4096, &[n as u8; 4096]);
        assert_eq!(client.reply(), (n, 0));
    }
    assert_eq!(clients[0].read_at(3 * 4096, 4096), [3; 4096]);
    drop(clients.pop());
    until("three connections", || program.connections().len() == 3);
    assert_eq!(program.client().read_at(0, 512), [0; 512]);
    program.shut_down();
    program.end();
}

#[test]
fn the_saved_configuration_makes_the_same_server() {
    let program = Program::start("0x1", 0, json!({"handshake_timeout_ms": 300}));
    let saved = program.call("framework_get_config", json!({"name": "nbd_server"})).unwrap();
    let path = program.dir.join("nbd.sock");
    let options = json!({"max_connections": 1024, "max_handshakes": 64, "handshake_timeout_ms": 300,
        "stall_timeout_ms": 30_000, "min_progress_kib": 1024, "progress_time_ms": 10_000});
    let right = json!([
        {"method": "nbd_server_set_options", "params": options},
        {"method": "nbd_server_create_export", "params": {"name": "slow", "bdev_name": "slow", "read_only": false}},
        {"method": "nbd_server_add_listener", "params": {"path": path, "dialect": "auto"}},
    ]);
    assert_eq!(saved, right);
    // And the options are in force.
    let mut silent = program.stranger();
    silent.read(18);
    assert!(silent.is_closed());
    program.shut_down();
    program.end();
}
