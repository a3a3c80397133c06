//! `bdev_nbd_*`.

use std::time::Instant;

use engine::{App, MethodText};
use nbd_proto::wire::TransmissionFlags as Flag;
use reactor::Turn;
use rpc::{MethodTable, Responder, RpcError, States};
use serde::Deserialize;
use serde_json::{Value, json};

use super::create::{self, Create};
use super::drives::{DriveInfo, Drives};
use super::error::NbdError;
use super::subsystem::Loading;
use crate::bdev::reply::{answer, answer_true, error, known};

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method::<Create>(create::METHOD, States::RUNTIME, |app, p, r| {
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
        create::METHOD,
        "name",
        "Makes an export of an NBD server a bdev. Where it is: `uri` (nbd://host[:port]/export, nbds://, \
         nbd+unix:///export?socket=PATH, nbds+unix://), or `path` (a unix socket) or `traddr` (`trsvcid` 10809) with \
         `export`. Waits for the server; what prevents it is the error, and nothing stays, unless `keep_trying` is \
         set: then the device stays in state init and goes on trying. In a configuration file that is the default. \
         `dialect`: auto (default: as much as the server has, from oldstyle to extended headers), structured, simple, \
         newstyle (EXPORT_NAME only) or 1997, which has no handshake and needs the export's `size` in bytes \
         (`reply_magic` 2524202600). `connections` (as many as there are reactors, at most 4; up to 16) if the server \
         allows several. `tls`: off (default), allow or require (as nbds: does), with `tls_certificates`, a directory \
         with ca-cert.pem and perhaps client-cert.pem and client-key.pem (default: the system's authorities), \
         `tls_hostname`, and `tls_verify_peer` (true). Without a connection I/O waits: for ever with \
         `fast_io_fail_timeout_sec` 0 (default), else it fails after that time with ETIMEDOUT. After \
         `ctrlr_loss_timeout_sec` (-1, default: never) the device is given up and I/O fails with ENODEV until \
         bdev_nbd_reconnect. A server that does not answer for `io_timeout_sec` (0, default: never) is given up.",
    ),
    (
        "bdev_nbd_delete",
        "true",
        "Ends a device and closes its connections. -16 (EBUSY) if the bdev is in use; with `force` its users lose it.",
    ),
    (
        "bdev_nbd_get_devices",
        "[device]",
        "NBD devices: `state` is init (never open), open, closed (no connection) or deleted; what was agreed upon \
         with the server; and the connections.",
    ),
    (
        "bdev_nbd_reconnect",
        "name",
        "Connects a device that was given up, or is closed; waits for the result. -114 (EALREADY) if it is open.",
    ),
];

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
        "fast_io_fail_timeout_sec": d.params.timeouts.fast_io_fail.map_or(0, |t| t.as_secs()),
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
