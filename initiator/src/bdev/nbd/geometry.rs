//! An export as the server describes it, turned into a bdev.

use bdev::{Info, Op, OpSet};
use nbd_proto::client::{Agreed, Framing};
use nbd_proto::request::DEFAULT_MAX_PAYLOAD;
use nbd_proto::wire::{ORIGINAL_MAX_SIZE, TransmissionFlags as Flag};
use uuid::Uuid;

use crate::bdev::request::Limits;

/// As `bdev_get_bdevs` shows it.
pub(super) const PRODUCT_NAME: &str = "NBD disk";
/// Bytes of a bdev's smallest block.
const SECTOR: u32 = 512;
/// Most data of one request, even if a server takes more: so that others get their turn.
const MAX_DATA: u32 = 4 << 20;
/// Servers of 1997 had fixed buffers, of 10 KiB at first.
const MAX_DATA_1997: u32 = 8 << 10;

/// Logical block of the bdev: what the server asks for, and no less than a sector.
pub(super) fn block_size(a: &Agreed) -> u32 {
    a.sizes.map_or(SECTOR, |s| s.minimum.max(SECTOR))
}

/// Size in blocks; what is left of a block at the end cannot be reached.
pub(super) fn blocks(a: &Agreed) -> u64 {
    a.size / u64::from(block_size(a))
}

/// The export may be changed through it.
fn writes(a: &Agreed, read_only: bool) -> bool {
    !read_only && !a.flags.has(Flag::READ_ONLY)
}

/// Writes are stable only if each says so: there is FUA, and no FLUSH. Then each does, and the device has no cache.
pub(super) fn always_fua(a: &Agreed) -> bool {
    a.flags.has(Flag::SEND_FUA) && !a.flags.has(Flag::SEND_FLUSH)
}

/// Properties of the bdev `name`. What the server does not offer is missing from `native`, and emulated by
/// [`bdev::IoChannel`] where it can be.
pub(super) fn info(name: &str, uuid: Uuid, read_only: bool, a: &Agreed) -> Info {
    let block_size = block_size(a);
    let writes = writes(a, read_only);
    let mut native = OpSet::of(&[Op::Read, Op::Reset]);
    for (op, offered) in [
        (Op::Write, true),
        (Op::WriteZeroes, a.flags.has(Flag::SEND_WRITE_ZEROES)),
        (Op::Discard, a.flags.has(Flag::SEND_TRIM)),
    ] {
        if writes && offered {
            native = native.with(op);
        }
    }
    let write_cache = a.flags.has(Flag::SEND_FLUSH);
    if write_cache {
        native = native.with(Op::Flush);
    }
    let preferred = a.sizes.map_or(block_size, |s| s.preferred);
    Info {
        name: name.to_owned(),
        aliases: Vec::new(),
        product_name: PRODUCT_NAME,
        uuid,
        block_size,
        // A power of two, and at least the minimum, or haggling would have failed.
        physical_block_size: preferred.clamp(block_size, 1 << 20),
        native,
        native_fua: write_cache && a.flags.has(Flag::SEND_FUA),
        write_cache,
        read_only: !writes,
        volatile: false,
        rotational: a.flags.has(Flag::ROTATIONAL),
        discard_granularity: if native.has(Op::Discard) { preferred.clamp(block_size, 1 << 20) } else { 0 },
        max_unmap_blocks: u64::MAX,
        buffer_align: 1,
    }
}

/// What one request may ask for, in whole blocks.
pub(super) fn limits(a: &Agreed) -> Limits {
    let block = block_size(a);
    let whole = |bytes: u32| bytes - bytes % block;
    let most = if matches!(a.framing, Framing::Original { .. }) { MAX_DATA_1997 } else { MAX_DATA };
    let payload = a.sizes.map_or(DEFAULT_MAX_PAYLOAD, |s| s.max_payload);
    let range = |flag| if a.flags.has(flag) { whole(u32::MAX) } else { 0 };
    Limits {
        data: whole(payload.min(most)).max(block),
        discard: range(Flag::SEND_TRIM),
        write_zeroes: range(Flag::SEND_WRITE_ZEROES),
        secure_erase: 0,
    }
}

/// An export that cannot be a bdev, in words.
pub(super) fn unusable(a: &Agreed) -> Option<String> {
    if blocks(a) == 0 {
        return Some(format!("it has {} bytes, which is no block of {}", a.size, block_size(a)));
    }
    if a.sizes.is_some_and(|s| s.max_payload < block_size(a)) {
        return Some(format!("its blocks have {} bytes, and no request may carry so many", block_size(a)));
    }
    if matches!(a.framing, Framing::Original { .. }) && a.size > ORIGINAL_MAX_SIZE {
        return Some(format!("{} bytes; the dialect of 1997 reaches {ORIGINAL_MAX_SIZE}", a.size));
    }
    None
}

