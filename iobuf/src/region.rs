//! Page-aligned memory that outlives every I/O on it: anonymous, or shared with another process.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::fault::Guard;
use crate::provider::Provider;
use crate::registry::RegionId;

/// Every region starts on, and is a whole number of, these (x86-64 and most arm64 hosts).
pub const PAGE_SIZE: usize = 4096;

/// The kernel refused memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// Of its own.
    #[error("cannot map {len} bytes of data memory: {source}; ask for less, or free memory")]
    Anonymous {
        /// Wanted.
        len: usize,
        /// Why.
        source: rustix::io::Errno,
    },
    /// Of somebody else.
    #[error("cannot map {len} bytes at offset {offset} of shared memory: {source}")]
    Shared {
        /// Wanted.
        len: usize,
        /// Where in the file.
        offset: u64,
        /// Why.
        source: rustix::io::Errno,
    },
    /// The file does not have these bytes: touching them would kill the process (SIGBUS).
    #[error(
        "shared memory of {size} bytes has no {len} bytes at offset {offset}; whole pages are right, of which the last may be partly there"
    )]
    Outside {
        /// Wanted.
        len: usize,
        /// Where in the file.
        offset: u64,
        /// Of the file.
        size: u64,
    },
}

/// What clients and guests store is nobody's business who reads a core dump.
fn keep_out_of_dumps(base: *mut std::ffi::c_void, len: usize) {
    // SAFETY: the caller has just mapped these pages; advice does not change their contents. A kernel that refuses it dumps
    // them.
    let _ = unsafe { rustix::mm::madvise(base, len, Advice::LinuxDontDump) };
}

/// A mapping of whole pages, unmapped on drop: private, anonymous and zeroed ([`Region::new`]), or of memory shared
/// with another process ([`crate::Registry::map_shared`]).
///
/// The pages are populated on first touch (or when a device pins them), so an unused region costs nothing.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    id: RegionId,
    /// Of the registry: moves when this region goes.
    generation: Option<Arc<AtomicU64>>,
    /// Of shared memory.
    guard: Option<Guard>,
    origin: Origin,
}

/// Where the memory came from, which is where it goes.
#[derive(Debug)]
enum Origin {
    /// `mmap`, private.
    Private,
    /// `mmap` of a file that another process has, too.
    Shared,
    /// A provider.
    Provided(Arc<dyn Provider>),
}

