//! The three numbers a server announces, and what they must satisfy together.

use std::fmt;

use crate::imm::{ImmLayout, PAYLOAD_BITS, bits};

/// Smallest queue depth a kernel client can live with: while it maps a device it holds one buffer for OPEN and
/// already scans partitions with another.
pub const MIN_QUEUE_DEPTH: u16 = 2;
/// RNBD's OPEN: 264 bytes, plus the 24-byte RTRS read header.
pub const MIN_HDR_SIZE: u32 = 288;
/// Chunks of a multiple of this many bytes keep their data page-aligned, so that it can go to devices as it lies.
pub const PAGE_SIZE: u32 = 4096;

/// Sizes of a session: `queue_depth` chunks of `max_io_size + max_hdr_size` bytes.
///
/// A value of this type satisfies the rules of [`GeometryError`]; in particular every (id, offset) pair fits an
/// immediate, which also bounds a session's chunks to 256 MiB. The default is the kernel server's: 512 chunks of
/// 124 KiB data + 4 KiB header = 64 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    queue_depth: u16,
    max_io_size: u32,
    max_hdr_size: u32,
}

/// Why three numbers make no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// Fewer buffers than a client needs to make progress.
    #[error("queue_depth {got} is too small: at least {least} (a kernel client deadlocks with 1)")]
    QueueDepth {
        /// Asked for.
        got: u16,
        /// Would do.
        least: u16,
    },
    /// No room for one sector.
    #[error("max_io_size {0} is too small: at least 512")]
    IoSize(u32),
    /// No room for OPEN.
    #[error("max_hdr_size {0} is too small: at least 288, better 4096")]
    HdrSize(u32),
    /// An immediate has 28 bits for id and offset together.
    #[error(
        "queue_depth {queue_depth} ({} bits) and chunks of {chunk_size} bytes ({} bits) need more than 28 bits: \
         take queue_depth <= {max_queue_depth} or max_io_size + max_hdr_size <= {max_chunk_size}",
        bits(*.queue_depth as u32), bits64(*.chunk_size)
    )]
    ImmBits {
        /// Asked for.
        queue_depth: u16,
        /// Asked for: `max_io_size + max_hdr_size`.
        chunk_size: u64,
        /// Largest depth for that chunk size; 0 if there is none.
        max_queue_depth: u32,
        /// Largest chunk for that depth.
        max_chunk_size: u32,
    },
}

fn bits64(n: u64) -> u32 {
    if n <= 1 { 0 } else { 64 - (n - 1).leading_zeros() }
}

impl Geometry {
    /// For a server: what it may announce. Sizes in bytes.
    ///
    /// # Errors
    /// See [`GeometryError`]; the message says which numbers would do.
    pub fn new(queue_depth: u16, max_io_size: u32, max_hdr_size: u32) -> Result<Geometry, GeometryError> {
        Geometry::check(queue_depth, max_io_size, max_hdr_size, MIN_QUEUE_DEPTH)
    }

    /// For a client: what a server announced. A depth of 1, which kernel servers can be given, is taken.
    ///
    /// # Errors
    /// See [`GeometryError`].
    pub fn from_server(
        queue_depth: u16,
        max_io_size: u32,
        max_hdr_size: u32,
    ) -> Result<Geometry, GeometryError> {
        Geometry::check(queue_depth, max_io_size, max_hdr_size, 1)
    }

    fn check(
        queue_depth: u16,
        max_io_size: u32,
        max_hdr_size: u32,
        least: u16,
    ) -> Result<Geometry, GeometryError> {
        if queue_depth < least {
            return Err(GeometryError::QueueDepth { got: queue_depth, least });
        }
        if max_io_size < 512 {
            return Err(GeometryError::IoSize(max_io_size));
        }
        if max_hdr_size < MIN_HDR_SIZE {
            return Err(GeometryError::HdrSize(max_hdr_size));
        }
        let chunk_size = u64::from(max_io_size) + u64::from(max_hdr_size);
        let id_bits = bits(queue_depth.into());
        if id_bits + bits64(chunk_size) > PAYLOAD_BITS {
            let left = PAYLOAD_BITS.checked_sub(bits64(chunk_size));
            return Err(GeometryError::ImmBits {
                queue_depth,
                chunk_size,
                max_queue_depth: left.map_or(0, |b| (1u32 << b).min(u16::MAX.into())),
                max_chunk_size: 1 << (PAYLOAD_BITS - id_bits),
            });
        }
        Ok(Geometry { queue_depth, max_io_size, max_hdr_size })
    }

