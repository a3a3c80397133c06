//! The lanes of a disk, as the control thread sees them.

use std::time::{Duration, Instant};

use reactor::{PollerId, Turn};
use rustix::io::Errno;
use ublk_poll::Command;

use super::disk::{Failure, Stage};
use super::lane::{self, LaneSpec};
use super::target::Target;

/// When a deletion is worth a word.
const LONG: Duration = Duration::from_secs(10);

impl Target {
    /// Sets up a lane for each queue; [`Target::lane_started`] hears of each.
    pub(super) fn start_lanes(&mut self, id: u32) {
        let (Some(disk), Some(driver)) = (self.disks.get_mut(&id), &self.driver) else { return };
        let Some(device) = disk.device.clone() else { return };
        disk.stage = Stage::Queueing;
        disk.since = Instant::now();
        let count = disk.spec.num_queues;
        disk.lanes.unanswered = count.into();
        for queue in 0..count {
            let place = driver.placement.take();
            let (index, run, control) = (disk.lanes.places.len(), disk.run, self.control.clone());
            let spec = LaneSpec {
                device: device.clone(),
                descriptor: disk.descriptor.clone(),
                registry: self.manager.registry().clone(),
                options: disk.queue_options(queue),
                control: control.clone(),
                run,
                orders: disk.orders.clone(),
            };
            place.reactor().send(move |cx| {
                let started = lane::start(cx, spec);
                Self::send(&control, move |target, cx| target.lane_started(cx, id, run, index, started));
            });
            disk.lanes.places.push(place);
        }
    }

    fn lane_started(
        &mut self,
        cx: &mut Turn<'_>,
        id: u32,
        run: u64,
        index: usize,
        started: Result<PollerId, String>,
    ) {
        let Some(disk) = self.disks.get_mut(&id).filter(|d| d.run == run) else { return };
        disk.lanes.unanswered -= 1;
        match started {
            Ok(poller) => disk.lanes.running.push((index, poller)),
            Err(text) => {
                let text = format!("bdev {}: {text}", disk.spec.bdev_name);
                disk.failure.get_or_insert(Failure::new(Errno::IO, text));
            }
        }
        if disk.lanes.unanswered > 0 {
            return;
        }
        let cancelled =
            disk.cancelled.then(|| Failure::new(Errno::CANCELED, format!("ublk disk {id} was stopped")));
        match disk.failure.take().or(cancelled) {
            Some(failure) => self.fail(cx, id, failure),
            None => self.start_device(cx, id),
        }
    }

    /// A lane keeps the kernel waiting for nothing any more.
    pub(super) fn lane_fails(&mut self, cx: &mut Turn<'_>, id: u32, run: u64) {
        let Some(disk) = self.disks.get_mut(&id).filter(|d| d.run == run) else { return };
        disk.lanes.failing += 1;
        self.check_settled(cx, id);
    }

    /// A lane is gone: because of a stop, or because somebody else stopped the device.
    pub(super) fn lane_ended(&mut self, cx: &mut Turn<'_>, id: u32, run: u64) {
        let Some(disk) = self.disks.get_mut(&id).filter(|d| d.run == run) else { return };
        disk.lanes.ended += 1;
        if disk.stage == Stage::Live {
            tracing::warn!("/dev/ublkb{id} was stopped by someone else");
            return self.enter(cx, id, Stage::Stopping, Command::Stop);
        }
        self.check_drained(cx, id);
    }

    /// With the last lane the char device is closed; then the kernel can delete it.
    pub(super) fn check_drained(&mut self, cx: &mut Turn<'_>, id: u32) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        if disk.stage != Stage::Draining || !disk.lanes.are_gone() {
            return;
        }
        disk.device = None;
        if disk.recovering && disk.failure.is_some() {
            return self.gone(cx, id);
        }
        let run = disk.run;
        self.enter(cx, id, Stage::Deleting, Command::Delete);
        cx.after(LONG, move |cx| {
            Self::with(cx, |target, _| {
                if target.is_in(id, run, Stage::Deleting) {
                    tracing::warn!(
                        "/dev/ublkb{id} is stopped, but still mounted or open: its number is free after that"
                    );
                }
            });
        });
    }

    /// A recovery failed: the device stays as it was, for another try.
    pub(super) fn abandon(&mut self, cx: &mut Turn<'_>, id: u32) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        disk.stage = Stage::Draining;
        for (index, poller) in disk.lanes.running.iter().copied() {
            disk.lanes.places[index].reactor().send(move |cx| cx.remove_poller(poller));
        }
        self.check_drained(cx, id);
    }
}
