//! What RNBD tells a client about a device, and what requests are checked against.

use zerocopy::FromZeros;

use crate::wire::{CACHE_FUA, CACHE_WRITEBACK, MsgHdr, MsgOpenRsp, SECTOR_SIZE, msg_type};

/// A device as one open sees it. A value has a usable block size and a capacity whose bytes fit 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevGeometry {
    capacity_sectors: u64,
    logical_block_size: u32,
    /// Bytes; only a hint to the client.
    pub physical_block_size: u32,
    /// This open must not change the device.
    pub read_only: bool,
    /// There is a volatile write cache, so the client should flush.
    pub write_cache: bool,
    /// Writes can be forced to stable storage one by one.
    pub fua: bool,
    /// Longest discard in 512-byte sectors; 0 if not supported.
    pub max_discard_sectors: u32,
    /// Bytes.
    pub discard_granularity: u32,
    /// Bytes.
    pub discard_alignment: u32,
    /// Longest WRITE_ZEROES in 512-byte sectors; 0 if not supported.
    pub max_write_zeroes_sectors: u32,
    /// SECURE_ERASE works, up to `max_discard_sectors`.
    pub secure_erase: bool,
    /// Longest read or write in 512-byte sectors; kernel clients go by the session's `max_io_size` instead.
    pub max_hw_sectors: u32,
    /// Most segments; kernel clients ignore it.
    pub max_segments: u16,
}

/// Numbers that make no device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DevGeometryError {
    /// RNBD counts 512-byte sectors and has 16 bits for the block size.
    #[error("logical block size {0} must be a power of two in 512..=32768")]
    BlockSize(u32),
    /// More than 2^64 bytes.
    #[error("capacity of {0} sectors exceeds 2^55 - 1")]
    Capacity(u64),
}

impl DevGeometry {
    /// A writable device without cache, discard or zeroing. `capacity_sectors`: 512-byte units, rounded down to whole
    /// logical blocks. `logical_block_size`: bytes.
    ///
    /// # Errors
    /// [`DevGeometryError`].
    pub const fn new(
        capacity_sectors: u64,
        logical_block_size: u32,
    ) -> Result<DevGeometry, DevGeometryError> {
        if !logical_block_size.is_power_of_two()
            || logical_block_size < SECTOR_SIZE
            || logical_block_size > 32768
        {
            return Err(DevGeometryError::BlockSize(logical_block_size));
        }
        if capacity_sectors > u64::MAX / SECTOR_SIZE as u64 {
            return Err(DevGeometryError::Capacity(capacity_sectors));
        }
        let sectors_per_block = (logical_block_size / SECTOR_SIZE) as u64;
        Ok(DevGeometry {
            capacity_sectors: capacity_sectors - capacity_sectors % sectors_per_block,
            logical_block_size,
            physical_block_size: logical_block_size,
            read_only: false,
            write_cache: false,
            fua: false,
            max_discard_sectors: 0,
            discard_granularity: 0,
            discard_alignment: 0,
            max_write_zeroes_sectors: 0,
            secure_erase: false,
            max_hw_sectors: 0,
            max_segments: 0,
        })
    }

    /// Capacity in 512-byte sectors, whole logical blocks.
    pub const fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors
    }

    /// Bytes, a power of two, 512..=32768.
    pub const fn logical_block_size(&self) -> u32 {
        self.logical_block_size
    }

    /// The answer to OPEN.
    pub fn open_rsp(&self, device_id: u32) -> MsgOpenRsp {
        let cache = |on, bit: u8| if on { bit } else { 0 };
        // 16 bits on the wire; it is a hint, so the largest power of two will do for more.
        let physical = self.physical_block_size.clamp(self.logical_block_size, 32768);
        MsgOpenRsp {
            hdr: MsgHdr::new(msg_type::OPEN_RSP),
            device_id: device_id.into(),
            nsectors: self.capacity_sectors.into(),
            max_hw_sectors: self.max_hw_sectors.into(),
            max_write_zeroes_sectors: self.max_write_zeroes_sectors.into(),
            max_discard_sectors: self.max_discard_sectors.into(),
            discard_granularity: self.discard_granularity.into(),
            discard_alignment: self.discard_alignment.into(),
            physical_block_size: (physical as u16).into(),
            logical_block_size: (self.logical_block_size as u16).into(),
            max_segments: self.max_segments.into(),
            secure_discard: u16::from(self.secure_erase).into(),
            cache_policy: cache(self.write_cache, CACHE_WRITEBACK) | cache(self.fua, CACHE_FUA),
            ..MsgOpenRsp::new_zeroed()
        }
    }

    /// What a client learns from the answer to OPEN. `read_only` is the client's own choice and stays false.
    ///
    /// # Errors
    /// [`DevGeometryError`]: the client should send CLOSE, as the kernel's does for block size 0.
    pub fn from_open_rsp(rsp: &MsgOpenRsp) -> Result<DevGeometry, DevGeometryError> {
        let geometry = DevGeometry::new(rsp.nsectors.get(), rsp.logical_block_size.get().into())?;
        Ok(DevGeometry {
            physical_block_size: rsp.physical_block_size.get().into(),
            write_cache: rsp.cache_policy & CACHE_WRITEBACK != 0,
            fua: rsp.cache_policy & CACHE_FUA != 0,
            max_discard_sectors: rsp.max_discard_sectors.get(),
            discard_granularity: rsp.discard_granularity.get(),
            discard_alignment: rsp.discard_alignment.get(),
            max_write_zeroes_sectors: rsp.max_write_zeroes_sectors.get(),
            secure_erase: rsp.secure_discard.get() != 0,
            max_hw_sectors: rsp.max_hw_sectors.get(),
            max_segments: rsp.max_segments.get(),
            ..geometry
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_and_capacities() {
        assert_eq!(DevGeometry::new(8, 0), Err(DevGeometryError::BlockSize(0)));
        assert_eq!(DevGeometry::new(8, 256), Err(DevGeometryError::BlockSize(256)));
        assert_eq!(DevGeometry::new(8, 1536), Err(DevGeometryError::BlockSize(1536)));
        assert_eq!(DevGeometry::new(8, 65536), Err(DevGeometryError::BlockSize(65536)));
        assert_eq!(DevGeometry::new(15, 4096).unwrap().capacity_sectors(), 8);
        assert_eq!(DevGeometry::new(1 << 55, 512), Err(DevGeometryError::Capacity(1 << 55)));
        assert!(DevGeometry::new((1 << 55) - 1, 512).is_ok());
    }

    #[test]
    fn open_rsp_round_trips() {
        let g = DevGeometry {
            physical_block_size: 4096,
            write_cache: true,
            fua: true,
            max_discard_sectors: 1 << 20,
            discard_granularity: 4096,
            discard_alignment: 512,
            max_write_zeroes_sectors: 1 << 21,
            secure_erase: true,
            max_hw_sectors: 248,
            max_segments: 31,
            ..DevGeometry::new(0x1_0000_0000, 512).unwrap()
        };
        let rsp = g.open_rsp(7);
        assert_eq!((rsp.device_id.get(), rsp.cache_policy), (7, 3));
        assert_eq!(DevGeometry::from_open_rsp(&rsp), Ok(g));
    }

    #[test]
    fn large_physical_blocks_fit_their_16_bits() {
        let mut g = DevGeometry::new(1 << 20, 512).unwrap();
        g.physical_block_size = 1 << 20;
        assert_eq!(g.open_rsp(0).physical_block_size.get(), 32768);
    }
}
