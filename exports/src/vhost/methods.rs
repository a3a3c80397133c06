//! The RPC methods: names, parameters and results as SPDK's `vhost_*` and `virtio_blk_*`.

use std::path::PathBuf;

use engine::{App, MethodText};
use reactor::{CpuMask, Turn};
use rpc::{MethodTable, Responder, RpcError, States};
use rustix::io::Errno;
use serde::Deserialize;
use serde_json::{Value, json};
use vhost_poll::{Coalescing, controller};

use super::state::{self, Spec, TRANSPORT, state};

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method_sync::<SetOptions, _>("vhost_set_options", States::STARTUP, set_options);
    t.method::<Create>("vhost_create_blk_controller", States::RUNTIME, |app, p, r| match p.spec() {
        Err(e) => r.err(e),
        Ok(spec) => app.later(move |app, cx| r.reply(state::create(app, cx, spec))),
    });
    t.method::<Delete>("vhost_delete_controller", States::RUNTIME, |app, p, r| {
        app.later(move |app, cx| delete(app, cx, &p.ctrlr, r));
    });
    t.method_sync::<Get, _>("vhost_get_controllers", States::RUNTIME, get);
    t.method_sync::<SetCoalescing, _>("vhost_controller_set_coalescing", States::RUNTIME, set_coalescing);
    t.method_sync::<CreateTransport, _>("virtio_blk_create_transport", States::STARTUP, create_transport);
    t.method_sync::<GetTransports, _>("virtio_blk_get_transports", States::ANY, get_transports);
}

