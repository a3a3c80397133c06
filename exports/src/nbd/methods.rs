//! `nbd_start_disk`, `nbd_stop_disk`, `nbd_get_disks`, as SPDK's client calls them, with parameters of our own.

use engine::{App, MethodText};
use nbd_poll::kernel::sysfs;
use rpc::{MethodTable, Responder, RpcError, States};
use serde::Deserialize;
use serde_json::{Value, json};

use super::disk::{Phase, device_name, disks};
use super::{start, stop};

/// How long requests wait for the program to come back after a crash, unless said otherwise.
const DEAD_CONN_TIMEOUT_SEC: u64 = 60;
/// Most sockets of a disk. The kernel uses one per CPU at most.
const MAX_CONNECTIONS: u32 = 64;

pub(super) const TEXTS: &[MethodText] = &[
    (
        "nbd_get_disks",
        "[{nbd_device, bdev_name}]",
        "Kernel NBD devices of this program, or the one on `nbd_device`.",
    ),
    (
        "nbd_start_disk",
        "nbd_device",
        "Makes a bdev a kernel NBD device: `nbd_device` (\"/dev/nbd0\"), or the first that is free. `connections` sockets \
         (default: one per reactor, at most 4) are spread over the reactors. After a crash of the program requests wait \
         `dead_conn_timeout_sec` (default 60) for it to come back; starting the same bdev again takes the device over, in \
         use as it is. A request that is not answered within `timeout_sec` is sent again on another connection; 0: after \
         30 s if there are several, else never. `control`: auto, netlink or ioctl; a device made by ioctl ends with the \
         program.",
    ),
    (
        "nbd_stop_disk",
        "true",
        "Flushes the device, disconnects it, and answers when it is free again. Refused while it is mounted or in other \
         exclusive use, unless `force` is set: its users get I/O errors then, and nothing is waited for, also by a stop that \
         is under way.",
    ),
];

pub(super) fn register(t: &mut MethodTable<App>) {
    t.method::<StartDisk>("nbd_start_disk", States::RUNTIME, start_disk);
    t.method::<StopDisk>("nbd_stop_disk", States::RUNTIME, stop_disk);
    t.method_sync::<GetDisks, _>("nbd_get_disks", States::RUNTIME, get_disks);
}

/// By which interface the kernel is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Control {
    /// Netlink where the driver has it.
    #[default]
    Auto,
    Netlink,
    Ioctl,
}

