//! How a listener speaks: with whom, and whether in the clear.

use std::path::PathBuf;
use std::sync::Arc;

use nbd_poll::listener::AcceptorOptions;
use nbd_poll::tls::server::server_config;
use nbd_proto::haggle::{Settings, Style, Tls};
use nbd_proto::wire::{ORIGINAL_MAX_SIZE, ORIGINAL_REPLY_MAGIC};
use rustls::ServerConfig;
use serde::{Deserialize, Serialize};

use super::error::ServerError;
use super::server::Options;

/// How a listener introduces itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Dialect {
    /// What serves most clients: fixed newstyle.
    #[default]
    Auto,
    /// Fixed newstyle, which clients of newstyle understand, too.
    Fixed,
    /// Newstyle: clients choose by EXPORT_NAME only.
    Newstyle,
    /// Oldstyle: one export, no options.
    Oldstyle,
    /// As in 1997: one export, no handshake, 32-bit offsets.
    #[serde(rename = "1997")]
    Original,
}

/// Whether clients may or must encrypt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum TlsMode {
    #[default]
    Off,
    Allow,
    Require,
}

/// What `nbd_server_add_listener` says besides the address and the export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Speech {
    pub(super) dialect: Dialect,
    /// Of 1997.
    pub(super) reply_magic: Option<u32>,
    pub(super) tls: TlsMode,
    /// Directory with `server-cert.pem`, `server-key.pem`, `ca-cert.pem`.
    pub(super) certificates: Option<PathBuf>,
    /// Clients must show a certificate.
    pub(super) verify_peer: bool,
}

fn wrong(param: &'static str, text: &str) -> ServerError {
    ServerError::Listener { param, text: text.into() }
}

impl Speech {
    /// The dialect has no options, by which a client could name an export or ask for TLS.
    pub(super) fn is_mute(&self) -> bool {
        matches!(self.dialect, Dialect::Oldstyle | Dialect::Original)
    }

    /// As the acceptor takes it. Reads the certificates.
    ///
    /// # Errors
    /// What does not fit together, or files that are not there.
    pub(super) fn options(&self, limits: &Options) -> Result<AcceptorOptions, ServerError> {
        if self.reply_magic.is_some() && self.dialect != Dialect::Original {
            return Err(wrong("reply_magic", "only replies of dialect 1997 have one to choose"));
        }
        let settings = Settings {
            style: match self.dialect {
                Dialect::Oldstyle => Style::Oldstyle,
                Dialect::Original => {
                    Style::Original { reply_magic: self.reply_magic.unwrap_or(ORIGINAL_REPLY_MAGIC) }
                }
                Dialect::Auto | Dialect::Fixed | Dialect::Newstyle => Style::Newstyle,
            },
            fixed_newstyle: self.dialect != Dialect::Newstyle,
            tls: match self.tls {
                TlsMode::Off => Tls::Off,
                TlsMode::Allow => Tls::Allow,
                TlsMode::Require => Tls::Require,
            },
            ..Settings::default()
        };
        Ok(AcceptorOptions {
            settings,
            tls: self.keys()?,
            timeout: limits.handshake_timeout,
            max_handshakes: limits.max_handshakes,
        })
    }

    fn keys(&self) -> Result<Option<Arc<ServerConfig>>, ServerError> {
        if self.tls == TlsMode::Off {
            return if self.certificates.is_some() || self.verify_peer {
                Err(wrong("tls", "certificates are of use with tls allow or require only"))
            } else {
                Ok(None)
            };
        }
        if self.is_mute() || self.dialect == Dialect::Newstyle {
            return Err(wrong("tls", "a dialect without STARTTLS has no TLS; use dialect fixed or auto"));
        }
        let Some(directory) = &self.certificates else {
            let text = "TLS needs a directory with server-cert.pem and server-key.pem";
            return Err(wrong("tls_certificates", text));
        };
        Ok(Some(server_config(directory, self.verify_peer)?))
    }

    /// Whether an export of `size` bytes can be had here.
    ///
    /// # Errors
    /// Its end has no offset in this dialect.
    pub(super) fn fits(&self, name: &str, size: u64) -> Result<(), ServerError> {
        if self.dialect == Dialect::Original && size > ORIGINAL_MAX_SIZE {
            let text = format!(
                "'{name}' has {size} bytes, and requests of dialect 1997 have 32-bit offsets: {ORIGINAL_MAX_SIZE} bytes \
                 are the most"
            );
            return Err(ServerError::Listener { param: "export", text });
        }
        Ok(())
    }
}
