//! SPDK's null and malloc bdevs through this crate, on one core: random 4 KiB reads, 32 at a time, to compare with SPDK's own
//! bdevperf. `taskset -c 1 spdk_load NAME SECONDS [DEPTH]`, where NAME is Null0 or Malloc0.

use std::error::Error;
use std::time::{Duration, Instant};

use bdev::spdk::{self, Options, Port, Runtime};
use bdev::{Completions, Flags, IoRequest, Manager, Mode, Op, Segments, Status};
use iobuf::{Pool, Registry};

const SIZE: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let name = args.next().ok_or("spdk_load NAME SECONDS [DEPTH]")?;
    let seconds: u64 = args.next().map_or(Ok(5), |s| s.parse())?;
    let depth: u32 = args.next().map_or(Ok(32), |s| s.parse())?;

    let no_huge = std::env::var_os("NO_HUGE").is_some();
    let mut runtime = Runtime::start(&Options { no_huge, no_pci: true, ..Options::default() })?;
    let mut port = Port::open()?;
    runtime.init()?;
    let kind = if name.starts_with("Null") { "null" } else { "malloc" };
    let params = format!(r#"{{"name":"{name}","num_blocks":131072,"block_size":512}}"#);
    let create = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"bdev_{kind}_create","params":{params}}}"#);
    // Modules that look for something on it claim it meanwhile.
    let examined = r#"{"jsonrpc":"2.0","id":2,"method":"bdev_wait_for_examine"}"#;
    for request in [create.as_str(), examined] {
        port.send(request.as_bytes());
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            port.turn(&mut answer)?;
            runtime.poll();
        }
    }

    let registry = Registry::new();
    if let Some(provider) = spdk::provider() {
        registry.set_provider(provider);
    }
    let pool = Pool::new(&registry, depth, SIZE)?;
    let buffers: Vec<_> = (0..depth).filter_map(|_| pool.take()).collect();
    let manager = Manager::new(registry);
    spdk::offer(&manager, &name)?;
    let descriptor = manager.open(&name, Mode::ReadWrite, Box::new(|_| ()))?;
    let mut channel = descriptor.channel()?;
    let places = descriptor.blocks() / 8;

    let (mut random, mut count, mut done) = (1u64, 0u64, Completions::new());
    let mut request = |cookie: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let lba = (random >> 33) % places * 8;
        // SAFETY: the buffers live longer than the channel, which is drained below; each has one request at a time.
        let segment = unsafe { buffers[cookie as usize].segment(SIZE) }.expect("a buffer has this size");
        let segments = Segments::from_slice(&[segment]);
        IoRequest { op: Op::Read, flags: Flags::NONE, lba, blocks: 8, segments, cookie }
    };
    for cookie in 0..u64::from(depth) {
        channel.submit(request(cookie)).map_err(|r| format!("{:?}", r.status))?;
    }
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds);
    let mut turns = 0u32;
    // The clock is read now and then.
    while !turns.is_multiple_of(1024) || Instant::now() < end {
        turns = turns.wrapping_add(1);
        channel.kick();
        channel.poll(&mut done);
        count += done.len() as u64;
        for completion in done.drain(..) {
            assert_eq!(completion.status, Status::Ok);
            channel.submit(request(completion.cookie)).map_err(|r| format!("{:?}", r.status))?;
        }
    }
    let rate = count as f64 / start.elapsed().as_secs_f64();
    while channel.inflight() > 0 {
        channel.poll(&mut done);
    }
    println!("{name}: {rate:.0} IOPS, {SIZE} bytes, queue depth {depth}");
    drop(channel);
    drop(descriptor);
    runtime.begin_finish();
    while !runtime.finished() {
        runtime.poll();
    }
    Ok(())
}
