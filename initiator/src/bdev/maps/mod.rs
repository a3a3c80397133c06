//! Mapped devices and their sessions, on the control thread.
//!
//! | state | the bdev | I/O |
//! |---|---|---|
//! | init | none yet | |
//! | open | registered | goes to the server |
//! | closed | registered | waits, or fails once `fast_io_fail` or `ctrlr_loss` has passed |
//! | unmapped | unregistered | ends; the mapping goes with its last user |
//!
//! A session lives from its first mapping to its last. It comes up ([`Event::Ready`]), and each of its mappings is
//! opened, by one OPEN message; it is lost, and they are closed; and so on. An OPEN that fails while the session is up
//! is repeated after `reconnect_delay`, as a lost session would be: the server's export may come back, or the writer
//! go away that is in the way.

mod events;
mod open;
mod paths;
mod report;
mod session;
mod unmap;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Manager, Status};
use reactor::{Handle, Turn};
use rnbd_proto::Errno;
use rtrs_poll::Provider;
use rtrs_poll::client::SessionId;
use verbs::Cm;

use super::disk::RnbdDisk;
use super::disks::{Disks, Gate};
use super::error::{EALREADY, EBUSY, ENODEV, MapError};
use super::lane::DiskLane;
use super::params::MapParams;
use crate::client::{Device, Event, Initiator, RnbdLane};

pub use paths::SessionChanges;
pub(super) use paths::name_of as path_name;
pub use report::{DeviceInfo, SessionReport, access_mode};
use session::Session;

/// Gets the outcome of a call, on the control thread. It must not call [`Maps`].
pub type Done<T> = Box<dyn FnOnce(Result<T, MapError>)>;

/// A mapping's life, in the kernel's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not opened yet.
    Init,
    /// In use, or to be used.
    Open,
    /// The session is lost, or the server has closed it.
    Closed,
    /// On its way out.
    Unmapped,
}

impl State {
    /// As `/sys/block/rnbdN/rnbd/state` has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Unmapped => "unmapped",
        }
    }
}

/// One mapped device.
struct Map {
    params: MapParams,
    state: State,
    /// As the server has it; while open.
    device: Option<Device>,
    /// From the first opening on.
    disk: Option<Arc<RnbdDisk>>,
    /// The bdev is in the table, or has users left.
    registered: bool,
    /// Why it is not open.
    reason: Option<String>,
    /// Since when it has not been open.
    since: Instant,
    /// An OPEN is on its way, or waits to be repeated.
    opening: bool,
    /// Nothing is tried any more until it is mapped anew.
    given_up: bool,
    /// A size that was chosen here, in blocks; the server's if it is smaller.
    size: Option<u64>,
    /// Who waits for it to be opened, or to fail: of bdev_rnbd_map and bdev_rnbd_remap.
    waiting: Vec<Done<String>>,
    /// Who waits for it to go.
    leaving: Vec<Done<()>>,
}

/// All of bdev_rnbd on the control thread.
pub struct Maps {
    manager: Arc<Manager>,
    control: Handle,
    reactors: Vec<Handle>,
    initiator: Rc<RefCell<Initiator<DiskLane>>>,
    /// By number, in the order in which they were mapped.
    maps: BTreeMap<u64, Map>,
    sessions: Vec<Session>,
    next_number: u64,
    /// Of the latest opening.
    epoch: u64,
    ending: Ending,
}

/// How far [`Maps::shutdown`] is.
enum Ending {
    No,
    /// Devices are being closed; then this.
    Closing(Box<dyn FnOnce(&mut Turn<'_>)>),
    /// Sessions are being closed, or are.
    Over,
}

/// How messages find it on the control thread.
struct MapsCell(Rc<RefCell<Maps>>);

impl Maps {
    /// Sets bdev_rnbd up on the control thread `cx`, for bdevs of `manager` that `reactors` use. `cms`: connection
    /// managers besides those that sessions open by themselves.
    ///
    /// # Errors
    /// A connection manager cannot be watched.
    pub fn install(
        cx: &mut Turn<'_>,
        manager: Arc<Manager>,
        reactors: &[Handle],
        cms: Vec<Box<dyn Cm>>,
    ) -> std::io::Result<Rc<RefCell<Self>>> {
        let control = cx.handle().clone();
        let unknown = {
            let control = control.clone();
            Arc::new(move |disk, epoch| Self::send(&control, move |m, cx| m.unknown(cx, disk, epoch)))
        };
        let names: Vec<String> = reactors.iter().map(|r| r.name().to_owned()).collect();
        let registry = manager.registry().clone();
        let lane_registry = registry.clone();
        let initiator = Initiator::install(
            cx,
            reactors,
            registry,
            move |cx| {
                let index = names.iter().position(|n| n == cx.handle().name()).unwrap_or(usize::MAX);
                DiskLane::new(index, lane_registry.clone(), unknown.clone())
            },
            |cx, event| Self::here(cx, |m, cx| m.event(cx, event)),
        );
        for cm in cms {
            initiator.borrow().client().borrow_mut().add_cm(cx, cm)?;
        }
        let maps = Rc::new(RefCell::new(Self {
            manager,
            control,
            reactors: reactors.to_vec(),
            initiator,
            maps: BTreeMap::new(),
            sessions: Vec::new(),
            next_number: 0,
            epoch: 0,
            ending: Ending::No,
        }));
        cx.set_local(Rc::new(MapsCell(maps.clone())));
        Ok(maps)
    }

    /// Runs `f` on that of this thread.
    fn here(cx: &mut Turn<'_>, f: impl FnOnce(&mut Self, &mut Turn<'_>)) {
        if let Some(cell) = cx.local::<MapsCell>() {
            f(&mut cell.0.borrow_mut(), cx);
        }
    }

    /// Runs `f` on that of `control`, soon.
    pub fn send(control: &Handle, f: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static) {
        control.send(move |cx| Self::here(cx, f));
    }

    /// Runs `f` here after `delay`.
    fn after(cx: &mut Turn<'_>, delay: Duration, f: impl FnOnce(&mut Self, &mut Turn<'_>) + 'static) {
        cx.after(delay, move |cx| Self::here(cx, f));
    }

