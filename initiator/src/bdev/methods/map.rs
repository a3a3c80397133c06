//! `bdev_rnbd_map`: its parameters, and the call that makes a mapping again.

use std::time::Duration;

use rnbd_proto::open::AccessMode;
use rpc::RpcError;
use rtrs_poll::client::{Policy, Reconnect};
use rtrs_proto::heartbeat;
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::invalid;
use super::path::Path;
use crate::bdev::maps::{DeviceInfo, access_mode};
use crate::bdev::params::{DEFAULT_PORT, MapParams, PathParam, SessionParams};

pub(super) const METHOD: &str = "bdev_rnbd_map";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MapCall {
    name: String,
    sessname: String,
    #[serde(default)]
    paths: Vec<Path>,
    device_path: String,
    access_mode: Option<Mode>,
    trsvcid: Option<String>,
    port: Option<u16>,
    provider: Option<String>,
    uuid: Option<Uuid>,
    connections: Option<u16>,
    mpath_policy: Option<String>,
    reconnect_delay_sec: Option<u32>,
    max_reconnect_attempts: Option<i32>,
    ctrlr_loss_timeout_sec: Option<i64>,
    fast_io_fail_timeout_sec: Option<u32>,
    stale_io_timeout_sec: Option<u32>,
    connect_timeout_sec: Option<u32>,
    ack_timeout_ms: Option<u32>,
    heartbeat_interval_ms: Option<u32>,
    heartbeat_missed_max: Option<u32>,
    resize_check_sec: Option<u32>,
    keep_trying: Option<bool>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Ro,
    Rw,
    Migration,
}

/// Less would take ordinary pauses for the end.
const MIN_ACK_TIMEOUT: Duration = Duration::from_millis(100);

/// Seconds of which 0 means that there is no such time.
fn seconds(n: u32) -> Option<Duration> {
    (n > 0).then(|| Duration::from_secs(n.into()))
}

/// Seconds of which -1 means for ever.
pub(super) fn loss(method: &str, n: i64) -> Result<Option<Duration>, RpcError> {
    let wrong = || invalid(method, "ctrlr_loss_timeout_sec", "use -1 (never give up), or seconds");
    match n {
        -1 => Ok(None),
        _ => u32::try_from(n).map(|n| Some(Duration::from_secs(n.into()))).map_err(|_| wrong()),
    }
}

/// A number of attempts of which -1 means any.
pub(super) fn attempts(method: &str, n: i32) -> Result<Option<u16>, RpcError> {
    match n {
        -1 => Ok(None),
        0..=9999 => Ok(Some(n as u16)),
        _ => Err(invalid(method, "max_reconnect_attempts", "use -1 (any number) to 9999")),
    }
}

pub(super) fn policy(method: &str, name: &str) -> Result<Policy, RpcError> {
    name.parse().map_err(|e: String| invalid(method, "mpath_policy", e))
}

impl MapCall {
    /// `loading`: the configuration file makes the call.
    pub fn params(self, loading: bool) -> Result<MapParams, RpcError> {
        let session = self.session()?;
        Ok(MapParams {
            name: self.name,
            sessname: self.sessname,
            device_path: self.device_path,
            mode: match self.access_mode {
                Some(Mode::Ro) => AccessMode::ReadOnly,
                Some(Mode::Migration) => AccessMode::Migration,
                Some(Mode::Rw) | None => AccessMode::ReadWrite,
            },
            uuid: self.uuid,
            session,
            fast_io_fail: self.fast_io_fail_timeout_sec.and_then(seconds),
            resize_check: seconds(self.resize_check_sec.unwrap_or(10)),
            keep_trying: self.keep_trying.unwrap_or(loading),
        })
    }

    fn session(&self) -> Result<SessionParams, RpcError> {
        let d = SessionParams::default();
        let port = match (&self.trsvcid, self.port) {
            (Some(_), Some(_)) => {
                return Err(invalid(METHOD, "port", "the same as trsvcid: give one of them"));
            }
            (Some(text), None) => text.parse().map_err(|_| {
                invalid(METHOD, "trsvcid", format!("'{text}': use a port number such as \"1234\""))
            })?,
            (None, port) => port.unwrap_or(DEFAULT_PORT),
        };
        let connect_timeout = self
            .connect_timeout_sec
            .map_or(Some(d.connect_timeout), seconds)
            .ok_or_else(|| invalid(METHOD, "connect_timeout_sec", "use at least 1"))?;
        let heartbeat = heartbeat::Config {
            interval_ns: self
                .heartbeat_interval_ms
                .map_or(d.heartbeat.interval_ns, |ms| u64::from(ms) * 1_000_000),
            missed_max: self.heartbeat_missed_max.unwrap_or(d.heartbeat.missed_max),
        };
        let ack_timeout = self.ack_timeout_ms.map_or(d.ack_timeout, |ms| Duration::from_millis(ms.into()));
        if ack_timeout < MIN_ACK_TIMEOUT {
            let text = format!("use at least {}", MIN_ACK_TIMEOUT.as_millis());
            return Err(invalid(METHOD, "ack_timeout_ms", text));
        }
        if heartbeat.interval_ns == 0 {
            return Err(invalid(METHOD, "heartbeat_interval_ms", "use at least 1"));
        }
        Ok(SessionParams {
            paths: self.paths.iter().map(|p| p.0).collect(),
            port,
            provider: self.provider.clone().unwrap_or(d.provider),
            connections: self.connections,
            policy: self.mpath_policy.as_deref().map_or(Ok(d.policy), |p| policy(METHOD, p))?,
            reconnect: Reconnect {
                delay: self.reconnect_delay_sec.map_or(d.reconnect.delay, |s| Duration::from_secs(s.into())),
                max_attempts: self.max_reconnect_attempts.map_or(Ok(None), |n| attempts(METHOD, n))?,
            },
            ctrlr_loss: self.ctrlr_loss_timeout_sec.map_or(Ok(None), |n| loss(METHOD, n))?,
            stale_io: self.stale_io_timeout_sec.map_or(d.stale_io, |s| Duration::from_secs(s.into())),
            connect_timeout,
            ack_timeout,
            heartbeat,
        })
    }
}

