//! RPC methods `nbd_server_*`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use engine::{App, MethodText};
use nbd_poll::listener::{Address, Peer};
use nbd_proto::haggle::wire::NBD_PORT;
use quota::Source;
use reactor::Turn;
use reactor::descriptors::Budget;
use rpc::{MethodTable, Responder, RpcError, States};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::allow::{Allow, AllowList};
use super::dialect::{Dialect, Speech, TlsMode};
use super::error::ServerError;
use super::server::{Connected, Listening, Options, Server};
use super::subsystem::server;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method_sync::<SetOptions, _>("nbd_server_set_options", States::STARTUP, |app, p| set_options(app, &p));
    t.method::<AddListener>("nbd_server_add_listener", States::RUNTIME, |app, p, r| {
        app.later(move |app, cx| r.reply(add_listener(app, cx, p)));
    });
    t.method::<RemoveListener>("nbd_server_remove_listener", States::RUNTIME, |app, p, r| {
        app.later(move |app, cx| r.reply(remove_listener(app, cx, &p)));
    });
    t.method_without_params("nbd_server_get_listeners", States::RUNTIME, |app, r| {
        r.reply(server(app).map(|s| s.borrow().listeners.iter().map(listener_row).collect::<Value>()));
    });
    t.method_without_params("nbd_server_get_limits", States::ANY, |app, r| {
        r.reply(server(app).map(|s| limits(&s.borrow())));
    });
    t.method_sync::<CreateExport, _>("nbd_server_create_export", States::RUNTIME, create_export);
    t.method::<ExportName>("nbd_server_delete_export", States::RUNTIME, |app, p, r| {
        app.later(move |app, cx| delete_export(app, cx, &p.name, r));
    });
    t.method_sync::<ExportFilter, _>("nbd_server_get_exports", States::RUNTIME, |app, p| {
        exports(app, p.name.as_deref())
    });
    t.method_sync::<ConnectionFilter, _>("nbd_server_get_connections", States::RUNTIME, |app, p| {
        connections(app, p.export.as_deref())
    });
    t.method::<ConnectionId>("nbd_server_disconnect", States::RUNTIME, |app, p, r| {
        app.later(move |app, cx| disconnect(app, cx, p.id, r));
    });
}

