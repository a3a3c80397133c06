//! `vhost-load`: a polled virtio driver that puts load on a vhost-user-blk socket, and says how much of it was done.
//!
//! One thread is front end, guest and driver in one. It asks for no interrupts, keeps every queue at its depth, and kicks
//! only when the back end wants it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use argh::FromArgs;
use hdrhistogram::Histogram;
use serde_json::json;
use vhost_driver::{Disk, Options};

const IN: u32 = 0;
const OUT: u32 = 1;
/// Between two looks at the clock.
const BATCH: u32 = 64;
/// What takes longer counts as this, nanoseconds.
const LONGEST_NS: u64 = 60_000_000_000;

/// Load on a vhost-user-blk socket from a polled driver.
#[derive(FromArgs)]
struct Args {
    /// socket of the controller
    #[argh(positional)]
    socket: PathBuf,
    /// randread, randwrite, read or write (default randread)
    #[argh(option, default = "String::from(\"randread\")")]
    rw: String,
    /// bytes of each request, a multiple of 512 (default 4096)
    #[argh(option, default = "4096")]
    block_size: u32,
    /// requests in flight on each queue (default 32)
    #[argh(option, default = "32")]
    queue_depth: u16,
    /// virtqueues (default 1)
    #[argh(option, default = "1")]
    queues: u16,
    /// packed rings
    #[argh(switch)]
    packed: bool,
    /// requests in indirect tables
    #[argh(switch)]
    indirect: bool,
    /// share memory for requests in flight, as QEMU does
    #[argh(switch)]
    inflight: bool,
    /// measured seconds (default 5)
    #[argh(option, default = "5.0")]
    time: f64,
    /// core of the driver
    #[argh(option)]
    core: Option<usize>,
}

fn main() {
    let args: Args = argh::from_env();
    match run(&args) {
        Ok(report) => println!("{report:#}"),
        Err(e) => {
            eprintln!("vhost-load: {}: {e}", args.socket.display());
            std::process::exit(1);
        }
    }
}

fn run(args: &Args) -> Result<serde_json::Value, String> {
    let (random, write) = match args.rw.as_str() {
        "randread" => (true, false),
        "randwrite" => (true, true),
        "read" => (false, false),
        "write" => (false, true),
        other => return Err(format!("--rw {other}: use randread, randwrite, read or write")),
    };
    if args.block_size == 0 || !args.block_size.is_multiple_of(512) {
        return Err(format!("--block-size {}: use a multiple of 512", args.block_size));
    }
    if let Some(core) = args.core
        && !core_affinity::set_for_current(core_affinity::CoreId { id: core })
    {
        return Err(format!("--core {core}: this process may not use it"));
    }
    let options = Options {
        queues: args.queues,
        // Header, data and status of every request at once.
        queue_size: (args.queue_depth.max(1) * 4).next_power_of_two().min(1024),
        packed: args.packed,
        indirect: args.indirect,
        inflight: args.inflight,
        max_io: args.block_size,
        ..Options::default()
    };
    let measured =
        Duration::try_from_secs_f64(args.time).map_err(|e| format!("--time {}: {e}", args.time))?;
    let mut disk = Disk::connect(&args.socket, options).map_err(|e| e.to_string())?;
    let blocks = disk.sectors().map_err(|e| e.to_string())? * 512 / u64::from(args.block_size);
    if blocks == 0 {
        return Err("the disk is smaller than one block".into());
    }
    let mut load = Load {
        kind: if write { OUT } else { IN },
        random,
        write,
        block_size: args.block_size,
        blocks,
        next: 0,
        seed: 0x9e37_79b9_7f4a_7c15,
        started: vec![vec![Instant::now(); 1024]; args.queues.into()],
        latencies: Histogram::new_with_max(LONGEST_NS, 3).map_err(|e| e.to_string())?,
        done: 0,
        errors: 0,
    };
    (0..usize::from(args.queues)).for_each(|q| load.fill(&mut disk, q, args.queue_depth));
    load.turn(&mut disk, measured.min(Duration::from_millis(300)))?;
    (load.done, load.errors) = (0, 0);
    load.latencies.reset();
    let kicks = disk.kicks;
    let seconds = load.turn(&mut disk, measured)?;
    let us = |q: f64| load.latencies.value_at_quantile(q) as f64 / 1000.0;
    Ok(json!({
        "iops": load.done as f64 / seconds,
        "bandwidth_mib": load.done as f64 * f64::from(args.block_size) / seconds / 1048576.0,
        "latency_us": { "p50": us(0.5), "p99": us(0.99), "p99.9": us(0.999), "max": us(1.0) },
        "errors": load.errors,
        "kicks": disk.kicks - kicks,
        "seconds": seconds,
        "rw": args.rw, "block_size": args.block_size, "queue_depth": args.queue_depth, "queues": args.queues,
        "packed": args.packed, "indirect": args.indirect, "inflight": args.inflight,
    }))
}

struct Load {
    kind: u32,
    random: bool,
    write: bool,
    block_size: u32,
    blocks: u64,
    next: u64,
    seed: u64,
    started: Vec<Vec<Instant>>,
    latencies: Histogram<u64>,
    done: u64,
    errors: u64,
}

impl Load {
    fn sector(&mut self) -> u64 {
        let block = if self.random {
            // xorshift64*
            self.seed ^= self.seed >> 12;
            self.seed ^= self.seed << 25;
            self.seed ^= self.seed >> 27;
            let random = u128::from(self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
            ((random * u128::from(self.blocks)) >> 64) as u64
        } else {
            self.next = (self.next + 1) % self.blocks;
            self.next
        };
        block * u64::from(self.block_size / 512)
    }

    fn submit(&mut self, disk: &mut Disk, queue: usize, now: Instant) -> bool {
        let Some(slot) = disk.take(queue) else { return false };
        let sector = self.sector();
        self.started[queue][usize::from(slot)] = now;
        disk.submit(queue, slot, self.kind, sector, self.block_size, self.write)
    }

    fn fill(&mut self, disk: &mut Disk, queue: usize, depth: u16) {
        let now = Instant::now();
        for _ in 0..depth {
            self.submit(disk, queue, now);
        }
        disk.publish(queue);
        disk.ring(queue).disable_calls();
    }

    /// What completes is submitted anew, until the time is over. Returns seconds.
    fn turn(&mut self, disk: &mut Disk, time: Duration) -> Result<f64, String> {
        let start = Instant::now();
        let mut last_done = start;
        loop {
            let now = Instant::now();
            if now - start >= time {
                return Ok((now - start).as_secs_f64());
            }
            let before = self.done;
            for queue in 0..self.started.len() {
                self.serve(disk, queue, now);
            }
            if self.done > before {
                last_done = now;
            } else if now - last_done > Duration::from_secs(20) {
                return Err("no request completed within 20 s".into());
            }
        }
    }

    fn serve(&mut self, disk: &mut Disk, queue: usize, now: Instant) {
        let mut any = false;
        for _ in 0..BATCH {
            let Some((slot, status)) = disk.poll(queue) else { break };
            let latency = now.saturating_duration_since(self.started[queue][usize::from(slot)]);
            self.latencies.saturating_record(latency.as_nanos() as u64);
            self.done += 1;
            self.errors += u64::from(status != 0);
            self.submit(disk, queue, now);
            any = true;
        }
        if any {
            disk.publish(queue);
        }
    }
}
