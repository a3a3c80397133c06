//! What a run comes to, as JSON: one shape for `rnbd-perf`, for what `perf/compare` measures with other programs, and
//! for the report.
//!
//! Units are in the names. Fields that a program cannot know are left out, so a reader must do without them.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Value of [`RunResult::format`]. Another number means another shape.
pub const FORMAT: &str = "rnbd-perf-1";

/// A finished run. Rates are of the measured time, without warm-up.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RunResult {
    /// [`FORMAT`].
    pub format: String,
    /// What was measured, such as a version or a server: runs of one label and case are repetitions.
    pub label: String,
    /// The work, such as "4k randread QD32".
    pub case: String,
    /// Who measured: "rnbd-perf", "fio".
    pub program: String,
    /// Its version.
    pub version: String,
    /// Sources of the program that was measured, or measured with.
    #[serde(default)]
    pub git: Git,
    /// Beginning, UTC, RFC 3339.
    #[serde(default)]
    pub started: String,
    /// The command line.
    #[serde(default)]
    pub command: Vec<String>,
    /// Where.
    #[serde(default)]
    pub machine: Machine,
    /// Over all jobs.
    #[serde(flatten)]
    pub totals: Totals,
    /// Of the measuring program.
    #[serde(default)]
    pub cpu: Cpu,
    /// Of the server, where that is a process of its own whose CPU time was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<Server>,
    /// One entry for each interval of the measured time, in order and without gaps.
    #[serde(default)]
    pub timeline: Vec<Interval>,
    /// In the order of the command line or job file.
    #[serde(default)]
    pub jobs: Vec<JobResult>,
    /// Only of verifying runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<Verified>,
}

/// Requests and their latencies.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Requests per second.
    pub iops: f64,
    /// 2^20 bytes per second; 0 for requests without data.
    pub mib_s: f64,
    /// Requests.
    #[serde(default)]
    pub ios: u64,
    /// Of those, reads.
    #[serde(default)]
    pub reads: u64,
    /// Of those, the others: writes, or what the workload does.
    #[serde(default)]
    pub writes: u64,
    /// Of data.
    #[serde(default)]
    pub bytes: u64,
    /// Measured.
    #[serde(default)]
    pub seconds: f64,
    /// Requests that failed, in the whole run.
    #[serde(default)]
    pub errors: u64,
    /// The first failure, in words.
    #[serde(default)]
    pub first_error: Option<String>,
    /// Times that the device was full and a request had to be submitted again, in the whole run.
    #[serde(default)]
    pub busy: u64,
    /// From submission to completion.
    #[serde(default)]
    pub latency_us: Latency,
    /// Only where the work is mixed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_latency_us: Option<Latency>,
    /// Only where the work is mixed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_latency_us: Option<Latency>,
    /// The curve: pairs of a percentile (0 to 100) and microseconds, both rising.
    #[serde(default)]
    pub percentiles: Vec<(f64, f64)>,
}

/// Latencies in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Latency {
    /// Least.
    pub min: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// Nine of ten are faster.
    pub p90: f64,
    /// 99 of 100.
    pub p99: f64,
    /// 999 of 1000.
    pub p99_9: f64,
    /// 9999 of 10000.
    pub p99_99: f64,
    /// Most.
    pub max: f64,
}

/// Processor time of the measuring program while it measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// Seconds, all threads, user and system.
    pub process_seconds: f64,
    /// Microseconds of them for each request.
    pub us_per_io: f64,
    /// One for each core of the mask.
    pub reactors: Vec<ReactorCpu>,
}

/// One reactor while it measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ReactorCpu {
    /// Its core.
    pub core: usize,
    /// Share of its time in turns that found work, 0 to 1. A reactor that polls takes its whole core; this is how much of
    /// that was of use.
    pub busy_share: f64,
    /// Seconds of CPU time of its thread.
    pub cpu_seconds: f64,
}

/// Processor time of the process that was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Server {
    /// Seconds, with its children.
    pub cpu_seconds: f64,
    /// Microseconds of them for each request.
    pub cpu_us_per_io: f64,
}

/// A part of the measured time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interval {
    /// Its end, seconds from the beginning of the measurement.
    pub at: f64,
    /// Requests that completed in it, per second.
    pub iops: f64,
    /// 2^20 bytes of them, per second.
    pub mib_s: f64,
    /// Of their latencies, microseconds; 0 if none completed.
    pub p50_us: f64,
    /// As above.
    pub p99_us: f64,
    /// As above.
    pub max_us: f64,
}

