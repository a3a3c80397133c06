//! `bdev_nbd_*`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use engine::{App, MethodText};
use nbd_proto::client::{Server, Tls, Uri};
use nbd_proto::haggle::wire::NBD_PORT;
use nbd_proto::wire::{ORIGINAL_REPLY_MAGIC, TransmissionFlags as Flag};
use reactor::Turn;
use rpc::{MethodTable, Responder, RpcError, States};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::drives::{Done, DriveInfo, Drives};
use super::error::NbdError;
use super::params::{Dialect, NbdParams, Timeouts, TlsParams};
use super::subsystem::Loading;

const CREATE: &str = "bdev_nbd_create";

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method::<Create>(CREATE, States::RUNTIME, |app, p, r| {
        let loading = app.state::<Loading>().is_some_and(|l| l.borrow().0);
        match p.params(loading) {
            Ok(params) => with(app, r, move |drives, cx, r| drives.create(cx, params, answer(r))),
            Err(e) => r.err(e),
        }
    });
    t.method::<Delete>("bdev_nbd_delete", States::RUNTIME, |app, p, r| {
        with(app, r, move |drives, cx, r| drives.delete(cx, &p.name, p.force, answer_true(r)));
    });
    t.method::<Name>("bdev_nbd_reconnect", States::RUNTIME, |app, p, r| {
        with(app, r, move |drives, cx, r| drives.reconnect(cx, &p.name, answer(r)));
    });
    t.method_sync::<MaybeName, _>("bdev_nbd_get_devices", States::RUNTIME, |app, p| {
        let drives = app.state::<Drives>().ok_or_else(none)?;
        let rows: Vec<Value> =
            drives.borrow().devices(Instant::now(), p.name.as_deref()).iter().map(row).collect();
        match p.name {
            Some(name) if rows.is_empty() => Err(error("bdev_nbd_get_devices", &NbdError::NoDevice(name))),
            _ => Ok(rows),
        }
    });
}