    /// Chunks, hence requests in flight, of a session.
    pub const fn queue_depth(&self) -> u16 {
        self.queue_depth
    }

    /// Data bytes per request.
    pub const fn max_io_size(&self) -> u32 {
        self.max_io_size
    }

    /// Bytes per request for the user message and the RTRS header.
    pub const fn max_hdr_size(&self) -> u32 {
        self.max_hdr_size
    }

    /// Bytes of one chunk.
    pub const fn chunk_size(&self) -> u32 {
        self.max_io_size + self.max_hdr_size
    }

    /// Bytes of all chunks, at most 256 MiB.
    pub const fn total_bytes(&self) -> u32 {
        self.queue_depth as u32 * self.chunk_size()
    }

    /// How request immediates are laid out.
    pub const fn imm_layout(&self) -> ImmLayout {
        ImmLayout::new(self.queue_depth)
    }

    /// Chunks are whole pages, so the data of each starts on a page. Not required on the wire, but direct I/O from
    /// the chunk needs it.
    pub const fn is_page_aligned(&self) -> bool {
        self.chunk_size().is_multiple_of(PAGE_SIZE)
    }
}

impl Default for Geometry {
    fn default() -> Geometry {
        Geometry { queue_depth: 512, max_io_size: 126_976, max_hdr_size: 4096 }
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qd {} max_io {} max_hdr {}", self.queue_depth, self.max_io_size, self.max_hdr_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_is_the_kernels_and_valid() {
        let d = Geometry::default();
        assert_eq!(Geometry::new(512, 126_976, 4096), Ok(d));
        assert_eq!((d.chunk_size(), d.total_bytes()), (131_072, 64 << 20));
        assert!(d.is_page_aligned());
    }

    #[test]
    fn sizes_need_not_be_powers_of_two() {
        let g = Geometry::new(100, 100_000, 1000).unwrap();
        assert!(!g.is_page_aligned());
        Geometry::new(2, 4096, 512).unwrap();
        Geometry::new(128, 524_288, 4096).unwrap();
    }

    #[test]
    fn the_28_bit_rule_and_its_advice() {
        Geometry::new(2048, 126_976, 4096).unwrap();
        let err = Geometry::new(2049, 126_976, 4096).unwrap_err();
        assert_eq!(
            err.to_string(),
            "queue_depth 2049 (12 bits) and chunks of 131072 bytes (17 bits) need more than 28 bits: \
             take queue_depth <= 2048 or max_io_size + max_hdr_size <= 65536"
        );
        let GeometryError::ImmBits { max_queue_depth, max_chunk_size, .. } = err else { panic!("{err}") };
        Geometry::new(max_queue_depth as u16, 126_976, 4096).unwrap();
        Geometry::new(2049, max_chunk_size - 4096, 4096).unwrap();
    }

    #[test]
    fn huge_sizes_neither_overflow_nor_pass() {
        assert!(matches!(
            Geometry::new(2, u32::MAX, u32::MAX),
            Err(GeometryError::ImmBits { max_queue_depth: 0, .. })
        ));
    }

    #[test]
    fn lower_bounds() {
        assert_eq!(Geometry::new(1, 4096, 4096), Err(GeometryError::QueueDepth { got: 1, least: 2 }));
        Geometry::from_server(1, 4096, 4096).unwrap();
        assert_eq!(Geometry::from_server(0, 4096, 4096), Err(GeometryError::QueueDepth { got: 0, least: 1 }));
        assert_eq!(Geometry::new(2, 511, 4096), Err(GeometryError::IoSize(511)));
        assert_eq!(Geometry::new(2, 4096, 287), Err(GeometryError::HdrSize(287)));
    }
}
