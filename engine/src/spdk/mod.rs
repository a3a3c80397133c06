//! The subsystem "spdk": SPDK's bdevs among this program's, and SPDK's own JSON-RPC methods. Feature `spdk`.
//!
//! SPDK starts when the configuration says so (`spdk_set_options`), and not otherwise. `state` is SPDK as the control thread
//! has it, `calls` its methods, `config` its configuration, `bdevs` the way of its bdevs into our table, `poller` what
//! reactors do for it.

mod bdevs;
mod calls;
mod config;
mod options;
mod poller;
mod state;

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;

use bdev::BdevStatus;
use bdev::spdk::{Port, SpdkBdev};
use reactor::Turn;
use rpc::{Config, MethodTable, Responder, RpcError, States};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::{App, Error};
use crate::subsystem::{BdevKind, MethodText, ShutdownDone, Subsystem};
use options::SetOptions;
use state::State;

/// See the module.
#[derive(Debug, Default)]
pub struct Spdk {}

const TEXTS: &[MethodText] = &[
    (
        "spdk_rpc",
        "of `method`",
        "Calls a method of SPDK, also one whose name this program has for something of its own.",
    ),
    (
        "spdk_set_options",
        "true",
        "Starts SPDK with this environment, and with the configuration of SPDK in the file `config_file` or in `subsystems`.",
    ),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    method: String,
    params: Option<Value>,
}

impl Subsystem for Spdk {
    fn name(&self) -> &'static str {
        "spdk"
    }

    fn depends_on(&self) -> &'static [&'static str] {
        &[]
    }

    fn methods(&self, table: &mut MethodTable<App>) {
        table.method_sync::<SetOptions, _>("spdk_set_options", States::STARTUP, set_options);
        table.method::<Call>("spdk_rpc", States::ANY, |app, p, r| call(app, &p.method, p.params.as_ref(), r));
    }

    fn foreign_methods(&self, table: &mut MethodTable<App>) {
        let names = Port::open().and_then(|mut port| calls::method_names(&mut port));
        let names = names.unwrap_or_else(|e| {
            tracing::error!(error = %e, "SPDK's methods cannot be listed; spdk_rpc still calls them");
            Vec::new()
        });
        for name in names {
            let Some(states) = bdev::spdk::states_of(&name).and_then(|s| when(&s)) else { continue };
            // Ours win; `spdk_rpc` has all of SPDK's.
            if table.states_of(&name).is_none() {
                let method = name.clone();
                table.foreign(&name, states, move |app, params, r| call(app, &method, params, r));
            }
        }
    }

    fn texts(&self) -> &'static [MethodText] {
        TEXTS
    }

    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[("spdk", "spdk")]
    }

    fn prepare(&self, app: &mut App) {
        app.set_state(Rc::new(RefCell::new(State::default())));
    }

    fn initialise(&self, app: &mut App, _cx: &mut Turn<'_>) -> Result<(), Error> {
        let Some(state) = app.state::<State>() else { return Ok(()) };
        if state.borrow().options.is_none() {
            return Ok(());
        }
        state::start(app).map_err(|e| Error::Call(format!("SPDK: {}", e.message)))?;
        state.borrow_mut().begin_loading(app.startup.on_error);
        Ok(())
    }

    fn initialised(&self, app: &mut App) -> Result<bool, Error> {
        let Some(state) = app.state::<State>() else { return Ok(true) };
        let loaded = state.borrow_mut().loaded();
        loaded.map_err(|e| Error::Call(format!("SPDK: {}", e.message)))
    }

    fn config(&self, app: &App) -> Vec<Value> {
        self.try_config(app).unwrap_or_default()
    }

    /// One call with all of SPDK's configuration in it.
    fn try_config(&self, app: &App) -> Result<Vec<Value>, RpcError> {
        let Some(state) = app.state::<State>() else { return Ok(Vec::new()) };
        let mut state = state.borrow_mut();
        let Some(options) = state.options.clone() else { return Ok(Vec::new()) };
        let subsystems = config::present(&mut state)?;
        Ok(vec![json!({"method": "spdk_set_options", "params": options.to_value(subsystems)})])
    }

    fn bdev_kind(&self, bdev: &BdevStatus) -> Option<BdevKind> {
        let any: &dyn Any = &*bdev.bdev;
        // SPDK's configuration makes it.
        any.is::<SpdkBdev>().then_some(BdevKind { section: "spdk", create: None })
    }

    /// As SPDK's own `bdev_get_bdevs` has it, which tools of SPDK read.
    fn describe_bdev(&self, bdev: &BdevStatus, row: &mut Value) {
        let any: &dyn Any = &*bdev.bdev;
        let Some(disk) = any.downcast_ref::<SpdkBdev>() else { return };
        let details = disk.details();
        if let Ok(own) = serde_json::from_str::<Value>(&details.driver_specific) {
            row["driver_specific"] = own;
        }
        for (limit, value) in details.limits {
            row["assigned_rate_limits"][limit] = value.into();
        }
        // A layer or export of this program is the nearer holder.
        if let Some(claim) = details.claim.filter(|_| bdev.claim.is_none()) {
            row["claimed"] = true.into();
            row["claim_type"] = claim.into();
        }
    }

    fn call_about(
        &self,
        app: &mut App,
        method: &str,
        params: Value,
        bdev: Option<&BdevStatus>,
        responder: Responder,
    ) -> Option<Responder> {
        let state = app.state::<State>().filter(|state| state.borrow().is_running());
        let Some(state) = state else { return Some(responder) };
        let mut params = params;
        if let Some(bdev) = bdev {
            let any: &dyn Any = &*bdev.bdev;
            let Some(disk) = any.downcast_ref::<SpdkBdev>() else { return Some(responder) };
            params["name"] = disk.spdk_name().into();
        }
        state.borrow_mut().send(method, Some(&params), responder);
        None
    }

    fn shutdown(&self, app: &mut App, _: &mut Turn<'_>, done: ShutdownDone) {
        if let Some(state) = app.state::<State>() {
            state.borrow_mut().begin_shutdown(done);
        }
    }

    fn giving_up(&self) {
        bdev::spdk::give_up_soon();
    }

    fn abort(&self, app: &mut App, _: &mut Turn<'_>) {
        if let Some(state) = app.state::<State>() {
            state.borrow_mut().abort();
        }
    }
}

