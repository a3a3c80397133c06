//! Requests in flight, in memory that the front end keeps while this process is restarted (vhost-user specification,
//! "Inflight I/O tracking").
//!
//! Each write here is volatile: a process killed between two of them has done all before and none behind, which is what
//! the order of the steps is made for. The front end can write here as well, so what is read is checked; while running,
//! nothing is read.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use iobuf::{MapError, Region};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::chain::{Broken, Descriptor, MAX_DESCRIPTORS};
use crate::ring::packed::{PackedRing, Place, Taken};
use crate::ring::split::SplitRing;

/// Queues start on cache lines.
const ALIGN: usize = 64;
const SPLIT_HEADER: usize = 16;
const SPLIT_ENTRY: usize = 16;
const PACKED_HEADER: usize = 32;
const PACKED_ENTRY: usize = 32;
const VERSION: u16 = 1;
/// Behind the queues, where the specification has nothing: what else a restarted process has to know. A number, or anything
/// else if no process of this kind has been there.
const WRITE_THROUGH: u64 = u64::from_le_bytes(*b"RNBDwce0");
const WRITE_BACK: u64 = u64::from_le_bytes(*b"RNBDwce1");

/// The memory of all queues of a device.
#[derive(Clone, Debug)]
pub struct InflightArea {
    region: Arc<Region>,
    queues: u16,
    queue_size: u16,
    /// Bytes: as much as the front end says there are.
    len: u64,
}

/// Why there is no such memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AreaError {
    /// Dimensions.
    #[error("in-flight memory for {queues} queues of {size} entries")]
    Dimensions {
        /// Asked for.
        queues: u16,
        /// Asked for.
        size: u16,
    },
    /// Too small for the dimensions.
    #[error("in-flight memory of {got} bytes; {want} are needed")]
    Small {
        /// Given.
        got: u64,
        /// Needed.
        want: usize,
    },
    /// Whoever touches it might wait for somebody else.
    #[error("in-flight memory in a file of no file system whose pages come at once; {}", crate::file::WANTED)]
    NotLocal,
    /// Mapping.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A system call.
    #[error("in-flight memory: {0}")]
    System(#[from] rustix::io::Errno),
}

/// Bytes of one queue: enough for either kind of ring.
fn queue_len(queue_size: u16) -> usize {
    (PACKED_HEADER + PACKED_ENTRY * usize::from(queue_size)).next_multiple_of(ALIGN)
}

fn area_len(queues: u16, queue_size: u16) -> Result<usize, AreaError> {
    if queues == 0 || queue_size == 0 || queue_size > 32768 || queues > 1024 {
        return Err(AreaError::Dimensions { queues, size: queue_size });
    }
    Ok(queue_len(queue_size) * usize::from(queues))
}

