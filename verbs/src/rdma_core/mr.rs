//! Memory registrations and windows.

use std::sync::Arc;

use iobuf::Region;
use rdma_mummy_sys as sys;
use sys::ibv_access_flags as flag;

use super::device::RdmaDevice;
use super::{last, os_error};
use crate::{Access, Device, Error, Mr, Window, WindowKind};

struct Registration {
    mr: *mut sys::ibv_mr,
    // Let go after `drop` deregistered.
    device: Arc<RdmaDevice>,
    _region: Arc<Region>,
}

// SAFETY: only dropped, from any one thread; ibv_dereg_mr(3) is thread-safe.
unsafe impl Send for Registration {}
// SAFETY: `&Registration` gives access to nothing.
unsafe impl Sync for Registration {}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: registered in `register`, deregistered once; the protection domain lives in `device`.
        let ret = unsafe { sys::ibv_dereg_mr(self.mr) };
        if ret != 0 {
            // EBUSY: windows are bound to it. The kernel keeps the pages pinned until the process ends.
            tracing::warn!(device = %self.device.info().name, error = %os_error(ret), "memory not deregistered");
        }
    }
}

fn access_bits(access: Access) -> u32 {
    let mut bits = 0;
    // Windows that allow remote writes need the local right on their region (ibv_bind_mw(3)).
    if access.local_write || access.remote_write || access.window_bind {
        bits |= flag::IBV_ACCESS_LOCAL_WRITE.0;
    }
    if access.remote_write {
        bits |= flag::IBV_ACCESS_REMOTE_WRITE.0;
    }
    if access.remote_read {
        bits |= flag::IBV_ACCESS_REMOTE_READ.0;
    }
    if access.window_bind {
        bits |= flag::IBV_ACCESS_MW_BIND.0;
    }
    bits
}

pub(super) fn register(device: Arc<RdmaDevice>, region: Arc<Region>, access: Access) -> Result<Mr, Error> {
    let bits = access_bits(access) as i32;
    // SAFETY: the region's whole mapping, which the registration keeps mapped until it has deregistered it. What the
    // device or peers write there concurrently is `iobuf`'s contract.
    let mr = unsafe { sys::ibv_reg_mr(device.pd, region.as_ptr().cast(), region.len(), bits) };
    if mr.is_null() {
        let what = format!("register {} bytes with {}", region.len(), device.info().name);
        return Err(last(
            what,
            "raise the limit of locked memory (ulimit -l, LimitMEMLOCK=) or register less",
        ));
    }
    // SAFETY: a live registration; its keys do not change.
    let (lkey, rkey) = unsafe { ((*mr).lkey, (*mr).rkey) };
    let keep = Registration { mr, device, _region: region.clone() };
    Ok(Mr::new(region, lkey, rkey, Box::new(keep)))
}

/// The `ibv_mr` of a registration of this provider.
pub(super) fn raw(mr: &Mr) -> Option<*mut sys::ibv_mr> {
    mr.provider().downcast_ref::<Registration>().map(|r| r.mr)
}

/// In [`Window::handle`].
pub(super) struct RawWindow {
    pub mw: *mut sys::ibv_mw,
    pub device: Arc<RdmaDevice>,
}

// SAFETY: used and freed by whichever one thread owns the `Window`; libibverbs does not tie windows to threads.
unsafe impl Send for RawWindow {}

impl Drop for RawWindow {
    fn drop(&mut self) {
        // SAFETY: allocated in `alloc_window`, freed once; the protection domain lives in `device`.
        let ret = unsafe { sys::ibv_dealloc_mw(self.mw) };
        if ret != 0 {
            tracing::warn!(device = %self.device.info().name, error = %os_error(ret), "memory window not freed");
        }
    }
}

pub(super) fn alloc_window(device: Arc<RdmaDevice>) -> Result<Window, Error> {
    let kind = match device.info().windows {
        WindowKind::PerDomain => sys::ibv_mw_type::IBV_MW_TYPE_1,
        WindowKind::PerQp => sys::ibv_mw_type::IBV_MW_TYPE_2,
        WindowKind::Unsupported => {
            let source = std::io::Error::from_raw_os_error(libc::EOPNOTSUPP);
            let what = format!("allocate a memory window on {}", device.info().name);
            return Err(Error { what, source, hint: "the device has none".into() });
        }
    };
    // SAFETY: a live protection domain.
    let mw = unsafe { sys::ibv_alloc_mw(device.pd, kind) };
    if mw.is_null() {
        return Err(last(format!("allocate a memory window on {}", device.info().name), ""));
    }
    // SAFETY: a live window.
    let rkey = unsafe { (*mw).rkey };
    Ok(Window { handle: Box::new(RawWindow { mw, device }), rkey, bound: false })
}
