//! Which memory peers may touch: keys, each for one range and some kinds of access.
//!
//! A key is 32 bits that cannot be guessed: the number of its slot, chosen at random among the free ones, and a random
//! nonce. Threads look keys up without locks. While a [`Pinned`] of a key exists, its entry stays as it is; taking the
//! entry away waits for that, so that afterwards nobody writes to the memory any more and it may be freed.
//!
//! ```text
//!   free ─ insert ─▶ filling ─▶ live ─ invalidate ─▶ dead       who has the key from `insert` or `replace` owns the
//!    ▲                  ▲        │                    │         slot until `remove`, dead or alive
//!    │                  └────────┴───── replace ──────┤
//!    └───────────────────────────┴────── remove ──────┘
//! ```
//!
//! One atomic word per slot holds the key, the state, and the number of pins, so a pin is taken and the key compared in
//! one compare-and-swap: there is no moment at which a key looks valid to a user whom the remover does not see.
//!
//! Source for keys and the order of checks: IBTA 9.4.1, 10.6; Linux `rxe_mr.c`.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Slots of a table: a slot's number is the upper half of its keys.
const SLOTS: usize = 1 << 16;

/// State word: the key.
const KEY_SHIFT: u32 = 32;
/// State word: belongs to the caller of `insert`.
const OWNED: u64 = 1 << 31;
/// State word: may be pinned. Never without [`OWNED`].
const LIVE: u64 = 1 << 30;
/// State word: number of pins.
const USERS: u64 = LIVE - 1;

const REMOTE_WRITE: u64 = 1;
const REMOTE_READ: u64 = 1 << 1;
const LOCAL_WRITE: u64 = 1 << 2;
const INVALIDATABLE: u64 = 1 << 3;
const HAS_QPN: u64 = 1 << 4;
const QPN_SHIFT: u32 = 8;
const DOMAIN_SHIFT: u32 = 32;

/// What a key opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where the range begins, as peers name it, which is also where it is in memory.
    pub base: u64,
    /// Its bytes.
    pub len: u64,
    /// Protection domain: only its queue pairs may use the key.
    pub domain: u32,
    /// Peers may write.
    pub remote_write: bool,
    /// Peers may read.
    pub remote_read: bool,
    /// Receives and READ responses may be placed. Sending from it is always allowed.
    pub local_write: bool,
    /// Peers may invalidate the key.
    pub invalidatable: bool,
    /// The one queue pair, 24 bits, that may use the key by [`Table::pin_by`] and [`Table::invalidate_by`].
    pub qpn: Option<u32>,
}

/// What is to be done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Send from it.
    LocalRead,
    /// Receive into it.
    LocalWrite,
    /// RDMA READ from it.
    RemoteRead,
    /// RDMA WRITE to it.
    RemoteWrite,
}

/// Why a key does not open some memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// No such key, not any more, or another domain's or queue pair's.
    #[error("no such key")]
    Key,
    /// Not that kind of access.
    #[error("key does not permit that access")]
    Permission,
    /// Not inside the range.
    #[error("outside the key's range")]
    Bounds,
}

/// Memory that stays registered as long as this exists.
#[derive(Debug)]
#[must_use]
pub struct Pinned<'a> {
    /// Where it is in memory.
    pub addr: u64,
    /// Bytes, as asked for.
    pub len: u64,
    _user: User<'a>,
}

/// One pin of a slot.
#[derive(Debug)]
struct User<'a>(&'a Slot);

impl Drop for User<'_> {
    fn drop(&mut self) {
        // Release: what was done with the memory comes before what the remover does after it saw the count fall.
        self.0.state.fetch_sub(1, Ordering::Release);
    }
}

/// One key. `base`, `len`, `rights` change only while the slot is owned, not live and without users; `state` publishes
/// them.
#[derive(Debug)]
#[repr(align(32))]
struct Slot {
    state: AtomicU64,
    base: AtomicU64,
    len: AtomicU64,
    rights: AtomicU64,
}

/// All keys of a device. Shared by all threads; 2 MiB.
#[derive(Debug)]
pub struct Table {
    slots: Vec<Slot>,
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

impl Table {
    /// Without keys.
    pub fn new() -> Self {
        Self::with_slots(SLOTS)
    }

    fn with_slots(count: usize) -> Self {
        let slot = || Slot {
            state: AtomicU64::new(0),
            base: AtomicU64::new(0),
            len: AtomicU64::new(0),
            rights: AtomicU64::new(0),
        };
        Self { slots: (0..count).map(|_| slot()).collect() }
    }

