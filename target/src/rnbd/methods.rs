//! `rnbd_*`: listeners, exports, sessions.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::App;
use quota::Limit;
use rnbd_proto::open::SearchPath;
use rpc::{MethodTable, RpcError, States};
use rtrs_poll::{Choice, ListenError, Listening, Provider, owns_no_device};
use rtrs_proto::admission::Resource;
use rtrs_proto::limits::Geometry;
use rtrs_proto::response::ReadStyle;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::control::SessionDevices;
use super::export::{Allow, Export, ExportError};
use super::files;
use super::strangers;
use super::subsystem::{RnbdState, Server, control, exports, server, state};

/// RTRS_PORT.
const DEFAULT_PORT: u16 = 1234;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method_sync::<SetOptions, _>("rnbd_set_options", States::STARTUP, |app, p| set_options(app, &p));
    t.method::<Listen>("rnbd_create_listener", States::RUNTIME, |app, p, r| {
        app.later(move |app, cx| {
            r.reply(create_listener(app, cx, &p));
            strangers::tell(app);
        });
    });
    t.method_sync::<Unlisten, _>("rnbd_delete_listener", States::RUNTIME, |app, p| {
        let addr = socket_addr("rnbd_delete_listener", None, &p.traddr, p.trsvcid.as_deref())?;
        let gone = server(app)?.borrow_mut().unlisten(addr);
        gone.map_err(|e| listen_error("rnbd_delete_listener", &e))?;
        state(app)?.borrow_mut().asked.remove(&addr);
        Ok(true)
    });
    t.method_without_params("rnbd_get_listeners", States::RUNTIME, |app, r| r.reply(listeners(app)));
    t.method_sync::<CreateExport, _>("rnbd_create_export", States::RUNTIME, create_export);
    t.method_sync::<DevicePath, _>("rnbd_delete_export", States::RUNTIME, |app, p| {
        let removed = exports(app)?.borrow_mut().remove(&p.device_path);
        removed.map(|_| true).map_err(|e| export_error("rnbd_delete_export", &e))
    });
    t.method_without_params("rnbd_get_name_space", States::RUNTIME, |app, r| {
        r.reply(exports(app).map(|exports| strangers::name_space(app, &exports.borrow())));
    });
    t.method_sync::<GetExports, _>("rnbd_get_exports", States::RUNTIME, |app, p| {
        list_exports(app, p.device_path.as_deref())
    });
    t.method_sync::<SessionFilter, _>("rnbd_get_sessions", States::RUNTIME, |app, p| {
        sessions(app, p.session.as_deref())
    });
    t.method::<PathParams>("rnbd_disconnect_path", States::RUNTIME, |app, p, r| {
        app.later(move |app, cx| r.reply(disconnect(app, cx, &p.session, Some(&p.path))));
    });
    t.method::<SessionParams>("rnbd_disconnect_session", States::RUNTIME, |app, p, r| {
        app.later(move |app, cx| r.reply(disconnect(app, cx, &p.session, None)));
    });
    t.method_sync::<StatsFilter, _>("rnbd_get_path_stats", States::RUNTIME, |app, p| {
        path_stats(app, p.session.as_deref(), p.path.as_deref())
    });
    t.method_sync::<StatsFilter, _>("rnbd_reset_path_stats", States::RUNTIME, |app, p| {
        server(app)?.borrow().reset_path_stats(p.session.as_deref(), p.path.as_deref());
        Ok(true)
    });
    t.method_without_params("rnbd_get_devices", States::RUNTIME, |app, r| r.reply(rdma_devices(app)));
    t.method_without_params("rnbd_get_limits", States::RUNTIME, |app, r| r.reply(limits(app)));
    t.method_sync::<ForceClose, _>("rnbd_force_close", States::RUNTIME, |app, p| force_close(app, &p));
}

/// Options of the RNBD server; what is absent stays as it is.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetOptions {
    queue_depth: Option<u16>,
    max_io_size: Option<u32>,
    max_hdr_size: Option<u32>,
    rotate_rkeys: Option<bool>,
    dev_search_path: Option<String>,
    open_files: Option<bool>,
    open_files_read_only: Option<bool>,
    offer_bdevs: Option<bool>,
    bind_sessions: Option<bool>,
    /// Only if every client runs Linux 6.12 or later, see [`rtrs_poll::Options::reads`].
    one_message_reads: Option<bool>,
    heartbeat_interval_ms: Option<u32>,
    heartbeat_missed_max: Option<u32>,
    half_open_timeout_ms: Option<u32>,
    max_sessions: Option<u32>,
    max_paths: Option<u32>,
    max_connections: Option<u32>,
    max_memory: Option<u64>,
    max_share_percent: Option<u8>,
}

