//! The connections of one reactor, and the requests on them.

use std::cell::RefCell;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bdev::{Op, Status};
use iobuf::Registry;
use nbd_poll::client::{Connection, Dialled, Done, Remains};
use nbd_proto::client::{Ask, Command, Unsendable};
use reactor::{Handle, Polled, Poller, Turn};
use rnbd_proto::Errno;

use super::link::{NbdLink, errno};
use crate::bdev::channel::Here;
use crate::bdev::disk::RemoteDisk;
use crate::bdev::disks::Gate;
use crate::bdev::request::{Limits, Message, Opened, Unsent, Wire};

/// So long after a connection was lost whose server did not let go of it, the server may still be working for it: it reads
/// what its socket holds at once, and hands it to its device, which needs a moment.
pub(super) const STALE: Duration = Duration::from_secs(10);
/// Turns between two looks at connections with nothing in flight.
const LOOK_EVERY: u32 = 64;
/// Bytes of a sector, as a shift: the unit of [`Message::sector`].
const SECTOR_SHIFT: u32 = 9;

/// The bdev.
pub(super) type NbdDisk = RemoteDisk<NbdLink>;

/// A connection that is to serve a device here.
pub(super) struct NewLink {
    /// Among those of the device.
    pub index: u32,
    pub dialled: Dialled,
    pub limits: Limits,
    /// Every change says that it is to be stable.
    pub always_fua: bool,
    /// Silence for so long ends it.
    pub io_timeout: Option<Duration>,
}

/// A connection has ended.
pub(super) struct LinkEnded {
    /// Of the device.
    pub number: u64,
    /// Among its connections.
    pub index: u32,
    pub why: String,
}

/// How the control thread hears of it.
pub(super) type Tell = Arc<dyn Fn(LinkEnded) + Send + Sync>;

struct OneLink {
    index: u32,
    connection: Connection,
    fd: RawFd,
    /// The server is about to end: nothing more is asked of it.
    draining: bool,
    /// Requests were taken back that the server may still execute.
    abandoned: bool,
    io_timeout: Option<Duration>,
}

impl OneLink {
    fn is_usable(&self) -> bool {
        !self.draining && self.connection.end().is_none()
    }
}

/// What is left of a connection whose server may still be working for it.
struct Old {
    remains: Remains,
    fd: RawFd,
    since: Instant,
}

/// A device on this reactor.
struct Drive {
    number: u64,
    disk: Arc<NbdDisk>,
    links: Vec<OneLink>,
    old: Vec<Old>,
    limits: Limits,
    always_fua: bool,
    /// Since when there has been no connection; `None` while there is one.
    held_since: Option<Instant>,
}

/// Moves with each change of connections of any device, so that what belongs to an earlier one is known.
static EPOCH: AtomicU64 = AtomicU64::new(0);

/// One per reactor.
pub(super) struct NbdLane {
    here: Rc<Here<NbdLink>>,
    drives: Vec<Drive>,
    tell: Tell,
    turns: u32,
    done: Vec<Done>,
}

/// How messages find the lane of a reactor.
struct LaneCell(Rc<RefCell<NbdLane>>);

struct LanePoller(Rc<RefCell<NbdLane>>);

impl NbdLane {
    /// Sets up the lane of the reactor of `cx`, which has the place `index` in the list.
    pub fn install(cx: &mut Turn<'_>, index: usize, registry: Arc<Registry>, tell: Tell) {
        let here = Here::install(index, registry);
        let lane = Self { here, drives: Vec::new(), tell, turns: 0, done: Vec::with_capacity(256) };
        let lane = Rc::new(RefCell::new(lane));
        let weak = Rc::downgrade(&lane);
        lane.borrow().here.set_abandon(Box::new(move |tokens| {
            // Channels are dropped by their users, never from within the lane.
            if let Some(lane) = weak.upgrade() {
                lane.borrow_mut().abandon(tokens);
            }
        }));
        cx.set_local(Rc::new(LaneCell(lane.clone())));
        cx.add_poller("bdev_nbd", Box::new(LanePoller(lane)));
    }

