//! The work requests of a queue: known to the state machine by number, kept here.

/// A queue of fixed size. Elements are numbered from 0 on; numbers wrap.
pub struct Slots<T> {
    items: Box<[T]>,
    depth: u32,
    head: u32,
    tail: u32,
}

impl<T: Copy> Slots<T> {
    /// `depth` elements, below 2^31; `fill` is what unused ones hold.
    pub fn new(depth: u32, fill: T) -> Self {
        let slots = depth.max(1).next_power_of_two() as usize;
        Self { items: vec![fill; slots].into(), depth, head: 0, tail: 0 }
    }

    fn index(&self, number: u32) -> usize {
        number as usize & (self.items.len() - 1)
    }

    /// Elements it has room for.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Elements in use.
    pub fn len(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }

    /// No more fit.
    pub fn is_full(&self) -> bool {
        self.len() >= self.depth
    }

    /// The number that [`Slots::push`] will give.
    pub fn next(&self) -> u32 {
        self.tail
    }

    /// Appends, if not full.
    pub fn push(&mut self, item: T) {
        debug_assert!(!self.is_full());
        self.items[self.index(self.tail)] = item;
        self.tail = self.tail.wrapping_add(1);
    }

    /// An element by number; `None` if it is not in use.
    pub fn get(&self, number: u32) -> Option<&T> {
        let used = number.wrapping_sub(self.head) < self.len();
        used.then(|| &self.items[self.index(number)])
    }

    /// The oldest.
    pub fn front(&self) -> Option<&T> {
        self.get(self.head)
    }

    /// Takes out the oldest.
    pub fn pop(&mut self) -> Option<T> {
        let item = *self.front()?;
        self.head = self.head.wrapping_add(1);
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_find_their_element_until_it_is_taken() {
        let mut slots = Slots::new(3, 0u32);
        for round in 0..5 {
            for i in 0..3 {
                assert!(!slots.is_full());
                assert_eq!(slots.next(), round * 3 + i);
                slots.push(round * 10 + i);
            }
            assert!(slots.is_full());
            assert_eq!(slots.get(round * 3 + 2), Some(&(round * 10 + 2)));
            assert_eq!(slots.get(round * 3 + 3), None);
            assert_eq!(slots.pop(), Some(round * 10));
            assert_eq!(slots.get(round * 3), None);
            assert_eq!(
                (slots.pop(), slots.pop(), slots.pop()),
                (Some(round * 10 + 1), Some(round * 10 + 2), None)
            );
        }
    }
}