/// The call that makes this mapping again.
pub(super) fn call(d: &DeviceInfo) -> Value {
    let (p, s) = (&d.params, &d.params.session);
    let path = |p: &PathParam| {
        let mut path = json!({"dst": p.dst});
        if let Some(src) = p.src {
            path["src"] = json!(src);
        }
        if let Some(port) = p.port {
            path["trsvcid"] = port.to_string().into();
        }
        path
    };
    let seconds = |t: Option<Duration>| t.map_or(0, |t| t.as_secs());
    let mut params = json!({
        "name": p.name, "sessname": p.sessname, "device_path": p.device_path,
        "access_mode": access_mode(p.mode),
        "paths": s.paths.iter().map(path).collect::<Vec<_>>(),
        "trsvcid": s.port.to_string(), "provider": s.provider,
        "mpath_policy": s.policy.name().replace('-', "_"),
        "reconnect_delay_sec": s.reconnect.delay.as_secs().max(1),
        "max_reconnect_attempts": s.reconnect.max_attempts.map_or(-1, i32::from),
        "ctrlr_loss_timeout_sec": s.ctrlr_loss.map_or(-1, |t| t.as_secs() as i64),
        "fast_io_fail_timeout_sec": seconds(p.fast_io_fail),
        "stale_io_timeout_sec": s.stale_io.as_secs(),
        "connect_timeout_sec": s.connect_timeout.as_secs().max(1),
        "ack_timeout_ms": s.ack_timeout.as_millis() as u64,
        "heartbeat_interval_ms": s.heartbeat.interval_ns / 1_000_000,
        "heartbeat_missed_max": s.heartbeat.missed_max,
        "resize_check_sec": seconds(p.resize_check),
    });
    if let Some(uuid) = p.uuid {
        params["uuid"] = json!(uuid);
    }
    if let Some(connections) = s.connections {
        params["connections"] = connections.into();
    }
    json!({"method": METHOD, "params": params})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(params: Value) -> Result<MapParams, RpcError> {
        let call: MapCall = serde_json::from_value(params).unwrap();
        call.params(false)
    }

    fn info(params: MapParams) -> DeviceInfo {
        DeviceInfo {
            params,
            state: crate::bdev::State::Init,
            last_error: None,
            given_up: false,
            device_id: None,
            size: None,
            bdev: None,
        }
    }

    #[test]
    fn what_is_saved_makes_the_same_mapping() {
        let calls = [
            json!({"name": "d", "sessname": "s", "paths": ["ip:10.0.0.1"], "device_path": "ram0"}),
            json!({"name": "d", "sessname": "s", "device_path": "a/b", "access_mode": "migration", "port": 99,
                "paths": [{"src": "10.0.0.2", "dst": "10.0.0.1", "trsvcid": "7"}, "fd00::1"], "provider": "soft-roce",
                "stale_io_timeout_sec": 3,
                "uuid": "7f5a2b4e-9b1c-4a5e-8f64-0a1b2c3d4e5f", "connections": 3, "mpath_policy": "round-robin",
                "reconnect_delay_sec": 3, "max_reconnect_attempts": 7, "ctrlr_loss_timeout_sec": 60,
                "fast_io_fail_timeout_sec": 5, "connect_timeout_sec": 4, "ack_timeout_ms": 1000, "heartbeat_interval_ms": 1500,
                "heartbeat_missed_max": 2, "resize_check_sec": 0}),
        ];
        for params in calls {
            let first = parse(params.clone()).unwrap();
            let saved = call(&info(first.clone()));
            assert_eq!(saved["method"], METHOD);
            let again = parse(saved["params"].clone()).unwrap();
            assert_eq!(format!("{again:?}"), format!("{first:?}"), "{params}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (more, say) in [
            (json!({"port": 1, "trsvcid": "1"}), "port: the same as trsvcid"),
            (json!({"trsvcid": "rnbd"}), "trsvcid: 'rnbd'"),
            (json!({"mpath_policy": "best"}), "mpath_policy"),
            (json!({"max_reconnect_attempts": 10_000}), "max_reconnect_attempts: use -1"),
            (json!({"ctrlr_loss_timeout_sec": -2}), "ctrlr_loss_timeout_sec: use -1"),
            (json!({"connect_timeout_sec": 0}), "connect_timeout_sec: use at least 1"),
            (json!({"ack_timeout_ms": 99}), "ack_timeout_ms: use at least 100"),
            (json!({"heartbeat_interval_ms": 0}), "heartbeat_interval_ms: use at least 1"),
        ] {
            let mut params = json!({"name": "d", "sessname": "s", "device_path": "x"});
            params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let e = parse(params).expect_err(say);
            assert!(e.message.contains(say), "{}", e.message);
        }
    }
}
