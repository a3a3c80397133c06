//! What to do to which devices.

use std::str::FromStr;
use std::time::Duration;

use bdev::Op;
use reactor::CpuMask;

use super::target::Target;
use super::units;

/// The order and kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Reads, one block after the other.
    Read,
    /// Writes, one block after the other.
    Write,
    /// Reads anywhere.
    RandRead,
    /// Writes anywhere.
    RandWrite,
    /// Reads and writes, one block after the other: [`Job::read_percent`].
    Rw,
    /// Reads and writes anywhere.
    RandRw,
    /// Writes stamped blocks anywhere and reads them back; at the end reads all of them once more.
    Verify,
    /// Flushes, and nothing else.
    Flush,
    /// Discards, one block after the other.
    Unmap,
    /// Zeroes, one block after the other.
    WriteZeroes,
}

impl Workload {
    /// All, by the name that [`Workload::from_str`] takes.
    pub const ALL: [(&'static str, Self); 10] = [
        ("read", Self::Read),
        ("write", Self::Write),
        ("randread", Self::RandRead),
        ("randwrite", Self::RandWrite),
        ("rw", Self::Rw),
        ("randrw", Self::RandRw),
        ("verify", Self::Verify),
        ("flush", Self::Flush),
        ("unmap", Self::Unmap),
        ("write_zeroes", Self::WriteZeroes),
    ];

    /// It changes the device.
    pub fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead | Self::Flush)
    }

    /// Reads and writes together.
    pub fn is_mixed(self) -> bool {
        matches!(self, Self::Rw | Self::RandRw | Self::Verify)
    }

    /// Requests carry data.
    pub fn has_data(self) -> bool {
        !matches!(self, Self::Flush | Self::Unmap | Self::WriteZeroes)
    }

    /// What requests that are no reads do.
    pub(super) fn change(self) -> Op {
        match self {
            Self::Flush => Op::Flush,
            Self::Unmap => Op::Discard,
            Self::WriteZeroes => Op::WriteZeroes,
            _ => Op::Write,
        }
    }

    /// The name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, w)| *w == self).map_or("", |(name, _)| name)
    }
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names: Vec<_> = Self::ALL.iter().map(|(n, _)| *n).collect();
        let found = Self::ALL.iter().find(|(n, _)| *n == name).map(|(_, w)| *w);
        found.ok_or_else(|| format!("workload '{name}': use {}", names.join(", ")))
    }
}

/// Work on one device.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// For the results.
    pub name: String,
    /// The device.
    pub target: Target,
    /// What to do.
    pub workload: Workload,
    /// Bytes of each request: a multiple of the device's logical block.
    pub block_size: u32,
    /// Requests in flight on each core of the job.
    pub queue_depth: u32,
    /// Share of reads in mixed work, 0..=100.
    pub read_percent: u8,
    /// First byte of the device that is touched: a multiple of `block_size`.
    pub offset: u64,
    /// Bytes from there on; 0 is all of it (1 GiB when verifying).
    pub size: u64,
    /// Requests per second, over all cores of the job; `None`: as many as there can be.
    pub rate_iops: Option<f64>,
    /// Cores of the job, each with a channel and a share of the blocks of its own; `None`: see [`RunOptions::every_core`].
    pub cores: Option<CpuMask>,
}

/// A run: jobs that begin and end together.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// At least one.
    pub jobs: Vec<Job>,
    /// Jobs without cores of their own run on all of them; otherwise on one each, in turn.
    pub every_core: bool,
    /// Measured time.
    pub time: Duration,
    /// Time before that is not measured.
    pub warm_up: Duration,
    /// Of the time line.
    pub interval: Duration,
    /// Every block that a job uses is written once before the run, as reading what was never written costs less.
    pub fill: bool,
    /// Of blocks, kinds and data: the same seed gives the same requests in the same order.
    pub seed: u64,
    /// Failed requests are counted and the run goes on.
    pub keep_going: bool,
    /// How long a bdev of a server may take to appear.
    pub patience: Duration,
    /// For the results.
    pub label: String,
    /// For the results; made of the first job if empty.
    pub case: String,
    /// For the results.
    pub command: Vec<String>,
    /// A line on standard error for each interval.
    pub progress: Progress,
}