impl InflightArea {
    /// New memory (GET_INFLIGHT_FD), with its descriptor and length for the front end.
    ///
    /// # Errors
    /// Dimensions, or the system's refusal.
    pub fn create(queues: u16, queue_size: u16) -> Result<(Self, OwnedFd, usize), AreaError> {
        let len = (area_len(queues, queue_size)? + size_of::<u64>()).next_multiple_of(iobuf::PAGE_SIZE);
        let fd = rustix::fs::memfd_create("vhost-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        let region = Region::shared(fd.as_fd(), 0, len)?;
        Ok((Self { region, queues, queue_size, len: len as u64 }, fd, len))
    }

    /// Memory that the front end kept (SET_INFLIGHT_FD).
    ///
    /// # Errors
    /// Too small, or the system's refusal.
    pub fn open(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, AreaError> {
        let want = area_len(queues, queue_size)?;
        if len < want as u64 {
            return Err(AreaError::Small { got: len, want });
        }
        if !crate::file::is_local(fd)? {
            return Err(AreaError::NotLocal);
        }
        let mapped = (want + size_of::<u64>()).min(len as usize).next_multiple_of(iobuf::PAGE_SIZE);
        Ok(Self { region: Region::shared(fd, offset, mapped)?, queues, queue_size, len })
    }

    /// Notes whether completed writes may be in a cache.
    pub(crate) fn set_write_back(&self, write_back: bool) {
        if let Some(at) = self.cache_mode() {
            let value = if write_back { WRITE_BACK } else { WRITE_THROUGH };
            // SAFETY: inside the region and aligned, by `cache_mode`; any bytes are a number.
            unsafe { at.write_volatile(value) };
        }
    }

    /// What was noted by whoever used the memory before; `None` if nobody did.
    pub(crate) fn write_back(&self) -> Option<bool> {
        // SAFETY: as in `set_write_back`.
        match unsafe { self.cache_mode()?.read_volatile() } {
            WRITE_BACK => Some(true),
            WRITE_THROUGH => Some(false),
            _ => None,
        }
    }

    /// Where that is; `None` if the memory is no longer than its queues, as of other back ends.
    fn cache_mode(&self) -> Option<*mut u64> {
        let at = queue_len(self.queue_size) * usize::from(self.queues);
        let end = at + size_of::<u64>();
        // Queues are a multiple of 64 bytes, regions start with a page.
        (end as u64 <= self.len && end <= self.region.len())
            .then(|| self.region.as_ptr().wrapping_add(at).cast())
    }

    /// As [`crate::memory::GuestMemory::is_lost`].
    pub(crate) fn is_lost(&self) -> bool {
        self.region.is_lost()
    }

    /// The part of queue `index`, whose ring has `size` entries.
    pub(crate) fn queue(&self, index: u16, size: u32) -> Result<Part, Broken> {
        if index >= self.queues {
            return Err(Broken::InflightArea("it has fewer queues"));
        }
        if size > u32::from(self.queue_size) {
            return Err(Broken::InflightArea("its queues have fewer entries"));
        }
        let offset = queue_len(self.queue_size) * usize::from(index);
        Ok(Part { region: self.region.clone(), offset, size: size as u16 })
    }
}

/// The memory of one queue.
#[derive(Debug)]
pub(crate) struct Part {
    region: Arc<Region>,
    offset: usize,
    size: u16,
}

impl Part {
    #[inline]
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        debug_assert!(offset + len <= queue_len(self.size));
        self.region.as_ptr().wrapping_add(self.offset + offset)
    }

    #[inline]
    fn put<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: fields of the structures below, for an entry below `size`: inside the queue's part of the region,
        // which `area_len` made large enough; `put` and `take` are private to them. Aligned, because parts and entries
        // are.
        unsafe { self.at(offset, size_of::<T>()).cast::<T>().write_volatile(value) };
    }

    #[inline]
    fn take<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: as in `put`; any bytes are a number.
        unsafe { self.at(offset, size_of::<T>()).cast::<T>().read_volatile() }
    }

    /// Whether it has been used by a former process, for a queue like this one.
    fn is_initialised(&self) -> Result<bool, Broken> {
        match (self.take::<u16>(8), self.take::<u16>(10)) {
            (0, _) => Ok(false),
            (VERSION, size) if size == self.size => Ok(true),
            (VERSION, _) => Err(Broken::InflightArea("it was for a ring of another size")),
            _ => Err(Broken::InflightArea("its version is unknown")),
        }
    }

    fn initialise(&self) {
        self.put(0, 0u64);
        self.put(10, self.size);
        self.put(8, VERSION);
    }
}

// ---- split: struct QueueRegionSplit { features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16,
//      desc [DescStateSplit { inflight u8, padding [u8; 5], next u16, counter u64 }] }

const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;

/// Requests in flight of a split ring.
#[derive(Debug)]
pub(crate) struct SplitInflight {
    part: Part,
    counter: u64,
    last_batch_head: u16,
    batch: Vec<u16>,
}

fn split(head: u16, field: usize) -> usize {
    SPLIT_HEADER + SPLIT_ENTRY * usize::from(head) + field
}