    /// Makes a key for `entry`. `random`: unpredictable numbers. `None` if all 65536 slots are taken.
    pub fn insert(&self, entry: Entry, mut random: impl FnMut() -> u32) -> Option<u32> {
        let start = self.start(&mut random);
        // Random places keep numbers unpredictable; the search from the last one finds a free slot if there is any.
        let index = (0..RANDOM_PLACES)
            .map(|_| self.start(&mut random))
            .chain((0..self.slots.len()).map(|i| (start + i) % self.slots.len()))
            .find(|&index| self.slots[index].claim())?;
        let key = (index as u32) << 16 | random() & 0xffff;
        self.slots[index].publish(key, &entry);
        Some(key)
    }

    /// Gives the slot of `key` another entry and a new key, and ends the old one, which need not be valid any more for
    /// others but must be the caller's own: what `insert` or the last `replace` returned. Waits as [`Table::remove`]
    /// does. The new key has the slot of the old one and another nonce. `None`, with nothing changed, if `key` is not in
    /// the table.
    ///
    /// Costs three atomic operations on one cache line when nobody uses the key.
    pub fn replace(&self, key: u32, entry: Entry, mut random: impl FnMut() -> u32) -> Option<u32> {
        let slot = self.retire(key)?;
        let mut nonce = random() & 0xffff;
        if nonce == key & 0xffff {
            nonce ^= 1;
        }
        let new = key & 0xffff_0000 | nonce;
        slot.publish(new, &entry);
        Some(new)
    }

    /// Takes a key away and returns when no [`Pinned`] of it is left; the calling thread must hold none. `false` if it
    /// is not in the table. The caller must be the key's owner, and must not do this on two threads at once.
    pub fn remove(&self, key: u32) -> bool {
        let Some(slot) = self.retire(key) else { return false };
        slot.state.store(0, Ordering::Release);
        true
    }

    /// Makes a key invalid at a peer's wish, waiting as [`Table::remove`] does. Its slot stays the owner's. `false` if
    /// there is no such valid key in `domain` or it may not be invalidated by peers.
    pub fn invalidate(&self, key: u32, domain: u32) -> bool {
        self.invalidate_if(key, domain, None)
    }

    /// [`Table::invalidate`] by queue pair `qpn`, which must be the entry's if that names one.
    pub fn invalidate_by(&self, key: u32, domain: u32, qpn: u32) -> bool {
        self.invalidate_if(key, domain, Some(qpn))
    }

    fn invalidate_if(&self, key: u32, domain: u32, qpn: Option<u32>) -> bool {
        {
            let Some(user) = self.enter(key) else { return false };
            let rights = user.0.rights.load(Ordering::Relaxed);
            if rights & INVALIDATABLE == 0 || !is_for(rights, domain, qpn) {
                return false;
            }
        }
        // Between the two the key may have been replaced; it then has another nonce and is not found.
        self.end(key).is_some_and(|(slot, was_live)| {
            slot.wait_for_users(key);
            was_live
        })
    }

    /// Checks that `key` opens `len` bytes at `va` for `access` to queue pairs of `domain`, and keeps it so until the
    /// result is dropped. The check of `Entry::qpn` is left out.
    /// # Errors
    /// In this order: no such key, not permitted, out of bounds.
    pub fn pin(
        &self,
        key: u32,
        domain: u32,
        va: u64,
        len: u64,
        access: Access,
    ) -> Result<Pinned<'_>, AccessError> {
        self.pin_if(key, domain, None, va, len, access)
    }

