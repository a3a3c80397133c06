//! Where bytes of packets go and come from: registered memory, checked at every use.

use roce_proto::keys::{self, Pinned};
use roce_proto::rc::{self, AccessError};
use verbs::{RecvWr, Sge};

use super::entry::SendSlot;
use super::slots::Slots;

/// The memory behind a queue pair while it handles a packet.
pub struct Place<'a> {
    pub keys: &'a keys::Table,
    /// Of the queue pair.
    pub domain: u32,
    pub sends: &'a Slots<SendSlot>,
    pub recvs: &'a Slots<RecvWr>,
}

/// The parts of scatter entries that make up `len` bytes from `offset` on.
pub fn pieces(sges: &[Sge], offset: u32, len: u32) -> impl Iterator<Item = Sge> {
    let (mut skip, mut left) = (offset, len);
    sges.iter().filter_map(move |sge| {
        let skipped = skip.min(sge.len);
        let take = left.min(sge.len - skipped);
        skip -= skipped;
        left -= take;
        (take > 0).then(|| Sge { addr: sge.addr.wrapping_add(u64::from(skipped)), len: take, lkey: sge.lkey })
    })
}

/// Copies `bytes` to memory that must stay as it is while the guard lives.
fn copy(bytes: &[u8], to: &Pinned<'_>) {
    debug_assert_eq!(bytes.len(), to.len as usize);
    // SAFETY: the table vouches that `to` lies in a registered region, which its owner cannot free before the guard is
    // dropped, and it is as long as asked for. `bytes` is in a socket's buffer or mailbox, never in a region. Nobody
    // holds references into regions (see `iobuf`); who else writes there is the peers' own affair.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.addr as *mut u8, bytes.len()) };
}

impl Place<'_> {
    fn pin(&self, key: u32, va: u64, len: u32, access: keys::Access) -> Result<Pinned<'_>, AccessError> {
        self.keys.pin(key, self.domain, va, u64::from(len), access).map_err(|_| AccessError)
    }

    fn scatter(&self, sges: &[Sge], offset: u32, mut bytes: &[u8]) -> Result<(), AccessError> {
        for piece in pieces(sges, offset, bytes.len() as u32) {
            let to = self.pin(piece.lkey, piece.addr, piece.len, keys::Access::LocalWrite)?;
            let (now, rest) = bytes.split_at(piece.len as usize);
            copy(now, &to);
            bytes = rest;
        }
        if bytes.is_empty() { Ok(()) } else { Err(AccessError) }
    }
}

impl rc::Memory<u32, u32> for Place<'_> {
    fn write(&mut self, rkey: u32, va: u64, payload: &[u8]) -> Result<(), AccessError> {
        let to = self.pin(rkey, va, payload.len() as u32, keys::Access::RemoteWrite)?;
        copy(payload, &to);
        Ok(())
    }

    fn check(&mut self, rkey: u32, va: u64, len: u32, write: bool) -> Result<(), AccessError> {
        let access = if write { keys::Access::RemoteWrite } else { keys::Access::RemoteRead };
        self.pin(rkey, va, len, access).map(drop)
    }

    fn receive(&mut self, into: &u32, offset: u32, payload: &[u8]) -> Result<(), AccessError> {
        let wr = self.recvs.get(*into).ok_or(AccessError)?;
        self.scatter(wr.sges.as_slice(), offset, payload)
    }

    fn read_into(&mut self, of: &u32, offset: u32, payload: &[u8]) -> Result<(), AccessError> {
        let slot = self.sends.get(*of).ok_or(AccessError)?;
        self.scatter(slot.sges.as_slice(), offset, payload)
    }

    fn invalidate(&mut self, rkey: u32) -> Result<(), AccessError> {
        if self.keys.invalidate(rkey, self.domain) { Ok(()) } else { Err(AccessError) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_exactly_what_was_asked_for() {
        let sge = |addr, len| Sge { addr, len, lkey: 1 };
        let list = [sge(100, 10), sge(200, 0), sge(300, 5)];
        let of = |offset, len| pieces(&list, offset, len).map(|s| (s.addr, s.len)).collect::<Vec<_>>();
        assert_eq!(of(0, 15), [(100, 10), (300, 5)]);
        assert_eq!(of(3, 4), [(103, 4)]);
        assert_eq!(of(9, 3), [(109, 1), (300, 2)]);
        assert_eq!(of(10, 9), [(300, 5)]);
        assert_eq!(of(15, 1), []);
        assert_eq!(of(2, 0), []);
    }
}
