//! Driver side of both kinds of virtqueue (virtio 1.2 sections 2.7, 2.8).

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use crate::ram::Ram;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buf {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it.
    pub write: bool,
}

/// Guest addresses of a ring's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddrs {
    /// Descriptor table or packed ring.
    pub desc: u64,
    /// Available ring or driver event suppression.
    pub avail: u64,
    /// Used ring or device event suppression.
    pub used: u64,
}

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const P_AVAIL: u16 = 1 << 7;
const P_USED: u16 = 1 << 15;

/// A driver's ring.
#[derive(Debug)]
pub struct DriverRing {
    /// Where it is.
    pub addrs: RingAddrs,
    size: u16,
    packed: bool,
    event_idx: bool,
    desc: *mut u8,
    avail: *mut u8,
    used: *mut u8,
    /// Split: free descriptors, linked by `next`. Packed: free ids.
    free: Vec<u16>,
    /// Descriptors of the chain with this head or id.
    chains: Vec<Vec<u16>>,
    counts: Vec<u16>,
    /// Split: next avail index. Packed: next entry.
    avail_idx: u16,
    avail_wrap: bool,
    /// The device has been told of those before.
    told: u16,
    told_wrap: bool,
    used_idx: u16,
    used_wrap: bool,
    entries_free: u16,
    /// First entry of what is to be published (packed), with its flags.
    first: Option<(u16, u16)>,
}

