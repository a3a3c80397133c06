//! From `nbd_start_disk` to its answer, and new lanes for sockets that died.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Descriptor, Event, Mode, User};
use engine::App;
use engine::methods::bdev_error;
use nbd_poll::kernel::netlink::Netlink;
use nbd_poll::kernel::{self, MAX_BLOCK_SIZE, ioctl, sysfs};
use nbd_poll::socket_pair;
use reactor::Turn;
use rpc::{Responder, RpcError};

use super::claim::claim;
use super::disk::{Disk, Interface, Key, Phase, device_name, disks, with};
use super::lane::{self, Ended, Parts, Shared};
use super::methods::StartDisk;
use super::prepare::{Plan, Prepared, Refused, Wish, prepare};
use super::recover::{NotRecovered, Target, recover};
use super::{bridge, stop, worker};

const METHOD: &str = "nbd_start_disk";

/// Sockets of a disk unless said otherwise: one per reactor, but more than this gain nothing.
const DEFAULT_CONNECTIONS: usize = 4;

/// How long udev may take to make a device's node.
const NODE_TIME: Duration = Duration::from_secs(5);

/// Starts a disk on device `index`, or on any.
pub(super) fn start(app: &mut App, params: StartDisk, index: Option<u32>, r: Responder) {
    match open(app, params, index) {
        Ok((key, wish)) => {
            let then = move |app: &mut App, _: &mut Turn<'_>, found| prepared(app, key, r, found);
            worker::run(&app.control, "nbd_prepare", move || prepare(&wish), then);
        }
        Err(e) => r.err(e),
    }
}

/// Opens the bdev and enters the disk.
fn open(app: &mut App, params: StartDisk, index: Option<u32>) -> Result<(Key, Wish), RpcError> {
    let disks = disks(app)?;
    let busy =
        |text: String| RpcError::errno(rustix::io::Errno::BUSY.raw_os_error(), text).param("nbd_device");
    if app.shutting_down() {
        return Err(busy(format!("{METHOD}: the program is shutting down")));
    }
    if let Some((_, disk)) =
        index.and_then(|i| disks.borrow().find(i).map(|(k, d)| (k, d.bdev_name().to_owned())))
    {
        return Err(busy(format!(
            "{METHOD}: nbd_device serves bdev {disk} already; stop it or choose another"
        )));
    }
    let key = disks.borrow_mut().next_key();
    let descriptor = open_bdev(app, key, &params)?;
    let info = descriptor.info();
    let export = bridge::export(info, descriptor.blocks(), descriptor.mode() == Mode::ReadOnly);
    let invalid = |text: String| {
        let error = RpcError::errno(rustix::io::Errno::INVAL.raw_os_error(), format!("{METHOD}: {text}"));
        Err(error.param("bdev_name").object("bdev", &params.bdev_name))
    };
    if info.block_size > MAX_BLOCK_SIZE {
        return invalid(format!(
            "bdev {} has blocks of {} bytes; the kernel's NBD takes 512 to {MAX_BLOCK_SIZE}",
            info.name, info.block_size
        ));
    }
    if export.size == 0 {
        return invalid(format!("bdev {} is empty", info.name));
    }
    let wish = Wish {
        program: app.program,
        bdev_name: info.name.clone(),
        block_size: info.block_size,
        read_only: descriptor.mode() == Mode::ReadOnly,
        loses_contents: info.volatile,
        index,
        control: params.control,
        run_dir: disks.borrow().run_dir.clone(),
    };
    let default = app.reactors.len().clamp(1, DEFAULT_CONNECTIONS);
    let disk = Disk {
        connections: params.connections.map_or(default, |c| c as usize),
        kernel_size: export.size,
        descriptor,
        params,
        export,
        interface: Interface::Netlink,
        index,
        claim: None,
        shared: Arc::<Shared>::default(),
        lanes: 0,
        phase: Phase::Starting,
        resizing: false,
        stop_after_start: Vec::new(),
        stopped: Vec::new(),
        hurry: Arc::default(),
        kernel_end: None,
    };
    disks.borrow_mut().disks.insert(key, disk);
    Ok((key, wish))
}

