//! What can be said about a device.

use std::path::PathBuf;
use std::time::Duration;

use nbd_proto::client::{Server, Tls, Wishes};
use nbd_proto::haggle::wire::MAX_STRING;
use nbd_proto::wire::{ORIGINAL_MAX_SIZE, ORIGINAL_REPLY_MAGIC};
use uuid::Uuid;

use super::error::NbdError;

/// Most connections of one device.
pub(super) const MAX_CONNECTIONS: u16 = 16;

/// How much of the protocol is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// Everything that the server offers.
    #[default]
    Auto,
    /// No extended headers.
    Structured,
    /// No replies in chunks either.
    Simple,
    /// No options but EXPORT_NAME, and STARTTLS.
    Newstyle,
    /// No handshake; 32-bit offsets, reads and writes only.
    Original,
}

impl Dialect {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Structured, Self::Simple, Self::Newstyle, Self::Original];

    /// As methods take it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Structured => "structured",
            Self::Simple => "simple",
            Self::Newstyle => "newstyle",
            Self::Original => "1997",
        }
    }

    /// What to ask a server for.
    pub(super) fn wishes(self, export: &str, tls: Tls) -> Wishes {
        Wishes {
            tls,
            extended: self == Self::Auto,
            structured: matches!(self, Self::Auto | Self::Structured),
            options: !matches!(self, Self::Newstyle | Self::Original),
            ..Wishes::new(export)
        }
    }
}

/// Encryption.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsParams {
    /// Whether.
    pub mode: Tls,
    /// Directory with `ca-cert.pem`, and perhaps `client-cert.pem` and `client-key.pem`; the system's authorities
    /// without.
    pub certificates: Option<PathBuf>,
    /// What the server's certificate must be for, in place of the host.
    pub hostname: Option<String>,
    /// Accept whoever answers.
    pub any_server: bool,
}

/// What happens when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From a failed attempt to the next.
    pub reconnect_delay: Duration,
    /// How long I/O waits without a connection; `None`: until there is one, or the device is given up.
    pub fast_io_fail: Option<Duration>,
    /// Without a connection for so long, the device is given up; `None`: never.
    pub ctrlr_loss: Option<Duration>,
    /// For an attempt to connect, handshake included.
    pub connect: Duration,
    /// A server that does not answer for so long is given up; `None`: one may wait for ever.
    pub io: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            reconnect_delay: Duration::from_secs(2),
            fast_io_fail: None,
            ctrlr_loss: None,
            connect: Duration::from_secs(10),
            io: None,
        }
    }
}

/// An export of a server, and how it is to be treated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdParams {
    /// Of the bdev.
    pub name: String,
    /// Where the server is.
    pub server: Server,
    /// Its name there; empty for the server's default.
    pub export: String,
    /// Of the bdev; random if absent.
    pub uuid: Option<Uuid>,
    /// How much of the protocol is used.
    pub dialect: Dialect,
    /// In 1997 only: of the export, bytes.
    pub size: Option<u64>,
    /// In 1997 only: the first word of replies.
    pub reply_magic: u32,
    /// Refuse changes, whatever the server allows.
    pub read_only: bool,
    /// As many, if the server allows more than one; `None`: as many as there are reactors, at most 4.
    pub connections: Option<u16>,
    /// Encryption.
    pub tls: TlsParams,
    /// What happens when.
    pub timeouts: Timeouts,
    /// A first attempt that fails is an ordinary loss, and the device stays.
    pub keep_trying: bool,
}

impl NbdParams {
    /// A device with everything else as it is by default.
    pub fn new(name: &str, server: Server, export: &str) -> Self {
        Self {
            name: name.into(),
            server,
            export: export.into(),
            uuid: None,
            dialect: Dialect::Auto,
            size: None,
            reply_magic: ORIGINAL_REPLY_MAGIC,
            read_only: false,
            connections: None,
            tls: TlsParams::default(),
            timeouts: Timeouts::default(),
            keep_trying: false,
        }
    }

    /// # Errors
    /// What can be seen to be wrong without asking anybody.
    pub(super) fn check(&self) -> Result<(), NbdError> {
        let wrong = |parameter, text: String| Err(NbdError::Invalid { parameter, text });
        if self.name.is_empty() {
            return wrong("name", "a bdev needs a name".into());
        }
        if self.export.len() > MAX_STRING || self.export.contains('\0') {
            return wrong("export", format!("use at most {MAX_STRING} bytes without NUL"));
        }
        if self.connections.is_some_and(|n| n == 0 || n > MAX_CONNECTIONS) {
            return wrong("connections", format!("use 1 to {MAX_CONNECTIONS}"));
        }
        self.check_dialect()?;
        self.timeouts.check()
    }

