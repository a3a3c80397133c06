//! `bdev_malloc_*`, `bdev_null_*`, `bdev_uring_*`, `bdev_aio_*`, `bdev_delay_*`, `bdev_error_*`: one kind of bdev each.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bdev::{Manager, OnGone, Op, delay, error, malloc, null, uring};
use rpc::{MethodTable, Responder, RpcError, States};
use rustix::io::Errno;
use serde::Deserialize;
use uuid::Uuid;

use super::{bdev_error, unsupported};
use crate::app::App;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method_sync::<MallocCreate, _>("bdev_malloc_create", States::RUNTIME, malloc_create);
    t.method::<Name>("bdev_malloc_delete", States::RUNTIME, |app, p, r| {
        delete(app, &p.name, r, |m, gone| m.delete::<malloc::Malloc>(&p.name, gone));
    });
    t.method_sync::<NullCreate, _>("bdev_null_create", States::RUNTIME, null_create);
    t.method::<Name>("bdev_null_delete", States::RUNTIME, |app, p, r| {
        delete(app, &p.name, r, |m, gone| m.delete::<null::Null>(&p.name, gone));
    });
    t.method_sync::<NullResize, _>("bdev_null_resize", States::RUNTIME, null_resize);
    t.method::<UringCreate>("bdev_uring_create", States::RUNTIME, uring_create);
    t.method_sync::<Name, _>("bdev_uring_rescan", States::RUNTIME, |app, p| {
        rescan(app, "bdev_uring_rescan", &p.name, uring::Kind::Uring)
    });
    t.method::<Name>("bdev_uring_delete", States::RUNTIME, |app, p, r| {
        delete(app, &p.name, r, |m, gone| uring::delete(m, &p.name, uring::Kind::Uring, gone));
    });
    t.method::<AioCreate>("bdev_aio_create", States::RUNTIME, aio_create);
    t.method_sync::<Name, _>("bdev_aio_rescan", States::RUNTIME, |app, p| {
        rescan(app, "bdev_aio_rescan", &p.name, uring::Kind::Aio)
    });
    t.method::<Name>("bdev_aio_delete", States::RUNTIME, |app, p, r| {
        delete(app, &p.name, r, |m, gone| uring::delete(m, &p.name, uring::Kind::Aio, gone));
    });
    register_layers(t);
}

fn register_layers(t: &mut MethodTable<App>) {
    t.method_sync::<DelayCreate, _>("bdev_delay_create", States::RUNTIME, delay_create);
    t.method_sync::<DelayUpdate, _>("bdev_delay_update_latency", States::RUNTIME, delay_update);
    t.method::<Name>("bdev_delay_delete", States::RUNTIME, |app, p, r| {
        delete(app, &p.name, r, |m, gone| m.delete::<delay::Delay>(&p.name, gone));
    });
    t.method_sync::<ErrorCreate, _>("bdev_error_create", States::RUNTIME, error_create);
    t.method_sync::<ErrorInject, _>("bdev_error_inject_error", States::RUNTIME, error_inject);
    t.method_sync::<Name, _>("bdev_error_resume_pending", States::RUNTIME, |app, p| {
        let resumed = error::resume_pending(&app.manager, &p.name);
        resumed.map(|()| true).map_err(|e| bdev_error("bdev_error_resume_pending", &p.name, &e))
    });
    t.method::<Name>("bdev_error_delete", States::RUNTIME, |app, p, r| {
        delete(app, &p.name, r, |m, gone| m.delete::<error::ErrorBdev>(&p.name, gone));
    });
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    name: String,
}

/// Deletes the bdev `name` with `f` and answers when it is really gone: a caller may use its name and file again.
fn delete(
    app: &App,
    name: &str,
    r: Responder,
    f: impl FnOnce(&Arc<Manager>, OnGone) -> Result<(), bdev::Error>,
) {
    let method = r.method().to_owned();
    let waiting = Arc::new(Mutex::new(Some(r)));
    let take = |w: &Mutex<Option<Responder>>| w.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (control, caller) = (app.control.clone(), waiting.clone());
    // The last user lets go on any thread; answers come from the control thread.
    let gone = move || {
        App::send(&control, move |_, _| {
            if let Some(r) = take(&caller) {
                r.ok(true);
            }
        });
    };
    if let Err(e) = f(&app.manager, Box::new(gone))
        && let Some(r) = take(&waiting)
    {
        r.err(bdev_error(&method, name, &e));
    }
}