    /// Runs `f` with the lane of `reactor`.
    pub fn send(reactor: &Handle, f: impl FnOnce(&mut Self, &mut Turn<'_>) + Send + 'static) {
        reactor.send(move |cx| {
            if let Some(cell) = cx.local::<LaneCell>() {
                f(&mut cell.0.borrow_mut(), cx);
            }
        });
    }

    /// Control: a connection of `disk` is there.
    pub fn add(&mut self, cx: &mut Turn<'_>, disk: Arc<NbdDisk>, new: NewLink) {
        let (number, index) = (disk.number(), new.index);
        let at = self.drives.iter().position(|d| d.number == number).unwrap_or_else(|| {
            self.drives.push(Drive::new(disk, cx.now));
            self.drives.len() - 1
        });
        let mut connection = Connection::new(new.dialled, cx.now);
        let fd = connection.wait_fd();
        if let Err(e) = cx.watch(fd) {
            let why = format!("cannot watch a connection: {e}");
            return (self.tell)(LinkEnded { number, index, why });
        }
        let Some(drive) = self.drives.get_mut(at) else { return };
        (drive.limits, drive.always_fua) = (new.limits, new.always_fua);
        drive.links.push(OneLink {
            index,
            connection,
            fd,
            draining: false,
            abandoned: false,
            io_timeout: new.io_timeout,
        });
        drive.regate(&self.here, cx.now);
        self.turns = LOOK_EVERY;
    }

    /// Control: requests of a device end with `status` from now on; its connections are closed.
    pub fn fail(&mut self, cx: &mut Turn<'_>, number: u64, status: Status) {
        self.here.disks().fail(number, status);
        self.close(cx, number);
    }

    /// Control: the connections of a device are closed, in order where nothing is in flight.
    pub fn close(&mut self, cx: &mut Turn<'_>, number: u64) {
        let Some(at) = self.drives.iter().position(|d| d.number == number) else { return };
        let mut drive = self.drives.swap_remove(at);
        for mut link in drive.links.drain(..) {
            let busy = link.connection.in_flight() > 0;
            link.connection.disconnect();
            link.connection.lost(|token| self.here.disks().completed(token, Err(Errno::ECONNABORTED)));
            cx.unwatch(link.fd);
            if busy {
                link.connection.abort();
            }
        }
        for old in drive.old {
            cx.unwatch(old.fd);
            old.remains.abort();
        }
        self.here.disks().close(number, u64::MAX, cx.now);
    }

    /// Control: requests of a device that was given up may wait again.
    pub fn revive(&mut self, number: u64, now: Instant) {
        self.here.disks().revive(number, now);
    }

    /// Nobody waits for these requests any more, and their memory is about to go: ends the connections that carry them.
    /// What else these carry is repeated.
    fn abandon(&mut self, tokens: &[u64]) {
        let here = self.here.clone();
        for link in self.drives.iter_mut().flat_map(|d| &mut d.links).filter(|l| l.connection.carries(tokens))
        {
            link.abandoned = true;
            link.connection.give_up("a user left while its requests were in flight");
            link.connection.lost(|token| {
                if !tokens.contains(&token) {
                    here.disks().completed(token, Err(Errno::ECONNABORTED));
                }
            });
        }
        self.turns = LOOK_EVERY;
    }

    fn turn(&mut self, cx: &mut Turn<'_>) -> bool {
        self.turns += 1;
        let look = self.turns >= LOOK_EVERY;
        if look {
            self.turns = 0;
        }
        let mut busy = self.receive(cx.now, look);
        busy |= self.end_links(cx);
        busy |= self.look_at_old(cx);
        let here = self.here.clone();
        let mut disks = here.disks();
        busy |= disks.run(cx.now, &mut Wires { drives: &mut self.drives, now: cx.now });
        for link in self.drives.iter_mut().flat_map(|d| &mut d.links) {
            busy |= link.connection.send();
        }
        disks.announce();
        busy
    }

    /// Takes answers to the requests they belong to.
    fn receive(&mut self, now: Instant, look: bool) -> bool {
        let mut busy = false;
        let here = self.here.clone();
        for drive in &mut self.drives {
            let mut change = false;
            for link in &mut drive.links {
                if !look && link.connection.in_flight() == 0 {
                    continue;
                }
                busy |= link.connection.receive(now, &mut self.done);
                if self.done.is_empty() {
                    continue;
                }
                let mut disks = here.disks();
                for done in self.done.drain(..) {
                    let result = match done.result {
                        Ok(()) => Ok(()),
                        Err(error) => Err(errno(error).unwrap_or_else(|| {
                            change |= !std::mem::replace(&mut link.draining, true);
                            Errno::ECONNABORTED
                        })),
                    };
                    disks.completed(done.token, result);
                }
            }
            if change {
                drive.regate(&here, now);
            }
        }
        busy
    }

    /// Takes connections out that have ended, or are to end.
    fn end_links(&mut self, cx: &mut Turn<'_>) -> bool {
        let mut any = false;
        let here = self.here.clone();
        for drive in &mut self.drives {
            let mut i = 0;
            let mut change = false;
            while i < drive.links.len() {
                drive.links[i].mind(cx.now);
                if drive.links[i].connection.end().is_none() {
                    i += 1;
                    continue;
                }
                let link = drive.links.swap_remove(i);
                let why = link.connection.end().map_or_else(String::new, ToString::to_string);
                let index = link.index;
                drive.lost(&here, cx, link);
                (self.tell)(LinkEnded { number: drive.number, index, why });
                change = true;
            }
            if change {
                drive.regate(&here, cx.now);
                any = true;
            }
        }
        any
    }

    /// Looks whether servers have let go of connections that were given up here.
    fn look_at_old(&mut self, cx: &mut Turn<'_>) -> bool {
        let mut any = false;
        for drive in &mut self.drives {
            let before = drive.old.len();
            let mut i = 0;
            while i < drive.old.len() {
                let old = &mut drive.old[i];
                let closed = old.remains.is_closed();
                if !closed && old.since + STALE > cx.now {
                    i += 1;
                    continue;
                }
                let old = drive.old.swap_remove(i);
                cx.unwatch(old.fd);
                old.remains.abort();
            }
            if drive.old.len() < before {
                any = true;
                if drive.old.is_empty() {
                    self.here.disks().repeat(drive.number);
                }
            }
        }
        any
    }
}

impl Drive {
    fn new(disk: Arc<NbdDisk>, now: Instant) -> Self {
        Self {
            number: disk.number(),
            disk,
            links: Vec::new(),
            old: Vec::new(),
            limits: Limits::default(),
            always_fua: false,
            held_since: Some(now),
        }
    }

