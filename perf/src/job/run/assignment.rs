//! One job on one core: how it gets its device and memory there.

use std::sync::Arc;

use bdev::Descriptor;
use engine::App;
use iobuf::Registry;
use reactor::{Handle, Turn};

use super::super::options::{Job, RunOptions};
use super::super::pattern::Pattern;
use super::super::queue::{BdevQueue, Queue};
use super::super::rate::Rate;
use super::super::target::Target;
use super::super::vhost::{self, VhostQueue};
use super::super::worker::{Plan, Runner, Say, Shared, Worker};
use super::heard;

/// One job on one core, before its device is known.
pub(super) struct Assignment {
    pub job: Job,
    /// Its number among the cores of the job, and how many there are.
    pub share: (usize, usize),
    pub worker: usize,
    pub descriptor: Option<Descriptor>,
    pub seed: u64,
    pub run: u32,
    pub fill: bool,
}

/// Cores of each job, as numbers of `cores`.
pub(super) fn places(options: &RunOptions, cores: &[usize]) -> Result<Vec<Vec<usize>>, String> {
    let mut turn = 0;
    let mut of_job = |job: &Job| match &job.cores {
        Some(mask) => {
            let find = |core: &usize| {
                cores.iter().position(|c| c == core).ok_or_else(|| {
                    format!("job '{}': core {core} is not in the mask of -m, which has {cores:?}", job.name)
                })
            };
            mask.cores().iter().map(find).collect()
        }
        None if options.every_core => Ok((0..cores.len()).collect()),
        None => {
            turn += 1;
            Ok(vec![(turn - 1) % cores.len()])
        }
    };
    options.jobs.iter().map(&mut of_job).collect()
}

impl Assignment {
    /// On the reactor: makes the worker. Returns the bytes of the device that the job uses.
    pub(super) fn prepare(
        self,
        cx: &mut Turn<'_>,
        registry: &Arc<Registry>,
        shared: Arc<Shared>,
        control: &Handle,
    ) -> Result<u64, String> {
        let Job { queue_depth: slots, block_size, offset, .. } = self.job;
        let seed = self.seed.wrapping_add(self.share.0 as u64);
        let (worker, control) = (self.worker, control.clone());
        let say: Say = Box::new(move |said| App::send(&control, move |app, cx| heard(app, cx, worker, said)));
        match (&self.job.target, &self.descriptor) {
            (Target::Vhost(target), _) => {
                let (queue, capacity) = VhostQueue::connect(target, slots, block_size, offset, seed)
                    .map_err(|e| format!("{}: {e}", self.job.target))?;
                self.start(cx, queue, (capacity, vhost::SECTOR), shared, say)
            }
            (_, Some(descriptor)) => {
                let logical = descriptor.info().block_size;
                let capacity = descriptor.blocks() * u64::from(logical);
                // Before there is a queue, whose arithmetic relies on it.
                self.job.used(capacity, logical, self.share.1)?;
                let queue = BdevQueue::new(descriptor, registry, slots, block_size, offset, seed)?;
                self.start(cx, queue, (capacity, logical), shared, say)
            }
            (target, None) => Err(format!("{target}: not opened")),
        }
    }

    fn start<Q: Queue>(
        &self,
        cx: &mut Turn<'_>,
        queue: Q,
        (capacity, logical): (u64, u32),
        shared: Arc<Shared>,
        say: Say,
    ) -> Result<u64, String> {
        let (job, (i, n)) = (&self.job, self.share);
        let used = job.used(capacity, logical, n)?;
        let blocks = used / u64::from(job.block_size);
        let cut = |i: usize| blocks / n as u64 * i as u64 + (blocks % n as u64).min(i as u64);
        let (first, end) = (cut(i), cut(i + 1));
        let plan = Plan {
            worker: self.worker,
            pattern: Pattern::new(job.workload, job.read_percent, first, end - first, self.seed),
            change: job.workload.change(),
            slots: job.queue_depth,
            block_size: job.block_size,
            offset: job.offset,
            rate: job.rate_iops.map(|iops| Rate::new(iops / n as f64)),
            fill: if self.fill { (first, end) } else { (0, 0) },
            run: self.run,
        };
        Runner::start(cx, Worker::new(queue, shared, plan), say)
            .map_err(|e| format!("{}: cannot wait for its descriptor: {e}", job.target))?;
        Ok(used)
    }
}
