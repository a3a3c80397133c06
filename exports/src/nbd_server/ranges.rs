//! Which blocks of an export are being changed by whom, so that a read-modify-write undoes nobody's write.
//!
//! A client may change some bytes of a block ([`super::guarded`]): the block is read, changed, and written back. A write of
//! the same block that ends in between would be lost. So, once a client of the export has sent such a request, every
//! change of the export takes its place here first. Changes of whole blocks do not wait for each other; one of a part of
//! a block waits for those before it that overlap, and those behind it wait for it.
//!
//! ```text
//!   open ── the first such request ──▶ draining ── every reactor's earlier changes have ended ──▶ armed
//!    ▲                                                                                             │
//!    └──────────────────────── the last client that sends such requests has gone ◀─────────────────┘
//! ```
//!
//! An open export costs its changes the load of a flag that hardly ever moves. In the other states they take a lock, for
//! some hundred instructions: that is for clients that know no blocks, and for those beside them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Tells a place from others of the same export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

/// A reactor's share in an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemberId(u64);

/// A change under way or waiting.
#[derive(Debug)]
struct Place {
    ticket: u64,
    member: MemberId,
    first: u64,
    end: u64,
    /// It changes a part of a block.
    alone: bool,
    granted: bool,
}

impl Place {
    fn overlaps(&self, other: &Self) -> bool {
        self.first < other.end && other.first < self.end
    }
}

/// Whose places may go on.
type Told = Vec<(MemberId, Ticket)>;

#[derive(Debug, Default)]
struct Table {
    /// In the order in which they came, which is that of their tickets.
    places: Vec<Place>,
    members: Vec<MemberId>,
    /// Members with changes under way that have no place.
    undrained: Vec<MemberId>,
    /// Clients that change parts of blocks.
    users: usize,
    next: u64,
}

impl Table {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Takes a place out, and lets those go on that only it was in front of. Others need no look, however many wait.
    fn remove(&mut self, ticket: Ticket) -> Told {
        let Ok(index) = self.places.binary_search_by_key(&ticket.0, |p| p.ticket) else { return Told::new() };
        let gone = self.places.remove(index);
        self.grant(index, |place| place.overlaps(&gone))
    }

    /// Lets those places from `from` on go that `which` picks and that nobody is in front of any more; these are told.
    fn grant(&mut self, from: usize, which: impl Fn(&Place) -> bool) -> Told {
        let mut told = Told::new();
        for i in from..self.places.len() {
            if !self.places[i].granted && which(&self.places[i]) && self.is_free(i) {
                self.places[i].granted = true;
                told.push((self.places[i].member, Ticket(self.places[i].ticket)));
            }
        }
        told
    }

    fn is_free(&self, index: usize) -> bool {
        let place = &self.places[index];
        let blocks = |earlier: &Place| (earlier.alone || place.alone) && earlier.overlaps(place);
        (!place.alone || self.undrained.is_empty()) && !self.places[..index].iter().any(blocks)
    }
}

/// How a reactor is told. Called with no lock held.
pub(super) trait Waker: Send {
    /// Changes under way that have no place must be told when they have ended: [`Member::drained`].
    fn drain(&self);
    /// The place has been granted.
    fn granted(&self, ticket: Ticket);
}

struct Shared {
    /// Changes need a place.
    armed: AtomicBool,
    table: Mutex<(Table, Wakers)>,
}

type Wakers = Vec<(MemberId, Arc<dyn Waker + Sync>)>;

/// Of an export, shared by the reactors.
#[derive(Clone)]
pub(super) struct RangeLock(Arc<Shared>);

impl Default for RangeLock {
    fn default() -> Self {
        Self(Arc::new(Shared { armed: AtomicBool::new(false), table: Mutex::default() }))
    }
}

impl RangeLock {
    /// A reactor has changes for the export from now on.
    pub(super) fn join(&self, waker: Arc<dyn Waker + Sync>) -> Member {
        let mut guard = self.lock();
        let (table, wakers) = &mut *guard;
        let id = MemberId(table.number());
        table.members.push(id);
        wakers.push((id, waker));
        drop(guard);
        Member { lock: self.clone(), id }
    }

    fn lock(&self) -> MutexGuard<'_, (Table, Wakers)> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the table, and tells those whose places may go on.
    fn with(&self, f: impl FnOnce(&mut Table) -> Told) {
        let mut guard = self.lock();
        let (table, wakers) = &mut *guard;
        let told: Vec<_> = f(table)
            .into_iter()
            .filter_map(|(id, ticket)| Some((wakers.iter().find(|(i, _)| *i == id)?.1.clone(), ticket)))
            .collect();
        drop(guard);
        told.into_iter().for_each(|(waker, ticket)| waker.granted(ticket));
    }
}

/// A reactor's share in an export. Leaves when dropped; by then none of its changes are under way.
pub(super) struct Member {
    lock: RangeLock,
    id: MemberId,
}

impl Member {
    /// Changes need a place now.
    #[inline]
    pub(super) fn is_armed(&self) -> bool {
        // A reactor that does not see it yet hears `Waker::drain` later, and counts what it did until then.
        self.lock.0.armed.load(Ordering::Relaxed)
    }

    /// A client of this reactor changes parts of blocks, until the guard is dropped.
    pub(super) fn arm(&self) -> Armed {
        let mut guard = self.lock.lock();
        let (table, wakers) = &mut *guard;
        table.users += 1;
        let mut told = Vec::new();
        if table.users == 1 {
            self.lock.0.armed.store(true, Ordering::Relaxed);
            table.undrained.clone_from(&table.members);
            told.extend(wakers.iter().map(|(_, waker)| waker.clone()));
        }
        drop(guard);
        told.into_iter().for_each(|waker| waker.drain());
        Armed(self.lock.clone())
    }

