//! Puts together what the workers say.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

use super::options::RunOptions;
use super::progress::Teller;
use super::record::{Sample, histogram};
use super::worker::Outcome;
use crate::machine;
use crate::result::{
    self, Cpu, FORMAT, Interval, JobResult, Latency, ReactorCpu, RunResult, Totals, Verified,
};

/// A job's workers together.
struct JobSum {
    block_size: u64,
    latencies: [Histogram<u64>; 2],
    size: u64,
    outcome: Outcome,
    seconds: f64,
}

/// A worker as the collector knows it.
struct Member {
    job: usize,
    core: usize,
    /// Its samples up to this interval have come.
    heard: Option<u64>,
    done: bool,
}

/// All workers' part of one interval.
struct Slice {
    latencies: Histogram<u64>,
    bytes: u64,
    /// End, nanoseconds of the measurement.
    until: u64,
}

/// Results in the making.
pub(super) struct Collector {
    jobs: Vec<JobSum>,
    members: Vec<Member>,
    interval: u64,
    time: u64,
    /// By number; those that are not complete.
    open: BTreeMap<u64, Slice>,
    rows: Vec<Interval>,
    teller: Teller,
    reactors: BTreeMap<usize, ReactorCpu>,
    process_seconds: f64,
    started: String,
    machine: result::Machine,
}

fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

const MIB: f64 = 1048576.0;

impl Collector {
    pub fn new(options: &RunOptions) -> Self {
        let job = |block_size: u32| JobSum {
            block_size: block_size.into(),
            latencies: [histogram(), histogram()],
            size: 0,
            outcome: Outcome::default(),
            seconds: 0.0,
        };
        Self {
            // Requests without data have no bytes.
            jobs: options
                .jobs
                .iter()
                .map(|j| job(if j.workload.has_data() { j.block_size } else { 0 }))
                .collect(),
            members: Vec::new(),
            interval: options.interval.as_nanos() as u64,
            time: options.time.as_nanos() as u64,
            open: BTreeMap::new(),
            rows: Vec::new(),
            teller: Teller::new(options.progress, options.time.as_secs_f64()),
            reactors: BTreeMap::new(),
            process_seconds: 0.0,
            started: machine::now_utc(),
            machine: machine::machine(),
        }
    }

    /// A worker of a job on a core; returns its number.
    pub fn add(&mut self, job: usize, core: usize) -> usize {
        self.members.push(Member { job, core, heard: None, done: false });
        self.members.len() - 1
    }

    /// Bytes of the device that the worker's job uses.
    pub fn uses(&mut self, worker: usize, bytes: u64) {
        self.jobs[self.members[worker].job].size = bytes;
    }

    pub fn sample(&mut self, s: &Sample) {
        let member = &mut self.members[s.worker];
        let job = &mut self.jobs[member.job];
        let index = s.from / self.interval;
        member.heard = Some(index);
        let slice =
            self.open.entry(index).or_insert_with(|| Slice { latencies: histogram(), bytes: 0, until: 0 });
        for (sum, part) in job.latencies.iter_mut().zip(&s.latencies) {
            slice.bytes += part.len() * job.block_size;
            // Bounds are the same everywhere.
            let added = sum.add(part).and(slice.latencies.add(part));
            debug_assert!(added.is_ok(), "{added:?}");
        }
        slice.until = slice.until.max(s.until);
        self.close(false);
    }

    pub fn done(&mut self, o: Outcome) {
        let member = &mut self.members[o.worker];
        member.done = true;
        let (job, core) = (&mut self.jobs[member.job], member.core);
        if let Some((begin, end)) = o.marks {
            job.seconds = job.seconds.max((end.at - begin.at) as f64 / 1e9);
            // Every worker sees the whole process.
            self.process_seconds = self.process_seconds.max(end.process_cpu - begin.process_cpu);
            let (busy, idle) =
                (end.busy_ns.wrapping_sub(begin.busy_ns), end.idle_ns.wrapping_sub(begin.idle_ns));
            let reactor = self.reactors.entry(core).or_insert(ReactorCpu { core, ..ReactorCpu::default() });
            reactor.busy_share = busy as f64 / (busy + idle).max(1) as f64;
            reactor.cpu_seconds = reactor.cpu_seconds.max(end.thread_cpu - begin.thread_cpu);
        }
        let sum = &mut job.outcome;
        sum.errors += o.errors;
        sum.busy += o.busy;
        sum.checked += o.checked;
        sum.checked_at_end += o.checked_at_end;
        sum.first_error = sum.first_error.take().or(o.first_error);
        sum.mismatch = sum.mismatch.take().or(o.mismatch);
        self.close(false);
    }

