//! Memory that devices can reach: data regions come out of SPDK's hugepages, so that an RDMA chunk is read and written by
//! NVMe without a copy. Other memory, a guest's among it, is never registered with SPDK (`spdk_mem_register` pins it): its owner
//! may give it back, or cut it off, at any time. Its data are copied.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use iobuf::{PAGE_SIZE, Provider};
use spdk_sys as sys;

/// SPDK was started with hugepages.
static HUGEPAGES: AtomicBool = AtomicBool::new(false);

/// And with PCI devices, which reach nothing else.
static DEVICES: AtomicBool = AtomicBool::new(false);

/// Regions that came from SPDK and live.
static LENT: AtomicUsize = AtomicUsize::new(0);

/// A request was given up whose end SPDK never told: a device may still write to its memory.
static KEEP: AtomicBool = AtomicBool::new(false);

/// `SPDK_VTOPHYS_ERROR`, a macro that bindgen cannot read.
const VTOPHYS_ERROR: u64 = u64::MAX;

/// SPDK was started with hugepages and PCI devices, or with either; both false when it has ended.
pub(super) fn set(hugepages: bool, devices: bool) {
    HUGEPAGES.store(hugepages, Ordering::Release);
    DEVICES.store(devices, Ordering::Release);
}

/// Whether requests have to be in memory that devices can reach. Without PCI devices there are none, nor does SPDK know then
/// what they could.
pub(super) fn dma() -> bool {
    DEVICES.load(Ordering::Relaxed)
}

/// Data memory of SPDK that is still in use, so that the environment must stay.
pub(super) fn lent() -> usize {
    LENT.load(Ordering::Acquire)
}

/// From now on nothing goes back to SPDK's heap: a device may still write to what a request had that was given up.
pub(super) fn keep_all() {
    KEEP.store(true, Ordering::Release);
}

/// For [`iobuf::Registry::set_provider`]; `None` without hugepages, when any memory is as good.
pub fn provider() -> Option<Arc<dyn Provider>> {
    let hugepages = HUGEPAGES.load(Ordering::Acquire);
    hugepages.then(|| Arc::new(Hugepages) as Arc<dyn Provider>)
}

/// DPDK's heap.
#[derive(Debug)]
struct Hugepages;

impl Provider for Hugepages {
    fn allocate(&self, len: usize) -> Option<NonNull<u8>> {
        // SAFETY: plain numbers; the answer is null or zeroed memory of at least `len` bytes.
        let base = unsafe { sys::spdk_dma_zmalloc(len as _, PAGE_SIZE as _, std::ptr::null_mut()) };
        let base = NonNull::new(base.cast());
        match base {
            Some(_) => LENT.fetch_add(1, Ordering::AcqRel),
            None => {
                static TOLD: AtomicBool = AtomicBool::new(false);
                if !TOLD.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        bytes = len,
                        "no hugepages are left for data memory, so SPDK copies: raise vm.nr_hugepages"
                    );
                }
                0
            }
        };
        base
    }

    unsafe fn free(&self, base: NonNull<u8>, _len: usize) {
        if KEEP.load(Ordering::Acquire) {
            // Still lent: the environment stays, and the memory is nobody else's until the process ends.
            return;
        }
        // SAFETY: from `allocate` and given back once, by the caller's promise. The environment is there as long as
        // anything is lent.
        unsafe { sys::spdk_dma_free(base.as_ptr().cast()) };
        LENT.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Whether devices can reach all of `len` bytes at `addr`.
pub(super) fn reachable(addr: u64, len: u32) -> bool {
    let (mut at, mut left) = (addr, u64::from(len));
    while left > 0 {
        let mut run = left;
        // SAFETY: only looks the address up; nothing at it is touched.
        let physical = unsafe { sys::spdk_vtophys(at as *const _, &mut run) };
        if physical == VTOPHYS_ERROR || run == 0 {
            return false;
        }
        at += run.min(left);
        left -= run.min(left);
    }
    true
}

/// A piece of memory that devices can reach, for requests whose own memory they cannot. Freed on drop.
#[derive(Debug)]
pub(super) struct Bounce {
    base: NonNull<u8>,
    len: usize,
}

impl Bounce {
    /// `None` if there is no memory now.
    pub(super) fn new(len: usize) -> Option<Self> {
        let len = len.next_power_of_two().max(64 << 10);
        // SAFETY: as in `allocate`.
        let base = unsafe { sys::spdk_dma_malloc(len as _, PAGE_SIZE as _, std::ptr::null_mut()) };
        NonNull::new(base.cast()).map(|base| Self { base, len })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: from `spdk_dma_malloc`, freed once; whoever drops it has no request on it any more.
        unsafe { sys::spdk_dma_free(self.base.as_ptr().cast()) };
    }
}
