//! The devices, on the control thread.
//!
//! | state | the bdev | I/O |
//! |---|---|---|
//! | init | none yet | |
//! | open | registered | goes to the server, by as many connections as are up |
//! | closed | registered | waits, or fails once `fast_io_fail` or `ctrlr_loss` has passed |
//! | deleted | unregistered | ends; the device goes with its last user |
//!
//! The first connection to be up makes the bdev; if the server allows several, the others follow. Each that is lost is
//! tried again by itself, at once and then every `reconnect_delay`.

mod connect;
mod delete;
mod report;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Bdev, Manager};
use engine::placement::{Place, Placement};
use nbd_poll::client::{Address, DialOptions, Dialled, Original, Secure};
use nbd_poll::tls::ServerName;
use nbd_proto::client::{Agreed, Server, Tls};
use reactor::{Handle, Turn};

use super::dialer::{Dialer, Who};
use super::error::NbdError;
use super::geometry;
use super::lane::{LinkEnded, NbdDisk, NbdLane};
use super::link::GONE;
use super::params::{Dialect, NbdParams};
use crate::bdev::disks::Gate;

pub use report::DriveInfo;

/// Gets the outcome of a call, on the control thread. It must not call [`Drives`].
pub type Done<T> = Box<dyn FnOnce(Result<T, NbdError>)>;

/// A device's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Init,
    Open,
    Closed,
    Deleted,
}

impl State {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Deleted => "deleted",
        }
    }
}

/// One of a device's connections.
struct Conn {
    /// Its place on a reactor, from the first time on that it is up.
    reactor: usize,
    up: Option<Up>,
    /// An attempt is under way, or waits for its time.
    trying: bool,
    /// An attempt is under way.
    dialling: bool,
    /// Failures since it was last up.
    failures: u32,
    reconnects: u64,
}

impl Conn {
    fn new(reactor: usize) -> Self {
        Self { reactor, up: None, trying: false, dialling: false, failures: 0, reconnects: 0 }
    }
}

/// A connection that is up.
#[derive(Clone, Debug)]
struct Up {
    address: Address,
    cipher: Option<String>,
    since: Instant,
}

/// One device.
struct Drive {
    params: NbdParams,
    state: State,
    options: DialOptions,
    conns: Vec<Conn>,
    /// As the server described it last.
    agreed: Option<Agreed>,
    /// From the first opening on.
    disk: Option<Arc<NbdDisk>>,
    /// The bdev is in the table, or has users left.
    registered: bool,
    /// Where its first connection is.
    place: Place,
    /// Why it is not open, or not completely.
    reason: Option<String>,
    /// Since when it has not been open.
    since: Instant,
    given_up: bool,
    /// Who waits for it to be open, or to fail.
    waiting: Vec<Done<String>>,
    /// Who waits for it to go.
    leaving: Vec<Done<()>>,
}

/// All devices. One per program, on the control thread.
pub struct Drives {
    manager: Arc<Manager>,
    control: Handle,
    reactors: Vec<Handle>,
    placement: Placement,
    dialer: Rc<RefCell<Dialer>>,
    /// By number.
    drives: BTreeMap<u64, Drive>,
    next_number: u64,
    ending: bool,
}

/// How messages find them.
struct DrivesCell(Rc<RefCell<Drives>>);

impl Drives {
    /// Sets up lanes on `reactors`, and what this thread needs.
    pub fn install(
        cx: &mut Turn<'_>,
        manager: Arc<Manager>,
        reactors: &[Handle],
        placement: Placement,
    ) -> Rc<RefCell<Self>> {
        let control = cx.handle().clone();
        for (index, reactor) in reactors.iter().enumerate() {
            let (registry, control) = (manager.registry().clone(), control.clone());
            let tell =
                Arc::new(move |ended: LinkEnded| Self::send(&control, |d, cx| d.link_ended(cx, ended)));
            reactor.send(move |cx| NbdLane::install(cx, index, registry, tell));
        }
        let dialer =
            Dialer::install(cx, |cx, who, result| Self::here(cx, |d, cx| d.dialled(cx, who, result)));
        let drives = Rc::new(RefCell::new(Self {
            manager,
            control,
            reactors: reactors.to_vec(),
            placement,
            dialer,
            drives: BTreeMap::new(),
            next_number: 0,
            ending: false,
        }));
        cx.set_local(Rc::new(DrivesCell(drives.clone())));
        drives
    }

