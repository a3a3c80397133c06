//! A queue of fixed size whose elements are known by ever-increasing numbers.

/// A first-in-first-out queue. Storage is reserved by `new` and never grows.
pub(super) struct Ring<T> {
    items: Vec<T>,
    depth: u32,
    mask: u32,
    head: u32,
    tail: u32,
}

impl<T: Copy> Ring<T> {
    /// At most `depth` elements, `depth` below 2^31.
    pub(super) fn new(depth: u32) -> Self {
        let slots = depth.max(1).next_power_of_two();
        Self { items: Vec::with_capacity(slots as usize), depth, mask: slots - 1, head: 0, tail: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    pub(super) fn is_full(&self) -> bool {
        self.tail.wrapping_sub(self.head) >= self.depth
    }

    /// Number of the oldest element.
    pub(super) fn head(&self) -> u32 {
        self.head
    }

    /// Number that the next pushed element will have.
    pub(super) fn tail(&self) -> u32 {
        self.tail
    }

    /// Appends `item`; false if full.
    #[must_use]
    pub(super) fn push(&mut self, item: T) -> bool {
        if self.is_full() {
            return false;
        }
        let slot = (self.tail & self.mask) as usize;
        match self.items.get_mut(slot) {
            Some(old) => *old = item,
            // The first time round: slots are filled in order, within the reserved capacity.
            None => self.items.push(item),
        }
        self.tail = self.tail.wrapping_add(1);
        true
    }

    /// Element number `n`, if it is in the queue.
    pub(super) fn get(&self, n: u32) -> Option<&T> {
        if n.wrapping_sub(self.head) < self.tail.wrapping_sub(self.head) {
            self.items.get((n & self.mask) as usize)
        } else {
            None
        }
    }

    /// The oldest element.
    pub(super) fn front(&self) -> Option<&T> {
        self.get(self.head)
    }

    /// Takes the oldest element.
    pub(super) fn pop(&mut self) -> Option<T> {
        let item = *self.front()?;
        self.head = self.head.wrapping_add(1);
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_depth_elements_in_order_and_never_reallocates() {
        let mut ring = Ring::new(3);
        let storage = ring.items.as_ptr();
        for round in 0..10u32 {
            for i in 0..3 {
                assert!(ring.push(round * 3 + i));
            }
            assert!(ring.is_full() && !ring.push(99));
            assert_eq!(ring.get(ring.head() + 2), Some(&(round * 3 + 2)));
            assert_eq!(ring.get(ring.tail()), None);
            for i in 0..3 {
                assert_eq!(ring.pop(), Some(round * 3 + i));
            }
            assert!(ring.is_empty() && ring.pop().is_none());
        }
        assert_eq!(ring.items.as_ptr(), storage);
    }

    #[test]
    fn depth_zero_takes_nothing() {
        assert!(!Ring::new(0).push(1));
    }
}
