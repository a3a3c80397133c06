//! The first half of a disk's life: from the call to I/O.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Event, Mode, User};
use reactor::Turn;
use rpc::{Responder, RpcError};
use rustix::io::Errno;
use ublk_poll::{CharDevice, Command, DevInfo, DeviceFlags, Reply};

use super::bridge;
use super::disk::{Disk, DiskSpec, Failure, Lanes, PATIENCE, Stage};
use super::leftover::Wish;
use super::target::{Target, no_target};

/// Between two tries of something that the kernel is not ready for.
const RETRY: Duration = Duration::from_millis(20);
/// How long the kernel may look for partitions. It holds the device meanwhile: a program that is killed then leaves a device
/// that nobody can use or remove until the host is restarted (seen with Linux 6.12).
const START_TIME: Duration = Duration::from_secs(10);
/// `UBLK_MAX_UBLKS` in ublk_drv.c.
pub(super) const MAX_ID: u32 = (1 << 20) - 1;

impl Target {
    /// `ublk_start_disk` and, with [`Wish::Recover`], `ublk_recover_disk`: answers with the number once the disk is
    /// there.
    pub(super) fn start(&mut self, cx: &mut Turn<'_>, spec: DiskSpec, wish: Wish, starter: Responder) {
        let id = spec.id;
        match self.make_disk(spec, starter.method()) {
            Err(e) => starter.err(e),
            Ok(mut disk) => {
                disk.starter = Some(starter);
                let info = self.device_info(&disk);
                self.disks.insert(id, disk);
                match wish {
                    Wish::Start => self.enter(cx, id, Stage::Adding, Command::Add(info)),
                    Wish::Recover => self.enter(cx, id, Stage::Inspecting(wish), Command::Info),
                }
            }
        }
    }

    fn make_disk(&mut self, spec: DiskSpec, method: &str) -> Result<Disk, RpcError> {
        let id = spec.id;
        let fail = |errno, text: String| Failure::new(errno, text).to_rpc(method, id);
        let driver = self.driver.as_ref().ok_or_else(|| no_target(method))?;
        let Some(features) = driver.features else { return Err(no_target(method)) };
        if !self.draining.is_empty() {
            return Err(fail(Errno::BUSY, "the ublk target is being destroyed".into()));
        }
        if self.disks.contains_key(&id) || self.removals.contains_key(&id) {
            return Err(fail(
                Errno::BUSY,
                format!("ublk disk {id} is in use; ublk_get_disks shows by which bdev"),
            ));
        }
        let bdev = self.manager.get(&spec.bdev_name).map_err(|e| bdev_error(method, &spec.bdev_name, &e))?;
        let read_only = spec.read_only || bdev.info().read_only;
        let flags = DeviceFlags::choose(features, driver.ring.is_privileged(), driver.user_copy);
        let geometry = bridge::geometry(bdev.info(), bdev.blocks(), read_only, flags.user_copy);
        geometry.check().map_err(|e| {
            let text = format!("bdev {} cannot be a ublk disk: {e}", spec.bdev_name);
            fail(Errno::INVAL, text).object("bdev", &spec.bdev_name)
        })?;
        self.last_run += 1;
        let run = self.last_run;
        let control = self.control.clone();
        let events = move |event| Self::send(&control, move |target, cx| target.event(cx, id, run, event));
        let mode = if read_only { Mode::ReadOnly } else { Mode::ReadWrite };
        let user = User::Export(format!("ublk disk {id}"));
        let opened = self.manager.open_as(user, &spec.bdev_name, mode, Box::new(events));
        let descriptor = opened.map_err(|e| bdev_error(method, &spec.bdev_name, &e))?;
        Ok(Disk {
            spec,
            run,
            stage: Stage::Adding,
            command: 0,
            since: Instant::now(),
            flags,
            geometry,
            descriptor,
            device: None,
            recovering: false,
            ours: false,
            lanes: Lanes::default(),
            orders: Arc::default(),
            sync: None,
            kept: false,
            cancelled: false,
            failure: None,
            starter: None,
            stoppers: Vec::new(),
        })
    }

    fn device_info(&self, disk: &Disk) -> DevInfo {
        DevInfo {
            nr_hw_queues: disk.spec.num_queues,
            queue_depth: disk.spec.queue_depth,
            max_io_buf_bytes: disk.geometry.max_io,
            dev_id: disk.spec.id,
            ublksrv_pid: -1,
            flags: disk.flags.bits(),
            ublksrv_flags: bridge::mark(&disk.spec.bdev_name),
            ..DevInfo::default()
        }
    }

    fn event(&mut self, cx: &mut Turn<'_>, id: u32, run: u64, event: Event) {
        if self.disks.get(&id).is_none_or(|d| d.run != run) {
            return;
        }
        match event {
            Event::Removed => {
                tracing::warn!("the bdev of /dev/ublkb{id} is gone; stopping the disk");
                self.stop(cx, id, None);
            }
            Event::Resized { blocks } => self.resize(id, blocks),
        }
    }

