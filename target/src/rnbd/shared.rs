//! Open devices, for reactors to find at their first I/O. Behind a mutex that the data path takes once per reactor
//! and device.

use std::collections::HashMap;
use std::sync::Mutex;

use bdev::Descriptor;
use rnbd_proto::session::DeviceId;

/// A session, by [`rtrs_poll::Session::key`], and a device of it.
pub(super) type DeviceKey = (u32, DeviceId);

/// What a reactor needs of an open device.
#[derive(Clone, Debug)]
pub(super) struct SharedDevice {
    pub descriptor: Descriptor,
    pub read_only: bool,
}

/// The table; written by the control thread.
#[derive(Debug, Default)]
pub struct Shared(Mutex<HashMap<DeviceKey, SharedDevice>>);

impl Shared {
    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<DeviceKey, SharedDevice>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn insert(&self, key: DeviceKey, device: SharedDevice) {
        self.table().insert(key, device);
    }

    pub(super) fn remove(&self, key: DeviceKey) {
        self.table().remove(&key);
    }

    pub(super) fn find(&self, key: DeviceKey) -> Option<SharedDevice> {
        self.table().get(&key).cloned()
    }
}
