//! What a server may not do.

use super::MAX_ERRORS;
use crate::client::cover::MAX_RANGES;

/// What a server did after which nobody can trust its next byte. The connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// Not a reply, or one of another dialect.
    #[error("a reply begins with {found:#010x}, which is none of the dialect \"{dialect}\"")]
    Magic {
        /// As sent.
        found: u32,
        /// As agreed.
        dialect: &'static str,
    },
    /// An answer to nobody, or a second one.
    #[error("a reply to request {0:#x}, which is not in flight")]
    Cookie(u64),
    /// READ has to be answered in chunks.
    #[error("a simple reply to READ, after structured replies were agreed upon")]
    SimpleRead,
    /// Bits that nobody agreed upon.
    #[error("a chunk with the unknown flags {0:#x}")]
    Flags(u16),
    /// A type of chunk that this request has not.
    #[error("a chunk of type {kind:#x} in answer to {command}")]
    Kind {
        /// As sent.
        kind: u16,
        /// What is answered.
        command: &'static str,
    },
    /// A chunk whose length does not go with its type.
    #[error("a chunk of type {kind:#x} with {length} bytes")]
    Length {
        /// As sent.
        kind: u16,
        /// As sent.
        length: u64,
    },
    /// NONE ends a reply, so it must say so.
    #[error("an empty chunk that does not end its reply")]
    NotDone,
    /// The offset of an extended reply is that of its request.
    #[error("a chunk for the request at offset {asked} repeats {found} in its place")]
    Echo {
        /// Of the request.
        asked: u64,
        /// Of the reply.
        found: u64,
    },
    /// Data of other bytes than were asked for.
    #[error("{len} bytes at {offset} in answer to a READ of {asked_len} at {asked}")]
    Outside {
        /// Of the chunk.
        offset: u64,
        /// Of the chunk.
        len: u64,
        /// Of the request.
        asked: u64,
        /// Of the request.
        asked_len: u32,
    },
    /// Some bytes were answered twice.
    #[error("bytes of a READ are answered twice (again at {0})")]
    Overlap(u64),
    /// The answer is in more pieces than are kept track of.
    #[error("a READ answered in more than {MAX_RANGES} pieces out of order")]
    Fragments,
    /// The reply ends though bytes are missing.
    #[error("the answer to a READ ends before all of its {0} bytes came")]
    Missing(u32),
    /// An error that is none.
    #[error("an error chunk with error 0")]
    NoError,
    /// The text of an error does not fit its chunk.
    #[error("an error text of {text} bytes in a chunk of {length}")]
    Text {
        /// As sent.
        text: u16,
        /// As sent.
        length: u64,
    },
    /// One request failed too often.
    #[error("more than {MAX_ERRORS} errors in one reply")]
    Errors,
}
