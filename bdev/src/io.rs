//! What a request, its answer and its status look like: plain data that crosses no thread.

use iobuf::Segment;
use smallvec::SmallVec;

/// Scatter list of a request. Four segments travel inside the request; a longer list is the submitter's allocation.
pub type Segments = SmallVec<[Segment; 4]>;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Device to segments.
    Read,
    /// Segments to device.
    Write,
    /// Everything acknowledged before this was submitted is on stable storage once it completes `Ok`.
    Flush,
    /// The range reads as zeroes afterwards. With [`Flags::NO_UNMAP`] its space stays allocated.
    WriteZeroes,
    /// The contents of the range are not needed any more; reads afterwards return anything of that range's past, or zeroes.
    Discard,
    /// As discard, and no copy of the old contents can be recovered from the medium.
    SecureErase,
    /// Aborts what can be aborted; completes when every request of this channel submitted before it has completed.
    Reset,
}

impl Op {
    /// All operations, in a fixed order (statistics, tables).
    pub const ALL: [Self; 7] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::WriteZeroes,
        Self::Discard,
        Self::SecureErase,
        Self::Reset,
    ];

    /// Changes what the device holds: refused through a read-only descriptor.
    pub fn modifies(self) -> bool {
        matches!(self, Self::Write | Self::WriteZeroes | Self::Discard | Self::SecureErase)
    }

    /// Carries data, so the segments must add up to the range.
    pub fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }

    /// Has a block range.
    pub fn has_range(self) -> bool {
        !matches!(self, Self::Flush | Self::Reset)
    }
}

/// Modifiers of an [`Op`], a bit set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(pub u8);

impl Flags {
    /// None.
    pub const NONE: Self = Self(0);
    /// `Write`, `WriteZeroes`: on stable storage before it completes `Ok` (force unit access).
    pub const FUA: Self = Self(1);
    /// `WriteZeroes`: do not punch holes (`BLKDEV_ZERO_NOUNMAP`, `NBD_CMD_FLAG_NO_HOLE`).
    pub const NO_UNMAP: Self = Self(2);
    /// `WriteZeroes`: end `Unsupported` rather than write zeroes (`BLKDEV_ZERO_NOFALLBACK`, `NBD_CMD_FLAG_FAST_ZERO`).
    pub const FAST: Self = Self(4);

    /// Whether all bits of `other` are set.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// One I/O. Units are blocks of [`crate::Info::block_size`] bytes.
#[derive(Clone, Debug)]
pub struct IoRequest {
    /// What to do.
    pub op: Op,
    /// How.
    pub flags: Flags,
    /// First block. 0 for `Flush` and `Reset`.
    pub lba: u64,
    /// Number of blocks, at least 1 for operations with a range, 0 for the others.
    pub blocks: u64,
    /// `Read` and `Write`: memory of exactly `blocks * block_size` bytes in all, valid until the completion. Else empty.
    pub segments: Segments,
    /// Comes back in the [`Completion`]; the channel attaches no meaning to it.
    pub cookie: u64,
}

impl IoRequest {
    /// A reset: ends what can be ended.
    pub fn reset(cookie: u64) -> Self {
        Self { op: Op::Reset, flags: Flags::NONE, lba: 0, blocks: 0, segments: Segments::new(), cookie }
    }
}

/// How an I/O ended. Kept small and `Copy`; the front ends map it to errno, `NBD_E*` or `VIRTIO_BLK_S_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Done.
    Ok,
    /// The device failed it (EIO).
    IoError,
    /// The medium lost the data (ENODATA).
    MediumError,
    /// No space left (ENOSPC, thin provisioning and files).
    NoSpace,
    /// Not an operation of this device (EOPNOTSUPP).
    Unsupported,
    /// Alignment, segment sum or flag is wrong (EINVAL).
    Invalid,
    /// Past the end (EIO on a Linux block device; kept apart for those who can say more).
    OutOfRange,
    /// Write through a read-only descriptor or to a read-only device (EROFS).
    ReadOnly,
    /// Gave up waiting (ETIMEDOUT).
    TimedOut,
    /// Aborted by reset, close or shutdown (ECANCELED).
    Aborted,
    /// No request slot or memory now; trying again later helps (EAGAIN).
    Busy,
    /// The device is gone (ENODEV).
    Gone,
}

impl Status {
    /// All of them, in declaration order (statistics, tables).
    pub const ALL: [Self; 12] = [
        Self::Ok,
        Self::IoError,
        Self::MediumError,
        Self::NoSpace,
        Self::Unsupported,
        Self::Invalid,
        Self::OutOfRange,
        Self::ReadOnly,
        Self::TimedOut,
        Self::Aborted,
        Self::Busy,
        Self::Gone,
    ];

    /// Name in statistics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::IoError => "io_error",
            Self::MediumError => "medium_error",
            Self::NoSpace => "no_space",
            Self::Unsupported => "unsupported",
            Self::Invalid => "invalid",
            Self::OutOfRange => "out_of_range",
            Self::ReadOnly => "read_only",
            Self::TimedOut => "timed_out",
            Self::Aborted => "aborted",
            Self::Busy => "busy",
            Self::Gone => "gone",
        }
    }
}

/// The answer to one [`IoRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Of the request.
    pub cookie: u64,
    /// How it ended.
    pub status: Status,
}

/// A request that was not taken, with the reason. The request is whole.
#[derive(Debug)]
pub struct Rejected {
    /// As submitted.
    pub request: IoRequest,
    /// Why; [`Status::Busy`] means: again after some completion.
    pub status: Status,
}

/// Where `poll` puts completions. Cleared and reused by its owner, so it allocates only until it reached its size.
pub type Completions = Vec<Completion>;