    /// Runs `f` on the devices of every reactor.
    fn on_reactors(&self, f: impl Fn(&mut Disks) + Clone + Send + 'static) {
        for reactor in &self.reactors {
            let f = f.clone();
            RnbdLane::<DiskLane>::with(reactor, move |_, lane, _| f(&mut lane.here.disks()));
        }
    }

    /// Maps a device: connects the session if need be, opens the device and registers the bdev, then answers with its
    /// name, or says what prevented it and leaves nothing behind. With `keep_trying` it answers with the name at the
    /// first failure, too, and goes on.
    pub fn map(&mut self, cx: &mut Turn<'_>, params: MapParams, done: Done<String>) {
        if let Err(e) = self.may_map(&params) {
            return done(Err(e));
        }
        if let Err(e) = self.session_for(cx, &params) {
            return done(Err(e));
        }
        let (number, timeout) = (self.next_number, params.session.connect_timeout);
        self.next_number += 1;
        let session = params.sessname.clone();
        let map = Map {
            params,
            state: State::Init,
            device: None,
            disk: None,
            registered: false,
            reason: None,
            since: cx.now,
            opening: false,
            given_up: false,
            size: None,
            waiting: vec![done],
            leaving: Vec::new(),
        };
        self.maps.insert(number, map);
        self.open_if_ready(cx, number);
        // Beyond the timeouts of its steps, so that those can tell which step it was.
        Self::after(cx, 2 * timeout + Duration::from_secs(1), move |m, cx| {
            let text = "no answer in time".to_owned();
            let late = MapError::Connect { session, text, errno: Errno::ETIMEDOUT };
            let waits = |map: &Map| map.state == State::Init && !map.waiting.is_empty();
            if m.maps.get(&number).is_some_and(waits) {
                m.not_opened(cx, number, &late);
            }
        });
    }

    /// What can be refused before anything is done.
    fn may_map(&self, p: &MapParams) -> Result<(), MapError> {
        p.check()?;
        if !matches!(self.ending, Ending::No) {
            return Err(MapError::Ended {
                session: p.sessname.clone(),
                text: "the program is ending".into(),
            });
        }
        if self.maps.values().any(|m| m.params.name == p.name) || self.manager.get(&p.name).is_ok() {
            return Err(MapError::NameExists(p.name.clone()));
        }
        let same = |m: &&Map| m.params.sessname == p.sessname && m.params.device_path == p.device_path;
        if let Some(map) = self.maps.values().find(same) {
            return Err(MapError::Mapped {
                device_path: p.device_path.clone(),
                session: p.sessname.clone(),
                name: map.params.name.clone(),
            });
        }
        Ok(())
    }

    /// Tries again to open a closed device, or one that never opened because its session was given up; answers when
    /// it is open, or with what prevented it.
    pub fn remap(&mut self, cx: &mut Turn<'_>, name: &str, done: Done<String>) {
        let state = |state: State, errno| MapError::State { name: name.into(), state: state.name(), errno };
        let Some(number) = self.number(name) else { return done(Err(MapError::NoDevice(name.into()))) };
        let Some(map) = self.maps.get_mut(&number) else { return };
        match map.state {
            State::Open => return done(Err(state(State::Open, EALREADY))),
            State::Unmapped => return done(Err(state(State::Unmapped, ENODEV))),
            State::Init if !map.given_up => return done(Err(state(State::Init, EBUSY))),
            State::Init | State::Closed => {}
        }
        let (session, revived) = (map.params.sessname.clone(), std::mem::take(&mut map.given_up));
        map.since = cx.now;
        map.waiting.push(done);
        if revived {
            self.revive(cx, number);
        }
        if let Err(e) = self.session_again(cx, &session) {
            return self.answer_waiting(number, &e);
        }
        self.open_if_ready(cx, number);
    }

