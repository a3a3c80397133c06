//! From a header to a request that fits its export.
//!
//! Checked in this order, which is the specification's ("Request types", "Error values") where it has one:
//!
//! | what                                              | answer                                    |
//! |---------------------------------------------------|-------------------------------------------|
//! | a change of a read-only export                    | EPERM                                     |
//! | unknown command, or one that was not offered      | EINVAL                                    |
//! | a flag that the command has not, or not offered   | EINVAL                                    |
//! | a payload too many, or missing (extended headers) | EINVAL                                    |
//! | empty range; `FLUSH` with one                     | EINVAL                                    |
//! | not whole blocks, unless these are served, too    | EINVAL                                    |
//! | past the end                                      | ENOSPC if it writes, else EINVAL          |
//! | `READ` of more than the largest payload           | EOVERFLOW with DF, else EINVAL            |
//!
//! More payload than the largest closes the connection ([`crate::transmission`]).

use std::fmt;

use crate::framing::{ALLOCATION_CONTEXT, Agreed, Framing, Head};
use crate::wire::{ErrorCode, TransmissionFlags, cmd, cmd_flag};

/// The least that a server takes as payload of one request if block sizes were not negotiated ("Block size
/// constraints"), bytes.
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;

/// What requests are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Bytes of a block of the device, a power of two.
    pub block_size: u32,
    /// Requests need not be whole blocks: the device's user makes them so ([`Request::cover`]). Many clients never ask for
    /// block sizes.
    pub any_range: bool,
    /// Most bytes of a `READ` or `WRITE`.
    pub max_payload: u32,
    /// As the client was told.
    pub flags: TransmissionFlags,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answer with the range's data.
    Read,
    /// The payload is the range's new data.
    Write {
        /// Stable before the answer.
        fua: bool,
    },
    /// What was answered so far becomes stable; no range.
    Flush,
    /// The range's contents are not needed any more.
    Trim {
        /// Stable before the answer.
        fua: bool,
    },
    /// The range will be read soon.
    Cache,
    /// The range becomes zeroes.
    WriteZeroes {
        /// Stable before the answer.
        fua: bool,
        /// The space stays allocated.
        no_hole: bool,
        /// Fail with ENOTSUP if it takes as long as writing zeroes.
        fast: bool,
    },
    /// What of the range is allocated, in the context `base:allocation`.
    BlockStatus {
        /// One extent, no longer than the range.
        one: bool,
    },
}

impl Command {
    /// Changes the export.
    pub fn modifies(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. })
    }
}

/// A request that fits its export. Comes only out of [`Request::check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    cookie: u64,
    command: Command,
    offset: u64,
    len: u64,
}

/// Whole blocks around a range, inside the export as the range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cover {
    /// First byte.
    pub offset: u64,
    /// Bytes, not fewer than the range has.
    pub len: u64,
    /// Bytes in front of the range, less than a block.
    pub before: u32,
}

/// A request that is answered with an error, and goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Of the request.
    pub cookie: u64,
    /// Of the request.
    pub offset: u64,
    /// The answer.
    pub error: ErrorCode,
    /// Why, for the log.
    pub why: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {:#x} refused with {}: {}", self.cookie, self.error, self.why)
    }
}

impl Request {
    /// Chosen by the client, for the reply.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// What to do.
    pub fn command(&self) -> Command {
        self.command
    }

    /// First byte of the range; a multiple of the export's block size unless it serves any range.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the range, which is inside the export; 0 for `Flush` only. Whole blocks as for
    /// [`offset`](Self::offset).
    #[expect(clippy::len_without_is_empty, reason = "only a flush is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The whole blocks of `block_size` bytes that the range lies in.
    pub fn cover(&self, block_size: u32) -> Cover {
        let mask = u64::from(block_size) - 1;
        let (offset, end) = (self.offset & !mask, (self.offset + self.len + mask) & !mask);
        Cover { offset, len: end - offset, before: (self.offset - offset) as u32 }
    }

    /// Bytes of data that go one way or the other: those of a `READ` or `WRITE`, at most the largest payload.
    pub fn data_len(&self) -> u32 {
        if matches!(self.command, Command::Read | Command::Write { .. }) { self.len as u32 } else { 0 }
    }

    /// Bytes of data that the client sends after the header.
    pub fn payload_len(&self) -> u32 {
        if matches!(self.command, Command::Write { .. }) { self.len as u32 } else { 0 }
    }

    /// Checks a header whose magic is right, whose command is not `DISC`, and whose payload is at most the largest.
    ///
    /// # Errors
    /// What the answer must be. The payload of a refused request follows all the same.
    pub fn check(head: &Head, export: &Export, agreed: &Agreed) -> Result<Self, Refusal> {
        Self::fit(head, export, agreed).map_err(|(error, why)| refusal(head, error, why))
    }

