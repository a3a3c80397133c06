//! Requests, and their heads in every dialect.

use zerocopy::IntoBytes;

use crate::framing::Framing;
use crate::wire::{
    EXTENDED_REQUEST_MAGIC, ExtendedRequest, ORIGINAL_REQUEST_MAGIC, OriginalRequest, REQUEST_MAGIC,
    RequestHeader, cmd, cmd_flag,
};

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Data from the export.
    Read,
    /// Data to the export; they follow the head.
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
    /// The range becomes zeroes.
    WriteZeroes {
        /// Stable before the answer.
        fua: bool,
        /// The space stays allocated.
        no_hole: bool,
    },
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// What to do.
    pub command: Command,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
    /// Comes back in [`Event::Done`](super::Event::Done); no meaning here.
    pub token: u64,
}

/// Head of a request, to be sent in front of a write's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    bytes: [u8; 32],
    len: u8,
}

impl Head {
    fn of(message: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes[..message.len()].copy_from_slice(message);
        Self { bytes, len: message.len() as u8 }
    }

    /// DISC, after which the server closes the connection; nothing in 1997, when one just went.
    pub fn disconnect(framing: Framing) -> Self {
        encode(framing, cmd::DISC, 0, 0, 0, 0)
    }
}

impl std::ops::Deref for Head {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Number and flags of a command.
pub(super) fn words(command: Command) -> (u16, u16) {
    let flag = |on, bit| if on { bit } else { 0 };
    match command {
        Command::Read => (cmd::READ, 0),
        Command::Write { fua } => (cmd::WRITE, flag(fua, cmd_flag::FUA)),
        Command::Flush => (cmd::FLUSH, 0),
        Command::Trim { fua } => (cmd::TRIM, flag(fua, cmd_flag::FUA)),
        Command::WriteZeroes { fua, no_hole } => {
            (cmd::WRITE_ZEROES, flag(fua, cmd_flag::FUA) | flag(no_hole, cmd_flag::NO_HOLE))
        }
    }
}

/// The head of a request.
pub(super) fn encode(framing: Framing, command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Head {
    match framing {
        Framing::Original { .. } if command == cmd::DISC => Head::of(&[]),
        Framing::Original { .. } => Head::of(
            OriginalRequest {
                magic: ORIGINAL_REQUEST_MAGIC.into(),
                // The range ends at 2^32 at most, so its first byte is below, unless it is empty.
                from: (offset as u32).into(),
                len: len.into(),
                handle: cookie.into(),
                kind: u32::from(command).into(),
            }
            .as_bytes(),
        ),
        Framing::Simple | Framing::Structured => Head::of(
            RequestHeader {
                magic: REQUEST_MAGIC.into(),
                flags: flags.into(),
                command: command.into(),
                cookie: cookie.into(),
                offset: offset.into(),
                length: len.into(),
            }
            .as_bytes(),
        ),
        Framing::Extended => {
            let payload = if command == cmd::WRITE { cmd_flag::PAYLOAD_LEN } else { 0 };
            Head::of(
                ExtendedRequest {
                    magic: EXTENDED_REQUEST_MAGIC.into(),
                    flags: (flags | payload).into(),
                    command: command.into(),
                    cookie: cookie.into(),
                    offset: offset.into(),
                    length: u64::from(len).into(),
                }
                .as_bytes(),
            )
        }
    }
}
