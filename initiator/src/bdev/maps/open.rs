//! Opening devices, again and again; what changes with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::Status;
use reactor::Turn;
use uuid::Uuid;

use super::{Done, Map, Maps, State};
use crate::bdev::disk::RnbdDisk;
use crate::bdev::disks::Gate;
use crate::bdev::error::{ENOENT, MapError};
use crate::bdev::geometry;
use crate::bdev::request::Opened;
use crate::client::{CallError, Device};

/// Pause before a call is tried again that met another one.
const AGAIN: Duration = Duration::from_millis(5);

impl Maps {
    /// Sends OPEN for a mapping that is not open, if its session is up and no OPEN is on its way.
    pub(super) fn open_if_ready(&mut self, cx: &mut Turn<'_>, number: u64) {
        let wanted = |m: &&Map| !m.opening && matches!(m.state, State::Init | State::Closed);
        let Some(map) = self.maps.get(&number).filter(wanted) else { return };
        if self.session(&map.params.sessname).is_some_and(|s| s.ready.is_some()) {
            self.send_open(cx, number, move |m, cx, result| m.open_answered(cx, number, result));
        }
    }

    /// Sends OPEN; `then` gets the answer if the mapping is still there.
    fn send_open(
        &mut self,
        cx: &mut Turn<'_>,
        number: u64,
        then: impl FnOnce(&mut Self, &mut Turn<'_>, Result<Device, CallError>) + 'static,
    ) {
        let Some(map) = self.maps.get(&number) else { return };
        let Some(id) = self.session(&map.params.sessname).and_then(|s| s.id) else { return };
        let (path, mode) = (map.params.device_path.clone(), map.params.mode);
        if let Some(map) = self.maps.get_mut(&number) {
            map.opening = true;
        }
        self.initiator.borrow_mut().open(cx, id, &path, mode, move |cx, result| {
            Self::here(cx, |m, cx| {
                if let Some(map) = m.maps.get_mut(&number) {
                    map.opening = false;
                    then(m, cx, result);
                } else if let Ok(device) = result {
                    // Unmapped meanwhile.
                    m.initiator.borrow_mut().close(&device, |_, _| ());
                }
            });
        });
    }

    fn open_answered(&mut self, cx: &mut Turn<'_>, number: u64, result: Result<Device, CallError>) {
        let Some(map) = self.maps.get(&number) else { return };
        let (device_path, session) = (map.params.device_path.clone(), map.params.sessname.clone());
        if map.state == State::Unmapped {
            return self.answered_too_late(cx, number, result);
        }
        match result {
            Ok(device) => match self.opened(cx, number, &device) {
                Ok(()) => {}
                Err(text) => {
                    // What cannot be used is given back, as the kernel's client does.
                    self.initiator.borrow_mut().close(&device, |_, _| ());
                    self.not_opened(cx, number, &MapError::Device { device_path, text: text.clone() });
                    self.give_up(number, &text);
                }
            },
            // The session was lost meanwhile. It comes back by itself, and may have done so already.
            Err(CallError::NotConnected) => {
                if self.session(&session).is_some_and(|s| s.ready.is_some()) {
                    self.retry(cx, number);
                }
            }
            Err(error) => {
                self.not_opened(cx, number, &MapError::Open { device_path, error });
                self.retry(cx, number);
            }
        }
    }

    /// The mapping is on its way out.
    fn answered_too_late(&mut self, cx: &mut Turn<'_>, number: u64, result: Result<Device, CallError>) {
        let Some(map) = self.maps.get_mut(&number) else { return };
        match result {
            Ok(device) => map.device = Some(device),
            Err(CallError::NotConnected) => map.device = None,
            Err(_) => {}
        }
        self.close_unmapped(cx, number);
    }

    /// OPEN succeeded: makes the bdev, or lets its requests go on.
    fn opened(&mut self, cx: &mut Turn<'_>, number: u64, device: &Device) -> Result<(), String> {
        let disk = match self.maps.get(&number).and_then(|m| m.disk.clone()) {
            Some(disk) => {
                let info = bdev::Bdev::info(&*disk);
                if let Some(misfit) = geometry::misfit(info, &device.geometry, device.max_io_size) {
                    return Err(misfit);
                }
                disk
            }
            None => self.make_disk(cx, number, device)?,
        };
        let Some(map) = self.maps.get_mut(&number) else { return Ok(()) };
        map.state = State::Open;
        map.device = Some(*device);
        map.reason = None;
        map.given_up = false;
        let (name, session) = (map.params.name.clone(), map.params.sessname.clone());
        self.let_go_on(cx.now, number, &disk, device);
        self.resize_to(number, device);
        self.shown(number);
        let blocks = bdev::Bdev::blocks(&*disk);
        tracing::info!(bdev = name, session, id = device.id, blocks, "device open");
        if let Some(map) = self.maps.get_mut(&number) {
            map.waiting.drain(..).for_each(|done| done(Ok(name.clone())));
        }
        Ok(())
    }

    /// The bdev of a device that is open for the first time.
    fn make_disk(
        &mut self,
        cx: &mut Turn<'_>,
        number: u64,
        device: &Device,
    ) -> Result<Arc<RnbdDisk>, String> {
        let g = &device.geometry;
        if let Some(text) = geometry::too_small(g, device.max_io_size) {
            return Err(text);
        }
        let map = self.maps.get(&number).ok_or("it was unmapped")?;
        let p = &map.params;
        let up = self.session(&p.sessname).and_then(|s| s.ready.clone()).ok_or("its session was lost")?;
        let reactors = up.0.reactors.clone();
        let home = reactors.first().and_then(|r| self.reactors.get(*r)).ok_or("no reactor serves it")?;
        // The same after a restart with the same configuration, for which `save_config` writes it.
        let uuid = p.uuid.unwrap_or_else(Uuid::new_v4);
        let info = geometry::info(&p.name, uuid, p.mode, g);
        let disk = RnbdDisk::new(info, number, geometry::blocks(g), p.fast_io_fail, (reactors, home.clone()));
        let disk = Arc::new(disk);
        disk.fence().set_hold(p.session.stale_io);
        self.manager.register(disk.clone()).map_err(|e| e.to_string())?;
        let interval = p.resize_check;
        if let Some(map) = self.maps.get_mut(&number) {
            map.disk = Some(disk.clone());
            map.registered = true;
            map.params.uuid = Some(uuid);
        }
        if let Some(interval) = interval {
            Self::after(cx, interval, move |m, cx| m.check_size(cx, number));
        }
        Ok(disk)
    }

    /// Tells reactors that requests may go, by a new opening.
    fn let_go_on(&mut self, now: Instant, number: u64, disk: &RnbdDisk, device: &Device) {
        self.epoch += 1;
        let limits = geometry::limits(&device.geometry, device.max_io_size);
        let opened = Opened { epoch: self.epoch, session: device.session, id: device.id, limits };
        let name = self.maps.get(&number).map(|m| m.params.sessname.clone());
        let repeat_at = name.and_then(|n| self.session_mut(&n)?.clean_at(now));
        disk.set_gate(Gate::Open(opened));
        self.on_reactors(move |disks| disks.open(number, opened, repeat_at));
    }

    /// A mapping is not open any more, because of `why`: its requests wait.
    pub(super) fn closed(&mut self, now: Instant, number: u64, why: &str) {
        let epoch = self.epoch;
        let Some(map) = self.maps.get_mut(&number).filter(|m| m.state != State::Init) else { return };
        map.device = None;
        if map.state == State::Unmapped {
            // Nothing will let requests go on that its last users wait for.
            self.on_reactors(move |disks| disks.fail(number, Status::Gone));
            return;
        }
        if map.state != State::Open {
            return;
        }
        map.state = State::Closed;
        map.since = now;
        map.reason = Some(why.to_owned());
        tracing::warn!(bdev = map.params.name, why, "device closed");
        if let Some(disk) = &map.disk {
            disk.set_gate(Gate::Held { since: now });
            self.on_reactors(move |disks| disks.close(number, epoch, now));
        }
        self.shown(number);
    }

    /// A reactor found that the server does not know the device of opening `epoch` (any more).
    pub(super) fn unknown(&mut self, cx: &mut Turn<'_>, number: u64, epoch: u64) {
        let current = self.maps.get(&number).filter(|m| m.state == State::Open);
        let gate = current.and_then(|m| m.disk.as_ref()).map(|d| d.gate(0).0);
        if matches!(gate, Some(Gate::Open(o)) if o.epoch == epoch) {
            self.closed(cx.now, number, "the server has closed it");
            self.retry(cx, number);
        }
    }

    /// An attempt to open a mapping failed: who waits is told, and a mapping that nobody wants to keep goes.
    pub(super) fn not_opened(&mut self, cx: &mut Turn<'_>, number: u64, error: &MapError) {
        let Some(map) = self.maps.get_mut(&number).filter(|m| m.state != State::Open) else { return };
        if map.reason.as_deref() != Some(&error.to_string()) {
            tracing::warn!(bdev = map.params.name, why = %error, "device not open");
        }
        map.reason = Some(error.to_string());
        let first = map.state == State::Init && !map.waiting.is_empty();
        if first && map.params.keep_trying {
            let name = map.params.name.clone();
            map.waiting.drain(..).for_each(|done| done(Ok(name.clone())));
            return;
        }
        self.shown(number);
        if !first {
            return self.answer_waiting(number, error);
        }
        let Some(map) = self.maps.remove(&number) else { return };
        map.waiting.into_iter().for_each(|done| done(Err(error.clone())));
        self.close_if_unused(cx, &map.params.sessname);
    }

    /// Opens a mapping once more after a while, unless it has been closed for too long.
    fn retry(&mut self, cx: &mut Turn<'_>, number: u64) {
        let Some(map) = self.maps.get(&number).filter(|m| !m.opening) else { return };
        let Some(session) = self.session(&map.params.sessname) else { return };
        let (delay, loss) = (session.params.reconnect.delay, session.params.ctrlr_loss);
        if loss.is_some_and(|loss| cx.now.duration_since(map.since) >= loss) && map.state == State::Closed {
            let why = map.reason.clone().unwrap_or_default();
            return self.give_up(number, &format!("not open within ctrlr_loss_timeout_sec: {why}"));
        }
        Self::after(cx, delay, move |m, cx| {
            if m.maps.get(&number).is_some_and(|map| !map.given_up) {
                m.open_if_ready(cx, number);
            }
        });
    }

    /// The periodic look at the size of an open device.
    fn check_size(&mut self, cx: &mut Turn<'_>, number: u64) {
        let Some(map) = self.maps.get(&number).filter(|m| m.state != State::Unmapped) else { return };
        let Some(interval) = map.params.resize_check else { return };
        if map.state == State::Open && !map.opening {
            self.send_open(cx, number, move |m, cx, result| m.size_answered(cx, number, result));
        }
        Self::after(cx, interval, move |m, cx| m.check_size(cx, number));
    }

    /// The answer to an OPEN of a device that is open: the same device, or another, if the server had closed it.
    fn size_answered(&mut self, cx: &mut Turn<'_>, number: u64, result: Result<Device, CallError>) {
        let Some(map) = self.maps.get(&number) else { return };
        if map.state == State::Unmapped {
            return self.answered_too_late(cx, number, result);
        }
        match (&result, &map.device) {
            (Ok(new), Some(old))
                if map.state == State::Open && (new.id, new.generation) == (old.id, old.generation) =>
            {
                let disk = map.disk.clone();
                let info = disk.as_ref().map(|d| bdev::Bdev::info(&**d));
                let misfit = info.and_then(|i| geometry::misfit(i, &new.geometry, new.max_io_size));
                match misfit {
                    Some(why) => {
                        self.closed(cx.now, number, &why);
                        self.give_up(number, &why);
                    }
                    None => self.resize_to(number, new),
                }
            }
            (Err(CallError::NotConnected), _) => self.open_if_ready(cx, number),
            (Err(error), _) if map.state == State::Open => {
                let why = error.to_string();
                self.closed(cx.now, number, &why);
                self.retry(cx, number);
            }
            _ => self.open_answered(cx, number, result),
        }
    }

    /// Gives the bdev the size of `device`, or the smaller one that was chosen here.
    fn resize_to(&mut self, number: u64, device: &Device) {
        let Some(map) = self.maps.get_mut(&number) else { return };
        map.device = Some(*device);
        let Some(disk) = &map.disk else { return };
        let (old, server) = (bdev::Bdev::blocks(&**disk), geometry::blocks(&device.geometry));
        let new = map.size.map_or(server, |size| size.min(server));
        if new == old {
            return;
        }
        disk.set_blocks(new);
        let name = map.params.name.clone();
        tracing::info!(bdev = name, old, new, "device resized");
        if let Err(error) = self.manager.resized(&name) {
            tracing::debug!(%error, "resize");
        }
    }

    /// Asks the server for the size of an open device, and makes it `blocks` if that is less; `None`: all of it.
    /// `done` gets the size in blocks.
    pub fn resize(&mut self, cx: &mut Turn<'_>, name: &str, blocks: Option<u64>, done: Done<u64>) {
        let number = self.number(name);
        let Some((number, map)) = number.and_then(|n| Some((n, self.maps.get(&n)?))) else {
            return done(Err(MapError::NoDevice(name.into())));
        };
        let name = name.to_owned();
        if map.state != State::Open {
            // As the kernel's client.
            let state = map.state.name();
            return done(Err(MapError::State { name, state, errno: ENOENT }));
        }
        if map.opening {
            // The periodic look is under way: after it.
            return Self::after(cx, AGAIN, move |m, cx| m.resize(cx, &name, blocks, done));
        }
        self.send_open(cx, number, move |m, cx, result| {
            let checked = m.check_choice(number, blocks, &result);
            if let (Ok(_), Some(map)) = (&checked, m.maps.get_mut(&number)) {
                map.size = blocks;
            }
            m.size_answered(cx, number, result);
            let size = || {
                let map = m.maps.get(&number).filter(|m| m.state == State::Open);
                let disk = map.and_then(|m| m.disk.as_ref());
                disk.map(|d| bdev::Bdev::blocks(&**d)).ok_or(MapError::NoDevice(name))
            };
            done(checked.and_then(|()| size()));
        });
    }

    fn check_choice(
        &self,
        number: u64,
        blocks: Option<u64>,
        result: &Result<Device, CallError>,
    ) -> Result<(), MapError> {
        let device_path = self.maps.get(&number).map_or_else(String::new, |m| m.params.device_path.clone());
        let device = result.as_ref().map_err(|error| MapError::Open { device_path, error: *error })?;
        let server = geometry::blocks(&device.geometry);
        match blocks {
            Some(n) if n == 0 || n > server => Err(MapError::Invalid {
                parameter: "num_blocks",
                text: format!("{n} blocks: use 1 to {server}, the size at the server"),
            }),
            _ => Ok(()),
        }
    }
}
