//! The shape of a device: as its owner says it, and as the kernel takes it.

use std::mem::size_of;

use libublk_rs_sys as sys;

use crate::abi::{ParamBasic, ParamDiscard, Params};

const SECTOR: u64 = 512;

/// What a device looks like to the kernel. Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Logical block: a power of two, 512..=4096 (the kernel's page).
    pub block_size: u32,
    /// Physical block: a power of two, at least `block_size`.
    pub physical_block_size: u32,
    /// Whole device, a multiple of `block_size`.
    pub size: u64,
    /// Largest request: whole pages, at least one, less than 32 MiB.
    pub max_io: u32,
    /// Unit of discard; 0: no discard.
    pub discard_granularity: u32,
    /// Largest discard; `u64::MAX`: any.
    pub max_discard: u64,
    /// Largest write-zeroes; 0: none, `u64::MAX`: any.
    pub max_write_zeroes: u64,
    /// Writes are volatile until flushed; the device then takes flush and FUA.
    pub write_cache: bool,
    /// Seeks take time.
    pub rotational: bool,
    /// Writes are refused by the kernel.
    pub read_only: bool,
}

/// A geometry that ublk cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Block size.
    #[error("a block size of {0} bytes; ublk takes powers of two from 512 to 4096")]
    Block(u32),
    /// Physical block size.
    #[error("a physical block of {0} bytes; it must be a power of two, and at least the logical block")]
    Physical(u32),
    /// Size.
    #[error("a size of {0} bytes; it must be a multiple of the block size, and not 0")]
    Size(u64),
    /// Largest request.
    #[error("requests of {0} bytes; ublk takes whole pages up to 32 MiB")]
    MaxIo(u32),
}

/// Largest request that has a position in /dev/ublkcN (`UBLK_IO_BUF_BITS`), as whole pages.
const MAX_IO: u32 = (1 << sys::UBLK_IO_BUF_BITS) - iobuf::PAGE_SIZE as u32;

