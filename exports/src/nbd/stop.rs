//! From a wish to end a disk to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use engine::App;
use nbd_poll::kernel::netlink::Netlink;
use nbd_poll::kernel::{self, ioctl, sysfs};
use reactor::Handle;
use rpc::RpcError;

use super::disk::{Disk, Interface, KernelEnd, Key, Phase, Stopped, device_name, disk_name, disks, with};
use super::prepare::wait_gone;
use super::worker;
use crate::host;

/// Why a disk ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// An operator asks; who has it mounted may object.
    Ask,
    /// An operator insists.
    Force,
    /// There is no bdev any more.
    Removed,
    /// The program ends. A device that is mounted is kept for the next run, if it can be taken over then.
    Shutdown,
}

/// What is to be done with the kernel's device.
struct Job {
    index: u32,
    interface: Interface,
    how: How,
    /// A later run can take it over.
    can_keep: bool,
    hurry: Arc<AtomicBool>,
}

/// Why a disk goes on.
enum Objection {
    /// Mounted, or the like.
    Used(Vec<String>),
    Kernel(kernel::Error),
}

/// Ends a running disk; `stopped` hears of it.
pub(super) fn stop(app: &mut App, key: Key, how: How, stopped: Stopped) {
    let mut stopped = Some(stopped);
    let keeps = app.keeps_devices();
    let job = with(app, key, |disk| {
        if how == How::Force {
            disk.hurry.store(true, Ordering::Relaxed);
        }
        match disk.phase {
            Phase::Running => {}
            Phase::Stopping => {
                disk.stopped.extend(stopped.take());
                return None;
            }
            Phase::Starting => {
                disk.stop_after_start.extend(stopped.take());
                return None;
            }
        }
        disk.phase = Phase::Stopping;
        disk.stopped.extend(stopped.take());
        let can_keep = keeps && disk.can_keep();
        let (interface, hurry) = (disk.interface, disk.hurry.clone());
        Some(Job { index: disk.index?, interface, how, can_keep, hurry })
    });
    let Some(Some(job)) = job else {
        // Not there at all.
        return stopped.into_iter().for_each(|stopped| stopped(Ok(())));
    };
    worker::run(
        &app.control,
        "nbd_stop",
        move || disconnect(&job),
        move |app, _, done| match done {
            Ok(end) => disconnected(app, key, end),
            Err(objection) => go_on(app, key, &objection),
        },
    );
}

/// Flushes and disconnects. `None`: disconnected, what becomes of it is to be seen. Blocks.
fn disconnect(job: &Job) -> Result<Option<KernelEnd>, Objection> {
    let users = host::users(&disk_name(job.index));
    if !users.is_empty() && job.how == How::Ask {
        return Err(Objection::Used(users));
    }
    if !users.is_empty() && job.how == How::Shutdown && job.can_keep {
        let device = device_name(job.index);
        tracing::warn!(device, users = users.join("; "), "in use: kept for the next run of the program");
        return Ok(Some(KernelEnd::Kept));
    }
    if job.how != How::Removed
        && let Err(why) = write_back(job)
    {
        tracing::warn!(device = device_name(job.index), why, "cached writes may be lost");
    }
    let done = match job.interface {
        Interface::Netlink => Netlink::open().and_then(|mut n| n.disconnect(job.index)),
        Interface::Ioctl => ioctl::disconnect(job.index),
    };
    match done {
        Ok(()) => Ok(None),
        // Somebody else was faster.
        Err(_) if !sysfs::state(job.index).is_some_and(|s| s.is_made()) => Ok(None),
        Err(e) => Err(Objection::Kernel(e)),
    }
}

/// Writes back what the host caches for the device, as long as somebody waits for that. Blocks.
fn write_back(job: &Job) -> Result<(), String> {
    let mut child = host::sync(&disk_name(job.index)).map_err(|e| format!("cannot run sync: {e}"))?;
    let since = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("sync: {status}")),
            Err(e) => return Err(format!("sync: {e}")),
            Ok(None) if job.hurry.load(Ordering::Relaxed) || since.elapsed() >= host::SYNC_TIME => break,
            Ok(None) => std::thread::sleep(host::SYNC_POLL),
        }
    }
    // It ends when the device does.
    std::thread::spawn(move || child.wait());
    Err("the device does not take them".into())
}

/// Fails whatever the kernel waits for on the device, which is then disconnected.
pub(super) fn cut_off(control: &Handle, index: u32) {
    let work = move || Netlink::open().and_then(|mut n| n.disconnect(index));
    worker::run(control, "nbd_cut_off", work, move |_, _, done| {
        if let Err(error) = done {
            tracing::warn!(device = device_name(index), %error, "cannot disconnect");
        }
    });
}