/// Why an export that was connected again is not the one that its bdev promises, in words; `None` if it is. Its size
/// may differ. A trim or zeroing that is not offered any more fails when it is tried, or is emulated.
pub(super) fn misfit(info: &Info, several: bool, a: &Agreed) -> Option<String> {
    let now = block_size(a);
    if now != info.block_size {
        return Some(format!("its block size is {now} bytes now, and was {}", info.block_size));
    }
    if a.flags.has(Flag::READ_ONLY) && !info.read_only {
        return Some("it is read-only now, and was not".into());
    }
    if a.flags.has(Flag::SEND_FLUSH) && !info.write_cache {
        return Some("it has something to flush now, and had not: flushes would be missing".into());
    }
    if info.write_cache && !a.flags.has(Flag::SEND_FLUSH) {
        return Some("it cannot flush any more".into());
    }
    if info.native_fua && !a.flags.has(Flag::SEND_FUA) {
        return Some("it cannot force single writes to stable storage any more".into());
    }
    if several && !a.flags.has(Flag::CAN_MULTI_CONN) {
        return Some("it does not allow several connections any more".into());
    }
    unusable(a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_proto::haggle::BlockSizes;

    fn agreed(size: u64, flags: u16, sizes: Option<(u32, u32, u32)>) -> Agreed {
        Agreed {
            style: "fixed newstyle",
            tls: false,
            framing: Framing::Simple,
            size,
            flags: Flag(flags),
            sizes: sizes.map(|(minimum, preferred, max_payload)| BlockSizes {
                minimum,
                preferred,
                max_payload,
            }),
            contexts: Vec::new(),
        }
    }

    /// FLUSH, FUA, TRIM, WRITE_ZEROES, CAN_MULTI_CONN.
    const ALL: u16 = 0x16d;

    fn of(a: &Agreed) -> Info {
        info("d", Uuid::nil(), false, a)
    }

    #[test]
    fn what_the_server_offers_is_native() {
        let i = of(&agreed(1 << 20, ALL, Some((1, 4096, 1 << 25))));
        assert!(
            [Op::Read, Op::Write, Op::Flush, Op::WriteZeroes, Op::Discard]
                .into_iter()
                .all(|op| i.native.has(op))
        );
        assert!(i.native_fua && i.write_cache && !i.read_only);
        assert_eq!((i.block_size, i.physical_block_size, i.discard_granularity), (512, 4096, 4096));
        assert!(!i.rotational && of(&agreed(1 << 20, ALL | 1 << 4, None)).rotational);
        let i = of(&agreed(1 << 20, ALL | 2, None));
        assert!(i.read_only && !i.native.has(Op::Write) && !i.native.has(Op::Discard));
        assert!(info("d", Uuid::nil(), true, &agreed(1 << 20, ALL, None)).read_only, "because we want it so");
        let i = of(&agreed(1 << 20, 1, None));
        assert!(!i.write_cache && !i.native_fua && !i.native.has(Op::Flush) && i.discard_granularity == 0);
        assert!(!always_fua(&agreed(0, ALL, None)) && always_fua(&agreed(0, 9, None)));
        // FUA without FLUSH: every write is forced, so there is no cache for anybody.
        let i = of(&agreed(1 << 20, 9, None));
        assert!(!i.write_cache && !i.native_fua);
    }

    #[test]
    fn sizes_and_limits_are_whole_blocks() {
        let a = agreed((10 << 20) + 100, ALL, Some((4096, 65536, 10_000 / 4096 * 4096)));
        assert_eq!((block_size(&a), blocks(&a)), (4096, 2560));
        let most = u32::MAX - 4095;
        assert_eq!(limits(&a), Limits { data: 8192, discard: most, write_zeroes: most, secure_erase: 0 });
        let plain = agreed(1000, 1, None);
        assert_eq!((blocks(&plain), limits(&plain)), (1, Limits { data: MAX_DATA, ..Limits::default() }));
        let old = Agreed { framing: Framing::Original { reply_magic: 1 }, ..plain };
        assert_eq!(limits(&old).data, MAX_DATA_1997);
    }

    #[test]
    fn what_cannot_be_used() {
        assert!(unusable(&agreed(511, 1, None)).unwrap().contains("no block of 512"));
        assert!(unusable(&agreed(1 << 20, 1, Some((1, 512, 512)))).is_none());
        let old = Framing::Original { reply_magic: 1 };
        let big = Agreed { framing: old, ..agreed((1 << 32) + 512, 0, None) };
        assert!(unusable(&big).unwrap().contains("1997"));
        assert!(unusable(&Agreed { size: 1 << 32, ..big }).is_none());
    }

    #[test]
    fn an_export_that_changed_its_nature_is_not_the_same() {
        let a = agreed(1 << 20, ALL, None);
        let i = of(&a);
        let words = |several, flags, sizes| misfit(&i, several, &agreed(1 << 19, flags, sizes));
        assert_eq!(words(true, ALL, None), None, "its size may change");
        assert_eq!(words(false, ALL & !0x160, None), None, "trim, zeroes and several connections may go");
        assert!(words(true, ALL & !0x100, None).unwrap().contains("several connections"));
        assert!(
            words(false, ALL, Some((4096, 4096, 1 << 20))).unwrap().contains("4096 bytes now, and was 512")
        );
        assert!(words(false, ALL | 2, None).unwrap().contains("read-only now"));
        assert!(words(false, ALL & !8, None).unwrap().contains("force single writes"));
        let plain = of(&agreed(1 << 20, 1, None));
        assert!(misfit(&plain, false, &a).unwrap().contains("flush"));
        assert!(words(false, ALL & !4, None).unwrap().contains("cannot flush"));
    }
}
