//! The ublk target on the control thread: the driver's control device, and the table of disks.
//!
//! `start` and `stop` beside this file hold the two halves of a disk's life.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::RawFd;
use std::process::Child;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bdev::Manager;
use engine::placement::Placement;
use reactor::{CpuMask, Handle, Polled, Poller, Turn};
use rpc::{Responder, RpcError};
use rustix::io::Errno;
use serde_json::{Value, json};
use ublk_poll::{Command, Control, Done, Features, Reply};

use super::disk::{Disk, Failure, Stage};
use super::stop::Removal;
use super::survey::Survey;

/// State of the subsystem.
pub(super) struct Target {
    pub(super) manager: Arc<Manager>,
    pub(super) control: Handle,
    /// Of the program.
    reactors: Vec<Handle>,
    shared_placement: Placement,
    pub(super) driver: Option<Driver>,
    pub(super) disks: BTreeMap<u32, Disk>,
    pub(super) removals: BTreeMap<u32, Removal>,
    /// Disks for which a number is looked for.
    pub(super) surveys: BTreeMap<u64, Survey>,
    /// Processes that write back for disks that did not wait for them.
    pub(super) orphans: Vec<Child>,
    commands: HashMap<u64, Owner>,
    last_command: u64,
    pub(super) last_run: u64,
    /// Called when the last disk is gone; no disk is started meanwhile.
    pub(super) draining: Vec<Emptied>,
}

/// See [`Target::drain`].
pub(super) type Emptied = Box<dyn FnOnce(&mut Target, &mut Turn<'_>)>;

/// From `ublk_create_target` to `ublk_destroy_target`.
pub(super) struct Driver {
    pub(super) ring: Control,
    /// Once the driver has said.
    pub(super) features: Option<Features>,
    pub(super) user_copy: bool,
    cpumask: Option<CpuMask>,
    pub(super) placement: Placement,
    creator: Option<Responder>,
}

/// Whom a command belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Owner {
    Features,
    Disk { id: u32, run: u64 },
    Resize { id: u32 },
    Survey { number: u64, id: u32 },
    Removal { id: u32 },
}

/// How messages find the target.
struct TargetCell(Rc<RefCell<Target>>);

/// Takes completions of the driver.
struct TargetPoller(Rc<RefCell<Target>>);

impl Poller for TargetPoller {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().poll(cx).into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().driver.as_mut().is_some_and(|d| d.ring.ready()).into()
    }
}

impl Target {
    /// Sets it up on the control thread of `cx`.
    pub(super) fn install(
        cx: &mut Turn<'_>,
        manager: Arc<Manager>,
        reactors: Vec<Handle>,
        placement: Placement,
    ) -> Rc<RefCell<Self>> {
        let target = Rc::new(RefCell::new(Self {
            manager,
            control: cx.handle().clone(),
            reactors,
            shared_placement: placement,
            driver: None,
            disks: BTreeMap::new(),
            removals: BTreeMap::new(),
            surveys: BTreeMap::new(),
            orphans: Vec::new(),
            commands: HashMap::new(),
            last_command: 0,
            last_run: 0,
            draining: Vec::new(),
        }));
        cx.set_local(Rc::new(TargetCell(target.clone())));
        cx.add_poller("ublk", Box::new(TargetPoller(target.clone())));
        target
    }

    /// Runs `f` on the control thread, soon.
    pub(super) fn send(control: &Handle, f: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static) {
        control.send(move |cx| Self::with(cx, f));
    }