// SAFETY: `Region` owns the mapping and hands out only raw pointers and copies; which thread touches which bytes
// is settled by the owner of each `Segment`. Mapping and unmapping are not tied to a thread (mmap(2)).
unsafe impl Send for Region {}
// SAFETY: as for `Send`; `&Region` gives no reference into the memory, and the copies tolerate concurrent writers.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `len` bytes (rounded up to whole pages) that no registry knows.
    ///
    /// # Errors
    /// The kernel's refusal, normally ENOMEM. Source: mmap(2).
    pub fn new(len: usize) -> Result<Arc<Self>, MapError> {
        Self::with_id(len, RegionId::NONE, None).map(Arc::new)
    }

    /// Maps `len` bytes at `offset` of the file `fd`, shared with whoever else has it; no registry knows it. The rules
    /// are those of [`crate::Registry::map_shared`].
    ///
    /// # Errors
    /// As there.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Arc<Self>, MapError> {
        Self::shared_with_id(fd, offset, len, RegionId::NONE, None).map(Arc::new)
    }

    pub(crate) fn with_id(
        len: usize,
        id: RegionId,
        generation: Option<Arc<AtomicU64>>,
    ) -> Result<Self, MapError> {
        let rounded = len.max(1).next_multiple_of(PAGE_SIZE);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                rounded,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|source| MapError::Anonymous { len: rounded, source })?;
        // SAFETY: `base..base+rounded` is the mapping just made; advice does not change its contents. A refusal
        // (no transparent huge pages in this kernel) costs speed only.
        let _ = unsafe { rustix::mm::madvise(base, rounded, Advice::LinuxHugepage) };
        keep_out_of_dumps(base, rounded);
        let base = NonNull::new(base.cast()).expect("mmap never returns null on success");
        Ok(Self { base, len: rounded, id, generation, guard: None, origin: Origin::Private })
    }

    /// As `with_id`, out of `provider` if it has as much.
    pub(crate) fn provided_with_id(
        len: usize,
        id: RegionId,
        generation: Option<Arc<AtomicU64>>,
        provider: &Arc<dyn Provider>,
    ) -> Result<Self, MapError> {
        let rounded = len.max(1).next_multiple_of(PAGE_SIZE);
        let Some(base) = provider.allocate(rounded) else { return Self::with_id(len, id, generation) };
        let origin = Origin::Provided(provider.clone());
        Ok(Self { base, len: rounded, id, generation, guard: None, origin })
    }

    /// Maps `len` bytes at `offset` of the file `fd`, shared. Both are whole pages, of which the file has at least a part.
    pub(crate) fn shared_with_id(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        id: RegionId,
        generation: Option<Arc<AtomicU64>>,
    ) -> Result<Self, MapError> {
        let refused = |source| MapError::Shared { len, offset, source };
        let size = rustix::fs::fstat(fd).map_err(refused)?.st_size as u64;
        let pages = len > 0 && len.is_multiple_of(PAGE_SIZE) && offset.is_multiple_of(PAGE_SIZE as u64);
        // The last page of a file may be partly there: behind its end it is zeroes that are written nowhere.
        let size = size.checked_next_multiple_of(PAGE_SIZE as u64).unwrap_or(size);
        if !pages || offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(MapError::Outside { len, offset, size });
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory; the file has the
        // bytes (checked just now), and no Rust reference into them is ever made.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                offset,
            )
        }
        .map_err(refused)?;
        keep_out_of_dumps(base, len);
        let base = NonNull::new(base.cast()).expect("mmap never returns null on success");
        // SAFETY: the mapping just made, which `drop` ends after the guard. Only raw pointers lead to it, whose users
        // expect the bytes to change at any time, and to have changed to zeroes is no different.
        let guard = unsafe { Guard::new(base.as_ptr(), len) };
        Ok(Self { base, len, id, generation, guard, origin: Origin::Shared })
    }

    /// Has the system back single pages when they are first touched, not huge ones: a peer that writes a byte here and there
    /// shall not cost 2 MiB each time. For memory that strangers write to. Without effect on memory of a provider.
    pub fn populate_by_page(&self) {
        if matches!(self.origin, Origin::Private) {
            // SAFETY: the whole mapping, which is ours; the advice does not change its contents. A refusal (no transparent
            // huge pages in this kernel) means that there are none.
            let _ =
                unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxNoHugepage) };
        }
    }

    /// Shared memory whose other side has taken it away: it has been replaced by zeroed memory that nobody else sees.
    /// [`crate::losses`] tells when to ask.
    pub fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_lost)
    }

    /// Devices and io_uring may keep hold of the pages that are there now. Not of shared memory: its other side can take
    /// pages back (a guest's balloon, free page reporting, virtio-mem), and whoever touches them next gets new ones, while a
    /// device would go on with the old.
    pub fn may_pin(&self) -> bool {
        !matches!(self.origin, Origin::Shared)
    }

    /// First byte. Valid for reads and writes of [`Region::len`] bytes while the region lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes, a multiple of [`PAGE_SIZE`].
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Which entry of a [`crate::Registry`] this is; [`RegionId::NONE`] outside of any.
    pub fn id(&self) -> RegionId {
        self.id
    }

    /// `len` bytes at `offset`, or `None` if they are not all inside.
    ///
    /// # Safety
    /// Whoever uses the segment must keep this region alive until the I/O that carries it has completed, and must
    /// not let two I/Os write the same bytes at once.
    pub unsafe fn segment(&self, offset: usize, len: usize) -> Option<Segment> {
        let end = offset.checked_add(len)?;
        if end > self.len {
            return None;
        }
        Some(Segment { addr: self.as_ptr() as u64 + offset as u64, len: len as u32, region: self.id })
            .filter(|_| u32::try_from(len).is_ok())
    }

    /// Copies `out.len()` bytes at `offset` out of memory that a peer may be writing. False: not all inside.
    #[must_use]
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) -> bool {
        let Some(end) = offset.checked_add(out.len()) else { return false };
        if end > self.len {
            return false;
        }
        // SAFETY: source inside the mapping (checked), destination exclusively borrowed, the two cannot overlap
        // because no reference into a region exists. A peer's concurrent DMA may tear the bytes, never their
        // bounds: the caller validates the copy.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr().add(offset), out.as_mut_ptr(), out.len()) };
        true
    }

    /// Copies `to.len` bytes at `offset` to the segment. False: not all inside, and nothing was copied.
    ///
    /// # Safety
    /// The segment's memory is valid and lies outside this region. Others may write either side meanwhile; the bytes
    /// are then a mixture, as on a disk.
    #[must_use]
    pub unsafe fn read_to(&self, offset: usize, to: &Segment) -> bool {
        if !self.contains(offset, to.len as usize) {
            return false;
        }
        // SAFETY: source inside the mapping (checked), destination valid and disjoint by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr().add(offset), to.as_ptr(), to.len as usize) };
        true
    }

    /// Copies the segment to `offset`. False: it does not fit, and nothing was copied.
    ///
    /// # Safety
    /// As for [`Region::read_to`].
    #[must_use]
    pub unsafe fn write_from(&self, offset: usize, from: &Segment) -> bool {
        if !self.contains(offset, from.len as usize) {
            return false;
        }
        // SAFETY: destination inside the mapping (checked), source valid and disjoint by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.as_ptr().add(offset), from.len as usize) };
        true
    }

    /// Zeroes `len` bytes at `offset`. With `free` the whole pages among them go back to the system and come back
    /// zeroed at the next touch. False: not all inside, and nothing was done. Source: madvise(2), MADV_DONTNEED.
    #[must_use]
    pub fn zero(&self, offset: usize, len: usize, free: bool) -> bool {
        if !self.contains(offset, len) {
            return false;
        }
        let end = offset + len;
        let first = offset.next_multiple_of(PAGE_SIZE).min(end);
        let last = (end / PAGE_SIZE * PAGE_SIZE).max(first);
        let own = matches!(self.origin, Origin::Private);
        let freed = free && own && last > first && self.give_back(first, last - first);
        let holes = if freed { [(offset, first), (last, end)] } else { [(offset, end), (end, end)] };
        for (from, to) in holes {
            // SAFETY: both ends are between `offset` and `end`, which are inside the mapping (checked).
            unsafe { std::ptr::write_bytes(self.as_ptr().add(from), 0, to - from) };
        }
        true
    }

    /// Drops whole pages inside the mapping; they read as zeroes afterwards.
    fn give_back(&self, offset: usize, len: usize) -> bool {
        // SAFETY: page-aligned and inside an own private anonymous mapping; no Rust reference into it exists.
        unsafe { rustix::mm::madvise(self.as_ptr().add(offset).cast(), len, Advice::LinuxDontNeed) }.is_ok()
    }

    fn contains(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Copies `data` to `offset`. False: it does not fit, and nothing was written.
    #[must_use]
    pub fn copy_in(&self, offset: usize, data: &[u8]) -> bool {
        let Some(end) = offset.checked_add(data.len()) else { return false };
        if end > self.len {
            return false;
        }
        // SAFETY: as in `copy_out`, with the roles exchanged.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.as_ptr().add(offset), data.len()) };
        true
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // Other memory may be mapped there next.
        self.guard = None;
        match &self.origin {
            Origin::Private | Origin::Shared => {
                // SAFETY: the mapping made in `with_id` or `shared_with_id`, unmapped exactly once. Segments do not outlive it
                // by the contract of `segment`.
                let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
                debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
            }
            // SAFETY: its memory, given back once; segments do not outlive it, as above.
            Origin::Provided(provider) => unsafe { provider.free(self.base, self.len) },
        }
        if let Some(generation) = &self.generation {
            generation.fetch_add(1, Ordering::Release);
        }
    }
}