fn set_options(app: &mut App, p: &SetOptions) -> Result<bool, RpcError> {
    const METHOD: &str = "rnbd_set_options";
    let old = state(app)?.borrow().options.geometry;
    let geometry = Geometry::new(
        p.queue_depth.unwrap_or(old.queue_depth()),
        p.max_io_size.unwrap_or(old.max_io_size()),
        p.max_hdr_size.unwrap_or(old.max_hdr_size()),
    )
    .map_err(|e| invalid(METHOD, "queue_depth", e.to_string()))?;
    if !geometry.is_page_aligned() {
        let text =
            "max_io_size + max_hdr_size must be a multiple of 4096, so that every chunk starts on a page";
        return Err(invalid(METHOD, "max_io_size", text));
    }
    let search_path = p.dev_search_path.as_deref().map(SearchPath::new).transpose();
    let search_path = search_path.map_err(|e| invalid(METHOD, "dev_search_path", e.to_string()))?;
    if p.dev_search_path.as_ref().is_some_and(|path| path.contains('\0')) {
        return Err(invalid(METHOD, "dev_search_path", "a path has no NUL in it"));
    }
    for (name, value) in [
        ("heartbeat_interval_ms", p.heartbeat_interval_ms),
        ("half_open_timeout_ms", p.half_open_timeout_ms),
        ("max_sessions", p.max_sessions),
        ("max_paths", p.max_paths),
        ("max_connections", p.max_connections),
    ] {
        if value == Some(0) {
            return Err(invalid(METHOD, name, format!("{name} must be at least 1")));
        }
    }
    if p.max_share_percent.is_some_and(|percent| !(1..=100).contains(&percent)) {
        return Err(invalid(METHOD, "max_share_percent", "max_share_percent must be 1 to 100"));
    }
    let mut options = state(app)?.borrow().options.clone();
    apply_options(&mut options, p, geometry);
    let least = options.least_memory();
    if let Some(most) = options.max_memory.filter(|most| *most < least) {
        let text = format!("max_memory {most}: one path needs {least} bytes for its chunks and queues");
        return Err(invalid(METHOD, "max_memory", text));
    }
    let exports = exports(app)?;
    let mut exports = exports.borrow_mut();
    let search_path = search_path.unwrap_or_else(|| exports.search_path.clone());
    let open_files = p.open_files.unwrap_or(exports.open_files);
    if open_files && let Some(problem) = files::problem(&search_path) {
        return Err(invalid(METHOD, "open_files", problem));
    }
    state(app)?.borrow_mut().options = options;
    exports.search_path = search_path;
    exports.open_files = open_files;
    exports.open_files_read_only = p.open_files_read_only.unwrap_or(exports.open_files_read_only);
    exports.offer_bdevs = p.offer_bdevs.or(exports.offer_bdevs);
    exports.bind_sessions = p.bind_sessions.unwrap_or(exports.bind_sessions);
    Ok(true)
}

fn apply_options(o: &mut rtrs_poll::Options, p: &SetOptions, geometry: Geometry) {
    o.geometry = geometry;
    o.rotate_rkeys = p.rotate_rkeys.unwrap_or(o.rotate_rkeys);
    if let Some(one) = p.one_message_reads {
        o.reads = if one { ReadStyle::OneMessage } else { ReadStyle::Invalidate };
    }
    if let Some(ms) = p.heartbeat_interval_ms {
        o.heartbeat.interval_ns = u64::from(ms) * 1_000_000;
    }
    o.heartbeat.missed_max = p.heartbeat_missed_max.unwrap_or(o.heartbeat.missed_max);
    if let Some(ms) = p.half_open_timeout_ms {
        o.half_open_timeout = Duration::from_millis(ms.into());
    }
    o.max_sessions = p.max_sessions.unwrap_or(o.max_sessions);
    o.max_paths = p.max_paths.unwrap_or(o.max_paths);
    o.max_connections = p.max_connections.unwrap_or(o.max_connections);
    o.max_memory = p.max_memory.or(o.max_memory);
    o.share_percent = p.max_share_percent.unwrap_or(o.share_percent);
}

