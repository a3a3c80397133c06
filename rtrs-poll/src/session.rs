//! What the paths of one session share across reactors.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use rtrs_proto::wire::Uuid;

/// One client, on all its paths.
///
/// # Failover races
/// The client picks the buffer id of a request, and a request that fails over to another path keeps it. The new
/// path's server side may then see it while the old one still works on it, and the stale execution could overwrite
/// what the client wrote after the new one was acknowledged. Therefore an id is *owned* by the path whose request is
/// being executed; the same id on another path waits until it is free. One compare-exchange per request, one store
/// per answer.
#[derive(Debug)]
pub struct Session {
    /// Dense number, reused after the session is gone.
    pub key: u32,
    /// The client's uuid (`paths_uuid`).
    pub uuid: Uuid,
    name: OnceLock<(String, SocketAddr)>,
    opened: AtomicBool,
    /// Of its paths that came up and are not closed yet: tag, client's address. Control threads only.
    peers: Mutex<Vec<(u32, IpAddr)>>,
    /// By buffer id: tag of the owning path, 0 if free.
    owners: Box<[AtomicU32]>,
}

impl Session {
    pub(crate) fn new(key: u32, uuid: Uuid, queue_depth: u16) -> Self {
        let owners = (0..queue_depth).map(|_| AtomicU32::new(0)).collect();
        let opened = AtomicBool::new(false);
        Self { key, uuid, name: OnceLock::new(), opened, peers: Mutex::default(), owners }
    }

    /// Session name, as the first path's INFO_REQ gave it; empty before.
    pub fn name(&self) -> &str {
        self.name.get().map_or("", |(name, _)| name)
    }

    /// The addresses that its paths come from.
    pub fn peers(&self) -> Vec<IpAddr> {
        self.lock_peers().iter().map(|(_, ip)| *ip).collect()
    }

    fn lock_peers(&self) -> MutexGuard<'_, Vec<(u32, IpAddr)>> {
        self.peers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A path has come up.
    pub(crate) fn arrived(&self, tag: u32, peer: IpAddr) {
        self.lock_peers().push((tag, peer));
    }

    /// A path is gone.
    pub(crate) fn left(&self, tag: u32) {
        self.lock_peers().retain(|(t, _)| *t != tag);
    }

    /// The client's address on that path, for the log; `None` before.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.name.get().map(|(_, peer)| *peer)
    }

    pub(crate) fn set_name(&self, name: &str, peer: SocketAddr) {
        let _ = self.name.set((name.into(), peer));
    }

    /// The client has got something that not everybody gets, a device: from now on the server knows it, and keeps places
    /// for it ([`quota::Known`]).
    pub fn set_opened(&self) {
        self.opened.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_opened(&self) -> bool {
        self.opened.load(Ordering::Relaxed)
    }

    /// Makes `tag` (not 0) own buffer `id`, which is below the queue depth. `Err`: the present owner.
    pub(crate) fn acquire(&self, id: u16, tag: u32) -> Result<(), u32> {
        // Acquire: what the former owner did to the medium is done before this request starts.
        self.owners[id as usize].compare_exchange(0, tag, Ordering::Acquire, Ordering::Relaxed).map(drop)
    }

    /// The owner gives buffer `id` back.
    pub(crate) fn release(&self, id: u16) {
        self.owners[id as usize].store(0, Ordering::Release);
    }

    /// Requests being executed, over all paths.
    pub fn inflight(&self) -> usize {
        self.owners.iter().filter(|o| o.load(Ordering::Relaxed) != 0).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_per_buffer() {
        let s = Session::new(0, Uuid([0; 16]), 4);
        assert_eq!(s.acquire(3, 7), Ok(()));
        assert_eq!(s.acquire(3, 8), Err(7));
        assert_eq!(s.acquire(3, 7), Err(7));
        assert_eq!(s.inflight(), 1);
        s.release(3);
        assert_eq!(s.acquire(3, 8), Ok(()));
    }
}
