//! Between the words of NBD and those of bdev.

use bdev::{Flags, Info, IoRequest, Op, Segments, Status};
use nbd_poll::{Incoming, MAX_PAYLOAD};
use nbd_proto::request::{Command, Export};
use nbd_proto::wire::{ErrorCode, TransmissionFlags};

use crate::nbd_error::error_code;

/// What the kernel is told of a bdev of `blocks` blocks.
pub(super) fn export(info: &Info, blocks: u64, read_only: bool) -> Export {
    let read_only = read_only || info.read_only;
    let discards = info.native.has(Op::Discard) && !read_only;
    let caches = info.write_cache && !read_only;
    // A flush of any channel covers what was acknowledged on all.
    let flags = (TransmissionFlags::HAS_FLAGS | TransmissionFlags::CAN_MULTI_CONN)
        .with_if(TransmissionFlags::READ_ONLY, read_only)
        .with_if(TransmissionFlags::ROTATIONAL, info.rotational)
        .with_if(TransmissionFlags::SEND_FLUSH, caches)
        .with_if(TransmissionFlags::SEND_FUA, caches)
        .with_if(TransmissionFlags::SEND_TRIM, discards)
        .with_if(TransmissionFlags::SEND_WRITE_ZEROES, !read_only);
    Export {
        size: blocks.saturating_mul(info.block_size.into()),
        block_size: info.block_size,
        any_range: false,
        max_payload: MAX_PAYLOAD,
        flags,
    }
}

/// The request for a bdev of 2^`shift`-byte blocks, its cookie being the request's id; `None`: there is nothing to do.
pub(super) fn io_request(incoming: &mut Incoming, shift: u32) -> Option<IoRequest> {
    let flag = |on: bool, flag: Flags| if on { flag } else { Flags::NONE };
    let (op, flags) = match incoming.request.command() {
        Command::Read => (Op::Read, Flags::NONE),
        Command::Write { fua } => (Op::Write, flag(fua, Flags::FUA)),
        Command::Flush => (Op::Flush, Flags::NONE),
        Command::Trim { .. } => (Op::Discard, Flags::NONE),
        Command::WriteZeroes { fua, no_hole, .. } => {
            (Op::WriteZeroes, flag(fua, Flags::FUA) | flag(no_hole, Flags::NO_UNMAP))
        }
        // Not offered.
        Command::Cache | Command::BlockStatus { .. } => return None,
    };
    Some(IoRequest {
        op,
        flags,
        // The connection checked that both are whole blocks.
        lba: incoming.request.offset() >> shift,
        blocks: incoming.request.len() >> shift,
        segments: std::mem::take(&mut incoming.segments),
        cookie: incoming.id.0.into(),
    })
}

/// Makes an earlier discard stable: NBD lets TRIM have FUA, bdevs do not.
pub(super) fn flush(cookie: u64) -> IoRequest {
    IoRequest { op: Op::Flush, flags: Flags::NONE, lba: 0, blocks: 0, segments: Segments::new(), cookie }
}

/// As NBD says it. The kernel makes EIO of every error.
pub(super) fn answer(status: Status) -> Result<(), ErrorCode> {
    if status == Status::Ok { Ok(()) } else { Err(error_code(status)) }
}

/// What the kernel keeps with a device, so that a later run of `program` knows it again.
pub(super) fn backend(program: &str, bdev: &str) -> String {
    format!("{program}:{bdev}")
}

/// The bdev in a [`backend`]; `None`: not one of `program`'s.
pub(super) fn bdev_of<'a>(program: &str, backend: &'a str) -> Option<&'a str> {
    backend.strip_prefix(program)?.strip_prefix(':')
}

#[cfg(test)]
mod tests {
    use bdev::OpSet;

    use super::*;

    fn info() -> Info {
        Info {
            name: "B".into(),
            aliases: Vec::new(),
            product_name: "URING bdev",
            uuid: uuid::Uuid::nil(),
            block_size: 4096,
            physical_block_size: 4096,
            native: OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Discard]),
            native_fua: false,
            write_cache: true,
            read_only: false,
            volatile: false,
            discard_granularity: 4096,
            rotational: false,
            max_unmap_blocks: u64::MAX,
            buffer_align: 1,
        }
    }

    #[test]
    fn the_kernel_is_told_what_the_bdev_can() {
        let all = export(&info(), 10, false);
        assert_eq!((all.size, all.block_size, all.flags.0), (40960, 4096, 0b1_0110_1101));
        assert_eq!(export(&info(), 10, true).flags.0, 0b1_0000_0011);
        let read_only = Info { read_only: true, ..info() };
        assert_eq!(export(&read_only, 10, false).flags.0, 0b1_0000_0011);
        let plain = Info { native: OpSet::of(&[Op::Read, Op::Write]), write_cache: false, ..info() };
        assert_eq!(export(&plain, 10, false).flags.0, 0b1_0100_0001);
        let spinning = Info { rotational: true, ..plain };
        assert_eq!(export(&spinning, 10, false).flags.0, 0b1_0101_0001);
    }

    #[test]
    fn a_backend_names_its_bdev() {
        assert_eq!(bdev_of("rnbd-target", &backend("rnbd-target", "disk 0")), Some("disk 0"));
        for other in ["/srv/image.qcow2", "rnbd-initiator:disk 0", "rnbd-target2:disk 0"] {
            assert_eq!(bdev_of("rnbd-target", other), None);
        }
    }

    #[test]
    fn only_ok_is_no_error() {
        for status in Status::ALL {
            assert_eq!(answer(status).is_ok(), status == Status::Ok, "{status:?}");
        }
    }
}
