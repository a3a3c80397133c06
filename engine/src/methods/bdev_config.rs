//! The calls that make the present bdevs, for `framework_get_config`.

use std::any::Any;

use bdev::delay::Delay;
use bdev::error::ErrorBdev;
use bdev::malloc::Malloc;
use bdev::null::Null;
use bdev::uring::{Kind, Uring};
use bdev::{Bdev, BdevStatus};
use serde_json::{Value, json};

use crate::app::App;

/// Creates in order of registration, which puts every layer after its base.
pub(super) fn config(app: &App) -> Vec<Value> {
    let mut calls: Vec<Value> = app.manager.list().iter().filter_map(|s| create(app, s)).collect();
    calls.push(json!({"method": "bdev_wait_for_examine"}));
    calls
}

/// The call that makes this bdev; `None` for one that no call makes.
fn create(app: &App, s: &BdevStatus) -> Option<Value> {
    let any: &dyn Any = &*s.bdev;
    let mut common = json!({"name": s.bdev.info().name, "uuid": s.bdev.info().uuid});
    let (method, params) = if any.is::<Malloc>() {
        ("bdev_malloc_create", blank(s))
    } else if any.is::<Null>() {
        ("bdev_null_create", blank(s))
    } else if let Some(file) = any.downcast_ref::<Uring>() {
        uring(file)
    } else if let Some(delay) = any.downcast_ref::<Delay>() {
        let l = delay.latencies();
        let params = json!({
            "base_bdev_name": delay.base_name(), "avg_read_latency": l.avg_read, "p99_read_latency": l.p99_read,
            "avg_write_latency": l.avg_write, "p99_write_latency": l.p99_write,
        });
        ("bdev_delay_create", params)
    } else if let Some(error) = any.downcast_ref::<ErrorBdev>() {
        // Its name follows from the base's. Injections are not configuration.
        common = json!({"uuid": error.info().uuid});
        ("bdev_error_create", json!({"base_name": error.base_name()}))
    } else {
        return app.bdev_kind(s)?.create;
    };
    if let (Value::Object(all), Value::Object(own)) = (&mut common, params) {
        all.extend(own);
    }
    Some(json!({"method": method, "params": common}))
}

/// A disk without contents.
fn blank(s: &BdevStatus) -> Value {
    let info = s.bdev.info();
    json!({
        "num_blocks": s.blocks, "block_size": info.block_size, "physical_block_size": info.physical_block_size,
    })
}

fn uring(file: &Uring) -> (&'static str, Value) {
    let p = file.params();
    let mut params = json!({"filename": p.filename});
    if let Some(size) = p.block_size {
        params["block_size"] = size.into();
    }
    match p.kind {
        Kind::Uring => ("bdev_uring_create", params),
        Kind::Aio => {
            params["readonly"] = p.read_only.into();
            params["fallocate"] = p.fallocate.into();
            ("bdev_aio_create", params)
        }
    }
}