    pub(super) fn start_step(
        &mut self,
        cx: &mut Turn<'_>,
        id: u32,
        stage: Stage,
        result: Result<Reply, Errno>,
    ) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        // Adding and recovering change whose the device is, so a stop is noticed after those.
        disk.ours |= result.is_ok() && matches!(stage, Stage::Adding | Stage::Recovering);
        let started = stage == Stage::Starting && result.is_ok();
        let late = disk.failure.take().filter(|_| started);
        if disk.cancelled && !started {
            return self.fail(cx, id, Failure::new(Errno::CANCELED, format!("ublk disk {id} was stopped")));
        }
        match (stage, result) {
            (Stage::Adding, Ok(Reply::Info(info))) => self.added(cx, id, &info),
            (Stage::Adding, Err(Errno::EXIST)) => {
                self.enter(cx, id, Stage::Inspecting(Wish::Start), Command::Info);
            }
            (Stage::Inspecting(wish), Ok(Reply::Info(info))) => self.inspected(cx, id, wish, &info),
            (Stage::ReadingParams, Ok(Reply::Params(params))) => self.take_over(cx, id, &params),
            (Stage::Recovering, Err(Errno::BUSY)) if self.is_patient(id) => {
                self.retry(cx, id, stage, Command::StartRecovery);
            }
            (Stage::SettingParams | Stage::Recovering, Ok(_)) => self.open_device(cx, id),
            (Stage::Starting, Ok(_)) => match late {
                Some(failure) => self.fail(cx, id, failure),
                None => self.live(cx, id),
            },
            (_, result) => {
                let errno = result.err().unwrap_or(Errno::PROTO);
                self.fail(cx, id, refusal(id, stage, errno));
            }
        }
    }

    fn added(&mut self, cx: &mut Turn<'_>, id: u32, info: &DevInfo) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        if let Err(failure) = adopt(disk, info) {
            return self.fail(cx, id, failure);
        }
        let params = disk.geometry.params();
        self.enter(cx, id, Stage::SettingParams, Command::SetParams(params));
    }

    /// Opens the char device, which udev may still be busy with.
    fn open_device(&mut self, cx: &mut Turn<'_>, id: u32) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        if disk.stage != Stage::Opening {
            disk.stage = Stage::Opening;
            disk.since = Instant::now();
        }
        let run = disk.run;
        match CharDevice::open(id) {
            Ok(device) => {
                disk.device = Some(device);
                self.start_lanes(id);
            }
            Err(Errno::NOENT | Errno::ACCESS | Errno::PERM | Errno::BUSY) if self.is_patient(id) => {
                cx.after(RETRY, move |cx| {
                    Self::with(cx, |target, cx| {
                        if target.is_in(id, run, Stage::Opening) {
                            target.open_or_fail(cx, id);
                        }
                    });
                });
            }
            Err(errno) => {
                let text = format!("cannot open /dev/ublkc{id}: {errno}; udev must make it, for this user");
                self.fail(cx, id, Failure::new(errno, text));
            }
        }
    }

    fn open_or_fail(&mut self, cx: &mut Turn<'_>, id: u32) {
        if self.disks.get(&id).is_some_and(|d| d.cancelled) {
            return self.fail(cx, id, Failure::new(Errno::CANCELED, format!("ublk disk {id} was stopped")));
        }
        self.open_device(cx, id);
    }

    /// The kernel is told to start the disk, or to let its requests flow again.
    pub(super) fn start_device(&mut self, cx: &mut Turn<'_>, id: u32) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        if disk.recovering {
            return self.enter(cx, id, Stage::Starting, Command::EndRecovery);
        }
        let run = disk.run;
        self.enter(cx, id, Stage::Starting, Command::Start);
        cx.after(START_TIME, move |cx| Self::with(cx, |target, _| target.start_late(id, run)));
    }

    fn start_late(&mut self, id: u32, run: u64) {
        if !self.is_in(id, run, Stage::Starting) {
            return;
        }
        let Some(disk) = self.disks.get_mut(&id) else { return };
        let bdev = &disk.spec.bdev_name;
        let text =
            format!("bdev {bdev} has not answered for {} s, when the kernel read it", START_TIME.as_secs());
        disk.failure.get_or_insert(Failure::new(Errno::TIMEDOUT, text));
        disk.orders.fail();
        disk.lanes.wake();
    }

    fn live(&mut self, cx: &mut Turn<'_>, id: u32) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        disk.stage = Stage::Live;
        disk.since = Instant::now();
        let (bdev, how) = (&disk.spec.bdev_name, if disk.recovering { "again " } else { "" });
        tracing::info!(
            bdev,
            queues = disk.spec.num_queues,
            depth = disk.spec.queue_depth,
            user_copy = disk.flags.user_copy,
            "/dev/ublkb{id} is {how}there"
        );
        if let Some(starter) = disk.starter.take() {
            starter.ok(id);
        }
        // What happened meanwhile.
        let (ending, blocks) = (disk.cancelled || disk.descriptor.is_removed(), disk.descriptor.blocks());
        if ending {
            self.stop(cx, id, None);
        } else {
            self.resize(id, blocks);
        }
    }

    /// Ends a start that cannot go on: undoes what was made, and leaves alone what was there before.
    pub(super) fn fail(&mut self, cx: &mut Turn<'_>, id: u32, failure: Failure) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        tracing::error!(bdev = disk.spec.bdev_name, "ublk disk {id}: {}", failure.text);
        disk.failure.get_or_insert(failure);
        if disk.recovering {
            return self.abandon(cx, id);
        }
        if disk.ours {
            disk.orders.fail();
            return self.settle(cx, id);
        }
        self.gone(cx, id);
    }

    /// Not longer than [`PATIENCE`] in this stage.
    pub(super) fn is_patient(&self, id: u32) -> bool {
        self.disks.get(&id).is_some_and(|d| d.since.elapsed() < PATIENCE)
    }

    pub(super) fn is_in(&self, id: u32, run: u64, stage: Stage) -> bool {
        self.disks.get(&id).is_some_and(|d| d.run == run && d.stage == stage)
    }

    /// The same command again, a little later.
    pub(super) fn retry(&mut self, cx: &mut Turn<'_>, id: u32, stage: Stage, command: Command) {
        let Some(disk) = self.disks.get_mut(&id) else { return };
        if disk.stage != stage {
            disk.stage = stage;
            disk.since = Instant::now();
        }
        let run = disk.run;
        cx.after(RETRY, move |cx| {
            Self::with(cx, |target, cx| {
                if target.is_in(id, run, stage) {
                    target.enter(cx, id, stage, command);
                }
            });
        });
    }
}

