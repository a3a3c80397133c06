//! A remote disk over soft-roce and the loopback device: client and server on one reactor.

use std::cell::RefCell;
use std::rc::Rc;

use bdev::{Completions, Descriptor, Flags, IoChannel, IoRequest, Mode, Op, Segments, Status};
use iobuf::Segment;
use rnbd_initiator::bdev::BdevRnbd;
use rnbd_target::rnbd::Rnbd;
use serde_json::json;

use crate::gate::settle;
use crate::program::Program;
use crate::{Kind, LEN, Round};

const BLOCKS: u64 = (LEN / 512) as u64;

/// The remote disk's channel, on the reactor.
struct Remote {
    channel: IoChannel,
    done: Completions,
    segments: Vec<Segment>,
    lba: u64,
    _descriptor: Descriptor,
}

pub fn over_soft_roce(kind: Kind, depth: usize) -> Round {
    let network = test_support::network();
    let [server, client] = [1, 2].map(|last| test_support::address(network, last).to_string());
    let program = Program::start(
        || vec![Box::new(BdevRnbd::default()), Box::new(Rnbd::new(Vec::new()))],
        |_| {
            let paths = json!([{ "src": client, "dst": server }]);
            let map = json!({ "name": "remote", "sessname": "hot-paths", "device_path": "disk",
                "provider": "soft-roce", "paths": paths });
            vec![
                json!({ "subsystem": "rnbd", "config": [
                    { "method": "rnbd_set_options", "params": { "queue_depth": 64 } },
                    { "method": "rnbd_create_export", "params": { "device_path": "disk", "bdev_name": "disk" } },
                    { "method": "rnbd_create_listener", "params": { "traddr": server, "provider": "soft-roce" } },
                ]}),
                json!({ "subsystem": "bdev", "config": [{ "method": "bdev_rnbd_map", "params": map }] }),
            ]
        },
    );
    open(&program, depth);
    let op = if kind == Kind::Read { Op::Read } else { Op::Write };
    Box::new(move || {
        program.on_reactor(move |cx| submit(&mut remote(cx).borrow_mut(), op));
        test_support::until("an answer from the remote disk", || {
            settle(&program.reactor);
            program.on_reactor(|cx| finished(&mut remote(cx).borrow_mut()))
        });
        settle(&program.reactor);
    })
}

fn remote(cx: &reactor::Turn<'_>) -> Rc<RefCell<Remote>> {
    cx.local().expect("set when the disk was opened")
}

fn open(program: &Program, depth: usize) {
    let (descriptor, memory) = program.on_app(move |app| {
        let descriptor = app.manager.open("remote", Mode::ReadWrite, Box::new(|_| ())).expect("mapped");
        (descriptor, app.manager.registry().map(depth * LEN).expect("memory"))
    });
    program.on_reactor(move |cx| {
        // SAFETY: the region is leaked below, so the segments stay; each request has its own.
        let segments = (0..depth).map(|i| unsafe { memory.segment(i * LEN, LEN) }.expect("inside")).collect();
        std::mem::forget(memory);
        let channel = descriptor.channel().expect("a channel");
        let done = Completions::with_capacity(depth);
        let remote = Remote { channel, done, segments, lba: 0, _descriptor: descriptor };
        cx.set_local(Rc::new(RefCell::new(remote)));
    });
}

fn submit(r: &mut Remote, op: Op) {
    r.done.clear();
    for (segment, cookie) in r.segments.iter().zip(0..) {
        let segments = Segments::from_slice(&[*segment]);
        let request = IoRequest { op, flags: Flags::NONE, lba: r.lba, blocks: BLOCKS, segments, cookie };
        r.channel.submit(request).expect("room");
        r.lba = (r.lba + BLOCKS) % 8192;
    }
    r.channel.kick();
}

fn finished(r: &mut Remote) -> bool {
    r.channel.poll(&mut r.done);
    assert!(r.done.iter().all(|c| c.status == Status::Ok), "the remote disk failed a request: {:?}", r.done);
    r.done.len() == r.segments.len()
}
