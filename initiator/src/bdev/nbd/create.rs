//! `bdev_nbd_create`: its parameters, and the call that makes a device again.

use std::path::PathBuf;
use std::time::Duration;

use nbd_proto::client::{Server, Tls, Uri};
use nbd_proto::haggle::wire::NBD_PORT;
use nbd_proto::wire::ORIGINAL_REPLY_MAGIC;
use rpc::RpcError;
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::drives::DriveInfo;
use super::params::{Dialect, NbdParams, Timeouts, TlsParams};
use crate::bdev::reply::{self, known};

pub(super) const METHOD: &str = "bdev_nbd_create";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Create {
    name: String,
    uri: Option<String>,
    path: Option<String>,
    traddr: Option<String>,
    trsvcid: Option<String>,
    export: Option<String>,
    uuid: Option<Uuid>,
    dialect: Option<String>,
    size: Option<u64>,
    reply_magic: Option<u32>,
    read_only: Option<bool>,
    connections: Option<u16>,
    tls: Option<TlsMode>,
    tls_certificates: Option<PathBuf>,
    tls_hostname: Option<String>,
    tls_verify_peer: Option<bool>,
    reconnect_delay_sec: Option<u32>,
    ctrlr_loss_timeout_sec: Option<i64>,
    fast_io_fail_timeout_sec: Option<u32>,
    connect_timeout_sec: Option<u32>,
    io_timeout_sec: Option<u32>,
    keep_trying: Option<bool>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TlsMode {
    Off,
    Allow,
    Require,
}

impl From<TlsMode> for Tls {
    fn from(mode: TlsMode) -> Self {
        match mode {
            TlsMode::Off => Self::Off,
            TlsMode::Allow => Self::Allow,
            TlsMode::Require => Self::Require,
        }
    }
}

/// Seconds of which 0 means that there is no such time.
fn seconds(n: u32) -> Option<Duration> {
    (n > 0).then(|| Duration::from_secs(n.into()))
}

impl Create {
    /// `loading`: the configuration file makes the call.
    pub fn params(self, loading: bool) -> Result<NbdParams, RpcError> {
        let (server, export, mut tls) = self.place()?;
        let timeouts = self.timeouts()?;
        if let Some(mode) = self.tls {
            // A URI that asks for encryption is not overruled.
            tls.mode = if tls.mode == Tls::Require { Tls::Require } else { mode.into() };
        }
        tls.certificates = self.tls_certificates.or(tls.certificates);
        tls.hostname = self.tls_hostname.or(tls.hostname);
        tls.any_server = self.tls_verify_peer.map_or(tls.any_server, |verify| !verify);
        let dialect = match self.dialect.as_deref() {
            None => Dialect::Auto,
            Some(name) => Dialect::ALL.into_iter().find(|d| d.name() == name).ok_or_else(|| {
                let names = Dialect::ALL.map(Dialect::name).join(", ");
                invalid("dialect", format!("'{name}': use one of {names}"))
            })?,
        };
        Ok(NbdParams {
            uuid: self.uuid,
            dialect,
            size: self.size,
            reply_magic: self.reply_magic.unwrap_or(ORIGINAL_REPLY_MAGIC),
            read_only: self.read_only.unwrap_or(false),
            connections: self.connections,
            tls,
            timeouts,
            keep_trying: self.keep_trying.unwrap_or(loading),
            ..NbdParams::new(&self.name, server, &export)
        })
    }

    /// Where the server is, what of it, and what a URI says of encryption.
    fn place(&self) -> Result<(Server, String, TlsParams), RpcError> {
        let (tls, export) = (TlsParams::default(), self.export.clone());
        match (&self.uri, &self.path, &self.traddr) {
            (Some(_), None, None) if export.is_some() => Err(invalid("export", "it is part of the uri")),
            (Some(uri), None, None) => {
                let uri = Uri::parse(uri).map_err(|e| invalid("uri", e.to_string()))?;
                let tls = TlsParams {
                    mode: if uri.tls { Tls::Require } else { Tls::Off },
                    certificates: uri.tls_certificates.map(PathBuf::from),
                    hostname: uri.tls_hostname,
                    any_server: !uri.tls_verify_peer,
                };
                Ok((uri.server, uri.export, tls))
            }
            (None, Some(path), None) => Ok((Server::Unix(path.clone()), export.unwrap_or_default(), tls)),
            (None, None, Some(host)) => {
                let port = match self.trsvcid.as_deref() {
                    None => NBD_PORT,
                    Some(text) => text.parse().map_err(|_| {
                        invalid("trsvcid", format!("'{text}': use a port number such as \"{NBD_PORT}\""))
                    })?,
                };
                Ok((Server::Tcp { host: host.clone(), port }, export.unwrap_or_default(), tls))
            }
            _ => Err(invalid("uri", "give one of uri, path and traddr")),
        }
    }

    fn timeouts(&self) -> Result<Timeouts, RpcError> {
        let d = Timeouts::default();
        let of = |n: Option<u32>, default| n.map_or(default, |n| Duration::from_secs(n.into()));
        let loss = self.ctrlr_loss_timeout_sec.map(|n| match n {
            -1 => Ok(None),
            _ => u32::try_from(n)
                .map(|n| Some(Duration::from_secs(n.into())))
                .map_err(|_| invalid("ctrlr_loss_timeout_sec", "use -1 (never give up), or seconds")),
        });
        Ok(Timeouts {
            reconnect_delay: of(self.reconnect_delay_sec, d.reconnect_delay),
            fast_io_fail: self.fast_io_fail_timeout_sec.and_then(seconds),
            ctrlr_loss: loss.unwrap_or(Ok(None))?,
            connect: of(self.connect_timeout_sec, d.connect),
            io: self.io_timeout_sec.and_then(seconds),
        })
    }
}

/// The call that makes this device again.
pub(super) fn call(d: &DriveInfo) -> Value {
    let (p, t) = (&d.params, &d.params.timeouts);
    let seconds = |t: Option<Duration>| t.map_or(0, |t| t.as_secs());
    let mut params = json!({
        "name": p.name, "export": p.export, "dialect": p.dialect.name(), "read_only": p.read_only,
        "tls": tls_name(p.tls.mode), "tls_verify_peer": !p.tls.any_server,
        "reconnect_delay_sec": t.reconnect_delay.as_secs(),
        "fast_io_fail_timeout_sec": seconds(t.fast_io_fail),
        "ctrlr_loss_timeout_sec": t.ctrlr_loss.map_or(-1, |t| t.as_secs() as i64),
        "connect_timeout_sec": t.connect.as_secs(),
        "io_timeout_sec": seconds(t.io),
        "tls_certificates": p.tls.certificates, "tls_hostname": p.tls.hostname,
        "uuid": p.uuid, "connections": p.connections, "size": p.size,
    });
    match &p.server {
        Server::Unix(path) => params["path"] = path.as_str().into(),
        Server::Tcp { host, port } => {
            params["traddr"] = host.as_str().into();
            params["trsvcid"] = port.to_string().into();
        }
    }
    if p.dialect == Dialect::Original {
        params["reply_magic"] = p.reply_magic.into();
    }
    json!({"method": METHOD, "params": known(params)})
}

fn tls_name(tls: Tls) -> &'static str {
    match tls {
        Tls::Off => "off",
        Tls::Allow => "allow",
        Tls::Require => "require",
    }
}

