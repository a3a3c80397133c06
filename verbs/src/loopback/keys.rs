//! Memory keys of a fabric: which bytes a local or remote key opens, and to whom.

use std::sync::Arc;

use iobuf::Region;

use crate::{Access, Sge};

/// A checked piece of registered memory.
#[derive(Clone)]
pub(super) struct Piece {
    pub region: Arc<Region>,
    pub offset: usize,
    pub len: usize,
}

/// What a peer wants to do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    Read,
    Write,
}

/// Index of a key: its upper 24 bits less one. The lower 8 bits tell successive uses of one index apart.
fn index_of(key: u32) -> Option<usize> {
    (key >> 8).checked_sub(1).map(|i| i as usize)
}

/// The key that the next bind of a window makes valid. Source: `ibv_inc_rkey(3)`.
pub(super) fn next_window_key(key: u32) -> u32 {
    (key & !0xff) | (key.wrapping_add(1) & 0xff)
}

struct Mem {
    region: Arc<Region>,
    access: Access,
    lkey: u32,
    rkey: u32,
}

struct Bound {
    mr: usize,
    piece: Piece,
    /// Type 2B: the only queue pair that may use the key.
    qp: Option<u32>,
}

enum Kind {
    Mem(Mem),
    Window { rkey: u32, bound: Option<Bound> },
}

struct Slot {
    host: u32,
    kind: Kind,
}

/// All keys of a fabric. A key works only on the host (device) that made it.
#[derive(Default)]
pub(super) struct Keys {
    slots: Vec<Option<Slot>>,
    /// Uses of each index so far, for fresh lower bits.
    uses: Vec<u8>,
}