pub(super) const TEXTS: &[MethodText] = &[
    (
        "nbd_server_add_listener",
        "true",
        "Accepts NBD clients on a unix socket (`path`, mode 0600) or a TCP port (`traddr`; `trsvcid` 10809 if absent, 0: \
         a free one), or on a socket that systemd has opened, `activated` being its name or its number from 0 on. \
         `export`: for clients that do not name one; without it the only one there is. `dialect`: auto and \
         fixed are fixed newstyle (which serves clients of newstyle, too), newstyle lets clients choose by EXPORT_NAME \
         only; oldstyle and 1997 serve one export, the latter of at most 4 GiB and with `reply_magic` (0x96744668 if \
         absent) in its replies. `tls`: off, allow or require, with server-cert.pem and server-key.pem in the directory \
         `tls_certificates`; with `tls_verify_peer` clients must show a certificate of an authority in ca-cert.pem there.",
    ),
    (
        "nbd_server_create_export",
        "name",
        "Offers a bdev to NBD clients under `name`, on all listeners. With `read_only` clients cannot change it. \
         `allow`: for these clients only: `addr` (address or network, TCP), `uid` (user, unix sockets), `tls_cn` (common \
         name in the certificate, listeners with `tls_verify_peer`); what one entry has must hold together.",
    ),
    (
        "nbd_server_delete_export",
        "true",
        "Ends an export: requests in flight are answered, its connections closed; answers then.",
    ),
    (
        "nbd_server_disconnect",
        "true",
        "Closes a connection when its requests in flight are answered. The client may connect again.",
    ),
    (
        "nbd_server_get_connections",
        "[connection]",
        "Clients in the transmission phase: who, since when, what of, on which reactor, and how much.",
    ),
    (
        "nbd_server_get_exports",
        "[export]",
        "Exports, with their size now and how many connections they have.",
    ),
    (
        "nbd_server_get_limits",
        "limits",
        "How many connections and handshakes there may be, as set and as the limit of open files allows, and there are; \
         `sources`: those with most connections; `turned`: clients that found no room (`away`), took too long to choose \
         (`late`), made room for others meanwhile (`displaced`), or were ended because they did not go on (`out`); \
         `descriptors`: the limit of open files, what strangers never get of it (`reserve`), and the NBD server's share.",
    ),
    ("nbd_server_get_listeners", "[listener]", "Addresses that accept, and how many clients haggle there."),
    ("nbd_server_remove_listener", "true", "Stops accepting on an address; connections stay."),
    (
        "nbd_server_set_options",
        "true",
        "Limits of the NBD server: connections in all (`max_connections`, 1024), of which a source may have as many as it \
         leaves for others (from 8 on, of three quarters; an eighth is for sources that allow lists name, one for those that \
         came first, two connections each); handshakes at once on one listener (`max_handshakes`, 64), where one more takes the place of one of \
         the source that has most; how long a client may take to choose an export, whatever it sends (`handshake_timeout_ms`, \
         10000); how long it may send nothing of a request that it has begun (`stall_timeout_ms`, 30000); and how much it must \
         send or read of what holds memory that others wait for (`min_progress_kib`, 1024) in so long a time \
         (`progress_time_ms`, 10000), `min_progress_kib` 0 being enough if it is anything. A source is an address of IPv4, a \
         /64 of IPv6, a user of this host. Where the limit of open files has not enough, there are fewer: nbd_server_get_limits. \
         What is absent stays.",
    ),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetOptions {
    max_connections: Option<u32>,
    max_handshakes: Option<u32>,
    handshake_timeout_ms: Option<u32>,
    stall_timeout_ms: Option<u32>,
    min_progress_kib: Option<u32>,
    progress_time_ms: Option<u32>,
}

fn set_options(app: &App, p: &SetOptions) -> Result<bool, RpcError> {
    const METHOD: &str = "nbd_server_set_options";
    for (name, value) in [
        ("max_connections", p.max_connections),
        ("max_handshakes", p.max_handshakes),
        ("handshake_timeout_ms", p.handshake_timeout_ms),
        ("stall_timeout_ms", p.stall_timeout_ms),
        ("progress_time_ms", p.progress_time_ms),
    ] {
        if value == Some(0) {
            return Err(invalid(METHOD, name, &format!("{name} must be at least 1")));
        }
    }
    let server = server(app)?;
    let options = &mut server.borrow_mut().options;
    let number = |new: Option<u32>, old: usize| new.map_or(old, |n| n as usize);
    options.max_connections = number(p.max_connections, options.max_connections);
    options.max_handshakes = number(p.max_handshakes, options.max_handshakes);
    if let Some(ms) = p.handshake_timeout_ms {
        options.handshake_timeout = Duration::from_millis(ms.into());
    }
    if let Some(ms) = p.stall_timeout_ms {
        options.stall_timeout = Duration::from_millis(ms.into());
    }
    if let Some(kib) = p.min_progress_kib {
        options.rate.bytes = (u64::from(kib) << 10).max(1);
    }
    if let Some(ms) = p.progress_time_ms {
        options.rate.time = Duration::from_millis(ms.into());
    }
    Ok(true)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddListener {
    path: Option<PathBuf>,
    adrfam: Option<String>,
    traddr: Option<String>,
    trsvcid: Option<String>,
    activated: Option<String>,
    #[serde(default)]
    dialect: Dialect,
    export: Option<String>,
    reply_magic: Option<u32>,
    #[serde(default)]
    tls: TlsMode,
    tls_certificates: Option<PathBuf>,
    #[serde(default)]
    tls_verify_peer: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RemoveListener {
    path: Option<PathBuf>,
    adrfam: Option<String>,
    traddr: Option<String>,
    trsvcid: Option<String>,
}

fn add_listener(app: &App, cx: &mut Turn<'_>, p: AddListener) -> Result<bool, RpcError> {
    const METHOD: &str = "nbd_server_add_listener";
    let server = server(app)?;
    let speech = Speech {
        dialect: p.dialect,
        reply_magic: p.reply_magic,
        tls: p.tls,
        certificates: p.tls_certificates,
        verify_peer: p.tls_verify_peer,
    };
    let place = (p.path.as_ref(), p.adrfam.as_deref(), p.traddr.as_deref(), p.trsvcid.as_deref());
    let listening = match p.activated {
        Some(name) if place == (None, None, None, None) => {
            server.borrow_mut().listen_activated(cx, name, speech, p.export)
        }
        Some(_) => {
            return Err(invalid(
                METHOD,
                "activated",
                "a socket of systemd's has its address already: give no other",
            ));
        }
        None => server.borrow_mut().listen(cx, &address(METHOD, place)?, speech, p.export),
    };
    listening.map(|_| true).map_err(|e| e.rpc(METHOD))
}

fn remove_listener(app: &App, cx: &mut Turn<'_>, p: &RemoveListener) -> Result<bool, RpcError> {
    const METHOD: &str = "nbd_server_remove_listener";
    let place = (p.path.as_ref(), p.adrfam.as_deref(), p.traddr.as_deref(), p.trsvcid.as_deref());
    let address = address(METHOD, place)?;
    let removed = server(app)?.borrow_mut().unlisten(cx, &address);
    removed.map(|()| true).map_err(|e| e.rpc(METHOD))
}

/// `path`, `adrfam`, `traddr`, `trsvcid`.
type Place<'a> = (Option<&'a PathBuf>, Option<&'a str>, Option<&'a str>, Option<&'a str>);

fn address(method: &str, (path, adrfam, traddr, trsvcid): Place<'_>) -> Result<Address, RpcError> {
    let traddr = match (path, traddr) {
        (Some(path), None) if adrfam.is_none() && trsvcid.is_none() => {
            return Ok(Address::Unix(path.clone()));
        }
        (None, Some(traddr)) => traddr,
        _ => {
            let text = "give either path (a unix socket), or traddr and perhaps trsvcid and adrfam (TCP)";
            return Err(invalid(method, if path.is_some() { "path" } else { "traddr" }, text));
        }
    };
    let ip: IpAddr = traddr.parse().map_err(|_| {
        let text = format!("traddr '{traddr}' is no IP address; write 127.0.0.1, 0.0.0.0 or ::");
        invalid(method, "traddr", &text)
    })?;
    let right = if ip.is_ipv4() { "ipv4" } else { "ipv6" };
    if let Some(wrong) = adrfam.filter(|a| !a.eq_ignore_ascii_case(right)) {
        let text = format!("adrfam '{wrong}' does not fit traddr '{traddr}': use {right}");
        return Err(invalid(method, "adrfam", &text));
    }
    Ok(Address::Tcp(SocketAddr::new(ip, port(method, trsvcid)?)))
}

fn port(method: &str, trsvcid: Option<&str>) -> Result<u16, RpcError> {
    let Some(text) = trsvcid else { return Ok(NBD_PORT) };
    text.parse()
        .map_err(|_| invalid(method, "trsvcid", &format!("trsvcid '{text}' is no port number (0 to 65535)")))
}

fn address_row(address: &Address) -> Map<String, Value> {
    let row = match address {
        Address::Unix(path) => json!({"path": path.to_string_lossy()}),
        Address::Tcp(addr) => json!({
            "adrfam": if addr.is_ipv4() { "ipv4" } else { "ipv6" },
            "traddr": addr.ip().to_string(),
            "trsvcid": addr.port().to_string(),
        }),
        Address::Stdio => json!({}),
    };
    match row {
        Value::Object(row) => row,
        _ => Map::new(),
    }
}

/// As `nbd_server_add_listener` takes it.
fn listener_params(listening: &Listening) -> Map<String, Value> {
    let mut row = match &listening.activated {
        Some(name) => Map::from_iter([("activated".to_owned(), json!(name))]),
        None => address_row(listening.address()),
    };
    let speech = &listening.speech;
    row.insert("dialect".into(), json!(speech.dialect));
    if let Some(magic) = speech.reply_magic {
        row.insert("reply_magic".into(), json!(magic));
    }
    if let Some(certificates) = &speech.certificates {
        row.insert("tls".into(), json!(speech.tls));
        row.insert("tls_certificates".into(), json!(certificates.to_string_lossy()));
        row.insert("tls_verify_peer".into(), json!(speech.verify_peer));
    }
    if let Some(export) = &listening.export {
        row.insert("export".into(), json!(export));
    }
    row
}

fn listener_row(listening: &Listening) -> Value {
    let mut row = listener_params(listening);
    row.extend(address_row(listening.address()));
    row.insert("handshakes".into(), json!(listening.handshakes()));
    row.insert("max_handshakes".into(), json!(listening.max_handshakes()));
    Value::Object(row)
}

/// Sources that are listed.
const LISTED: usize = 16;

fn limits(server: &Server) -> Value {
    let budget = Budget::of_process();
    let sources = server.census.sources();
    let row = |(source, n): &(Source, usize)| json!({"source": source.to_string(), "connections": n});
    let handshakes: usize = server.listeners.iter().map(Listening::handshakes).sum();
    let most = server.listeners.iter().map(Listening::max_handshakes).sum::<usize>();
    json!({
        "connections": {
            "set": server.options.max_connections, "most": server.max_connections(), "now": server.connections.len(),
        },
        "handshakes": {"set": server.options.max_handshakes, "most": most, "now": handshakes},
        "sources": sources.iter().take(LISTED).map(row).collect::<Value>(),
        "turned": {
            "away": server.turned.away, "late": server.turned.late, "displaced": server.turned.displaced,
            "out": server.turned.out,
        },
        "descriptors": {"limit": budget.limit(), "reserve": budget.reserve(), "share": server.descriptors},
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateExport {
    name: String,
    bdev_name: String,
    #[serde(default)]
    read_only: bool,
    description: Option<String>,
    #[serde(default)]
    allow: Vec<Allow>,
}

fn create_export(app: &mut App, p: CreateExport) -> Result<String, RpcError> {
    const METHOD: &str = "nbd_server_create_export";
    let server = server(app)?;
    let description = p.description.unwrap_or_default();
    let allow = AllowList::new(p.allow).map_err(|e| e.rpc(METHOD))?;
    let created =
        server.borrow_mut().create_export(p.name.clone(), &p.bdev_name, p.read_only, description, allow);
    created.map(|()| p.name).map_err(|e| e.rpc(METHOD))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportName {
    name: String,
}

fn delete_export(app: &App, cx: &mut Turn<'_>, name: &str, responder: Responder) {
    with_responder("nbd_server_delete_export", app, responder, |server, done| {
        server.delete_export(cx, name, done)
    });
}

/// Runs an operation that answers `true` when it is done, later, or its error at once.
fn with_responder(
    method: &str,
    app: &App,
    responder: Responder,
    operation: impl FnOnce(&mut Server, Box<dyn FnOnce()>) -> Result<(), ServerError>,
) {
    let server = match server(app) {
        Ok(server) => server,
        Err(e) => return responder.err(e),
    };
    // Whichever comes first takes it.
    let responder = std::rc::Rc::new(std::cell::Cell::new(Some(responder)));
    let later = responder.clone();
    let done = move || {
        if let Some(responder) = later.take() {
            responder.ok(true);
        }
    };
    let result = operation(&mut server.borrow_mut(), Box::new(done));
    if let Err(e) = result
        && let Some(responder) = responder.take()
    {
        responder.err(e.rpc(method));
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportFilter {
    name: Option<String>,
}

fn exports(app: &App, wanted: Option<&str>) -> Result<Vec<Value>, RpcError> {
    let server = server(app)?;
    let server = server.borrow();
    let rows: Vec<Value> = server
        .exports
        .iter()
        .filter(|(name, _)| wanted.is_none_or(|w| w == *name))
        .map(|(name, e)| {
            json!({
                "name": name, "bdev_name": e.bdev_name, "read_only": e.read_only, "description": e.description,
                "allow": e.allow.entries(), "size": e.size(), "connections": server.users(e),
            })
        })
        .collect();
    match wanted {
        Some(name) if rows.is_empty() => {
            Err(ServerError::NoExport(name.into()).rpc("nbd_server_get_exports"))
        }
        _ => Ok(rows),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectionFilter {
    export: Option<String>,
}

fn connections(app: &App, export: Option<&str>) -> Result<Vec<Value>, RpcError> {
    let now = Instant::now();
    let server = server(app)?;
    let server = server.borrow();
    let wanted = |c: &Connected| export.is_none_or(|name| c.export_name == name);
    Ok(server
        .connections
        .iter()
        .filter(|(_, c)| wanted(c))
        .map(|(id, c)| connection_row(now, *id, c))
        .collect())
}

fn connection_row(now: Instant, id: u64, c: &Connected) -> Value {
    let peer = match c.who.peer {
        Peer::Unix { pid, uid } => json!({"pid": pid, "uid": uid}),
        Peer::Tcp(addr) => Value::Object(address_row(&Address::Tcp(addr))),
    };
    let s = &c.stats;
    let state = match (s.lost.load(Relaxed), c.closing) {
        (true, _) => "lost",
        (_, true) => "closing",
        _ => "connected",
    };
    json!({
        "id": id,
        "export": c.export_name,
        "listener": address_row(&c.listener),
        "peer": peer,
        "tls": c.who.tls.as_ref().map(|t| json!({"cipher": t.cipher, "common_name": t.common_name})),
        "reactor": c.place.reactor().name(),
        "state": state,
        "seconds": now.saturating_duration_since(c.since).as_secs(),
        "num_read_ops": s.read_ops.load(Relaxed),
        "bytes_read": s.bytes_read.load(Relaxed),
        "num_write_ops": s.write_ops.load(Relaxed),
        "bytes_written": s.bytes_written.load(Relaxed),
        "num_other_ops": s.other_ops.load(Relaxed),
        "num_errors": s.errors.load(Relaxed),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectionId {
    id: u64,
}

fn disconnect(app: &App, cx: &mut Turn<'_>, id: u64, responder: Responder) {
    with_responder("nbd_server_disconnect", app, responder, |server, done| server.disconnect(cx, id, done));
}

/// The calls that make the present state.
pub(super) fn config(server: &Server) -> Vec<Value> {
    let mut calls = Vec::new();
    if server.options != Options::default() {
        let o = &server.options;
        calls.push(json!({"method": "nbd_server_set_options", "params": {
            "max_connections": o.max_connections, "max_handshakes": o.max_handshakes,
            "handshake_timeout_ms": o.handshake_timeout.as_millis() as u64,
            "stall_timeout_ms": o.stall_timeout.as_millis() as u64,
            "min_progress_kib": o.rate.bytes >> 10, "progress_time_ms": o.rate.time.as_millis() as u64,
        }}));
    }
    for (name, e) in server.exports.iter() {
        let mut params = json!({"name": name, "bdev_name": e.bdev_name, "read_only": e.read_only});
        if !e.description.is_empty() {
            params["description"] = json!(e.description);
        }
        if !e.allow.entries().is_empty() {
            params["allow"] = json!(e.allow.entries());
        }
        calls.push(json!({"method": "nbd_server_create_export", "params": params}));
    }
    for l in server.listeners.iter().filter(|l| *l.address() != Address::Stdio) {
        calls.push(json!({"method": "nbd_server_add_listener", "params": listener_params(l)}));
    }
    calls
}

fn invalid(method: &str, param: &str, text: &str) -> RpcError {
    RpcError::invalid_params(format!("{method}: {text}")).method(method).param(param)
}
