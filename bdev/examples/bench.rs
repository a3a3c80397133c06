//! Cost of the bdev layer itself: 4 KiB reads in batches of 32 through an `IoChannel`, one core.
//!
//! `cargo run --release -p bdev --example bench [seconds [FILE]]`, FILE being read as a uring bdev. Exits with 1 below 16 M IOPS on the null bdev, the goal
//! for one core of a server CPU; other bdevs are printed for comparison.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use bdev::{Completions, Flags, HistogramConfig, IoRequest, Manager, Mode, Op, Segments};
use iobuf::Registry;

const BATCH: u64 = 32;
const GOAL: f64 = 16e6;

fn measure(manager: &std::sync::Arc<Manager>, name: &str, time: Duration) -> f64 {
    let descriptor = manager.open(name, Mode::ReadOnly, Box::new(|_| ())).expect("just created");
    let mut channel = descriptor.channel().expect("channel");
    let buffer = manager.registry().map(4096).expect("memory");
    // SAFETY: `buffer` outlives the channel's I/O; reads that overlap in it are the point of nothing.
    let segment = unsafe { buffer.segment(0, 4096) }.expect("inside");
    let each = 4096 / u64::from(descriptor.info().block_size);
    let blocks = descriptor.blocks() / each * each;
    let mut done = Completions::with_capacity(BATCH as usize);
    let (mut count, mut lba) = (0u64, 0u64);
    let start = Instant::now();
    while start.elapsed() < time {
        for _ in 0..100 {
            for cookie in 0..BATCH {
                let segments = Segments::from_slice(&[segment]);
                let request =
                    IoRequest { op: Op::Read, flags: Flags::NONE, lba, blocks: each, segments, cookie };
                channel.submit(request).expect("room for a batch");
                lba = (lba + each) % blocks;
            }
            channel.kick();
            done.clear();
            while done.len() < BATCH as usize {
                channel.poll(&mut done);
            }
            count += BATCH;
        }
    }
    count as f64 / start.elapsed().as_secs_f64()
}

fn main() -> ExitCode {
    let seconds = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let time = Duration::from_secs_f64(seconds);
    let manager = Manager::new(Registry::new());
    let shape = |name: &str| (Some(name.to_owned()), 1u64 << 20, 512u32);
    let (name, num_blocks, block_size) = shape("null");
    let null = bdev::null::Params { name, num_blocks, block_size, physical_block_size: None, uuid: None };
    bdev::null::create(&manager, null).expect("null");
    let (name, num_blocks, block_size) = shape("malloc");
    let malloc = bdev::malloc::Params { name, num_blocks, block_size, physical_block_size: None, uuid: None };
    bdev::malloc::create(&manager, malloc).expect("malloc");

    let iops = measure(&manager, "null", time);
    println!("null: {:.1} M IOPS, {:.1} ns each", iops / 1e6, 1e9 / iops);
    manager.enable_histogram("null", Some(HistogramConfig::default())).expect("exists");
    let with = measure(&manager, "null", time);
    println!("null with histogram: {:.1} M IOPS, {:.1} ns each", with / 1e6, 1e9 / with);
    let copy = measure(&manager, "malloc", time);
    println!("malloc: {:.1} M IOPS, {:.1} ns each", copy / 1e6, 1e9 / copy);
    if let Some(file) = std::env::args().nth(2) {
        let params = bdev::uring::Params { read_only: true, ..bdev::uring::Params::new("uring", &file) };
        bdev::uring::create(&manager, params).expect("FILE as a uring bdev");
        let disk = measure(&manager, "uring", time);
        println!("uring on {file}: {:.3} M IOPS, {:.0} ns each", disk / 1e6, 1e9 / disk);
    }
    if iops < GOAL { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
