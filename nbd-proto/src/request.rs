//! From a header to a request that fits its export.
//!
//! Checked in this order, which is the specification's ("Request types", "Error values") where it has one:
//!
//! | what                                              | answer                                    |
//! |---------------------------------------------------|-------------------------------------------|
//! | unknown command, or one that was not offered      | EINVAL                                    |
//! | a flag that the command has not, or not offered   | EINVAL                                    |
//! | a change of a read-only export                    | EPERM                                     |
//! | empty range; `FLUSH` with one                     | EINVAL                                    |
//! | not whole blocks                                  | EINVAL                                    |
//! | past the end                                      | ENOSPC if it writes, else EINVAL          |
//! | `READ` of more than the largest payload           | EINVAL (`WRITE`: the connection is closed) |

use std::fmt;

use crate::wire::{ErrorCode, RequestHeader, TransmissionFlags, cmd, cmd_flag};

/// The least that a server takes as payload of one request if block sizes were not negotiated ("Block size
/// constraints"), bytes.
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;

/// What requests are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Smallest unit of an access in bytes, a power of two.
    pub block_size: u32,
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
    len: u32,
}

/// A request that is answered with an error, and goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Of the request.
    pub cookie: u64,
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

    /// First byte of the range, a multiple of the export's block size.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the range, whole blocks, inside the export; 0 for `Flush` only.
    #[expect(clippy::len_without_is_empty, reason = "only a flush is empty")]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Bytes that the client sends after the header.
    pub fn payload_len(&self) -> u32 {
        if matches!(self.command, Command::Write { .. }) { self.len } else { 0 }
    }

    /// Checks a header whose magic is right and whose command is not `DISC`.
    ///
    /// # Errors
    /// What the answer must be. A refused `WRITE` is followed by its payload all the same.
    pub fn check(header: &RequestHeader, export: &Export) -> Result<Self, Refusal> {
        let refuse = |error, why| Err(Refusal { cookie: header.cookie.get(), error, why });
        let (command, offset, len) = match command_of(header, export.flags) {
            Ok(command) => (command, header.offset.get(), header.length.get()),
            Err(why) => return refuse(ErrorCode::Einval, why),
        };
        let request = Self { cookie: header.cookie.get(), command, offset, len };
        if command.modifies() && export.flags.has(TransmissionFlags::READ_ONLY) {
            return refuse(ErrorCode::Eperm, "the export is read-only");
        }
        if command == Command::Flush {
            let empty = offset == 0 && len == 0;
            return if empty { Ok(request) } else { refuse(ErrorCode::Einval, "FLUSH has no range") };
        }
        if len == 0 {
            return refuse(ErrorCode::Einval, "empty range");
        }
        let block = u64::from(export.block_size);
        if !offset.is_multiple_of(block) || !u64::from(len).is_multiple_of(block) {
            return refuse(ErrorCode::Einval, "not whole blocks");
        }
        if offset.checked_add(len.into()).is_none_or(|end| end > export.size) {
            let writes = matches!(command, Command::Write { .. } | Command::WriteZeroes { .. });
            return refuse(if writes { ErrorCode::Enospc } else { ErrorCode::Einval }, "past the end");
        }
        if command == Command::Read && len > export.max_payload {
            return refuse(ErrorCode::Einval, "more data than one request may have");
        }
        Ok(request)
    }
}

