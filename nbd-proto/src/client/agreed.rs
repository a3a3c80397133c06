//! What a client wants of a server, and what the two agree upon.

use crate::framing::Framing;
use crate::haggle::BlockSizes;
use crate::wire::TransmissionFlags;

/// Whether the connection is to be encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tls {
    /// STARTTLS is not sent.
    #[default]
    Off,
    /// Encrypted if the server can. Whoever sits in between can prevent it.
    Allow,
    /// Encrypted, or not at all.
    Require,
}

/// What a client asks for. What a server lacks is done without, except where it says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// Name of the export, at most 4096 bytes without NUL; empty for the server's default.
    pub export: String,
    /// Encryption.
    pub tls: Tls,
    /// 64-bit lengths (EXTENDED_HEADERS).
    pub extended: bool,
    /// Replies in chunks (STRUCTURED_REPLY); implied by `extended`.
    pub structured: bool,
    /// Metadata contexts to select; needs replies in chunks.
    pub contexts: Vec<String>,
    /// GO, which can say why not; otherwise EXPORT_NAME at once, and no other option.
    pub options: bool,
}

impl Wishes {
    /// Everything that this crate knows, without encryption.
    pub fn new(export: &str) -> Self {
        Self {
            export: export.into(),
            tls: Tls::Off,
            extended: true,
            structured: true,
            contexts: Vec::new(),
            options: true,
        }
    }
}

impl Framing {
    /// For people and RPC.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Original { .. } => "1997",
            Self::Simple => "simple",
            Self::Structured => "structured",
            Self::Extended => "extended",
        }
    }
}

/// The end of a handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// "oldstyle", "newstyle" (chosen by EXPORT_NAME), "fixed newstyle" (by GO).
    pub style: &'static str,
    /// The connection is encrypted.
    pub tls: bool,
    /// How requests and replies look.
    pub framing: Framing,
    /// Of the export, bytes, at most `i64::MAX`.
    pub size: u64,
    /// Of the export; none if the server knows no flags.
    pub flags: TransmissionFlags,
    /// What requests must respect, if the server said so.
    pub sizes: Option<BlockSizes>,
    /// Selected metadata contexts: number and name.
    pub contexts: Vec<(u32, String)>,
}
