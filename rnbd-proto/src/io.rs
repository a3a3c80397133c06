//! From a client's I/O message to a request that made sense for its device.
//!
//! The kernel server (`rnbd-srv.c`, `process_rdma`) checks the data length only and leaves the rest to the block layer;
//! in particular it lets writes through a read-only open. Here everything is checked, in this order:
//!
//! | what                                        | errno      | kernel client makes of it |
//! |---------------------------------------------|------------|---------------------------|
//! | unknown op, or one the device lacks         | EOPNOTSUPP | BLK_STS_NOTSUPP           |
//! | data length or direction does not fit       | EINVAL     | BLK_STS_INVAL             |
//! | change through a read-only open             | EROFS      | BLK_STS_IOERR             |
//! | not whole logical blocks                    | EINVAL     | BLK_STS_INVAL             |
//! | past the end                                | EIO        | BLK_STS_IOERR             |
//!
//! An unknown device is found before, by [`crate::session::Session::device`]: ENOTCONN.

use std::fmt;

use rtrs_proto::request::{Direction, Request};

use crate::device::DevGeometry;
use crate::errno::Errno;
use crate::wire::{Flags, MsgIo, Op, SECTOR_SIZE};

/// The data that travels with a request, as the transport sees it. Lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// None, either way.
    None,
    /// The client sent some.
    In(u32),
    /// The client has room for some; it gets all of it if the request succeeds.
    Out(u32),
}

impl Data {
    /// Room for an answer of `len` bytes (SESS_INFO, OPEN); what lies beyond them goes out too, so clear it.
    pub const fn has_room(self, len: usize) -> bool {
        matches!(self, Data::Out(room) if room as usize >= len)
    }
}

impl From<&Request> for Data {
    fn from(request: &Request) -> Data {
        match request.direction {
            Direction::Write if request.data_len == 0 => Data::None,
            Direction::Write => Data::In(request.data_len),
            Direction::Read { desc: Some(desc), .. } => Data::Out(desc.len.get()),
            Direction::Read { desc: None, .. } => Data::None,
        }
    }
}

/// What to do. Anything but these was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Read into the request's data.
    Read,
    /// Write the request's data.
    Write,
    /// Make everything written so far stable; the range is empty.
    Flush,
    /// The range may lose its content.
    Discard,
    /// The range must lose its content for good.
    SecureErase,
    /// The range must read as zeroes.
    WriteZeroes,
}

/// A request that made sense: the range lies within the device and consists of whole logical blocks, the data fits
/// it, and the open may do it. There is no other way to get one than [`IoReq::check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoReq {
    op: IoOp,
    sector: u64,
    len: u32,
    flags: Flags,
    prio: u16,
}

/// Why a request made no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadIo {
    /// Nobody knows this op.
    #[error("unknown operation {0}")]
    Op(u8),
    /// The device was not announced to do this.
    #[error("device does not support {0}")]
    Unsupported(Op),
    /// Data and `bi_size` disagree, or the data goes the wrong way.
    #[error("{op} of {bi_size} bytes with data {data:?}")]
    Data {
        /// The operation.
        op: Op,
        /// From the message.
        bi_size: u32,
        /// From the transport.
        data: Data,
    },
    /// An operation on nothing.
    #[error("{0} of 0 bytes")]
    Empty(Op),
    /// The open may not change the device.
    #[error("{0} through a read-only open")]
    ReadOnly(Op),
    /// Not whole logical blocks.
    #[error("sector {sector} + {bi_size} bytes: not whole blocks of {logical_block_size} bytes")]
    Alignment {
        /// In 512-byte units.
        sector: u64,
        /// From the message.
        bi_size: u32,
        /// Of the device.
        logical_block_size: u32,
    },
    /// Past the end of the device.
    #[error("sector {sector} + {bi_size} bytes is past the end at sector {capacity_sectors}")]
    Range {
        /// In 512-byte units.
        sector: u64,
        /// From the message.
        bi_size: u32,
        /// Of the device.
        capacity_sectors: u64,
    },
}