    /// Runs `f` on those of this thread.
    fn here(cx: &mut Turn<'_>, f: impl FnOnce(&mut Self, &mut Turn<'_>)) {
        if let Some(cell) = cx.local::<DrivesCell>() {
            f(&mut cell.0.borrow_mut(), cx);
        }
    }

    /// Runs `f` on those of `control`, soon.
    pub fn send(control: &Handle, f: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static) {
        control.send(move |cx| Self::here(cx, f));
    }

    /// Runs `f` here after `delay`.
    fn after(cx: &mut Turn<'_>, delay: Duration, f: impl FnOnce(&mut Self, &mut Turn<'_>) + 'static) {
        cx.after(delay, move |cx| Self::here(cx, f));
    }

    /// Makes a device: connects, and registers the bdev, then answers with its name, or says what prevented it and
    /// leaves nothing behind. With `keep_trying` it answers with the name at the first failure, too, and goes on.
    pub fn create(&mut self, cx: &mut Turn<'_>, params: NbdParams, done: Done<String>) {
        let options = match self.may_create(&params).and_then(|()| dial_options(&params)) {
            Ok(options) => options,
            Err(e) => return done(Err(e)),
        };
        let number = self.next_number;
        self.next_number += 1;
        let place = self.placement.take();
        let first = Conn::new(place.index());
        let drive = Drive {
            params,
            state: State::Init,
            options,
            conns: vec![first],
            agreed: None,
            disk: None,
            registered: false,
            place,
            reason: None,
            since: cx.now,
            given_up: false,
            waiting: vec![done],
            leaving: Vec::new(),
        };
        self.drives.insert(number, drive);
        self.connect(cx, (number, 0));
    }

    /// What can be refused before anything is done.
    fn may_create(&self, p: &NbdParams) -> Result<(), NbdError> {
        p.check()?;
        if self.ending {
            return Err(NbdError::Ended { name: p.name.clone(), text: "the program is ending".into() });
        }
        if self.number(&p.name).is_some() || self.manager.get(&p.name).is_ok() {
            return Err(NbdError::NameExists(p.name.clone()));
        }
        Ok(())
    }

    /// Tries again to connect a device that was given up, or is closed; answers when it is open, or with what prevented
    /// it.
    pub fn reconnect(&mut self, cx: &mut Turn<'_>, name: &str, done: Done<String>) {
        let Some(number) = self.number(name) else { return done(Err(NbdError::NoDevice(name.into()))) };
        let Some(drive) = self.drives.get_mut(&number) else { return };
        if matches!(drive.state, State::Open | State::Deleted) {
            let state = drive.state.name();
            return done(Err(NbdError::Already { name: name.into(), state }));
        }
        drive.waiting.push(done);
        drive.since = cx.now;
        if std::mem::take(&mut drive.given_up)
            && let Some(disk) = drive.disk.clone()
        {
            let now = cx.now;
            disk.set_gate(Gate::Held { since: now });
            self.on_lanes(move |lane, _| lane.revive(number, now));
        }
        let tries: Vec<u32> = self.idle(number);
        for index in tries {
            self.connect(cx, (number, index));
        }
    }

    /// Connections of a device that are neither up nor under way.
    fn idle(&self, number: u64) -> Vec<u32> {
        let Some(drive) = self.drives.get(&number) else { return Vec::new() };
        let idle = |(_, c): &(u32, &Conn)| c.up.is_none() && !c.trying;
        (0u32..).zip(&drive.conns).filter(idle).map(|(i, _)| i).collect()
    }

    /// Requests of a device end from now on; it stays as it is until it is reconnected or deleted.
    fn give_up(&mut self, cx: &mut Turn<'_>, number: u64, why: &str) {
        let Some(drive) = self.drives.get_mut(&number).filter(|d| !d.given_up) else { return };
        drive.given_up = true;
        drive.reason = Some(why.to_owned());
        drive.state = if drive.disk.is_some() { State::Closed } else { State::Init };
        drive.conns.iter_mut().for_each(|c| (c.up, c.trying, c.dialling) = (None, false, false));
        let name = drive.params.name.clone();
        tracing::error!(bdev = name, why, "device given up");
        if let Some(disk) = &drive.disk {
            disk.set_gate(Gate::Failed(GONE));
        }
        self.dialer.borrow_mut().cancel(cx, number);
        self.on_lanes(move |lane, cx| lane.fail(cx, number, GONE));
        self.shown(number);
        self.answer_waiting(number, &NbdError::Ended { name, text: why.to_owned() });
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.drives.iter().find(|(_, d)| d.params.name == name).map(|(n, _)| *n)
    }

    /// Runs `f` on the lane of every reactor.
    fn on_lanes(&self, f: impl Fn(&mut NbdLane, &mut Turn<'_>) + Clone + Send + 'static) {
        for reactor in &self.reactors {
            let f = f.clone();
            NbdLane::send(reactor, move |lane, cx| f(lane, cx));
        }
    }

    /// Tells those who wait for a device that it cannot be connected now.
    fn answer_waiting(&mut self, number: u64, error: &NbdError) {
        if let Some(drive) = self.drives.get_mut(&number) {
            drive.waiting.drain(..).for_each(|done| done(Err(error.clone())));
        }
    }
}

/// How to connect.
fn dial_options(p: &NbdParams) -> Result<DialOptions, NbdError> {
    let secure = if p.tls.mode == Tls::Off { None } else { Some(secure(p)?) };
    let original = (p.dialect == Dialect::Original)
        .then(|| Original { size: p.size.unwrap_or(0), reply_magic: p.reply_magic });
    Ok(DialOptions {
        wishes: p.dialect.wishes(&p.export, p.tls.mode),
        secure,
        original,
        timeout: p.timeouts.connect,
    })
}

fn secure(p: &NbdParams) -> Result<Secure, NbdError> {
    let config = nbd_poll::tls::files::client_config(p.tls.certificates.as_deref(), !p.tls.any_server);
    let config = config.map_err(|e| NbdError::Tls(e.to_string()))?;
    let host = match (&p.tls.hostname, &p.server) {
        (Some(name), _) => name.clone(),
        (None, Server::Tcp { host, .. }) => host.clone(),
        // A certificate for this host, if anything.
        (None, Server::Unix(_)) => "localhost".into(),
    };
    let wrong = || NbdError::Tls(format!("'{host}' cannot be the name of a certificate; use tls_hostname"));
    let name = ServerName::try_from(host.clone()).map_err(|_| wrong())?;
    Ok(Secure { config, name })
}