    fn check_dialect(&self) -> Result<(), NbdError> {
        let wrong = |parameter, text: String| Err(NbdError::Invalid { parameter, text });
        let original = self.dialect == Dialect::Original;
        match self.size {
            None if original => {
                return wrong("size", "a server of 1997 does not tell it: give the bytes".into());
            }
            Some(_) if !original => {
                return wrong("size", "goes with dialect 1997 only: others tell it".into());
            }
            Some(size) if size == 0 || size > ORIGINAL_MAX_SIZE => {
                return wrong("size", format!("{size}: 1 to {ORIGINAL_MAX_SIZE} bytes are possible in 1997"));
            }
            _ => {}
        }
        if original && !self.export.is_empty() {
            return wrong("export", "servers of 1997 have no names: leave it out".into());
        }
        if original && self.tls.mode != Tls::Off {
            return wrong("tls", "servers of 1997 know no encryption".into());
        }
        Ok(())
    }
}

impl Timeouts {
    /// The relations that bdev_nvme checks (`bdev_nvme_check_io_error_resiliency_params`).
    fn check(&self) -> Result<(), NbdError> {
        let wrong = |parameter, text: &str| Err(NbdError::Invalid { parameter, text: text.into() });
        if self.reconnect_delay.is_zero() {
            return wrong("reconnect_delay_sec", "use at least 1");
        }
        if self.connect.is_zero() {
            return wrong("connect_timeout_sec", "use at least 1");
        }
        if self.ctrlr_loss.is_some_and(|loss| loss < self.reconnect_delay) {
            return wrong("ctrlr_loss_timeout_sec", "use -1 (never), or at least reconnect_delay_sec");
        }
        let Some(fast) = self.fast_io_fail else { return Ok(()) };
        if fast < self.reconnect_delay {
            return wrong("fast_io_fail_timeout_sec", "use 0 (never), or at least reconnect_delay_sec");
        }
        if self.ctrlr_loss.is_some_and(|loss| loss < fast) {
            return wrong("fast_io_fail_timeout_sec", "use at most ctrlr_loss_timeout_sec");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let good = NbdParams::new("d", Server::Unix("/s".into()), "x");
        assert!(good.check().is_ok());
        let with = |f: fn(&mut NbdParams)| {
            let mut p = good.clone();
            f(&mut p);
            p.check().expect_err("cannot be").to_string()
        };
        let original = |p: &mut NbdParams| {
            (p.dialect, p.size, p.export) = (Dialect::Original, Some(4096), String::new());
        };
        let mut old = good.clone();
        original(&mut old);
        assert!(old.check().is_ok());
        for (words, says) in [
            (with(|p| p.name.clear()), "name:"),
            (with(|p| p.export = "x".repeat(4097)), "export:"),
            (with(|p| p.connections = Some(0)), "connections: use 1 to 16"),
            (with(|p| p.connections = Some(17)), "connections:"),
            (with(|p| p.size = Some(4096)), "size: goes with dialect 1997"),
            (with(|p| p.dialect = Dialect::Original), "size: a server of 1997 does not tell it"),
            (with(|p| (p.dialect, p.size) = (Dialect::Original, Some((1 << 32) + 1))), "size: 4294967297"),
            (with(|p| (p.dialect, p.size) = (Dialect::Original, Some(512))), "export: servers of 1997"),
            (with(|p| p.timeouts.reconnect_delay = Duration::ZERO), "reconnect_delay_sec:"),
            (with(|p| p.timeouts.connect = Duration::ZERO), "connect_timeout_sec:"),
            (with(|p| p.timeouts.ctrlr_loss = Some(Duration::from_secs(1))), "ctrlr_loss_timeout_sec:"),
            (with(|p| p.timeouts.fast_io_fail = Some(Duration::from_secs(1))), "fast_io_fail_timeout_sec:"),
        ] {
            assert!(words.starts_with(says), "{words}");
        }
        old.tls.mode = Tls::Require;
        assert!(old.check().unwrap_err().to_string().contains("no encryption"));
    }

    #[test]
    fn dialects_ask_for_less_and_less() {
        let wishes = |d: Dialect| {
            let w = d.wishes("x", Tls::Off);
            (w.extended, w.structured, w.options)
        };
        assert_eq!(wishes(Dialect::Auto), (true, true, true));
        assert_eq!(wishes(Dialect::Structured), (false, true, true));
        assert_eq!(wishes(Dialect::Simple), (false, false, true));
        assert_eq!(wishes(Dialect::Newstyle), (false, false, false));
    }
}
