//! The two kinds of virtqueue, device side: what is available, what was used, who wants to be told.

pub mod packed;
pub mod split;

use std::sync::Arc;

pub use crate::chain::{Broken, Chain, Descriptor, MAX_DESCRIPTORS};
use crate::memory::GuestMemory;

/// Where a ring is and how it is used, as a front end says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingConfig {
    /// Entries.
    pub size: u32,
    /// Descriptor table, or packed ring: address in the front end's address space.
    pub desc: u64,
    /// Available ring, or driver event suppression.
    pub avail: u64,
    /// Used ring, or device event suppression.
    pub used: u64,
    /// VIRTIO_F_RING_PACKED.
    pub packed: bool,
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC.
    pub indirect: bool,
}

impl RingConfig {
    /// The mapped address of `len` bytes at the front end's address `addr`.
    fn locate(&self, memory: &GuestMemory, addr: u64, len: u64, align: u64) -> Result<*mut u8, Broken> {
        if !addr.is_multiple_of(align) {
            return Err(Broken::Alignment(addr, align));
        }
        let at = memory.user(addr, len).ok_or(Broken::Ring(addr))?;
        // Of a region that starts anywhere in its file.
        if (at as u64).is_multiple_of(align) { Ok(at) } else { Err(Broken::Alignment(addr, align)) }
    }
}

/// Where a ring goes on: the `num` of SET_VRING_BASE and GET_VRING_BASE. Split: the next available index. Packed: next
/// available index and wrap counter in bits 0–15, next used index and wrap counter in bits 16–31.
pub type Base = u32;

/// Whether the other side's event index `event` lies among the last `count` steps to `new`.
#[inline]
pub(crate) fn need_event(event: u16, new: u16, count: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < count
}

/// A table that rings and requests use; kept by each ring.
pub(crate) type Memory = Arc<GuestMemory>;