    fn fit(head: &Head, export: &Export, agreed: &Agreed) -> Result<Self, (ErrorCode, &'static str)> {
        let changes = matches!(head.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        if changes && export.flags.has(TransmissionFlags::READ_ONLY) {
            return Err((ErrorCode::Eperm, "the export is read-only"));
        }
        let command = command_of(head, export.flags, agreed).map_err(|why| (ErrorCode::Einval, why))?;
        let request = Self { cookie: head.cookie, command, offset: head.offset, len: head.length };
        if command == Command::Flush {
            let empty = head.offset == 0 && head.length == 0;
            return if empty { Ok(request) } else { Err((ErrorCode::Einval, "FLUSH has no range")) };
        }
        request.fits(export)?;
        if command == Command::Read && head.length > export.max_payload.into() {
            let whole = head.flags & cmd_flag::DF != 0;
            let error = if whole { ErrorCode::Eoverflow } else { ErrorCode::Einval };
            return Err((error, "more data than one request may have"));
        }
        Ok(request)
    }

    /// A range inside, of whole blocks if it must be.
    fn fits(&self, export: &Export) -> Result<(), (ErrorCode, &'static str)> {
        let (offset, len, block) = (self.offset, self.len, u64::from(export.block_size));
        if len == 0 {
            return Err((ErrorCode::Einval, "empty range"));
        }
        if !export.any_range && (!offset.is_multiple_of(block) || !len.is_multiple_of(block)) {
            return Err((ErrorCode::Einval, "not whole blocks"));
        }
        if offset.checked_add(len).is_none_or(|end| end > export.size) {
            let writes = matches!(self.command, Command::Write { .. } | Command::WriteZeroes { .. });
            return Err((if writes { ErrorCode::Enospc } else { ErrorCode::Einval }, "past the end"));
        }
        Ok(())
    }
}

/// Most contexts that a `BLOCK_STATUS` payload may name; there is one to be named.
const MAX_NAMED: usize = 64;
/// Longest payload of a `BLOCK_STATUS` request, bytes; longer ones are refused unread.
pub const MAX_STATUS_PAYLOAD: usize = 8 + 4 * MAX_NAMED;

/// Whether `head` is a `BLOCK_STATUS` whose payload is to be looked at ([`Request::check_status`]).
pub(crate) fn names_contexts(head: &Head, export: &Export, agreed: &Agreed) -> bool {
    agreed.framing == Framing::Extended
        && agreed.allocation
        && head.command == cmd::BLOCK_STATUS
        && export.flags.has(TransmissionFlags::BLOCK_STATUS_PAYLOAD)
        && head.flags & cmd_flag::PAYLOAD_LEN != 0
        && (1..=MAX_STATUS_PAYLOAD as u64).contains(&head.length)
}

impl Request {
    /// Checks a `BLOCK_STATUS` that names its contexts: `payload` has the length of the range, and ids.
    ///
    /// # Errors
    /// As [`Request::check`].
    pub(crate) fn check_status(
        head: &Head,
        payload: &[u8],
        export: &Export,
        agreed: &Agreed,
    ) -> Result<Self, Refusal> {
        let refuse = |why| refusal(head, ErrorCode::Einval, why);
        let (len, ids) = payload.split_first_chunk().ok_or_else(|| refuse("a payload without a length"))?;
        let (ids, rest) = ids.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(refuse("a payload that does not end with an id"));
        }
        if ids.iter().any(|id| u32::from_be_bytes(*id) != ALLOCATION_CONTEXT) {
            return Err(refuse("an unknown metadata context"));
        }
        if ids.len() != 1 {
            return Err(refuse("a payload must name each context once, and one at least"));
        }
        let flags = head.flags & !cmd_flag::PAYLOAD_LEN;
        let plain = Head { flags, length: u64::from_be_bytes(*len), ..*head };
        Self::check(&plain, export, agreed)
    }
}

pub(crate) fn refusal(head: &Head, error: ErrorCode, why: &'static str) -> Refusal {
    Refusal { cookie: head.cookie, offset: head.offset, error, why }
}

/// The command and its flags, if they were offered.
fn command_of(head: &Head, offered: TransmissionFlags, agreed: &Agreed) -> Result<Command, &'static str> {
    let has = |bit| head.flags & bit != 0;
    let if_offered = |flag, bit| if offered.has(flag) { bit } else { 0 };
    let (command, needs, mut known) = match head.command {
        cmd::READ => {
            (Command::Read, TransmissionFlags(0), if_offered(TransmissionFlags::SEND_DF, cmd_flag::DF))
        }
        cmd::WRITE => (Command::Write { fua: has(cmd_flag::FUA) }, TransmissionFlags(0), 0),
        // FUA means nothing to a flush, but clients have sent it.
        cmd::FLUSH => (Command::Flush, TransmissionFlags::SEND_FLUSH, 0),
        cmd::TRIM => (Command::Trim { fua: has(cmd_flag::FUA) }, TransmissionFlags::SEND_TRIM, 0),
        cmd::CACHE => (Command::Cache, TransmissionFlags::SEND_CACHE, 0),
        cmd::WRITE_ZEROES => {
            let command = Command::WriteZeroes {
                fua: has(cmd_flag::FUA),
                no_hole: has(cmd_flag::NO_HOLE),
                fast: has(cmd_flag::FAST_ZERO),
            };
            let fast = if_offered(TransmissionFlags::SEND_FAST_ZERO, cmd_flag::FAST_ZERO);
            (command, TransmissionFlags::SEND_WRITE_ZEROES, cmd_flag::NO_HOLE | fast)
        }
        cmd::BLOCK_STATUS if agreed.allocation => {
            (Command::BlockStatus { one: has(cmd_flag::REQ_ONE) }, TransmissionFlags(0), cmd_flag::REQ_ONE)
        }
        cmd::BLOCK_STATUS => return Err("no metadata context was selected"),
        _ => return Err("unknown command"),
    };
    if !offered.has(needs) {
        return Err("a command that was not offered");
    }
    if agreed.framing == Framing::Extended && head.command == cmd::WRITE {
        known |= cmd_flag::PAYLOAD_LEN;
    }
    // "Clients may set FUA on all commands", once it was offered.
    known |= if_offered(TransmissionFlags::SEND_FUA, cmd_flag::FUA);
    if head.flags & !known != 0 {
        return Err("a flag that this command has not, or that was not offered");
    }
    Ok(command)
}

#[cfg(test)]
mod tests;
