//! A disk that does its work late: a request touches medium and memory only after a random time, in whatever order
//! the times fall. (The delay layer works at once and holds back the answer, so that no stale write would show.)

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bdev::{
    Bdev, Channel, ChannelError, Completion, Completions, Info, IoRequest, Op, OpSet, Rejected, Status,
};
use iobuf::Region;

const BLOCK: u32 = 512;

pub struct Lazy {
    info: Info,
    medium: Arc<Region>,
    longest: Duration,
    seed: AtomicU64,
    /// Writes in execution, by block.
    writers: Box<[AtomicU32]>,
    /// Writes that met another one on the same block.
    overlaps: AtomicU64,
}

impl Lazy {
    pub fn new(name: &str, blocks: usize, longest: Duration) -> Arc<Self> {
        let info = Info {
            name: name.into(),
            aliases: Vec::new(),
            product_name: "Lazy disk",
            uuid: uuid::Uuid::new_v4(),
            block_size: BLOCK,
            physical_block_size: BLOCK,
            native: OpSet::of(&[Op::Read, Op::Write]),
            native_fua: true,
            write_cache: false,
            read_only: false,
            volatile: true,
            discard_granularity: 0,
            rotational: false,
            max_unmap_blocks: u64::MAX,
            buffer_align: 1,
        };
        Arc::new(Self {
            info,
            medium: Region::new(blocks * BLOCK as usize).expect("memory"),
            longest,
            seed: AtomicU64::new(1),
            writers: (0..blocks).map(|_| AtomicU32::new(0)).collect(),
            overlaps: AtomicU64::new(0),
        })
    }

    pub fn overlaps(&self) -> u64 {
        self.overlaps.load(Relaxed)
    }

    fn some_time(&self) -> Duration {
        let n = self.seed.fetch_add(1, Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        self.longest.mul_f64(n as f64 / f64::from(1 << 24))
    }

    fn execute(&self, request: &IoRequest) -> Status {
        let mut at = request.lba as usize * BLOCK as usize;
        for segment in &request.segments {
            // SAFETY: segments stay valid until the completion, by the contract of `Channel::submit`, and the medium
            // is memory of its own.
            let inside = unsafe {
                match request.op {
                    Op::Write => self.medium.write_from(at, segment),
                    _ => self.medium.read_to(at, segment),
                }
            };
            if !inside {
                return Status::OutOfRange;
            }
            at += segment.len as usize;
        }
        Status::Ok
    }

    fn blocks_of<'a>(&'a self, request: &IoRequest) -> &'a [AtomicU32] {
        let written = if request.op == Op::Write { request.blocks } else { 0 };
        &self.writers[request.lba as usize..(request.lba + written) as usize]
    }
}

impl Bdev for Lazy {
    fn info(&self) -> &Info {
        &self.info
    }

    fn blocks(&self) -> u64 {
        self.writers.len() as u64
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        Ok(Box::new(LazyChannel { disk: self, pending: Vec::new() }))
    }
}

struct LazyChannel {
    disk: Arc<Lazy>,
    pending: Vec<(Instant, IoRequest)>,
}

impl Channel for LazyChannel {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        let met = self.disk.blocks_of(&request).iter().filter(|w| w.fetch_add(1, Relaxed) > 0).count();
        self.disk.overlaps.fetch_add(met as u64, Relaxed);
        self.pending.push((Instant::now() + self.disk.some_time(), request));
        Ok(())
    }

    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Completions) -> bool {
        let now = Instant::now();
        let due: Vec<_> = self.pending.extract_if(.., |(at, _)| *at <= now).collect();
        for (_, request) in &due {
            let status = self.disk.execute(request);
            self.disk.blocks_of(request).iter().for_each(|w| _ = w.fetch_sub(1, Relaxed));
            done.push(Completion { cookie: request.cookie, status });
        }
        !due.is_empty()
    }

    fn deadline(&self) -> Option<Instant> {
        self.pending.iter().map(|(at, _)| *at).min()
    }
}
