//! How devices end.

use std::sync::{Mutex, PoisonError};

use super::*;

/// How long the connections may take to be closed when the program ends.
const CLOSE_TIME: Duration = Duration::from_secs(2);

impl Drives {
    /// Unregisters the bdev and closes the connections. Answers when nothing is left. A bdev in use is refused, unless
    /// `force` is set: its users are told, and requests that wait end.
    pub fn delete(&mut self, cx: &mut Turn<'_>, name: &str, force: bool, done: Done<()>) {
        let Some(number) = self.number(name) else { return done(Err(NbdError::NoDevice(name.into()))) };
        let Some(drive) = self.drives.get_mut(&number) else { return };
        if drive.state == State::Deleted {
            let state = drive.state.name();
            return done(Err(NbdError::Already { name: name.into(), state }));
        }
        let users = self.manager.status(name).map_or(0, |s| s.opens);
        if users > 0 && !force && drive.registered {
            return done(Err(NbdError::InUse { name: name.into(), users }));
        }
        let was_open = drive.state == State::Open;
        drive.state = State::Deleted;
        drive.leaving.push(done);
        let (registered, disk) = (drive.registered, drive.disk.take());
        let text = "it is being deleted".to_owned();
        self.answer_waiting(number, &NbdError::Ended { name: name.into(), text });
        self.dialer.borrow_mut().cancel(cx, number);
        if !registered {
            return self.gone(cx, number);
        }
        if !was_open {
            // Nothing will let them go on.
            if let Some(disk) = disk {
                disk.set_gate(Gate::Failed(GONE));
            }
            self.on_lanes(move |lane, cx| lane.fail(cx, number, GONE));
        }
        let control = self.control.clone();
        let gone = Box::new(move || Self::send(&control, move |d, cx| d.gone(cx, number)));
        if let Err(error) = self.manager.unregister(name, gone) {
            tracing::error!(%error, "delete");
            self.gone(cx, number);
        }
    }

    /// The bdev is gone: closes the connections, then forgets the device.
    fn gone(&mut self, cx: &mut Turn<'_>, number: u64) {
        if let Some(drive) = self.drives.get_mut(&number) {
            drive.registered = false;
        }
        self.close_all(cx, vec![number], move |d, _| {
            let Some(drive) = d.drives.remove(&number) else { return };
            tracing::info!(bdev = drive.params.name, "NBD device deleted");
            drive.leaving.into_iter().for_each(|done| done(Ok(())));
        });
    }

    /// Closes the connections of devices on all reactors, then runs `then`.
    fn close_all(
        &mut self,
        _: &mut Turn<'_>,
        numbers: Vec<u64>,
        then: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static,
    ) {
        // The last reactor to be done drops the last reference, and with it sends the rest.
        let then: Then = Box::new(then);
        let last = Arc::new(Last { control: self.control.clone(), then: Mutex::new(Some(then)) });
        self.on_lanes(move |lane, cx| {
            numbers.iter().for_each(|n| lane.close(cx, *n));
            let _ = &last;
        });
    }

    /// Ends everything in order: closes the connections, then runs `done`.
    pub fn shutdown(&mut self, cx: &mut Turn<'_>, done: impl FnOnce(&mut Turn<'_>) + 'static) {
        self.ending = true;
        let numbers: Vec<u64> = self.drives.keys().copied().collect();
        for number in &numbers {
            self.dialer.borrow_mut().cancel(cx, *number);
            if let Some(drive) = self.drives.get_mut(number) {
                drive.conns.iter_mut().for_each(|c| c.up = None);
            }
        }
        // What runs on this thread need not be sendable.
        cx.set_local(Rc::new(Ending(RefCell::new(Some(Box::new(done))))));
        self.close_all(cx, numbers, |_, cx| Ending::over(cx));
        cx.after(CLOSE_TIME, Ending::over);
    }
}

/// What is to be done at the end of everything; whoever comes later finds it done.
struct Ending(RefCell<Option<Finally>>);

type Finally = Box<dyn FnOnce(&mut Turn<'_>)>;

impl Ending {
    fn over(cx: &mut Turn<'_>) {
        let done = cx.local::<Self>().and_then(|e| e.0.borrow_mut().take());
        if let Some(done) = done {
            done(cx);
        }
    }
}

type Then = Box<dyn FnOnce(&mut Drives, &mut Turn<'_>) + Send>;

/// Sends something to the control thread when the last reference is dropped.
struct Last {
    control: Handle,
    then: Mutex<Option<Then>>,
}

impl Drop for Last {
    fn drop(&mut self) {
        if let Some(then) = self.then.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            Drives::send(&self.control, then);
        }
    }
}