/// A piece of data memory in an I/O: where, how long, and which registered region it lies in.
///
/// Plain data: its maker (see [`Region::segment`]) answers for the memory until the I/O has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Virtual address in this process.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// For devices that registered whole regions ahead of time.
    pub region: RegionId,
}

impl Segment {
    /// A segment over memory outside any region (tests, stack buffers of the control path).
    ///
    /// # Safety
    /// As for [`Region::segment`]: `len` bytes at `ptr` stay valid, for reads and writes, until the I/O completes.
    pub unsafe fn from_raw(ptr: *mut u8, len: u32) -> Self {
        Self { addr: ptr as u64, len, region: RegionId::NONE }
    }

    /// The address as a pointer.
    pub fn as_ptr(&self) -> *mut u8 {
        self.addr as *mut u8
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn rounds_up_to_pages_and_starts_zeroed() {
        let r = Region::new(5000).unwrap();
        assert_eq!(r.len(), 8192);
        assert_eq!(r.as_ptr() as usize % PAGE_SIZE, 0);
        let mut out = [1u8; 16];
        assert!(r.copy_out(8176, &mut out));
        assert_eq!(out, [0; 16]);
    }

    #[test]
    fn core_dumps_have_no_data() {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 8192).unwrap();
        let regions = [Region::new(8192).unwrap(), Region::shared(fd.as_fd(), 0, 8192).unwrap()];
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        for region in regions {
            let at = region.as_ptr() as usize;
            let holds = |line: &str| {
                let range = line.split_whitespace().next()?.split_once('-')?;
                let [from, to] = [range.0, range.1].map(|n| usize::from_str_radix(n, 16));
                Some((from.ok()?..to.ok()?).contains(&at))
            };
            let mut lines = smaps.lines().skip_while(|line| holds(line) != Some(true));
            let flags = lines.find(|line| line.starts_with("VmFlags:")).expect("every mapping has flags");
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
        }
    }