fn open_bdev(app: &App, key: Key, params: &StartDisk) -> Result<Descriptor, RpcError> {
    let name = &params.bdev_name;
    let error = |e| bdev_error(METHOD, name, &e);
    let read_only = params.readonly || app.manager.get(name).map_err(error)?.info().read_only;
    let mode = if read_only { Mode::ReadOnly } else { Mode::ReadWrite };
    let control = app.control.clone();
    let events = move |event| App::send(&control, move |app, _| bdev_event(app, key, event));
    let user = User::Export("a kernel NBD disk".into());
    app.manager.open_as(user, name, mode, Box::new(events)).map_err(error)
}

fn bdev_event(app: &mut App, key: Key, event: Event) {
    match event {
        Event::Resized { .. } => resize(app, key),
        Event::Removed => {
            let phase = with(app, key, |disk| disk.phase);
            match phase {
                Some(Phase::Starting) => {
                    with(app, key, |disk| disk.stop_after_start.push(Box::new(|_| ())));
                }
                Some(Phase::Running) => stop::stop(app, key, stop::How::Removed, Box::new(|_| ())),
                Some(Phase::Stopping) | None => {}
            }
        }
    }
}

/// The device is known: get sockets to it.
fn prepared(app: &mut App, key: Key, r: Responder, found: Result<Prepared, Refused>) {
    let prepared = match found {
        Ok(prepared) => prepared,
        Err(e) => return failed(app, key, r, refusal(&e)),
    };
    // Two starts without a number may have found the same leftover.
    let taken = prepared.index.and_then(|i| {
        let disks = app.state::<super::disk::Disks>()?;
        let disks = disks.borrow();
        disks.find(i).filter(|(other, _)| *other != key).map(|_| i)
    });
    if let Some(index) = taken {
        let busy = Refused::busy(index, "another call of nbd_start_disk was faster");
        return failed(app, key, r, refusal(&busy));
    }
    let program = app.program;
    let Some((target, kernel_disk, count)) = with(app, key, |disk| {
        disk.interface = prepared.interface;
        disk.index = prepared.index;
        disk.claim = prepared.claim;
        if let Plan::Recover { sockets } = prepared.plan {
            disk.connections = sockets;
        }
        (prepared.index.map(|i| target(disk, program, i)), disk.kernel_disk(program), disk.connections)
    }) else {
        return;
    };
    match (prepared.plan, prepared.interface, target) {
        (Plan::Recover { .. }, _, Some(target)) => {
            tracing::info!(
                device = device_name(target.index),
                "taking over a device left over from an earlier run"
            );
            let then = move |app: &mut App, _: &mut Turn<'_>, found: Result<_, NotRecovered>| {
                let sockets = found.map_err(|e| not_recovered(&e));
                connected(app, key, r, sockets, Fresh::No);
            };
            worker::run(&app.control, "nbd_recover", move || recover(&target, count), then);
        }
        (_, Interface::Ioctl, Some(target)) => {
            let control = app.control.clone();
            let work = move || make_by_ioctl(&control, key, target.index, &kernel_disk, count);
            let then = move |app: &mut App, _: &mut Turn<'_>, made: Result<_, kernel::Error>| {
                connected(app, key, r, made.map_err(|e| refusal(&e.into())), Fresh::Yes);
            };
            worker::run(&app.control, "nbd_make", work, then);
        }
        _ => {
            // Here, although it is a system call of a millisecond: /sys/block/nbdN/pid then names this process.
            let made = make(prepared.index, &kernel_disk, count);
            let sockets = made.map(|(index, sockets)| {
                claim_made(app, key, index);
                sockets
            });
            connected(app, key, r, sockets.map_err(|e| refusal(&e)), Fresh::Yes);
        }
    }
}

/// The device was made just now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fresh {
    Yes,
    No,
}

/// Our ends of socket pairs, and the kernel's.
fn socket_pairs(count: usize) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>), kernel::Error> {
    let pairs: Result<Vec<_>, _> = (0..count).map(|_| socket_pair()).collect();
    Ok(pairs.map_err(|e| kernel::Error::new("sockets for the kernel", e))?.into_iter().unzip())
}

