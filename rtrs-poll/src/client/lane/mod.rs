//! The reactor side of the client: one [`Lane`] per reactor polls its completion queues, ends requests, and posts new
//! ones, all in one turn and on one thread.
//!
//! A turn: up to 64 completions per queue → answers to the upper layer, which may submit → the upper layer's own turn →
//! per connection one chain of receives and one of sends.

mod answers;
mod beat;
mod con;
mod io;
mod link;
mod links;
mod memory;
mod permits;
mod session;
mod sessions;
mod slab;
mod tag;

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Instant;

use iobuf::Registry;
use reactor::{Handle, Polled, Poller, Turn};
use verbs::Wc;

use super::keys::KeyTable;
use super::path::PathId;
use super::session::SessionId;
use super::upper::Upper;
use crate::cqs::{LaneCqs, NewCq};
pub(super) use con::ConSizes;
pub use io::{Io, SessionKey};
pub(super) use link::{ConSetup, LinkSetup, LinkStart, Remains};
pub(super) use memory::LinkMemory;
pub(super) use permits::MAX_PIECES;
pub(super) use session::SessionSetup;

/// Completions taken from one queue per turn.
const POLL_BATCH: usize = 64;

/// What a lane tells the control thread.
pub(super) trait Reports: Send + Sync {
    /// A connection broke or its server misbehaved: close the path.
    fn link_broken(&self, path: PathId, why: String);
    /// Connection `cid` has ended: close the path.
    fn link_ended(&self, path: PathId, cid: u16);
    /// INFO_RSP came in on con 0.
    fn info_rsp(&self, path: PathId, message: Vec<u8>);
    /// A link's queue pairs are gone, and its requests wait for another path or have gone there.
    fn link_closed(&self, path: PathId, remains: Option<Remains>);
    /// No request of the session is left, and the upper layer knows that it is down.
    fn session_drained(&self, session: SessionId);
    /// Data memory came or went.
    fn memory_changed(&self);
    /// A table that is not used here any more.
    fn keys_back(&self, keys: Arc<KeyTable>);
}

/// A way to the lane of this thread for those who have no [`Turn`] at hand.
pub struct LaneRef<U>(Weak<RefCell<Lane<U>>>);

impl<U: Upper> LaneRef<U> {
    /// Ends the requests with these cookies, of whatever session, here and now and without a completion: for memory that
    /// is going away with its user. The connections that carry one are destroyed at once, so nobody can touch the memory
    /// any more, and their paths are closed as if they were lost. What the server does with the requests nobody knows.
    /// Returns how many there were; without a lane any more there can be none. Not from within a call of [`Upper`].
    pub fn abandon(&self, cookies: &[u64]) -> usize {
        self.0.upgrade().map_or(0, |lane| lane.borrow_mut().io.abandon(cookies))
    }
}

/// One reactor's share of an RTRS client.
pub struct Lane<U> {
    // Dropped in this order: the queue pairs use memory that the upper layer may own.
    io: Io,
    upper: U,
    pub(super) cqs: LaneCqs,
    wcs: Box<[Wc; POLL_BATCH]>,
    /// Of the registry, when the control thread was last told.
    memory_seen: u64,
}

/// How messages find the lane of their reactor.
struct LaneCell<U>(Rc<RefCell<Lane<U>>>);

struct LanePoller<U>(Rc<RefCell<Lane<U>>>);

impl<U: Upper> Poller for LanePoller<U> {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().poll(cx).into()
    }

    fn before_sleep(&mut self, cx: &mut Turn<'_>) -> Polled {
        self.0.borrow_mut().before_sleep(cx)
    }

    fn deadline(&self) -> Option<Instant> {
        let lane = self.0.borrow();
        [lane.io.next_beat, lane.upper.deadline()].into_iter().flatten().min()
    }
}