impl SplitInflight {
    /// Finds what a former process left undone: heads in the order in which they came. Moves `ring` behind them.
    pub(crate) fn recover(part: Part, ring: &mut SplitRing) -> Result<(Self, Vec<u16>), Broken> {
        let size = part.size;
        let batch = Vec::with_capacity(size.into());
        let mut this = Self { part, counter: 0, last_batch_head: 0, batch };
        let used = ring.published();
        let unknown = match this.part.is_initialised()? {
            true => used.wrapping_sub(this.part.take::<u16>(USED_IDX)),
            false => u16::MAX,
        };
        if unknown > size {
            // New memory, or a ring that was set up anew without it: nothing in it is of this ring.
            this.clear(used);
            return Ok((this, Vec::new()));
        }
        this.last_batch_head = this.part.take(LAST_BATCH_HEAD);
        this.end_last_batch(unknown, used);
        let mut found: Vec<(u64, u16)> = (0..size)
            .filter(|head| this.part.take::<u8>(split(*head, 0)) == 1)
            .map(|head| (this.part.take::<u64>(split(head, 8)), head))
            .collect();
        found.sort_unstable();
        this.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        // All chains that were taken are either used or in flight.
        ring.set_last_avail(used.wrapping_add(found.len() as u16));
        Ok((this, found.into_iter().map(|(_, head)| head).collect()))
    }

    fn clear(&mut self, used: u16) {
        (0..self.part.size).for_each(|head| self.part.put(split(head, 0), 0u8));
        self.part.put(LAST_BATCH_HEAD, 0u16);
        self.part.put(USED_IDX, used);
        self.part.initialise();
    }

    /// The former process may have died between showing a batch to the driver and noting so.
    fn end_last_batch(&mut self, count: u16, used: u16) {
        let mut head = self.last_batch_head;
        for _ in 0..count {
            if head >= self.part.size {
                break;
            }
            self.part.put(split(head, 0), 0u8);
            head = self.part.take(split(head, 6));
        }
        self.part.put(USED_IDX, used);
    }

    /// `head` was taken.
    #[inline]
    pub(crate) fn taken(&mut self, head: u16) {
        self.part.put(split(head, 8), self.counter);
        self.part.put(split(head, 0), 1u8);
        self.counter = self.counter.wrapping_add(1);
    }

    /// `head` is about to be used.
    #[inline]
    pub(crate) fn using(&mut self, head: u16) {
        self.part.put(split(head, 6), self.last_batch_head);
        self.part.put(LAST_BATCH_HEAD, head);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    /// The driver sees that these are used.
    #[inline]
    pub(crate) fn used(&mut self, used: u16) {
        for head in self.batch.drain(..) {
            self.part.put(split(head, 0), 0u8);
        }
        self.part.put(USED_IDX, used);
    }
}

// ---- packed: struct QueueRegionPacked { features u64, version u16, desc_num u16, free_head u16, old_free_head u16,
//      used_idx u16, old_used_idx u16, used_wrap_counter u8, old_used_wrap_counter u8, padding,
//      desc [DescStatePacked { inflight u8, padding u8, next u16, last u16, num u16, counter u64,
//                              id u16, flags u16, len u32, addr u64 }] }

const FREE_HEAD: usize = 12;
const OLD_FREE_HEAD: usize = 14;
const P_USED_IDX: usize = 16;
const OLD_USED_IDX: usize = 18;
const P_USED_WRAP: usize = 20;
const OLD_USED_WRAP: usize = 21;

const CONTRADICTION: Broken = Broken::InflightArea("its lists contradict each other");

const NEXT: usize = 2;
const LAST: usize = 4;
const NUM: usize = 6;
const COUNTER: usize = 8;
const ID: usize = 16;
const FLAGS: usize = 18;
const LEN: usize = 20;
const ADDR: usize = 24;

fn packed(entry: u16, field: usize) -> usize {
    PACKED_HEADER + PACKED_ENTRY * usize::from(entry) + field
}

/// Requests in flight of a packed ring. The driver's descriptors are kept as well: used entries overwrite them.
#[derive(Debug)]
pub(crate) struct PackedInflight {
    part: Part,
    counter: u64,
    /// The list of free entries; the shared one is only written.
    next: Vec<u16>,
    free_head: u16,
    used: Place,
    batch: Vec<u16>,
}

/// A request of a former process.
#[derive(Debug)]
pub(crate) struct Undone {
    pub(crate) entry: u16,
    pub(crate) taken: Taken,
    pub(crate) descriptors: Vec<Descriptor>,
}

impl PackedInflight {
    /// Finds what a former process left undone, in the order in which it came. Moves `ring` behind it.
    pub(crate) fn recover(part: Part, ring: &mut PackedRing) -> Result<(Self, Vec<Undone>), Broken> {
        let size = part.size;
        let mut this = Self {
            part,
            counter: 0,
            next: (1..=size).collect(),
            free_head: 0,
            used: ring.used(),
            batch: Vec::with_capacity(size.into()),
        };
        if !this.part.is_initialised()? {
            this.clear();
            return Ok((this, Vec::new()));
        }
        this.settle_last_batch(ring)?;
        // Each entry is in one list: then no later step finds a list other than as this process made it.
        let mut seen = vec![false; size.into()];
        let free = this.read_free_list(&mut seen)?;
        let undone = this.read_undone(&mut seen)?;
        let entries: usize = undone.iter().map(|u| usize::from(u.taken.count)).sum();
        if free + entries != usize::from(size) {
            return Err(CONTRADICTION);
        }
        let avail = this.used.advance(entries as u16, size);
        ring.set_places(avail, this.used);
        Ok((this, undone))
    }

