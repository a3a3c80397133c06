//! The exports: what clients may choose.

use std::collections::BTreeMap;
use std::ops::Bound;

use bdev::{Descriptor, Info, Op};
use nbd_poll::MAX_PAYLOAD;
use nbd_poll::listener::{Identity, Peer, Shelf};
use nbd_proto::haggle::wire::MAX_STRING;
use nbd_proto::haggle::{self, BlockSizes, Refusal};
use nbd_proto::request;
use nbd_proto::wire::TransmissionFlags;

use super::allow::{Access, AllowList};
use super::error::ServerError;
use super::fence::Fence;
use super::ranges::RangeLock;

/// What clients are told to prefer, at least, bytes.
const PREFERRED_BLOCK: u32 = 4096;

pub(super) struct Export {
    /// Never used twice.
    pub(super) id: u64,
    pub(super) bdev_name: String,
    pub(super) description: String,
    pub(super) read_only: bool,
    pub(super) allow: AllowList,
    pub(super) descriptor: Descriptor,
    pub(super) fence: Fence,
    pub(super) ranges: RangeLock,
}

/// Exports by name.
#[derive(Default)]
pub(super) struct Exports(BTreeMap<String, Export>);

/// The exports as clients of one listener see them.
pub(super) struct View<'a> {
    pub(super) exports: &'a Exports,
    /// For those who do not name one.
    pub(super) default: Option<&'a str>,
}

impl Export {
    /// Size now, bytes.
    pub(super) fn size(&self) -> u64 {
        self.descriptor.blocks() * u64::from(self.descriptor.info().block_size)
    }

    /// Writes are refused.
    pub(super) fn refuses_writes(&self) -> bool {
        self.read_only || self.descriptor.info().read_only
    }

    /// What requests are checked against.
    pub(super) fn limits(&self) -> request::Export {
        let info = self.descriptor.info();
        request::Export {
            size: self.size(),
            block_size: info.block_size,
            any_range: true,
            max_payload: MAX_PAYLOAD,
            flags: flags(info, self.refuses_writes())
                .with_if(TransmissionFlags::SEND_CACHE, self.descriptor.bdev().prefetches()),
        }
    }

    fn told<'a>(&'a self, name: &'a str) -> haggle::Export<'a> {
        let (info, limits) = (self.descriptor.info(), self.limits());
        haggle::Export {
            id: self.id,
            name,
            description: &self.description,
            size: limits.size,
            flags: limits.flags,
            sizes: block_sizes(info),
        }
    }
}

/// FLUSH and FUA are offered even where they have nothing to do: clients that want to be sure would otherwise have no
/// way to ask.
fn flags(info: &Info, read_only: bool) -> TransmissionFlags {
    let discards = info.native.has(Op::Discard) && !read_only;
    (TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH | TransmissionFlags::CAN_MULTI_CONN)
        .with_if(TransmissionFlags::READ_ONLY, read_only)
        .with_if(TransmissionFlags::ROTATIONAL, info.rotational)
        .with_if(TransmissionFlags::SEND_FUA, !read_only)
        .with_if(TransmissionFlags::SEND_TRIM, discards)
        .with_if(TransmissionFlags::SEND_WRITE_ZEROES, !read_only)
        .with_if(TransmissionFlags::SEND_FAST_ZERO, info.native.has(Op::WriteZeroes) && !read_only)
}

/// A bdev's physical block may be of any size; what clients are told stays below their usual limits.
fn block_sizes(info: &Info) -> BlockSizes {
    let preferred = info.physical_block_size.clamp(PREFERRED_BLOCK.max(info.block_size), 1 << 20);
    BlockSizes { minimum: info.block_size, preferred, max_payload: MAX_PAYLOAD }
}

impl Exports {
    /// Whether an export of this name can be made.
    ///
    /// # Errors
    /// [`ServerError`].
    pub(super) fn check(&self, name: &str, description: &str) -> Result<(), ServerError> {
        let is_text = |text: &str| text.len() <= MAX_STRING && !text.chars().any(char::is_control);
        if name.is_empty() || !is_text(name) {
            return Err(ServerError::Name(name.escape_debug().take(80).collect()));
        }
        if !is_text(description) {
            return Err(ServerError::Description);
        }
        if self.0.contains_key(name) {
            return Err(ServerError::ExportExists(name.into()));
        }
        Ok(())
    }

    pub(super) fn insert(&mut self, name: String, export: Export) {
        self.0.insert(name, export);
    }

    pub(super) fn remove(&mut self, name: &str) -> Result<Export, ServerError> {
        self.0.remove(name).ok_or_else(|| ServerError::NoExport(name.into()))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Export)> {
        self.0.iter()
    }

    pub(super) fn get(&self, name: &str) -> Option<&Export> {
        self.0.get(name)
    }

    pub(super) fn by_id(&self, id: u64) -> Option<(&String, &Export)> {
        self.0.iter().find(|(_, e)| e.id == id)
    }

