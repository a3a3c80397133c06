//! Split virtqueue, device side (virtio 1.2 section 2.7).

use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::{Memory, RingConfig, need_event};
use crate::chain::{Broken, Chain, DESC_LEN, Descriptor, F_INDIRECT, F_NEXT, MAX_DESCRIPTORS};

/// Offsets in `struct virtq_avail` and `struct virtq_used`.
const IDX: usize = 2;
const RING: usize = 4;

/// The device's side of a split ring.
#[derive(Debug)]
pub struct SplitRing {
    config: RingConfig,
    desc: *const u8,
    avail: *mut u8,
    used: *mut u8,
    /// Next index to take from the available ring.
    last_avail: u16,
    /// The driver's index when last looked at.
    seen_avail: u16,
    /// Next index to fill in the used ring.
    used_idx: u16,
    /// What the driver sees of it.
    published: u16,
    /// For what of it the driver was asked whether it wants an interrupt.
    announced: u16,
    /// Keeps what the pointers point to.
    memory: Memory,
}

impl SplitRing {
    /// Finds the ring in `memory`, to go on at available index `last_avail` and with the used index that it has.
    ///
    /// # Errors
    /// `Size`, `Ring`, `Alignment`.
    pub fn new(config: RingConfig, memory: Memory, last_avail: u16) -> Result<Self, Broken> {
        let size = u64::from(config.size);
        if !(1..=32768).contains(&size) || !size.is_power_of_two() {
            return Err(Broken::Size(config.size));
        }
        let desc = config.locate(&memory, config.desc, DESC_LEN * size, 16)?;
        // Both end with an event index; it is there even if not negotiated.
        let avail = config.locate(&memory, config.avail, 6 + 2 * size, 2)?;
        let used = config.locate(&memory, config.used, 6 + 8 * size, 4)?;
        let mut ring = Self {
            config,
            desc,
            avail,
            used,
            last_avail,
            seen_avail: last_avail,
            used_idx: 0,
            published: 0,
            announced: 0,
            memory,
        };
        ring.used_idx = ring.word(ring.used, IDX).load(Ordering::Acquire);
        (ring.published, ring.announced) = (ring.used_idx, ring.used_idx);
        Ok(ring)
    }

    /// A 16-bit field of the available or used ring.
    #[inline]
    fn word(&self, base: *mut u8, offset: usize) -> &AtomicU16 {
        // SAFETY: callers name fields inside the structures located in `new`; they are in a region that `self.memory`
        // keeps mapped, aligned to 2, and accessed only as atomics on this side.
        unsafe { AtomicU16::from_ptr(base.add(offset).cast()) }
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index) & (self.config.size as usize - 1)
    }

    /// Index of the next chain to be taken.
    pub fn last_avail(&self) -> u16 {
        self.last_avail
    }

    /// Goes on at another index, after requests in flight were found.
    pub fn set_last_avail(&mut self, index: u16) {
        (self.last_avail, self.seen_avail) = (index, index);
    }

    /// The used index as the driver sees it.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Takes the head of the next available chain.
    ///
    /// # Errors
    /// `Ahead`, `Index`.
    #[inline]
    pub fn take(&mut self) -> Result<Option<u16>, Broken> {
        if self.last_avail == self.seen_avail {
            let seen = self.word(self.avail, IDX).load(Ordering::Acquire);
            let ahead = seen.wrapping_sub(self.last_avail);
            if u32::from(ahead) > self.config.size {
                return Err(Broken::Ahead(ahead, self.config.size as u16));
            }
            if ahead == 0 {
                return Ok(None);
            }
            self.seen_avail = seen;
        }
        let offset = RING + 2 * self.slot(self.last_avail);
        let head = self.word(self.avail, offset).load(Ordering::Relaxed);
        if u32::from(head) >= self.config.size {
            return Err(Broken::Index(head, self.config.size));
        }
        self.last_avail = self.last_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Reads the chain that starts at `head`.
    ///
    /// # Errors
    /// Contradictions in the table; a buffer outside of memory only marks the chain.
    #[inline]
    pub fn read(&self, head: u16, chain: &mut Chain) -> Result<(), Broken> {
        chain.clear();
        let mut index = head;
        for _ in 0..self.config.size.min(MAX_DESCRIPTORS as u32) {
            if u32::from(index) >= self.config.size {
                return Err(Broken::Index(index, self.config.size));
            }
            // SAFETY: `index` is inside the table (checked just now), which `self.memory` keeps mapped.
            let d = unsafe { Descriptor::read(self.desc, usize::from(index)) };
            let (flags, next) = (d.first, d.second);
            if flags & F_INDIRECT != 0 {
                if !self.config.indirect {
                    return Err(Broken::Indirect("not negotiated"));
                }
                if flags & F_NEXT != 0 {
                    return Err(Broken::Indirect("followed by another"));
                }
                return chain.add_table(&self.memory, d.addr, d.len, false);
            }
            chain.add(&self.memory, d.addr, d.len, flags)?;
            if flags & F_NEXT == 0 {
                return Ok(());
            }
            index = next;
        }
        Err(Broken::TooLong(self.config.size as usize))
    }

    /// Fills the next entry of the used ring; the driver does not see it before [`SplitRing::show`].
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) {
        let offset = RING + 8 * self.slot(self.used_idx);
        // SAFETY: entry `slot` of the used ring, located in `new` and kept mapped; aligned to 4, so as two halves.
        unsafe {
            let at = self.used.add(offset).cast::<u32>();
            at.write_volatile(u32::from(head));
            at.add(1).write_volatile(len);
        }
        self.used_idx = self.used_idx.wrapping_add(1);
    }

    /// Number of used entries that the driver does not see yet.
    #[inline]
    pub fn unpublished(&self) -> u16 {
        self.used_idx.wrapping_sub(self.published)
    }

    /// Number of used entries since the last [`SplitRing::publish`].
    #[inline]
    pub fn unannounced(&self) -> u16 {
        self.used_idx.wrapping_sub(self.announced)
    }

    /// Shows a driver that polls what was used; [`SplitRing::publish`] follows in the same turn.
    #[inline]
    pub fn show(&mut self) {
        self.published = self.used_idx;
        self.word(self.used, IDX).store(self.used_idx, Ordering::Release);
    }

    /// Shows the driver what was used. True: it wants an interrupt for what came since it was last asked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let count = self.unannounced();
        self.announced = self.used_idx;
        self.show();
        // The driver writes its wish, then looks at the index; here it is the other way round (virtio 2.7.10).
        fence(Ordering::SeqCst);
        if self.config.event_idx {
            let offset = RING + 2 * self.config.size as usize;
            let event = self.word(self.avail, offset).load(Ordering::Relaxed);
            return need_event(event, self.used_idx, count);
        }
        let flags = self.word(self.avail, 0).load(Ordering::Relaxed);
        flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
    }

    /// Asks the driver not to kick.
    #[inline]
    pub fn disable_kicks(&mut self) {
        // With an event index it is enough not to move that: no kick until the indices come round.
        if !self.config.event_idx {
            self.word(self.used, 0).store(VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        }
    }

    /// Asks the driver to kick for whatever comes next. True: something came meanwhile.
    pub fn enable_kicks(&mut self) -> bool {
        if self.config.event_idx {
            let offset = RING + 8 * self.config.size as usize;
            self.word(self.used, offset).store(self.last_avail, Ordering::Relaxed);
        } else {
            self.word(self.used, 0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.word(self.avail, IDX).load(Ordering::Acquire) != self.last_avail
    }
}
