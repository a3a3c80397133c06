//! The second half of a disk's life: from the stop to a free number.

use std::time::Instant;

use bdev::Mode;
use engine::InUse;
use reactor::Turn;
use rpc::Responder;
use rustix::io::Errno;
use ublk_poll::{Command, DevState, Reply};

use super::bridge;
use super::disk::{Disk, Failure, Stage};
use super::leftover;
use super::target::{Owner, Target, disk_name, no_disk, no_target};
use crate::host;

/// A device that an earlier run of the program left, on its way out.
pub(super) struct Removal {
    stage: RemovalStage,
    responder: Responder,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum RemovalStage {
    Inspecting,
    Stopping,
    Deleting,
}

/// The next run of the program can take it over: its requests wait in the kernel, and its bdev keeps its contents.
fn can_keep(disk: &Disk) -> bool {
    disk.stage == Stage::Live && disk.flags.recovery && !disk.descriptor.info().volatile
}

impl Target {
    /// `ublk_stop_disk`: answers once the kernel has deleted the device.
    pub(super) fn stop_disk(&mut self, cx: &mut Turn<'_>, id: u32, force: bool, responder: Responder) {
        if let Some(disk) = self.disks.get_mut(&id) {
            if force {
                disk.orders.fail();
                disk.lanes.wake();
                return self.stop(cx, id, Some(responder));
            }
            // The kernel would fail their writes, and not delete the disk before they let go of it.
            return match host::users(&disk_name(id)).first() {
                Some(user) => {
                    let failure = Failure::new(Errno::BUSY, user.as_str());
                    let hint =
                        "unmount it, and remove devices made of it; with force its users get I/O errors";
                    let error = failure.to_rpc(responder.method(), id).hint(hint);
                    responder.err(error);
                }
                None => self.stop(cx, id, Some(responder)),
            };
        }
        if self.driver.is_none() {
            let error = no_target(responder.method());
            return responder.err(error);
        }
        if self.removals.contains_key(&id) {
            let failure = Failure::new(Errno::BUSY, format!("ublk device {id} is being removed"));
            let error = failure.to_rpc(responder.method(), id);
            return responder.err(error);
        }
        // Not ours in this life; perhaps in an earlier one.
        self.removals.insert(id, Removal { stage: RemovalStage::Inspecting, responder });
        self.removal_command(cx, id, Command::Info);
    }

    /// Begins to stop a disk, unless that has begun.
    pub(super) fn stop(&mut self, cx: &mut Turn<'_>, id: u32, responder: Option<Responder>) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        disk.stoppers.extend(responder);
        match disk.stage {
            // The kernel fails what is written to a disk that is being stopped: write back before that.
            Stage::Live if !disk.descriptor.is_removed() && disk.descriptor.mode() == Mode::ReadWrite => {
                self.start_sync(cx, id);
            }
            Stage::Live => self.settle(cx, id),
            stage if stage.is_ending() => {}
            // Noticed when the present stage ends.
            stage => {
                disk.cancelled = true;
                if stage == Stage::Starting && !disk.recovering {
                    // The kernel looks for partitions, and would wait for the bdev as long as that waits.
                    disk.orders.fail();
                    disk.lanes.wake();
                }
            }
        }
    }

    /// Ends, or fails, what is in flight; then the kernel is told to stop the disk.
    pub(super) fn settle(&mut self, cx: &mut Turn<'_>, id: u32) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        disk.stage = Stage::Settling;
        disk.since = Instant::now();
        disk.orders.finish();
        disk.lanes.wake();
        self.check_settled(cx, id);
    }

    pub(super) fn check_settled(&mut self, cx: &mut Turn<'_>, id: u32) {
        let settled = |d: &Disk| d.stage == Stage::Settling && d.lanes.are_settled();
        if self.disks.get(&id).is_some_and(settled) {
            self.enter(cx, id, Stage::Stopping, Command::Stop);
        }
    }

    /// The program will wait for nothing: whoever uses a disk sees errors.
    pub(super) fn give_up(&mut self, cx: &mut Turn<'_>) {
        let syncing = |d: &&Disk| d.stage == Stage::Syncing;
        let syncing: Vec<u32> = self.disks.values().filter(syncing).map(|d| d.spec.id).collect();
        for disk in self.disks.values_mut().filter(|d| !d.kept && (!d.recovering || d.stage.is_ending())) {
            disk.orders.fail();
            disk.lanes.wake();
        }
        for id in syncing {
            tracing::warn!("stopping /dev/ublkb{id} although cached writes are not on its bdev yet");
            if let Some(disk) = self.disks.get_mut(&id) {
                self.orphans.extend(disk.sync.take());
            }
            self.settle(cx, id);
        }
    }