/// One job.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct JobResult {
    /// Of the job.
    pub name: String,
    /// Bdev, URI or socket.
    pub target: String,
    /// As asked for.
    pub workload: String,
    /// Bytes.
    pub block_size: u32,
    /// On each core.
    pub queue_depth: u32,
    /// Of reads in mixed work.
    #[serde(default)]
    pub read_percent: u8,
    /// Where it ran.
    #[serde(default)]
    pub cores: Vec<usize>,
    /// Requests per second that it was held to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_iops: Option<f64>,
    /// First byte of the device that was used.
    #[serde(default)]
    pub offset: u64,
    /// Bytes of the device that were used.
    #[serde(default)]
    pub size: u64,
    /// Of blocks and data.
    #[serde(default)]
    pub seed: u64,
    /// What came out.
    #[serde(flatten)]
    pub totals: Totals,
}

/// What a verifying run has checked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Verified {
    /// Reads compared with what was written.
    pub blocks_checked: u64,
    /// Of those, in the pass over everything at the end.
    pub blocks_checked_at_end: u64,
    /// The first difference, in words; there is none after a good run.
    pub mismatch: Option<String>,
}

/// The machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// Model of the CPU.
    pub cpu: String,
    /// CPUs online.
    pub cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Frequency governor of the first core; "none" where frequencies are not ours to scale.
    pub governor: String,
    /// It is a virtual machine.
    pub virtual_machine: bool,
    /// Memory.
    pub memory_mib: u64,
    /// Load average of the last minute, at the beginning: above the share of the measured work, others were running.
    pub load_average: f64,
}

/// Sources.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Git {
    /// Commit; "unknown" when not built from a repository.
    pub revision: String,
    /// With changes that are in no commit.
    pub dirty: bool,
}

impl RunResult {
    /// Nothing failed and nothing differed.
    pub fn is_good(&self) -> bool {
        self.totals.errors == 0 && self.verify.as_ref().is_none_or(|v| v.mismatch.is_none())
    }

    /// Why it is not good.
    pub fn complaint(&self) -> Option<String> {
        if let Some(mismatch) = self.verify.as_ref().and_then(|v| v.mismatch.clone()) {
            return Some(mismatch);
        }
        let first = self.totals.first_error.as_deref().unwrap_or("no reason known");
        (self.totals.errors > 0)
            .then(|| format!("{} requests failed; the first: {first}", self.totals.errors))
    }
}

const fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

impl Latency {
    /// Of a histogram of nanoseconds; zeroes if it is empty.
    pub fn of(ns: &Histogram<u64>) -> Self {
        if ns.is_empty() {
            return Self::default();
        }
        let at = |q: f64| us(ns.value_at_quantile(q));
        Self {
            min: us(ns.min()),
            mean: ns.mean() / 1000.0,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            p99_99: at(0.9999),
            max: us(ns.max()),
        }
    }
}

/// Points of the curve between 0 and the share of a single request, closer together towards 100.
pub fn curve(ns: &Histogram<u64>) -> Vec<(f64, f64)> {
    if ns.is_empty() {
        return Vec::new();
    }
    let mut points = Vec::new();
    // Eight for each decade of the share that is slower; one request in all is the last that can be told.
    for step in 0..=8 * 7 {
        let slower = 10f64.powf(-f64::from(step) / 8.0);
        if slower * (ns.len() as f64) < 1.0 {
            break;
        }
        points.push((100.0 * (1.0 - slower), us(ns.value_at_quantile(1.0 - slower))));
    }
    points.push((100.0, us(ns.max())));
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(values: impl Iterator<Item = u64>) -> Histogram<u64> {
        let mut h = Histogram::new_with_max(1 << 40, 3).expect("fits");
        values.for_each(|v| h.record(v).expect("in range"));
        h
    }

    #[test]
    fn latencies_and_curve_rise() {
        let h = histogram((1..=10_000).map(|n| n * 1000));
        let l = Latency::of(&h);
        assert!((l.p50 - 5000.0).abs() < 10.0 && (l.p99 - 9900.0).abs() < 10.0, "{l:?}");
        let c = curve(&h);
        assert!(c.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{c:?}");
        assert_eq!(c.last().map(|p| p.0), Some(100.0));
        // Beyond 99.99 % there is less than one request.
        assert!(c[c.len() - 2].0 <= 99.99 + 1e-9, "{c:?}");
        assert!(curve(&histogram([].into_iter())).is_empty());
        assert_eq!(Latency::of(&histogram([].into_iter())), Latency::default());
    }

    #[test]
    fn what_is_written_can_be_read() {
        let totals = Totals {
            iops: 1.5,
            latency_us: Latency { p50: 2.0, ..Default::default() },
            ..Default::default()
        };
        let job = JobResult { name: "j".into(), totals: totals.clone(), ..Default::default() };
        let run = RunResult { format: FORMAT.into(), totals, jobs: vec![job], ..Default::default() };
        let json = serde_json::to_value(&run).expect("plain data");
        assert_eq!((&json["iops"], &json["jobs"][0]["latency_us"]["p50"]), (&1.5.into(), &2.0.into()));
        let back: RunResult = serde_json::from_value(json).expect("as written");
        assert_eq!((back.totals.iops, back.jobs[0].totals.latency_us.p50), (1.5, 2.0));
    }
}