/// How a run is told while it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Not.
    Quiet,
    /// One line that changes.
    Live,
    /// Lines.
    Lines,
}

/// Bytes that a verifying run touches unless told otherwise: it remembers four bytes for each block.
const DEFAULT_VERIFY_SIZE: u64 = 1 << 30;
/// Of one request.
const MAX_BLOCK_SIZE: u32 = 64 << 20;
/// What a channel takes.
const MAX_QUEUE_DEPTH: u32 = 1 << 16;
/// Data memory of one job on one core.
const MAX_MEMORY: u64 = 64 << 30;
/// Of a time line.
const MAX_INTERVALS: f64 = 100_000.0;

impl RunOptions {
    /// What can be seen to be wrong without any device.
    ///
    /// # Errors
    /// In words, with what would be right.
    pub fn check(&self) -> Result<(), String> {
        if self.jobs.is_empty() {
            return Err("what shall be measured? Name a bdev with -T, or give a job file with -j".into());
        }
        if self.interval < Duration::from_millis(10)
            || self.time.as_secs_f64() / self.interval.as_secs_f64() > MAX_INTERVALS
        {
            return Err("--interval: use at least 0.01 s, and at most 100000 intervals".into());
        }
        for (i, job) in self.jobs.iter().enumerate() {
            job.check().map_err(|e| format!("job '{}': {e}", job.name))?;
            for other in &self.jobs[..i] {
                job.check_beside(other)?;
            }
        }
        Ok(())
    }

    /// "4k randread QD32", or as given.
    pub fn case(&self) -> String {
        match &self.jobs[..] {
            _ if !self.case.is_empty() => self.case.clone(),
            [job] => job.case(),
            [first, rest @ ..] => format!("{} and {} more", first.case(), rest.len()),
            [] => String::new(),
        }
    }
}

impl Job {
    fn check(&self) -> Result<(), String> {
        let (bs, qd) = (self.block_size, self.queue_depth);
        if matches!(&self.target, Target::Bdev(name) if name.is_empty()) {
            return Err("which bdev? Name it with -T, or with filename= in the job file".into());
        }
        if bs == 0 || bs > MAX_BLOCK_SIZE || !bs.is_multiple_of(512) {
            return Err(format!("-o {bs}: use a multiple of 512 up to {MAX_BLOCK_SIZE} bytes"));
        }
        if qd == 0 || qd > MAX_QUEUE_DEPTH {
            return Err(format!("-q {qd}: use 1 to {MAX_QUEUE_DEPTH}"));
        }
        if u64::from(bs) * u64::from(qd) > MAX_MEMORY {
            return Err(format!("-q {qd} requests of {bs} bytes need more than 64 GiB of memory"));
        }
        if self.read_percent > 100 {
            return Err(format!("-M {}: use 0 to 100", self.read_percent));
        }
        if !self.offset.is_multiple_of(u64::from(bs)) {
            return Err(format!("--offset {}: use a multiple of the block size, {bs}", self.offset));
        }
        if self.rate_iops.is_some_and(|r| !(r > 0.0 && r.is_finite())) {
            return Err("--rate-iops: use a number above 0".into());
        }
        Ok(())
    }

    /// What one job verifies, no other may change.
    fn check_beside(&self, other: &Self) -> Result<(), String> {
        let verifies = self.workload == Workload::Verify || other.workload == Workload::Verify;
        let both_change = self.workload.changes() && other.workload.changes();
        let end = |job: &Self| if job.size == 0 { u64::MAX } else { job.offset.saturating_add(job.size) };
        let overlap = self.offset < end(other) && other.offset < end(self);
        if verifies && both_change && overlap && self.target.same_device(&other.target) {
            let (a, b) = (&other.name, &self.name);
            return Err(format!(
                "jobs '{a}' and '{b}' change the same blocks, and one of them verifies: give them ranges of their own \
                 with offset and size"
            ));
        }
        Ok(())
    }