/// CONNECT.
fn make(index: Option<u32>, disk: &kernel::Disk, count: usize) -> Result<(u32, Vec<OwnedFd>), Refused> {
    let (ours, kernels) = socket_pairs(count)?;
    let fds: Vec<_> = kernels.iter().map(AsFd::as_fd).collect();
    match (Netlink::open()?.connect(index, disk, &fds), index) {
        (Ok(index), _) => Ok((index, ours)),
        (Err(e), Some(index)) if e.errno() == rustix::io::Errno::BUSY.raw_os_error() => {
            Err(Refused::busy_with_users(index))
        }
        (Err(e), _) => Err(e.into()),
    }
}

fn make_by_ioctl(
    control: &reactor::Handle,
    key: Key,
    index: u32,
    disk: &kernel::Disk,
    count: usize,
) -> Result<Vec<OwnedFd>, kernel::Error> {
    let (ours, kernels) = socket_pairs(count)?;
    let control = control.clone();
    let ended = move |result: std::io::Result<()>| {
        App::send(&control, move |app, _| {
            if let Err(error) = result {
                tracing::warn!(device = device_name(index), %error, "the device has ended");
            }
            stop::ended_by_others(app, key);
        });
    };
    ioctl::connect(index, disk, kernels, ended)?;
    Ok(ours)
}

/// Enters the number that the kernel chose, and the claim to it.
fn claim_made(app: &App, key: Key, index: u32) {
    let Ok(disks) = disks(app) else { return };
    let mut disks = disks.borrow_mut();
    let run_dir = disks.run_dir.clone();
    let Some(disk) = disks.disks.get_mut(&key) else { return };
    disk.index = Some(index);
    if disk.claim.is_none() {
        match claim(&run_dir, index) {
            Ok(claim) => disk.claim = Some(claim),
            Err(error) => {
                tracing::warn!(device = device_name(index), %error, "will not outlive a crash of this program");
            }
        }
    }
}

/// The kernel has the other ends of `sockets`: serve ours.
fn connected(app: &mut App, key: Key, r: Responder, sockets: Result<Vec<OwnedFd>, RpcError>, fresh: Fresh) {
    let sockets = match sockets {
        Ok(sockets) => sockets,
        Err(e) => return failed(app, key, r, e),
    };
    let recorded = with(app, key, |disk| {
        disk.connections = sockets.len();
        let state = disk.index.and_then(sysfs::state);
        let record = disk.record(state.as_ref().and_then(|s| s.pid));
        if let Some(claim) = &mut disk.claim {
            claim.record(&record);
        }
        disk.kernel_size = match (fresh, state) {
            (Fresh::No, Some(state)) => state.size,
            _ => disk.export.size,
        };
    });
    if recorded.is_none() {
        return;
    }
    let serve = Serving { key, left: sockets.len(), problem: None, r, fresh };
    let serve = Arc::new(std::sync::Mutex::new(Some(serve)));
    for socket in sockets {
        let serve = serve.clone();
        add_lane(app, key, socket, move |app, started| {
            let mut slot = serve.lock().unwrap_or_else(|e| e.into_inner());
            let Some(serving) = slot.as_mut() else { return };
            serving.left -= 1;
            serving.problem = serving.problem.take().or(started.err());
            if serving.left == 0
                && let Some(serving) = slot.take()
            {
                drop(slot);
                served(app, serving);
            }
        });
    }
}

/// Lanes that are being started for a disk.
struct Serving {
    key: Key,
    left: usize,
    problem: Option<String>,
    r: Responder,
    fresh: Fresh,
}

