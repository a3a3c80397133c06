//! Memory from elsewhere than the kernel.

use std::ptr::NonNull;

/// A library that has memory of its own for data, because its devices can reach no other (SPDK's hugepages).
pub trait Provider: std::fmt::Debug + Send + Sync {
    /// `len` zeroed bytes, whole pages, on a page boundary; `None`: there is not as much, take the kernel's.
    fn allocate(&self, len: usize) -> Option<NonNull<u8>>;

    /// Takes back what [`Provider::allocate`] gave.
    ///
    /// # Safety
    /// From there, with the same length, not given back before, and nobody uses it any more.
    unsafe fn free(&self, base: NonNull<u8>, len: usize);
}
