//! Fixed-size buffers for one core: made at start-up, lent without lock or allocation.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use crate::region::{MapError, PAGE_SIZE, Region, Segment};
use crate::registry::Registry;

/// `count` page-aligned buffers of one size. `!Send`: it belongs to one core.
#[derive(Clone, Debug)]
pub struct Pool(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    region: Arc<Region>,
    size: usize,
    free: RefCell<Vec<u32>>,
}

impl Pool {
    /// Maps `count` buffers of `size` bytes each (rounded up to whole pages) in one region of `registry`.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn new(registry: &Registry, count: u32, size: usize) -> Result<Self, MapError> {
        let size = size.next_multiple_of(PAGE_SIZE);
        let region = registry.map(size * count as usize)?;
        Ok(Self(Rc::new(Inner { region, size, free: RefCell::new((0..count).rev().collect()) })))
    }

    /// A buffer, or `None` when all are lent: an ordinary answer, try again when one came back.
    pub fn take(&self) -> Option<Buffer> {
        let index = self.0.free.borrow_mut().pop()?;
        Some(Buffer { pool: self.0.clone(), index })
    }

    /// Bytes of each buffer.
    pub fn buffer_size(&self) -> usize {
        self.0.size
    }

    /// Buffers not lent now.
    pub fn available(&self) -> usize {
        self.0.free.borrow().len()
    }
}

/// One buffer of a [`Pool`], given back on drop. Its contents are whatever the last user left.
#[derive(Debug)]
pub struct Buffer {
    pool: Rc<Inner>,
    index: u32,
}

impl Buffer {
    /// The first `len` bytes as a segment, `None` if the buffer is shorter.
    ///
    /// # Safety
    /// Keep this `Buffer` until the I/O that carries the segment has completed.
    pub unsafe fn segment(&self, len: usize) -> Option<Segment> {
        if len > self.pool.size {
            return None;
        }
        // SAFETY: the caller keeps `self`, which holds the region; buffers of a pool do not overlap.
        unsafe { self.pool.region.segment(self.offset(), len) }
    }

    /// Bytes: the pool's [`Pool::buffer_size`].
    #[expect(clippy::len_without_is_empty, reason = "a buffer is never empty")]
    pub fn len(&self) -> usize {
        self.pool.size
    }

    /// Where the buffer starts in [`Buffer::region`], in bytes.
    pub fn offset(&self) -> usize {
        self.index as usize * self.pool.size
    }

    /// The region that holds the buffer.
    pub fn region(&self) -> &Arc<Region> {
        &self.pool.region
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.free.borrow_mut().push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lends_each_buffer_once_and_takes_it_back() {
        let pool = Pool::new(&Registry::default(), 2, 5000).unwrap();
        assert_eq!(pool.buffer_size(), 8192);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        assert_ne!(a.offset(), b.offset());
        assert!(pool.take().is_none());
        drop(a);
        assert_eq!(pool.available(), 1);
        assert!(pool.take().is_some());
    }
}
