//! A request of the kernel, checked.

use iobuf::Segment;
use libublk_rs_sys as sys;

use crate::abi::IoDesc;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Device to [`Request::data`].
    Read,
    /// [`Request::data`] to device.
    Write,
    /// Everything acknowledged before is stable once this is answered.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes,
}

/// One request. Answer it with [`crate::Queue::complete`].
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Names it on its queue until it is answered.
    pub tag: u16,
    /// What to do.
    pub op: Op,
    /// First sector, 512-byte units; a multiple of the logical block. 0 for flush.
    pub sector: u64,
    /// Length, 512-byte units; whole logical blocks inside the device, at least one. 0 for flush.
    pub sectors: u32,
    /// `Write`, `WriteZeroes`: stable before it is answered.
    pub fua: bool,
    /// `WriteZeroes`: the space must stay allocated.
    pub no_unmap: bool,
    /// `Read`, `Write`: memory of exactly `sectors`, the queue's, until the request is answered.
    pub data: Option<Segment>,
}

/// What the descriptors of a queue may say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Logical block, 512-byte units, minus one.
    pub block_mask: u64,
    /// Size of the device, 512-byte units.
    pub sectors: u64,
    /// Longest read or write, 512-byte units.
    pub max_sectors: u32,
}

/// A descriptor that makes no sense. The kernel should not make one; it is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadDescriptor {
    #[error("operation {0} is not one of this device")]
    Op(u32),
    #[error("{sectors} sectors at {start} are not whole blocks inside the device's {size}")]
    Range { start: u64, sectors: u32, size: u64 },
    #[error("{0} sectors are more than this device takes at once")]
    Length(u32),
}

impl Op {
    /// Carries data.
    pub fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

/// Checks a copy of a descriptor. `data` is left empty.
pub(crate) fn parse(tag: u16, desc: &IoDesc, bounds: &Bounds) -> Result<Request, BadDescriptor> {
    let code = desc.op_flags & 0xff;
    let op = match code {
        sys::UBLK_IO_OP_READ => Op::Read,
        sys::UBLK_IO_OP_WRITE => Op::Write,
        sys::UBLK_IO_OP_FLUSH => Op::Flush,
        sys::UBLK_IO_OP_DISCARD => Op::Discard,
        sys::UBLK_IO_OP_WRITE_ZEROES => Op::WriteZeroes,
        _ => return Err(BadDescriptor::Op(code)),
    };
    let request = Request {
        tag,
        op,
        sector: 0,
        sectors: 0,
        fua: desc.op_flags & sys::UBLK_IO_F_FUA != 0 && matches!(op, Op::Write | Op::WriteZeroes),
        no_unmap: desc.op_flags & sys::UBLK_IO_F_NOUNMAP != 0 && op == Op::WriteZeroes,
        data: None,
    };
    if op == Op::Flush {
        return Ok(request);
    }
    let (start, sectors) = (desc.start_sector, desc.nr_sectors);
    let end = start.checked_add(u64::from(sectors)).filter(|end| *end <= bounds.sectors);
    if sectors == 0 || end.is_none() || (start | u64::from(sectors)) & bounds.block_mask != 0 {
        return Err(BadDescriptor::Range { start, sectors, size: bounds.sectors });
    }
    if op.has_data() && sectors > bounds.max_sectors {
        return Err(BadDescriptor::Length(sectors));
    }
    Ok(Request { sector: start, sectors, ..request })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds { block_mask: 7, sectors: 8192, max_sectors: 1024 };

    fn desc(op_flags: u32, start_sector: u64, nr_sectors: u32) -> IoDesc {
        IoDesc { op_flags, nr_sectors, start_sector, addr: 0 }
    }

    #[test]
    fn each_operation_and_flag() {
        let r = parse(3, &desc(0, 8, 16), &BOUNDS).unwrap();
        assert_eq!((r.tag, r.op, r.sector, r.sectors, r.fua), (3, Op::Read, 8, 16, false));
        let r = parse(0, &desc(1 | 1 << 13, 0, 8), &BOUNDS).unwrap();
        assert_eq!((r.op, r.fua), (Op::Write, true));
        let r = parse(0, &desc(5 | 1 << 15, 0, 8192), &BOUNDS).unwrap();
        assert_eq!((r.op, r.no_unmap), (Op::WriteZeroes, true), "longer than data may be");
        assert_eq!(parse(0, &desc(3, 0, 8), &BOUNDS).unwrap().op, Op::Discard);
        // The sectors of a flush mean nothing.
        assert_eq!(parse(0, &desc(2, u64::MAX, 7), &BOUNDS).unwrap().op, Op::Flush);
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(parse(0, &desc(4, 0, 8), &BOUNDS).unwrap_err(), BadDescriptor::Op(4));
        assert_eq!(parse(0, &desc(0, 0, 1032), &BOUNDS).unwrap_err(), BadDescriptor::Length(1032));
        for (start, sectors) in [(0, 0), (4, 8), (0, 12), (8192, 8), (8184, 16), (u64::MAX - 7, 8)] {
            assert!(matches!(parse(0, &desc(0, start, sectors), &BOUNDS), Err(BadDescriptor::Range { .. })));
        }
    }

    proptest! {
        #[test]
        fn what_passes_is_inside(op_flags: u32, start: u64, sectors: u32, tag: u16) {
            for start in [start, start % 16384, start % 1024 * 8] {
                if let Ok(r) = parse(tag, &desc(op_flags, start, sectors), &BOUNDS) {
                    prop_assert!(r.sector + u64::from(r.sectors) <= BOUNDS.sectors);
                    prop_assert!((r.sector | u64::from(r.sectors)) % 8 == 0);
                    prop_assert!(!r.op.has_data() || (1..=1024).contains(&r.sectors));
                    prop_assert_eq!(r.tag, tag);
                }
            }
        }
    }
}
