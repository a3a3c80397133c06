//! A guest's memory as the front end shares it: regions of guest physical addresses, each mapped here as an
//! [`iobuf::Region`].
//!
//! A [`GuestMemory`] never changes; a new memory table is a new one, which takes over the mappings that both have.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use iobuf::{MapError, Region, Registry, Segment};

/// A memory table has at most this many regions (`GET_MAX_MEM_SLOTS`; QEMU's own limit of SET_MEM_TABLE is 8).
pub const MAX_REGIONS: usize = 64;

/// A region as the front end describes it (`VhostUserMemoryRegion`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// First address in the front end's own address space: rings are named by such addresses.
    pub user_addr: u64,
    /// Where it starts in the file.
    pub mmap_offset: u64,
}

impl RegionSpec {
    fn end_of(first: u64, size: u64) -> Option<u64> {
        first.checked_add(size).filter(|_| size > 0)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let apart = |a: u64, b: u64| a.saturating_add(self.size) <= b || b.saturating_add(other.size) <= a;
        !(apart(self.guest_addr, other.guest_addr) && apart(self.user_addr, other.user_addr))
    }
}

/// A memory table that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Empty, or past the end of an address space.
    #[error("region {0:x?} is empty or wraps around the address space")]
    Range(RegionSpec),
    /// Two regions share addresses.
    #[error("region {0:x?} overlaps {1:x?}")]
    Overlap(RegionSpec, RegionSpec),
    /// Too many.
    #[error("{0} regions; at most {MAX_REGIONS} are supported")]
    TooMany(usize),
    /// REM_MEM_REG of something else.
    #[error("no region {0:x?} to remove")]
    NotFound(RegionSpec),
    /// Not memory.
    #[error("region {0:x?}: {1}")]
    File(RegionSpec, &'static str),
    /// Whoever touches it might wait for somebody else.
    #[error("region {0:x?}: its file is of no file system whose pages come at once; {wanted}", wanted = crate::file::WANTED)]
    NotLocal(RegionSpec),
    /// The kernel or the file's size.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A system call on its file.
    #[error("region {0:x?}: {1}")]
    System(RegionSpec, rustix::io::Errno),
}

/// Which bytes of which file are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    dev: u64,
    ino: u64,
    offset: u64,
    len: usize,
}

#[derive(Clone, Debug)]
struct Mapped {
    spec: RegionSpec,
    /// Where the region's first byte is in this process.
    host: u64,
    identity: Identity,
    region: Arc<Region>,
}

/// One memory table, mapped.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    /// In order of guest addresses, without overlap.
    regions: Vec<Mapped>,
}