/// The disk goes on, and whoever wanted to stop it hears why.
fn go_on(app: &mut App, key: Key, objection: &Objection) {
    let Some((device, stopped)) = with(app, key, |disk| {
        disk.phase = Phase::Running;
        (disk.device(), std::mem::take(&mut disk.stopped))
    }) else {
        return;
    };
    let error = match objection {
        Objection::Used(users) => {
            let text = format!("nbd_stop_disk: {device} is in use: {}", users.join("; "));
            let error = RpcError::errno(rustix::io::Errno::BUSY.raw_os_error(), text);
            error.hint("end that use first; with force its users get I/O errors")
        }
        Objection::Kernel(e) => RpcError::errno(e.errno(), format!("nbd_stop_disk: {e}")),
    };
    let error = error.object("nbd_device", device);
    stopped.into_iter().for_each(|stopped| stopped(Err(error.clone())));
}

/// The kernel sends nothing more: let the lanes end, and see that the device gets free.
fn disconnected(app: &mut App, key: Key, end: Option<KernelEnd>) {
    let index = with(app, key, |disk| {
        disk.shared.keep.store(end == Some(KernelEnd::Kept), Ordering::Relaxed);
        disk.shared.stop.store(true, Ordering::Release);
        disk.index
    });
    // Those that sleep look at the flag.
    app.reactors.iter().for_each(|reactor| reactor.send(|_| ()));
    match (end, index.flatten()) {
        (None, Some(index)) => {
            let gone = move || {
                if wait_gone(index) { KernelEnd::Gone } else { KernelEnd::StillOpen(sysfs::openers(index)) }
            };
            worker::run(&app.control, "nbd_gone", gone, move |app, _, end| {
                with(app, key, |disk| disk.kernel_end = Some(end));
                check(app, key);
            });
        }
        (end, _) => {
            with(app, key, |disk| disk.kernel_end = Some(end.unwrap_or(KernelEnd::Gone)));
            check(app, key);
        }
    }
}

/// The device was disconnected, but not from here.
pub(super) fn ended_by_others(app: &mut App, key: Key) {
    let program = app.program;
    let running = with(app, key, |disk| {
        if disk.phase != Phase::Running {
            return None;
        }
        tracing::warn!(device = disk.device(), "disconnected by somebody else");
        disk.phase = Phase::Stopping;
        Some((disk.index?, disk.kernel_disk(program).backend))
    });
    let Some(Some((index, backend))) = running else { return };
    worker::run(
        &app.control,
        "nbd_end",
        move || finish_off(index, backend.as_ref()),
        move |app, _, ()| {
            disconnected(app, key, None);
        },
    );
}

/// An ioctl of somebody else ends the connections of a device made by netlink, but not the device. Blocks.
fn finish_off(index: u32, backend: Option<&String>) {
    // Whoever has made another device of it meanwhile keeps it.
    let ours = sysfs::state(index)
        .is_some_and(|s| s.is_made() && s.backend.is_some() && s.backend.as_ref() == backend);
    if ours && let Err(error) = Netlink::open().and_then(|mut n| n.disconnect(index)) {
        tracing::warn!(device = device_name(index), %error, "cannot finish what somebody else began");
    }
}

/// Ends a disk of which nothing is left: neither lanes nor a kernel device.
pub(super) fn check(app: &mut App, key: Key) {
    let Ok(disks) = disks(app) else { return };
    let done =
        |disk: &mut Disk| disk.phase == Phase::Stopping && disk.lanes == 0 && disk.kernel_end.is_some();
    if with(app, key, |disk| done(disk)) != Some(true) {
        return;
    }
    let Some(mut disk) = disks.borrow_mut().disks.remove(&key) else { return };
    let (device, stopped) = (disk.device(), std::mem::take(&mut disk.stopped));
    let end = disk.kernel_end.take();
    if end != Some(KernelEnd::Kept)
        && let Some(claim) = disk.claim.take()
    {
        claim.give_up();
    }
    tracing::info!(device, bdev = disk.bdev_name(), ?end, "NBD disk stopped");
    drop(disk);
    let result = match end {
        Some(KernelEnd::StillOpen(users)) => {
            let who = if users.is_empty() { "somebody".to_owned() } else { users.join("; ") };
            let text =
                format!("nbd_stop_disk: {device} is disconnected, but not free until it is closed: {who}");
            let error = RpcError::errno(rustix::io::Errno::BUSY.raw_os_error(), text);
            Err(error.object("nbd_device", device))
        }
        _ => Ok(()),
    };
    stopped.into_iter().for_each(|stopped| stopped(result.clone()));
}
