//! Data memory for requests of one reactor's connections.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use iobuf::{Buffer, MapError, Pool, Region, Registry, Segment};
use smallvec::SmallVec;

use crate::Segments;

/// Bytes of a small buffer: most requests of file systems and databases.
pub const SMALL_BUFFER: usize = 16 << 10;
/// Bytes of a large buffer: the longest request of a Linux host, unless `max_sectors_kb` was raised.
pub const LARGE_BUFFER: usize = 128 << 10;

const SMALL_COUNT: u32 = 128;
const LARGE_COUNT: u32 = 64;

/// Requests of more bytes get memory of their own, one at a time per connection: a request of [`crate::MAX_PAYLOAD`]
/// would otherwise need all buffers at once.
const POOLED_MAX: usize = 1 << 20;

/// Memory outside the pools for the requests of one reactor, at most, bytes. Clients that begin long writes and do not go
/// on, or do not read what they asked for, would otherwise hold as much as they have connections.
///
/// A peer may have as much of it as is left for others: one alone gets half, two a third each, and there is always
/// something for one more.
const OWN_MAX: usize = 256 << 20;

/// Pools that the connections of one reactor share: 2 MiB of small and 8 MiB of large buffers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Buffers {
    small: Pool,
    large: Pool,
    own: Arc<AtomicUsize>,
    /// Of one peer.
    share: Share,
    /// Somebody waits for memory.
    wanted: Arc<AtomicBool>,
    /// Who waits for memory outside the pools, in order.
    line: Rc<RefCell<Line>>,
}

#[derive(Debug, Default)]
struct Line {
    next: u64,
    waiting: Vec<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    share: Share,
    len: usize,
}

/// A connection's place among those who wait for memory outside the pools. Whoever came first gets it first, unless it is
/// his own share that he waits for.
#[derive(Debug, Default)]
pub(crate) struct Place {
    ticket: Option<u64>,
    line: Rc<RefCell<Line>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Place {
    /// It waits no more.
    pub(crate) fn leave(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.line.borrow_mut().waiting.retain(|w| w.ticket != ticket);
        }
    }
}

/// Memory outside the pools that all connections of one peer have on one reactor, bytes. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Share(Arc<AtomicUsize>);