fn invalid(param: &str, text: impl Into<String>) -> RpcError {
    reply::invalid(METHOD, param, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(params: Value) -> Result<NbdParams, RpcError> {
        serde_json::from_value::<Create>(params).unwrap().params(false)
    }

    #[test]
    fn what_is_saved_makes_the_same_device() {
        for params in [
            json!({"name": "d", "uri": "nbd://h/x"}),
            json!({"name": "d", "uri": "nbds+unix:///x?socket=/s&tls-certificates=/c&tls-verify-peer=0"}),
            json!({"name": "d", "traddr": "fd00::1", "trsvcid": "9", "dialect": "1997", "size": 4096, "reply_magic": 7}),
            json!({"name": "d", "path": "/s", "export": "e", "uuid": "7f5a2b4e-9b1c-4a5e-8f64-0a1b2c3d4e5f",
                "dialect": "simple", "read_only": true, "connections": 3, "tls": "allow", "tls_hostname": "h",
                "reconnect_delay_sec": 3, "ctrlr_loss_timeout_sec": 60, "fast_io_fail_timeout_sec": 5,
                "connect_timeout_sec": 4, "io_timeout_sec": 30}),
        ] {
            let first = parse(params.clone()).unwrap();
            let info = DriveInfo {
                params: first.clone(),
                state: "init",
                last_error: None,
                given_up: false,
                agreed: None,
                bdev: None,
                connections: Vec::new(),
            };
            let saved = call(&info);
            assert_eq!(saved["method"], METHOD);
            assert_eq!(parse(saved["params"].clone()).unwrap(), first, "{params}");
        }
    }

    #[test]
    fn encryption_is_never_overruled() {
        let p = parse(json!({"name": "d", "uri": "nbds://h/x", "tls": "off"})).unwrap();
        assert_eq!(p.tls.mode, Tls::Require);
        let p = parse(json!({"name": "d", "uri": "nbd://h/x", "tls": "require"})).unwrap();
        assert_eq!((p.tls.mode, p.server.to_string()), (Tls::Require, "h:10809".into()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (more, says) in [
            (json!({}), "uri: give one of uri, path and traddr"),
            (json!({"uri": "nbd://h", "path": "/s"}), "give one of"),
            (json!({"uri": "nbd://h/x", "export": "x"}), "export: it is part of the uri"),
            (json!({"uri": "http://h"}), "uri: 'http://h'"),
            (json!({"traddr": "h", "trsvcid": "nbd"}), "trsvcid: 'nbd'"),
            (json!({"path": "/s", "dialect": "old"}), "dialect: 'old': use one of auto, structured"),
            (json!({"path": "/s", "ctrlr_loss_timeout_sec": -2}), "ctrlr_loss_timeout_sec: use -1"),
        ] {
            let mut params = json!({"name": "d"});
            params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let e = parse(params).expect_err(says);
            assert!(e.message.contains(says), "{}", e.message);
        }
    }
}
