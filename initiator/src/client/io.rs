//! I/O messages.

use iobuf::Segment;
use rnbd_proto::wire::{Flags, MsgIo, Op as WireOp};
use rtrs_poll::client::{Data, Io, Refused, SessionKey, Submit, Via};
use zerocopy::IntoBytes;

/// What to do. Lengths in bytes, whole logical blocks; at most [`super::Device::max_io_size`] where data travels. Data
/// is in registered memory, as [`Data`] says.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Device to memory.
    Read(Segment),
    /// Memory to device; with `fua` it is on stable storage when it completes.
    Write {
        /// At most [`rtrs_poll::client::Limits::max_pieces`].
        from: &'a [Segment],
        /// Only if [`rnbd_proto::device::DevGeometry::fua`].
        fua: bool,
    },
    /// Makes everything that has completed stable.
    Flush,
    /// The range may lose its content.
    Discard(u32),
    /// The range reads as zeroes.
    WriteZeroes(u32),
    /// The range loses its content for good.
    SecureErase(u32),
}

/// One I/O.
#[derive(Clone, Copy, Debug)]
pub struct IoRequest<'a> {
    /// What to do.
    pub op: Op<'a>,
    /// First sector, in units of 512 bytes; not looked at for a flush.
    pub sector: u64,
    /// Comes back with the completion; at most [`super::MAX_COOKIE`].
    pub cookie: u64,
}

impl<'a> IoRequest<'a> {
    fn message(&self, device: u32) -> MsgIo {
        let sync = Flags::SYNC;
        let (op, flags, sector, len) = match self.op {
            // The kernel's client marks every read so.
            Op::Read(to) => (WireOp::Read, sync, self.sector, to.len),
            Op::Write { from, fua } => {
                let flags = if fua { sync.with(Flags::FUA) } else { Flags::empty() };
                let len = from.iter().fold(0u32, |sum, s| sum.saturating_add(s.len));
                (WireOp::Write, flags, self.sector, len)
            }
            // As the kernel's client sends it: 0x302, all ones.
            Op::Flush => (WireOp::Flush, sync.with(Flags::FUA), u64::MAX, 0),
            Op::Discard(len) => (WireOp::Discard, Flags::empty(), self.sector, len),
            Op::WriteZeroes(len) => (WireOp::WriteZeroes, Flags::empty(), self.sector, len),
            Op::SecureErase(len) => (WireOp::SecureErase, Flags::empty(), self.sector, len),
        };
        MsgIo::request(device, op, flags, sector, len, 0)
    }

    fn data(&self) -> Data<'a> {
        match self.op {
            Op::Read(to) => Data::Read(Some(to)),
            Op::Write { from, .. } => Data::Write(from),
            // A flush is a READ without room for data (`rnbd-clt.c`: the direction is the operation's lowest bit).
            Op::Flush => Data::Read(None),
            Op::Discard(_) | Op::WriteZeroes(_) | Op::SecureErase(_) => Data::Write(&[]),
        }
    }
}

/// Submits `request` to the device that the server of session `key` knows as `device`. As [`Io::submit`].
///
/// # Errors
/// [`Refused`]; `Busy` is an ordinary answer.
pub fn submit(io: &mut Io, key: SessionKey, device: u32, request: &IoRequest<'_>) -> Result<(), Refused> {
    debug_assert!(request.cookie <= super::MAX_COOKIE, "higher cookies are administration's");
    let message = request.message(device);
    let submit =
        Submit { via: Via::Io, usr: message.as_bytes(), data: request.data(), cookie: request.cookie };
    io.submit(key, &submit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rw(op: Op<'_>) -> (u32, u64, u32) {
        let m = IoRequest { op, sector: 8, cookie: 0 }.message(3);
        assert_eq!(m.device_id.get(), 3);
        (m.rw.get(), m.sector.get(), m.bi_size.get())
    }

    /// Seen from the client of Linux 6.12.
    #[test]
    fn messages_are_the_kernels() {
        let segment = Segment { addr: 0, len: 4096, region: iobuf::RegionId::NONE };
        let from = &[segment][..];
        assert_eq!(rw(Op::Read(segment)), (0x100, 8, 4096));
        assert_eq!(rw(Op::Write { from, fua: false }), (0x001, 8, 4096));
        assert_eq!(rw(Op::Write { from, fua: true }), (0x301, 8, 4096));
        assert_eq!(rw(Op::Flush), (0x302, u64::MAX, 0));
        assert_eq!(rw(Op::Discard(8192)), (0x003, 8, 8192));
        assert_eq!(rw(Op::WriteZeroes(512)), (0x005, 8, 512));
        assert_eq!(rw(Op::SecureErase(512)), (0x004, 8, 512));
    }
}