impl Geometry {
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), GeometryError> {
        let page = iobuf::PAGE_SIZE as u32;
        if !self.block_size.is_power_of_two() || !(512..=page).contains(&self.block_size) {
            return Err(GeometryError::Block(self.block_size));
        }
        if !self.physical_block_size.is_power_of_two() || self.physical_block_size < self.block_size {
            return Err(GeometryError::Physical(self.physical_block_size));
        }
        if self.size == 0 || !self.size.is_multiple_of(u64::from(self.block_size)) {
            return Err(GeometryError::Size(self.size));
        }
        if self.max_io < page || !self.max_io.is_multiple_of(page) || self.max_io > MAX_IO {
            return Err(GeometryError::MaxIo(self.max_io));
        }
        Ok(())
    }

    /// As SET_PARAMS takes it. Valid if [`Geometry::check`] is content.
    pub fn params(&self) -> Params {
        let attr = |on: bool, bits: u32| if on { bits } else { 0 };
        let block = u64::from(self.block_size);
        // Whole blocks in a number of sectors that a request can have (u32 bytes in the block layer).
        let sectors = |bytes: u64| {
            let bytes = bytes.min(u64::from(u32::MAX)) / block * block;
            (bytes / SECTOR) as u32
        };
        let physical_shift = self.physical_block_size.trailing_zeros() as u8;
        let discards = self.discard_granularity > 0;
        Params {
            len: size_of::<Params>() as u32,
            types: sys::UBLK_PARAM_TYPE_BASIC
                | attr(discards || self.max_write_zeroes > 0, sys::UBLK_PARAM_TYPE_DISCARD),
            basic: ParamBasic {
                attrs: attr(self.read_only, sys::UBLK_ATTR_READ_ONLY)
                    | attr(self.rotational, sys::UBLK_ATTR_ROTATIONAL)
                    | attr(self.write_cache, sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA),
                logical_bs_shift: self.block_size.trailing_zeros() as u8,
                physical_bs_shift: physical_shift,
                io_opt_shift: physical_shift,
                io_min_shift: physical_shift,
                max_sectors: self.max_io / SECTOR as u32,
                chunk_sectors: 0,
                dev_sectors: self.size / SECTOR,
                virt_boundary_mask: 0,
            },
            discard: ParamDiscard {
                discard_alignment: 0,
                // The kernel wants one even where only write-zeroes is offered.
                discard_granularity: self.discard_granularity.max(self.block_size),
                max_discard_sectors: if discards { sectors(self.max_discard) } else { 0 },
                max_write_zeroes_sectors: sectors(self.max_write_zeroes),
                max_discard_segments: 1,
                reserved0: 0,
            },
            pad: 0,
        }
    }

    /// Whether a device with `params` can be served by what has this geometry: the same blocks and size, and no
    /// promise that this does not keep.
    ///
    /// # Errors
    /// The difference in words.
    pub fn fits(&self, params: &Params) -> Result<(), String> {
        let own = self.params();
        if params.types & sys::UBLK_PARAM_TYPE_BASIC == 0 {
            return Err("it was never given a size".into());
        }
        let (theirs, ours) = (&params.basic, &own.basic);
        if theirs.dev_sectors != ours.dev_sectors {
            let (theirs, ours) = (theirs.dev_sectors, ours.dev_sectors);
            return Err(format!("it has {theirs} sectors of 512 bytes, the bdev {ours}"));
        }
        if theirs.logical_bs_shift != ours.logical_bs_shift {
            let blocks = |shift: u8| 1u64 << (shift & 63);
            let (theirs, ours) = (blocks(theirs.logical_bs_shift), blocks(ours.logical_bs_shift));
            return Err(format!("it has blocks of {theirs} bytes, the bdev of {ours}"));
        }
        let has = |attrs: u32, bit: u32| attrs & bit != 0;
        if has(ours.attrs, sys::UBLK_ATTR_READ_ONLY) && !has(theirs.attrs, sys::UBLK_ATTR_READ_ONLY) {
            return Err("it is writable, the bdev is not".into());
        }
        if has(ours.attrs, sys::UBLK_ATTR_VOLATILE_CACHE) && !has(theirs.attrs, sys::UBLK_ATTR_VOLATILE_CACHE)
        {
            return Err("it is never flushed, but the bdev has a volatile cache".into());
        }
        let promised =
            params.types & sys::UBLK_PARAM_TYPE_DISCARD != 0 && params.discard.max_discard_sectors > 0;
        if promised && self.discard_granularity == 0 {
            return Err("it takes discards, the bdev does not".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            block_size: 4096,
            physical_block_size: 4096,
            size: 1 << 30,
            max_io: 512 << 10,
            discard_granularity: 4096,
            max_discard: u64::MAX,
            max_write_zeroes: u64::MAX,
            write_cache: true,
            rotational: false,
            read_only: false,
        }
    }

    #[test]
    fn params_say_what_the_geometry_says() {
        let p = geometry().params();
        assert_eq!(p.types, 3);
        assert_eq!(p.basic.attrs, 4 | 8, "volatile cache and FUA");
        assert_eq!((p.basic.logical_bs_shift, p.basic.physical_bs_shift), (12, 12));
        assert_eq!((p.basic.max_sectors, p.basic.dev_sectors), (1024, 1 << 21));
        assert_eq!(p.discard.max_discard_sectors, u32::MAX / 4096 * 8, "whole blocks");
        let read_only = Geometry {
            read_only: true,
            write_cache: false,
            rotational: true,
            discard_granularity: 0,
            max_write_zeroes: 0,
            ..geometry()
        };
        let p = read_only.params();
        assert_eq!((p.types, p.basic.attrs), (1, 1 | 2), "read-only and rotational");
    }

    #[test]
    fn what_ublk_cannot_have_is_refused() {
        let g = geometry();
        assert_eq!(g.check(), Ok(()));
        assert_eq!(Geometry { block_size: 8192, ..g }.check(), Err(GeometryError::Block(8192)));
        assert_eq!(Geometry { physical_block_size: 512, ..g }.check(), Err(GeometryError::Physical(512)));
        assert_eq!(Geometry { size: 5000, ..g }.check(), Err(GeometryError::Size(5000)));
        assert_eq!(Geometry { max_io: 32 << 20, ..g }.check(), Err(GeometryError::MaxIo(32 << 20)));
        assert_eq!(Geometry { max_io: 4608, ..g }.check(), Err(GeometryError::MaxIo(4608)));
    }

    #[test]
    fn only_the_same_disk_is_recovered() {
        let g = geometry();
        let params = g.params();
        assert_eq!(g.fits(&params), Ok(()));
        for other in [
            Geometry { size: 2 << 30, ..g },
            Geometry { block_size: 512, ..g },
            Geometry { read_only: true, ..g },
            Geometry { discard_granularity: 0, ..g },
        ] {
            assert!(other.fits(&params).is_err(), "{other:?}");
        }
        let uncached = Geometry { write_cache: false, ..g };
        assert_eq!(uncached.fits(&params), Ok(()), "flushes of what is stable do no harm");
        assert!(g.fits(&uncached.params()).is_err());
        assert!(g.fits(&Params::default()).is_err());
    }
}