/// SPDK's states of a method as this program's.
fn when(states: &bdev::spdk::States) -> Option<States> {
    match (states.startup, states.runtime) {
        (true, true) => Some(States::ANY),
        (true, false) => Some(States::STARTUP),
        (false, true) => Some(States::RUNTIME),
        (false, false) => None,
    }
}

fn set_options(app: &mut App, p: SetOptions) -> Result<bool, RpcError> {
    let state = app.state::<State>().ok_or_else(|| RpcError::internal("spdk_set_options: no state"))?;
    let mut state = state.borrow_mut();
    if state.options.is_some() {
        let text = "spdk_set_options: SPDK's options are set already, and can be set once";
        return Err(RpcError::errno(16, text).hint("merge the calls into one"));
    }
    p.check()?;
    state.load = match (&p.config_file, &p.subsystems) {
        (None, None) => None,
        (Some(path), None) => Some(Config::load(path).map_err(|e| config::refused("config_file", &e))?),
        (None, Some(subsystems)) => {
            let text = json!({"subsystems": subsystems}).to_string();
            let parsed = Config::parse(text, "spdk_set_options: subsystems");
            Some(parsed.map_err(|e| config::refused("subsystems", &e))?)
        }
        (Some(_), Some(_)) => {
            let text = "spdk_set_options: either config_file or subsystems, not both";
            return Err(RpcError::invalid_params(text).param("subsystems"));
        }
    };
    state.options = Some(p);
    Ok(true)
}

/// Hands a call to SPDK. Start-up methods start it, since they must come before its subsystems.
fn call(app: &mut App, method: &str, params: Option<&Value>, responder: Responder) {
    let Some(state) = app.state::<State>() else { return };
    if bdev::spdk::states_of(method).is_none() {
        let error = RpcError::method_not_found(method, None);
        return responder
            .err(error.hint("no linked module of SPDK has it; rpc_get_methods by spdk_rpc lists them"));
    }
    if let Err(e) = state::start(app) {
        return responder.err(e);
    }
    match native_base(app, params) {
        None => state.borrow_mut().send(method, params, responder),
        Some((param, name)) => {
            let text = format!(
                "{method}: {param}: {name} is a bdev of this program, which SPDK does not know: its modules make something of \
                 SPDK's own bdevs only"
            );
            let hint = "make the base with SPDK's method, by spdk_rpc; or use a layer of this program, such as bdev_delay_create";
            responder.err(RpcError::errno(19, text).param(&param).object("bdev", name).hint(hint));
        }
    }
}

/// The parameter that names a bdev of this program as the base of something. SPDK would wait for a bdev of that name, and
/// answer that all is well.
fn native_base(app: &App, params: Option<&Value>) -> Option<(String, String)> {
    let native = |name: &&str| {
        let found = app.manager.get(name).ok();
        let ours = found.is_some_and(|bdev| !(&*bdev as &dyn Any).is::<SpdkBdev>());
        ours && bdev::spdk::name_of(name).is_none()
    };
    // base_bdev, base_bdevs, base_bdev_name, base_name, bdev_name, core_bdev_name, …
    let is_base = |key: &str| key.starts_with("base_") || key.contains("bdev");
    params?.as_object()?.iter().filter(|(key, _)| is_base(key)).find_map(|(key, value)| {
        let names: Vec<&str> = match value {
            Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
            other => other.as_str().into_iter().collect(),
        };
        names.into_iter().find(native).map(|name| (key.clone(), name.to_owned()))
    })
}
