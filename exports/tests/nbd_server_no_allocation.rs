//! Requests of NBD clients allocate nothing on their reactor once it runs, in any framing: headers, payloads, the way to
//! the bdev, and replies.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use engine::Options;
use engine::log::LogControl;
use exports::nbd_server::NbdServer;
use nbd_proto::framing::Framing;
use nbd_proto::haggle::wire::{IHAVEOPT, opt};
use nbd_proto::wire::{
    EXTENDED_REQUEST_MAGIC, ORIGINAL_REPLY_MAGIC, ORIGINAL_REQUEST_MAGIC, REQUEST_MAGIC, cmd, cmd_flag,
};
use reactor::{Handle, IdlePolicy};
use rpc::{Client as RpcClient, Config};
use serde_json::json;
use test_support::{Counting, Dir, allocates_nothing, patience, recv};

/// Rounds of requests in each framing.
const MEASURED: usize = 500;
/// Requests of a round: writes, reads of data, reads of zeroes.
const ROUND: u64 = 24;
const LEN: usize = 4096;
const ORIGINAL: Framing = Framing::Original { reply_magic: ORIGINAL_REPLY_MAGIC };

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What the program's only reactor has allocated. The message that asks is answered there, and costs little.
fn allocations(reactor: &Handle) -> u64 {
    let (tx, rx) = mpsc::sync_channel(1);
    reactor.send(move |_| tx.send(test_support::allocations()).unwrap());
    recv(&rx)
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u32).to_be_bytes();
    [&IHAVEOPT.to_be_bytes(), number.to_be_bytes().as_slice(), &len, data].concat()
}

/// A client in its transmission phase.
fn connect(dir: &Path, framing: Framing) -> UnixStream {
    let name = if framing.is_original() { "1997" } else { "sock" };
    let mut client = UnixStream::connect(dir.join(name)).unwrap();
    client.set_read_timeout(Some(patience())).unwrap();
    let agree = match framing {
        Framing::Structured => option(opt::STRUCTURED_REPLY, b""),
        Framing::Extended => option(opt::EXTENDED_HEADERS, b""),
        Framing::Simple => vec![],
        Framing::Original { .. } => return client,
    };
    let hello = [3u32.to_be_bytes().as_slice(), &agree, &option(opt::GO, &[0; 6])].concat();
    client.write_all(&hello).unwrap();
    // The greeting, an ACK, INFO EXPORT and the last ACK.
    let len = 18 + if agree.is_empty() { 0 } else { 20 } + 32 + 20;
    client.read_exact(&mut vec![0; len]).unwrap();
    client
}

fn header(framing: Framing, command: u16, cookie: u64, offset: u64) -> Vec<u8> {
    let (cookie, long) = (cookie.to_be_bytes(), (LEN as u64).to_be_bytes());
    let short = (LEN as u32).to_be_bytes();
    let write = framing == Framing::Extended && command == cmd::WRITE;
    let flags = (if write { cmd_flag::PAYLOAD_LEN } else { 0 }).to_be_bytes();
    let (at, number) = (offset.to_be_bytes(), command.to_be_bytes());
    match framing {
        Framing::Original { .. } => [
            ORIGINAL_REQUEST_MAGIC.to_be_bytes().as_slice(),
            &at[4..],
            &short,
            &cookie,
            &u32::from(command).to_be_bytes(),
        ]
        .concat(),
        Framing::Extended => {
            [EXTENDED_REQUEST_MAGIC.to_be_bytes().as_slice(), &flags, &number, &cookie, &at, &long].concat()
        }
        _ => [REQUEST_MAGIC.to_be_bytes().as_slice(), &flags, &number, &cookie, &at, &short].concat(),
    }
}

/// Bytes of all replies of a round.
fn replies(framing: Framing) -> usize {
    let third = ROUND as usize / 3;
    match framing {
        // A simple reply to a write, a head with an offset before data, a hole.
        Framing::Structured => third * (16 + (20 + 8 + LEN) + (20 + 12)),
        Framing::Extended => third * (32 + (32 + 8 + LEN) + (32 + 12)),
        _ => third * (16 + 2 * (16 + LEN)),
    }
}

/// Sends rounds of requests, each at once, and takes what comes back.
fn run(client: &mut UnixStream, framing: Framing, rounds: usize) {
    let mut round = Vec::new();
    for cookie in 0..ROUND {
        let at = cookie / 3 * LEN as u64;
        let (command, offset) = match cookie % 3 {
            0 => (cmd::WRITE, at),
            1 => (cmd::READ, (1 << 20) + at),
            _ => (cmd::READ, (2 << 20) + at),
        };
        round.extend(header(framing, command, cookie, offset));
        if command == cmd::WRITE {
            round.extend_from_slice(&[7; LEN]);
        }
    }
    let mut got = vec![0; replies(framing)];
    for _ in 0..rounds {
        client.write_all(&round).unwrap();
        client.read_exact(&mut got).unwrap();
    }
}

#[test]
fn requests_allocate_nothing() {
    let dir = Dir::new("nbd-alloc");
    let (control, thread) = start(dir.path());
    RpcClient::connect(dir.join("rpc.sock")).unwrap().call("framework_wait_init", json!(null)).unwrap();
    let reactor = {
        let (tx, rx) = mpsc::channel();
        engine::App::send(&control, move |app, _| tx.send(app.reactors[0].clone()).unwrap());
        rx.recv().unwrap()
    };
    // Data where the middle reads look, and none where the last ones do.
    let mut filler = connect(dir.path(), Framing::Simple);
    for block in 0..8 {
        let at = (1 << 20) + block * LEN as u64;
        filler
            .write_all(&[header(Framing::Simple, cmd::WRITE, 1, at).as_slice(), &[9; LEN]].concat())
            .unwrap();
        filler.read_exact(&mut [0; 16]).unwrap();
    }
    for framing in [Framing::Simple, Framing::Structured, Framing::Extended, ORIGINAL] {
        let mut client = connect(dir.path(), framing);
        run(&mut client, framing, 50);
        let before = allocations(&reactor);
        run(&mut client, framing, MEASURED);
        let more = allocations(&reactor) - before;
        assert!(
            allocates_nothing(more, MEASURED * ROUND as usize),
            "{more} allocations in {MEASURED} rounds of {framing:?}"
        );
    }
    control.send(|cx| {
        let handle = cx.handle().clone();
        engine::App::send(&handle, engine::App::shutdown);
    });
    thread.join().unwrap();
}

/// A program with malloc bdev "M0", its only export, on "sock" and, as in 1997, on "1997".
fn start(dir: &Path) -> (Handle, std::thread::JoinHandle<()>) {
    let config = json!({ "subsystems": [
        { "subsystem": "bdev", "config": [
            { "method": "bdev_malloc_create", "params": { "name": "M0", "num_blocks": 8192, "block_size": 512 } },
        ]},
        { "subsystem": "nbd_server", "config": [
            { "method": "nbd_server_create_export", "params": { "name": "M0", "bdev_name": "M0" } },
            { "method": "nbd_server_add_listener", "params": { "path": dir.join("sock") } },
            { "method": "nbd_server_add_listener", "params": { "path": dir.join("1997"), "dialect": "1997" } },
        ]},
    ]});
    let rpc_socket = dir.join("rpc.sock");
    let (tx, rx) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let options = Options {
            program: "nbd-alloc-test",
            subsystems: vec![Box::new(NbdServer::default())],
            cpumask: "0x1".parse().unwrap(),
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
        engine::app::run(options, |control| tx.send(control.clone()).unwrap()).unwrap();
    });
    (rx.recv().expect("a start"), thread)
}
