//! A descriptor chain, read from a ring and translated.

use iobuf::Segment;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::memory::{GuestMemory, Segments};

/// Most descriptors of a chain, those of an indirect table included.
pub const MAX_DESCRIPTORS: usize = 1026;

/// Most segments of a chain: a descriptor may lie in several regions.
const MAX_SEGMENTS: usize = 2 * MAX_DESCRIPTORS;

/// A descriptor: `struct virtq_desc` (virtio 2.7.5) as it is in an indirect table of either kind of ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// Guest physical address, little-endian in memory; in native order after `Descriptor::read`.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Of a split ring: flags. Of a packed ring: the buffer's id.
    pub first: u16,
    /// Of a split ring: next. Of a packed ring: flags.
    pub second: u16,
}

/// Bytes of a descriptor.
pub(crate) const DESC_LEN: u64 = 16;
const _: () = assert!(size_of::<Descriptor>() == DESC_LEN as usize);

pub(crate) const F_NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(crate) const F_WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(crate) const F_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

impl Descriptor {
    /// Copies entry `index` of `table`, each field once.
    ///
    /// # Safety
    /// `table` has more than `index` entries of mapped memory, aligned to 8 bytes or not.
    #[inline]
    pub(crate) unsafe fn read(table: *const u8, index: usize) -> Self {
        // SAFETY: inside the table by the caller's promise. Volatile, because the guest may write it at any time; the
        // copy is validated before use. An indirect table may be unaligned, so bytes are what is read.
        let (addr, rest) = unsafe {
            let entry = table.add(index * DESC_LEN as usize).cast::<[u64; 2]>();
            if entry.is_aligned() {
                (entry.cast::<u64>().read_volatile(), entry.cast::<u64>().add(1).read_volatile())
            } else {
                let bytes = u128::from_le_bytes(entry.cast::<[u8; 16]>().read_volatile());
                (bytes as u64, (bytes >> 64) as u64)
            }
        };
        Self { addr, len: rest as u32, first: (rest >> 32) as u16, second: (rest >> 48) as u16 }
    }
}