impl Share {
    /// A connection has it.
    pub fn is_used(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// The memory of one request; goes back to its pool when dropped.
#[derive(Debug, Default)]
pub(crate) enum Data {
    /// No data.
    #[default]
    None,
    Pooled(SmallVec<[Buffer; 4]>),
    /// Outside the pools.
    Own(Own),
}

/// Memory outside the pools.
#[derive(Debug)]
pub(crate) struct Own {
    region: Arc<Region>,
    len: usize,
    /// Of all like it, and those of the same peer.
    totals: [Arc<AtomicUsize>; 2],
}

impl Drop for Own {
    fn drop(&mut self) {
        for total in &self.totals {
            total.fetch_sub(self.len, Ordering::Relaxed);
        }
    }
}

impl Buffers {
    /// Maps the pools in `registry`.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn new(registry: &Registry) -> Result<Self, MapError> {
        Ok(Self {
            small: Pool::new(registry, SMALL_COUNT, SMALL_BUFFER)?,
            large: Pool::new(registry, LARGE_COUNT, LARGE_BUFFER)?,
            own: Arc::default(),
            share: Share::default(),
            wanted: Arc::default(),
            line: Rc::default(),
        })
    }

    /// The same pools, for connections of the peer that has `share`.
    pub fn of(&self, share: &Share) -> Self {
        Self { share: share.clone(), ..self.clone() }
    }

    /// Whether somebody has waited for memory since the last call.
    pub fn take_wanted(&self) -> bool {
        self.wanted.swap(false, Ordering::Relaxed)
    }

    /// Whether a request of `len` bytes gets memory of its own.
    pub(crate) fn is_own(len: usize) -> bool {
        len > POOLED_MAX
    }

    /// Memory for `len` bytes outside the pools; `None` if the system has none. A system call.
    pub(crate) fn own(&self, len: usize) -> Option<Data> {
        let region = Region::new(len).ok()?;
        let totals = [self.own.clone(), self.share.0.clone()];
        for total in &totals {
            total.fetch_add(len, Ordering::Relaxed);
        }
        Some(Data::Own(Own { region, len, totals }))
    }

    /// A connection's place in the line, not taken yet.
    pub(crate) fn place(&self) -> Place {
        Place { ticket: None, line: self.line.clone() }
    }

    /// Whether this peer may have `len` bytes more outside the pools now. If not, it waits at `place`.
    pub(crate) fn may_own(&self, len: usize, place: &mut Place) -> bool {
        if self.could_own(len, place) {
            place.leave();
            return true;
        }
        self.wanted.store(true, Ordering::Relaxed);
        if place.ticket.is_none() {
            let mut line = self.line.borrow_mut();
            let ticket = line.next;
            line.next += 1;
            line.waiting.push(Waiter { ticket, share: self.share.clone(), len });
            place.ticket = Some(ticket);
        }
        false
    }

    /// As [`Buffers::may_own`], and changes nothing.
    pub(crate) fn could_own(&self, len: usize, place: &Place) -> bool {
        let left = OWN_MAX.saturating_sub(self.own.load(Ordering::Relaxed));
        let fits = |share: &Share, len: usize| share.0.load(Ordering::Relaxed) + len <= left;
        let before = |w: &Waiter| place.ticket.is_none_or(|t| w.ticket < t);
        let goes_first = |w: &Waiter| before(w) && fits(&w.share, w.len);
        fits(&self.share, len) && !self.line.borrow().waiting.iter().any(goes_first)
    }

    /// Memory for `len` bytes, or `None`: try again when other requests have ended.
    pub(crate) fn take(&self, len: usize) -> Option<Data> {
        if len == 0 {
            return Some(Data::None);
        }
        if Self::is_own(len) {
            return self.own(len);
        }
        if len <= SMALL_BUFFER
            && let Some(buffer) = self.small.take()
        {
            return Some(Data::Pooled(SmallVec::from_iter([buffer])));
        }
        let count = len.div_ceil(LARGE_BUFFER);
        if self.large.available() < count {
            self.wanted.store(true, Ordering::Relaxed);
            return None;
        }
        Some(Data::Pooled((0..count).filter_map(|_| self.large.take()).collect()))
    }

    /// Whether the pools have memory for `len` bytes now.
    pub(crate) fn has(&self, len: usize) -> bool {
        let small = len <= SMALL_BUFFER && self.small.available() > 0;
        small || self.large.available() >= len.div_ceil(LARGE_BUFFER)
    }

    /// Buffers that are lent now, small and large.
    pub fn in_use(&self) -> (usize, usize) {
        (SMALL_COUNT as usize - self.small.available(), LARGE_COUNT as usize - self.large.available())
    }
}

impl Data {
    /// `len` bytes from byte `start` on, or as many as there are.
    ///
    /// # Safety
    /// Keep `self` until the I/O that carries the segments has completed.
    pub(crate) unsafe fn segments(&self, start: usize, len: usize) -> Segments {
        let mut segments = Segments::new();
        match self {
            Self::None => {}
            Self::Own(own) => {
                let len = len.min(own.len.saturating_sub(start));
                // SAFETY: the caller keeps `self`, and with it the region.
                segments.extend(unsafe { own.region.segment(start, len) }.filter(|s| s.len > 0));
            }
            // Most: one buffer, from its beginning.
            Self::Pooled(buffers) if start == 0 && buffers.first().is_some_and(|b| len <= b.len()) => {
                // SAFETY: as below.
                segments.extend(buffers.first().and_then(|b| unsafe { b.segment(len) }).filter(|_| len > 0));
            }
            Self::Pooled(buffers) => {
                let (mut skip, mut left) = (start, len);
                for buffer in buffers {
                    let from = skip.min(buffer.len());
                    skip -= from;
                    let n = left.min(buffer.len() - from);
                    left -= n;
                    // SAFETY: as above; each buffer is lent to this request alone.
                    let segment = unsafe { buffer.segment(from + n) }.filter(|_| n > 0);
                    segments.extend(segment.map(|s| Segment {
                        addr: s.addr + from as u64,
                        len: n as u32,
                        ..s
                    }));
                }
            }
        }
        segments
    }
}

#[cfg(test)]
impl Data {
    /// Writes `byte` everywhere.
    pub(crate) fn fill(&mut self, byte: u8) {
        // SAFETY: exclusively borrowed, and no I/O.
        for s in unsafe { self.segments(0, usize::MAX) } {
            // SAFETY: the segment is `len` bytes of this memory.
            unsafe { s.as_ptr().write_bytes(byte, s.len as usize) };
        }
    }

