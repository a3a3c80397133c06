//! Between the words of ublk and those of bdev.

use bdev::{Flags, Info, IoRequest, Op, Segments, Status};
use rustix::io::Errno;
use ublk_poll::{Geometry, Request};

/// Largest request with user copy, bytes: large enough that no disk gains from more.
const MAX_IO_USER_COPY: u32 = 512 << 10;
/// Largest request without: every tag has a buffer of this size.
const MAX_IO_PLAIN: u32 = 64 << 10;

/// What the kernel is told of a bdev of `blocks` blocks.
pub(super) fn geometry(info: &Info, blocks: u64, read_only: bool, user_copy: bool) -> Geometry {
    let block = u64::from(info.block_size);
    let read_only = read_only || info.read_only;
    let most = info.max_unmap_blocks.saturating_mul(block);
    let discards = info.native.has(Op::Discard) && !read_only;
    Geometry {
        block_size: info.block_size,
        physical_block_size: info.physical_block_size,
        size: blocks.saturating_mul(block),
        max_io: if user_copy { MAX_IO_USER_COPY } else { MAX_IO_PLAIN },
        discard_granularity: if discards { info.discard_granularity.max(info.block_size) } else { 0 },
        max_discard: most,
        // Every writable bdev takes it: where the backend does not, the I/O channel writes zeroes.
        max_write_zeroes: if read_only { 0 } else { most },
        write_cache: info.write_cache && !read_only,
        rotational: info.rotational,
        read_only,
    }
}

/// `request` for a bdev of 2^`shift`-byte blocks. Its cookie is the tag.
pub(super) fn io_request(request: &Request, shift: u32) -> IoRequest {
    let op = match request.op {
        ublk_poll::Op::Read => Op::Read,
        ublk_poll::Op::Write => Op::Write,
        ublk_poll::Op::Flush => Op::Flush,
        ublk_poll::Op::Discard => Op::Discard,
        ublk_poll::Op::WriteZeroes => Op::WriteZeroes,
    };
    let flag = |on: bool, flag: Flags| if on { flag } else { Flags::NONE };
    let mut segments = Segments::new();
    segments.extend(request.data);
    IoRequest {
        op,
        flags: flag(request.fua, Flags::FUA) | flag(request.no_unmap, Flags::NO_UNMAP),
        // The queue checked that both are whole blocks.
        lba: request.sector >> (shift - 9),
        blocks: u64::from(request.sectors) >> (shift - 9),
        segments,
        cookie: u64::from(request.tag),
    }
}

/// As the block layer understands it (`blk_errors` in block/blk-core.c); it never retries on its own.
pub(super) fn result(status: Status) -> Result<(), Errno> {
    Err(match status {
        Status::Ok => return Ok(()),
        Status::MediumError => Errno::NODATA,
        Status::NoSpace => Errno::NOSPC,
        Status::Unsupported => Errno::OPNOTSUPP,
        Status::Invalid => Errno::INVAL,
        Status::TimedOut => Errno::TIMEDOUT,
        // Says "not this one, perhaps another path", which is right for a device that is gone.
        Status::Gone => Errno::NOLINK,
        Status::IoError | Status::OutOfRange | Status::ReadOnly | Status::Aborted | Status::Busy => Errno::IO,
    })
}

/// First word of [`mark`]: "RNBD".
const MAGIC: u32 = 0x524e_4244;

/// Kept with the device by the kernel, so that a later run of the program knows it again: whose it is, and of which bdev.
pub(super) fn mark(bdev: &str) -> u64 {
    u64::from(MAGIC) << 32 | u64::from(crc32fast::hash(bdev.as_bytes()))
}

/// The device was made by this program, now or in an earlier life.
pub(super) fn is_marked(mark: u64) -> bool {
    mark >> 32 == u64::from(MAGIC)
}

#[cfg(test)]
mod tests {
    use bdev::OpSet;

    use super::*;