/// Starts a lane for `socket` on the reactor with the fewest users; `then` runs on the control thread.
fn add_lane(
    app: &App,
    key: Key,
    socket: OwnedFd,
    then: impl FnOnce(&mut App, Result<(), String>) + Send + 'static,
) {
    let Some((descriptor, export, shared)) = with(app, key, |disk| {
        disk.lanes += 1;
        (disk.descriptor.clone(), disk.export, disk.shared.clone())
    }) else {
        return;
    };
    let place = app.placement.take();
    let reactor = place.reactor().clone();
    let (registry, control) = (app.manager.registry().clone(), app.control.clone());
    reactor.send(move |cx| {
        let tell = control.clone();
        let ended = move |ended: Ended| {
            App::send(&tell, move |app, _| {
                drop(place);
                lane_ended(app, key, &ended);
            });
        };
        let parts = Parts { socket, export, descriptor, registry, shared, ended: Box::new(ended) };
        let started = lane::start(cx, parts);
        App::send(&control, move |app, _| {
            if started.is_err() {
                with(app, key, |disk| disk.lanes -= 1);
            }
            then(app, started);
        });
    });
}

/// Every lane of a starting disk runs, or could not.
fn served(app: &mut App, serving: Serving) {
    let Serving { key, problem, r, fresh, .. } = serving;
    if let Some(problem) = problem {
        // What was made is taken down before the answer, so that it may be tried again at once.
        with(app, key, |disk| disk.phase = Phase::Running);
        let text = format!("{METHOD}: {problem}");
        let answer = move |_| r.err(RpcError::internal(text));
        return stop::stop(app, key, stop::How::Force, Box::new(answer));
    }
    let Some(index) = with(app, key, |disk| disk.index).flatten() else {
        return r.err(RpcError::internal(format!("{METHOD}: the disk is gone")));
    };
    let work = move || settle(index, fresh);
    worker::run(&app.control, "nbd_settle", work, move |app, _, ()| running(app, key, r));
}

