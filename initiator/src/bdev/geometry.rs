//! A device as the server describes it, turned into a bdev.

use bdev::{Info, Op, OpSet};
use rnbd_proto::device::DevGeometry;
use rnbd_proto::open::AccessMode;
use uuid::Uuid;

use super::disk::PRODUCT_NAME;
use super::request::Limits;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Properties of the bdev `name`. What the server does not offer is missing from `native`, and emulated by
/// [`bdev::IoChannel`] where it can be.
pub(super) fn info(name: &str, uuid: Uuid, mode: AccessMode, g: &DevGeometry) -> Info {
    let block_size = g.logical_block_size();
    let mut native = OpSet::of(&[Op::Read, Op::Reset]);
    let offered = [
        (Op::Write, true),
        (Op::WriteZeroes, g.max_write_zeroes_sectors > 0),
        (Op::Discard, g.max_discard_sectors > 0),
        (Op::SecureErase, g.secure_erase && g.max_discard_sectors > 0),
    ];
    for (op, _) in offered.into_iter().filter(|(_, offered)| *offered && mode.writes()) {
        native = native.with(op);
    }
    if g.write_cache {
        native = native.with(Op::Flush);
    }
    let discards = native.has(Op::Discard);
    Info {
        name: name.to_owned(),
        aliases: Vec::new(),
        product_name: PRODUCT_NAME,
        uuid,
        block_size,
        // A hint of the server's; nonsense counts for nothing.
        physical_block_size: Some(g.physical_block_size)
            .filter(|p| p.is_power_of_two() && *p >= block_size)
            .unwrap_or(block_size),
        native,
        // As the kernel's client: forced writes mean something only where there is a cache.
        native_fua: g.fua && g.write_cache,
        write_cache: g.write_cache,
        read_only: !mode.writes(),
        volatile: false,
        discard_granularity: if discards { g.discard_granularity.max(block_size) } else { 0 },
        rotational: false,
        max_unmap_blocks: u64::MAX,
        buffer_align: 1,
    }
}

/// Size in blocks.
pub(super) fn blocks(g: &DevGeometry) -> u64 {
    g.capacity_sectors() / (u64::from(g.logical_block_size()) / SECTOR)
}

/// What one message may ask for, in whole blocks.
pub(super) fn limits(g: &DevGeometry, max_io_size: u32) -> Limits {
    let block = u64::from(g.logical_block_size());
    let whole = |bytes: u64| {
        let bytes = bytes.min(u64::from(u32::MAX));
        // At most 2^32 - 1.
        (bytes - bytes % block) as u32
    };
    let sectors = |n: u32| whole(u64::from(n) * SECTOR);
    let discard = sectors(g.max_discard_sectors);
    Limits {
        data: whole(max_io_size.into()),
        discard,
        write_zeroes: sectors(g.max_write_zeroes_sectors),
        secure_erase: if g.secure_erase { discard } else { 0 },
    }
}

/// Why a device that was opened again is not the one that its bdev promises, in words; `None` if it is. Its size may
/// differ. A discard or zeroing that is not offered any more fails when it is tried.
pub(super) fn misfit(info: &Info, g: &DevGeometry, max_io_size: u32) -> Option<String> {
    let now = g.logical_block_size();
    if now != info.block_size {
        return Some(format!("its block size is {now} bytes now, and was {}", info.block_size));
    }
    if g.write_cache && !info.write_cache {
        return Some("it has a volatile write cache now, and had none: flushes would be missing".into());
    }
    if info.native_fua && g.write_cache && !g.fua {
        return Some("it cannot force single writes to stable storage any more".into());
    }
    too_small(g, max_io_size)
}