    fn start_sync(&mut self, cx: &mut Turn<'_>, id: u32) {
        for user in host::users(&disk_name(id)) {
            tracing::warn!("{user}, and is stopped: its users will see errors");
        }
        let Some(disk) = self.disks.get_mut(&id) else { return };
        self.orphans.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        match host::sync(&disk_name(id)) {
            Ok(child) => {
                disk.stage = Stage::Syncing;
                disk.since = Instant::now();
                disk.sync = Some(child);
                self.check_sync(cx, id);
            }
            Err(e) => {
                tracing::warn!("cached writes of /dev/ublkb{id} are lost: cannot run sync: {e}");
                self.settle(cx, id);
            }
        }
    }

    /// Goes on when cached writes are on the bdev, or have had their time.
    fn check_sync(&mut self, cx: &mut Turn<'_>, id: u32) {
        let Some(disk) = self.disks.get_mut(&id).filter(|d| d.stage == Stage::Syncing) else { return };
        let Some(mut child) = disk.sync.take() else { return };
        match child.try_wait() {
            Ok(None) if disk.since.elapsed() < host::SYNC_TIME => {
                disk.sync = Some(child);
                cx.after(host::SYNC_POLL, move |cx| Self::with(cx, |target, cx| target.check_sync(cx, id)));
                return;
            }
            Ok(None) => {
                tracing::warn!("stopping /dev/ublkb{id} although cached writes are not on its bdev yet");
                self.orphans.push(child);
            }
            Ok(Some(status)) if status.success() => {}
            Ok(Some(status)) => tracing::warn!("cached writes of /dev/ublkb{id} may be lost: sync: {status}"),
            Err(e) => tracing::warn!("cached writes of /dev/ublkb{id} may be lost: sync: {e}"),
        }
        self.settle(cx, id);
    }

    pub(super) fn stop_step(
        &mut self,
        cx: &mut Turn<'_>,
        id: u32,
        stage: Stage,
        result: Result<Reply, Errno>,
    ) {
        match stage {
            Stage::Stopping => {
                if let Err(errno) = result {
                    // NODEV: somebody else deleted it.
                    tracing::warn!("cannot stop ublk device {id}: {errno}");
                }
                let Some(disk) = self.disks.get_mut(&id) else { return };
                disk.stage = Stage::Draining;
                self.check_drained(cx, id);
            }
            _ => self.deleted(cx, id, result),
        }
    }

    fn deleted(&mut self, cx: &mut Turn<'_>, id: u32, result: Result<Reply, Errno>) {
        if let Err(errno) = result
            && errno != Errno::NODEV
            && let Some(disk) = self.disks.get_mut(&id)
        {
            let failure = Failure::new(errno, format!("cannot delete ublk device {id}: {errno}"));
            tracing::error!("{}", failure.text);
            for stopper in disk.stoppers.drain(..) {
                let error = failure.to_rpc(stopper.method(), id);
                stopper.err(error);
            }
        }
        self.gone(cx, id);
    }

    /// Forgets the disk and answers those who wait for that.
    pub(super) fn gone(&mut self, cx: &mut Turn<'_>, id: u32) {
        let Some(mut disk) = self.disks.remove(&id) else { return };
        let (starter, stoppers, failure) =
            (disk.starter.take(), std::mem::take(&mut disk.stoppers), disk.failure.take());
        let left = disk.recovering && failure.is_some();
        // Before the answers: who is told may delete the bdev at once.
        drop(disk);
        if let (Some(starter), Some(failure)) = (starter, failure) {
            let error = failure.to_rpc(starter.method(), id);
            starter.err(error);
        } else if !left {
            tracing::info!("/dev/ublkb{id} is gone");
        }
        for stopper in stoppers {
            if left {
                let text = format!(
                    "the recovery of ublk device {id} was given up; it waits in the kernel: call ublk_stop_disk again to \
                     remove it"
                );
                let error = Failure::new(Errno::BUSY, text).to_rpc(stopper.method(), id);
                stopper.err(error);
            } else {
                stopper.ok(true);
            }
        }
        self.check_empty(cx);
    }