/// Why a ring cannot be used any more: its contents contradict the specification, so nothing in it can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Broken {
    /// Available index.
    #[error("the available index is {0} ahead of a ring of {1}")]
    Ahead(u16, u16),
    /// Descriptor index.
    #[error("descriptor {0} of a table of {1}")]
    Index(u16, u32),
    /// Loop or overlong chain.
    #[error("a chain of more than {0} descriptors")]
    TooLong(usize),
    /// Buffers for the driver come before buffers for the device.
    #[error("a readable descriptor after a writable one")]
    Order,
    /// Indirect tables.
    #[error("an indirect descriptor that is {0}")]
    Indirect(&'static str),
    /// A chain is made available again while it is in flight.
    #[error("descriptor {0} is in flight already")]
    InFlight(u16),
    /// There is no writable byte in memory for the answer.
    #[error("a request without a place for its status")]
    NoStatus,
    /// Rings outside of memory.
    #[error("the ring at {0:#x} is not in the guest's memory")]
    Ring(u64),
    /// Ring layout.
    #[error("the ring at {0:#x} is not aligned to {1} bytes")]
    Alignment(u64, u64),
    /// Ring size.
    #[error("a ring of {0} entries; 1 to 32768 are right, of a split ring a power of two")]
    Size(u32),
    /// Shared memory for requests in flight.
    #[error("the memory for requests in flight is not for this queue: {0}")]
    InflightArea(&'static str),
}

/// A chain: what the device may read, then what it may write. Kept and refilled, so that nothing is allocated.
#[derive(Debug)]
pub struct Chain {
    /// Where the data is, in order; the first [`Chain::readable`] of them are for reading.
    pub(crate) segments: Vec<Segment>,
    /// Segments that the device may read.
    pub(crate) readable: usize,
    /// Bytes that it may read.
    pub(crate) readable_len: u64,
    /// Bytes that it may write.
    pub(crate) writable_len: u64,
    /// The last writable byte, if it is in memory.
    pub(crate) last: Option<*mut u8>,
    /// Part of a buffer is not in the guest's memory.
    pub(crate) faulty: bool,
    writing: bool,
    descriptors: usize,
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Chain {
    /// Room for the longest chain.
    pub fn new() -> Self {
        Self {
            segments: Vec::with_capacity(MAX_SEGMENTS + crate::memory::MAX_REGIONS),
            readable: 0,
            readable_len: 0,
            writable_len: 0,
            last: None,
            faulty: false,
            writing: false,
            descriptors: 0,
        }
    }

    /// What the device may read, and what it may write: in the guest's memory, and nowhere else.
    pub fn parts(&self) -> (&[Segment], &[Segment]) {
        self.segments.split_at(self.readable)
    }

    /// Bytes of the two parts, unless a buffer is [faulty](Chain::is_faulty).
    pub fn lens(&self) -> (u64, u64) {
        (self.readable_len, self.writable_len)
    }

    /// Part of a buffer is not in the guest's memory.
    pub fn is_faulty(&self) -> bool {
        self.faulty
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        self.segments.clear();
        (self.readable, self.readable_len, self.writable_len, self.last) = (0, 0, 0, None);
        (self.faulty, self.writing, self.descriptors) = (false, false, 0);
    }

    /// Adds one buffer.
    #[inline]
    pub(crate) fn add(
        &mut self,
        memory: &GuestMemory,
        addr: u64,
        len: u32,
        flags: u16,
    ) -> Result<(), Broken> {
        self.descriptors += 1;
        if self.descriptors > MAX_DESCRIPTORS {
            return Err(Broken::TooLong(MAX_DESCRIPTORS));
        }
        let write = flags & F_WRITE != 0;
        if write && !self.writing {
            self.writing = true;
            self.readable = self.segments.len();
        } else if !write && self.writing {
            return Err(Broken::Order);
        }
        if self.segments.len() >= MAX_SEGMENTS {
            self.faulty = true;
        } else {
            let from = if write { self.readable } else { 0 };
            let complete = memory.append(addr, len, &mut Segments { list: &mut self.segments, from });
            self.faulty |= !complete;
        }
        if !write {
            self.readable = self.segments.len();
            self.readable_len += u64::from(len);
        } else if len > 0 {
            self.writable_len += u64::from(len);
            self.last = memory.host(addr.wrapping_add(u64::from(len) - 1), 1);
        }
        Ok(())
    }

    /// Reads an indirect table (virtio 2.7.5.3, 2.8.8). Of a packed ring, its entries follow each other and have no
    /// NEXT flag.
    pub(crate) fn add_table(
        &mut self,
        memory: &GuestMemory,
        addr: u64,
        len: u32,
        packed: bool,
    ) -> Result<(), Broken> {
        let count = len / DESC_LEN as u32;
        if count == 0 || !u64::from(len).is_multiple_of(DESC_LEN) {
            return Err(Broken::Indirect("not a number of descriptors long"));
        }
        let Some(table) = memory.host(addr, u64::from(len)) else {
            return Err(Broken::Indirect("outside of the guest's memory"));
        };
        let mut index = 0u32;
        loop {
            // SAFETY: `index < count` (below), and `count` entries at `table` are in a region that `memory` holds.
            let d = unsafe { Descriptor::read(table, index as usize) };
            let flags = if packed { d.second } else { d.first };
            if flags & F_INDIRECT != 0 {
                return Err(Broken::Indirect("inside an indirect table"));
            }
            self.add(memory, d.addr, d.len, flags)?;
            index = match (packed, flags & F_NEXT != 0) {
                (true, _) => index + 1,
                (false, true) if u32::from(d.second) >= count => return Err(Broken::Index(d.second, count)),
                (false, true) => u32::from(d.second),
                (false, false) => return Ok(()),
            };
            if index >= count {
                return Ok(());
            }
        }
    }

    /// Copies bytes `from` the readable part to `out`. False: there are fewer.
    #[inline]
    pub(crate) fn read(&self, mut from: u64, out: &mut [u8]) -> bool {
        let mut at = 0;
        for s in &self.segments[..self.readable] {
            let len = u64::from(s.len);
            if from >= len {
                from -= len;
                continue;
            }
            let part = ((len - from) as usize).min(out.len() - at);
            // SAFETY: `part` bytes from `from` on are inside the segment, which is mapped while this chain is in use;
            // `out` is exclusively borrowed and not the guest's memory. The guest may change the bytes meanwhile: the
            // copy is what is looked at.
            unsafe {
                std::ptr::copy_nonoverlapping(s.as_ptr().add(from as usize), out[at..].as_mut_ptr(), part);
            }
            at += part;
            from = 0;
            if at == out.len() {
                return true;
            }
        }
        out.is_empty()
    }

    /// Copies `data` to the beginning of the writable part, as much of it as there is room for.
    pub(crate) fn write(&self, data: &[u8]) {
        let mut at = 0;
        for s in &self.segments[self.readable..] {
            let part = (s.len as usize).min(data.len() - at);
            // SAFETY: as in `read`, the other way.
            unsafe { std::ptr::copy_nonoverlapping(data[at..].as_ptr(), s.as_ptr(), part) };
            at += part;
        }
    }

    /// Leaves out the first `len` readable bytes, which are there.
    #[inline]
    pub(crate) fn skip(&mut self, len: u64) {
        let mut left = len;
        let mut whole = 0;
        for s in &mut self.segments[..self.readable] {
            if left < u64::from(s.len) {
                s.addr += left;
                s.len -= left as u32;
                break;
            }
            left -= u64::from(s.len);
            whole += 1;
        }
        self.segments.drain(..whole);
        self.readable -= whole;
        self.readable_len -= len;
    }

    /// Leaves out the last writable byte, which is there.
    #[inline]
    pub(crate) fn drop_last(&mut self) {
        self.writable_len -= 1;
        if let Some(last) = self.segments.last_mut() {
            last.len -= 1;
            if last.len == 0 {
                self.segments.pop();
            }
        }
    }
}