impl<U: Upper> Lane<U> {
    /// Puts a lane with `upper` on the reactor of `cx`.
    pub(super) fn install(cx: &mut Turn<'_>, upper: U, registry: Arc<Registry>, reports: Arc<dyn Reports>) {
        let lane = Rc::new(RefCell::new(Self {
            upper,
            io: Io::new(reports, registry, cx.now),
            cqs: LaneCqs::default(),
            wcs: Box::new([Wc::default(); POLL_BATCH]),
            memory_seen: u64::MAX,
        }));
        cx.set_local(Rc::new(LaneCell(lane.clone())));
        cx.add_poller("rtrs_client", Box::new(LanePoller(lane)));
    }

    /// Sends `f` to the lane of `reactor`.
    pub(super) fn send(reactor: &Handle, f: impl FnOnce(&mut Turn<'_>, &mut Self) + Send + 'static) {
        reactor.send(move |cx| Self::here(cx, f));
    }

    /// Runs `f` on the lane of this reactor.
    fn here(cx: &mut Turn<'_>, f: impl FnOnce(&mut Turn<'_>, &mut Self)) {
        if let Some(cell) = cx.local::<LaneCell<U>>() {
            f(cx, &mut cell.0.borrow_mut());
        }
    }

    /// The lane of this reactor.
    pub fn reference(cx: &Turn<'_>) -> LaneRef<U> {
        LaneRef(cx.local::<LaneCell<U>>().map_or_else(Weak::new, |cell| Rc::downgrade(&cell.0)))
    }

    /// For messages of the upper layer's control part: its state and the lane's I/O side, on `reactor`.
    pub fn with_upper(reactor: &Handle, f: impl FnOnce(&mut Turn<'_>, &mut U, &mut Io) + Send + 'static) {
        reactor.send(move |cx| Self::with_upper_here(cx, f));
    }

    /// As [`Lane::with_upper`], at once, for others on the same reactor. Not from within a call of [`Upper`].
    pub fn with_upper_here(cx: &mut Turn<'_>, f: impl FnOnce(&mut Turn<'_>, &mut U, &mut Io)) {
        Self::here(cx, |cx, lane| {
            lane.io.tick(cx.now);
            f(cx, &mut lane.upper, &mut lane.io);
            lane.io.post();
        });
    }

    /// A completion queue failed. Which connections are on it is not known here, so all links by its device end.
    fn cq_failed(&mut self, cx: &mut Turn<'_>, i: usize, why: &str) {
        let NewCq { device, .. } = self.cqs.fail(cx, i, why);
        for key in self.io.links.keys() {
            if self.io.links.get(key).is_some_and(|l| l.memory.is_on(&device)) {
                self.io.link_broken(key, format!("completion queue lost: {why}"));
            }
        }
    }

    fn poll(&mut self, cx: &mut Turn<'_>) -> bool {
        self.io.tick(cx.now);
        let mut busy = false;
        let mut i = 0;
        while i < self.cqs.len() {
            match self.cqs.get(i).poll(&mut self.wcs[..]) {
                Ok(0) => {}
                Ok(n) => {
                    busy = true;
                    for w in 0..n {
                        let wc = self.wcs[w];
                        self.completion(cx, &wc);
                    }
                }
                Err(e) => {
                    self.cq_failed(cx, i, &e.to_string());
                    continue;
                }
            }
            i += 1;
        }
        busy |= self.send_all_parked(cx);
        busy |= self.upper.poll(cx, &mut self.io);
        self.io.beat(cx.now);
        self.io.post();
        self.look_at_memory();
        busy
    }

    /// Tells the control thread when data memory came or went.
    fn look_at_memory(&mut self) {
        let generation = self.io.registry.generation();
        if generation != self.memory_seen {
            self.memory_seen = generation;
            self.io.reports.memory_changed();
        }
    }

    fn before_sleep(&mut self, cx: &mut Turn<'_>) -> Polled {
        for i in (0..self.cqs.len()).rev() {
            if let Err(e) = self.cqs.get(i).arm() {
                self.cq_failed(cx, i, &e.to_string());
            }
        }
        // Completions that came before arming notify nobody.
        if self.poll(cx) {
            return Polled::Busy;
        }
        self.upper.before_sleep(cx)
    }
}
