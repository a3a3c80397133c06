//! Taking over a device that a crash left.

use reactor::Turn;
use rustix::io::Errno;
use ublk_poll::{Command, DevInfo, Params};

use super::disk::{Failure, Stage};
use super::leftover::{self, Verdict, Wish};
use super::start::adopt;
use super::target::Target;

impl Target {
    /// The kernel has told whose the device is.
    pub(super) fn inspected(&mut self, cx: &mut Turn<'_>, id: u32, wish: Wish, info: &DevInfo) {
        let patient = self.is_patient(id);
        let Some(disk) = self.disks.get_mut(&id) else { return };
        match leftover::judge(wish, info, disk.descriptor.info(), leftover::is_alive) {
            Verdict::Recover => {
                disk.recovering = true;
                if let Err(failure) = adopt(disk, info) {
                    return self.fail(cx, id, failure);
                }
                self.enter(cx, id, Stage::ReadingParams, Command::GetParams);
            }
            Verdict::Wait if patient => self.retry(cx, id, Stage::Inspecting(wish), Command::Info),
            Verdict::Wait => {
                let text =
                    format!("the former server of ublk device {id} has ended, but the kernel keeps it live");
                self.fail(cx, id, Failure::new(Errno::BUSY, text));
            }
            Verdict::Refuse(text) => self.fail(cx, id, Failure::new(Errno::EXIST, text)),
        }
    }

    /// The kernel has told the shape of a device that may be taken over.
    pub(super) fn take_over(&mut self, cx: &mut Turn<'_>, id: u32, params: &Params) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        let bdev = disk.descriptor.info();
        if let Err(why) = disk.geometry.fits(params) {
            let text = format!("bdev {} is not what ublk device {id} was: {why}", bdev.name);
            return self.fail(cx, id, Failure::new(Errno::INVAL, text));
        }
        if bdev.volatile {
            tracing::warn!(bdev = bdev.name, "recovering /dev/ublkb{id} on a bdev that lost its contents");
        }
        disk.geometry.max_io = disk.geometry.max_io.min(params.basic.max_sectors.saturating_mul(512));
        self.enter(cx, id, Stage::Recovering, Command::StartRecovery);
    }
}