    /// What this reactor had under way without a place has ended.
    pub(super) fn drained(&self) {
        self.lock.with(|table| {
            table.undrained.retain(|id| *id != self.id);
            table.grant(0, |place| place.alone)
        });
    }

    /// Takes a place for a change of blocks `first` to `end`; `alone`: of a part of them. True if it may go on at once, else
    /// [`Waker::granted`] comes. Give the place back in any case.
    pub(super) fn enter(&self, first: u64, end: u64, alone: bool) -> (Ticket, bool) {
        let mut guard = self.lock.lock();
        let table = &mut guard.0;
        let ticket = table.number();
        table.places.push(Place { ticket, member: self.id, first, end, alone, granted: false });
        let granted = table.is_free(table.places.len() - 1);
        table.places.last_mut().expect("just pushed").granted = granted;
        (Ticket(ticket), granted)
    }

    /// Gives a place back.
    pub(super) fn leave(&self, ticket: Ticket) {
        self.lock.with(|table| table.remove(ticket));
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let id = self.id;
        self.lock.lock().1.retain(|(i, _)| *i != id);
        self.lock.with(|table| {
            table.members.retain(|i| *i != id);
            table.undrained.retain(|i| *i != id);
            // None in order; after an abort nobody waits for the device.
            table.places.retain(|p| p.member != id);
            table.grant(0, |_| true)
        });
    }
}

/// A client changes parts of blocks. It is dropped when none of its requests is in flight.
pub(super) struct Armed(RangeLock);

impl Drop for Armed {
    fn drop(&mut self) {
        let mut guard = self.0.lock();
        guard.0.users -= 1;
        if guard.0.users == 0 {
            // Whoever does not see it yet takes a place too many.
            self.0.0.armed.store(false, Ordering::Relaxed);
            guard.0.undrained.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Heard {
        drains: Mutex<usize>,
        granted: Mutex<Vec<Ticket>>,
    }

    impl Waker for Heard {
        fn drain(&self) {
            *self.drains.lock().unwrap() += 1;
        }

        fn granted(&self, ticket: Ticket) {
            self.granted.lock().unwrap().push(ticket);
        }
    }

    fn two() -> ([Arc<Heard>; 2], [Member; 2]) {
        let lock = RangeLock::default();
        let told = [Arc::<Heard>::default(), Arc::default()];
        let members = [0, 1].map(|i: usize| lock.join(told[i].clone()));
        (told, members)
    }

    #[test]
    fn parts_of_blocks_wait_until_every_reactor_has_drained() {
        let (told, [a, b]) = two();
        assert!(!a.is_armed() && !b.is_armed());
        let armed = a.arm();
        assert!(b.is_armed());
        assert_eq!(told.each_ref().map(|t| *t.drains.lock().unwrap()), [1, 1]);
        let (first, granted) = a.enter(0, 1, true);
        assert!(!granted);
        assert!(b.enter(5, 6, false).1, "whole blocks need not wait");
        a.drained();
        assert!(told[0].granted.lock().unwrap().is_empty());
        b.drained();
        assert_eq!(*told[0].granted.lock().unwrap(), [first]);
        drop(armed);
        assert!(!a.is_armed());
    }

    #[test]
    fn a_reactor_that_leaves_has_drained() {
        let (told, [a, b]) = two();
        let _armed = a.arm();
        a.drained();
        let (ticket, granted) = a.enter(0, 1, true);
        assert!(!granted);
        drop(b);
        assert_eq!(*told[0].granted.lock().unwrap(), [ticket]);
    }

    #[test]
    fn overlapping_changes_go_in_their_order() {
        let (told, [a, b]) = two();
        let (_armed, _again) = (a.arm(), b.arm());
        a.drained();
        b.drained();
        let (whole, now) = a.enter(0, 8, false);
        let (other, also) = b.enter(7, 9, false);
        assert!(now && also, "whole blocks");
        let (part, waits) = b.enter(7, 8, true);
        let (behind, waits_too) = a.enter(7, 9, false);
        assert!(!waits && !waits_too);
        assert!(b.enter(8, 10, false).1 && a.enter(20, 21, true).1, "elsewhere");
        a.leave(whole);
        assert!(told[1].granted.lock().unwrap().is_empty());
        b.leave(other);
        assert_eq!(*told[1].granted.lock().unwrap(), [part]);
        assert!(told[0].granted.lock().unwrap().is_empty());
        b.leave(part);
        assert_eq!(*told[0].granted.lock().unwrap(), [behind]);
    }

    /// Whoever takes a place out looks only at those that overlap: nobody else may have become free by it.
    #[test]
    fn nobody_who_is_free_waits() {
        let (mut table, member, mut state) = (Table::default(), MemberId(0), 7_u64);
        let mut number = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..2000 {
            if table.places.len() < 24 && number(2) == 0 {
                let (ticket, first, alone) = (table.number(), number(40), number(2) == 0);
                let end = first + 1 + number(6);
                table.places.push(Place { ticket, member, first, end, alone, granted: false });
                table.grant(table.places.len() - 1, |_| true);
            } else if let Some(place) = table.places.iter().filter(|p| p.granted).nth(number(4) as usize) {
                let ticket = Ticket(place.ticket);
                table.remove(ticket);
            }
            for (i, place) in table.places.iter().enumerate() {
                assert_eq!(place.granted, table.is_free(i), "{place:?} of {:?}", table.places);
            }
        }
    }

    #[test]
    fn arming_again_drains_again() {
        let (told, [a, _b]) = two();
        drop(a.arm());
        drop(a.arm());
        assert_eq!(told.each_ref().map(|t| *t.drains.lock().unwrap()), [2, 2]);
    }
}
