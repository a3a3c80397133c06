//! What a handshake begins with, and how it ends.

use std::fmt;

use super::server::MAX_OPTIONS;
use super::wire::option_name;
#[cfg(doc)]
use super::{catalog::Export, wire::opt};
use crate::framing::Agreed;
use crate::wire::{ORIGINAL_MAX_SIZE, TransmissionFlags};

/// How the server introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How the handshake goes; the rest is for newstyle only.
    pub style: Style,
    /// Offer fixed newstyle. Without it a client can only choose by EXPORT_NAME.
    pub fixed_newstyle: bool,
    /// Offer to leave out the reserved zeroes after EXPORT_NAME.
    pub no_zeroes: bool,
    /// Answer LIST; otherwise a client must know the name of its export.
    pub list: bool,
    /// Offer structured replies and metadata contexts.
    pub structured: bool,
    /// Offer extended headers, and structured replies too.
    pub extended: bool,
    /// What STARTTLS means.
    pub tls: Tls,
}

/// How a handshake goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// Options, one of which chooses an export.
    #[default]
    Newstyle,
    /// The server tells of its only export, and that is all.
    Oldstyle,
    /// There is none: the client knows the size of the only export.
    Original {
        /// What replies begin with.
        reply_magic: u32,
    },
}

/// Whether options, and what follows, may or must go through TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tls {
    /// There is none (NOTLS).
    #[default]
    Off,
    /// As the client likes (SELECTIVETLS).
    Allow,
    /// Nothing is answered without it (FORCEDTLS).
    Require,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            style: Style::Newstyle,
            fixed_newstyle: true,
            no_zeroes: true,
            list: true,
            structured: true,
            extended: true,
            tls: Tls::Off,
        }
    }
}

/// The end of a handshake. Nothing is left to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Input that was not used is the first of the transmission phase.
    Transmission(Chosen),
    /// The client sent ABORT: close.
    Aborted,
    /// STARTTLS is acknowledged: the next byte is the first of a TLS handshake, and nothing that was read before may be
    /// left. After it, [`ServerHaggle::encrypted`](super::ServerHaggle::encrypted) goes on.
    StartTls,
}

/// What was agreed upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// [`Export::id`].
    pub export: u64,
    /// As told to the client.
    pub flags: TransmissionFlags,
    /// As told to the client, bytes.
    pub size: u64,
    /// How the client chose: [`opt::GO`], [`opt::EXPORT_NAME`], or 0 where there was nothing to choose.
    pub option: u32,
    /// How requests and replies look, and which contexts there are.
    pub agreed: Agreed,
}

/// Why a connection is closed without an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Client flags that nobody offered.
    ClientFlags(u32),
    /// No option starts like this.
    Magic(u64),
    /// A client that is not fixed newstyle may only send EXPORT_NAME.
    NotFixed {
        /// As sent.
        option: u32,
    },
    /// Too much to skip.
    TooLong {
        /// As sent.
        option: u32,
        /// Bytes of data.
        len: u32,
    },
    /// More than [`MAX_OPTIONS`].
    TooManyOptions,
    /// EXPORT_NAME for nothing that can be had: the name, and why.
    ExportName(String, String),
    /// A client that cannot name its export came to a listener that has none for it: why.
    NoExport(String),
    /// An export of so many bytes cannot be told to a client of this style.
    TooLarge {
        /// Bytes.
        size: u64,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClientFlags(flags) => {
                write!(f, "client flags {flags:#x} contain some that were not offered")
            }
            Self::Magic(word) => {
                write!(f, "{word:#018x} where an option begins with IHAVEOPT: no NBD client")
            }
            Self::NotFixed { option } => {
                let name = option_name(*option);
                write!(
                    f,
                    "{name} ({option}) from a client without fixed newstyle, which has EXPORT_NAME only"
                )
            }
            Self::TooLong { option, len } => write!(f, "{} ({option}) of {len} bytes", option_name(*option)),
            Self::TooManyOptions => write!(f, "more than {MAX_OPTIONS} options"),
            Self::NoExport(why) => write!(f, "no export for a client that cannot name one: {why}"),
            Self::TooLarge { size } => write!(
                f,
                "the export has {size} bytes; requests of 1997 have 32-bit offsets, so {ORIGINAL_MAX_SIZE} are the most"
            ),
            Self::ExportName(name, why) => {
                write!(f, "EXPORT_NAME for '{}': {why}", shown(name))
            }
        }
    }
}

impl std::error::Error for Error {}

/// A name from a client as it may appear in texts: printable, and not endless.
pub(super) fn shown(name: &str) -> String {
    let end = name.floor_char_boundary(256);
    let dots = if end < name.len() { "…" } else { "" };
    format!("{}{dots}", name[..end].escape_debug())
}