    /// Disks that somebody on this host uses.
    pub(super) fn in_use(&self) -> Vec<InUse> {
        let disks = self.disks.values().filter(|d| !d.stage.is_ending());
        let users = disks.flat_map(|d| {
            let kept = can_keep(d);
            host::users(&disk_name(d.spec.id)).into_iter().map(move |text| InUse { text, kept })
        });
        users.collect()
    }

    /// Lets go of disks in use without a word to the kernel, which keeps them, and holds their requests, until the next run
    /// takes them over, as after a crash.
    pub(super) fn keep_used(&mut self, cx: &mut Turn<'_>) {
        let candidates: Vec<u32> = self.disks.values().filter(|d| can_keep(d)).map(|d| d.spec.id).collect();
        for id in candidates {
            let users = host::users(&disk_name(id));
            let Some(disk) = self.disks.get_mut(&id).filter(|_| !users.is_empty()) else { continue };
            tracing::warn!("{}: kept for the next run of the program", users.join("; "));
            (disk.kept, disk.recovering) = (true, true);
            disk.failure = Some(Failure::new(Errno::CANCELED, "the program has ended"));
            self.abandon(cx, id);
        }
    }

    /// Tells the kernel of a new size, if it can be told.
    pub(super) fn resize(&mut self, id: u32, blocks: u64) {
        let Some(disk) = self.disks.get_mut(&id).filter(|d| d.stage == Stage::Live) else { return };
        let size = blocks.saturating_mul(u64::from(disk.geometry.block_size));
        if size == disk.geometry.size {
            return;
        }
        let bdev = disk.spec.bdev_name.clone();
        if !disk.flags.update_size {
            tracing::warn!(
                bdev,
                "/dev/ublkb{id} keeps its size: this kernel's ublk driver cannot change it (Linux 6.16 can); stop and \
                 start the disk"
            );
            return;
        }
        disk.geometry.size = size;
        if let Err(errno) = self.command(id, Owner::Resize { id }, Command::UpdateSize(size / 512)) {
            self.resize_ended(id, Err(errno));
        }
    }

    pub(super) fn resize_ended(&mut self, id: u32, result: Result<Reply, Errno>) {
        match result {
            Ok(_) => tracing::info!("/dev/ublkb{id} has the new size of its bdev"),
            Err(errno) => tracing::error!("/dev/ublkb{id} keeps its size: {errno}"),
        }
    }

    fn removal_command(&mut self, cx: &mut Turn<'_>, id: u32, command: Command) {
        if let Err(errno) = self.command(id, Owner::Removal { id }, command) {
            self.removal_step(cx, id, Err(errno));
        }
    }

    /// One step of removing what an earlier run left.
    pub(super) fn removal_step(&mut self, cx: &mut Turn<'_>, id: u32, result: Result<Reply, Errno>) {
        let Some(removal) = self.removals.get_mut(&id) else { return };
        let (stage, method) = (removal.stage, removal.responder.method().to_owned());
        let next = match (stage, result) {
            (RemovalStage::Inspecting, Err(Errno::NODEV)) => Err(no_disk(&method, id)),
            (RemovalStage::Inspecting, Ok(Reply::Info(info))) => {
                let ours = bridge::is_marked(info.ublksrv_flags);
                let served = info.dev_state() == DevState::Live && leftover::is_alive(info.ublksrv_pid);
                if ours && !served {
                    Ok(Some((RemovalStage::Stopping, Command::Stop)))
                } else {
                    let text = format!("ublk device {id} is not of this program");
                    Err(Failure::new(Errno::NODEV, text).to_rpc(&method, id))
                }
            }
            (RemovalStage::Stopping, Ok(_)) => Ok(Some((RemovalStage::Deleting, Command::Delete))),
            (RemovalStage::Deleting, Ok(_)) => Ok(None),
            (_, result) => {
                let errno = result.err().unwrap_or(Errno::PROTO);
                let text = format!("cannot remove ublk device {id}: {errno}");
                Err(Failure::new(errno, text).to_rpc(&method, id))
            }
        };
        match next {
            Ok(Some((stage, command))) => {
                removal.stage = stage;
                self.removal_command(cx, id, command);
            }
            ended => {
                let Some(removal) = self.removals.remove(&id) else { return };
                removal.responder.reply(ended.map(|_| true));
                self.check_empty(cx);
            }
        }
    }
}