    fn clear(&mut self) {
        let size = self.part.size;
        for entry in 0..size {
            self.part.put(packed(entry, 0), 0u8);
            self.part.put(packed(entry, NEXT), self.next[usize::from(entry)]);
        }
        for (at, value) in [
            (FREE_HEAD, 0),
            (OLD_FREE_HEAD, 0),
            (P_USED_IDX, self.used.index),
            (OLD_USED_IDX, self.used.index),
        ] {
            self.part.put(at, value);
        }
        self.part.put(P_USED_WRAP, u8::from(self.used.wrap));
        self.part.put(OLD_USED_WRAP, u8::from(self.used.wrap));
        self.part.initialise();
    }

    fn place(&self, index: usize, wrap: usize) -> Result<Place, Broken> {
        let place = Place { index: self.part.take(index), wrap: self.part.take::<u8>(wrap) != 0 };
        if place.index < self.part.size {
            Ok(place)
        } else {
            Err(Broken::InflightArea("its used index is too large"))
        }
    }

    /// A batch counts if the driver can see it, else it is taken back.
    fn settle_last_batch(&mut self, ring: &PackedRing) -> Result<(), Broken> {
        let new = self.place(P_USED_IDX, P_USED_WRAP)?;
        let old = self.place(OLD_USED_IDX, OLD_USED_WRAP)?;
        let seen = new != old && !ring.still_available(old);
        self.used = if seen { new } else { old };
        self.free_head = self.part.take(if seen { FREE_HEAD } else { OLD_FREE_HEAD });
        self.commit();
        Ok(())
    }

    fn commit(&self) {
        self.part.put(FREE_HEAD, self.free_head);
        self.part.put(P_USED_IDX, self.used.index);
        self.part.put(P_USED_WRAP, u8::from(self.used.wrap));
        self.settle();
    }

    fn settle(&self) {
        self.part.put(OLD_FREE_HEAD, self.free_head);
        self.part.put(OLD_USED_IDX, self.used.index);
        self.part.put(OLD_USED_WRAP, u8::from(self.used.wrap));
    }

    /// Takes the list of free entries over; what is free is not in flight. Returns its length.
    fn read_free_list(&mut self, seen: &mut [bool]) -> Result<usize, Broken> {
        let (mut at, mut count) = (self.free_head, 0);
        while let Some(seen) = seen.get_mut(usize::from(at)) {
            if std::mem::replace(seen, true) {
                return Err(CONTRADICTION);
            }
            self.part.put(packed(at, 0), 0u8);
            let next = self.part.take(packed(at, NEXT));
            self.next[usize::from(at)] = next;
            (at, count) = (next, count + 1);
        }
        Ok(count)
    }

