//! `framework_*`, `spdk_*`: start-up, version, shutdown, and the configuration as `save_config` asks for it.

use std::time::Duration;

use rpc::{MethodTable, Responder, RpcError, States};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{bdev_config, threads};
use crate::app::App;
use crate::shutdown::Ask;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method_without_params("framework_start_init", States::STARTUP, App::start_init);
    t.method_without_params("framework_wait_init", States::ANY, App::wait_init);
    t.method_without_params("framework_get_subsystems", States::RUNTIME, |app, r| r.ok(subsystems(app)));
    t.method_sync::<GetConfig, _>("framework_get_config", States::RUNTIME, get_config);
    t.method_without_params("spdk_get_version", States::ANY, |app, r| r.ok(version(app.program)));
    t.method::<Kill>("spdk_kill_instance", States::ANY, kill);
}

/// Parts of the configuration that every program has.
const OWN: [&str; 2] = ["reactor", "bdev"];

/// In the order in which their configurations are loaded: `save_config` keeps it, and demands that a subsystem comes
/// after those that it depends on.
fn subsystems(app: &App) -> Value {
    let own = OWN.iter().map(|name| json!({"subsystem": name, "depends_on": []}));
    let joined = app.subsystems.iter().map(|s| json!({"subsystem": s.name(), "depends_on": s.depends_on()}));
    own.chain(joined).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetConfig {
    name: String,
    #[serde(default)]
    with_batches: bool,
}

fn get_config(app: &mut App, p: GetConfig) -> Result<Vec<Value>, RpcError> {
    let mut calls = match p.name.as_str() {
        "reactor" => threads::config(app),
        "bdev" => bdev_config::config(app),
        other => match app.subsystems.iter().find(|s| s.name() == other) {
            Some(subsystem) => subsystem.try_config(app)?,
            None => return Err(no_subsystem(app, other)),
        },
    };
    calls.extend(app.pending.config(&p.name));
    Ok(if p.with_batches { batches(calls) } else { calls })
}

fn no_subsystem(app: &App, name: &str) -> RpcError {
    let names: Vec<&str> = OWN.into_iter().chain(app.subsystems.iter().map(|s| s.name())).collect();
    let text = format!("framework_get_config: no subsystem '{name}'; there are {}", names.join(", "));
    let error = RpcError::invalid_params(text).param("name").object("subsystem", name);
    error.hint("framework_get_subsystems lists them")
}

/// Puts runs of calls of one method into arrays, which `load_config` sends as one JSON-RPC batch each.
fn batches(calls: Vec<Value>) -> Vec<Value> {
    let runs = calls.chunk_by(|a, b| a["method"] == b["method"]);
    runs.map(|run| if run.len() > 1 { run.to_vec().into() } else { run[0].clone() }).collect()
}

fn version(program: &str) -> Value {
    let part = |s: &str| s.parse::<u32>().unwrap_or(0);
    json!({
        "version": format!("{program} v{}", env!("CARGO_PKG_VERSION")),
        "fields": {
            "major": part(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": part(env!("CARGO_PKG_VERSION_MINOR")),
            "patch": part(env!("CARGO_PKG_VERSION_PATCH")),
            "suffix": env!("CARGO_PKG_VERSION_PRE"),
        },
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Kill {
    sig_name: Signal,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Signal {
    SigInt,
    SigTerm,
    SigQuit,
    SigHup,
    SigKill,
    SigUsr1,
}

/// Time for the answer to reach the caller before its connection is closed.
const FAREWELL: Duration = Duration::from_millis(10);

fn kill(app: &mut App, p: Kill, r: Responder) {
    use rustix::process::{Signal as Kernel, getpid, kill_process};
    /// What the handler of a signal does, so that it reaches this instance only; or the signal itself.
    enum Way {
        Ask(Ask),
        Send(Kernel),
    }
    let way = match p.sig_name {
        Signal::SigInt | Signal::SigTerm => Way::Ask(Ask::Once),
        Signal::SigHup => Way::Ask(Ask::HangUp),
        Signal::SigQuit => Way::Send(Kernel::QUIT),
        Signal::SigKill => Way::Send(Kernel::KILL),
        Signal::SigUsr1 => Way::Send(Kernel::USR1),
    };
    r.ok(true);
    app.later(move |_, cx| {
        let control = cx.handle().clone();
        cx.after(FAREWELL, move |_| {
            App::send(&control, move |app, cx| match way {
                Way::Ask(ask) => app.end(cx, ask),
                Way::Send(signal) => {
                    if let Err(error) = kill_process(getpid(), signal) {
                        tracing::error!(%error, "cannot send the signal that spdk_kill_instance asked for");
                    }
                }
            });
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_become_batches() {
        let call = |m: &str, n: u32| json!({"method": m, "params": {"n": n}});
        let calls = vec![call("a", 1), call("b", 1), call("b", 2), call("c", 1)];
        assert_eq!(batches(calls), [call("a", 1), json!([call("b", 1), call("b", 2)]), call("c", 1)],);
        assert!(batches(Vec::new()).is_empty());
    }
}
