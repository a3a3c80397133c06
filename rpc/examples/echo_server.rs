//! The smallest useful server: `cargo run -p rpc --example echo_server -- /tmp/echo.sock`, then
//! `spdk-rpc -s /tmp/echo.sock rpc_get_methods` (PyPI package `spdk`).

use rpc::{MethodTable, RpcError, Server, State, States};
use rustix::event::{PollFd, PollFlags};
use serde::Deserialize;
use serde_json::json;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

/// What the handlers work on.
#[derive(Default)]
struct App {
    bdevs: Vec<(String, u32, u64)>,
    stop: bool,
}

/// As SPDK's client sends it: switches that are off are sent as `false`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NullCreate {
    name: String,
    block_size: u32,
    num_blocks: u64,
    #[serde(default, rename = "dif_is_head_of_md")]
    _dif_is_head_of_md: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetBdevs {
    name: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Kill {
    #[serde(rename = "sig_name")]
    _sig_name: String,
}

fn methods(table: &mut MethodTable<App>) {
    table.method_without_params("spdk_get_version", States::ANY, |_, r| {
        let fields = json!({"major": 1, "minor": 0, "patch": 0, "suffix": ""});
        r.ok(json!({"version": "echo v1.0 \u{b5}", "fields": fields}));
    });
    table.method::<NullCreate>("bdev_null_create", States::RUNTIME, |app, p, r| {
        if app.bdevs.iter().any(|(name, ..)| *name == p.name) {
            let text = format!("bdev_null_create: there is a bdev '{}' already", p.name);
            return r.err(RpcError::errno(17, text).object("bdev", &p.name).hint("choose another name"));
        }
        app.bdevs.push((p.name.clone(), p.block_size, p.num_blocks));
        r.ok(p.name);
    });
    table.method_sync::<GetBdevs, _>("bdev_get_bdevs", States::RUNTIME, |app, p| {
        let wanted = |name: &String| p.name.as_ref().is_none_or(|wanted| wanted == name);
        let found: Vec<_> = app
            .bdevs
            .iter()
            .filter(|(name, ..)| wanted(name))
            .map(|(name, block_size, num_blocks)| json!({"name": name, "block_size": block_size, "num_blocks": num_blocks}))
            .collect();
        match p.name {
            Some(name) if found.is_empty() => Err(RpcError::from_errno(19).object("bdev", name)),
            _ => Ok(found),
        }
    });
    table.method::<Kill>("spdk_kill_instance", States::ANY, |app, _, r| {
        app.stop = true;
        r.ok(true);
    });
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: echo_server SOCKET")?;
    let mut table = MethodTable::new();
    methods(&mut table);
    table.set_state(State::Runtime);
    let mut server = Server::listen(Path::new(&path), Arc::new(table))?;
    let mut app = App::default();
    while !app.stop || server.has_unsent_replies() {
        if !server.poll(&mut app) {
            let mut fds = [PollFd::new(&server, PollFlags::IN)];
            rustix::event::poll(&mut fds, None)?;
        }
    }
    Ok(())
}
