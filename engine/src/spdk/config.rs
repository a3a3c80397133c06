//! SPDK's own configuration: loaded as `spdk_tgt` loads it, and saved.

use std::collections::BTreeSet;

use bdev::spdk::states_of;
use rpc::{Config, ConfigError, RpcError};
use serde_json::{Value, json};

use super::state::State;

/// The calls of the configuration that belong to the present state of SPDK, before (`startup`) or after its subsystems have
/// been initialised, in order; each is waited for. As in SPDK, calls of subsystems that are not linked are passed over: a
/// configuration of `spdk_tgt` has many that are nothing to a program that wants bdevs.
pub(super) fn load(state: &mut State, config: &Config, startup: bool) -> Result<(), RpcError> {
    let mut passed_over = BTreeSet::new();
    for call in &config.calls {
        let Some(states) = states_of(&call.method) else {
            if state.has_subsystem(&call.subsystem) {
                let text = format!(
                    "{}:{call}: no module of the SPDK that is linked has the method {}",
                    config.path.display(),
                    call.method
                );
                return Err(RpcError::new(rpc::code::METHOD_NOT_FOUND, text));
            }
            passed_over.insert(call.subsystem.as_str());
            continue;
        };
        // A method of both states is called once, in the first.
        if states.startup != startup {
            continue;
        }
        let answer = state.call(&call.method, call.params.as_ref());
        answer.map_err(|e| RpcError {
            message: format!("{}:{call}, {}: {}", config.path.display(), call.method, e.message),
            ..e
        })?;
    }
    if startup && !passed_over.is_empty() {
        let subsystems = passed_over.into_iter().collect::<Vec<_>>().join(", ");
        tracing::warn!(
            subsystems,
            config = %config.path.display(),
            "passed over: these subsystems of SPDK are not linked"
        );
    }
    Ok(())
}

/// The configuration that SPDK would save now; `None` if it does not run.
pub(super) fn present(state: &mut State) -> Option<Value> {
    if !state.is_running() {
        return None;
    }
    let listed = state.call("framework_get_subsystems", None).ok()?;
    let names = listed.as_array()?.iter().filter_map(|s| s["subsystem"].as_str().map(str::to_owned));
    let mut subsystems = Vec::new();
    for name in names.collect::<Vec<_>>() {
        let config = state.call("framework_get_config", Some(&json!({"name": name}))).ok()?;
        if config.as_array().is_some_and(|calls| !calls.is_empty()) {
            subsystems.push(json!({"subsystem": name, "config": config}));
        }
    }
    Some(Value::Array(subsystems))
}

/// A configuration that cannot be read.
pub(super) fn refused(param: &str, e: &ConfigError) -> RpcError {
    RpcError::invalid_params(format!("spdk_set_options: {param}: {e}")).param(param)
}
