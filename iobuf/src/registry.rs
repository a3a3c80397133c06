//! The table of regions that devices register ahead of time (io_uring fixed buffers).
//!
//! The control path adds regions; they leave the table when their last user drops them. Channels on the data path
//! compare one generation number per request and re-register only when it moved.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use crate::provider::Provider;
use crate::region::{MapError, Region};

/// Index of a region in its [`Registry`]; the same number indexes an io_uring's fixed-buffer table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegionId(u16);

impl RegionId {
    /// Not in any registry: devices take the unregistered path.
    pub const NONE: Self = Self(u16::MAX);

    /// The table index, `None` for [`RegionId::NONE`].
    pub fn index(self) -> Option<u16> {
        (self != Self::NONE).then_some(self.0)
    }
}

/// Regions that all devices of the process should register. Shared by all threads.
#[derive(Debug, Default)]
pub struct Registry {
    /// Shared with the regions, which move it when they go.
    generation: Arc<AtomicU64>,
    slots: Mutex<Vec<Weak<Region>>>,
    provider: OnceLock<Arc<dyn Provider>>,
}

/// The live regions at one generation.
#[derive(Debug)]
pub struct Snapshot {
    /// Compare with [`Registry::generation`].
    pub generation: u64,
    /// By [`RegionId::index`]; `None` where a slot is free.
    pub regions: Vec<Option<Arc<Region>>>,
}

impl Registry {
    /// At most this many regions have an id at once; later ones get [`RegionId::NONE`] and work, only slower.
    pub const CAPACITY: usize = 1024;

    /// An empty registry, to be shared by `Arc`.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Regions that are made from now on come out of `provider` where it has memory; those of other processes do not. The
    /// first one stays.
    pub fn set_provider(&self, provider: Arc<dyn Provider>) {
        let _ = self.provider.set(provider);
    }

    /// Maps a region of `len` bytes and gives it the first free id.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn map(&self, len: usize) -> Result<Arc<Region>, MapError> {
        self.add(|id, generation| match self.provider.get() {
            Some(provider) => Region::provided_with_id(len, id, generation, provider),
            None => Region::with_id(len, id, generation),
        })
    }

    /// Maps `len` bytes at `offset` of the file `fd`, memory that another process shares with this one (a guest's),
    /// and gives it the first free id. The mapping outlives the descriptor.
    ///
    /// Whoever else has the file can take pages back and bring others in their place, so nobody may pin what is there now
    /// ([`Region::may_pin`]). They can shrink the file, too, unless it is sealed. Then the whole mapping becomes zeroed memory of this
    /// process, and [`Region::is_lost`].
    ///
    /// # Errors
    /// `Outside` unless it is whole pages, of which the file has at least a part; `Shared`, the kernel's refusal. Source: mmap(2).
    pub fn map_shared(&self, fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Arc<Region>, MapError> {
        self.add(|id, generation| Region::shared_with_id(fd, offset, len, id, generation))
    }

    fn add(
        &self,
        make: impl FnOnce(RegionId, Option<Arc<AtomicU64>>) -> Result<Region, MapError>,
    ) -> Result<Arc<Region>, MapError> {
        let mut slots = self.slots.lock().unwrap_or_else(|e| e.into_inner());
        let free = slots.iter().position(|w| w.strong_count() == 0);
        let index = match free {
            Some(i) => i,
            None if slots.len() < Self::CAPACITY => {
                slots.push(Weak::new());
                slots.len() - 1
            }
            None => return make(RegionId::NONE, None).map(Arc::new),
        };
        let region = Arc::new(make(RegionId(index as u16), Some(self.generation.clone()))?);
        slots[index] = Arc::downgrade(&region);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(region)
    }

    /// Moves whenever a region was added or left. A user who sees it move registers the new ones before their ids are
    /// used, and lets go of the old ones, whose pages it would keep pinned.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The live regions. Control path or once per change: takes a lock and allocates.
    pub fn snapshot(&self) -> Snapshot {
        let slots = self.slots.lock().unwrap_or_else(|e| e.into_inner());
        // The number first: a region that goes meanwhile makes the reader look once more.
        let generation = self.generation();
        Snapshot { generation, regions: slots.iter().map(Weak::upgrade).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr::NonNull;

    /// Counts what is out; has one page only.
    #[derive(Debug, Default)]
    struct OnePage(AtomicU64);

    impl Provider for OnePage {
        fn allocate(&self, len: usize) -> Option<NonNull<u8>> {
            if len > 4096 || self.0.swap(1, Ordering::Relaxed) == 1 {
                return None;
            }
            let layout = std::alloc::Layout::from_size_align(4096, 4096).ok()?;
            // SAFETY: not of size 0.
            NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })
        }

        unsafe fn free(&self, base: NonNull<u8>, len: usize) {
            assert_eq!(len, 4096);
            let layout = std::alloc::Layout::from_size_align(4096, 4096).unwrap();
            // SAFETY: from `allocate`, by the caller's promise.
            unsafe { std::alloc::dealloc(base.as_ptr(), layout) };
            self.0.store(0, Ordering::Relaxed);
        }
    }

    #[test]
    fn memory_comes_from_the_provider_and_goes_back_there() {
        use std::os::fd::AsFd;
        let (reg, provider) = (Registry::new(), Arc::new(OnePage::default()));
        reg.set_provider(provider.clone());
        let out = || provider.0.load(Ordering::Relaxed);
        let provided = reg.map(100).unwrap();
        assert_eq!((provided.len(), out()), (4096, 1));
        // Zeroed in place: there is no mapping to give pages back to.
        assert!(provided.copy_in(0, &[7; 4096]) && provided.zero(0, 4096, true));
        let mut bytes = [1; 4096];
        assert!(provided.copy_out(0, &mut bytes));
        assert_eq!(bytes, [0; 4096]);
        // More than it has: the kernel's.
        let mapped = reg.map(8192).unwrap();
        assert_eq!(mapped.len(), 8192);
        let fd = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        let shared = reg.map_shared(fd.as_fd(), 0, 4096).unwrap();
        assert!(provided.may_pin() && mapped.may_pin() && !shared.may_pin());
        drop((provided, mapped, shared));
        assert_eq!(out(), 0);
    }

    #[test]
    fn ids_are_reused_and_the_generation_moves() {
        let reg = Registry::new();
        let a = reg.map(4096).unwrap();
        let b = reg.map(4096).unwrap();
        assert_eq!((a.id().index(), b.id().index()), (Some(0), Some(1)));
        let before = reg.generation();
        drop(a);
        assert_ne!(reg.generation(), before, "a region that goes is announced too");
        let before = reg.generation();
        assert!(reg.snapshot().regions[0].is_none());
        let c = reg.map(4096).unwrap();
        assert_eq!(c.id().index(), Some(0));
        assert_ne!(reg.generation(), before);
        assert_eq!(reg.snapshot().regions.len(), 2);
    }
}
