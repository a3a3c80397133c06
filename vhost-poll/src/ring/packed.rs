//! Packed virtqueue, device side (virtio 1.2 section 2.8).

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::{Base, Memory, RingConfig, need_event};
use crate::chain::{Broken, Chain, DESC_LEN, Descriptor, F_INDIRECT, F_NEXT, F_WRITE, MAX_DESCRIPTORS};

const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
/// Offset of a descriptor's flags.
const FLAGS: usize = 14;
const WRAP: u16 = 1 << 15;

/// A place in the ring: index and wrap counter, as bits 0–14 and 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Entry.
    pub index: u16,
    /// Wrap counter; starts as true.
    pub wrap: bool,
}

impl Place {
    /// From half of a [`Base`].
    pub fn from_bits(bits: u16) -> Self {
        Self { index: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    /// For half of a [`Base`].
    pub fn bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// `count` entries further, at most once around.
    #[inline]
    #[must_use]
    pub fn advance(self, count: u16, size: u16) -> Self {
        let index = u32::from(self.index) + u32::from(count);
        match index.checked_sub(u32::from(size)) {
            Some(index) => Self { index: index as u16, wrap: !self.wrap },
            None => Self { index: index as u16, wrap: self.wrap },
        }
    }

    /// Flags of a descriptor that the driver made available here (without NEXT, WRITE and INDIRECT).
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// Flags of a descriptor that the device used here.
    fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// What [`PackedRing::take`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The driver's id of the buffer.
    pub id: u16,
    /// Entries of the ring that it takes.
    pub count: u16,
}

/// The device's side of a packed ring.
#[derive(Debug)]
pub struct PackedRing {
    config: RingConfig,
    size: u16,
    desc: *mut u8,
    driver: *mut u8,
    device: *mut u8,
    avail: Place,
    used: Place,
    /// Where the driver sees the device, and the entry there, whose flags are written last.
    published: Place,
    first_flags: Option<u16>,
    /// Entries between `published` and `used`.
    unpublished: u16,
    /// Entries for which the driver was not yet asked whether it wants an interrupt.
    unannounced: u16,
    /// The chain taken last, as it is in the ring.
    taken: Vec<Descriptor>,
    memory: Memory,
}

impl PackedRing {
    /// Finds the ring in `memory`, to go on at `base`.
    ///
    /// # Errors
    /// `Size`, `Ring`, `Alignment`.
    pub fn new(config: RingConfig, memory: Memory, base: Base) -> Result<Self, Broken> {
        if !(1..=32768).contains(&config.size) {
            return Err(Broken::Size(config.size));
        }
        let desc = config.locate(&memory, config.desc, DESC_LEN * u64::from(config.size), 16)?;
        let driver = config.locate(&memory, config.avail, 4, 4)?;
        let device = config.locate(&memory, config.used, 4, 4)?;
        let (avail, used) = (Place::from_bits(base as u16), Place::from_bits((base >> 16) as u16));
        for place in [avail, used] {
            if u32::from(place.index) >= config.size {
                return Err(Broken::Index(place.index, config.size));
            }
        }
        Ok(Self {
            size: config.size as u16,
            config,
            desc,
            driver,
            device,
            avail,
            used,
            published: used,
            first_flags: None,
            unpublished: 0,
            unannounced: 0,
            taken: Vec::with_capacity(MAX_DESCRIPTORS),
            memory,
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where it stands, for GET_VRING_BASE.
    pub fn base(&self) -> Base {
        u32::from(self.avail.bits()) | u32::from(self.used.bits()) << 16
    }

    /// Next entry that the device uses.
    pub fn used(&self) -> Place {
        self.used
    }

    /// Goes on elsewhere, after requests in flight were found.
    pub fn set_places(&mut self, avail: Place, used: Place) {
        (self.avail, self.used, self.published) = (avail, used, used);
    }

    /// The descriptors of the chain taken last, for the memory of requests in flight.
    pub fn taken(&self) -> &[Descriptor] {
        &self.taken
    }

    #[inline]
    fn flags_at(&self, index: u16) -> &AtomicU16 {
        debug_assert!(index < self.size);
        // SAFETY: `index` is inside the ring (every `Place` is), which `self.memory` keeps mapped; the flags are aligned
        // to 2 and accessed only as an atomic on this side.
        unsafe { AtomicU16::from_ptr(self.desc.add(usize::from(index) * DESC_LEN as usize + FLAGS).cast()) }
    }

    /// Whether the driver has made the entry at `place` available.
    #[inline]
    fn is_available(&self, place: Place) -> bool {
        let flags = self.flags_at(place.index).load(Ordering::Acquire);
        flags & (AVAIL | USED) == place.available()
    }

    /// Whether the entry at `place` still is what a driver made available there, rather than used.
    pub fn still_available(&self, place: Place) -> bool {
        self.is_available(place)
    }

    /// Takes the next available chain, and reads it.
    ///
    /// # Errors
    /// Contradictions in the ring; a buffer outside of memory only marks the chain.
    #[inline]
    pub fn take(&mut self, chain: &mut Chain) -> Result<Option<Taken>, Broken> {
        if !self.is_available(self.avail) {
            return Ok(None);
        }
        chain.clear();
        self.taken.clear();
        let mut at = self.avail;
        loop {
            // SAFETY: `at` is inside the ring, which `self.memory` keeps mapped.
            let d = unsafe { Descriptor::read(self.desc, usize::from(at.index)) };
            self.taken.push(d);
            at = at.advance(1, self.size);
            if d.second & F_NEXT == 0 {
                break;
            }
            if self.taken.len() == usize::from(self.size).min(MAX_DESCRIPTORS) {
                return Err(Broken::TooLong(self.taken.len()));
            }
        }
        let taken = std::mem::take(&mut self.taken);
        let read = self.read(&taken, chain);
        self.taken = taken;
        read?;
        let id = self.taken.last().map_or(0, |d| d.first);
        self.avail = at;
        Ok(Some(Taken { id, count: self.taken.len() as u16 }))
    }

    /// Translates the descriptors of a chain.
    ///
    /// # Errors
    /// As [`PackedRing::take`].
    pub fn read(&self, descriptors: &[Descriptor], chain: &mut Chain) -> Result<(), Broken> {
        chain.clear();
        for d in descriptors {
            if d.second & F_INDIRECT == 0 {
                chain.add(&self.memory, d.addr, d.len, d.second)?;
            } else if !self.config.indirect {
                return Err(Broken::Indirect("not negotiated"));
            } else if descriptors.len() > 1 {
                return Err(Broken::Indirect("part of a chain"));
            } else {
                chain.add_table(&self.memory, d.addr, d.len, true)?;
            }
        }
        Ok(())
    }

    /// Fills the next used entry. The driver sees none of a batch before [`PackedRing::show`]: it looks at entries in
    /// order, and the flags of the first are written then.
    #[inline]
    pub fn push_used(&mut self, taken: Taken, len: u32) {
        let place = self.used;
        // SAFETY: `place` is inside the ring, which `self.memory` keeps mapped; aligned to 16, so to 8. The address
        // field of a used entry means nothing.
        unsafe {
            let entry = self.desc.add(usize::from(place.index) * DESC_LEN as usize);
            entry.add(8).cast::<u32>().write_volatile(len);
            entry.add(12).cast::<u16>().write_volatile(taken.id);
        }
        let flags = place.used() | if len > 0 { F_WRITE } else { 0 };
        if self.unpublished == 0 {
            self.first_flags = Some(flags);
        } else {
            self.flags_at(place.index).store(flags, Ordering::Release);
        }
        self.unpublished += taken.count;
        self.used = place.advance(taken.count, self.size);
    }

    /// Entries of the ring that were used and that the driver does not see yet.
    #[inline]
    pub fn unpublished(&self) -> u16 {
        self.unpublished
    }

    /// Entries of the ring that were used since the last [`PackedRing::publish`].
    #[inline]
    pub fn unannounced(&self) -> u16 {
        self.unannounced.saturating_add(self.unpublished)
    }

    /// Shows a driver that polls what was used; [`PackedRing::publish`] follows in the same turn.
    #[inline]
    pub fn show(&mut self) {
        if let Some(flags) = self.first_flags.take() {
            self.flags_at(self.published.index).store(flags, Ordering::Release);
        }
        self.unannounced = self.unannounced();
        self.unpublished = 0;
        self.published = self.used;
    }

    /// Shows the driver what was used. True: it wants an interrupt for what came since it was last asked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.show();
        let count = std::mem::take(&mut self.unannounced);
        fence(Ordering::SeqCst);
        // SAFETY: `struct pvirtq_event_suppress` located in `new`: 4 bytes, aligned to 4, kept mapped.
        let event = unsafe { AtomicU32::from_ptr(self.driver.cast()) }.load(Ordering::Relaxed);
        let (event, flags) = (event as u16, event >> 16);
        match flags & 3 {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.config.event_idx => {
                let place = Place::from_bits(event);
                let behind = if place.wrap == self.used.wrap { 0 } else { self.size };
                need_event(place.index.wrapping_sub(behind), self.used.index, count)
            }
            _ => true,
        }
    }

    /// Asks the driver not to kick.
    pub fn disable_kicks(&mut self) {
        self.device_event().store(VRING_PACKED_EVENT_FLAG_DISABLE << 16, Ordering::Relaxed);
    }

    /// Asks the driver to kick for whatever comes next. True: something came meanwhile.
    pub fn enable_kicks(&mut self) -> bool {
        let wish = match self.config.event_idx {
            true => u32::from(self.avail.bits()) | VRING_PACKED_EVENT_FLAG_DESC << 16,
            false => VRING_PACKED_EVENT_FLAG_ENABLE << 16,
        };
        self.device_event().store(wish, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.is_available(self.avail)
    }

    fn device_event(&self) -> &AtomicU32 {
        // SAFETY: as the driver's structure in `publish`.
        unsafe { AtomicU32::from_ptr(self.device.cast()) }
    }
}