pub(super) const TEXTS: &[MethodText] = &[
    (
        CREATE,
        "name",
        "Makes an export of an NBD server a bdev. Where it is: `uri` (nbd://host[:port]/export, nbds://, \
         nbd+unix:///export?socket=PATH, nbds+unix://), or `path` (a unix socket) or `traddr` (`trsvcid` 10809) with \
         `export`. Waits for the server; what prevents it is the error, and nothing stays, unless `keep_trying` is set: then \
         the device stays in state init and goes on trying. In a configuration file that is the default. `dialect`: auto \
         (default: as much as the server has, from oldstyle to extended headers), structured, simple, newstyle (EXPORT_NAME \
         only) or 1997, which has no handshake and needs the export's `size` in bytes (`reply_magic` 2524202600). \
         `connections` (as many as there are reactors, at most 4; up to 16) if the server allows several. `tls`: off \
         (default), allow or require (as nbds: does), with `tls_certificates`, a directory with ca-cert.pem and perhaps \
         client-cert.pem and client-key.pem (default: the system's authorities), `tls_hostname`, and `tls_verify_peer` \
         (true). Without a connection I/O waits: for ever with `fast_io_fail_timeout_sec` 0 (default), else it fails after \
         that time with ETIMEDOUT. After `ctrlr_loss_timeout_sec` (-1, default: never) the device is given up and I/O fails \
         with ENODEV until bdev_nbd_reconnect. A server that does not answer for `io_timeout_sec` (0, default: never) is \
         given up.",
    ),
    (
        "bdev_nbd_delete",
        "true",
        "Ends a device and closes its connections. -16 (EBUSY) if the bdev is in use; with `force` its users lose it.",
    ),
    (
        "bdev_nbd_get_devices",
        "[device]",
        "NBD devices: `state` is init (never open), open, closed (no connection) or deleted; what was agreed upon with the \
         server; and the connections.",
    ),
    (
        "bdev_nbd_reconnect",
        "name",
        "Connects a device that was given up, or is closed; waits for the result. -114 (EALREADY) if it is open.",
    ),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MaybeName {
    name: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Delete {
    name: String,
    #[serde(default)]
    force: bool,
}

/// Seconds of which 0 means that there is no such time.
fn seconds(n: u32) -> Option<Duration> {
    (n > 0).then(|| Duration::from_secs(n.into()))
}

impl Create {
    /// `loading`: the configuration file makes the call.
    fn params(self, loading: bool) -> Result<NbdParams, RpcError> {
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
pub(super) fn create(d: &DriveInfo) -> Value {
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
    json!({"method": CREATE, "params": known(params)})
}

fn tls_name(tls: Tls) -> &'static str {
    match tls {
        Tls::Off => "off",
        Tls::Allow => "allow",
        Tls::Require => "require",
    }
}

/// Drops what is not known.
fn known(value: Value) -> Value {
    match value {
        Value::Object(all) => all.into_iter().filter(|(_, v)| !v.is_null()).collect::<Map<_, _>>().into(),
        other => other,
    }
}

fn row(d: &DriveInfo) -> Value {
    let connections: Vec<Value> = d
        .connections
        .iter()
        .map(|c| {
            known(json!({
                "state": if c.up.is_some() { "connected" } else { "connecting" },
                "reactor": c.reactor,
                "address": c.up.as_ref().map(|(address, _)| address.to_string()),
                "connected_ms": c.up.as_ref().map(|(_, since)| since.as_millis() as u64),
                "cipher": c.cipher,
                "reconnects": c.reconnects,
            }))
        })
        .collect();
    let a = d.agreed.as_ref();
    let has = |flag| a.map(|a| a.flags.has(flag));
    known(json!({
        "name": d.params.name,
        "state": d.state,
        "server": d.params.server.to_string(),
        "export": d.params.export,
        "given_up": d.given_up,
        "last_error": d.last_error,
        "handshake": a.map(|a| a.style),
        "dialect": a.map(|a| a.framing.name()),
        "tls": a.map(|a| a.tls),
        "size": a.map(|a| a.size),
        "num_blocks": d.bdev.as_ref().map(|(_, blocks)| blocks),
        "block_size": d.bdev.as_ref().map(|(b, _)| b.block_size),
        "physical_block_size": d.bdev.as_ref().map(|(b, _)| b.physical_block_size),
        "read_only": d.bdev.as_ref().map(|(b, _)| b.read_only),
        "uuid": d.bdev.as_ref().map(|(b, _)| b.uuid),
        "max_payload": a.and_then(|a| a.sizes).map(|s| s.max_payload),
        "flush": has(Flag::SEND_FLUSH),
        "fua": has(Flag::SEND_FUA),
        "trim": has(Flag::SEND_TRIM),
        "write_zeroes": has(Flag::SEND_WRITE_ZEROES),
        "rotational": has(Flag::ROTATIONAL),
        "multi_conn": has(Flag::CAN_MULTI_CONN),
        "connections": connections,
    }))
}

/// Runs `f` with the reactor's context, soon.
fn with(app: &App, r: Responder, f: impl FnOnce(&mut Drives, &mut Turn<'_>, Responder) + Send + 'static) {
    app.later(move |app, cx| match app.state::<Drives>() {
        Some(drives) => f(&mut drives.borrow_mut(), cx, r),
        None => r.err(none()),
    });
}

fn none() -> RpcError {
    RpcError::internal("bdev_nbd is not initialised yet")
}

fn answer<T: Serialize + 'static>(r: Responder) -> Done<T> {
    Box::new(move |result| {
        let method = r.method().to_owned();
        r.reply(result.map_err(|e| error(&method, &e)));
    })
}

fn answer_true(r: Responder) -> Done<()> {
    Box::new(move |result| {
        let method = r.method().to_owned();
        r.reply(result.map(|()| true).map_err(|e| error(&method, &e)));
    })
}

fn error(method: &str, e: &NbdError) -> RpcError {
    let error = match e {
        NbdError::Invalid { parameter, .. } => {
            RpcError::invalid_params(format!("{method}: {e}")).param(parameter)
        }
        _ => RpcError::errno(e.errno(), format!("{method}: {e}")),
    };
    let error = error.method(method);
    match e.hint() {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

fn invalid(param: &str, text: impl Into<String>) -> RpcError {
    RpcError::invalid_params(format!("{CREATE}: {param}: {}", text.into())).method(CREATE).param(param)
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
            let saved = create(&info);
            assert_eq!(saved["method"], CREATE);
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