impl BadIo {
    /// What to answer; see the table at the head of this module.
    pub const fn errno(&self) -> Errno {
        match self {
            BadIo::Op(_) | BadIo::Unsupported(_) => Errno::EOPNOTSUPP,
            BadIo::Data { .. } | BadIo::Empty(_) | BadIo::Alignment { .. } => Errno::EINVAL,
            BadIo::ReadOnly(_) => Errno::EROFS,
            BadIo::Range { .. } => Errno::EIO,
        }
    }
}

impl IoReq {
    /// Checks `msg` against the device it names and the data that came with it.
    ///
    /// # Errors
    /// [`BadIo`].
    pub const fn check(msg: &MsgIo, device: &DevGeometry, data: Data) -> Result<IoReq, BadIo> {
        let op = match check_op(msg.op(), device) {
            Ok(op) => op,
            Err(bad) => return Err(bad),
        };
        if let Err(bad) = check_data(msg, data) {
            return Err(bad);
        }
        if matches!(op, IoOp::Flush) || is_empty_flush(msg) {
            return Ok(IoReq::flush(msg.prio.get()));
        }
        if device.read_only && msg.op().modifies() {
            return Err(BadIo::ReadOnly(msg.op()));
        }
        if let Err(bad) = check_range(msg, device) {
            return Err(bad);
        }
        let (sector, len) = (msg.sector.get(), msg.bi_size.get());
        Ok(IoReq { op, sector, len, flags: msg.flags(), prio: msg.prio.get() })
    }

    const fn flush(prio: u16) -> IoReq {
        // Kernel clients set FUA on a flush, where it means nothing, and a sector that is none.
        IoReq { op: IoOp::Flush, sector: 0, len: 0, flags: Flags::empty(), prio }
    }

    /// What to do.
    pub const fn op(&self) -> IoOp {
        self.op
    }

    /// Start in 512-byte sectors.
    pub const fn sector(&self) -> u64 {
        self.sector
    }

    /// Start in bytes.
    pub const fn offset(&self) -> u64 {
        self.sector * SECTOR_SIZE as u64
    }

    /// Bytes, 0 for a flush only.
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// Only a flush is.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// It must be on stable storage when it completes.
    pub const fn fua(&self) -> bool {
        self.flags.contains(Flags::FUA) && !matches!(self.op, IoOp::Read)
    }

    /// Flush the cache before doing it.
    pub const fn preflush(&self) -> bool {
        self.flags.contains(Flags::PREFLUSH)
    }

    /// Zeroes must not be made by deallocating.
    pub const fn no_unmap(&self) -> bool {
        self.flags.contains(Flags::NOUNMAP)
    }

    /// Someone waits for it; a hint.
    pub const fn sync(&self) -> bool {
        self.flags.contains(Flags::SYNC)
    }

    /// Linux `ioprio`; means nothing in a session of version 1.
    pub const fn prio(&self) -> u16 {
        self.prio
    }
}

impl fmt::Display for IoReq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{} sector {} len {}", self.op, self.flags, self.sector, self.len)
    }
}

const fn check_op(op: Op, device: &DevGeometry) -> Result<IoOp, BadIo> {
    let (op_ok, supported) = match op {
        Op::Read => (IoOp::Read, true),
        Op::Write => (IoOp::Write, true),
        Op::Flush => (IoOp::Flush, true),
        Op::Discard => (IoOp::Discard, device.max_discard_sectors != 0),
        Op::SecureErase => (IoOp::SecureErase, device.secure_erase),
        Op::WriteZeroes => (IoOp::WriteZeroes, device.max_write_zeroes_sectors != 0),
        Op::Unknown(op) => return Err(BadIo::Op(op)),
    };
    if supported { Ok(op_ok) } else { Err(BadIo::Unsupported(op)) }
}

/// Clients that know PREFLUSH may ask for a flush by an empty write, as the kernel's block layer does inside.
const fn is_empty_flush(msg: &MsgIo) -> bool {
    matches!(msg.op(), Op::Write) && msg.bi_size.get() == 0 && msg.flags().contains(Flags::PREFLUSH)
}