/// The options in force, as `rnbd_set_options` takes them. `exported`: anything has been exported in this run.
fn options_config(state: &RnbdState, exported: bool) -> Value {
    let o = &state.options;
    let exports = state.exports.borrow();
    let mut call = json!({"method": "rnbd_set_options", "params": {
        "queue_depth": o.geometry.queue_depth(),
        "max_io_size": o.geometry.max_io_size(),
        "max_hdr_size": o.geometry.max_hdr_size(),
        "rotate_rkeys": o.rotate_rkeys,
        "dev_search_path": exports.search_path.as_str(),
        "open_files": exports.open_files,
        "open_files_read_only": exports.open_files_read_only,
        "bind_sessions": exports.bind_sessions,
        "one_message_reads": o.reads == ReadStyle::OneMessage,
        "heartbeat_interval_ms": o.heartbeat.interval_ns / 1_000_000,
        "heartbeat_missed_max": o.heartbeat.missed_max,
        "half_open_timeout_ms": o.half_open_timeout.as_millis() as u64,
        "max_sessions": o.max_sessions,
        "max_paths": o.max_paths,
        "max_connections": o.max_connections,
        "max_share_percent": o.share_percent,
    }});
    // The default is this machine's.
    if let Some(most) = o.max_memory {
        call["params"]["max_memory"] = most.into();
    }
    // What this run withholds the next one must not offer, also when the last export has been deleted.
    if let Some(offer) = exports.offer_bdevs.or(exported.then_some(false)) {
        call["params"]["offer_bdevs"] = offer.into();
    }
    call
}