pub(super) const TEXTS: &[MethodText] = &[
    (
        "vhost_set_options",
        "true",
        "`socket_dir`: where controllers whose names are not absolute paths have their sockets, /var/tmp unless set. \
         `max_descriptors`: file descriptors that one front end may hold here, 8 to 1024: its connection, and kick, call and \
         error of each queue. `max_queues`: virtqueues that a guest may use, 1 to 256. Unless either is set they are 64 and 30; \
         where only `max_queues` is, there are as many descriptors as these need. QEMU asks for as many queues as the guest has \
         processors, unless `num-queues` says otherwise.",
    ),
    (
        "vhost_create_blk_controller",
        "true",
        "Offers the bdev `dev_name` to virtual machines as a vhost-user-blk device. `ctrlr` is the socket: a name below \
         `socket_dir`, or an absolute path. `readonly`: guests cannot write. `packed_ring`: offer packed virtqueues \
         too. `cpumask`: cores of the reactors that serve it, all if absent; queues are spread over them. Several front \
         ends may connect, 64 at most: then one more takes the place of one that has not started a queue. The socket has mode \
         0600. `transport` is vhost_user_blk.",
    ),
    ("vhost_delete_controller", "true", "Deletes a controller. -EBUSY while a virtual machine is connected."),
    (
        "vhost_get_controllers",
        "a list of controllers",
        "Lists controllers, or the one called `name`, with the front ends that are connected. `write_cache`: whether \
         completed writes of the guest may be in a cache, as it has chosen; else each is stable. `bdev` is null after the bdev \
         was removed. `limits`: front ends that there may be, descriptors that each may hold, and how many all of them may \
         hold as things are, which follows the limit of open files and what other controllers leave.",
    ),
    (
        "vhost_controller_set_coalescing",
        "true",
        "Fewer interrupts: of a queue with more than `iops_threshold` requests per second they are `delay_base_us` times \
         the relative excess apart. 0 turns it off.",
    ),
    (
        "virtio_blk_create_transport",
        "true",
        "Does nothing: the only transport, vhost_user_blk, is always there, which is said by -EEXIST.",
    ),
    ("virtio_blk_get_transports", "a list of transports", "Lists the transports, or the one called `name`."),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetOptions {
    socket_dir: Option<PathBuf>,
    max_queues: Option<u16>,
    max_descriptors: Option<u16>,
}

fn set_options(app: &mut App, p: SetOptions) -> Result<bool, RpcError> {
    const METHOD: &str = "vhost_set_options";
    let invalid = |param, text: String| {
        Err(RpcError::invalid_params(format!("{METHOD}: {text}")).method(METHOD).param(param))
    };
    if let Some(dir) = p.socket_dir.as_ref().filter(|dir| !state::is_directory(dir)) {
        return invalid("socket_dir", format!("{} is not a directory", dir.display()));
    }
    if let Some(n) = p.max_queues.filter(|n| !(1..=256).contains(n)) {
        return invalid("max_queues", format!("max_queues {n}: 1 to 256 is right"));
    }
    if let Some(n) = p.max_descriptors.filter(|n| !(8..=1024).contains(n)) {
        return invalid("max_descriptors", format!("max_descriptors {n}: 8 to 1024 is right"));
    }
    let state = state(app)?;
    let mut state = state.borrow_mut();
    let queues = p.max_queues.or(state.options.max_queues);
    let descriptors = p.max_descriptors.or(state.options.max_descriptors);
    if let (Some(queues), Some(descriptors)) = (queues, descriptors) {
        let fit = controller::queues(queues, descriptors.into());
        if fit < queues {
            let text = format!(
                "max_descriptors {descriptors} are enough for {fit} queues, and max_queues is {queues}: {} are right",
                controller::descriptors(queues)
            );
            return invalid("max_descriptors", text);
        }
    }
    if let Some(dir) = p.socket_dir {
        state.options.socket_dir = dir;
    }
    (state.options.max_queues, state.options.max_descriptors) = (queues, descriptors);
    Ok(true)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    ctrlr: String,
    dev_name: String,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    packed_ring: bool,
    cpumask: Option<String>,
    transport: Option<String>,
}

impl Create {
    fn spec(self) -> Result<Spec, RpcError> {
        const METHOD: &str = "vhost_create_blk_controller";
        let invalid = |param, text: String| {
            Err(RpcError::invalid_params(format!("{METHOD}: {text}")).method(METHOD).param(param))
        };
        if let Some(other) = self.transport.filter(|t| t != TRANSPORT) {
            return invalid("transport", format!("there is no transport '{other}'; {TRANSPORT} is right"));
        }
        if self.ctrlr.is_empty() || self.ctrlr.contains('\0') {
            return invalid("ctrlr", "ctrlr is the name of a socket; it must not be empty".into());
        }
        let cpumask = match self.cpumask.map(|m| m.parse::<CpuMask>()).transpose() {
            Ok(mask) => mask,
            Err(e) => return invalid("cpumask", e.to_string()),
        };
        Ok(Spec {
            name: self.ctrlr,
            bdev: self.dev_name,
            read_only: self.readonly,
            packed_ring: self.packed_ring,
            cpumask,
        })
    }
}

fn unknown(method: &str, name: &str) -> RpcError {
    let text = format!("{method}: no controller '{name}'");
    RpcError::errno(Errno::NODEV.raw_os_error(), text)
        .method(method)
        .object("controller", name)
        .hint("vhost_get_controllers lists them")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Delete {
    ctrlr: String,
}

fn delete(app: &mut App, cx: &mut Turn<'_>, name: &str, r: Responder) {
    const METHOD: &str = "vhost_delete_controller";
    let state = match state(app) {
        Ok(state) => state,
        Err(e) => return r.err(e),
    };
    let sessions = match state.borrow().controllers.get(name).filter(|e| !e.closing) {
        None => return r.err(unknown(METHOD, name)),
        // A guest that has just ended is not in the way.
        Some(entry) => entry.controller.sessions().iter().filter(|s| !s.hung_up).count(),
    };
    if sessions > 0 {
        let text =
            format!("{METHOD}: {sessions} virtual machines are connected to '{name}'; stop them first");
        let error = RpcError::errno(Errno::BUSY.raw_os_error(), text);
        return r.err(error.method(METHOD).object("controller", name));
    }
    state::close(&state, cx, name, move |_| r.ok(true));
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Get {
    name: Option<String>,
}

fn get(app: &mut App, p: Get) -> Result<Value, RpcError> {
    let state = state(app)?;
    let state = state.borrow();
    match p.name {
        None => Ok(state.controllers.values().map(|e| e.show()).collect()),
        Some(name) => match state.controllers.get(&name) {
            Some(entry) => Ok(json!([entry.show()])),
            None => Err(unknown("vhost_get_controllers", &name)),
        },
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetCoalescing {
    ctrlr: String,
    delay_base_us: u32,
    iops_threshold: u32,
}

fn set_coalescing(app: &mut App, p: SetCoalescing) -> Result<bool, RpcError> {
    const METHOD: &str = "vhost_controller_set_coalescing";
    // A second at most: a longer delay is a mistake in units.
    if p.delay_base_us > 1_000_000 {
        let text = format!("{METHOD}: delay_base_us {}: 0 to 1000000 is right", p.delay_base_us);
        return Err(RpcError::invalid_params(text).method(METHOD).param("delay_base_us"));
    }
    let state = state(app)?;
    let state = state.borrow();
    let entry = state.controllers.get(&p.ctrlr).ok_or_else(|| unknown(METHOD, &p.ctrlr))?;
    entry
        .controller
        .set_coalescing(Coalescing { delay_base_us: p.delay_base_us, iops_threshold: p.iops_threshold });
    Ok(true)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateTransport {
    name: String,
}

fn create_transport(_: &mut App, p: CreateTransport) -> Result<bool, RpcError> {
    const METHOD: &str = "virtio_blk_create_transport";
    let (errno, text) = if p.name == TRANSPORT {
        (Errno::EXIST, format!("{METHOD}: {TRANSPORT} exists always"))
    } else {
        (Errno::INVAL, format!("{METHOD}: there is no transport '{}'; {TRANSPORT} is right", p.name))
    };
    Err(RpcError::errno(errno.raw_os_error(), text).method(METHOD).param("name"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetTransports {
    name: Option<String>,
}

fn get_transports(_: &mut App, p: GetTransports) -> Result<Value, RpcError> {
    const METHOD: &str = "virtio_blk_get_transports";
    match p.name.filter(|name| name != TRANSPORT) {
        None => Ok(json!([{ "name": TRANSPORT }])),
        Some(other) => {
            let text = format!("{METHOD}: there is no transport '{other}'");
            Err(RpcError::errno(Errno::NODEV.raw_os_error(), text).method(METHOD).param("name"))
        }
    }
}
