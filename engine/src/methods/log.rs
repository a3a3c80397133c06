//! `log_*`.
//!
//! SPDK has one level for syslog and one for standard error; here everything goes to standard error, so both pairs
//! of methods steer the same level.

use rpc::{MethodTable, RpcError, States};
use serde::Deserialize;

use crate::app::App;

pub(super) fn register(t: &mut MethodTable<App>) {
    for name in ["log_set_level", "log_set_print_level"] {
        t.method_sync::<Level, _>(name, States::ANY, |app, p| done("level", app.log.set_level(&p.level)));
    }
    for name in ["log_get_level", "log_get_print_level"] {
        t.method_without_params(name, States::ANY, |app, r| r.ok(app.log.level()));
    }
    t.method_without_params("log_get_flags", States::ANY, |app, r| {
        r.ok(app.log.flags());
    });
    t.method_sync::<Flag, _>("log_set_flag", States::ANY, |app, p| {
        done("flag", app.log.set_flag(&p.flag, true))
    });
    t.method_sync::<Flag, _>("log_clear_flag", States::ANY, |app, p| {
        done("flag", app.log.set_flag(&p.flag, false))
    });
    t.method_sync::<Timestamps, _>("log_enable_timestamps", States::ANY, |app, p| {
        app.log.enable_timestamps(p.enabled);
        Ok(true)
    });
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Level {
    level: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Flag {
    flag: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Timestamps {
    enabled: bool,
}

fn done(param: &str, result: Result<(), String>) -> Result<bool, RpcError> {
    result.map(|()| true).map_err(|text| RpcError::invalid_params(text).param(param))
}
