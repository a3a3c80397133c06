//! What to do to which device.

use std::str::FromStr;
use std::time::Duration;

use reactor::IdlePolicy;
use rtrs_poll::client::SessionOptions;
use serde::Serialize;

/// The order and kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Reads, one block after the other.
    Read,
    /// Writes, one block after the other.
    Write,
    /// Reads anywhere.
    RandRead,
    /// Writes anywhere.
    RandWrite,
    /// Reads and writes anywhere: [`LoadOptions::read_percent`].
    RandRw,
    /// Writes stamped blocks anywhere and reads them back; at the end reads all of them once more.
    Verify,
}

impl Pattern {
    /// All, by the name that [`Pattern::from_str`] takes.
    pub const ALL: [(&'static str, Self); 6] = [
        ("read", Self::Read),
        ("write", Self::Write),
        ("randread", Self::RandRead),
        ("randwrite", Self::RandWrite),
        ("randrw", Self::RandRw),
        ("verify", Self::Verify),
    ];

    /// It changes the device.
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names: Vec<_> = Self::ALL.iter().map(|(n, _)| *n).collect();
        let found = Self::ALL.iter().find(|(n, _)| *n == name).map(|(_, p)| *p);
        found.ok_or_else(|| format!("workload '{name}': use {}", names.join(", ")))
    }
}

/// One run.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The session; its reactors are numbered as `cores`. The run ends when it goes down.
    pub session: SessionOptions,
    /// The device as the server names it.
    pub device: String,
    /// What to do.
    pub pattern: Pattern,
    /// Share of reads in [`Pattern::RandRw`] and [`Pattern::Verify`], 0..=100.
    pub read_percent: u8,
    /// Bytes of each request: a multiple of the device's logical block, at most the session's `max_io_size`.
    pub block_size: u32,
    /// Requests in flight, over all cores.
    pub queue_depth: u32,
    /// Measured time.
    pub time: Duration,
    /// Time before that is not measured.
    pub warm_up: Duration,
    /// Only the first so many bytes of the device are touched; 0 is all of it (1 GiB when verifying).
    pub size: u64,
    /// Of blocks and patterns.
    pub seed: u64,
    /// A reactor for each, pinned to it.
    pub cores: Vec<usize>,
    /// What reactors do when there is nothing to do.
    pub idle: IdlePolicy,
}

/// Options that do not fit the device or each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Not whole blocks, or too long.
    #[error("--block-size {got}: use a multiple of {logical} up to {most}, as the device {device} wants")]
    BlockSize {
        /// As given.
        got: u32,
        /// Of the device.
        logical: u32,
        /// Of the session.
        most: u32,
        /// Its name.
        device: String,
    },
    /// Nothing to work on.
    #[error(
        "the first {size} bytes of {device} are fewer than the queue's {queue_depth} blocks of {block_size} bytes"
    )]
    Size {
        /// What would be touched.
        size: u64,
        /// Its name.
        device: String,
        /// As given.
        queue_depth: u32,
        /// As given.
        block_size: u32,
    },
    /// A core would have nothing to do.
    #[error("--queue-depth {queue_depth}: use at least {cores}, one for each core with connections")]
    QueueDepth {
        /// As given.
        queue_depth: u32,
        /// With a link.
        cores: usize,
    },
}

/// Bytes that a verifying run touches unless told otherwise: it remembers four bytes for each block.
const DEFAULT_VERIFY_SIZE: u64 = 1 << 30;

impl LoadOptions {
    /// Blocks of [`LoadOptions::block_size`] that a run on `workers` reactors touches.
    pub(super) fn blocks(
        &self,
        workers: usize,
        capacity: u64,
        logical: u32,
        most: u32,
    ) -> Result<u64, OptionsError> {
        let (block_size, queue_depth, device) = (self.block_size, self.queue_depth, self.device.clone());
        if block_size == 0 || block_size > most || !block_size.is_multiple_of(logical) {
            return Err(OptionsError::BlockSize { got: block_size, logical, most, device });
        }
        if (queue_depth as usize) < workers {
            return Err(OptionsError::QueueDepth { queue_depth, cores: workers });
        }
        let size = match (self.size, self.pattern) {
            (0, Pattern::Verify) => capacity.min(DEFAULT_VERIFY_SIZE),
            (0, _) => capacity,
            (size, _) => capacity.min(size),
        };
        let blocks = size / u64::from(block_size);
        // Every worker has blocks of its own, and when verifying more than it has requests.
        if blocks < u64::from(queue_depth) + workers as u64 {
            return Err(OptionsError::Size { size, device, queue_depth, block_size });
        }
        Ok(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtrs_poll::client::PathSpec;

    fn options() -> LoadOptions {
        let path = PathSpec::new("loopback", "10.0.0.1:1".parse().unwrap());
        LoadOptions {
            session: SessionOptions::new("s", vec![path]),
            device: "d".into(),
            pattern: Pattern::RandRead,
            read_percent: 50,
            block_size: 4096,
            queue_depth: 8,
            time: Duration::from_secs(1),
            warm_up: Duration::ZERO,
            size: 0,
            seed: 0,
            cores: vec![0],
            idle: IdlePolicy::Poll,
        }
    }

    #[test]
    fn sizes() {
        let o = options();
        assert_eq!(o.blocks(1, 1 << 20, 512, 65536), Ok(256));
        assert_eq!(LoadOptions { size: 1 << 18, ..o.clone() }.blocks(1, 1 << 20, 512, 65536), Ok(64));
        let verify = LoadOptions { pattern: Pattern::Verify, ..o.clone() };
        assert_eq!(verify.blocks(1, 1 << 40, 512, 65536), Ok(1 << 18));
        assert!(LoadOptions { size: 8 * 4096, ..o }.blocks(1, 1 << 20, 512, 65536).is_err());
    }

    #[test]
    fn block_sizes_and_depths() {
        let o = options();
        for block_size in [0, 4096 + 512, 131_072] {
            let e = LoadOptions { block_size, ..o.clone() }.blocks(1, 1 << 20, 4096, 65536).unwrap_err();
            assert!(e.to_string().contains("multiple of 4096 up to 65536"), "{e}");
        }
        assert!(LoadOptions { queue_depth: 1, ..o }.blocks(2, 1 << 20, 512, 65536).is_err());
    }

    #[test]
    fn pattern_names() {
        assert_eq!("randrw".parse(), Ok(Pattern::RandRw));
        assert!("x".parse::<Pattern>().unwrap_err().contains("randread"));
    }
}