/// Takes over what the kernel granted, or what the device has.
pub(super) fn adopt(disk: &mut Disk, info: &DevInfo) -> Result<(), Failure> {
    let id = disk.spec.id;
    let wrong = |what: String| Failure::new(Errno::PROTO, format!("ublk device {id}: {what}"));
    disk.flags = DeviceFlags::of_device(info.flags).map_err(|why| wrong(why.into()))?;
    let depths = 1..=ublk_poll::MAX_QUEUE_DEPTH;
    if !depths.contains(&info.queue_depth) || !(1..=ublk_poll::MAX_QUEUES).contains(&info.nr_hw_queues) {
        return Err(wrong(format!("{} queues of depth {}", info.nr_hw_queues, info.queue_depth)));
    }
    if (info.queue_depth, info.nr_hw_queues) != (disk.spec.queue_depth, disk.spec.num_queues) {
        let (queues, depth) = (info.nr_hw_queues, info.queue_depth);
        tracing::warn!("ublk disk {id} has {queues} queues of depth {depth}, not what was asked for");
    }
    disk.spec.queue_depth = info.queue_depth;
    disk.spec.num_queues = info.nr_hw_queues;
    disk.geometry.max_io = disk.geometry.max_io.min(info.max_io_buf_bytes);
    if disk.recovering {
        // Its own largest request, which may exceed ours; SET_PARAMS bounds it, see `take_over`.
        disk.geometry.max_io = info.max_io_buf_bytes;
    }
    disk.geometry.check().map_err(|e| wrong(e.to_string()))
}

fn refusal(id: u32, stage: Stage, errno: Errno) -> Failure {
    let what = match stage {
        Stage::Adding => "add the device",
        Stage::Inspecting(_) => "find the device",
        Stage::ReadingParams => "read the parameters of the device",
        Stage::Recovering => "take over the device",
        Stage::SettingParams => "set the parameters of the device",
        _ => "start the device",
    };
    let hint = match (stage, errno) {
        (Stage::Inspecting(_), Errno::NODEV) => "; there is none of this number to recover",
        (Stage::Adding, Errno::PERM) => {
            "; CAP_SYS_ADMIN is missing, and the driver makes no unprivileged devices"
        }
        (Stage::Adding, Errno::OPNOTSUPP) => "; the driver is too old, Linux 6.4 or later is needed",
        (Stage::Recovering, Errno::BUSY) => "; its former server still has it open",
        _ => "",
    };
    Failure::new(errno, format!("cannot {what} ublk {id}: {errno}{hint}"))
}

fn bdev_error(method: &str, name: &str, e: &bdev::Error) -> RpcError {
    let error = RpcError::errno(e.errno(), format!("{method}: {e}")).object("bdev", name);
    match e {
        bdev::Error::NotFound { .. } => error.hint("bdev_get_bdevs lists the bdevs"),
        _ => error,
    }
}