    fn read_undone(&mut self, seen: &mut [bool]) -> Result<Vec<Undone>, Broken> {
        let mut found: Vec<(u64, u16)> = (0..self.part.size)
            .filter(|e| self.part.take::<u8>(packed(*e, 0)) == 1)
            .map(|e| (self.part.take::<u64>(packed(e, COUNTER)), e))
            .collect();
        found.sort_unstable();
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        found.into_iter().map(|(_, entry)| self.read_one(entry, seen)).collect()
    }

    fn read_one(&mut self, entry: u16, seen: &mut [bool]) -> Result<Undone, Broken> {
        let count: u16 = self.part.take(packed(entry, NUM));
        if count == 0 || usize::from(count) > MAX_DESCRIPTORS.min(self.part.size.into()) {
            return Err(Broken::InflightArea("a chain has an impossible length"));
        }
        let mut descriptors = Vec::with_capacity(count.into());
        let mut at = entry;
        for i in 0..count {
            match seen.get_mut(usize::from(at)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(CONTRADICTION),
            }
            descriptors.push(Descriptor {
                addr: self.part.take(packed(at, ADDR)),
                len: self.part.take(packed(at, LEN)),
                first: self.part.take(packed(at, ID)),
                second: self.part.take(packed(at, FLAGS)),
            });
            if i + 1 < count {
                let next = self.part.take(packed(at, NEXT));
                self.next[usize::from(at)] = next;
                at = next;
            }
        }
        self.part.put(packed(entry, LAST), at);
        let id = descriptors[descriptors.len() - 1].first;
        Ok(Undone { entry, taken: Taken { id, count }, descriptors })
    }

    /// A chain was taken. Returns its entry, for [`PackedInflight::using`].
    #[inline]
    pub(crate) fn taken(&mut self, descriptors: &[Descriptor]) -> Option<u16> {
        let entry = self.free_head;
        let mut at = entry;
        let mut last = entry;
        for d in descriptors {
            if at >= self.part.size {
                return None;
            }
            self.part.put(packed(at, ADDR), d.addr);
            self.part.put(packed(at, LEN), d.len);
            self.part.put(packed(at, ID), d.first);
            self.part.put(packed(at, FLAGS), d.second);
            last = at;
            at = self.next[usize::from(at)];
        }
        self.part.put(packed(entry, NUM), descriptors.len() as u16);
        self.part.put(packed(entry, LAST), last);
        self.part.put(packed(entry, COUNTER), self.counter);
        self.part.put(packed(entry, 0), 1u8);
        self.counter = self.counter.wrapping_add(1);
        self.free_head = at;
        self.part.put(FREE_HEAD, at);
        self.part.put(OLD_FREE_HEAD, at);
        Some(entry)
    }

    /// The chain of `entry` is about to be used.
    #[inline]
    pub(crate) fn using(&mut self, entry: u16, count: u16) {
        let mut last = entry;
        for _ in 1..count {
            last = self.next[usize::from(last)];
        }
        self.next[usize::from(last)] = self.free_head;
        self.part.put(packed(last, NEXT), self.free_head);
        self.free_head = entry;
        self.part.put(FREE_HEAD, entry);
        self.used = self.used.advance(count, self.part.size);
        self.batch.push(entry);
    }

    /// The batch is complete, and the driver will see it next.
    #[inline]
    pub(crate) fn before_publish(&mut self) {
        self.part.put(P_USED_IDX, self.used.index);
        self.part.put(P_USED_WRAP, u8::from(self.used.wrap));
    }

    /// The driver sees it.
    #[inline]
    pub(crate) fn used(&mut self) {
        for entry in self.batch.drain(..) {
            self.part.put(packed(entry, 0), 0u8);
        }
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestMemory, RegionSpec};
    use crate::ring::RingConfig;

    const SIZE: u16 = 16;