    /// Whether the allow list of some export says where a client comes from, and `peer` does.
    pub(super) fn name(&self, peer: &Peer) -> bool {
        self.0.values().any(|export| export.allow.names(peer))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

impl View<'_> {
    /// The export of that name; without one, the listener's, or the only one there is.
    fn look_up(&self, name: &str) -> Option<(&String, &Export)> {
        let all = &self.exports.0;
        match (name, self.default) {
            ("", Some(default)) => all.get_key_value(default),
            ("", None) if all.len() == 1 => all.first_key_value(),
            _ => all.get_key_value(name),
        }
    }
}

impl Shelf for View<'_> {
    fn next(&self, who: &Identity, after: Option<&str>) -> Option<haggle::Export<'_>> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = self.exports.0.range::<str, _>((from, Bound::Unbounded));
        let (name, export) = rest.find(|(_, e)| e.allow.access(who) == Access::Granted)?;
        Some(export.told(name))
    }

    fn find(&self, who: &Identity, name: &str) -> Result<haggle::Export<'_>, Refusal> {
        let (name, export) = self.look_up(name).ok_or(Refusal::Unknown)?;
        match export.allow.access(who) {
            Access::Granted => {}
            Access::NeedsTls => return Err(Refusal::TlsRequired),
            Access::Denied => return Err(Refusal::Policy(format!("export '{name}' is not for you"))),
        }
        if export.descriptor.is_removed() {
            return Err(Refusal::Policy(format!("the bdev of export '{name}' has been removed")));
        }
        Ok(export.told(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdev::{Manager, Mode, malloc};
    use iobuf::Registry;

    fn exports(names: &[&str]) -> Exports {
        let manager = Manager::new(Registry::new());
        let mut exports = Exports::default();
        for (id, name) in (0..).zip(names) {
            let bdev_name = format!("M{id}");
            let params = malloc::Params {
                name: Some(bdev_name.clone()),
                num_blocks: 256,
                block_size: 4096,
                physical_block_size: None,
                uuid: None,
            };
            malloc::create(&manager, params).unwrap();
            let descriptor = manager.open(&bdev_name, Mode::ReadWrite, Box::new(|_| {})).unwrap();
            let export = Export {
                id,
                bdev_name,
                description: String::new(),
                read_only: false,
                allow: AllowList::default(),
                descriptor,
                fence: Fence::default(),
                ranges: RangeLock::default(),
            };
            exports.check(name, "").unwrap();
            exports.insert((*name).into(), export);
        }
        exports
    }

    #[test]
    fn clients_see_exports_in_order_and_one_by_default() {
        let two = exports(&["b", "a"]);
        let view = |default| View { exports: &two, default };
        let who = Identity { peer: nbd_poll::listener::Peer::Unix { pid: 1, uid: 0 }, tls: None };
        let names = |after| view(None).next(&who, after).map(|e| e.name.to_owned());
        assert_eq!(
            [names(None), names(Some("a")), names(Some("b"))],
            [Some("a".into()), Some("b".into()), None]
        );
        assert_eq!(view(None).find(&who, "b").unwrap().id, 0);
        assert_eq!(view(None).find(&who, ""), Err(Refusal::Unknown), "which of the two?");
        assert_eq!(view(Some("a")).find(&who, "").unwrap().name, "a");
        assert_eq!(view(Some("gone")).find(&who, ""), Err(Refusal::Unknown));
        let one = exports(&["only"]);
        assert_eq!(View { exports: &one, default: None }.find(&who, "").unwrap().name, "only");
        let all = view(None);
        let export = all.find(&who, "a").unwrap();
        assert_eq!((export.size, export.sizes.minimum), (1 << 20, 4096));
        assert!(export.sizes.are_legal() && export.flags.has(TransmissionFlags::SEND_TRIM));
    }

    #[test]
    fn names_are_text() {
        let exports = exports(&["a"]);
        let long = "x".repeat(MAX_STRING + 1);
        for bad in ["", "a\0b", "a\nb", &long] {
            assert!(matches!(exports.check(bad, ""), Err(ServerError::Name(_))), "{bad:?}");
        }
        assert!(matches!(exports.check("b", &long), Err(ServerError::Description)));
        assert!(matches!(exports.check("a", ""), Err(ServerError::ExportExists(_))));
        assert!(exports.check(&long[1..], "Größe").is_ok());
    }

    #[test]
    fn flags_say_what_the_bdev_can() {
        let all = exports(&["a"]);
        let info = all.get("a").unwrap().descriptor.info().clone();
        assert_eq!(flags(&info, false).0, 0b1001_0110_1101);
        assert_eq!(flags(&info, true).0, 0b1_0000_0111);
        let plain = Info { native: bdev::OpSet::of(&[Op::Read, Op::Write]), ..info.clone() };
        assert!(!flags(&plain, false).has(TransmissionFlags::SEND_TRIM));
        assert!(!flags(&plain, false).has(TransmissionFlags::SEND_FAST_ZERO));
        for (block_size, physical_block_size) in [(512, 512), (512, 1 << 30), (65536, 65536), (4096, 8192)] {
            let sizes = block_sizes(&Info { block_size, physical_block_size, ..info.clone() });
            assert!(sizes.are_legal(), "{sizes:?}");
        }
    }
}