impl GuestMemory {
    /// Maps a table. What `old` maps of the same files is taken over, so that it need not be registered again.
    ///
    /// # Errors
    /// [`MemoryError`]; nothing stays mapped then.
    pub fn map<F: AsFd>(
        registry: &Registry,
        old: &Self,
        table: &[(RegionSpec, F)],
    ) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        for (spec, file) in table {
            memory.insert(registry, old, *spec, file.as_fd())?;
        }
        Ok(memory)
    }

    /// This table and one region more (ADD_MEM_REG).
    ///
    /// # Errors
    /// As [`GuestMemory::map`].
    pub fn with(
        &self,
        registry: &Registry,
        spec: RegionSpec,
        file: BorrowedFd<'_>,
    ) -> Result<Self, MemoryError> {
        let mut memory = self.clone();
        memory.insert(registry, self, spec, file)?;
        Ok(memory)
    }

    /// This table without a region (REM_MEM_REG): the one with these addresses and this size.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn without(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let same = |r: &Mapped| {
            (r.spec.guest_addr, r.spec.user_addr, r.spec.size) == (spec.guest_addr, spec.user_addr, spec.size)
        };
        let at = self.regions.iter().position(same).ok_or(MemoryError::NotFound(spec))?;
        let mut memory = self.clone();
        memory.regions.remove(at);
        Ok(memory)
    }

    /// Whether `file` may be mapped as `spec`: then it may be closed, too.
    ///
    /// # Errors
    /// It may not.
    pub(crate) fn check(spec: RegionSpec, file: BorrowedFd<'_>) -> Result<(), MemoryError> {
        match crate::file::is_local(file) {
            Ok(true) => Ok(()),
            Ok(false) => Err(MemoryError::NotLocal(spec)),
            Err(e) => Err(MemoryError::System(spec, e)),
        }
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Some of it was taken away: its file is shorter than it was, or its file system full.
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|r| r.region.is_lost())
    }

    /// No memory at all.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    fn insert(
        &mut self,
        registry: &Registry,
        old: &Self,
        spec: RegionSpec,
        file: BorrowedFd<'_>,
    ) -> Result<(), MemoryError> {
        let ends =
            [spec.guest_addr, spec.user_addr, spec.mmap_offset].map(|a| RegionSpec::end_of(a, spec.size));
        if ends.contains(&None) {
            return Err(MemoryError::Range(spec));
        }
        if let Some(other) = self.regions.iter().find(|r| r.spec.overlaps(&spec)) {
            return Err(MemoryError::Overlap(spec, other.spec));
        }
        if self.regions.len() == MAX_REGIONS {
            return Err(MemoryError::TooMany(MAX_REGIONS + 1));
        }
        let identity = identify(spec, file)?;
        let taken = old.regions.iter().find(|r| r.identity == identity).map(|r| r.region.clone());
        let region = match taken {
            Some(region) => region,
            None => registry.map_shared(file, identity.offset, identity.len)?,
        };
        let host = region.as_ptr() as u64 + (spec.mmap_offset - identity.offset);
        let at = self.regions.partition_point(|r| r.spec.guest_addr < spec.guest_addr);
        self.regions.insert(at, Mapped { spec, host, identity, region });
        Ok(())
    }

    /// Where `len` bytes at guest address `addr` are, if one region has them all.
    #[inline]
    pub fn host(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let region = self.find(addr)?;
        let offset = addr - region.spec.guest_addr;
        (len <= region.spec.size - offset).then(|| (region.host + offset) as *mut u8)
    }

    /// Where `len` bytes at address `addr` of the front end's own address space are.
    pub fn user(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let inside = |r: &&Mapped| addr >= r.spec.user_addr && addr - r.spec.user_addr < r.spec.size;
        let region = self.regions.iter().find(inside)?;
        let offset = addr - region.spec.user_addr;
        (len <= region.spec.size - offset).then(|| (region.host + offset) as *mut u8)
    }

    /// Appends `len` bytes at guest address `addr` to `out`, joined to its last segment if they follow it. A buffer may
    /// lie in several regions that follow each other. False: not all of it is the guest's memory; then nothing is added
    /// that is not.
    #[inline]
    pub fn append(&self, mut addr: u64, mut len: u32, out: &mut Segments<'_>) -> bool {
        while len > 0 {
            let Some(region) = self.find(addr) else { return false };
            let offset = addr - region.spec.guest_addr;
            let part = (region.spec.size - offset).min(u64::from(len)) as u32;
            out.push(Segment { addr: region.host + offset, len: part, region: region.region.id() });
            len -= part;
            addr = addr.wrapping_add(u64::from(part));
        }
        true
    }

    #[inline]
    fn find(&self, addr: u64) -> Option<&Mapped> {
        // Guests have a handful of regions: looking at each beats a binary search.
        self.regions.iter().find(|r| addr.wrapping_sub(r.spec.guest_addr) < r.spec.size)
    }
}

/// A list of segments to append to: pieces that touch become one, from `from` on.
#[derive(Debug)]
pub struct Segments<'a> {
    /// The list.
    pub list: &'a mut Vec<Segment>,
    /// Earlier segments are left alone.
    pub from: usize,
}

impl Segments<'_> {
    #[inline]
    fn push(&mut self, new: Segment) {
        if let Some(last) = self.list[self.from..].last_mut()
            && last.addr + u64::from(last.len) == new.addr
            && last.region == new.region
            && let Some(len) = last.len.checked_add(new.len)
        {
            last.len = len;
            return;
        }
        self.list.push(new);
    }
}

/// What has to be mapped for `spec`: whole pages, of the size that the file has (huge pages have their own).
fn identify(spec: RegionSpec, file: BorrowedFd<'_>) -> Result<Identity, MemoryError> {
    GuestMemory::check(spec, file)?;
    let stat = rustix::fs::fstat(file).map_err(|e| MemoryError::System(spec, e))?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
        return Err(MemoryError::File(spec, "its descriptor is not of shared memory (memfd, file)"));
    }
    let size = stat.st_size as u64;
    let page = (stat.st_blksize as u64).max(iobuf::PAGE_SIZE as u64);
    let offset = spec.mmap_offset / page * page;
    let end = spec.mmap_offset + spec.size;
    // Not past the file, if its last page of that size is not all there; a region beyond it is refused when mapped.
    let pages_end = end.checked_next_multiple_of(page).ok_or(MemoryError::Range(spec))?;
    let small_end = end.next_multiple_of(iobuf::PAGE_SIZE as u64);
    let mapped_end = if pages_end <= size { pages_end } else { small_end };
    let len = usize::try_from(mapped_end - offset).map_err(|_| MemoryError::Range(spec))?;
    Ok(Identity { dev: stat.st_dev, ino: stat.st_ino, offset, len })
}
