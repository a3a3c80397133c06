//! How mappings end.

use reactor::Turn;

use bdev::Status;

use super::{Done, Maps, State};
use crate::bdev::disks::Gate;
use crate::bdev::error::{EALREADY, MapError};

impl Maps {
    /// Unregisters the bdev and closes the device; with the last one of a session, ends that. Answers when nothing is
    /// left. A bdev in use is refused, unless `force` is set: its users are told, and requests that wait end.
    pub fn unmap(&mut self, cx: &mut Turn<'_>, name: &str, force: bool, done: Done<()>) {
        let Some(number) = self.number(name) else { return done(Err(MapError::NoDevice(name.into()))) };
        let Some(map) = self.maps.get_mut(&number) else { return };
        if map.state == State::Unmapped {
            let state = map.state.name();
            return done(Err(MapError::State { name: name.into(), state, errno: EALREADY }));
        }
        let users = self.manager.status(name).map_or(0, |s| s.opens);
        if users > 0 && !force && map.disk.is_some() {
            return done(Err(MapError::InUse { name: name.into(), users }));
        }
        let was_open = map.state == State::Open;
        map.state = State::Unmapped;
        map.leaving.push(done);
        let text = "it is being unmapped".to_owned();
        let session = map.params.sessname.clone();
        self.answer_waiting(number, &MapError::Ended { session, text });
        let Some(disk) = self.maps.get(&number).and_then(|m| m.disk.clone()) else {
            return self.unregistered(cx, number);
        };
        if !was_open {
            // Nothing will let them go on.
            disk.set_gate(Gate::Failed(Status::Gone));
            self.on_reactors(move |disks| disks.fail(number, Status::Gone));
        }
        drop(disk);
        if let Some(map) = self.maps.get_mut(&number) {
            // The bdev must go with its last user.
            map.disk = None;
        }
        let control = self.control.clone();
        let gone = Box::new(move || Self::send(&control, move |m, cx| m.unregistered(cx, number)));
        if let Err(error) = self.manager.unregister(name, gone) {
            tracing::error!(%error, "unmap");
            self.unregistered(cx, number);
        }
    }

    /// The bdev is gone: close the device at its server.
    fn unregistered(&mut self, cx: &mut Turn<'_>, number: u64) {
        if let Some(map) = self.maps.get_mut(&number) {
            map.registered = false;
        }
        self.close_unmapped(cx, number);
    }

    /// Once the bdev is gone and no OPEN is on its way: closes the device, if it is open, then forgets the mapping.
    pub(super) fn close_unmapped(&mut self, cx: &mut Turn<'_>, number: u64) {
        let Some(map) = self.maps.get_mut(&number) else { return };
        if map.registered || map.opening {
            return;
        }
        match map.device.take() {
            Some(device) => self.initiator.borrow_mut().close(&device, move |cx, result| {
                // Whatever it says: with the session's end the server closes it anyway.
                if let Err(error) = result {
                    tracing::debug!(%error, "CLOSE");
                }
                Self::here(cx, |m, cx| m.forget(cx, number));
            }),
            None => self.forget(cx, number),
        }
    }

    fn forget(&mut self, cx: &mut Turn<'_>, number: u64) {
        let Some(mut map) = self.maps.remove(&number) else { return };
        let session = map.params.sessname.clone();
        tracing::info!(bdev = map.params.name, session, "device unmapped");
        self.close_if_unused(cx, &session);
        let leaving = std::mem::take(&mut map.leaving);
        match self.session_mut(&session).filter(|s| s.ending) {
            Some(s) => s.leaving.extend(leaving),
            None => leaving.into_iter().for_each(|done| done(Ok(()))),
        }
    }
}
