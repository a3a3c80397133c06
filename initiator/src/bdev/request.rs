//! What is under way: requests of users, the parts that they travel in, and where parts go.

use bdev::{Flags, Op, Segments, Status};
use iobuf::{Buffer, Segment};
use rnbd_proto::Errno;
use rtrs_poll::client::SessionId;

/// A request of a channel, from its submission to its completion.
#[derive(Debug)]
pub(super) struct Request {
    pub channel: u32,
    pub cookie: u64,
    pub device: u32,
    pub op: Op,
    pub flags: Flags,
    /// First byte on the device.
    pub offset: u64,
    /// Bytes; 0 for a flush.
    pub len: u64,
    pub segments: Segments,
    /// Bytes that parts have been cut from; `u64::MAX` once there is nothing left to cut.
    pub cut: u64,
    /// Parts that have not ended.
    pub parts: u32,
    /// It is in its device's queue, to be cut further.
    pub listed: bool,
    /// Its parts are not repeated if their session is lost.
    pub once: bool,
    /// The first failure of a part.
    pub status: Status,
}

/// [`Request::cut`] of one that needs no more parts.
pub(super) const ALL: u64 = u64::MAX;

impl Request {
    /// Nothing is left to do.
    pub fn is_over(&self) -> bool {
        self.cut == ALL && self.parts == 0
    }
}

/// What one message carries of a request.
#[derive(Debug)]
pub(super) struct Part {
    pub request: u32,
    /// First byte within the request.
    pub from: u64,
    /// Bytes.
    pub len: u32,
    /// Memory that stands for the request's own.
    pub bounce: Option<Buffer>,
    /// The opening of the device ([`Opened::epoch`]) in which it was sent last; 0: it never was.
    pub epoch: u64,
}

/// How a device is open at its server now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opened<S = SessionId> {
    /// Moves with every opening of the device, so that what belongs to an earlier one is known.
    pub epoch: u64,
    /// Names the session to the [`Wire`].
    pub session: S,
    /// The server's number for the device.
    pub id: u32,
    pub limits: Limits,
}

/// Bytes that one message may ask for, at most; 0 where the operation is not supported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// Reads and writes: whole blocks.
    pub data: u32,
    pub discard: u32,
    pub write_zeroes: u32,
    pub secure_erase: u32,
}

impl Limits {
    /// For `op`; a flush has no bytes.
    pub fn of(&self, op: Op) -> u32 {
        match op {
            Op::Read | Op::Write => self.data,
            Op::Discard => self.discard,
            Op::WriteZeroes => self.write_zeroes,
            Op::SecureErase => self.secure_erase,
            Op::Flush | Op::Reset => 0,
        }
    }
}

/// One message to the server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message<'a> {
    pub op: Op,
    pub fua: bool,
    /// Zeroing keeps the space allocated.
    pub keep: bool,
    /// 512-byte units.
    pub sector: u64,
    /// Bytes that it is about.
    pub len: u32,
    /// Where data goes to or comes from; empty for operations without data. Valid until it has completed.
    pub data: &'a [Segment],
}

/// Why a message was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsent {
    /// Full: again after some completion.
    Busy,
    /// There is no such session now.
    Down,
    /// Its memory is not registered, or in more pieces than can be sent at once: use other memory.
    Memory,
    /// It never can be.
    Never,
}

/// What carries messages: the RTRS lane, or a simulation.
pub(super) trait Wire<S = SessionId> {
    /// Sends a message. `Ok`: exactly one completion with `cookie` follows, never from within this call.
    fn send(&mut self, to: &Opened<S>, message: &Message<'_>, cookie: u64) -> Result<(), Unsent>;
}

/// As [`bdev`] says it.
pub(super) fn status(errno: Errno) -> Status {
    match errno {
        Errno::ENODATA => Status::MediumError,
        Errno::ENOSPC => Status::NoSpace,
        Errno::EOPNOTSUPP => Status::Unsupported,
        Errno::EINVAL => Status::Invalid,
        Errno::EROFS => Status::ReadOnly,
        Errno::ETIMEDOUT | Errno::ETIME => Status::TimedOut,
        Errno::ECANCELED | Errno::ECONNABORTED => Status::Aborted,
        Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM => Status::Busy,
        Errno::ENODEV | Errno::ENXIO => Status::Gone,
        _ => Status::IoError,
    }
}
