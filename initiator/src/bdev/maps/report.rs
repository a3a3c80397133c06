//! How mappings and sessions are doing, for people and RPC.

use std::time::Instant;

use bdev::{Bdev, DriverValue};
use rtrs_poll::client::SessionInfo;

use super::{Map, Maps, State};
use crate::bdev::params::{MapParams, SessionParams};

/// One mapping.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// As it was asked for, and as it is saved.
    pub params: MapParams,
    /// Its life.
    pub state: State,
    /// Why it is not open.
    pub last_error: Option<String>,
    /// Nothing is tried any more until it is mapped anew.
    pub given_up: bool,
    /// The server's number for it, while open.
    pub device_id: Option<u32>,
    /// From the first opening on: size in blocks, block size in bytes.
    pub size: Option<(u64, u32)>,
    /// From the first opening on.
    pub bdev: Option<bdev::Info>,
}

/// One session.
#[derive(Clone, Debug)]
pub struct SessionReport {
    /// At the server.
    pub name: String,
    /// As it was asked for, with later changes.
    pub params: SessionParams,
    /// Of RTRS; `None` once it was given up.
    pub info: Option<SessionInfo>,
    /// SESS_INFO was answered.
    pub ready: bool,
    /// Why it was given up.
    pub reason: Option<String>,
    /// Names of its bdevs.
    pub devices: Vec<String>,
}

impl Maps {
    /// All mappings in the order in which they were made, or that of the bdev `name`.
    pub fn devices(&self, name: Option<&str>) -> Vec<DeviceInfo> {
        let wanted = |m: &&Map| name.is_none_or(|n| m.params.name == n);
        self.maps.values().filter(wanted).map(|m| self.device_info(m)).collect()
    }

    fn device_info(&self, map: &Map) -> DeviceInfo {
        let disk = map.disk.as_deref();
        // What changed since the session was made is saved with each of its mappings.
        let session = self.session(&map.params.sessname).map(|s| s.params.clone());
        let mut params = map.params.clone();
        params.session = session.unwrap_or(params.session);
        DeviceInfo {
            params,
            state: map.state,
            last_error: map.reason.clone(),
            given_up: map.given_up,
            device_id: map.device.map(|d| d.id),
            size: disk.map(|d| (d.blocks(), d.info().block_size)),
            bdev: disk.map(|d| d.info().clone()),
        }
    }

    /// All sessions, or the one of that name.
    pub fn sessions(&self, now: Instant, name: Option<&str>) -> Vec<SessionReport> {
        let client = self.initiator.borrow().client().clone();
        let client = client.borrow();
        let wanted = self.sessions.iter().filter(|s| name.is_none_or(|n| s.name == n));
        let report = |s: &super::Session| SessionReport {
            name: s.name.clone(),
            params: s.params.clone(),
            info: s.id.and_then(|id| client.session(now, id)),
            ready: s.ready.is_some(),
            reason: s.reason.clone(),
            devices: self.of_session(&s.name).iter().map(|n| self.maps[n].params.name.clone()).collect(),
        };
        wanted.map(report).collect()
    }

    /// Renews what `bdev_get_bdevs` shows of a mapping.
    pub(super) fn shown(&self, number: u64) {
        let Some(map) = self.maps.get(&number) else { return };
        let Some(disk) = &map.disk else { return };
        let text = |t: &str| DriverValue::Text(t.to_owned());
        let mut values = vec![
            ("session", text(&map.params.sessname)),
            ("device_path", text(&map.params.device_path)),
            ("access_mode", text(access_mode(map.params.mode))),
            ("state", text(map.state.name())),
        ];
        if let Some(reason) = &map.reason {
            values.push(("last_error", text(reason)));
        }
        disk.show(values);
    }
}

/// As the kernel writes it.
pub fn access_mode(mode: rnbd_proto::open::AccessMode) -> &'static str {
    use rnbd_proto::open::AccessMode;
    match mode {
        AccessMode::ReadOnly => "ro",
        AccessMode::ReadWrite => "rw",
        AccessMode::Migration => "migration",
    }
}
