//! Why a handshake came to nothing.

use std::fmt;

use super::{MAX_REPLIES, MAX_REPLY_DATA};
use crate::haggle::wire::{OPTION_REPLY_MAGIC, option_name, rep};

/// Why a handshake came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HaggleError {
    /// The first bytes are not those of an NBD server.
    NotNbd([u8; 8]),
    /// An NBD server of a style that nobody knows.
    Style(u64),
    /// A server that cannot do what is required.
    Lacks(&'static str),
    /// The server refused an option: which, with what, and in which words.
    Refused {
        /// The option.
        option: u32,
        /// Type of the reply.
        kind: u32,
        /// For people.
        text: String,
    },
    /// A reply does not begin like one.
    Magic(u64),
    /// A reply to something else.
    OtherOption {
        /// What was asked.
        asked: u32,
        /// What was answered.
        answered: u32,
    },
    /// A reply of a type that this option has not.
    Kind {
        /// The option.
        option: u32,
        /// Type of the reply.
        kind: u32,
    },
    /// A reply whose data cannot be.
    Data {
        /// The option.
        option: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// More data, or more replies, than one option needs.
    TooMuch {
        /// The option.
        option: u32,
    },
    /// GO was acknowledged without saying what the export is.
    NoExport,
    /// A size that no disk has.
    Size(u64),
}

impl fmt::Display for HaggleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotNbd(bytes) => {
                write!(f, "no NBD server: it begins with {:?}", String::from_utf8_lossy(bytes))
            }
            Self::Style(word) => write!(f, "an NBD server of an unknown style ({word:#018x})"),
            Self::Lacks(what) => write!(f, "the server {what}"),
            Self::Refused { option, kind, text } => {
                write!(f, "the server refuses {} with {}", option_name(*option), error_name(*kind))?;
                if text.is_empty() { Ok(()) } else { write!(f, ": {text}") }
            }
            Self::Magic(word) => {
                write!(f, "a reply begins with {word:#018x} instead of {OPTION_REPLY_MAGIC:#018x}")
            }
            Self::OtherOption { asked, answered } => {
                write!(
                    f,
                    "{} was asked, and {} ({answered}) answered",
                    option_name(*asked),
                    option_name(*answered)
                )
            }
            Self::Kind { option, kind } => {
                write!(f, "a reply of type {kind:#x} to {}, which has none such", option_name(*option))
            }
            Self::Data { option, what } => write!(f, "a reply to {}: {what}", option_name(*option)),
            Self::TooMuch { option } => {
                write!(
                    f,
                    "more than {MAX_REPLIES} replies, or {MAX_REPLY_DATA} bytes in one, to {}",
                    option_name(*option)
                )
            }
            Self::NoExport => f.write_str("the server acknowledged GO without the size of the export"),
            Self::Size(size) => write!(f, "an export of {size} bytes; at most {} are possible", i64::MAX),
        }
    }
}

impl std::error::Error for HaggleError {}

impl HaggleError {
    /// Trying again later may help: nothing is wrong but the time.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Refused { kind: rep::ERR_SHUTDOWN | rep::ERR_UNKNOWN | rep::ERR_POLICY, .. })
    }
}

/// The name of an error reply.
fn error_name(kind: u32) -> String {
    match kind {
        rep::ERR_UNSUP => "ERR_UNSUP".into(),
        rep::ERR_POLICY => "ERR_POLICY".into(),
        rep::ERR_INVALID => "ERR_INVALID".into(),
        rep::ERR_PLATFORM => "ERR_PLATFORM".into(),
        rep::ERR_TLS_REQD => "ERR_TLS_REQD (it wants TLS: use nbds:// or tls)".into(),
        rep::ERR_UNKNOWN => "ERR_UNKNOWN (it has no such export)".into(),
        rep::ERR_SHUTDOWN => "ERR_SHUTDOWN (it is about to end)".into(),
        rep::ERR_BLOCK_SIZE_REQD => "ERR_BLOCK_SIZE_REQD".into(),
        rep::ERR_TOO_BIG => "ERR_TOO_BIG".into(),
        rep::ERR_EXT_HEADER_REQD => "ERR_EXT_HEADER_REQD".into(),
        _ => format!("error {kind:#x}"),
    }
}
