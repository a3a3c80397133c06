//! A program with few descriptors, and strangers who want them all.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use engine::Options;
use engine::log::LogControl;
use exports::nbd_server::NbdServer;
use exports::vhost::Vhost;
use nbd_proto::wire::{REQUEST_MAGIC, RequestHeader, cmd};
use reactor::IdlePolicy;
use rpc::{Client as RpcClient, Config, RpcError};
use rustix::event::{EventfdFlags, eventfd};
use serde_json::{Value, json};
use test_support::{Dir, patience, until, until_some};
use vhost::vhost_user::message::FrontendReq as R;
use vhost_driver::{Disk, FrontEnd, Options as Guest};
use zerocopy::IntoBytes;

/// Where the program under test finds its directory.
const CHILD: &str = "DESCRIPTORS_TEST_DIR";

/// The program under test, if this is its process.
#[test]
#[ignore = "run by the test below, in a process with few descriptors"]
fn child() {
    let Some(dir) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let malloc = |name: &str| json!({"method": "bdev_malloc_create", "params": {"name": name, "num_blocks": 8192, "block_size": 512}});
    let controller = |ctrlr: &str, bdev: &str| json!({"method": "vhost_create_blk_controller", "params": {"ctrlr": ctrlr, "dev_name": bdev}});
    let config = json!({"subsystems": [
        {"subsystem": "bdev", "config": [malloc("M0"), malloc("M1"), malloc("M2")]},
        {"subsystem": "nbd_server", "config": [
            {"method": "nbd_server_create_export", "params": {"name": "big", "bdev_name": "M0"}},
            {"method": "nbd_server_add_listener", "params": {"traddr": "127.0.0.1", "trsvcid": "0"}},
        ]},
        {"subsystem": "vhost_blk", "config": [
            {"method": "vhost_set_options", "params": {"socket_dir": dir}}, controller("c0", "M1"), controller("c1", "M2"),
        ]},
    ]});
    let options = Options {
        program: "test",
        subsystems: vec![Box::new(NbdServer::default()), Box::new(Vhost::default())],
        cpumask: "0x1".parse().unwrap(),
        rpc_socket: dir.join("rpc.sock"),
        config: Some(Config::parse(config.to_string().into_bytes(), "test").unwrap()),
        wait_for_rpc: false,
        rpcs_allowed: None,
        ignore_init_errors: false,
        idle: IdlePolicy::Adaptive { spin: Duration::from_micros(20) },
        log: LogControl::detached(),
        on_ready: None,
        on_refusal: None,
    };
    engine::app::run(options, |_| {}).unwrap();
}

struct Program {
    dir: Dir,
    child: Child,
    port: u16,
}

impl Program {
    /// With `limit` descriptors and no more.
    fn start(limit: usize) -> Self {
        let dir = Dir::new("descriptors");
        let child = Command::new("sh")
            .args(["-c", &format!("ulimit -n {limit} && exec \"$0\" \"$@\"")])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored"])
            .env(CHILD, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut program = Self { dir, child, port: 0 };
        until("it is ready", || program.call("framework_wait_init", Value::Null).is_ok());
        let listeners = program.call("nbd_server_get_listeners", Value::Null).unwrap();
        program.port = listeners[0]["trsvcid"].as_str().unwrap().parse().unwrap();
        program
    }

    fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        RpcClient::connect(self.dir.join("rpc.sock"))?.call(method, params)
    }

    /// Descriptors that it has open.
    fn open(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection from 127.0.0.`host`.
fn connect(port: u16, host: u8) -> TcpStream {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
    let socket = socket.unwrap();
    rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::new(127, 0, 0, host), 0))).unwrap();
    rustix::net::connect(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, port))).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(patience())).unwrap();
    stream
}

/// The same with the export; `None` if the server does not want it.
fn client(port: u16, host: u8) -> Option<TcpStream> {
    let mut stream = connect(port, host);
    let chosen = stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03big");
    let mut hello = [0; 28];
    chosen.and_then(|()| stream.read_exact(&mut hello)).ok()?;
    let mut answer = [0; 16 + 512];
    ask(&mut stream, cmd::READ).and_then(|()| stream.read_exact(&mut answer)).ok()?;
    Some(stream)
}

