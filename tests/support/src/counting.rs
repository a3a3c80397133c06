//! Counts allocations, for tests of data paths. A test program counts once it has
//! `#[global_allocator] static ALLOCATOR: test_support::Counting = test_support::Counting;`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// The system's allocator, which counts.
pub struct Counting;

thread_local! {
    static OF_THREAD: Cell<u64> = const { Cell::new(0) };
}
static OF_ALL: AtomicU64 = AtomicU64::new(0);

/// Allocations of this thread so far.
pub fn allocations() -> u64 {
    OF_THREAD.get()
}

/// Allocations of all threads so far.
pub fn all_allocations() -> u64 {
    OF_ALL.load(Ordering::Relaxed)
}

/// A data path that allocated `count` times in `requests` requests allocates nothing: timers that fire meanwhile may, and
/// there are the more of them the slower the machine is.
pub fn allocates_nothing(count: u64, requests: usize) -> bool {
    count <= requests as u64 / 1000
}

fn count() {
    OF_ALL.fetch_add(1, Ordering::Relaxed);
    // A thread that ends has no counter any more, and none is needed.
    let _ = OF_THREAD.try_with(|n| n.set(n.get() + 1));
}

// SAFETY: every call is passed on to the system's allocator as it is; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are those that the system's allocator wants.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above; `at` came from here, hence from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, new) }
    }
}