impl Keys {
    fn insert(&mut self, make: impl FnOnce(u32, u8) -> Slot) -> usize {
        let i = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.uses.push(0);
            self.slots.len() - 1
        });
        self.uses[i] = self.uses[i].wrapping_add(1);
        self.slots[i] = Some(make((i as u32 + 1) << 8, self.uses[i] & 0x7f));
        i
    }

    /// Returns the index to remove it by, the local and the remote key, which differ so that a mix-up shows.
    pub fn register(&mut self, host: u32, region: Arc<Region>, access: Access) -> (usize, u32, u32) {
        let mut keys = (0, 0);
        let i = self.insert(|base, tag| {
            keys = (base | u32::from(tag), base | 0x80 | u32::from(tag));
            Slot { host, kind: Kind::Mem(Mem { region, access, lkey: keys.0, rkey: keys.1 }) }
        });
        (i, keys.0, keys.1)
    }

    /// A window without binding, and its first key (which opens nothing).
    pub fn alloc_window(&mut self, host: u32) -> (usize, u32) {
        let mut key = 0;
        let i = self.insert(|base, tag| {
            key = base | u32::from(tag);
            Slot { host, kind: Kind::Window { rkey: key, bound: None } }
        });
        (i, key)
    }

    /// Forgets a region or window. Windows that were bound to the region open nothing any more.
    pub fn remove(&mut self, index: usize) {
        self.slots[index] = None;
        for slot in self.slots.iter_mut().flatten() {
            if let Kind::Window { bound, .. } = &mut slot.kind
                && bound.as_ref().is_some_and(|b| b.mr == index)
            {
                *bound = None;
            }
        }
    }

    fn slot(&self, host: u32, key: u32) -> Option<&Slot> {
        self.slots.get(index_of(key)?)?.as_ref().filter(|s| s.host == host)
    }

    fn mem(&self, host: u32, lkey: u32) -> Option<&Mem> {
        match &self.slot(host, lkey)?.kind {
            Kind::Mem(m) if m.lkey == lkey => Some(m),
            _ => None,
        }
    }

    /// The memory of a local scatter entry; `None` is a local protection error.
    pub fn local(&self, host: u32, sge: &Sge, write: bool) -> Option<Piece> {
        let m = self.mem(host, sge.lkey)?;
        let may = !write || m.access.local_write || m.access.remote_write;
        may.then(|| inside(&m.region, sge.addr, u64::from(sge.len))).flatten()
    }

    /// The memory a peer's RDMA of `len` > 0 bytes may touch; `None` is a remote access error.
    pub fn remote(&self, host: u32, qp: u32, rkey: u32, addr: u64, len: u64, right: Right) -> Option<Piece> {
        match &self.slot(host, rkey)?.kind {
            Kind::Mem(m) if m.rkey == rkey => {
                let may = if right == Right::Write { m.access.remote_write } else { m.access.remote_read };
                may.then(|| inside(&m.region, addr, len)).flatten()
            }
            Kind::Window { rkey: present, bound: Some(b) } if *present == rkey && right == Right::Write => {
                if b.qp.is_some_and(|q| q != qp) {
                    return None;
                }
                let piece = inside(&b.piece.region, addr, len)?;
                let end = b.piece.offset + b.piece.len;
                (piece.offset >= b.piece.offset && piece.offset + piece.len <= end).then_some(piece)
            }
            _ => None,
        }
    }

    /// Makes `rkey` the window's key, for `len` bytes at `addr`; no bytes leave it without binding. False: not allowed.
    #[must_use]
    pub fn bind(&mut self, host: u32, lkey: u32, addr: u64, len: u64, rkey: u32, qp: Option<u32>) -> bool {
        let bound = if len == 0 {
            None
        } else {
            let Some(m) = self.mem(host, lkey).filter(|m| m.access.window_bind) else { return false };
            let Some(piece) = inside(&m.region, addr, len) else { return false };
            Some(Bound { mr: index_of(lkey).expect("mem() found it"), piece, qp })
        };
        let Some(i) = index_of(rkey) else { return false };
        match self.slots.get_mut(i) {
            Some(Some(Slot { host: h, kind: Kind::Window { rkey: present, bound: b } })) if *h == host => {
                *present = rkey;
                *b = bound;
                true
            }
            _ => false,
        }
    }

    /// Whether [`Keys::invalidate`] would succeed.
    pub fn can_invalidate(&self, host: u32, qp: u32, key: u32) -> bool {
        match self.slot(host, key).map(|s| &s.kind) {
            Some(Kind::Window { rkey, bound: Some(b) }) => *rkey == key && b.qp.is_none_or(|q| q == qp),
            _ => false,
        }
    }

    /// Unbinds the window whose present key is `key`. False for anything else: ordinary regions have no such right.
    #[must_use]
    pub fn invalidate(&mut self, host: u32, qp: u32, key: u32) -> bool {
        if !self.can_invalidate(host, qp, key) {
            return false;
        }
        if let Some(Some(Slot { kind: Kind::Window { bound, .. }, .. })) =
            index_of(key).and_then(|i| self.slots.get_mut(i))
        {
            *bound = None;
        }
        true
    }
}

fn inside(region: &Arc<Region>, addr: u64, len: u64) -> Option<Piece> {
    let offset = addr.checked_sub(region.as_ptr() as u64)?;
    let end = offset.checked_add(len)?;
    (end <= region.len() as u64).then(|| Piece {
        region: region.clone(),
        offset: offset as usize,
        len: len as usize,
    })
}

/// Copies all bytes of `from` to the start of `to`, which must hold at least as many.
pub(super) fn copy(from: &[Piece], to: &[Piece]) {
    let mut to = to.iter().map(|p| (p, 0usize));
    let mut dst = to.next();
    for src in from {
        let mut done = 0;
        while done < src.len {
            let Some((piece, filled)) = &mut dst else { return };
            let n = (src.len - done).min(piece.len - *filled);
            // SAFETY: both pieces were checked to lie inside their regions (`inside`) and `n` is at most what is
            // left of each; the `Arc`s keep both mapped. `copy`, not `copy_nonoverlapping`: a peer on the same
            // fabric may name the same memory twice. No references into regions exist (see `iobuf`), and whoever
            // posted the work has lent the bytes until it completes, as for a real device's DMA.
            unsafe {
                let s = src.region.as_ptr().add(src.offset + done);
                let d = piece.region.as_ptr().add(piece.offset + *filled);
                std::ptr::copy(s, d, n);
            }
            done += n;
            *filled += n;
            if *filled == piece.len {
                dst = to.next();
            }
        }
    }
}