/// Waits for the node and has the kernel read the partition table. Blocks.
fn settle(index: u32, fresh: Fresh) {
    let node = sysfs::node(index);
    let until = Instant::now() + NODE_TIME;
    while !node.exists() {
        if Instant::now() > until {
            tracing::warn!(node = %node.display(), "the kernel has the device, but there is no node for it");
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    if fresh == Fresh::Yes {
        // The first open reads it.
        drop(File::open(node));
    }
}

fn running(app: &mut App, key: Key, r: Responder) {
    let Some((device, after)) = with(app, key, |disk| {
        disk.phase = Phase::Running;
        tracing::info!(
            device = disk.device(),
            bdev = disk.bdev_name(),
            sockets = disk.connections,
            "NBD disk"
        );
        (disk.device(), std::mem::take(&mut disk.stop_after_start))
    }) else {
        return;
    };
    r.ok(device);
    for stopped in after {
        stop::stop(app, key, stop::How::Removed, stopped);
    }
    // What happened meanwhile.
    resize(app, key);
    let missing = with(app, key, |disk| disk.connections - disk.lanes.min(disk.connections));
    (0..missing.unwrap_or(0)).for_each(|_| lost(app, key, false));
}

/// A start that has made nothing.
fn failed(app: &mut App, key: Key, r: Responder, error: RpcError) {
    let disk = disks(app).ok().and_then(|d| d.borrow_mut().disks.remove(&key));
    if let Some(mut disk) = disk {
        // A former record stays if there still is a device that it may speak of.
        let made = disk.index.and_then(sysfs::state).is_some_and(|d| d.is_made());
        if let Some(claim) = disk.claim.take().filter(|c| c.former.is_none() || !made) {
            claim.give_up();
        }
        disk.stop_after_start.drain(..).for_each(|stopped| stopped(Ok(())));
    }
    r.err(error);
}

fn refusal(e: &Refused) -> RpcError {
    let error = RpcError::errno(e.errno(), format!("{METHOD}: {e}"));
    match e {
        Refused::Busy { device, .. } => error.param("nbd_device").object("nbd_device", device.as_str()),
        Refused::Kernel(_) => error,
    }
}

fn not_recovered(e: &NotRecovered) -> RpcError {
    let errno = match e {
        NotRecovered::Gone(_) => rustix::io::Errno::NODEV.raw_os_error(),
        NotRecovered::Alive(_) => rustix::io::Errno::BUSY.raw_os_error(),
        NotRecovered::Kernel(e) => e.errno(),
    };
    RpcError::errno(errno, format!("{METHOD}: {e}")).param("nbd_device")
}

/// The bdev has another size than the kernel knows: tell it. One at a time, so that the last one counts.
fn resize(app: &mut App, key: Key) {
    let program = app.program;
    let Some(Some((target, interface, block_size))) = with(app, key, |disk| {
        let size = disk.descriptor.blocks() * u64::from(disk.export.block_size);
        if disk.phase != Phase::Running || disk.resizing || size == disk.kernel_size {
            return None;
        }
        disk.resizing = true;
        disk.export.size = size;
        Some((target(disk, program, disk.index?), disk.interface, disk.export.block_size))
    }) else {
        return;
    };
    let size = target.size;
    let work = move || match interface {
        Interface::Ioctl => ioctl::resize(target.index, size, block_size),
        Interface::Netlink => {
            let backend = target.backend.as_deref();
            let change = kernel::netlink::Change { size: Some(size), backend, ..Default::default() };
            Netlink::open()?.reconfigure(target.index, &change)
        }
    };
    worker::run(&app.control, "nbd_resize", work, move |app, _, done| {
        with(app, key, |disk| {
            disk.resizing = false;
            disk.kernel_size = size;
            match done {
                Ok(()) => tracing::info!(device = disk.device(), size, "resized"),
                Err(error) => {
                    tracing::error!(device = disk.device(), size, %error, "the kernel knows the old size")
                }
            }
        });
        resize(app, key);
    });
}

/// For a RECONFIGURE of this disk.
fn target(disk: &Disk, program: &str, index: u32) -> Target {
    let kernel = disk.kernel_disk(program);
    // A device keeps what it was made with, which may be nothing (before Linux 5.14).
    let backend = sysfs::state(index).and_then(|s| s.backend);
    Target {
        index,
        backend,
        size: kernel.size,
        timeout_sec: kernel.timeout_sec,
        dead_conn_timeout_sec: kernel.dead_conn_timeout_sec,
    }
}

/// A lane has let go of everything.
fn lane_ended(app: &mut App, key: Key, ended: &Ended) {
    let phase = with(app, key, |disk| {
        disk.lanes -= 1;
        let device = disk.device();
        match disk.phase {
            Phase::Running if ended.orderly => tracing::info!(device, why = ended.why, "connection"),
            Phase::Running => tracing::warn!(device, why = ended.why, "connection lost"),
            Phase::Starting | Phase::Stopping => {}
        }
        disk.phase
    });
    match phase {
        Some(Phase::Running) => lost(app, key, ended.orderly),
        // Seen to when it runs.
        Some(Phase::Starting) | None => {}
        Some(Phase::Stopping) => stop::check(app, key),
    }
}

/// A running disk has lost a connection.
fn lost(app: &mut App, key: Key, orderly: bool) {
    let program = app.program;
    let found = with(app, key, |disk| Some((disk.lanes, disk.interface, target(disk, program, disk.index?))));
    match found.flatten() {
        // Somebody else disconnects the device.
        Some((0, ..)) if orderly => stop::ended_by_others(app, key),
        Some((_, Interface::Netlink, target)) if !orderly => reconnect(app, key, target),
        // By ioctl a device ends with its connections, and says so itself.
        _ => {}
    }
}

/// Gives the device a new socket in place of the one that died.
fn reconnect(app: &mut App, key: Key, target: Target) {
    let index = target.index;
    worker::run(
        &app.control,
        "nbd_reconnect",
        move || recover(&target, 1),
        move |app, _, found| match found {
            Ok(sockets) => {
                for socket in sockets {
                    tracing::info!(device = device_name(index), "connection replaced");
                    add_lane(app, key, socket, move |_, started| {
                        if let Err(problem) = started {
                            tracing::error!(
                                device = device_name(index),
                                problem,
                                "cannot serve a connection"
                            );
                        }
                    });
                }
            }
            Err(NotRecovered::Gone(_)) => stop::ended_by_others(app, key),
            Err(error) => {
                tracing::error!(device = device_name(index), %error, "a dead connection is not replaced")
            }
        },
    );
}
