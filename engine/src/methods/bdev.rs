//! `bdev_*` methods of every bdev, whatever its kind.

use std::time::{Duration, Instant};

use bdev::{BdevStatus, DriverValue, Op};
use reactor::Turn;
use rpc::{MethodTable, Responder, RpcError, States};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::bdev_error;
use crate::app::App;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method::<GetBdevs>("bdev_get_bdevs", States::RUNTIME, get_bdevs);
    t.method_sync::<SetOptions, _>("bdev_set_options", States::STARTUP, |_, p| set_options(&p));
    t.method::<Examine>("bdev_examine", States::RUNTIME, |app, p, r| examine(app, &p, r));
    // No module of this program looks for something on a new bdev (partitions, volumes); those of a library may.
    t.method_without_params("bdev_wait_for_examine", States::RUNTIME, |app, r| {
        if let Some(r) = app.call_about("bdev_wait_for_examine", &Value::Null, None, r) {
            r.ok(true);
        }
    });
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Examine {
    name: String,
}

fn examine(app: &mut App, p: &Examine, r: Responder) {
    match app.manager.status(&p.name) {
        Err(e) => r.err(bdev_error("bdev_examine", &p.name, &e)),
        Ok(bdev) => {
            if let Some(r) = app.call_about("bdev_examine", &json!(p), Some(&bdev), r) {
                r.ok(true);
            }
        }
    }
}

/// Sizes of pools that do not exist here: requests and buffers belong to the connections. Taken, so that
/// configurations of SPDK load, and not kept.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetOptions {
    bdev_io_pool_size: Option<u32>,
    bdev_io_cache_size: Option<u32>,
    #[serde(rename = "bdev_auto_examine")]
    _bdev_auto_examine: Option<bool>,
    #[serde(rename = "iobuf_small_cache_size")]
    _iobuf_small_cache_size: Option<u32>,
    #[serde(rename = "iobuf_large_cache_size")]
    _iobuf_large_cache_size: Option<u32>,
}

fn set_options(p: &SetOptions) -> Result<bool, RpcError> {
    if let (Some(pool), Some(cache)) = (p.bdev_io_pool_size, p.bdev_io_cache_size)
        && pool < cache
    {
        let text =
            format!("bdev_set_options: bdev_io_pool_size {pool} is too small for bdev_io_cache_size {cache}");
        return Err(RpcError::invalid_params(text).param("bdev_io_pool_size"));
    }
    tracing::info!("bdev_set_options has no effect: requests and buffers belong to the connections");
    Ok(true)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetBdevs {
    name: Option<String>,
    /// How long to wait for `name`, milliseconds.
    #[serde(default)]
    timeout: u64,
}

/// How often a caller who waits for a bdev is looked after.
const LOOK: Duration = Duration::from_millis(10);

fn get_bdevs(app: &mut App, p: GetBdevs, r: Responder) {
    let Some(name) = p.name else {
        return r.ok(app.manager.list().iter().map(|s| bdev_row(app, s)).collect::<Vec<_>>());
    };
    let until = Instant::now().checked_add(Duration::from_millis(p.timeout));
    if p.timeout == 0 || app.manager.get(&name).is_ok() {
        answer_bdev(app, &name, r);
    } else {
        app.later(move |app, cx| wait_for_bdev(app, cx, name, until, r));
    }
}

fn answer_bdev(app: &App, name: &str, r: Responder) {
    let row = app.manager.status(name).map(|s| [bdev_row(app, &s)]);
    r.reply(row.map_err(|e| bdev_error("bdev_get_bdevs", name, &e)));
}

/// Answers when `name` appears, or with an error at `until` (`None`: never).
fn wait_for_bdev(app: &mut App, cx: &mut Turn<'_>, name: String, until: Option<Instant>, r: Responder) {
    if until.is_some_and(|t| t <= cx.now) || app.manager.get(&name).is_ok() {
        return answer_bdev(app, &name, r);
    }
    let control = cx.handle().clone();
    cx.after(LOOK, move |_| App::send(&control, move |app, cx| wait_for_bdev(app, cx, name, until, r)));
}

/// Section of `driver_specific`, as SPDK's modules name it.
fn section(app: &App, s: &BdevStatus) -> &'static str {
    match s.bdev.info().product_name {
        "Malloc disk" => "malloc",
        "Null disk" => "null",
        "AIO disk" => "aio",
        "URING bdev" => "uring",
        "delay" => "delay",
        "Error Injection Disk" => "error",
        _ => app.bdev_kind(s).map_or("bdev", |kind| kind.section),
    }
}

/// One element of `bdev_get_bdevs` (SPDK lib/bdev/bdev_rpc.c).
fn bdev_row(app: &App, s: &BdevStatus) -> Value {
    let info = s.bdev.info();
    let mut row = json!({
        "name": info.name,
        "aliases": info.all_aliases(),
        "product_name": info.product_name,
        "block_size": info.block_size,
        "num_blocks": s.blocks,
        "physical_block_size": info.physical_block_size,
        "preferred_write_alignment": info.physical_block_size / info.block_size,
        "preferred_write_granularity": info.physical_block_size / info.block_size,
        "optimal_write_size": 0,
        "preferred_unmap_alignment": info.discard_granularity / info.block_size,
        "preferred_unmap_granularity": info.discard_granularity / info.block_size,
        "uuid": info.uuid,
        "assigned_rate_limits": {
            "rw_ios_per_sec": 0, "rw_mbytes_per_sec": 0, "r_mbytes_per_sec": 0, "w_mbytes_per_sec": 0,
        },
        "claimed": s.claim.is_some(),
        "zoned": false,
        "supported_io_types": io_types(s),
        "driver_specific": driver_specific(app, s),
    });
    if let Some(claim) = &s.claim {
        row["claim_type"] = bdev::Claim::TYPE.into();
        row["claim_holder"] = claim.holder.clone().into();
    }
    app.subsystems.iter().for_each(|subsystem| subsystem.describe_bdev(s, &mut row));
    row
}

fn io_types(s: &BdevStatus) -> Value {
    let has = |op| s.supported.has(op);
    json!({
        "read": has(Op::Read), "write": has(Op::Write), "unmap": has(Op::Discard), "flush": has(Op::Flush),
        "reset": has(Op::Reset), "nvme_admin": false, "nvme_io": false, "nvme_io_md": false,
        "write_zeroes": has(Op::WriteZeroes), "zcopy": false, "get_zone_info": false, "zone_management": false,
        "zone_append": false, "compare": false, "compare_and_write": false, "abort": false, "seek_hole": false,
        "seek_data": false, "copy": false, "nvme_iov_md": false, "nvme_nssr": false, "write_uncorrectable": false,
        "secure_erase": has(Op::SecureErase),
    })
}

fn driver_specific(app: &App, s: &BdevStatus) -> Value {
    let values = s.bdev.driver_specific();
    if values.is_empty() {
        return json!({});
    }
    let value = |v| match v {
        DriverValue::Text(t) => Value::from(t),
        DriverValue::Number(n) => n.into(),
        DriverValue::Bool(b) => b.into(),
    };
    let values: Map<String, Value> = values.into_iter().map(|(k, v)| (k.to_owned(), value(v))).collect();
    json!({ section(app, s): values })
}
