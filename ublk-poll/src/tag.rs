//! One tag of a queue: at most one request, one buffer, one entry in the ring.

use iobuf::{Buffer, MapError, Pool, Registry, Segment};
use rustix::io::Errno;

use crate::request::{Op, Request};

/// Where a tag is.
///
/// ```text
/// Kernel ─FETCH ends─▶ (Waiting ─▶) CopyIn ─▶ Owner ─complete()─▶ CopyOut ─▶ Kernel
///    └─NODEV─▶ Dead                 writes only                   reads only
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its FETCH or COMMIT_AND_FETCH is with the driver.
    Kernel,
    /// Has a request, but no buffer was free.
    Waiting,
    /// The kernel copies data of a write into the buffer.
    CopyIn,
    /// The request was handed out.
    Owner,
    /// The kernel copies data of a read out of the buffer.
    CopyOut,
    /// The device is stopped, or the driver refused a command.
    Dead,
}

/// A tag.
#[derive(Debug)]
pub(crate) struct Tag {
    pub(crate) state: State,
    pub(crate) request: Request,
    /// With user copy: for this request. Without: for ever.
    pub(crate) buffer: Option<Buffer>,
    /// Bytes copied so far.
    pub(crate) copied: u32,
}

impl Tag {
    pub(crate) fn new(tag: u16) -> Self {
        let op = Op::Flush;
        let request = Request { tag, op, sector: 0, sectors: 0, fua: false, no_unmap: false, data: None };
        Self { state: State::Kernel, request, buffer: None, copied: 0 }
    }

    /// Bytes of the request.
    pub(crate) fn bytes(&self) -> u32 {
        // A checked request with data has fewer than 2^16 sectors; the others have no bytes.
        if self.request.op.has_data() { self.request.sectors << 9 } else { 0 }
    }

    /// The request's part of the buffer. `None` if there is no buffer, or it is too short.
    pub(crate) fn segment(&self) -> Option<Segment> {
        // SAFETY: the buffer stays in this tag until the request that the segment goes out with is answered.
        unsafe { self.buffer.as_ref()?.segment(self.bytes() as usize) }
    }

    /// Address of the buffer for FETCH; 0 without one.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.as_ref().map_or(0, |b| b.region().as_ptr() as u64 + b.offset() as u64)
    }

    /// Address and length of what is still to be copied.
    pub(crate) fn rest(&self) -> (*mut u8, u32) {
        let left = self.bytes() - self.copied;
        let addr = self.segment().map_or(std::ptr::null_mut(), |s| s.as_ptr());
        (addr.wrapping_add(self.copied as usize), left)
    }

    /// A copy has ended with `result`. `Ok(true)`: that was all.
    pub(crate) fn copy_ended(&mut self, result: i32) -> Result<bool, Errno> {
        match u32::try_from(result) {
            Ok(0) => Err(Errno::IO),
            Ok(n) => {
                self.copied = self.copied.saturating_add(n).min(self.bytes());
                Ok(self.copied == self.bytes())
            }
            Err(_) => match Errno::from_raw_os_error(-result) {
                Errno::AGAIN | Errno::INTR => Ok(false),
                errno => Err(errno),
            },
        }
    }
}

/// Buffers of a queue.
///
/// With user copy a request takes one when it comes: small ones are as many as tags, so that no small request ever waits;
/// large ones are few, and requests wait for them in order. Without user copy each tag has one for ever.
pub(crate) struct Buffers {
    small: Pool,
    large: Option<Pool>,
}

const SMALL: u32 = 16 << 10;
/// 8 MiB of the largest requests (512 KiB).
const LARGE_COUNT: u16 = 16;

impl Buffers {
    /// # Errors
    /// No memory.
    pub(crate) fn new(
        registry: &Registry,
        depth: u16,
        max_io: u32,
        user_copy: bool,
    ) -> Result<Self, MapError> {
        let count = u32::from(depth);
        if !user_copy || max_io <= SMALL {
            return Ok(Self { small: Pool::new(registry, count, max_io as usize)?, large: None });
        }
        let large = Pool::new(registry, depth.min(LARGE_COUNT).into(), max_io as usize)?;
        Ok(Self { small: Pool::new(registry, count, SMALL as usize)?, large: Some(large) })
    }

    /// One of at least `len` bytes, not more than the largest request.
    pub(crate) fn take(&self, len: u32) -> Option<Buffer> {
        match &self.large {
            Some(large) if len as usize > self.small.buffer_size() => large.take(),
            _ => self.small.take(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(op: Op, sectors: u32) -> Tag {
        let mut t = Tag::new(0);
        t.request = Request { op, sectors, ..t.request };
        t
    }

    #[test]
    fn copies_continue_where_they_ended() {
        let buffers = Buffers::new(&Registry::default(), 4, 512 << 10, true).unwrap();
        let mut t = tag(Op::Read, 8);
        t.buffer = buffers.take(t.bytes());
        let (start, len) = t.rest();
        assert_eq!(len, 4096);
        assert_eq!(t.copy_ended(1024), Ok(false));
        assert_eq!(t.rest(), (start.wrapping_add(1024), 3072));
        assert_eq!(t.copy_ended(-Errno::AGAIN.raw_os_error()), Ok(false));
        assert_eq!(t.copy_ended(3072), Ok(true));
        assert_eq!(t.copy_ended(0), Err(Errno::IO));
        assert_eq!(t.copy_ended(-14), Err(Errno::FAULT));
    }

    #[test]
    fn only_requests_with_data_have_bytes() {
        assert_eq!(tag(Op::Write, 8).bytes(), 4096);
        assert_eq!(tag(Op::Discard, u32::MAX).bytes(), 0);
    }

    #[test]
    fn small_requests_never_wait_for_large_ones() {
        let buffers = Buffers::new(&Registry::default(), 32, 512 << 10, true).unwrap();
        let large: Vec<_> = (0..LARGE_COUNT).map(|_| buffers.take(512 << 10).unwrap()).collect();
        assert!(large.iter().all(|b| b.len() == 512 << 10));
        assert!(buffers.take(SMALL + 1).is_none());
        let small: Vec<_> = (0..32).map(|_| buffers.take(SMALL).unwrap()).collect();
        assert_eq!(small.len(), 32);
        drop(large);
        assert!(buffers.take(SMALL + 1).is_some());
    }
}
