//! `bdev_*` methods that measure: counters and latency histograms. A tick is a nanosecond.

use base64::Engine;
use bdev::{HistogramConfig, IoStats, Op, OpStats, ResetMode, Status};
use rpc::{MethodTable, Responder, RpcError, States};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::threads::{TICK_RATE, thread_id};
use super::{bdev_error, unsupported};
use crate::app::App;

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method_sync::<GetIostat, _>("bdev_get_iostat", States::RUNTIME, get_iostat);
    t.method_sync::<ResetIostat, _>("bdev_reset_iostat", States::RUNTIME, reset_iostat);
    t.method_sync::<EnableHistogram, _>("bdev_enable_histogram", States::RUNTIME, enable_histogram);
    t.method_sync::<Name, _>("bdev_get_histogram", States::RUNTIME, get_histogram);
    t.method_sync::<Borders, _>("bdev_get_histogram_borders", States::RUNTIME, get_borders);
    t.method_sync::<QdSampling, _>("bdev_set_qd_sampling_period", States::RUNTIME, set_qd_sampling);
    t.method::<QosLimit>("bdev_set_qos_limit", States::RUNTIME, |app, p, r| set_qos_limit(app, &p, r));
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    name: String,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    All,
    MaxMin,
    Error,
    #[default]
    None,
}