const fn check_data(msg: &MsgIo, data: Data) -> Result<(), BadIo> {
    let (op, bi_size) = (msg.op(), msg.bi_size.get());
    let fits = match (op, data) {
        (Op::Read, Data::Out(len)) | (Op::Write, Data::In(len)) => len == bi_size,
        // What follows is either empty or has nowhere to take its data from, or to put it.
        (Op::Read | Op::Write, Data::None) => bi_size == 0,
        (Op::Read | Op::Write, Data::In(_) | Data::Out(_)) => false,
        (Op::Flush, Data::None) => bi_size == 0,
        (Op::Flush, Data::In(_) | Data::Out(_)) => false,
        // The kernel server takes, and ignores, data that is as long as the range.
        (_, Data::In(len)) => len == bi_size,
        (_, Data::None) => true,
        (_, Data::Out(_)) => false,
    };
    if !fits {
        return Err(BadIo::Data { op, bi_size, data });
    }
    if bi_size == 0 && !matches!(op, Op::Flush) && !is_empty_flush(msg) {
        return Err(BadIo::Empty(op));
    }
    Ok(())
}

const fn check_range(msg: &MsgIo, device: &DevGeometry) -> Result<(), BadIo> {
    let (sector, bi_size) = (msg.sector.get(), msg.bi_size.get());
    let (logical_block_size, capacity_sectors) = (device.logical_block_size(), device.capacity_sectors());
    let block_sectors = (logical_block_size / SECTOR_SIZE) as u64;
    if !sector.is_multiple_of(block_sectors) || !bi_size.is_multiple_of(logical_block_size) {
        return Err(BadIo::Alignment { sector, bi_size, logical_block_size });
    }
    let sectors = (bi_size / SECTOR_SIZE) as u64;
    if sectors > capacity_sectors || sector > capacity_sectors - sectors {
        return Err(BadIo::Range { sector, bi_size, capacity_sectors });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> DevGeometry {
        let mut device = DevGeometry::new(1000 * 8, 4096).unwrap();
        device.max_discard_sectors = 8;
        device.max_write_zeroes_sectors = 8;
        device
    }

    fn read_only() -> DevGeometry {
        let mut device = device();
        device.read_only = true;
        device
    }

    fn msg(op: Op, sector: u64, len: u32) -> MsgIo {
        MsgIo::request(1, op, Flags::SYNC, sector, len, 0)
    }

    fn errno(msg: MsgIo, device: &DevGeometry, data: Data) -> Errno {
        IoReq::check(&msg, device, data).unwrap_err().errno()
    }

    #[test]
    fn read_and_write() {
        let r = IoReq::check(&msg(Op::Read, 8, 4096), &device(), Data::Out(4096)).unwrap();
        assert_eq!((r.op(), r.sector(), r.offset(), r.len(), r.sync()), (IoOp::Read, 8, 4096, 4096, true));
        let fua = MsgIo::request(1, Op::Write, Flags::FUA, 7992, 4096, 0x4004);
        let w = IoReq::check(&fua, &device(), Data::In(4096)).unwrap();
        assert_eq!((w.op(), w.fua(), w.preflush(), w.prio()), (IoOp::Write, true, false, 0x4004));
        assert_eq!(w.to_string(), "Write|FUA sector 7992 len 4096");
    }

    #[test]
    fn flush_as_the_kernel_sends_it() {
        let m = MsgIo::request(1, Op::Flush, Flags::SYNC.with(Flags::FUA), u64::MAX, 0, 0);
        let ro = read_only();
        let r = IoReq::check(&m, &ro, Data::None).unwrap();
        assert_eq!((r.op(), r.offset(), r.len(), r.fua()), (IoOp::Flush, 0, 0, false));
    }

    #[test]
    fn empty_write_with_preflush_is_a_flush() {
        let m = MsgIo::request(1, Op::Write, Flags::PREFLUSH, 0, 0, 0);
        assert_eq!(IoReq::check(&m, &device(), Data::None).unwrap().op(), IoOp::Flush);
        assert_eq!(errno(msg(Op::Write, 0, 0), &device(), Data::None), Errno::EINVAL);
        assert_eq!(errno(msg(Op::Read, 0, 0), &device(), Data::None), Errno::EINVAL);
        assert_eq!(errno(msg(Op::Discard, 0, 0), &device(), Data::None), Errno::EINVAL);
    }

    #[test]
    fn newer_flags_are_honoured() {
        let flags = Flags::PREFLUSH.with(Flags::NOUNMAP);
        let m = MsgIo::request(1, Op::WriteZeroes, flags, 0, 4096, 0);
        let r = IoReq::check(&m, &device(), Data::None).unwrap();
        assert!(r.preflush() && r.no_unmap() && !r.fua());
    }

    #[test]
    fn unknown_and_unsupported_ops() {
        assert_eq!(errno(msg(Op::Unknown(6), 0, 4096), &device(), Data::None), Errno::EOPNOTSUPP);
        assert_eq!(errno(msg(Op::SecureErase, 0, 4096), &device(), Data::None), Errno::EOPNOTSUPP);
        let plain = DevGeometry::new(8, 512).unwrap();
        assert_eq!(errno(msg(Op::Discard, 0, 4096), &plain, Data::None), Errno::EOPNOTSUPP);
        assert_eq!(errno(msg(Op::WriteZeroes, 0, 4096), &plain, Data::None), Errno::EOPNOTSUPP);
    }

    #[test]
    fn data_must_fit_size_and_direction() {
        let bad = [
            (Op::Read, Data::Out(8192)),
            (Op::Read, Data::In(4096)),
            (Op::Read, Data::None),
            (Op::Write, Data::In(512)),
            (Op::Write, Data::Out(4096)),
            (Op::Write, Data::None),
            (Op::Discard, Data::In(512)),
            (Op::Discard, Data::Out(4096)),
            (Op::Flush, Data::None),
            (Op::Flush, Data::In(4096)),
        ];
        for (op, data) in bad {
            assert_eq!(errno(msg(op, 0, 4096), &device(), data), Errno::EINVAL, "{op} {data:?}");
        }
        assert!(IoReq::check(&msg(Op::Discard, 0, 4096), &device(), Data::In(4096)).is_ok());
    }

    #[test]
    fn read_only_opens_do_not_change_the_device() {
        let ro = read_only();
        assert_eq!(errno(msg(Op::Write, 0, 4096), &ro, Data::In(4096)), Errno::EROFS);
        assert_eq!(errno(msg(Op::Discard, 0, 4096), &ro, Data::None), Errno::EROFS);
        assert_eq!(errno(msg(Op::WriteZeroes, 0, 4096), &ro, Data::None), Errno::EROFS);
        assert!(IoReq::check(&msg(Op::Read, 0, 4096), &ro, Data::Out(4096)).is_ok());
    }

    #[test]
    fn whole_blocks_only() {
        assert_eq!(errno(msg(Op::Read, 1, 4096), &device(), Data::Out(4096)), Errno::EINVAL);
        assert_eq!(errno(msg(Op::Read, 0, 512), &device(), Data::Out(512)), Errno::EINVAL);
        let d512 = DevGeometry::new(8, 512).unwrap();
        assert_eq!(errno(msg(Op::Read, 0, 511), &d512, Data::Out(511)), Errno::EINVAL);
    }

    #[test]
    fn past_the_end() {
        assert!(IoReq::check(&msg(Op::Read, 7992, 4096), &device(), Data::Out(4096)).is_ok());
        assert_eq!(errno(msg(Op::Read, 7992, 8192), &device(), Data::Out(8192)), Errno::EIO);
        assert_eq!(errno(msg(Op::Read, 8000, 4096), &device(), Data::Out(4096)), Errno::EIO);
        assert_eq!(errno(msg(Op::Read, u64::MAX - 7, 4096), &device(), Data::Out(4096)), Errno::EIO);
        let tiny = DevGeometry::new(0, 512).unwrap();
        assert_eq!(errno(msg(Op::Read, 0, 512), &tiny, Data::Out(512)), Errno::EIO);
    }
}