    /// A disk that failed everything lets requests wait again.
    fn revive(&mut self, cx: &Turn<'_>, number: u64) {
        let Some(disk) = self.maps.get(&number).and_then(|m| m.disk.clone()) else { return };
        let now = cx.now;
        disk.set_gate(Gate::Held { since: now });
        self.on_reactors(move |disks| disks.revive(number, now));
    }

    /// Requests of a mapping end from now on; it stays as it is until it is remapped or unmapped.
    fn give_up(&mut self, number: u64, why: &str) {
        let Some(map) = self.maps.get_mut(&number).filter(|m| !m.given_up) else { return };
        map.given_up = true;
        map.reason = Some(why.to_owned());
        if matches!(self.ending, Ending::No) {
            tracing::error!(bdev = map.params.name, why, "device given up");
        }
        if let Some(disk) = &map.disk {
            disk.set_gate(Gate::Failed(Status::Gone));
            self.on_reactors(move |disks| disks.fail(number, Status::Gone));
        }
        self.shown(number);
        let map = self.maps.get_mut(&number);
        let session = map.map_or_else(String::new, |m| m.params.sessname.clone());
        self.answer_waiting(number, &MapError::Ended { session, text: why.to_owned() });
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.maps.iter().find(|(_, m)| m.params.name == name).map(|(n, _)| *n)
    }

    /// Mappings of a session.
    fn of_session(&self, session: &str) -> Vec<u64> {
        let of_it = |(_, m): &(&u64, &Map)| m.params.sessname == session;
        self.maps.iter().filter(of_it).map(|(n, _)| *n).collect()
    }

    /// Tells those who wait for a mapping that it cannot be opened now.
    fn answer_waiting(&mut self, number: u64, error: &MapError) {
        if let Some(map) = self.maps.get_mut(&number) {
            map.waiting.drain(..).for_each(|done| done(Err(error.clone())));
        }
    }

    fn session(&self, name: &str) -> Option<&Session> {
        self.sessions.iter().find(|s| s.name == name)
    }

    fn session_mut(&mut self, name: &str) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|s| s.name == name)
    }

    fn session_by_id(&mut self, id: SessionId) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|s| s.id == Some(id))
    }

    /// Opens a provider's connection manager if there is none yet. An error only where no other could serve.
    fn open_providers(&self, cx: &mut Turn<'_>, wanted: &[String]) -> Result<(), MapError> {
        let initiator = self.initiator.borrow();
        let mut client = initiator.client().borrow_mut();
        let mut failures = Vec::new();
        for name in wanted {
            if client.providers().contains(&name.as_str()) {
                continue;
            }
            let provider = [Provider::RdmaCore, Provider::SoftRoce].into_iter().find(|p| p.name() == name);
            let opened = match provider {
                None => Err("there is no such provider: use auto, rdma-core or soft-roce".to_owned()),
                Some(p) => p.open().map_err(|e| e.to_string()),
            };
            let added = opened.and_then(|cm| client.add_cm(cx, cm).map_err(|e| e.to_string()));
            if let Err(text) = added {
                failures.push(MapError::Provider { name: name.clone(), text });
            }
        }
        let any = wanted.iter().any(|name| client.providers().contains(&name.as_str()));
        match failures.into_iter().next_back() {
            Some(e) if !any => Err(e),
            _ => Ok(()),
        }
    }

    /// Ends everything in order: closes what is open, then the sessions, then runs `done`.
    pub fn shutdown(&mut self, cx: &mut Turn<'_>, done: impl FnOnce(&mut Turn<'_>) + 'static) {
        self.ending = Ending::Closing(Box::new(done));
        let open: Vec<Device> = self.maps.values().filter_map(|m| m.device).collect();
        let left = Rc::new(std::cell::Cell::new(open.len() + 1));
        let one_less = move |cx: &mut Turn<'_>| {
            left.set(left.get().saturating_sub(1));
            if left.get() == 0 {
                Self::here(cx, Self::end_sessions);
            }
        };
        for device in open {
            let one_less = one_less.clone();
            self.initiator.borrow_mut().close(&device, move |cx, _| one_less(cx));
        }
        cx.after(Duration::ZERO, one_less);
        Self::after(cx, CLOSE_TIME, Self::end_sessions);
    }

    /// The last step of [`Maps::shutdown`]; whoever comes later finds it done.
    fn end_sessions(&mut self, cx: &mut Turn<'_>) {
        if let Ending::Closing(done) = std::mem::replace(&mut self.ending, Ending::Over) {
            let client = self.initiator.borrow().client().clone();
            client.borrow_mut().shutdown(cx, done);
        }
    }
}

/// How long a server may take to answer CLOSE when the program ends.
const CLOSE_TIME: Duration = Duration::from_secs(2);