    fn memory() -> Arc<GuestMemory> {
        let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        let spec = RegionSpec { guest_addr: 0, size: 4096, user_addr: 0, mmap_offset: 0 };
        let table = [(spec, fd.as_fd())];
        Arc::new(GuestMemory::map(&iobuf::Registry::new(), &GuestMemory::default(), &table).unwrap())
    }

    fn config(packed: bool) -> RingConfig {
        RingConfig { size: SIZE.into(), avail: 512, used: 1024, packed, ..RingConfig::default() }
    }

    fn packed_ring() -> PackedRing {
        PackedRing::new(config(true), memory(), 0x8000_8000).unwrap()
    }

    /// A process that took chains of these lengths from a packed ring and died.
    fn packed_area(chains: &[usize]) -> InflightArea {
        let (area, _, _) = InflightArea::create(1, SIZE).unwrap();
        let (mut track, undone) =
            PackedInflight::recover(area.queue(0, SIZE.into()).unwrap(), &mut packed_ring()).unwrap();
        assert!(undone.is_empty());
        for len in chains {
            track.taken(&vec![Descriptor::default(); *len]).unwrap();
        }
        area
    }

    fn recover_packed(area: &InflightArea) -> Result<(PackedInflight, Vec<Undone>), Broken> {
        PackedInflight::recover(area.queue(0, SIZE.into()).unwrap(), &mut packed_ring())
    }

    fn set_free_head(part: &Part, head: u16) {
        part.put(FREE_HEAD, head);
        part.put(OLD_FREE_HEAD, head);
    }

    /// The numbers of entries add up, but what uses a chain would have followed a link of the free list.
    #[test]
    fn a_free_entry_is_in_no_chain() {
        let area = packed_area(&[3]);
        let part = area.queue(0, SIZE.into()).unwrap();
        set_free_head(&part, 1);
        part.put(packed(13, NEXT), 20u16);
        assert_eq!(recover_packed(&area).unwrap_err(), CONTRADICTION);
    }

    #[test]
    fn a_free_list_has_an_end() {
        let area = packed_area(&[]);
        let part = area.queue(0, SIZE.into()).unwrap();
        part.put(packed(15, NEXT), 3u16);
        assert_eq!(recover_packed(&area).unwrap_err(), CONTRADICTION);
    }

    #[test]
    fn chains_share_no_entries() {
        let area = packed_area(&[2, 2]);
        area.queue(0, SIZE.into()).unwrap().put(packed(2, NEXT), 1u16);
        assert_eq!(recover_packed(&area).unwrap_err(), CONTRADICTION);
    }

    #[test]
    fn what_was_taken_is_found_in_order() {
        let area = packed_area(&[3, 1, 2]);
        let (mut track, undone) = recover_packed(&area).unwrap();
        let found: Vec<_> = undone.iter().map(|u| (u.entry, u.taken.count)).collect();
        assert_eq!(found, [(0, 3), (3, 1), (4, 2)]);
        // The other ten are free, and what is given back is free again.
        assert!(track.taken(&[Descriptor::default(); 10]).is_some());
        assert!(track.taken(&[Descriptor::default()]).is_none());
        track.using(0, 3);
        assert!(track.taken(&[Descriptor::default(); 3]).is_some());
    }

    /// Whoever writes the area can write any number.
    #[test]
    fn counters_may_be_at_their_end() {
        let area = packed_area(&[1]);
        area.queue(0, SIZE.into()).unwrap().put(packed(0, COUNTER), u64::MAX - 1);
        let (mut track, undone) = recover_packed(&area).unwrap();
        assert_eq!(undone.len(), 1);
        track.taken(&[Descriptor::default()]).unwrap();

        let (area, _, _) = InflightArea::create(1, SIZE).unwrap();
        let part = || area.queue(0, SIZE.into()).unwrap();
        let mut ring = SplitRing::new(config(false), memory(), 0).unwrap();
        SplitInflight::recover(part(), &mut ring).unwrap().0.taken(5);
        part().put(split(5, 8), u64::MAX - 1);
        let (mut track, heads) = SplitInflight::recover(part(), &mut ring).unwrap();
        assert_eq!(heads, [5]);
        track.taken(6);
    }
}
