//! Bytes that were read ahead: heads of replies, and short answers as a whole.

/// Bytes of the buffer: some tens of small answers.
const SIZE: usize = 64 << 10;

/// A buffer in front of the socket.
///
/// While long reads are in flight it takes no more than heads, so that data go straight where they belong. While there
/// are only short ones, a copy is cheaper than a system call for each, and it takes all there is.
#[derive(Debug)]
pub(super) struct Ahead {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; SIZE].into_boxed_slice(), start: 0, end: 0 }
    }

    /// What is here, `max` bytes at most.
    pub(super) fn peek(&self, max: usize) -> &[u8] {
        &self.bytes[self.start..self.end.min(self.start.saturating_add(max))]
    }

    pub(super) fn consume(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Room for the next read, so that at most `most` bytes are here then.
    pub(super) fn room(&mut self, most: usize) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let limit = most.min(SIZE).max(self.end);
        &mut self.bytes[self.end..limit]
    }

    /// `n` bytes were read into [`Ahead::room`].
    pub(super) fn filled(&mut self, n: usize) {
        self.end += n;
        debug_assert!(self.end <= self.bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_moves_to_the_front() {
        let mut a = Ahead::new();
        assert_eq!((a.room(usize::MAX).len(), a.room(20).len()), (SIZE, 20));
        a.room(20).copy_from_slice(&core::array::from_fn::<u8, 20, _>(|i| i as u8));
        a.filled(20);
        a.consume(17);
        assert_eq!((a.peek(2), a.peek(99)), ([17, 18].as_slice(), [17, 18, 19].as_slice()));
        assert_eq!((a.room(16).len(), a.room(2).len()), (13, 0));
        a.consume(3);
        assert!(a.is_empty());
    }
}
