//! The bdev layer alone: batches through an `IoChannel` on one thread.

use std::sync::Arc;

use bdev::{Completions, Flags, IoChannel, IoRequest, Manager, Mode, Op, Segments};
use iobuf::{Registry, Segment};

use crate::{Kind, LEN, Round};

const BLOCKS: u64 = 1 << 14;
const BLOCK: u32 = 512;

pub fn null(kind: Kind, depth: usize) -> Round {
    let manager = Manager::new(Registry::new());
    let params = bdev::null::Params {
        name: Some("disk".into()),
        num_blocks: BLOCKS,
        block_size: BLOCK,
        physical_block_size: None,
        uuid: None,
    };
    bdev::null::create(&manager, params).expect("a null bdev");
    rounds(&manager, kind, depth)
}

pub fn malloc(kind: Kind, depth: usize) -> Round {
    let manager = Manager::new(Registry::new());
    let params = bdev::malloc::Params {
        name: Some("disk".into()),
        num_blocks: BLOCKS,
        block_size: BLOCK,
        physical_block_size: None,
        uuid: None,
    };
    bdev::malloc::create(&manager, params).expect("a malloc bdev");
    rounds(&manager, kind, depth)
}

fn rounds(manager: &Arc<Manager>, kind: Kind, depth: usize) -> Round {
    let descriptor = manager.open("disk", Mode::ReadWrite, Box::new(|_| ())).expect("just created");
    let mut channel = descriptor.channel().expect("a channel");
    let memory = manager.registry().map(depth * LEN).expect("memory");
    let segments: Vec<Segment> = (0..depth)
        // SAFETY: the closure below keeps `memory` behind the channel, and each request has its own part.
        .map(|i| unsafe { memory.segment(i * LEN, LEN) }.expect("inside"))
        .collect();
    let mut done = Completions::with_capacity(depth);
    let op = if kind == Kind::Read { Op::Read } else { Op::Write };
    let mut lba = 0;
    Box::new(move || {
        lba = batch(&mut channel, op, lba, &segments, &mut done);
        let _ = (&descriptor, &memory);
    })
}

/// What is counted. Returns where the next round goes on.
#[inline(never)]
fn batch(channel: &mut IoChannel, op: Op, mut lba: u64, list: &[Segment], done: &mut Completions) -> u64 {
    let blocks = LEN as u64 / u64::from(BLOCK);
    for (segment, cookie) in list.iter().zip(0..) {
        let segments = Segments::from_slice(&[*segment]);
        channel.submit(IoRequest { op, flags: Flags::NONE, lba, blocks, segments, cookie }).expect("room");
        lba = (lba + blocks) % BLOCKS;
    }
    channel.kick();
    done.clear();
    while done.len() < list.len() {
        channel.poll(done);
    }
    lba
}