    #[test]
    fn copies_stay_inside() {
        let r = Region::new(4096).unwrap();
        assert!(r.copy_in(4090, b"abcdef"));
        assert!(!r.copy_in(4091, b"abcdef"));
        assert!(!r.copy_in(usize::MAX, b"a"));
        let mut out = [0u8; 6];
        assert!(r.copy_out(4090, &mut out));
        assert_eq!(&out, b"abcdef");
        assert!(!r.copy_out(4091, &mut out));
    }

    #[test]
    fn zero_clears_exactly_its_range_in_both_ways() {
        for free in [false, true] {
            for (from, len) in [(0, 16384), (1, 3), (100, 12000), (4096, 4096), (4095, 4098), (16384, 0)] {
                let r = Region::new(16384).unwrap();
                assert!(r.copy_in(0, &[7; 16384]));
                assert!(r.zero(from, len, free));
                let mut out = [0u8; 16384];
                assert!(r.copy_out(0, &mut out));
                let wrong = (0..16384).find(|i| (out[*i] == 0) != (from..from + len).contains(i));
                assert_eq!(wrong, None, "zero({from}, {len}, {free})");
            }
        }
        let r = Region::new(4096).unwrap();
        assert!(!r.zero(1, 4096, true) && !r.zero(usize::MAX, 2, false));
    }

    #[test]
    fn shared_memory_is_the_files_and_stays_inside_it() {
        use std::os::fd::AsFd;
        let fd = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 16384).unwrap();
        let map = |offset, len| Region::shared_with_id(fd.as_fd(), offset, len, RegionId::NONE, None);
        let (a, b) = (map(0, 16384).unwrap(), map(4096, 8192).unwrap());
        assert!(a.copy_in(4100, b"abc"));
        let mut out = [0u8; 3];
        assert!(b.copy_out(4, &mut out));
        assert_eq!(&out, b"abc");
        // Freed pages of a file keep their contents, so they are written.
        assert!(b.zero(0, 8192, true));
        assert!(a.copy_out(4100, &mut out));
        assert_eq!(out, [0; 3]);
        for (offset, len) in
            [(0, 20480), (16384, 4096), (100, 4096), (0, 100), (0, 0), (u64::MAX - 4095, 4096)]
        {
            assert!(matches!(map(offset, len), Err(MapError::Outside { .. })), "{offset}, {len}");
        }
        rustix::fs::ftruncate(&fd, 7568).unwrap();
        let partly = map(0, 8192).unwrap();
        assert!(partly.copy_in(7566, b"ends") && partly.copy_in(8188, b"past"));
        assert!(matches!(map(0, 12288), Err(MapError::Outside { .. })));
    }

    #[test]
    fn segments_are_bounds_checked() {
        let r = Region::new(8192).unwrap();
        // SAFETY: never used for I/O.
        unsafe {
            assert!(r.segment(0, 8192).is_some());
            assert!(r.segment(1, 8192).is_none());
            assert!(r.segment(usize::MAX, 2).is_none());
        }
    }
}
