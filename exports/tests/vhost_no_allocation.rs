//! Requests of guests allocate nothing on their reactor once it runs: rings, chains, and the way to the bdev.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use engine::Options;
use engine::log::LogControl;
use exports::vhost::Vhost;
use reactor::{Handle, IdlePolicy};
use rpc::{Client as RpcClient, Config};
use serde_json::json;
use test_support::{Counting, Dir, allocates_nothing, recv};
use vhost_driver::{Disk, Options as Guest};

/// Requests of each kind of ring.
const MEASURED: usize = 20_000;
const DEPTH: usize = 16;
/// VIRTIO_BLK_T_IN, _OUT, _FLUSH.
const KINDS: [u32; 3] = [0, 1, 4];

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What the program's only reactor has allocated. The message that asks is answered there, and costs little.
fn allocations(reactor: &Handle) -> u64 {
    let (tx, rx) = mpsc::sync_channel(1);
    reactor.send(move |_| tx.send(test_support::allocations()).unwrap());
    recv(&rx)
}

fn run(disk: &mut Disk, requests: usize) {
    let (mut sent, mut ended) = (0, 0);
    while ended < requests {
        while sent < requests && sent - ended < DEPTH {
            let Some(slot) = disk.take(0) else { break };
            let kind = KINDS[sent % KINDS.len()];
            let len = if kind == 4 { 0 } else { 4096 };
            if !disk.submit(0, slot, kind, (sent % 64 * 8) as u64, len, kind == 1) {
                break;
            }
            sent += 1;
        }
        disk.publish(0);
        let (_, status) = disk.wait(0).unwrap();
        assert_eq!(status, 0);
        ended += 1;
    }
}

#[test]
fn requests_allocate_nothing() {
    let dir = Dir::new("vhost-alloc");
    let (control, thread) = start(dir.path());
    let call = |method: &str, params| RpcClient::connect(dir.join("rpc.sock")).unwrap().call(method, params);
    call("framework_wait_init", json!(null)).unwrap();
    let reactor = {
        let (tx, rx) = mpsc::channel();
        engine::App::send(&control, move |app, _| tx.send(app.reactors[0].clone()).unwrap());
        rx.recv().unwrap()
    };
    for bdev in ["M0", "F0"] {
        call("vhost_create_blk_controller", json!({ "ctrlr": bdev, "dev_name": bdev, "packed_ring": true }))
            .unwrap();
        for packed in [false, true] {
            let guest = Guest { packed, indirect: packed, ..Guest::default() };
            let mut disk = Disk::connect(&dir.join(bdev), guest).unwrap();
            run(&mut disk, 2000);
            let before = allocations(&reactor);
            run(&mut disk, MEASURED);
            let more = allocations(&reactor) - before;
            assert!(
                allocates_nothing(more, MEASURED),
                "{more} allocations in {MEASURED} requests to {bdev}, packed {packed}"
            );
        }
    }
    control.send(|cx| {
        let handle = cx.handle().clone();
        engine::App::send(&handle, engine::App::shutdown);
    });
    thread.join().unwrap();
}

/// A program with malloc bdev "M0" and file "F0".
fn start(dir: &Path) -> (Handle, std::thread::JoinHandle<()>) {
    let file = dir.join("file");
    std::fs::File::create(&file).unwrap().set_len(4 << 20).unwrap();
    let config = json!({ "subsystems": [
        { "subsystem": "vhost_blk", "config": [{ "method": "vhost_set_options", "params": { "socket_dir": dir } }] },
        { "subsystem": "bdev", "config": [
            { "method": "bdev_malloc_create", "params": { "name": "M0", "num_blocks": 8192, "block_size": 512 } },
            { "method": "bdev_uring_create", "params": { "name": "F0", "filename": file, "block_size": 512 } },
        ]},
    ]});
    let rpc_socket = dir.join("rpc.sock");
    let (tx, rx) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let options = Options {
            program: "test",
            subsystems: vec![Box::new(Vhost::default())],
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
    (rx.recv().expect("it starts"), thread)
}