impl DriverRing {
    /// A ring of `size` entries in new memory of `ram`.
    pub fn new(ram: &mut Ram, size: u16, packed: bool, event_idx: bool) -> Self {
        let n = usize::from(size);
        let (avail_len, used_len) = if packed { (4, 4) } else { (6 + 2 * n, 6 + 8 * n) };
        let addrs = RingAddrs {
            desc: ram.alloc(16 * n, 4096),
            avail: ram.alloc(avail_len, 64),
            used: ram.alloc(used_len, 64),
        };
        Self {
            addrs,
            size,
            packed,
            event_idx,
            desc: ram.ptr(addrs.desc, 16 * n),
            avail: ram.ptr(addrs.avail, avail_len),
            used: ram.ptr(addrs.used, used_len),
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); n],
            counts: vec![0; n],
            avail_idx: 0,
            avail_wrap: true,
            told: 0,
            told_wrap: true,
            used_idx: 0,
            used_wrap: true,
            entries_free: size,
            first: None,
        }
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptors that are not in use.
    pub fn room(&self) -> u16 {
        self.entries_free
    }

    fn write_desc(&self, at: *mut u8, addr: u64, len: u32, first: u16, second: u16) {
        // SAFETY: callers name a descriptor inside the ring, or an indirect table, in the guest's memory.
        unsafe {
            at.cast::<u64>().write_volatile(addr);
            at.add(8).cast::<u32>().write_volatile(len);
            at.add(12).cast::<u16>().write_volatile(first);
            at.add(14).cast::<u16>().write_volatile(second);
        }
    }

    fn entry(&self, index: u16) -> *mut u8 {
        assert!(index < self.size);
        self.desc.wrapping_add(16 * usize::from(index))
    }

    fn word(&self, base: *mut u8, offset: usize) -> &AtomicU16 {
        // SAFETY: fields of the rings made in `new`, aligned to 2, shared with the device only as atomics.
        unsafe { AtomicU16::from_ptr(base.wrapping_add(offset).cast()) }
    }

    /// Writes an indirect table at guest address `table` and returns the one buffer that stands for the chain.
    pub fn write_table(&self, ram: &Ram, table: u64, bufs: &[Buf]) -> Buf {
        for (i, buf) in bufs.iter().enumerate() {
            let more = i + 1 < bufs.len();
            let flags = if buf.write { F_WRITE } else { 0 } | if more && !self.packed { F_NEXT } else { 0 };
            let (first, second) = if self.packed { (0, flags) } else { (flags, i as u16 + 1) };
            self.write_desc(ram.ptr(table + 16 * i as u64, 16), buf.addr, buf.len, first, second);
        }
        Buf { addr: table, len: 16 * bufs.len() as u32, write: false }
    }

    /// Adds a chain of buffers; `indirect`: the one buffer is a table. Returns what [`DriverRing::pop`] will call it,
    /// `None` if the ring is full. The device does not see it before [`DriverRing::publish`].
    pub fn add(&mut self, bufs: &[Buf], indirect: bool) -> Option<u16> {
        if usize::from(self.entries_free) < bufs.len() || bufs.is_empty() {
            return None;
        }
        self.entries_free -= bufs.len() as u16;
        let extra = if indirect { F_INDIRECT } else { 0 };
        if self.packed { self.add_packed(bufs, extra) } else { self.add_split(bufs, extra) }
    }

    fn add_split(&mut self, bufs: &[Buf], extra: u16) -> Option<u16> {
        let from = self.free.len() - bufs.len();
        let head = *self.free.last()?;
        let mut chain = std::mem::take(&mut self.chains[usize::from(head)]);
        chain.clear();
        chain.extend(self.free.drain(from..).rev());
        for (i, buf) in bufs.iter().enumerate() {
            let next = chain.get(i + 1).copied();
            let flags = extra | if buf.write { F_WRITE } else { 0 } | if next.is_some() { F_NEXT } else { 0 };
            self.write_desc(self.entry(chain[i]), buf.addr, buf.len, flags, next.unwrap_or(0));
        }
        self.chains[usize::from(head)] = chain;
        self.put_avail(head);
        Some(head)
    }

    /// Makes `head` available, whatever it is.
    pub fn put_avail(&mut self, head: u16) {
        let offset = 4 + 2 * (usize::from(self.avail_idx) % usize::from(self.size));
        self.word(self.avail, offset).store(head, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    fn add_packed(&mut self, bufs: &[Buf], extra: u16) -> Option<u16> {
        let id = self.free.pop()?;
        self.counts[usize::from(id)] = bufs.len() as u16;
        for (i, buf) in bufs.iter().enumerate() {
            let next = if i + 1 < bufs.len() { F_NEXT } else { 0 };
            let phase = if self.avail_wrap { P_AVAIL } else { P_USED };
            let flags = extra | next | phase | if buf.write { F_WRITE } else { 0 };
            let entry = self.entry(self.avail_idx);
            if self.first.is_none() {
                // Its flags come last, and with them all that follows.
                self.first = Some((self.avail_idx, flags));
                // SAFETY: as in `write_desc`; the flags are left as they are.
                unsafe {
                    entry.cast::<u64>().write_volatile(buf.addr);
                    entry.add(8).cast::<u32>().write_volatile(buf.len);
                    entry.add(12).cast::<u16>().write_volatile(id);
                }
            } else {
                self.write_desc(entry, buf.addr, buf.len, id, flags);
            }
            self.avail_idx += 1;
            if self.avail_idx == self.size {
                (self.avail_idx, self.avail_wrap) = (0, !self.avail_wrap);
            }
        }
        Some(id)
    }

    /// Shows the device what was added. True: it wants a kick.
    pub fn publish(&mut self) -> bool {
        if self.packed { self.publish_packed() } else { self.publish_split() }
    }

    fn publish_split(&mut self) -> bool {
        let count = self.avail_idx.wrapping_sub(self.told);
        self.told = self.avail_idx;
        self.word(self.avail, 2).store(self.avail_idx, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.word(self.used, 4 + 8 * usize::from(self.size)).load(Ordering::Relaxed);
            return self.avail_idx.wrapping_sub(event).wrapping_sub(1) < count;
        }
        self.word(self.used, 0).load(Ordering::Relaxed) & 1 == 0
    }

    fn publish_packed(&mut self) -> bool {
        let Some((first, flags)) = self.first.take() else { return false };
        self.word(self.entry(first), 14).store(flags, Ordering::Release);
        fence(Ordering::SeqCst);
        let mut count = self.avail_idx.wrapping_sub(self.told);
        if self.avail_wrap != self.told_wrap || count > self.size {
            count = count.wrapping_add(self.size);
        }
        (self.told, self.told_wrap) = (self.avail_idx, self.avail_wrap);
        // SAFETY: the device's event suppression, 4 bytes, aligned.
        let event = unsafe { AtomicU32::from_ptr(self.used.cast()) }.load(Ordering::Relaxed);
        let (place, flags) = (event as u16, event >> 16);
        match flags {
            1 => false,
            2 => {
                let (index, wrap) = (place & 0x7fff, place >> 15 == 1);
                let index = if wrap == self.avail_wrap { index } else { index.wrapping_sub(self.size) };
                self.avail_idx.wrapping_sub(index).wrapping_sub(1) < count
            }
            _ => true,
        }
    }

    /// The next chain that the device has used: head or id, and bytes written.
    ///
    /// # Panics
    /// If the device names one that is not in flight.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        let (id, len) = if self.packed { self.pop_packed()? } else { self.pop_split()? };
        if self.packed {
            let count = std::mem::take(&mut self.counts[usize::from(id)]);
            assert!(count > 0, "the device used buffer {id}, which it did not have");
            self.entries_free += count;
            self.used_idx += count;
            if self.used_idx >= self.size {
                (self.used_idx, self.used_wrap) = (self.used_idx - self.size, !self.used_wrap);
            }
            self.free.push(id);
        } else {
            let chain = &mut self.chains[usize::from(id)];
            assert!(!chain.is_empty(), "the device used chain {id}, which it did not have");
            self.entries_free += chain.len() as u16;
            self.free.extend(chain.drain(..).rev());
        }
        Some((id, len))
    }

    fn pop_split(&mut self) -> Option<(u16, u32)> {
        if self.word(self.used, 2).load(Ordering::Acquire) == self.used_idx {
            return None;
        }
        let at = self.used.wrapping_add(4 + 8 * (usize::from(self.used_idx) % usize::from(self.size)));
        // SAFETY: an entry of the used ring, aligned to 4.
        let (id, len) =
            unsafe { (at.cast::<u32>().read_volatile(), at.add(4).cast::<u32>().read_volatile()) };
        self.used_idx = self.used_idx.wrapping_add(1);
        Some((id as u16, len))
    }

    fn pop_packed(&mut self) -> Option<(u16, u32)> {
        let entry = self.entry(self.used_idx);
        let flags = self.word(entry, 14).load(Ordering::Acquire);
        let (avail, used) = (flags & P_AVAIL != 0, flags & P_USED != 0);
        if avail != used || used != self.used_wrap {
            return None;
        }
        // SAFETY: an entry of the ring, aligned to 16.
        let (id, len) = unsafe {
            (entry.add(12).cast::<u16>().read_volatile(), entry.add(8).cast::<u32>().read_volatile())
        };
        Some((id, len))
    }

    /// SET_VRING_BASE of a ring with nothing in flight: what the driver has seen used, the device goes on behind.
    pub fn base(&self) -> u32 {
        let place = u32::from(self.used_idx);
        if !self.packed {
            return place;
        }
        let place = place | u32::from(self.used_wrap) << 15;
        place | place << 16
    }

    /// Asks for no interrupts.
    pub fn disable_calls(&self) {
        if self.packed {
            // SAFETY: the driver's event suppression, 4 bytes, aligned.
            unsafe { AtomicU32::from_ptr(self.avail.cast()) }.store(1 << 16, Ordering::Relaxed);
        } else if self.event_idx {
            // An index that was passed just now comes round again last.
            let offset = 4 + 2 * usize::from(self.size);
            self.word(self.avail, offset).store(self.used_idx.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.word(self.avail, 0).store(1, Ordering::Relaxed);
        }
    }

    /// Asks for an interrupt with the next used chain.
    pub fn enable_calls(&self) {
        if self.packed {
            let wrap = if self.used_wrap { 1 << 15 } else { 0 };
            let wish = if self.event_idx { u32::from(self.used_idx | wrap) | 2 << 16 } else { 0 };
            // SAFETY: as in `disable_calls`.
            unsafe { AtomicU32::from_ptr(self.avail.cast()) }.store(wish, Ordering::Relaxed);
        } else if self.event_idx {
            let offset = 4 + 2 * usize::from(self.size);
            self.word(self.avail, offset).store(self.used_idx, Ordering::Relaxed);
        } else {
            self.word(self.avail, 0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }
}
