//! A ring's table of fixed buffers, kept in step with the registry of data memory.

use std::sync::{Arc, Weak};

use io_uring::IoUring;
use iobuf::{Region, RegionId, Registry};

/// The kernel takes at most 1 GiB per fixed buffer (io_uring_register(2)).
const MAX_FIXED: usize = 1 << 30;

/// `struct iovec`, as readv(2) has it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct IoVec {
    pub(super) base: *mut u8,
    pub(super) len: usize,
}

/// What the ring has at each index of its table.
pub(super) struct FixedBuffers {
    registry: Arc<Registry>,
    seen: u64,
    /// `Weak` as identity: its address is not used again while it is kept, even if a new region gets the old id and
    /// the old address.
    table: Vec<Option<Weak<Region>>>,
    /// The kernel has sparse tables (Linux 5.19).
    able: bool,
}

impl FixedBuffers {
    pub(super) fn new(registry: Arc<Registry>, ring: &IoUring) -> Self {
        let able = ring.submitter().register_buffers_sparse(Registry::CAPACITY as u32).is_ok();
        // Behind the present generation, so that the first use looks.
        let seen = registry.generation().wrapping_sub(1);
        Self { registry, seen, table: Vec::new(), able }
    }

    /// The table index if `region` can be used as a fixed buffer now. One atomic load unless the registry changed.
    #[inline]
    pub(super) fn index(&mut self, region: RegionId, ring: &IoUring) -> Option<u16> {
        let index = region.index().filter(|_| self.able)?;
        if self.registry.generation() != self.seen {
            self.sync(ring);
        }
        self.table.get(usize::from(index))?.is_some().then_some(index)
    }

    /// Registers what is new and may be pinned, lets go of what is gone. System calls; once per change of the registry.
    #[cold]
    fn sync(&mut self, ring: &IoUring) {
        let snapshot = self.registry.snapshot();
        self.table.resize(snapshot.regions.len().max(self.table.len()), None);
        for (index, entry) in self.table.iter_mut().enumerate() {
            let now = snapshot.regions.get(index).and_then(Option::as_ref);
            let same = match (&*entry, now) {
                (Some(old), Some(new)) => std::ptr::eq(old.as_ptr(), Arc::as_ptr(new)),
                (None, None) => true,
                _ => false,
            };
            if same {
                continue;
            }
            let vec = match now.filter(|r| r.may_pin() && r.len() <= MAX_FIXED) {
                Some(region) => IoVec { base: region.as_ptr(), len: region.len() },
                None => IoVec { base: std::ptr::null_mut(), len: 0 },
            };
            let registered = update(ring, index as u32, &vec);
            if !registered && vec.len > 0 {
                // Locked memory is limited (RLIMIT_MEMLOCK): the region works without, only slower.
                tracing::debug!(index, len = vec.len, "fixed buffer refused");
                let _ = update(ring, index as u32, &IoVec { base: std::ptr::null_mut(), len: 0 });
            }
            *entry = now.filter(|_| registered && vec.len > 0).map(Arc::downgrade);
        }
        self.seen = snapshot.generation;
    }
}

/// Replaces one entry of the ring's table; an empty one clears it.
fn update(ring: &IoUring, index: u32, vec: &IoVec) -> bool {
    // SAFETY: `IoVec` has the layout of `struct iovec` and is one long. The kernel pins the pages it names, so that
    // I/O stays in them even after an unmapping; whoever sends I/O holds the region (`Region::segment`).
    unsafe {
        let slice = std::slice::from_raw_parts(std::ptr::from_ref(vec).cast(), 1);
        ring.submitter().register_buffers_update(index, slice, None).is_ok()
    }
}
