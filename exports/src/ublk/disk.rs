//! One disk: what it is made of, and where its life is.

use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::Descriptor;
use engine::placement::Place;
use reactor::PollerId;
use rpc::{Responder, RpcError};
use serde_json::{Value, json};
use ublk_poll::{CharDevice, DeviceFlags, Geometry, QueueOptions};

use super::lane::Orders;
use super::leftover::Wish;

/// What a disk is doing; each stage but the last waits for one thing.
///
/// ```text
///                 ┌─EXIST─▶ Inspecting ─▶ ReadingParams ─▶ Recovering ─┐
/// start ─▶ Adding ┴─▶ SettingParams ───────────────────────────────────┴▶ Opening ─▶ Queueing ─▶ Starting ─▶ Live
/// Live ─▶ Syncing ─▶ Settling ─▶ Stopping ─▶ Draining ─▶ Deleting ─▶ gone (an earlier failure begins at Settling)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The kernel makes the device.
    Adding,
    /// The number is taken: by whom?
    Inspecting(Wish),
    /// The shape of a device that may be taken over.
    ReadingParams,
    /// The kernel forgets the former server.
    Recovering,
    /// The kernel is told the shape.
    SettingParams,
    /// The char device appears, with rights for us.
    Opening,
    /// Lanes are set up on their reactors.
    Queueing,
    /// The kernel makes the disk, or lets its requests flow again.
    Starting,
    /// Served.
    Live,
    /// Cached writes are written back.
    Syncing,
    /// Requests in flight end, or fail. The kernel waits for them while it stops the disk, and this process could not end
    /// then.
    Settling,
    /// The kernel removes the disk; requests in flight end.
    Stopping,
    /// Lanes end.
    Draining,
    /// The kernel deletes the device.
    Deleting,
}

impl Stage {
    /// In `ublk_get_disks`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Syncing | Self::Settling | Self::Stopping | Self::Draining | Self::Deleting => "stopping",
            _ => "starting",
        }
    }

    /// On its way out.
    pub(super) fn is_ending(self) -> bool {
        self.name() == "stopping"
    }
}

/// How long one stage may be tried again and again.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct DiskSpec {
    pub(super) id: u32,
    pub(super) bdev_name: String,
    pub(super) queue_depth: u16,
    pub(super) num_queues: u16,
    pub(super) read_only: bool,
}

/// A disk.
pub(super) struct Disk {
    /// Depth and number of queues are the kernel's from the moment that it grants them.
    pub(super) spec: DiskSpec,
    /// Tells this life of the number from others.
    pub(super) run: u64,
    pub(super) stage: Stage,
    /// Of the command that the stage waits for; others are late and count no more.
    pub(super) command: u64,
    /// When the stage began.
    pub(super) since: Instant,
    pub(super) flags: DeviceFlags,
    pub(super) geometry: Geometry,
    pub(super) descriptor: Descriptor,
    pub(super) device: Option<Arc<CharDevice>>,
    /// The device was there before: a failure must not delete it.
    pub(super) recovering: bool,
    /// It has been made, or taken over, by us.
    pub(super) ours: bool,
    pub(super) lanes: Lanes,
    pub(super) orders: Arc<Orders>,
    /// The process that writes back, while it does.
    pub(super) sync: Option<Child>,
    /// It is left to the kernel, for the next run of the program: nothing of it is answered any more.
    pub(super) kept: bool,
    /// A stop was asked for while it was starting.
    pub(super) cancelled: bool,
    /// Why it did not start.
    pub(super) failure: Option<Failure>,
    /// Who started it.
    pub(super) starter: Option<Responder>,
    /// Who stops it.
    pub(super) stoppers: Vec<Responder>,
}

/// The queues of a disk on their reactors.
#[derive(Default)]
pub(super) struct Lanes {
    /// Places of all of them.
    pub(super) places: Vec<Place>,
    /// Those that run.
    pub(super) running: Vec<(usize, PollerId)>,
    /// Those that have not said yet whether they run.
    pub(super) unanswered: usize,
    /// Those that answer every request with an error, or have ended.
    pub(super) failing: usize,
    /// Those that have ended.
    pub(super) ended: usize,
}

impl Lanes {
    /// The kernel waits for none of them.
    pub(super) fn are_settled(&self) -> bool {
        self.unanswered == 0 && self.failing == self.running.len()
    }

    /// Makes those that sleep look at their orders.
    pub(super) fn wake(&self) {
        self.places.iter().for_each(|place| place.reactor().send(|_| ()));
    }

    /// Nothing of it is left on any reactor.
    pub(super) fn are_gone(&self) -> bool {
        self.unanswered == 0 && self.ended == self.running.len()
    }
}

/// Why a disk could not be started or stopped.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// Positive.
    pub(super) errno: i32,
    pub(super) text: String,
}

impl Failure {
    pub(super) fn new(errno: rustix::io::Errno, text: impl Into<String>) -> Self {
        Self { errno: errno.raw_os_error(), text: text.into() }
    }

    /// For the caller of `method`.
    pub(super) fn to_rpc(&self, method: &str, id: u32) -> RpcError {
        RpcError::errno(self.errno, format!("{method}: {}", self.text)).object("ublk_id", id.to_string())
    }
}

impl Disk {
    /// For queue `queue`.
    pub(super) fn queue_options(&self, queue: u16) -> QueueOptions {
        QueueOptions {
            queue,
            depth: self.spec.queue_depth,
            max_io: self.geometry.max_io,
            user_copy: self.flags.user_copy,
            block_size: self.geometry.block_size,
            sectors: self.geometry.size / 512,
        }
    }

    /// A row of `ublk_get_disks`: SPDK's fields, then ours.
    pub(super) fn row(&self) -> Value {
        let s = &self.spec;
        json!({
            "ublk_device": format!("/dev/ublkb{}", s.id), "id": s.id, "queue_depth": s.queue_depth,
            "num_queues": s.num_queues, "bdev_name": s.bdev_name, "state": self.stage.name(),
            "read_only": self.geometry.read_only, "user_copy": self.flags.user_copy,
            "recovery": self.flags.recovery,
            "reactors": self.lanes.places.iter().map(|p| p.reactor().name()).collect::<Vec<_>>(),
        })
    }

    /// The call that makes it.
    pub(super) fn call(&self) -> Value {
        let s = &self.spec;
        let mut params = json!({
            "bdev_name": s.bdev_name, "ublk_id": s.id, "queue_depth": s.queue_depth, "num_queues": s.num_queues,
        });
        if s.read_only {
            params["read_only"] = true.into();
        }
        json!({"method": "ublk_start_disk", "params": params})
    }
}