/// The calls that make the present state of this subsystem.
pub(super) fn config(app: &App) -> Vec<Value> {
    let Ok(state) = state(app) else { return Vec::new() };
    let state = state.borrow();
    let mut calls = vec![options_config(&state, app.manager.was_exported())];
    // An export stays when its bdev has gone, which may come back; the next start would refuse it.
    let exports = state.exports.borrow();
    for e in exports.list().iter().filter(|e| app.manager.get(&e.bdev_name).is_ok()) {
        calls.push(json!({"method": "rnbd_create_export", "params": {
            "device_path": e.device_path, "bdev_name": e.bdev_name, "read_only": e.read_only, "allow": e.allow,
        }}));
    }
    let Some(server) = &state.server else { return calls };
    for l in server.borrow().listeners() {
        // "auto" stays so: after the next start there may be another device.
        let mut params = listener_row(&l);
        params["provider"] = state.asked.get(&l.addr).map_or(l.provider, String::as_str).into();
        calls.push(json!({"method": "rnbd_create_listener", "params": params}));
    }
    calls
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Listen {
    adrfam: Option<String>,
    traddr: String,
    trsvcid: Option<String>,
    provider: Option<String>,
    ack_delay: Option<u8>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unlisten {
    traddr: String,
    trsvcid: Option<String>,
}

fn create_listener(app: &mut App, cx: &mut reactor::Turn<'_>, p: &Listen) -> Result<bool, RpcError> {
    const METHOD: &str = "rnbd_create_listener";
    let addr = socket_addr(METHOD, p.adrfam.as_deref(), &p.traddr, p.trsvcid.as_deref())?;
    if p.ack_delay.is_some_and(|code| code > 31) {
        return Err(invalid(METHOD, "ack_delay", "use a code of 0 to 31: 4.096 µs times 2 to its power"));
    }
    let name = p.provider.as_deref().unwrap_or("auto");
    let listening = listen(&mut server(app)?.borrow_mut(), cx, addr, name, p.ack_delay)?;
    state(app)?.borrow_mut().asked.insert(listening.addr, name.into());
    Ok(true)
}

/// Listens through the provider, or the one of several that has a device for the address.
fn listen(
    server: &mut Server,
    cx: &mut reactor::Turn<'_>,
    addr: SocketAddr,
    name: &str,
    ack_delay: Option<u8>,
) -> Result<Listening, RpcError> {
    const METHOD: &str = "rnbd_create_listener";
    if name == "loopback" {
        return server.listen(addr, name, ack_delay).map_err(|e| listen_error(METHOD, &e));
    }
    let Some(choice) = Choice::parse(name) else {
        let text = format!("unknown provider '{name}': use {}", Choice::NAMES.join(", "));
        return Err(invalid(METHOD, "provider", text));
    };
    let (last, others) = choice.candidates(addr.ip()).split_last().expect("there is always one");
    for provider in others {
        match listen_through(server, cx, addr, *provider, ack_delay) {
            Ok(listening) => return Ok(listening),
            Err(Refusal::Missing(why)) => {
                tracing::debug!(%why, "no {} for {addr}: trying {}", provider.name(), last.name());
            }
            Err(Refusal::Other(e)) => return Err(listen_error(METHOD, &e)),
        }
    }
    listen_through(server, cx, addr, *last, ack_delay).map_err(|refusal| match refusal {
        Refusal::Missing(e) => verbs_error(METHOD, &e),
        Refusal::Other(e) => listen_error(METHOD, &e),
    })
}

/// Why a provider does not listen.
enum Refusal {
    /// The host or the address has no device for it.
    Missing(verbs::Error),
    Other(ListenError),
}

fn listen_through(
    server: &mut Server,
    cx: &mut reactor::Turn<'_>,
    addr: SocketAddr,
    provider: Provider,
    ack_delay: Option<u8>,
) -> Result<Listening, Refusal> {
    if !server.has_provider(provider.name()) {
        let cm = provider.open().map_err(Refusal::Missing)?;
        server.add_cm(cx, cm).map_err(|source| {
            let what = format!("watch the events of {}", provider.name());
            Refusal::Other(ListenError::Verbs(verbs::Error { what, source, hint: String::new() }))
        })?;
    }
    server.listen(addr, provider.name(), ack_delay).map_err(|e| match e {
        ListenError::Verbs(e) if owns_no_device(&e) => Refusal::Missing(e),
        e => Refusal::Other(e),
    })
}

fn socket_addr(
    method: &str,
    adrfam: Option<&str>,
    traddr: &str,
    trsvcid: Option<&str>,
) -> Result<SocketAddr, RpcError> {
    let ip: IpAddr = traddr.parse().map_err(|_| {
        invalid(method, "traddr", format!("traddr '{traddr}' is no IP address; write 10.0.0.1 or fd00::1"))
    })?;
    let right = if ip.is_ipv4() { "ipv4" } else { "ipv6" };
    if adrfam.is_some_and(|a| !a.eq_ignore_ascii_case(right)) {
        let text =
            format!("adrfam '{}' does not fit traddr '{traddr}': use {right}", adrfam.unwrap_or_default());
        return Err(invalid(method, "adrfam", text));
    }
    let port = match trsvcid {
        None => DEFAULT_PORT,
        Some(p) => p.parse().map_err(|_| {
            invalid(method, "trsvcid", format!("trsvcid '{p}' is no port number (0 to 65535)"))
        })?,
    };
    Ok(SocketAddr::new(ip, port))
}

fn listeners(app: &App) -> Result<Value, RpcError> {
    let server = server(app)?;
    let list = server.borrow().listeners();
    Ok(list.iter().map(listener_row).collect())
}

fn listener_row(l: &Listening) -> Value {
    let mut row = json!({
        "adrfam": if l.addr.is_ipv4() { "ipv4" } else { "ipv6" },
        "traddr": l.addr.ip().to_string(), "trsvcid": l.addr.port().to_string(), "provider": l.provider,
    });
    if let Some(code) = l.ack_delay {
        row["ack_delay"] = code.into();
    }
    row
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateExport {
    device_path: String,
    bdev_name: String,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    allow: Vec<Allow>,
}

fn create_export(app: &mut App, p: CreateExport) -> Result<bool, RpcError> {
    const METHOD: &str = "rnbd_create_export";
    app.manager.get(&p.bdev_name).map_err(|e| {
        RpcError::errno(e.errno(), format!("{METHOD}: {e}")).method(METHOD).object("bdev", &p.bdev_name)
    })?;
    let export =
        Export { device_path: p.device_path, bdev_name: p.bdev_name, read_only: p.read_only, allow: p.allow };
    exports(app)?.borrow_mut().add(export).map_err(|e| export_error(METHOD, &e))?;
    app.manager.note_export();
    strangers::tell(app);
    Ok(true)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DevicePath {
    device_path: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetExports {
    device_path: Option<String>,
}

#[derive(Serialize)]
struct ExportRow {
    device_path: String,
    bdev_name: String,
    read_only: bool,
    allow: Vec<Allow>,
    open_to: &'static str,
    opens: Vec<Value>,
}

fn list_exports(app: &App, wanted: Option<&str>) -> Result<Vec<ExportRow>, RpcError> {
    let sessions = control(app)?.borrow().sessions();
    let opens = |bdev: &str| -> Vec<Value> {
        let of = |s: &SessionDevices| {
            let rows = s.devices.iter().filter(|d| d.bdev_name == bdev);
            rows.map(|d| {
                json!({
                    "session": s.session, "device_id": d.device_id, "mapping_path": d.device_path,
                    "access_mode": d.access_mode, "read_only": d.read_only, "opened_by": d.by.word(),
                    "offered": d.offered,
                })
            })
            .collect::<Vec<_>>()
        };
        sessions.iter().flat_map(of).collect()
    };
    // An export may name its bdev by an alias; what is open is listed by the bdev's own name.
    let own = |name: &str| app.manager.get(name).map_or_else(|_| name.into(), |b| b.info().name.clone());
    let exports = exports(app)?;
    let exports = exports.borrow();
    let rows: Vec<ExportRow> = exports
        .list()
        .iter()
        .filter(|e| wanted.is_none_or(|w| w.trim_start_matches('/') == e.device_path))
        .map(|e| ExportRow {
            device_path: e.device_path.clone(),
            bdev_name: e.bdev_name.clone(),
            read_only: e.read_only,
            allow: e.allow.clone(),
            open_to: strangers::open_to(e),
            opens: opens(&own(&e.bdev_name)),
        })
        .collect();
    match wanted {
        Some(w) if rows.is_empty() => Err(export_error("rnbd_get_exports", &ExportError::NotFound(w.into()))),
        _ => Ok(rows),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionFilter {
    session: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionParams {
    session: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PathParams {
    session: String,
    path: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StatsFilter {
    session: Option<String>,
    path: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ForceClose {
    session: String,
    device_path: String,
}

fn sessions(app: &App, wanted: Option<&str>) -> Result<Vec<Value>, RpcError> {
    let open = control(app)?.borrow().sessions();
    let devices = |session: &str| -> Vec<Value> {
        let of = open.iter().filter(|s| s.session == session).flat_map(|s| &s.devices);
        of.map(|d| {
            json!({
                "device_id": d.device_id, "device_path": d.device_path, "bdev_name": d.bdev_name,
                "access_mode": d.access_mode, "read_only": d.read_only, "opened_by": d.by.word(),
                "offered": d.offered,
            })
        })
        .collect()
    };
    let exports = exports(app)?;
    let exports = exports.borrow();
    let server = server(app)?;
    let all = server.borrow().sessions(Instant::now());
    let rows = all.iter().filter(|s| wanted.is_none_or(|w| w == s.name)).map(|s| {
        json!({
            "session": s.name, "uuid": s.uuid, "inflight": s.inflight, "queue_depth": s.queue_depth,
            "chunk_size": s.chunk_size, "devices": devices(&s.name),
            "allowed_by": exports.best_standing(&s.name, &s.peers).word(),
            "paths": s.paths.iter().map(path_row).collect::<Vec<_>>(),
        })
    });
    let rows: Vec<Value> = rows.collect();
    match wanted {
        Some(w) if rows.is_empty() => Err(no_session("rnbd_get_sessions", w)),
        _ => Ok(rows),
    }
}

fn path_row(p: &rtrs_poll::PathInfo) -> Value {
    json!({
        "path": p.name, "src": p.src, "dst": p.dst, "device": p.device, "provider": p.provider, "state": p.state,
        "connections": p.connections, "reactors": p.reactors, "heartbeat_us": p.heartbeat_ns / 1000,
        "age_sec": p.age_sec, "stats": stats_row(&p.stats),
    })
}

fn stats_row(s: &rtrs_poll::PathStats) -> Value {
    json!({"rd_cnt": s.rd_cnt, "rd_bytes": s.rd_bytes, "wr_cnt": s.wr_cnt, "wr_bytes": s.wr_bytes})
}

/// RDMA devices in use, with whatever their provider counts.
fn rdma_devices(app: &App) -> Result<Value, RpcError> {
    let server = server(app)?;
    let row = |d: &Arc<dyn verbs::Device>| {
        let mut counters = serde_json::Map::new();
        d.counters(&mut |name, value| {
            counters.insert(name.into(), value.into());
        });
        json!({"device": d.info().name, "provider": d.info().provider, "counters": counters})
    };
    Ok(server.borrow().devices().iter().map(row).collect())
}

/// What clients have of what there are limits of.
fn limits(app: &App) -> Result<Value, RpcError> {
    let server = server(app)?;
    let server = server.borrow();
    let row = |(what, used, limit): (Resource, u64, Limit)| {
        json!({
            "resource": what.key(), "used": used, "limit": limit.total(), "per_address": limit.share(),
            "for_known_clients": limit.reserve(),
        })
    };
    Ok(server.in_use().map(row).collect())
}

fn path_stats(app: &App, session: Option<&str>, path: Option<&str>) -> Result<Vec<Value>, RpcError> {
    let server = server(app)?;
    let all = server.borrow().sessions(Instant::now());
    let mut rows = Vec::new();
    for s in all.iter().filter(|s| session.is_none_or(|w| w == s.name)) {
        for p in s.paths.iter().filter(|p| path.is_none_or(|w| w == p.name)) {
            let mut row = stats_row(&p.stats);
            row["session"] = s.name.clone().into();
            row["path"] = p.name.clone().into();
            rows.push(row);
        }
    }
    match session {
        Some(w) if rows.is_empty() => Err(no_session("rnbd_get_path_stats", w)),
        _ => Ok(rows),
    }
}

fn disconnect(
    app: &mut App,
    cx: &mut reactor::Turn<'_>,
    session: &str,
    path: Option<&str>,
) -> Result<bool, RpcError> {
    let server = server(app)?;
    let closed = server.borrow_mut().disconnect_path(cx, session, path);
    if closed > 0 {
        return Ok(true);
    }
    let Some(path) = path else { return Err(no_session("rnbd_disconnect_session", session)) };
    let text = format!("rnbd_disconnect_path: session '{session}' has no path '{path}'");
    Err(RpcError::errno(2, text)
        .method("rnbd_disconnect_path")
        .object("path", path)
        .hint("rnbd_get_sessions shows paths as ip:CLIENT@ip:SERVER"))
}

fn force_close(app: &mut App, p: &ForceClose) -> Result<bool, RpcError> {
    let closed = control(app)?.borrow_mut().force_close(&p.session, &p.device_path);
    if closed > 0 {
        return Ok(true);
    }
    let text = format!("rnbd_force_close: session '{}' has no device '{}' open", p.session, p.device_path);
    Err(RpcError::errno(2, text)
        .method("rnbd_force_close")
        .object("device_path", &p.device_path)
        .hint("rnbd_get_sessions lists open devices"))
}

fn invalid(method: &str, param: &str, text: impl Into<String>) -> RpcError {
    RpcError::invalid_params(format!("{method}: {}", text.into())).method(method).param(param)
}

fn no_session(method: &str, session: &str) -> RpcError {
    RpcError::errno(2, format!("{method}: no session '{session}'"))
        .method(method)
        .object("session", session)
        .hint("rnbd_get_sessions lists those that are connected")
}

fn export_error(method: &str, e: &ExportError) -> RpcError {
    let errno = match e {
        ExportError::Exists(_) => 17,
        ExportError::NotFound(_) => 2,
        ExportError::Path(_) | ExportError::Addr(_) | ExportError::EmptyAllow => 22,
    };
    RpcError::errno(errno, format!("{method}: {e}")).method(method)
}

fn verbs_error(method: &str, e: &verbs::Error) -> RpcError {
    let errno = e.source.raw_os_error().unwrap_or(19);
    let error = RpcError::errno(errno, format!("{method}: {e}")).method(method);
    if e.hint.is_empty() { error } else { error.hint(&e.hint) }
}

fn listen_error(method: &str, e: &ListenError) -> RpcError {
    let errno = match e {
        ListenError::Verbs(v) => return verbs_error(method, v),
        ListenError::Provider(..) => 19,
        ListenError::Exists(_) => 17,
        ListenError::NotFound(_) => 2,
        ListenError::Stopping => 108,
    };
    RpcError::errno(errno, format!("{method}: {e}")).method(method)
}