fn reset_mode(method: &str, param: &str, mode: Mode) -> Result<ResetMode, RpcError> {
    match mode {
        Mode::All => Ok(ResetMode::All),
        Mode::MaxMin => Ok(ResetMode::MaxMin),
        Mode::Error => Err(unsupported(
            method,
            param,
            "error counts are not reset by themselves; use all, maxmin or none",
        )),
        Mode::None => Ok(ResetMode::None),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetIostat {
    names: Option<Vec<String>>,
    #[serde(default)]
    per_channel: bool,
    #[serde(default)]
    reset_mode: Mode,
}

fn get_iostat(app: &mut App, p: GetIostat) -> Result<Value, RpcError> {
    const METHOD: &str = "bdev_get_iostat";
    let mode = reset_mode(METHOD, "reset_mode", p.reset_mode)?;
    let all = || app.manager.list().iter().map(|s| s.bdev.info().name.clone()).collect();
    let names: Vec<String> = p.names.clone().unwrap_or_else(all);
    let head = json!({"tick_rate": TICK_RATE, "ticks": app.started.elapsed().as_nanos() as u64});
    let error = |name: &str, e| bdev_error(METHOD, name, &e);
    let result = if p.per_channel {
        let [name] = p.names.as_deref().unwrap_or_default() else {
            let text = format!("{METHOD}: per_channel needs exactly one bdev in names");
            return Err(RpcError::errno(22, text).method(METHOD).param("names"));
        };
        let channels = app.manager.channel_stats(name).map_err(|e| error(name, e))?;
        let rows: Vec<Value> = channels.iter().map(|(thread, s)| channel_row(app, thread, s)).collect();
        joined(head, json!({"name": name, "channels": rows}))
    } else {
        let mut rows = Vec::with_capacity(names.len());
        for name in &names {
            let stats = app.manager.stats(name).map_err(|e| error(name, e))?;
            rows.push(joined(json!({"name": name}), stats_row(&stats)));
        }
        joined(head, json!({"bdevs": rows}))
    };
    for name in &names {
        app.manager.reset_stats(Some(name), mode).map_err(|e| error(name, e))?;
    }
    Ok(result)
}

fn channel_row(app: &App, thread: &str, stats: &IoStats) -> Value {
    joined(json!({"thread_id": thread_id(app, thread), "thread": thread}), stats_row(stats))
}

fn joined(mut a: Value, b: Value) -> Value {
    if let (Value::Object(a), Value::Object(b)) = (&mut a, b) {
        a.extend(b);
    }
    a
}

/// The counters as SPDK writes them (`spdk_bdev_dump_io_stat_json`), and how requests failed.
fn stats_row(s: &IoStats) -> Value {
    let mut row = Map::new();
    let zero = OpStats::default();
    let kinds = [
        ("read", s.op(Op::Read)),
        ("write", s.op(Op::Write)),
        ("unmap", s.op(Op::Discard)),
        // No bdev copies by itself.
        ("copy", &zero),
    ];
    for (kind, bytes) in kinds.iter().zip(["bytes_read", "bytes_written", "bytes_unmapped", "bytes_copied"]) {
        row.insert(bytes.into(), kind.1.bytes.into());
        row.insert(format!("num_{}_ops", kind.0), kind.1.ops.into());
    }
    for (name, o) in kinds {
        row.insert(format!("{name}_latency_ticks"), o.latency_ns.into());
        row.insert(format!("max_{name}_latency_ticks"), o.max_latency_ns.into());
        let min = if o.min_latency_ns == u64::MAX { 0 } else { o.min_latency_ns };
        row.insert(format!("min_{name}_latency_ticks"), min.into());
    }
    let errors = Status::ALL.into_iter().filter(|e| s.errors(*e) > 0);
    let errors: Map<String, Value> = errors.map(|e| (e.name().to_owned(), s.errors(e).into())).collect();
    row.insert("io_error".into(), errors.into());
    row.insert("driver_specific".into(), json!({}));
    row.into()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResetIostat {
    name: Option<String>,
    mode: Option<Mode>,
}

fn reset_iostat(app: &mut App, p: ResetIostat) -> Result<bool, RpcError> {
    const METHOD: &str = "bdev_reset_iostat";
    let mode = reset_mode(METHOD, "mode", p.mode.unwrap_or(Mode::All))?;
    let name = p.name.as_deref();
    let reset = app.manager.reset_stats(name, mode);
    reset.map(|()| true).map_err(|e| bdev_error(METHOD, name.unwrap_or_default(), &e))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EnableHistogram {
    name: String,
    enable: bool,
    opc: Option<HistogramOp>,
    granularity: Option<u8>,
    min_nsec: Option<u64>,
    max_nsec: Option<u64>,
}

/// Names of `supported_io_types`.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum HistogramOp {
    Read,
    Write,
    Unmap,
    Flush,
    Reset,
    WriteZeroes,
    SecureErase,
}

impl From<HistogramOp> for Op {
    fn from(op: HistogramOp) -> Self {
        match op {
            HistogramOp::Read => Self::Read,
            HistogramOp::Write => Self::Write,
            HistogramOp::Unmap => Self::Discard,
            HistogramOp::Flush => Self::Flush,
            HistogramOp::Reset => Self::Reset,
            HistogramOp::WriteZeroes => Self::WriteZeroes,
            HistogramOp::SecureErase => Self::SecureErase,
        }
    }
}

/// Longest latency told apart unless the caller says otherwise: two minutes, as in SPDK. The shortest is 0 instead of
/// SPDK's microsecond, because its script decodes only that one exactly.
const MAX_NSEC: u64 = 120_000_000_000;

fn enable_histogram(app: &mut App, p: EnableHistogram) -> Result<bool, RpcError> {
    const METHOD: &str = "bdev_enable_histogram";
    let default = HistogramConfig::default();
    let config = HistogramConfig {
        granularity: p.granularity.unwrap_or(default.granularity),
        min_nsec: p.min_nsec.unwrap_or(default.min_nsec),
        max_nsec: p.max_nsec.unwrap_or(MAX_NSEC),
        op: p.opc.map(Op::from),
    };
    if config.min_nsec >= config.max_nsec {
        let text =
            format!("{METHOD}: min_nsec {} must be less than max_nsec {}", config.min_nsec, config.max_nsec);
        return Err(RpcError::errno(22, text).method(METHOD).param("min_nsec").object("bdev", &p.name));
    }
    let switched = app.manager.enable_histogram(&p.name, p.enable.then_some(config));
    switched.map(|()| true).map_err(|e| bdev_error(METHOD, &p.name, &e))
}

fn get_histogram(app: &mut App, p: Name) -> Result<Value, RpcError> {
    let h = app.manager.histogram(&p.name).map_err(|e| bdev_error("bdev_get_histogram", &p.name, &e))?;
    let bytes: Vec<u8> = h.counts.iter().flat_map(|c| c.to_le_bytes()).collect();
    Ok(json!({
        "histogram": base64::engine::general_purpose::STANDARD.encode(bytes),
        "granularity": h.config.granularity, "min_range": h.config.min_range(), "max_range": h.config.max_range(),
        "tsc_rate": TICK_RATE,
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Borders {
    name: String,
    /// Microseconds.
    borders: Vec<u64>,
}

/// How many requests were as fast as each border, to the precision of a bucket, and last how many there were.
fn get_borders(app: &mut App, p: Borders) -> Result<Value, RpcError> {
    const METHOD: &str = "bdev_get_histogram_borders";
    if p.borders.is_empty() || !p.borders.is_sorted() {
        let text = format!("{METHOD}: borders: one or more microseconds in ascending order are right");
        return Err(RpcError::errno(22, text).method(METHOD).param("borders").object("bdev", &p.name));
    }
    let h = app.manager.histogram(&p.name).map_err(|e| bdev_error(METHOD, &p.name, &e))?.to_hdr();
    let counts = p.borders.iter().map(|us| h.count_between(0, us.saturating_mul(1000)));
    Ok(json!({"borders_count": counts.chain([h.len()]).collect::<Vec<u64>>()}))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QdSampling {
    name: String,
    period: u64,
}

fn set_qd_sampling(app: &mut App, p: QdSampling) -> Result<bool, RpcError> {
    const METHOD: &str = "bdev_set_qd_sampling_period";
    app.manager.get(&p.name).map_err(|e| bdev_error(METHOD, &p.name, &e))?;
    if p.period == 0 {
        return Ok(true);
    }
    let text = "queue depths are not sampled; 0 (off) is the only period";
    Err(unsupported(METHOD, "period", text).object("bdev", &p.name))
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct QosLimit {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    rw_ios_per_sec: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rw_mbytes_per_sec: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r_mbytes_per_sec: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    w_mbytes_per_sec: Option<u64>,
}

/// Limits of a library's bdev are the library's.
fn set_qos_limit(app: &mut App, p: &QosLimit, r: Responder) {
    const METHOD: &str = "bdev_set_qos_limit";
    match app.manager.status(&p.name) {
        Err(e) => r.err(bdev_error(METHOD, &p.name, &e)),
        Ok(bdev) => {
            if let Some(r) = app.call_about(METHOD, &json!(p), Some(&bdev), r) {
                r.reply(no_limits(METHOD, p));
            }
        }
    }
}

/// Bdevs of this program have no limits, and the answer says so of any that is asked for.
fn no_limits(method: &str, p: &QosLimit) -> Result<bool, RpcError> {
    let limits = [
        ("rw_ios_per_sec", p.rw_ios_per_sec),
        ("rw_mbytes_per_sec", p.rw_mbytes_per_sec),
        ("r_mbytes_per_sec", p.r_mbytes_per_sec),
        ("w_mbytes_per_sec", p.w_mbytes_per_sec),
    ];
    if limits.iter().all(|(_, l)| l.is_none()) {
        let names = limits.map(|(name, _)| name).join(", ");
        let text = format!("{method}: no limit given; use one of {names}");
        return Err(RpcError::errno(22, text).method(method).object("bdev", &p.name));
    }
    match limits.iter().find(|(_, l)| l.is_some_and(|l| l != 0)) {
        Some((param, _)) => {
            let text = "rate limits are not implemented; 0 (unlimited) is the only value";
            Err(unsupported(method, param, text).object("bdev", &p.name))
        }
        None => Ok(true),
    }
}