    /// Makes rows of the intervals of which everybody has been heard, or of all.
    fn close(&mut self, all: bool) {
        loop {
            let heard = |m: &Member, n: u64| m.done || m.heard.is_some_and(|h| h >= n);
            let Some((&index, _)) = self.open.first_key_value() else { return };
            if !all && !self.members.iter().all(|m| heard(m, index)) {
                return;
            }
            let Some(slice) = self.open.remove(&index) else { return };
            // Intervals in which nobody's ended: a stall.
            while (self.rows.len() as u64) < index {
                let end = (self.rows.len() as u64 + 1) * self.interval;
                self.rows.push(Interval { at: end as f64 / 1e9, ..Interval::default() });
            }
            let begin = index * self.interval;
            let end = (begin + self.interval).min(self.time).min(slice.until).max(begin + 1);
            let seconds = (end - begin) as f64 / 1e9;
            let l = &slice.latencies;
            let row = Interval {
                at: end as f64 / 1e9,
                iops: l.len() as f64 / seconds,
                mib_s: slice.bytes as f64 / seconds / MIB,
                p50_us: us(l.value_at_quantile(0.5)),
                p99_us: us(l.value_at_quantile(0.99)),
                max_us: us(l.max()),
            };
            self.teller.tell(&row);
            self.rows.push(row);
        }
    }

    /// The result, of what has come so far.
    pub fn result(mut self, options: &RunOptions) -> RunResult {
        self.close(true);
        self.teller.end();
        let mut all = JobSum {
            block_size: 0,
            latencies: [histogram(), histogram()],
            size: 0,
            outcome: Outcome::default(),
            seconds: 0.0,
        };
        let (mut bytes, mut jobs, mut verified) = (0, Vec::new(), None::<Verified>);
        for (index, (job, o)) in self.jobs.iter().zip(&options.jobs).enumerate() {
            let totals = job.totals(job.bytes(), o.workload.is_mixed());
            bytes += totals.bytes;
            all.take_in(job);
            if o.workload == super::Workload::Verify {
                let v = verified.get_or_insert_default();
                v.blocks_checked += job.outcome.checked;
                v.blocks_checked_at_end += job.outcome.checked_at_end;
                v.mismatch = v.mismatch.take().or(job.outcome.mismatch.clone());
            }
            let cores = self.members.iter().filter(|m| m.job == index).map(|m| m.core).collect();
            jobs.push(JobResult {
                name: o.name.clone(),
                target: o.target.to_string(),
                workload: o.workload.name().into(),
                block_size: o.block_size,
                queue_depth: o.queue_depth,
                read_percent: o.read_percent,
                cores,
                rate_iops: o.rate_iops,
                offset: o.offset,
                size: job.size,
                seed: options.seed,
                totals,
            });
        }
        let mixed = all.latencies.iter().all(|l| !l.is_empty());
        let totals = all.totals(bytes, mixed);
        let us_per_io = if totals.ios > 0 { self.process_seconds * 1e6 / totals.ios as f64 } else { 0.0 };
        RunResult {
            format: FORMAT.into(),
            label: options.label.clone(),
            case: options.case(),
            program: "rnbd-perf".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            git: machine::git(),
            started: self.started,
            command: options.command.clone(),
            machine: self.machine,
            totals,
            cpu: Cpu {
                process_seconds: self.process_seconds,
                us_per_io,
                reactors: self.reactors.into_values().collect(),
            },
            server: None,
            timeline: self.rows,
            jobs,
            verify: verified,
        }
    }
}

impl JobSum {
    fn bytes(&self) -> u64 {
        self.latencies.iter().map(|l| l.len() * self.block_size).sum()
    }

    fn take_in(&mut self, other: &Self) {
        for (sum, part) in self.latencies.iter_mut().zip(&other.latencies) {
            let added = sum.add(part);
            debug_assert!(added.is_ok(), "{added:?}");
        }
        let (a, b) = (&mut self.outcome, &other.outcome);
        a.errors += b.errors;
        a.busy += b.busy;
        a.first_error = a.first_error.take().or(b.first_error.clone());
        self.seconds = self.seconds.max(other.seconds);
    }

    fn totals(&self, bytes: u64, mixed: bool) -> Totals {
        let [reads, writes] = &self.latencies;
        let mut both = reads.clone();
        let added = both.add(writes);
        debug_assert!(added.is_ok(), "{added:?}");
        let per_second = |n: f64| if self.seconds > 0.0 { n / self.seconds } else { 0.0 };
        Totals {
            iops: per_second(both.len() as f64),
            mib_s: per_second(bytes as f64) / MIB,
            ios: both.len(),
            reads: reads.len(),
            writes: writes.len(),
            bytes,
            seconds: self.seconds,
            errors: self.outcome.errors,
            first_error: self.outcome.first_error.clone(),
            busy: self.outcome.busy,
            latency_us: Latency::of(&both),
            read_latency_us: mixed.then(|| Latency::of(reads)),
            write_latency_us: mixed.then(|| Latency::of(writes)),
            percentiles: result::curve(&both),
        }
    }
}