impl Control {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Netlink => "netlink",
            Self::Ioctl => "ioctl",
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StartDisk {
    pub bdev_name: String,
    pub nbd_device: Option<String>,
    pub connections: Option<u32>,
    #[serde(default)]
    pub timeout_sec: u64,
    #[serde(default = "dead_conn_timeout_sec")]
    pub dead_conn_timeout_sec: u64,
    #[serde(default)]
    pub readonly: bool,
    #[serde(default)]
    pub control: Control,
}

fn dead_conn_timeout_sec() -> u64 {
    DEAD_CONN_TIMEOUT_SEC
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StopDisk {
    nbd_device: String,
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetDisks {
    nbd_device: Option<String>,
}

fn start_disk(app: &mut App, p: StartDisk, r: Responder) {
    const METHOD: &str = "nbd_start_disk";
    if let Some(bad) = p.connections.filter(|c| !(1..=MAX_CONNECTIONS).contains(c)) {
        let text = format!("{METHOD}: connections {bad}: 1 to {MAX_CONNECTIONS} is right");
        return r.err(RpcError::invalid_params(text).param("connections"));
    }
    for (param, seconds) in
        [("timeout_sec", p.timeout_sec), ("dead_conn_timeout_sec", p.dead_conn_timeout_sec)]
    {
        // The kernel counts in ticks, in 32 bits of them in some versions.
        const MOST: u64 = 86400;
        if seconds > MOST {
            let text = format!("{METHOD}: {param} {seconds}: 0 to {MOST} seconds is right");
            return r.err(RpcError::invalid_params(text).param(param));
        }
    }
    let index = match p.nbd_device.as_deref().map(|d| index(METHOD, d)).transpose() {
        Ok(index) => index,
        Err(e) => return r.err(e),
    };
    start::start(app, p, index, r);
}

/// The number of a device.
fn index(method: &str, device: &str) -> Result<u32, RpcError> {
    sysfs::index_of(device).ok_or_else(|| {
        let text = format!("{method}: nbd_device '{device}' is no NBD device; /dev/nbd0 is one");
        RpcError::errno(rustix::io::Errno::NODEV.raw_os_error(), text).param("nbd_device")
    })
}

fn no_disk(method: &str, device: &str) -> RpcError {
    let text = format!("{method}: this program serves no disk on {device}");
    let error = RpcError::errno(rustix::io::Errno::NODEV.raw_os_error(), text).param("nbd_device");
    error.object("nbd_device", device).hint("nbd_get_disks lists the disks")
}

fn stop_disk(app: &mut App, p: StopDisk, r: Responder) {
    const METHOD: &str = "nbd_stop_disk";
    let found = index(METHOD, &p.nbd_device).and_then(|index| {
        let disks = disks(app)?;
        let disks = disks.borrow();
        let (key, disk) = disks.find(index).ok_or_else(|| no_disk(METHOD, &p.nbd_device))?;
        match disk.phase {
            Phase::Running => Ok(key),
            Phase::Stopping if p.force => Ok(key),
            Phase::Starting | Phase::Stopping => {
                let doing = if disk.phase == Phase::Starting { "started" } else { "stopped" };
                let text = format!("{METHOD}: {} is being {doing}; try again when it is", disk.device());
                Err(RpcError::errno(rustix::io::Errno::BUSY.raw_os_error(), text).param("nbd_device"))
            }
        }
    });
    match found {
        Ok(key) => {
            let how = if p.force { stop::How::Force } else { stop::How::Ask };
            stop::stop(app, key, how, Box::new(|stopped| r.reply(stopped.map(|()| true))));
        }
        Err(e) => r.err(e),
    }
}

fn get_disks(app: &mut App, p: GetDisks) -> Result<Vec<Value>, RpcError> {
    const METHOD: &str = "nbd_get_disks";
    let wanted = p.nbd_device.as_deref().map(|d| index(METHOD, d)).transpose()?;
    let disks = disks(app)?;
    let disks = disks.borrow();
    let mut list: Vec<(u32, &str)> = disks
        .disks
        .values()
        .filter(|d| d.phase == Phase::Running)
        .filter_map(|d| Some((d.index?, d.bdev_name())))
        .filter(|(index, _)| wanted.is_none_or(|w| w == *index))
        .collect();
    if let (Some(device), true) = (&p.nbd_device, list.is_empty()) {
        return Err(no_disk(METHOD, device));
    }
    list.sort_unstable();
    Ok(list.iter().map(|(i, bdev)| json!({"nbd_device": device_name(*i), "bdev_name": bdev})).collect())
}

/// The calls that make the present disks.
pub(super) fn config(app: &App) -> Vec<Value> {
    let Ok(disks) = disks(app) else { return Vec::new() };
    let disks = disks.borrow();
    let running = disks.disks.values().filter(|d| d.phase == Phase::Running);
    let calls = running.map(|disk| {
        let p = &disk.params;
        let mut params = json!({
            "bdev_name": disk.bdev_name(), "nbd_device": disk.device(), "readonly": p.readonly,
            "timeout_sec": p.timeout_sec, "dead_conn_timeout_sec": p.dead_conn_timeout_sec,
        });
        if let Some(connections) = p.connections {
            params["connections"] = connections.into();
        }
        if p.control != Control::Auto {
            params["control"] = p.control.name().into();
        }
        json!({"method": "nbd_start_disk", "params": params})
    });
    calls.collect()
}