    /// Writes one byte.
    pub(crate) fn poke(&mut self, at: usize, byte: u8) {
        let mut left = at;
        // SAFETY: exclusively borrowed, and no I/O.
        for s in unsafe { self.segments(0, usize::MAX) } {
            if left < s.len as usize {
                // SAFETY: inside the segment.
                return unsafe { s.as_ptr().add(left).write(byte) };
            }
            left -= s.len as usize;
        }
        panic!("{at} is outside");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_gets_what_it_needs_and_gives_it_back() {
        let buffers = Buffers::new(&Registry::default()).unwrap();
        for (len, small, large) in
            [(512, 1, 0), (16384, 1, 0), (16385, 0, 1), (131_072, 0, 1), (600_000, 0, 5)]
        {
            let data = buffers.take(len).unwrap();
            assert_eq!(buffers.in_use(), (small, large), "{len}");
            // SAFETY: no I/O.
            let segments = unsafe { data.segments(0, len) };
            assert_eq!(segments.iter().map(|s| s.len as usize).sum::<usize>(), len);
            // SAFETY: no I/O.
            let rest = unsafe { data.segments(300, len - 300) };
            assert_eq!(rest.iter().map(|s| s.len as usize).sum::<usize>(), len - 300);
            assert_eq!(rest[0].addr, segments[0].addr + 300);
        }
        assert_eq!(buffers.in_use(), (0, 0));
        let own = buffers.take(2 << 20).unwrap();
        assert!(matches!(own, Data::Own(_)));
        let place = buffers.place();
        assert!(
            buffers.could_own(OWN_MAX - (4 << 20), &place) && !buffers.could_own(OWN_MAX - (3 << 20), &place)
        );
        drop(own);
        assert!(buffers.could_own(OWN_MAX, &place));
        assert_eq!(buffers.in_use(), (0, 0));
    }

    #[test]
    fn a_peer_leaves_something_for_others() {
        const ONE: usize = 32 << 20;
        let all = Buffers::new(&Registry::default()).unwrap();
        let take = |peer: &Buffers| -> Vec<Data> {
            std::iter::from_fn(|| peer.may_own(ONE, &mut peer.place()).then(|| peer.own(ONE).unwrap()))
                .collect()
        };
        let greedy = all.of(&Share::default());
        let held = take(&greedy);
        assert_eq!(held.len(), 4, "half");
        assert!(all.take_wanted() && !all.take_wanted());
        let others: Vec<Buffers> = (0..3).map(|_| all.of(&Share::default())).collect();
        let theirs: Vec<Vec<Data>> = others.iter().map(take).collect();
        assert_eq!(theirs.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1, 1]);
        drop((held, theirs));
        assert_eq!(take(&others[0]).len(), 4);
    }

    #[test]
    fn who_waits_longest_is_next_unless_it_is_for_his_own_share() {
        const ONE: usize = 32 << 20;
        let all = Buffers::new(&Registry::default()).unwrap();
        let peers: Vec<Buffers> = (0..11).map(|_| all.of(&Share::default())).collect();
        let mut places: Vec<Place> = peers.iter().map(Buffers::place).collect();
        let mut held: Vec<Data> = (0..8)
            .map(|n| {
                assert!(peers[n].may_own(ONE, &mut places[n]));
                peers[n].own(ONE).unwrap()
            })
            .collect();
        // One who has some already waits for more; then two who have nothing.
        for n in [0, 8, 9] {
            assert!(!peers[n].may_own(ONE, &mut places[n]), "{n}");
        }
        held.pop();
        for n in [0, 9, 10] {
            assert!(!peers[n].may_own(ONE, &mut places[n]), "{n}: it is another's turn");
        }
        assert!(peers[8].could_own(ONE, &places[8]) && peers[8].may_own(ONE, &mut places[8]));
        // Whoever leaves holds nobody up.
        places[9] = peers[9].place();
        assert!(peers[10].may_own(ONE, &mut places[10]));
        drop(places);
        assert!(all.line.borrow().waiting.is_empty());
    }

    #[test]
    fn small_requests_fall_back_to_large_buffers_and_then_wait() {
        let buffers = Buffers::new(&Registry::default()).unwrap();
        let taken: Vec<Data> = std::iter::from_fn(|| buffers.take(512)).collect();
        assert_eq!(taken.len(), (SMALL_COUNT + LARGE_COUNT) as usize);
        assert!(buffers.take(512).is_none());
        drop(taken);
        assert!(buffers.take(POOLED_MAX).is_some());
    }
}
