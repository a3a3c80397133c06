//! The disks of this program, and what each consists of.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bdev::Descriptor;
use engine::App;
use nbd_poll::kernel;
use nbd_proto::request::Export;
use rpc::RpcError;
use std::cell::RefCell;
use std::rc::Rc;

use super::bridge;
use super::claim::{Claim, Record};
use super::lane::Shared;
use super::methods::StartDisk;

/// Names a disk in messages, also before it has a device and after it is gone.
pub(super) type Key = u64;

/// How the kernel is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interface {
    /// Generic netlink.
    Netlink,
    /// Ioctls, on a thread per device.
    Ioctl,
}

/// Where a disk is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The answer to the start is due.
    Starting,
    Running,
    /// The answer to the stop is due, or the device has been disconnected by somebody else.
    Stopping,
}

/// Called once with the end of a stop.
pub(super) type Stopped = Box<dyn FnOnce(Result<(), RpcError>) + Send>;

/// A bdev that is, or is becoming, a kernel device.
pub(super) struct Disk {
    pub descriptor: Descriptor,
    pub params: StartDisk,
    pub export: Export,
    /// Sockets.
    pub connections: usize,
    pub interface: Interface,
    /// Number of the device, once it is known.
    pub index: Option<u32>,
    pub claim: Option<Claim>,
    pub shared: Arc<Shared>,
    /// Lanes that have not ended.
    pub lanes: usize,
    pub phase: Phase,
    /// Bytes that the kernel was told.
    pub kernel_size: u64,
    /// A resize is on its way to the kernel.
    pub resizing: bool,
    /// Stop as soon as it has started.
    pub stop_after_start: Vec<Stopped>,
    /// Wait for the end of the stop.
    pub stopped: Vec<Stopped>,
    /// The stop waits for nobody any more.
    pub hurry: Arc<AtomicBool>,
    /// What became of the kernel's device, once that is known.
    pub kernel_end: Option<KernelEnd>,
}

/// What became of the kernel's device at the end of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KernelEnd {
    /// It is free.
    Gone,
    /// Disconnected, but held open: by whom.
    StillOpen(Vec<String>),
    /// Kept for a later run of the program.
    Kept,
}

/// The state of this subsystem.
pub(super) struct Disks {
    pub disks: BTreeMap<Key, Disk>,
    next_key: Key,
    /// Where claims are.
    pub run_dir: PathBuf,
}

impl Disks {
    pub(super) fn new(run_dir: PathBuf) -> Self {
        Self { disks: BTreeMap::new(), next_key: 0, run_dir }
    }

    pub(super) fn next_key(&mut self) -> Key {
        self.next_key += 1;
        self.next_key
    }

    /// The disk on device `index`.
    pub(super) fn find(&self, index: u32) -> Option<(Key, &Disk)> {
        self.disks.iter().find(|(_, d)| d.index == Some(index)).map(|(key, disk)| (*key, disk))
    }
}

impl Disk {
    /// "/dev/nbd3"
    pub(super) fn device(&self) -> String {
        self.index.map_or("an NBD device".to_owned(), device_name)
    }

    pub(super) fn bdev_name(&self) -> &str {
        &self.descriptor.info().name
    }

    /// As the kernel is told.
    pub(super) fn kernel_disk(&self, program: &str) -> kernel::Disk {
        kernel::Disk {
            size: self.export.size,
            block_size: self.export.block_size,
            flags: self.export.flags,
            timeout_sec: self.params.timeout_sec,
            dead_conn_timeout_sec: self.params.dead_conn_timeout_sec,
            backend: Some(bridge::backend(program, self.bdev_name())),
        }
    }

    /// The next run of the program can take the device over: its requests wait in the kernel, and its bdev keeps its
    /// contents.
    pub(super) fn can_keep(&self) -> bool {
        self.interface == Interface::Netlink
            && self.params.dead_conn_timeout_sec > 0
            && self.claim.is_some()
            && !self.descriptor.info().volatile
    }

    /// As it is written down.
    pub(super) fn record(&self, kernel_pid: Option<u32>) -> Record {
        Record {
            pid: std::process::id(),
            kernel_pid,
            bdev_name: self.bdev_name().to_owned(),
            connections: self.connections,
        }
    }
}

/// "/dev/nbd3"
pub(super) fn device_name(index: u32) -> String {
    format!("/dev/nbd{index}")
}

/// "nbd3", as in /sys/block.
pub(super) fn disk_name(index: u32) -> String {
    format!("nbd{index}")
}

/// The state of this subsystem.
///
/// # Errors
/// Before initialisation.
pub(super) fn disks(app: &App) -> Result<Rc<RefCell<Disks>>, RpcError> {
    app.state::<Disks>().ok_or_else(|| RpcError::internal("kernel NBD is not initialised yet"))
}

/// Works on disk `key`, if it is still there.
pub(super) fn with<R>(app: &App, key: Key, f: impl FnOnce(&mut Disk) -> R) -> Option<R> {
    let disks = app.state::<Disks>()?;
    let mut disks = disks.borrow_mut();
    disks.disks.get_mut(&key).map(f)
}
