//! What came out, as JSON.

use hdrhistogram::Histogram;
use serde::Serialize;

use super::options::{LoadOptions, Pattern};
use crate::result::Latency;

/// What a verifying run has checked.
#[derive(Clone, Debug, Serialize)]
pub struct Verified {
    /// Reads compared with what was written.
    pub blocks_checked: u64,
    /// Of those, in the pass over everything at the end.
    pub blocks_checked_at_end: u64,
    /// The first difference, in words; there is none after a good run.
    pub mismatch: Option<String>,
}

/// The path as it was.
#[derive(Clone, Debug, Serialize)]
pub struct PathReport {
    /// "rdma-core", …
    pub provider: String,
    /// RDMA device.
    pub device: String,
    /// Of the server.
    pub server: String,
    /// With con 0.
    pub connections: u16,
    /// Buffers of the session.
    pub queue_depth: u16,
    /// Bytes.
    pub max_io_size: u32,
    /// The server changes keys with each request.
    pub rotating_keys: bool,
    /// Round trip of the last heartbeat, 0 if there was none.
    pub heartbeat_us: f64,
}

/// A finished run. Rates are of the measured time.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Requests per second.
    pub iops: f64,
    /// 2^20 bytes per second.
    pub mib_s: f64,
    /// Requests.
    pub ios: u64,
    /// Of those, reads.
    pub reads: u64,
    /// Requests that failed, in the whole run.
    pub errors: u64,
    /// The first failure.
    pub first_error: Option<String>,
    /// Times that a request found all buffers of the session in use, in the whole run.
    pub busy: u64,
    /// Measured.
    pub seconds: f64,
    /// Microseconds.
    pub latency_us: Latency,
    /// Seconds of CPU time of the whole process while measuring.
    pub cpu_seconds: f64,
    /// The same by reactor thread.
    pub reactor_cpu_seconds: Vec<f64>,
    /// Microseconds of the process's CPU time for each request.
    pub cpu_us_per_io: f64,
    /// Only of verifying runs.
    pub verify: Option<Verified>,
    /// As asked for.
    pub workload: Pattern,
    /// As asked for.
    pub block_size: u32,
    /// As asked for.
    pub queue_depth: u32,
    /// As asked for.
    pub cores: Vec<usize>,
    /// Bytes of the device that were used.
    pub size: u64,
    /// As asked for.
    pub seed: u64,
    /// The device's name at the server.
    pub bdev: String,
    /// How it was reached.
    pub path: PathReport,
    /// Version of this program.
    pub version: &'static str,
}

/// What the workers have counted, together.
pub(super) struct Totals {
    pub histogram: Histogram<u64>,
    pub reads: u64,
    pub errors: u64,
    pub first_error: Option<String>,
    pub busy: u64,
    pub seconds: f64,
    pub cpu_seconds: f64,
    pub reactor_cpu_seconds: Vec<f64>,
    pub verify: Option<Verified>,
}

impl Report {
    pub(super) fn new(o: &LoadOptions, size: u64, path: PathReport, t: Totals) -> Self {
        let ios = t.histogram.len();
        let per_second = |n: f64| if t.seconds > 0.0 { n / t.seconds } else { 0.0 };
        Self {
            iops: per_second(ios as f64),
            mib_s: per_second(ios as f64 * f64::from(o.block_size) / f64::from(1 << 20)),
            ios,
            reads: t.reads,
            errors: t.errors,
            first_error: t.first_error,
            busy: t.busy,
            seconds: t.seconds,
            latency_us: Latency::of(&t.histogram),
            cpu_seconds: t.cpu_seconds,
            reactor_cpu_seconds: t.reactor_cpu_seconds,
            cpu_us_per_io: if ios > 0 { t.cpu_seconds * 1e6 / ios as f64 } else { 0.0 },
            verify: t.verify,
            workload: o.pattern,
            block_size: o.block_size,
            queue_depth: o.queue_depth,
            cores: o.cores.clone(),
            size,
            seed: o.seed,
            bdev: o.device.clone(),
            path,
            version: env!("CARGO_PKG_VERSION"),
        }
    }

    /// Nothing failed and nothing differed.
    pub fn is_good(&self) -> bool {
        self.errors == 0 && self.verify.as_ref().is_none_or(|v| v.mismatch.is_none())
    }

    /// One line for a person.
    pub fn summary(&self) -> String {
        let l = &self.latency_us;
        format!(
            "{:.0} IOPS, {:.1} MiB/s, latency us p50 {:.1} p99 {:.1} p99.9 {:.1} max {:.1}, CPU {:.2} us/IO, {} errors",
            self.iops, self.mib_s, l.p50, l.p99, l.p99_9, l.max, self.cpu_us_per_io, self.errors
        )
    }
}
