//! Results.

use rtrs_poll::client::{PathInfo, PathStats};
use serde_json::{Value, json};

use crate::bdev::maps::{access_mode, path_name};
use crate::bdev::reply::known;
use crate::bdev::{DeviceInfo, SessionReport};

pub(super) fn device(d: &DeviceInfo) -> Value {
    let p = &d.params;
    known(json!({
        "name": p.name,
        "state": d.state.name(),
        "session": p.sessname,
        "device_path": p.device_path,
        "access_mode": access_mode(p.mode),
        "given_up": d.given_up,
        "last_error": d.last_error,
        "device_id": d.device_id,
        "num_blocks": d.size.map(|(blocks, _)| blocks),
        "block_size": d.size.map(|(_, block_size)| block_size),
        "physical_block_size": d.bdev.as_ref().map(|b| b.physical_block_size),
        "write_cache": d.bdev.as_ref().map(|b| b.write_cache),
        "fua": d.bdev.as_ref().map(|b| b.native_fua),
        "uuid": d.bdev.as_ref().map(|b| b.uuid),
        "fast_io_fail_timeout_sec": p.fast_io_fail.map_or(0, |t| t.as_secs()),
    }))
}

pub(super) fn session(s: &SessionReport) -> Value {
    let p = &s.params;
    let limits = s.info.as_ref().and_then(|i| i.limits);
    let policy = s.info.as_ref().map_or(p.policy, |i| i.policy);
    known(json!({
        "session": s.name,
        "state": if s.ready { "connected" } else { "disconnected" },
        "last_error": s.reason,
        "reconnected": s.info.as_ref().map(|i| i.generation.saturating_sub(1)),
        "connections": s.info.as_ref().map(|i| i.connections),
        "queue_depth": limits.map(|l| l.queue_depth),
        "max_io_size": limits.map(|l| l.max_io_size),
        "mpath_policy": policy.name().replace('-', "_"),
        "max_reconnect_attempts": p.reconnect.max_attempts.map_or(-1, i32::from),
        "reconnect_delay_sec": p.reconnect.delay.as_secs_f64(),
        "ctrlr_loss_timeout_sec": p.ctrlr_loss.map_or(-1.0, |t| t.as_secs_f64()),
        "devices": s.devices,
        "paths": s.info.iter().flat_map(|i| &i.paths).map(path).collect::<Vec<_>>(),
    }))
}

fn path(p: &PathInfo) -> Value {
    known(json!({
        "path": path_name(p),
        "src": p.src.map(|ip| format!("ip:{ip}")),
        "dst": format!("ip:{}", p.dst.ip()),
        "trsvcid": p.dst.port().to_string(),
        "state": p.state.name(),
        "provider": p.provider,
        "hca_name": p.hca_name,
        "hca_port": p.hca_name.as_ref().map(|_| p.hca_port),
        "cur_latency_ns": p.latency_ns,
        "rotating_keys": p.rotating_keys,
        "silent_ms": p.silent.map(|t| t.as_millis() as u64),
        "last_error": p.last_error,
        "next_attempt_ms": p.next_attempt.map(|t| t.as_millis() as u64),
        "stats": counters(&p.stats),
    }))
}

fn counters(s: &PathStats) -> Value {
    json!({
        "rd_cnt": s.rd_cnt, "rd_bytes": s.rd_bytes, "wr_cnt": s.wr_cnt, "wr_bytes": s.wr_bytes,
        "inflight": s.inflight, "failovers": s.failovers,
        "reconnects_ok": s.reconnects_ok, "reconnects_failed": s.reconnects_failed,
    })
}

pub(super) fn stats(session: &str, path: &str, s: &PathStats) -> Value {
    let mut row = counters(s);
    row["session"] = session.into();
    row["path"] = path.into();
    row
}