/// The command and its flags, if they were offered.
fn command_of(header: &RequestHeader, offered: TransmissionFlags) -> Result<Command, &'static str> {
    let flags = header.flags.get();
    let has = |bit| flags & bit != 0;
    let (command, needs, mut known) = match header.command.get() {
        cmd::READ => (Command::Read, TransmissionFlags(0), 0),
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
            let fast = offered.has(TransmissionFlags::SEND_FAST_ZERO);
            let known = cmd_flag::NO_HOLE | if fast { cmd_flag::FAST_ZERO } else { 0 };
            (command, TransmissionFlags::SEND_WRITE_ZEROES, known)
        }
        _ => return Err("unknown command"),
    };
    if !offered.has(needs) {
        return Err("a command that was not offered");
    }
    // "Clients may set FUA on all commands", once it was offered.
    if offered.has(TransmissionFlags::SEND_FUA) {
        known |= cmd_flag::FUA;
    }
    if flags & !known != 0 {
        return Err("a flag that this command has not, or that was not offered");
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::REQUEST_MAGIC;

    const ALL: TransmissionFlags = TransmissionFlags(0b1101_0111_1101);
    const EXPORT: Export = Export { size: 1 << 20, block_size: 512, max_payload: 65536, flags: ALL };

    fn header(command: u16, flags: u16, offset: u64, length: u32) -> RequestHeader {
        RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: 7.into(),
            offset: offset.into(),
            length: length.into(),
        }
    }

    fn check(
        export: Export,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
    ) -> Result<Request, ErrorCode> {
        Request::check(&header(command, flags, offset, length), &export).map_err(|r| {
            assert_eq!(r.cookie, 7);
            r.error
        })
    }

    #[test]
    fn every_command_and_its_flags() {
        let fua = cmd_flag::FUA;
        let zeroes = |fua, no_hole, fast| Command::WriteZeroes { fua, no_hole, fast };
        let cases = [
            (cmd::READ, 0, Command::Read),
            (cmd::READ, fua, Command::Read),
            (cmd::WRITE, 0, Command::Write { fua: false }),
            (cmd::WRITE, fua, Command::Write { fua: true }),
            (cmd::TRIM, fua, Command::Trim { fua: true }),
            (cmd::CACHE, 0, Command::Cache),
            (cmd::WRITE_ZEROES, 0, zeroes(false, false, false)),
            (cmd::WRITE_ZEROES, fua | cmd_flag::NO_HOLE, zeroes(true, true, false)),
            (cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, zeroes(false, false, true)),
        ];
        for (command, flags, wanted) in cases {
            let request = check(EXPORT, command, flags, 512, 1024).unwrap();
            assert_eq!((request.command(), request.offset(), request.len()), (wanted, 512, 1024));
            assert_eq!(request.payload_len(), if command == cmd::WRITE { 1024 } else { 0 });
        }
        assert_eq!(check(EXPORT, cmd::FLUSH, 0, 0, 0).unwrap().command(), Command::Flush);
    }

    #[test]
    fn unknown_commands_and_flags_are_einval() {
        let einval = Err(ErrorCode::Einval);
        for command in [cmd::BLOCK_STATUS, 8, 9, 0xffff] {
            assert_eq!(check(EXPORT, command, 0, 0, 512), einval);
        }
        for (command, flag) in [
            (cmd::READ, cmd_flag::DF),
            (cmd::READ, 1 << 15),
            (cmd::WRITE, cmd_flag::NO_HOLE),
            (cmd::WRITE_ZEROES, cmd_flag::REQ_ONE),
        ] {
            assert_eq!(check(EXPORT, command, flag, 0, 512), einval, "{command} {flag}");
        }
    }

    #[test]
    fn what_was_not_offered_is_einval() {
        let plain = Export { flags: TransmissionFlags::HAS_FLAGS, ..EXPORT };
        let einval = Err(ErrorCode::Einval);
        assert!(check(plain, cmd::WRITE, 0, 0, 512).is_ok());
        assert_eq!(check(plain, cmd::WRITE, cmd_flag::FUA, 0, 512), einval);
        for command in [cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES] {
            assert_eq!(check(plain, command, 0, 0, 512), einval);
        }
        assert_eq!(check(plain, cmd::FLUSH, 0, 0, 0), einval);
        let slow = Export { flags: TransmissionFlags::SEND_WRITE_ZEROES, ..EXPORT };
        assert_eq!(check(slow, cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 0, 512), einval);
    }

    #[test]
    fn changes_of_a_read_only_export_are_eperm() {
        let ro = Export { flags: ALL | TransmissionFlags::READ_ONLY, ..EXPORT };
        for command in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
            assert_eq!(check(ro, command, 0, 0, 512), Err(ErrorCode::Eperm));
        }
        assert!(check(ro, cmd::READ, 0, 0, 512).is_ok() && check(ro, cmd::FLUSH, 0, 0, 0).is_ok());
    }

    #[test]
    fn ranges_are_whole_blocks_inside() {
        let end = EXPORT.size;
        assert!(check(EXPORT, cmd::READ, 0, end - 512, 512).is_ok());
        for (command, error) in [
            (cmd::READ, ErrorCode::Einval),
            (cmd::TRIM, ErrorCode::Einval),
            (cmd::WRITE, ErrorCode::Enospc),
            (cmd::WRITE_ZEROES, ErrorCode::Enospc),
        ] {
            for (offset, len) in [(end - 512, 1024), (end, 512), (u64::MAX - 511, 512), (!511, 0xffff_fe00)] {
                assert_eq!(check(EXPORT, command, 0, offset, len), Err(error), "{command} {offset}+{len}");
            }
        }
        for (offset, len) in [(0, 0), (1, 512), (0, 511), (256, 256)] {
            assert_eq!(check(EXPORT, cmd::READ, 0, offset, len), Err(ErrorCode::Einval));
        }
        assert_eq!(check(EXPORT, cmd::FLUSH, 0, 512, 0), Err(ErrorCode::Einval));
        assert_eq!(check(EXPORT, cmd::FLUSH, 0, 0, 512), Err(ErrorCode::Einval));
    }

    #[test]
    fn only_data_is_limited_by_the_payload() {
        assert!(check(EXPORT, cmd::READ, 0, 0, 65536).is_ok());
        assert_eq!(check(EXPORT, cmd::READ, 0, 0, 65536 + 512), Err(ErrorCode::Einval));
        assert!(check(EXPORT, cmd::WRITE_ZEROES, 0, 0, 1 << 20).is_ok());
        assert!(check(EXPORT, cmd::TRIM, 0, 0, 1 << 20).is_ok());
    }
}
