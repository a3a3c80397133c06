//! The connections of one reactor, and the requests on them.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::Status;
use iobuf::Registry;
use nbd_poll::client::{Connection, Dialled, Done};
use reactor::{Handle, Polled, Poller, Turn};
use rnbd_proto::Errno;

use super::drive::{Drive, OneLink, Wires};
use super::link::{NbdLink, errno};
use crate::bdev::channel::Here;
use crate::bdev::disk::RemoteDisk;
use crate::bdev::request::Limits;

/// So long after a connection was lost whose server did not let go of it, the server may still be working for it: it
/// reads what its socket holds at once, and hands it to its device, which needs a moment.
pub(super) const STALE: Duration = Duration::from_secs(10);
/// So long after a server closed a connection it is at work for it at most: if it was not the server but something in
/// between, a server that lives has read what its socket holds by then.
pub(super) const SETTLE: Duration = Duration::from_millis(250);
/// Turns between two looks at connections with nothing in flight.
const LOOK_EVERY: u32 = 64;

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
                // What is left to wait for may be over sooner now.
                drive.regate(&self.here, cx.now);
            }
        }
        any
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