fn ask(stream: &mut TcpStream, command: u16) -> std::io::Result<()> {
    let header = RequestHeader {
        magic: REQUEST_MAGIC.into(),
        flags: 0.into(),
        command: command.into(),
        cookie: 1.into(),
        offset: 0.into(),
        length: 512.into(),
    };
    stream.write_all(header.as_bytes())
}

fn verify(stream: &mut TcpStream, seed: u8) {
    ask(stream, cmd::WRITE).and_then(|()| stream.write_all(&[seed; 512])).unwrap();
    let mut answer = [0; 16 + 512];
    stream.read_exact(&mut answer[..16]).unwrap();
    assert_eq!(answer[4..8], [0; 4]);
    ask(stream, cmd::READ).and_then(|()| stream.read_exact(&mut answer)).unwrap();
    assert!(answer[4..8] == [0; 4] && answer[16..].iter().all(|b| *b == seed));
}

/// Takes what the controller at `path` gives.
fn hoard(path: &Path, fronts: &mut Vec<FrontEnd>, idle: &mut Vec<UnixStream>) {
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    idle.push(UnixStream::connect(path).unwrap());
    let Ok(front) = FrontEnd::connect(path) else { return };
    for index in 0..30u64 {
        for what in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
            // Refused at some time, and then the connection is closed.
            let _ = front.send(what, &index.to_ne_bytes(), &[event.as_fd()]);
        }
    }
    fronts.push(front);
}

fn strangers_fill(limit: usize) {
    let program = Program::start(limit);
    let at_rest = program.open();
    // Somebody whom it knows, with a connection and a guest.
    let mut kept = client(program.port, 5).unwrap();
    let guest = || Disk::connect(&program.dir.join("c1"), Guest { queues: 1, ..Guest::default() });
    let mut disk = guest().unwrap();
    let (mut crowd, mut silent, mut fronts, mut idle) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut slowest, mut most_open) = (Duration::ZERO, 0);
    for round in 0..40u8 {
        for n in 0..20 {
            // Of one address, and of one after the other.
            crowd.extend(
                [client(program.port, 9), client(program.port, 20 + round.wrapping_mul(20) % 200 + n)]
                    .into_iter()
                    .flatten(),
            );
            silent.extend([connect(program.port, 9), connect(program.port, 220)]);
        }
        hoard(&program.dir.join("c0"), &mut fronts, &mut idle);
        hoard(&program.dir.join("c0"), &mut fronts, &mut idle);
        let begun = Instant::now();
        program.call("bdev_get_bdevs", Value::Null).unwrap();
        // At once, unless the program has yet to see that former ones are gone.
        let mut new = until_some("who is known comes in", || client(program.port, 5));
        let mut another = guest().unwrap();
        slowest = slowest.max(begun.elapsed());
        verify(&mut kept, round);
        verify(&mut new, !round);
        for d in [&mut disk, &mut another] {
            d.write(8, &[round; 4096]).unwrap();
            assert_eq!(d.read(8, 4096).unwrap(), [round; 4096]);
        }
        most_open = most_open.max(program.open());
    }
    // There is something left for disks, too.
    let file = program.dir.file("file", 1 << 20);
    let uring = json!({"name": "F0", "filename": file, "block_size": 512});
    assert_eq!(program.call("bdev_uring_create", uring), Ok(json!("F0")));
    let limits = program.call("nbd_server_get_limits", Value::Null).unwrap();
    assert_eq!(limits["descriptors"]["limit"], limit);
    let reserve = limits["descriptors"]["reserve"].as_u64().unwrap() as usize;
    println!(
        "{limit}: {at_rest} open at rest, {most_open} at most; RPC, NBD client and guest within {slowest:?}; {limits}"
    );
    assert!(most_open <= limit - reserve + at_rest, "{most_open} of {limit}, {reserve} of them in reserve");
    assert!(crowd.len() > 10 && limits["turned"]["away"].as_u64() > Some(10), "{limits}");
    drop((silent, fronts, idle));
    drop(crowd);
    // And all of it comes back.
    drop((kept, disk));
    until_some("no stranger has anything any more", || (program.open() <= at_rest + 4).then_some(()));
}

#[test]
fn strangers_leave_some_of_256_descriptors() {
    strangers_fill(256);
}

#[test]
fn strangers_leave_some_of_1024_descriptors() {
    strangers_fill(1024);
}
