//! `bdev_rnbd_*`.

mod map;
mod path;
mod rows;
mod texts;

use std::time::{Duration, Instant};

use engine::App;
use reactor::Turn;
use rpc::{MethodTable, Responder, RpcError, States};
use serde::Deserialize;
use serde_json::Value;

use super::maps::{Maps, SessionChanges};
use super::reply::{answer, answer_true, error, invalid};
use super::subsystem::Loading;
use super::{DeviceInfo, MapError};
use map::MapCall;
use path::Path;
pub(super) use texts::TEXTS;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method::<MapCall>(map::METHOD, States::RUNTIME, |app, p, r| {
        let loading = app.state::<Loading>().is_some_and(|l| l.borrow().0);
        match p.params(loading) {
            Ok(params) => with(app, r, move |maps, cx, r| maps.map(cx, params, answer(r))),
            Err(e) => r.err(e),
        }
    });
    t.method::<Unmap>("bdev_rnbd_unmap", States::RUNTIME, |app, p, r| {
        with(app, r, move |maps, cx, r| maps.unmap(cx, &p.name, p.force, answer_true(r)));
    });
    t.method::<Name>("bdev_rnbd_remap", States::RUNTIME, |app, p, r| {
        with(app, r, move |maps, cx, r| maps.remap(cx, &p.name, answer(r)));
    });
    t.method::<Resize>("bdev_rnbd_resize", States::RUNTIME, |app, p, r| {
        with(app, r, move |maps, cx, r| maps.resize(cx, &p.name, p.num_blocks, answer(r)));
    });
    t.method_sync::<MaybeName, _>("bdev_rnbd_get_devices", States::RUNTIME, |app, p| {
        let maps = app.state::<Maps>().ok_or_else(none)?;
        let rows: Vec<Value> = maps.borrow().devices(p.name.as_deref()).iter().map(rows::device).collect();
        match p.name {
            Some(name) if rows.is_empty() => Err(error("bdev_rnbd_get_devices", &MapError::NoDevice(name))),
            _ => Ok(rows),
        }
    });
    register_sessions(t);
}

fn register_sessions(t: &mut MethodTable<App>) {
    t.method_sync::<MaybeSession, _>("bdev_rnbd_get_sessions", States::RUNTIME, |app, p| {
        let maps = app.state::<Maps>().ok_or_else(none)?;
        let all = maps.borrow().sessions(Instant::now(), p.session.as_deref());
        match p.session {
            Some(name) if all.is_empty() => Err(error("bdev_rnbd_get_sessions", &MapError::NoSession(name))),
            _ => Ok(all.iter().map(rows::session).collect::<Vec<_>>()),
        }
    });
    t.method::<PathOf>("bdev_rnbd_add_path", States::RUNTIME, |app, p, r| {
        with(app, r, move |maps, cx, r| maps.add_path(cx, &p.session, p.path.0, answer_true(r)));
    });
    t.method::<PathOf>("bdev_rnbd_remove_path", States::RUNTIME, |app, p, r| {
        with(app, r, move |maps, cx, r| {
            maps.remove_path(cx, &p.session, &p.path.to_string(), answer_true(r));
        });
    });
    t.method::<PathOf>("bdev_rnbd_disconnect_path", States::RUNTIME, |app, p, r| {
        with(app, r, move |maps, cx, r| {
            maps.disconnect_path(cx, &p.session, &p.path.to_string(), answer_true(r));
        });
    });
    t.method::<PathOf>("bdev_rnbd_reconnect_path", States::RUNTIME, |app, p, r| {
        with(app, r, move |maps, cx, r| {
            maps.reconnect_path(cx, &p.session, &p.path.to_string(), answer_true(r));
        });
    });
    t.method_sync::<SetOptions, _>("bdev_rnbd_set_options", States::RUNTIME, |app, p| set_options(app, &p));
    t.method_sync::<Filter, _>("bdev_rnbd_get_path_stats", States::RUNTIME, |app, p| {
        let maps = app.state::<Maps>().ok_or_else(none)?;
        let path = p.path.map(|p| p.to_string());
        let stats = maps.borrow().path_stats(Instant::now(), p.session.as_deref(), path.as_deref());
        let stats = stats.map_err(|e| error("bdev_rnbd_get_path_stats", &e))?;
        Ok(stats.iter().map(|(s, p, stats)| rows::stats(s, p, stats)).collect::<Vec<_>>())
    });
    t.method_sync::<Filter, _>("bdev_rnbd_reset_path_stats", States::RUNTIME, |app, p| {
        let maps = app.state::<Maps>().ok_or_else(none)?;
        let path = p.path.map(|p| p.to_string());
        let reset = maps.borrow().reset_path_stats(Instant::now(), p.session.as_deref(), path.as_deref());
        reset.map(|()| true).map_err(|e| error("bdev_rnbd_reset_path_stats", &e))
    });
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
struct Unmap {
    name: String,
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    name: String,
    num_blocks: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MaybeSession {
    session: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PathOf {
    session: String,
    path: Path,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Filter {
    session: Option<String>,
    path: Option<Path>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetOptions {
    session: String,
    max_reconnect_attempts: Option<i32>,
    reconnect_delay_sec: Option<u32>,
    ctrlr_loss_timeout_sec: Option<i64>,
    mpath_policy: Option<String>,
}

fn set_options(app: &App, p: &SetOptions) -> Result<bool, RpcError> {
    const METHOD: &str = "bdev_rnbd_set_options";
    let maps = app.state::<Maps>().ok_or_else(none)?;
    let changes = SessionChanges {
        max_attempts: p.max_reconnect_attempts.map(|n| map::attempts(METHOD, n)).transpose()?,
        delay: p.reconnect_delay_sec.map(|s| Duration::from_secs(s.into())),
        policy: p.mpath_policy.as_deref().map(|name| map::policy(METHOD, name)).transpose()?,
        ctrlr_loss: p.ctrlr_loss_timeout_sec.map(|n| map::loss(METHOD, n)).transpose()?,
    };
    if changes.delay == Some(Duration::ZERO) {
        return Err(invalid(METHOD, "reconnect_delay_sec", "use at least 1"));
    }
    let set = maps.borrow_mut().set_options(&p.session, &changes);
    set.map(|()| true).map_err(|e| error(METHOD, &e))
}

/// Runs `f` with the reactor's context, soon.
fn with(app: &App, r: Responder, f: impl FnOnce(&mut Maps, &mut Turn<'_>, Responder) + Send + 'static) {
    app.later(move |app, cx| match app.state::<Maps>() {
        Some(maps) => f(&mut maps.borrow_mut(), cx, r),
        None => r.err(none()),
    });
}

fn none() -> RpcError {
    RpcError::internal("bdev_rnbd is not initialised yet")
}

/// The call that makes a mapping again.
pub(super) fn create(device: &DeviceInfo) -> Value {
    map::call(device)
}