    /// Runs `f` on the target, from a timer.
    pub(super) fn with(cx: &mut Turn<'_>, f: impl FnOnce(&mut Self, &mut Turn<'_>)) {
        if let Some(cell) = cx.local::<TargetCell>() {
            f(&mut cell.0.borrow_mut(), cx);
        }
    }

    /// `ublk_create_target`: answers once the driver has said what it can do.
    pub(super) fn create(
        &mut self,
        cx: &mut Turn<'_>,
        cpumask: Option<CpuMask>,
        user_copy: bool,
        creator: Responder,
    ) {
        match self.open_driver(cx, cpumask, user_copy) {
            Err(e) => creator.err(e),
            Ok(mut driver) => {
                driver.creator = Some(creator);
                self.driver = Some(driver);
                let sent = self.command(0, Owner::Features, Command::Features);
                if let Err(errno) = sent {
                    self.features(cx, Err(errno));
                }
            }
        }
    }

    fn open_driver(
        &self,
        cx: &mut Turn<'_>,
        cpumask: Option<CpuMask>,
        user_copy: bool,
    ) -> Result<Driver, RpcError> {
        const METHOD: &str = "ublk_create_target";
        if self.driver.is_some() {
            let text = format!("{METHOD}: there is a ublk target already");
            return Err(RpcError::errno(Errno::BUSY.raw_os_error(), text));
        }
        let placement = match &cpumask {
            Some(mask) => Placement::new(&self.reactors_of(mask)?),
            None => self.shared_placement.clone(),
        };
        let ring = Control::open().map_err(|e| {
            let code = e.errno().raw_os_error();
            RpcError::errno(code, format!("{METHOD}: {e}"))
        })?;
        cx.watch(ring.wait_fd())
            .map_err(|e| RpcError::errno(e.raw_os_error(), format!("{METHOD}: epoll: {e}")))?;
        Ok(Driver { ring, features: None, user_copy, cpumask, placement, creator: None })
    }

    fn reactors_of(&self, mask: &CpuMask) -> Result<Vec<Handle>, RpcError> {
        let on = |core: &usize| self.reactors.iter().find(|r| r.core() == Some(*core)).cloned().ok_or(*core);
        let reactors: Result<Vec<Handle>, usize> = mask.cores().iter().map(on).collect();
        reactors.map_err(|core| {
            let text = format!("ublk_create_target: cpumask: this program has no reactor on core {core}");
            RpcError::invalid_params(text)
                .param("cpumask")
                .hint("framework_get_reactors lists those there are")
        })
    }

    /// The driver has said what it can do.
    fn features(&mut self, cx: &mut Turn<'_>, result: Result<Reply, Errno>) {
        let Some(driver) = &mut self.driver else { return };
        let features = match result {
            Ok(Reply::Features(features)) => features,
            Ok(_) | Err(Errno::OPNOTSUPP) => Features::unreported(),
            Err(errno) => {
                let creator = driver.creator.take();
                self.close_driver(cx);
                let text = format!("ublk_create_target: the ublk driver does not tell its features: {errno}");
                if let Some(creator) = creator {
                    creator.err(RpcError::errno(errno.raw_os_error(), text));
                }
                return;
            }
        };
        tracing::info!("ublk driver with {features}");
        if !driver.ring.is_privileged() {
            tracing::warn!(
                "ublk without CAP_SYS_ADMIN: no user copy, and no recovery of disks after a crash"
            );
        } else if !features.user_copy() && driver.user_copy {
            tracing::warn!("this kernel's ublk driver has no user copy: each tag of a queue keeps a buffer");
        }
        driver.features = Some(features);
        if let Some(creator) = driver.creator.take() {
            creator.ok(true);
        }
    }

    /// `ublk_destroy_target`: stops every disk.
    pub(super) fn destroy(&mut self, cx: &mut Turn<'_>, responder: Responder) {
        if self.driver.is_none() {
            return responder.err(no_target("ublk_destroy_target"));
        }
        self.drain(
            cx,
            Box::new(|target, cx| {
                target.close_driver(cx);
                responder.ok(true);
            }),
        );
    }

    /// Stops every disk, then calls `emptied`.
    pub(super) fn drain(&mut self, cx: &mut Turn<'_>, emptied: Emptied) {
        self.draining.push(emptied);
        let ids: Vec<u32> = self.disks.keys().copied().collect();
        for id in ids {
            self.stop(cx, id, None);
        }
        self.check_empty(cx);
    }

    /// Calls those who wait for the last disk to go.
    pub(super) fn check_empty(&mut self, cx: &mut Turn<'_>) {
        if self.disks.is_empty() && self.removals.is_empty() {
            for emptied in std::mem::take(&mut self.draining) {
                emptied(self, cx);
            }
        }
    }

    fn close_driver(&mut self, cx: &mut Turn<'_>) {
        if let Some(driver) = self.driver.take() {
            let fd: RawFd = driver.ring.wait_fd();
            cx.unwatch(fd);
        }
        self.commands.clear();
    }

    /// Sends a command; its end comes to [`Target::ended`].
    pub(super) fn command(&mut self, id: u32, owner: Owner, command: Command) -> Result<u64, Errno> {
        let driver = self.driver.as_mut().ok_or(Errno::NODEV)?;
        self.last_command += 1;
        driver.ring.submit(id, command, self.last_command)?;
        self.commands.insert(self.last_command, owner);
        Ok(self.last_command)
    }

    /// Puts disk `id` into `stage` and sends what that waits for.
    pub(super) fn enter(&mut self, cx: &mut Turn<'_>, id: u32, stage: Stage, command: Command) {
        let Some(run) = self.disks.get(&id).map(|d| d.run) else { return };
        let sent = self.command(id, Owner::Disk { id, run }, command);
        let Some(disk) = self.disks.get_mut(&id) else { return };
        if disk.stage != stage {
            disk.since = Instant::now();
        }
        disk.stage = stage;
        match sent {
            Ok(number) => disk.command = number,
            // As if the kernel had refused.
            Err(errno) => self.step(cx, id, Err(errno)),
        }
    }

    fn poll(&mut self, cx: &mut Turn<'_>) -> bool {
        let Some(driver) = &mut self.driver else { return false };
        let mut done = Vec::new();
        let any = driver.ring.poll(&mut done);
        for Done { token, result } in done {
            self.ended(cx, token, result);
        }
        any
    }

    fn ended(&mut self, cx: &mut Turn<'_>, number: u64, result: Result<Reply, Errno>) {
        match self.commands.remove(&number) {
            Some(Owner::Features) => self.features(cx, result),
            Some(Owner::Disk { id, run }) => {
                let current = self.disks.get(&id).is_some_and(|d| d.run == run && d.command == number);
                if current {
                    self.step(cx, id, result);
                }
            }
            Some(Owner::Resize { id }) => self.resize_ended(id, result),
            Some(Owner::Survey { number, id }) => self.surveyed(cx, number, id, result),
            Some(Owner::Removal { id }) => self.removal_step(cx, id, result),
            None => {}
        }
    }

    /// What the present stage of `id` waited for has come.
    pub(super) fn step(&mut self, cx: &mut Turn<'_>, id: u32, result: Result<Reply, Errno>) {
        match self.disks.get(&id).map(|d| d.stage) {
            Some(stage) if stage.is_ending() => self.stop_step(cx, id, stage, result),
            Some(stage) => self.start_step(cx, id, stage, result),
            None => {}
        }
    }

    /// `ublk_get_disks`.
    pub(super) fn rows(&self, id: Option<u32>) -> Result<Vec<Value>, RpcError> {
        let rows: Vec<Value> =
            self.disks.values().filter(|d| id.is_none_or(|id| d.spec.id == id)).map(Disk::row).collect();
        match id {
            Some(id) if rows.is_empty() => Err(no_disk("ublk_get_disks", id)),
            _ => Ok(rows),
        }
    }

    /// For `save_config`.
    pub(super) fn config(&self) -> Vec<Value> {
        let Some(driver) = &self.driver else { return Vec::new() };
        let mut params = json!({"disable_user_copy": !driver.user_copy});
        if let Some(mask) = &driver.cpumask {
            params["cpumask"] = mask.to_hex().into();
        }
        let create = json!({"method": "ublk_create_target", "params": params});
        let disks = self.disks.values().filter(|d| !d.stage.is_ending()).map(Disk::call);
        std::iter::once(create).chain(disks).collect()
    }
}

/// The name of disk `id` in /dev and /sys/block.
pub(super) fn disk_name(id: u32) -> String {
    format!("ublkb{id}")
}

/// There is no ublk target.
pub(super) fn no_target(method: &str) -> RpcError {
    let text = format!("{method}: there is no ublk target");
    RpcError::errno(Errno::NODEV.raw_os_error(), text).hint("call ublk_create_target first")
}

/// There is no such disk.
pub(super) fn no_disk(method: &str, id: u32) -> RpcError {
    Failure::new(Errno::NODEV, format!("no ublk disk {id}"))
        .to_rpc(method, id)
        .hint("ublk_get_disks lists those there are")
}
