//! Registered memory and windows, as the user holds them.

use std::io;
use std::sync::Arc;

use iobuf::Region;
use roce_proto::keys::Entry;
use verbs::{Access, Domain, Error, Mr};

use crate::clock::Random;
use crate::port::Port;

/// What the key table shall know of `len` bytes at `offset` of `region`, which must be inside.
pub fn entry_of(region: &Region, offset: usize, len: u64, access: Access) -> Entry {
    Entry {
        base: region.as_ptr() as u64 + offset as u64,
        len,
        domain: access.domain.0,
        remote_write: access.remote_write,
        remote_read: access.remote_read,
        local_write: access.local_write || access.remote_write,
        invalidatable: false,
        qpn: None,
    }
}

/// The provider's part of an [`Mr`]. Forgets the key when dropped, and waits for engines that are using it just now;
/// the region itself is dropped after that.
pub struct MrKeep {
    pub port: Arc<Port>,
    pub key: u32,
    pub access: Access,
    pub region: Arc<Region>,
}

impl Drop for MrKeep {
    fn drop(&mut self) {
        self.port.keys.remove(self.key);
    }
}

/// The provider's part of a window. As long as it is bound it keeps the memory below it, so that a region which is
/// deregistered under a window is not a trap.
pub struct WindowKeep {
    port: Arc<Port>,
    key: u32,
    region: Option<Arc<Region>>,
    random: Random,
}

const CLOSED: Entry = Entry {
    base: 0,
    len: 0,
    domain: Domain::COMMON.0,
    remote_write: false,
    remote_read: false,
    local_write: false,
    invalidatable: false,
    qpn: None,
};

impl WindowKeep {
    /// A window that opens nothing, and its key.
    pub fn new(port: Arc<Port>) -> Result<(Self, u32), Error> {
        let mut random = Random::new();
        let Some(key) = port.keys.insert(CLOSED, || random.u32()) else {
            let what = format!("allocate a memory window on {}", port.info.name);
            let source = io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(Error { what, source, hint: "every key of the device is in use".into() });
        };
        Ok((Self { port, key, region: None, random }, key))
    }

    /// The port it is of.
    pub fn port(&self) -> &Arc<Port> {
        &self.port
    }

    /// Opens `len` bytes at `offset` of `mr` for remote writes under a new key, or nothing if `len` is 0. `None`: `mr`
    /// does not allow it, is another device's, or the range is not inside.
    pub fn bind(&mut self, mr: &Mr, offset: usize, len: u32) -> Option<u32> {
        let keep = mr.provider().downcast_ref::<MrKeep>()?;
        let fits = offset.checked_add(len as usize).is_some_and(|end| end <= keep.region.len());
        if !Arc::ptr_eq(&keep.port, &self.port) || !keep.access.window_bind || !fits {
            return None;
        }
        let access = Access { domain: keep.access.domain, remote_write: true, ..Access::default() };
        let entry = match len {
            0 => CLOSED,
            len => Entry {
                invalidatable: true,
                local_write: false,
                ..entry_of(&keep.region, offset, u64::from(len), access)
            },
        };
        let random = &mut self.random;
        self.key = self.port.keys.replace(self.key, entry, || random.u32())?;
        // The former region goes after its key.
        self.region = (len > 0).then(|| keep.region.clone());
        Some(self.key)
    }
}

impl Drop for WindowKeep {
    fn drop(&mut self) {
        self.port.keys.remove(self.key);
    }
}