/// A device whose blocks no message can carry.
pub(super) fn too_small(g: &DevGeometry, max_io_size: u32) -> Option<String> {
    let block = g.logical_block_size();
    (max_io_size < block)
        .then(|| format!("its blocks have {block} bytes, and the server takes {max_io_size} at once"))
        .or_else(|| (g.capacity_sectors() == 0).then(|| "it has no blocks".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plain device of `sectors`, changed by `f`.
    fn device(sectors: u64, block_size: u32, f: impl FnOnce(&mut DevGeometry)) -> DevGeometry {
        let mut g = DevGeometry::new(sectors, block_size).unwrap();
        f(&mut g);
        g
    }

    fn with(mut g: DevGeometry, f: impl FnOnce(&mut DevGeometry)) -> DevGeometry {
        f(&mut g);
        g
    }

    fn geometry() -> DevGeometry {
        device(1 << 20, 1024, |g| {
            g.physical_block_size = 4096;
            g.write_cache = true;
            g.fua = true;
            g.max_discard_sectors = u32::MAX;
            g.discard_granularity = 4096;
            g.max_write_zeroes_sectors = 17;
            g.secure_erase = true;
        })
    }

    #[test]
    fn what_the_server_offers_is_native() {
        let i = info("d", Uuid::nil(), AccessMode::ReadWrite, &geometry());
        let all = [Op::Read, Op::Write, Op::Flush, Op::WriteZeroes, Op::Discard, Op::SecureErase, Op::Reset];
        assert!(all.into_iter().all(|op| i.native.has(op)));
        assert!(i.native_fua && i.write_cache && !i.read_only);
        assert_eq!((i.block_size, i.physical_block_size, i.discard_granularity), (1024, 4096, 4096));
        let i = info("d", Uuid::nil(), AccessMode::ReadOnly, &geometry());
        assert!(
            i.read_only && i.native.has(Op::Read) && !i.native.has(Op::Write) && !i.native.has(Op::Discard)
        );
        let plain = device(8, 512, |g| g.fua = true);
        let i = info("d", Uuid::nil(), AccessMode::ReadWrite, &plain);
        assert!(!i.native.has(Op::Flush) && !i.native_fua && !i.native.has(Op::WriteZeroes));
        let odd = with(geometry(), |g| g.physical_block_size = 5000);
        assert_eq!(info("d", Uuid::nil(), AccessMode::ReadWrite, &odd).physical_block_size, 1024);
    }

    #[test]
    fn limits_are_whole_blocks() {
        let g = geometry();
        assert_eq!(blocks(&g), 1 << 19);
        let most = u32::MAX - 1023;
        let want = Limits { data: 126_976, discard: most, write_zeroes: 8192, secure_erase: most };
        assert_eq!(limits(&g, 126_976), want);
        assert_eq!(limits(&g, 5000).data, 4096);
        let none = DevGeometry::new(8, 512).unwrap();
        assert_eq!(limits(&none, 4096), Limits { data: 4096, ..Limits::default() });
    }

    #[test]
    fn a_device_that_changed_its_nature_is_not_the_same() {
        let g = geometry();
        let i = info("d", Uuid::nil(), AccessMode::ReadWrite, &g);
        assert_eq!(misfit(&i, &with(g, |g| g.max_discard_sectors = 0), 4096), None);
        let plain = with(g, |g| (g.write_cache, g.fua) = (false, false));
        assert_eq!(misfit(&i, &plain, 4096), None);
        let words = |g: DevGeometry, most| misfit(&i, &g, most).unwrap();
        let other = DevGeometry::new(1 << 20, 4096).unwrap();
        assert!(words(other, 4096).contains("4096 bytes now, and was 1024"));
        assert!(words(with(g, |g| g.fua = false), 4096).contains("force single writes"));
        assert!(words(g, 512).contains("takes 512 at once"));
        let uncached = with(g, |g| g.write_cache = false);
        let uncached = info("d", Uuid::nil(), AccessMode::ReadWrite, &uncached);
        assert!(misfit(&uncached, &g, 4096).unwrap().contains("volatile write cache"));
        assert!(too_small(&DevGeometry::new(0, 512).unwrap(), 4096).unwrap().contains("no blocks"));
    }
}