/// Parameters of metadata and protection information, which SPDK's client sends as false or leaves out.
fn no_metadata(method: &str, md_size: u32, dif_type: i32) -> Result<(), RpcError> {
    if md_size != 0 {
        return Err(unsupported(method, "md_size", "bdevs here have no metadata; leave it out"));
    }
    if dif_type != 0 {
        return Err(unsupported(
            method,
            "dif_type",
            "bdevs here have no protection information; leave it out",
        ));
    }
    Ok(())
}

/// Refuses hints that would change nothing, so that nobody relies on them.
fn no_hints(method: &str, hints: &[(&str, u32)]) -> Result<(), RpcError> {
    match hints.iter().find(|(_, value)| *value != 0) {
        Some((param, _)) => Err(unsupported(method, param, "not offered by this target; leave it out")),
        None => Ok(()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MallocCreate {
    name: Option<String>,
    block_size: u32,
    num_blocks: u64,
    uuid: Option<Uuid>,
    #[serde(default)]
    optimal_io_boundary: u32,
    #[serde(default)]
    md_size: u32,
    #[serde(default, rename = "md_interleave")]
    _md_interleave: bool,
    #[serde(default)]
    dif_type: i32,
    #[serde(default, rename = "dif_is_head_of_md")]
    _dif_is_head_of_md: bool,
    physical_block_size: Option<u32>,
    #[serde(default, rename = "dif_pi_format")]
    _dif_pi_format: u32,
    numa_id: Option<i32>,
}

fn malloc_create(app: &mut App, p: MallocCreate) -> Result<String, RpcError> {
    const METHOD: &str = "bdev_malloc_create";
    no_metadata(METHOD, p.md_size, p.dif_type)?;
    no_hints(METHOD, &[("optimal_io_boundary", p.optimal_io_boundary)])?;
    if p.numa_id.is_some_and(|id| id >= 0) {
        let text = "memory comes from the node that first writes it; leave it out or give -1";
        return Err(unsupported(METHOD, "numa_id", text));
    }
    let params = malloc::Params {
        name: p.name.clone(),
        num_blocks: p.num_blocks,
        block_size: p.block_size,
        physical_block_size: given(p.physical_block_size),
        uuid: p.uuid,
    };
    let name = p.name.unwrap_or_default();
    malloc::create(&app.manager, params).map_err(|e| bdev_error(METHOD, &name, &e))
}

/// SPDK's scripts write 0 for "not given".
fn given(value: Option<u32>) -> Option<u32> {
    value.filter(|v| *v != 0)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NullCreate {
    name: String,
    block_size: u32,
    num_blocks: u64,
    uuid: Option<Uuid>,
    physical_block_size: Option<u32>,
    #[serde(default)]
    md_size: u32,
    #[serde(default)]
    dif_type: i32,
    #[serde(default, rename = "dif_pi_format")]
    _dif_pi_format: u32,
    #[serde(default, rename = "dif_is_head_of_md")]
    _dif_is_head_of_md: bool,
    #[serde(default)]
    preferred_write_granularity: u32,
    #[serde(default)]
    preferred_write_alignment: u32,
    #[serde(default)]
    optimal_write_size: u32,
    #[serde(default)]
    preferred_unmap_granularity: u32,
    #[serde(default)]
    preferred_unmap_alignment: u32,
}

fn null_create(app: &mut App, p: NullCreate) -> Result<String, RpcError> {
    const METHOD: &str = "bdev_null_create";
    no_metadata(METHOD, p.md_size, p.dif_type)?;
    let hints = [
        ("preferred_write_granularity", p.preferred_write_granularity),
        ("preferred_write_alignment", p.preferred_write_alignment),
        ("optimal_write_size", p.optimal_write_size),
        ("preferred_unmap_granularity", p.preferred_unmap_granularity),
        ("preferred_unmap_alignment", p.preferred_unmap_alignment),
    ];
    no_hints(METHOD, &hints)?;
    let params = null::Params {
        name: Some(p.name.clone()),
        num_blocks: p.num_blocks,
        block_size: p.block_size,
        physical_block_size: given(p.physical_block_size),
        uuid: p.uuid,
    };
    null::create(&app.manager, params).map_err(|e| bdev_error(METHOD, &p.name, &e))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NullResize {
    name: String,
    new_size: u64,
}

fn null_resize(app: &mut App, p: NullResize) -> Result<bool, RpcError> {
    const METHOD: &str = "bdev_null_resize";
    const MIB: u64 = 1 << 20;
    let error = |e| bdev_error(METHOD, &p.name, &e);
    let block_size = app.manager.get_as::<null::Null>(&p.name).map_err(error)?;
    let block_size = u64::from(bdev::Bdev::info(&*block_size).block_size);
    let Some(bytes) = p.new_size.checked_mul(MIB).filter(|b| *b > 0) else {
        let text =
            format!("{METHOD}: new_size {}: a size in MiB from 1 to {} is right", p.new_size, i64::MAX >> 20);
        return Err(RpcError::errno(22, text).method(METHOD).param("new_size").object("bdev", &p.name));
    };
    null::resize(&app.manager, &p.name, bytes / block_size).map_err(error)?;
    Ok(true)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UringCreate {
    filename: String,
    name: String,
    block_size: Option<u32>,
    uuid: Option<Uuid>,
}

fn uring_create(app: &mut App, p: UringCreate, r: Responder) {
    let params = uring::Params {
        block_size: given(p.block_size),
        uuid: p.uuid,
        ..uring::Params::new(&p.name, &p.filename)
    };
    create_file_bdev(app, params, Instant::now() + LOCK_TIME, r);
}

/// How long a file may stay in use. A program that was killed keeps its files as long as its I/O is in flight, while the next
/// one starts.
const LOCK_TIME: Duration = Duration::from_secs(5);
/// Between two tries.
const LOCK_RETRY: Duration = Duration::from_millis(50);

fn create_file_bdev(app: &mut App, params: uring::Params, until: Instant, r: Responder) {
    match uring::create(&app.manager, params.clone()) {
        Ok(name) => r.ok(name),
        Err(bdev::Error::System { source: Errno::BUSY, .. })
            if Instant::now() < until && !app.shutting_down() =>
        {
            app.later(move |_, cx| {
                let control = cx.handle().clone();
                cx.after(LOCK_RETRY, move |_| {
                    App::send(&control, move |app, _| create_file_bdev(app, params, until, r));
                });
            });
        }
        Err(e) => {
            let error = bdev_error(r.method(), &params.name, &e);
            r.err(error);
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AioCreate {
    name: String,
    filename: String,
    block_size: Option<u32>,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    fallocate: bool,
    uuid: Option<Uuid>,
    /// io_uring never makes the core wait, so this is always so.
    #[serde(default, rename = "nowait")]
    _nowait: bool,
}

fn aio_create(app: &mut App, p: AioCreate, r: Responder) {
    let params = uring::Params {
        block_size: given(p.block_size),
        uuid: p.uuid,
        read_only: p.readonly,
        fallocate: p.fallocate,
        kind: uring::Kind::Aio,
        ..uring::Params::new(&p.name, &p.filename)
    };
    create_file_bdev(app, params, Instant::now() + LOCK_TIME, r);
}

fn rescan(app: &App, method: &str, name: &str, kind: uring::Kind) -> Result<bool, RpcError> {
    let rescan = || {
        let found = app.manager.get_as::<uring::Uring>(name)?;
        if found.params().kind != kind {
            let product = bdev::Bdev::info(&*found).product_name;
            return Err(bdev::Error::WrongKind { name: name.to_owned(), product });
        }
        uring::rescan(&app.manager, name)
    };
    rescan().map(|()| true).map_err(|e| bdev_error(method, name, &e))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DelayCreate {
    name: String,
    base_bdev_name: String,
    avg_read_latency: u64,
    p99_read_latency: u64,
    avg_write_latency: u64,
    p99_write_latency: u64,
    uuid: Option<Uuid>,
}

fn delay_create(app: &mut App, p: DelayCreate) -> Result<String, RpcError> {
    let latencies = delay::Latencies {
        avg_read: p.avg_read_latency,
        p99_read: p.p99_read_latency,
        avg_write: p.avg_write_latency,
        p99_write: p.p99_write_latency,
    };
    let (name, base_bdev_name) = (p.name.clone(), p.base_bdev_name);
    let params = delay::Params { name, base_bdev_name, uuid: p.uuid, latencies };
    delay::create(&app.manager, params).map_err(|e| bdev_error("bdev_delay_create", &p.name, &e))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DelayUpdate {
    delay_bdev_name: String,
    latency_type: LatencyType,
    latency_us: u64,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LatencyType {
    AvgRead,
    P99Read,
    AvgWrite,
    P99Write,
}

fn delay_update(app: &mut App, p: DelayUpdate) -> Result<bool, RpcError> {
    let latency_type = match p.latency_type {
        LatencyType::AvgRead => delay::LatencyType::AvgRead,
        LatencyType::P99Read => delay::LatencyType::P99Read,
        LatencyType::AvgWrite => delay::LatencyType::AvgWrite,
        LatencyType::P99Write => delay::LatencyType::P99Write,
    };
    let updated = delay::update_latency(&app.manager, &p.delay_bdev_name, latency_type, p.latency_us);
    updated.map(|()| true).map_err(|e| bdev_error("bdev_delay_update_latency", &p.delay_bdev_name, &e))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ErrorCreate {
    base_name: String,
    uuid: Option<Uuid>,
}

/// The result is `true`, though the name is chosen here, because SPDK's is.
fn error_create(app: &mut App, p: ErrorCreate) -> Result<bool, RpcError> {
    let created = error::create(&app.manager, &p.base_name, p.uuid);
    created.map(|_| true).map_err(|e| bdev_error("bdev_error_create", &p.base_name, &e))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ErrorInject {
    name: String,
    io_type: ErrorIoType,
    error_type: ErrorType,
    #[serde(default)]
    nvme_sct: u32,
    #[serde(default)]
    nvme_sc: u32,
    #[serde(default = "one")]
    num: u32,
    #[serde(default)]
    queue_depth: u64,
    #[serde(default)]
    corrupt_offset: u64,
    #[serde(default)]
    corrupt_value: u8,
}

fn one() -> u32 {
    1
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ErrorIoType {
    Clear,
    Read,
    Write,
    Unmap,
    Flush,
    All,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ErrorType {
    Failure,
    NvmeFailure,
    Pending,
    CorruptData,
    #[serde(rename = "nomem")]
    NoMem,
}

fn error_inject(app: &mut App, p: ErrorInject) -> Result<bool, RpcError> {
    const METHOD: &str = "bdev_error_inject_error";
    let op = match p.io_type {
        ErrorIoType::Clear => None,
        ErrorIoType::Read => Some(Some(Op::Read)),
        ErrorIoType::Write => Some(Some(Op::Write)),
        ErrorIoType::Unmap => Some(Some(Op::Discard)),
        ErrorIoType::Flush => Some(Some(Op::Flush)),
        ErrorIoType::All => Some(None),
    };
    if p.nvme_sct != 0 || p.nvme_sc != 0 {
        return Err(unsupported(METHOD, "nvme_sct", "requests here have no NVMe status; leave it out"));
    }
    let error = match p.error_type {
        ErrorType::Failure => error::ErrorType::Failure,
        ErrorType::Pending => error::ErrorType::Pending,
        ErrorType::NoMem => error::ErrorType::NoMem,
        ErrorType::CorruptData => {
            error::ErrorType::CorruptData { offset: p.corrupt_offset, value: p.corrupt_value }
        }
        ErrorType::NvmeFailure => {
            let text = "requests here have no NVMe status; use failure";
            return Err(unsupported(METHOD, "error_type", text));
        }
    };
    let done = match op {
        None => error::clear(&app.manager, &p.name),
        Some(op) => {
            let injection = error::Injection { op, error, num: p.num, queue_depth: p.queue_depth };
            error::inject(&app.manager, &p.name, injection)
        }
    };
    done.map(|()| true).map_err(|e| bdev_error(METHOD, &p.name, &e))
}