    /// What a connection leaves behind: its requests go back, and what its server may still do is waited for.
    fn lost(&mut self, here: &Here<NbdLink>, cx: &mut Turn<'_>, mut link: OneLink) {
        let mut any = link.abandoned;
        link.connection.lost(|token| {
            any = true;
            here.disks().completed(token, Err(Errno::ECONNABORTED));
        });
        let is_servers = link.connection.end().is_none_or(nbd_poll::client::End::is_servers);
        if any && !is_servers {
            self.old.push(Old { remains: link.connection.into_remains(), fd: link.fd, since: cx.now });
        } else {
            cx.unwatch(link.fd);
            // Nothing of what the socket still holds is to arrive.
            link.connection.abort();
        }
    }

    /// The connections have changed: lets requests go, or wait. Each call is a new opening, so that what was lost before
    /// it is repeated after it.
    fn regate(&mut self, here: &Here<NbdLink>, now: Instant) {
        let epoch = EPOCH.fetch_add(1, Ordering::Relaxed) + 1;
        if self.links.iter().any(OneLink::is_usable) {
            let opened = Opened { epoch, session: NbdLink(self.number), id: 0, limits: self.limits };
            let repeat_at = self.old.iter().map(|o| o.since + STALE).max();
            self.held_since = None;
            self.disk.set_gate_of(here.index, Gate::Open(opened));
            here.disks().open(self.number, opened, repeat_at);
        } else {
            let since = *self.held_since.get_or_insert(now);
            self.disk.set_gate_of(here.index, Gate::Held { since });
            here.disks().close(self.number, epoch, now);
        }
    }
}

impl OneLink {
    /// Ends it if it is to end.
    fn mind(&mut self, now: Instant) {
        if self.draining && self.connection.in_flight() == 0 {
            self.connection.disconnect();
        }
        if self.silent_until().is_some_and(|at| at <= now) {
            let seconds = self.io_timeout.unwrap_or_default().as_secs();
            self.connection.give_up(format!("the server has not answered for {seconds} s (io_timeout_sec)"));
        }
    }

