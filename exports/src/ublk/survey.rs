//! A number for a disk whose caller named none: that of the disk which a crash left of the same bdev, whose users wait for
//! it. A second disk beside it would be a second way to write to the same data. Else the first that is free.

use std::fs;

use reactor::Turn;
use rpc::Responder;
use rustix::io::Errno;
use ublk_poll::{Command, DevState, Reply};

use super::bridge;
use super::disk::DiskSpec;
use super::leftover::{self, Wish};
use super::start::MAX_ID;
use super::target::{Owner, Target};

/// The search, while it lasts.
pub(super) struct Survey {
    spec: DiskSpec,
    starter: Responder,
    /// Numbers of devices that are there and not ours, and have not been looked at.
    left: Vec<u32>,
}

impl Target {
    /// `ublk_start_disk` without a number.
    pub(super) fn start_any(&mut self, cx: &mut Turn<'_>, spec: DiskSpec, starter: Responder) {
        let mut left: Vec<u32> = present().into_iter().filter(|id| !self.disks.contains_key(id)).collect();
        // Taken from the end, and of several the first is wanted.
        left.sort_unstable_by(|a, b| b.cmp(a));
        self.last_run += 1;
        let number = self.last_run;
        self.surveys.insert(number, Survey { spec, starter, left });
        self.look_further(cx, number);
    }

    fn look_further(&mut self, cx: &mut Turn<'_>, number: u64) {
        let Some(survey) = self.surveys.get_mut(&number) else { return };
        let Some(id) = survey.left.pop() else {
            let taken = present();
            let free = |id: &u32| {
                !taken.contains(id) && !self.disks.contains_key(id) && !self.removals.contains_key(id)
            };
            let first = (0..=MAX_ID).find(free).unwrap_or(MAX_ID);
            return self.found(cx, number, first);
        };
        if let Err(errno) = self.command(id, Owner::Survey { number, id }, Command::Info) {
            self.surveyed(cx, number, id, Err(errno));
        }
    }

    /// What the kernel knows of device `id`.
    pub(super) fn surveyed(&mut self, cx: &mut Turn<'_>, number: u64, id: u32, result: Result<Reply, Errno>) {
        let Some(survey) = self.surveys.get(&number) else { return };
        let mark = bridge::mark(&survey.spec.bdev_name);
        match result {
            // Whether it can be taken over is judged when that is tried, and the reasons against are told then.
            Ok(Reply::Info(info))
                if info.ublksrv_flags == mark
                    && matches!(info.dev_state(), DevState::Live | DevState::Quiesced)
                    && !leftover::is_alive(info.ublksrv_pid) =>
            {
                self.found(cx, number, id);
            }
            _ => self.look_further(cx, number),
        }
    }

    fn found(&mut self, cx: &mut Turn<'_>, number: u64, id: u32) {
        let Some(Survey { spec, starter, .. }) = self.surveys.remove(&number) else { return };
        self.start(cx, DiskSpec { id, ..spec }, Wish::Start, starter);
    }
}

/// Numbers of the ublk devices of this host.
fn present() -> Vec<u32> {
    let entries = fs::read_dir("/dev").into_iter().flatten().flatten();
    let number = |name: &str| name.strip_prefix("ublkc")?.parse().ok();
    entries.filter_map(|e| number(e.file_name().to_str()?)).collect()
}