    /// [`Table::pin`] by queue pair `qpn`, which must be the entry's if that names one.
    /// # Errors
    /// As `pin`.
    pub fn pin_by(
        &self,
        key: u32,
        domain: u32,
        qpn: u32,
        va: u64,
        len: u64,
        access: Access,
    ) -> Result<Pinned<'_>, AccessError> {
        self.pin_if(key, domain, Some(qpn), va, len, access)
    }

    fn pin_if(
        &self,
        key: u32,
        domain: u32,
        qpn: Option<u32>,
        va: u64,
        len: u64,
        access: Access,
    ) -> Result<Pinned<'_>, AccessError> {
        let user = self.enter(key).ok_or(AccessError::Key)?;
        let rights = user.0.rights.load(Ordering::Relaxed);
        if !is_for(rights, domain, qpn) {
            return Err(AccessError::Key);
        }
        let permitted = match access {
            Access::LocalRead => true,
            Access::LocalWrite => rights & LOCAL_WRITE != 0,
            Access::RemoteRead => rights & REMOTE_READ != 0,
            Access::RemoteWrite => rights & REMOTE_WRITE != 0,
        };
        if !permitted {
            return Err(AccessError::Permission);
        }
        let (base, size) = (user.0.base.load(Ordering::Relaxed), user.0.len.load(Ordering::Relaxed));
        if va < base || len > size || va - base > size - len {
            return Err(AccessError::Bounds);
        }
        Ok(Pinned { addr: va, len, _user: user })
    }

    /// Counts a user of a valid key.
    fn enter(&self, key: u32) -> Option<User<'_>> {
        let slot = self.slots.get(key as usize >> 16)?;
        let mut state = slot.state.load(Ordering::Relaxed);
        loop {
            if state >> KEY_SHIFT != u64::from(key) || state & LIVE == 0 || state & USERS == USERS {
                return None;
            }
            // Acquire: pairs with `publish`, so the fields read next are this key's.
            match slot.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(User(slot)),
                Err(now) => state = now,
            }
        }
    }

    /// Makes a key of the table invalid, without waiting. Also returns whether it was valid.
    fn end(&self, key: u32) -> Option<(&Slot, bool)> {
        let slot = self.slots.get(key as usize >> 16)?;
        let mut state = slot.state.load(Ordering::Relaxed);
        loop {
            if state >> KEY_SHIFT != u64::from(key) || state & OWNED == 0 {
                return None;
            }
            if state & LIVE == 0 {
                return Some((slot, false));
            }
            // Release: pairs with the acquire of an owner who finds the key invalid already.
            match slot.state.compare_exchange_weak(state, state & !LIVE, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return Some((slot, true)),
                Err(now) => state = now,
            }
        }
    }

    /// Makes a key invalid and waits until nobody uses it: the slot is the caller's alone.
    fn retire(&self, key: u32) -> Option<&Slot> {
        let (slot, _) = self.end(key)?;
        slot.wait_for_users(key);
        Some(slot)
    }

    /// A slot at random.
    fn start(&self, random: &mut impl FnMut() -> u32) -> usize {
        random() as usize % self.slots.len()
    }
}

/// Tries before searching: enough that a table that is half full practically never needs the search.
const RANDOM_PLACES: usize = 32;

/// Whether `rights` are of this domain and not of another queue pair.
fn is_for(rights: u64, domain: u32, qpn: Option<u32>) -> bool {
    let other_qp =
        qpn.is_some_and(|qpn| rights & HAS_QPN != 0 && rights >> QPN_SHIFT & 0xff_ffff != u64::from(qpn));
    rights >> DOMAIN_SHIFT == u64::from(domain) && !other_qp
}

impl Slot {
    /// Takes a free slot.
    fn claim(&self) -> bool {
        // Acquire: what the former owner did comes first.
        self.state.compare_exchange(0, OWNED, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Fills an owned slot that nobody uses and makes its key valid.
    fn publish(&self, key: u32, entry: &Entry) {
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        let rights = flag(entry.remote_write, REMOTE_WRITE)
            | flag(entry.remote_read, REMOTE_READ)
            | flag(entry.local_write, LOCAL_WRITE)
            | flag(entry.invalidatable, INVALIDATABLE)
            | entry.qpn.map_or(0, |qpn| HAS_QPN | u64::from(qpn & 0xff_ffff) << QPN_SHIFT)
            | u64::from(entry.domain) << DOMAIN_SHIFT;
        self.base.store(entry.base, Ordering::Relaxed);
        self.len.store(entry.len, Ordering::Relaxed);
        self.rights.store(rights, Ordering::Relaxed);
        // A plain store loses no user: without LIVE none can come, and none was left.
        self.state.store(u64::from(key) << KEY_SHIFT | OWNED | LIVE, Ordering::Release);
    }

    /// Until all pins of `key`, which is not live any more, are gone. Pins last for the copy of one packet or the sending
    /// of one batch. If another key has taken the slot, its owner has waited for them.
    fn wait_for_users(&self, key: u32) {
        let mut rounds = 0u32;
        loop {
            // Acquire: pairs with the release in `User::drop`, or with `publish` after the owner's wait.
            let state = self.state.load(Ordering::Acquire);
            if state >> KEY_SHIFT != u64::from(key) || state & USERS == 0 {
                return;
            }
            rounds += 1;
            pause(rounds);
        }
    }
}

/// Lets the user of a key run: it may have been descheduled.
fn pause(rounds: u32) {
    #[cfg(loom)]
    {
        let _ = rounds;
        loom::thread::yield_now();
    }
    #[cfg(not(loom))]
    if rounds < 100 {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests;