    fn silent_until(&self) -> Option<Instant> {
        Some(self.connection.silent_since()? + self.io_timeout?)
    }
}

/// The connections as a [`Wire`].
struct Wires<'a> {
    drives: &'a mut [Drive],
    now: Instant,
}

impl Wire<NbdLink> for Wires<'_> {
    fn send(&mut self, to: &Opened<NbdLink>, message: &Message<'_>, cookie: u64) -> Result<(), Unsent> {
        let drive = self.drives.iter_mut().find(|d| d.number == to.session.0).ok_or(Unsent::Down)?;
        let fua = message.fua || drive.always_fua;
        let usable = drive.links.iter_mut().filter(|l| l.is_usable());
        let link = usable.min_by_key(|l| l.connection.in_flight()).ok_or(Unsent::Down)?;
        let command = match message.op {
            Op::Read => Command::Read,
            Op::Write => Command::Write { fua },
            Op::Flush => Command::Flush,
            Op::Discard => Command::Trim { fua: drive.always_fua },
            Op::WriteZeroes => Command::WriteZeroes { fua, no_hole: message.keep },
            Op::SecureErase | Op::Reset => return Err(Unsent::Never),
        };
        let ask = Ask { command, offset: message.sector << SECTOR_SHIFT, len: message.len, token: cookie };
        // SAFETY: the part of the request is in flight from here on: its user keeps the memory until it has completed, which
        // it does only with what comes out of `Connection::receive` or `lost`.
        unsafe { link.connection.submit(&ask, message.data, self.now) }.map_err(|e| match e {
            Unsendable::Full => Unsent::Busy,
            Unsendable::Dialect => Unsent::Never,
        })
    }
}

impl Poller for LanePoller {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        let lane = &mut *self.0.borrow_mut();
        if lane.drives.is_empty() {
            lane.here.disks().run(cx.now, &mut Wires { drives: &mut [], now: cx.now });
            lane.here.disks().announce();
            return Polled::Idle;
        }
        lane.turn(cx).into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        let lane = &mut *self.0.borrow_mut();
        // The first turn afterwards looks at everybody.
        lane.turns = LOOK_EVERY;
        let links = lane.drives.iter_mut().flat_map(|d| &mut d.links);
        // All of them are to be armed.
        links.fold(false, |awake, link| link.connection.before_sleep() | awake).into()
    }

    fn deadline(&self) -> Option<Instant> {
        let lane = self.0.borrow();
        let old = lane.drives.iter().flat_map(|d| &d.old).map(|o| o.since + STALE);
        let links = lane.drives.iter().flat_map(|d| &d.links).filter_map(OneLink::silent_until);
        let requests = lane.here.disks().deadline();
        old.chain(links).chain(requests).min()
    }
}
