//! An `ibv_context` of librdmacm and our protection domain on it.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::sync::Arc;

use iobuf::Region;
use rdma_mummy_sys as sys;

use super::{PROVIDER, cq, last, mr, os_error};
use crate::{Access, Cq, Device, DeviceInfo, Error, Mr, Window, WindowKind};

pub(super) struct RdmaDevice {
    /// librdmacm's, open as long as the process has an `rdma_cm_id` on a working device (see the module's text).
    pub context: *mut sys::ibv_context,
    pub pd: *mut sys::ibv_pd,
    info: DeviceInfo,
}

// SAFETY: libibverbs allows all calls on a context and its protection domains from any thread at any time, it locks
// what needs it (rdma-core Documentation/libibverbs.md); `info` is plain data.
unsafe impl Send for RdmaDevice {}
// SAFETY: as for `Send`.
unsafe impl Sync for RdmaDevice {}

impl RdmaDevice {
    /// # Safety
    /// `context` is the open context of a bound `rdma_cm_id`.
    pub unsafe fn open(context: *mut sys::ibv_context) -> Result<Arc<Self>, Error> {
        // SAFETY: an open context; its device pointer is set for its whole life, the name is a C string inside.
        let name = unsafe { CStr::from_ptr(sys::ibv_get_device_name((*context).device)) };
        let name = name.to_string_lossy().into_owned();
        let mut attr = MaybeUninit::<sys::ibv_device_attr>::zeroed();
        // SAFETY: an open context and room for the answer.
        let ret = unsafe { sys::ibv_query_device(context, attr.as_mut_ptr()) };
        if ret != 0 {
            return Err(Error {
                what: format!("query device {name}"),
                source: os_error(ret),
                hint: "".into(),
            });
        }
        // SAFETY: filled by the call, and zeroed before: every field is an integer or array of such.
        let attr = unsafe { attr.assume_init() };
        // SAFETY: an open context.
        let pd = unsafe { sys::ibv_alloc_pd(context) };
        if pd.is_null() {
            return Err(last(format!("allocate a protection domain on {name}"), ""));
        }
        let info = info(name, &attr);
        tracing::info!(device = %info.name, windows = ?info.windows, max_qp_wr = info.max_qp_wr, "RDMA device in use");
        Ok(Arc::new(Self { context, pd, info }))
    }
}

fn info(name: String, attr: &sys::ibv_device_attr) -> DeviceInfo {
    let has = |flag: sys::ibv_device_cap_flags| attr.device_cap_flags & flag.0 != 0;
    let windows = if attr.max_mw <= 0 {
        WindowKind::Unsupported
    } else if has(sys::ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW) {
        WindowKind::PerDomain
    } else if has(sys::ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW_TYPE_2B) {
        WindowKind::PerQp
    } else {
        WindowKind::Unsupported
    };
    let count = |n: i32| u32::try_from(n).unwrap_or(0);
    DeviceInfo {
        name,
        provider: PROVIDER,
        max_qp_wr: count(attr.max_qp_wr),
        max_cqe: count(attr.max_cqe),
        cq_grows: false,
        max_sge: count(attr.max_sge),
        max_mr_bytes: attr.max_mr_size,
        windows,
        // `ibv_reg_mr` without on-demand paging.
        pins: true,
    }
}

impl Device for RdmaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn register(self: Arc<Self>, region: Arc<Region>, access: Access) -> Result<Mr, Error> {
        mr::register(self, region, access)
    }

    fn create_cq(self: Arc<Self>, entries: u32) -> Result<Box<dyn Cq>, Error> {
        Ok(Box::new(cq::RdmaCq::new(self, entries)?))
    }

    fn alloc_window(self: Arc<Self>) -> Result<Window, Error> {
        mr::alloc_window(self)
    }
}

impl Drop for RdmaDevice {
    fn drop(&mut self) {
        // SAFETY: allocated in `open`, freed once. Registrations, windows and queue pairs on it hold an `Arc` of
        // this, so none is left.
        let ret = unsafe { sys::ibv_dealloc_pd(self.pd) };
        if ret != 0 {
            tracing::warn!(device = %self.info.name, error = %os_error(ret), "protection domain not freed");
        }
    }
}