    fn info() -> Info {
        Info {
            name: "D".into(),
            aliases: Vec::new(),
            product_name: "URING bdev",
            uuid: uuid::Uuid::nil(),
            block_size: 4096,
            physical_block_size: 4096,
            native: OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Discard]),
            native_fua: true,
            write_cache: true,
            read_only: false,
            volatile: false,
            discard_granularity: 4096,
            rotational: false,
            max_unmap_blocks: 16,
            buffer_align: 1,
        }
    }

    #[test]
    fn the_kernel_is_told_what_the_bdev_does() {
        let g = geometry(&info(), 100, false, true);
        assert_eq!((g.size, g.max_io, g.block_size), (409_600, 512 << 10, 4096));
        assert_eq!((g.discard_granularity, g.max_discard, g.max_write_zeroes), (4096, 65536, 65536));
        assert!(g.write_cache && !g.read_only);
        assert_eq!(g.check(), Ok(()));
        let g = geometry(&info(), 100, true, false);
        assert_eq!((g.discard_granularity, g.max_write_zeroes, g.max_io), (0, 0, 64 << 10));
        assert!(g.read_only && !g.write_cache);
        let plain = Info { native: OpSet::of(&[Op::Read, Op::Write]), write_cache: false, ..info() };
        let g = geometry(&plain, 100, false, true);
        assert_eq!((g.discard_granularity, g.max_write_zeroes, g.write_cache), (0, 65536, false));
    }

    #[test]
    fn sectors_become_blocks() {
        let r = Request {
            tag: 9,
            op: ublk_poll::Op::WriteZeroes,
            sector: 16,
            sectors: 8,
            fua: true,
            no_unmap: true,
            data: None,
        };
        let io = io_request(&r, 12);
        assert_eq!((io.op, io.lba, io.blocks, io.cookie), (Op::WriteZeroes, 2, 1, 9));
        assert_eq!(io.flags, Flags::FUA | Flags::NO_UNMAP);
        let flush =
            Request { op: ublk_poll::Op::Flush, sector: 0, sectors: 0, fua: false, no_unmap: false, ..r };
        let io = io_request(&flush, 9);
        assert_eq!((io.op, io.lba, io.blocks, io.flags), (Op::Flush, 0, 0, Flags::NONE));
    }

    /// All that a lane does with a request between the driver's ring and the bdev.
    #[test]
    fn a_request_on_its_way_allocates_nothing() {
        let manager = bdev::Manager::new(iobuf::Registry::new());
        let params = bdev::malloc::Params {
            name: None,
            uuid: None,
            num_blocks: 1024,
            block_size: 4096,
            physical_block_size: None,
        };
        let name = bdev::malloc::create(&manager, params).unwrap();
        let descriptor = manager.open(&name, bdev::Mode::ReadWrite, Box::new(|_| ())).unwrap();
        let memory = manager.registry().map(65536).unwrap();
        let mut channel = descriptor.channel().unwrap();
        let mut done = bdev::Completions::with_capacity(8);
        let mut turn = |sector| {
            use ublk_poll::Op;
            for (tag, op) in
                [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes].into_iter().enumerate()
            {
                let (sector, sectors) = if op == Op::Flush { (0, 0) } else { (sector, 128) };
                // SAFETY: the memory outlives the test's requests, and nobody looks at what it holds.
                let data = unsafe { memory.segment(0, 65536) }.filter(|_| op.has_data());
                let fua = op == Op::Write;
                let request = Request { tag: tag as u16, op, sector, sectors, fua, no_unmap: false, data };
                channel.submit(io_request(&request, 12)).unwrap();
            }
            channel.kick();
            while channel.inflight() > 0 {
                channel.poll(&mut done);
            }
            assert!(done.drain(..).all(|c| result(c.status).is_ok()));
        };
        (0..16).for_each(|i| turn(i * 128));
        let before = test_support::allocations();
        (0..2000).for_each(|i| turn(i % 32 * 128));
        assert_eq!(test_support::allocations(), before);
    }

    #[test]
    fn only_ok_is_success() {
        for status in Status::ALL {
            assert_eq!(result(status).is_ok(), status == Status::Ok, "{status:?}");
            // The kernel would hand EAGAIN to the application.
            assert_ne!(result(status), Err(Errno::AGAIN));
        }
    }

    #[test]
    fn marks_tell_bdevs_apart() {
        assert!(is_marked(mark("a")) && is_marked(mark("")));
        assert_ne!(mark("a"), mark("b"));
        assert!(!is_marked(0) && !is_marked(u64::from(MAGIC)));
    }
}
