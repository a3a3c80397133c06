//! The device of one host: memory registration, windows, completion queues.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use iobuf::Region;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::Shared;
use super::conn::error;
use super::state::{CqState, drain};
use crate::{Access, Cq, CqHandle, Device, DeviceInfo, Error, Mr, Wc, Window, WindowKind};

pub(super) struct LoopDevice {
    pub shared: Arc<Shared>,
    pub host: u32,
    pub info: DeviceInfo,
}

/// Forgets a key when dropped.
pub(super) struct KeyKeep {
    shared: Arc<Shared>,
    index: usize,
}

impl Drop for KeyKeep {
    fn drop(&mut self) {
        self.shared.lock().keys.remove(self.index);
    }
}

pub(super) fn new_eventfd() -> Result<Arc<OwnedFd>, Error> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    fd.map(Arc::new).map_err(|e| error("eventfd".into(), e, "raise the limit of open files (ulimit -n)"))
}

impl Device for LoopDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn register(self: Arc<Self>, region: Arc<Region>, access: Access) -> Result<Mr, Error> {
        if region.len() as u64 > self.info.max_mr_bytes {
            let what = format!("register {} bytes", region.len());
            return Err(error(what, Errno::NOMEM, &format!("the device allows {}", self.info.max_mr_bytes)));
        }
        let (index, lkey, rkey) = self.shared.lock().keys.register(self.host, region.clone(), access);
        Ok(Mr::new(region, lkey, rkey, Box::new(KeyKeep { shared: self.shared.clone(), index })))
    }

    fn create_cq(self: Arc<Self>, entries: u32) -> Result<Box<dyn Cq>, Error> {
        if entries == 0 || entries > self.info.max_cqe {
            let what = format!("create completion queue of {entries}");
            return Err(error(what, Errno::INVAL, &format!("the device allows 1..={}", self.info.max_cqe)));
        }
        let fd = new_eventfd()?;
        let mut state = self.shared.lock();
        let num = state.number();
        let queue = std::collections::VecDeque::with_capacity(entries as usize);
        state.cqs.insert(num, CqState { entries, queue, armed: false, overrun: false, fd: fd.clone() });
        drop(state);
        let keep = Arc::new(CqKeep { shared: self.shared.clone(), host: self.host, num });
        Ok(Box::new(LoopCq { keep, fd, entries }))
    }

    fn alloc_window(self: Arc<Self>) -> Result<Window, Error> {
        if self.info.windows == WindowKind::Unsupported {
            return Err(error("allocate memory window".into(), Errno::OPNOTSUPP, "the device has none"));
        }
        let (index, rkey) = self.shared.lock().keys.alloc_window(self.host);
        Ok(Window { handle: Box::new(KeyKeep { shared: self.shared.clone(), index }), rkey, bound: false })
    }
}

/// Keeps a completion queue; queue pairs hold it too.
pub(super) struct CqKeep {
    pub shared: Arc<Shared>,
    pub host: u32,
    pub num: u32,
}

impl Drop for CqKeep {
    fn drop(&mut self) {
        self.shared.lock().cqs.remove(&self.num);
    }
}

struct LoopCq {
    keep: Arc<CqKeep>,
    fd: Arc<OwnedFd>,
    entries: u32,
}

impl Cq for LoopCq {
    fn handle(&self) -> CqHandle {
        self.keep.clone()
    }

    fn entries(&self) -> u32 {
        self.entries
    }

    fn poll(&mut self, out: &mut [Wc]) -> Result<usize, Error> {
        let mut state = self.keep.shared.lock();
        let state = &mut *state;
        let Some(cq) = state.cqs.get_mut(&self.keep.num) else { return Ok(0) };
        if cq.overrun && cq.queue.is_empty() {
            let hint = "more work was posted than the completion queue has entries";
            return Err(error("poll completion queue".into(), Errno::OVERFLOW, hint));
        }
        let mut n = 0;
        while n < out.len()
            && let Some(cqe) = cq.queue.pop_front()
        {
            out[n] = cqe.wc;
            n += 1;
            if let Some(qp) = state.qps.get_mut(&cqe.wc.qp_num) {
                qp.send_used -= cqe.frees_send;
                qp.recv_used -= cqe.frees_recv;
            }
        }
        Ok(n)
    }

    fn wait_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn arm(&mut self) -> Result<(), Error> {
        drain(&self.fd);
        if let Some(cq) = self.keep.shared.lock().cqs.get_mut(&self.keep.num) {
            cq.armed = true;
        }
        Ok(())
    }
}
