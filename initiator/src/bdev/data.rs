//! A request's memory: which pieces belong to a range of it, and copies through bounce buffers.

use bdev::Segments;
use iobuf::{Buffer, Segment};

/// The pieces of `segments` that hold bytes `from..from + len` of the request. Neighbours in one region become one
/// piece, so that a guest's list of adjacent pages is as good as one buffer.
pub(super) fn pieces(segments: &Segments, from: u64, len: u32, out: &mut Segments) {
    out.clear();
    for piece in range(segments, from, len) {
        match out.last_mut() {
            Some(last) if touches(last, &piece) => last.len += piece.len,
            _ => out.push(piece),
        }
    }
}

/// `b` goes on where `a` ends. Regions outside of any registry have no bounds, so they are never joined.
fn touches(a: &Segment, b: &Segment) -> bool {
    a.region == b.region
        && a.region.index().is_some()
        && a.addr + u64::from(a.len) == b.addr
        && a.len.checked_add(b.len).is_some()
}

fn range(segments: &Segments, from: u64, len: u32) -> impl Iterator<Item = Segment> + '_ {
    let (end, mut at) = (from + u64::from(len), 0);
    segments.iter().filter_map(move |s| {
        let (start, stop) = (at, at + u64::from(s.len));
        at = stop;
        let (lo, hi) = (start.max(from), stop.min(end));
        // Both differences are at most `s.len`.
        (lo < hi).then(|| Segment { addr: s.addr + (lo - start), len: (hi - lo) as u32, ..*s })
    })
}

/// Copies bytes `from..from + len` of the request into `buffer`. False: they do not fit.
///
/// # Safety
/// The request has not completed, so its segments are valid ([`bdev::IoRequest::segments`]).
#[must_use]
pub(super) unsafe fn fill(buffer: &Buffer, segments: &Segments, from: u64, len: u32) -> bool {
    let mut at = buffer.offset();
    len as usize <= buffer.len()
        && range(segments, from, len).all(|s| {
            let to = at;
            at += s.len as usize;
            // SAFETY: valid by the caller's promise; the buffer is of the initiator's own pool, to which no request
            // has an address.
            unsafe { buffer.region().write_from(to, &s) }
        })
}

/// Copies what landed in `buffer` to bytes `from..from + len` of the request. False: there is less.
///
/// # Safety
/// As for [`fill`].
#[must_use]
pub(super) unsafe fn drain(buffer: &Buffer, segments: &Segments, from: u64, len: u32) -> bool {
    let mut at = buffer.offset();
    len as usize <= buffer.len()
        && range(segments, from, len).all(|s| {
            let start = at;
            at += s.len as usize;
            // SAFETY: as in `fill`.
            unsafe { buffer.region().read_to(start, &s) }
        })
}

#[cfg(test)]
mod tests {
    use iobuf::{Pool, Registry};

    use super::*;

    fn list(lens: &[(u64, u32)]) -> Segments {
        let region = Registry::new().map(4096).unwrap().id();
        lens.iter().map(|&(addr, len)| Segment { addr, len, region }).collect()
    }

    fn cut(segments: &Segments, from: u64, len: u32) -> Vec<(u64, u32)> {
        let mut out = Segments::new();
        pieces(segments, from, len, &mut out);
        out.iter().map(|s| (s.addr, s.len)).collect()
    }

    #[test]
    fn neighbours_become_one_piece() {
        let s = list(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000), (0x9000, 0x200)]);
        assert_eq!(cut(&s, 0, 0x3200), [(0x1000, 0x2000), (0x8000, 0x1200)]);
        assert_eq!(cut(&s, 0x800, 0x1000), [(0x1800, 0x1000)]);
        assert_eq!(cut(&s, 0x1e00, 0x400), [(0x2e00, 0x200), (0x8000, 0x200)]);
        assert_eq!(cut(&s, 0x3000, 0x200), [(0x9000, 0x200)]);
        let mut other = s.clone();
        other[1].region = iobuf::RegionId::NONE;
        assert_eq!(cut(&other, 0, 0x2000), [(0x1000, 0x1000), (0x2000, 0x1000)]);
        other[0].region = iobuf::RegionId::NONE;
        assert_eq!(cut(&other, 0, 0x2000), [(0x1000, 0x1000), (0x2000, 0x1000)]);
    }

    #[test]
    fn copies_go_to_the_right_bytes() {
        let pool = Pool::new(&Registry::new(), 1, 4096).unwrap();
        let buffer = pool.take().unwrap();
        let memory = iobuf::Region::new(8192).unwrap();
        let bytes: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
        assert!(memory.copy_in(0, &bytes));
        // SAFETY: `memory` lives to the end of the test, and nobody else uses it.
        let segments: Segments =
            unsafe { [memory.segment(100, 300), memory.segment(5000, 700)] }.into_iter().flatten().collect();
        let mut got = vec![0; 512];
        // SAFETY: as above.
        assert!(unsafe { fill(&buffer, &segments, 200, 512) });
        assert!(buffer.region().copy_out(buffer.offset(), &mut got));
        assert_eq!((&got[..100], &got[100..]), (&bytes[300..400], &bytes[5000..5412]));
        // SAFETY: as above.
        assert!(unsafe { drain(&buffer, &segments, 0, 512) });
        let mut back = vec![0; 8192];
        assert!(memory.copy_out(0, &mut back));
        assert_eq!((&back[100..400], &back[5000..5212]), (&got[..300], &got[300..]));
        assert_eq!((&back[..100], &back[5212..]), (&bytes[..100], &bytes[5212..]));
        // SAFETY: as above; nothing is copied.
        assert!(unsafe { !fill(&buffer, &segments, 0, 4097) && !drain(&buffer, &segments, 0, 4097) });
    }
}
