//! Bytes that were read ahead: headers, and the beginnings of payloads.

/// Headers read at once while requests have no payload.
const AHEAD: usize = 32;
/// A payload of so many bytes is copied sooner than fetched by a system call of its own.
const SMALL_PAYLOAD: u32 = 8 << 10;
/// Bytes read at once while payloads are small: a few requests with theirs.
const WIDE: usize = 32 << 10;

/// A little buffer in front of the socket.
///
/// How far it reads ahead follows the requests: after one without a payload, headers of 32 more, so that a queue of
/// reads arrives with one system call; after a small write, some more of them with their payloads, which are then copied;
/// after a large write just one header, because what follows that is another payload most likely, which should go
/// straight to its own buffer.
#[derive(Debug)]
pub(crate) struct Staging {
    /// Grows once, at the first small write.
    bytes: Vec<u8>,
    /// Bytes of a header.
    header_len: usize,
    start: usize,
    end: usize,
    /// Bytes.
    ahead: usize,
}

impl Staging {
    /// For headers of `header_len` bytes.
    pub(crate) fn new(header_len: usize) -> Self {
        let ahead = AHEAD * header_len;
        Self { bytes: vec![0; ahead], header_len, start: 0, end: 0, ahead }
    }

    /// A whole header, if there is one.
    pub(crate) fn header(&self) -> Option<&[u8]> {
        self.bytes[self.start..self.end].get(..self.header_len)
    }

    /// At most `max` of the staged bytes.
    pub(crate) fn peek(&self, max: usize) -> &[u8] {
        &self.bytes[self.start..self.end.min(self.start.saturating_add(max))]
    }

    pub(crate) fn consume(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// A request with so many bytes of payload decides how far to read ahead.
    pub(crate) fn follow(&mut self, payload: u32) {
        self.ahead = match payload {
            0 => AHEAD * self.header_len,
            1..=SMALL_PAYLOAD => WIDE,
            _ => self.header_len,
        };
    }

    /// Room for the next read.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let limit = self.ahead.max(self.end);
        if self.bytes.len() < limit {
            self.bytes.resize(limit, 0);
        }
        &mut self.bytes[self.end..limit]
    }

    /// `n` bytes were read into [`Staging::room`].
    pub(crate) fn filled(&mut self, n: usize) {
        self.end += n;
        debug_assert!(self.end <= self.bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST_LEN: usize = 28;

    #[test]
    fn reads_ahead_as_far_as_is_useful() {
        let mut s = Staging::new(REQUEST_LEN);
        assert_eq!(s.room().len(), AHEAD * REQUEST_LEN);
        s.follow(SMALL_PAYLOAD);
        assert_eq!(s.room().len(), WIDE);
        s.follow(SMALL_PAYLOAD + 1);
        assert_eq!(s.room().len(), REQUEST_LEN);
        s.room().copy_from_slice(&[7; REQUEST_LEN]);
        s.filled(20);
        assert!(s.header().is_none());
        assert_eq!(s.room().len(), 8);
        s.filled(8);
        assert_eq!(s.header(), Some([7; REQUEST_LEN].as_slice()));
        assert!(s.room().is_empty());
        s.consume(REQUEST_LEN);
        assert!(s.is_empty() && s.peek(9).is_empty());
    }

    #[test]
    fn what_is_left_moves_to_the_front() {
        let mut s = Staging::new(REQUEST_LEN);
        s.room()[..30].copy_from_slice(&core::array::from_fn::<u8, 30, _>(|i| i as u8));
        s.filled(30);
        s.consume(28);
        assert_eq!(s.peek(usize::MAX), [28, 29]);
        assert_eq!(s.room().len(), AHEAD * REQUEST_LEN - 2);
        assert_eq!(s.peek(1), [28]);
    }
}