    /// Bytes of a device of `capacity` that the job uses.
    ///
    /// # Errors
    /// In words.
    pub(super) fn used(&self, capacity: u64, logical: u32, workers: usize) -> Result<u64, String> {
        let (bs, name) = (u64::from(self.block_size), &self.target);
        if !self.block_size.is_multiple_of(logical) {
            return Err(format!("-o {bs}: use a multiple of {logical}, the block size of {name}"));
        }
        let rest = capacity.saturating_sub(self.offset);
        let size = match (self.size, self.workload) {
            (0, Workload::Verify) => rest.min(DEFAULT_VERIFY_SIZE),
            (0, _) => rest,
            (size, _) => rest.min(size),
        };
        let blocks = size / bs;
        // Every worker has blocks of its own, and when verifying more than it has requests.
        let depth = if self.workload == Workload::Verify { u64::from(self.queue_depth) } else { 0 };
        if blocks < workers as u64 * (depth + 1) {
            let what = if depth > 0 { "in flight and one more" } else { "for each core" };
            return Err(format!(
                "{size} bytes of {name} are too few for blocks of {bs} bytes: there must be enough for those {what}"
            ));
        }
        Ok(blocks * bs)
    }

    /// "4k randread QD32".
    pub fn case(&self) -> String {
        let bs = units::short(self.block_size.into());
        let mix = if matches!(self.workload, Workload::Rw | Workload::RandRw) {
            format!(" {}% reads", self.read_percent)
        } else {
            String::new()
        };
        let rate = self.rate_iops.map_or_else(String::new, |r| format!(" at {r:.0} IOPS"));
        format!("{bs} {}{mix} QD{}{rate}", self.workload.name(), self.queue_depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(workload: Workload) -> Job {
        Job {
            name: "j".into(),
            target: Target::Bdev("B0".into()),
            workload,
            block_size: 4096,
            queue_depth: 8,
            read_percent: 50,
            offset: 0,
            size: 0,
            rate_iops: None,
            cores: None,
        }
    }

    #[test]
    fn ranges() {
        let read = job(Workload::RandRead);
        assert_eq!(read.used((1 << 20) + 5, 512, 2), Ok(1 << 20));
        assert_eq!(Job { offset: 4096, size: 8192, ..read.clone() }.used(1 << 20, 512, 1), Ok(8192));
        assert_eq!(job(Workload::Verify).used(1 << 40, 512, 1), Ok(DEFAULT_VERIFY_SIZE));
        for (job, capacity, logical, says) in [
            (job(Workload::Verify), 8 * 4096, 512, "too few"),
            (Job { offset: 1 << 20, ..read.clone() }, 1 << 20, 512, "too few"),
            (Job { block_size: 512, ..read.clone() }, 1 << 20, 4096, "multiple of 4096"),
        ] {
            let e = job.used(capacity, logical, 1).unwrap_err();
            assert!(e.contains(says) && e.contains("B0"), "{e}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let read = job(Workload::RandRead);
        for (job, says) in [
            (Job { block_size: 0, ..read.clone() }, "multiple of 512"),
            (Job { block_size: 1000, ..read.clone() }, "multiple of 512"),
            (Job { queue_depth: 0, ..read.clone() }, "1 to 65536"),
            (Job { queue_depth: 65536, block_size: 64 << 20, ..read.clone() }, "64 GiB"),
            (Job { read_percent: 101, ..read.clone() }, "0 to 100"),
            (Job { offset: 512, ..read.clone() }, "multiple of the block size"),
            (Job { rate_iops: Some(0.0), ..read.clone() }, "above 0"),
        ] {
            let e = job.check().unwrap_err();
            assert!(e.contains(says), "{e}");
        }
        assert_eq!(read.check(), Ok(()));
    }

    #[test]
    fn nobody_else_changes_what_is_verified() {
        let (verify, write, read) = (job(Workload::Verify), job(Workload::Write), job(Workload::Read));
        assert!(verify.check_beside(&write).is_err() && write.check_beside(&verify).is_err());
        assert!(verify.check_beside(&read).is_ok() && write.check_beside(&write).is_ok());
        let low = Job { size: 1 << 20, ..verify.clone() };
        assert!(low.check_beside(&Job { offset: 1 << 20, ..verify.clone() }).is_ok());
        assert!(verify.check_beside(&Job { target: Target::Bdev("B1".into()), ..write }).is_ok());
    }

    #[test]
    fn names() {
        for (name, workload) in Workload::ALL {
            assert_eq!((name.parse(), workload.name()), (Ok(workload), name));
        }
        assert!("x".parse::<Workload>().unwrap_err().contains("randread"));
        assert_eq!(job(Workload::RandRead).case(), "4k randread QD8");
    }
}
