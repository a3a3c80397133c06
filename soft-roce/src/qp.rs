//! The user's end of a queue pair.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;
use verbs::{
    BIND_WR_ID, Error, Mr, PostError, Qp, QpCaps, RecvWr, SendOp, SendWr, SgeList, Window, wc_status,
};

use crate::engine::Engine;
use crate::memory::WindowKeep;
use crate::shared::Notice;

/// A queue pair. Its engine has the rest of it.
pub struct SoftQp {
    engine: Arc<Engine>,
    qpn: u32,
    caps: QpCaps,
}

impl SoftQp {
    pub fn new(engine: Arc<Engine>, qpn: u32, caps: QpCaps) -> Self {
        Self { engine, qpn, caps }
    }
}

fn refused((accepted, source): (usize, Errno)) -> PostError {
    PostError { accepted, source: source.into() }
}

impl Qp for SoftQp {
    fn num(&self) -> u32 {
        self.qpn
    }

    /// Only queues: the next turn of the engine sends.
    fn post_send(&mut self, wrs: &[SendWr]) -> Result<(), PostError> {
        let mut core = self.engine.enter();
        core.posted(&self.engine);
        core.qps.post_send(&self.engine, self.qpn, wrs, self.caps.max_send_sge).map_err(refused)
    }

    fn post_recv(&mut self, wrs: &[RecvWr]) -> Result<(), PostError> {
        self.engine.enter().qps.post_recv(self.qpn, wrs, self.caps.max_recv_sge).map_err(refused)
    }

    /// Binds at once; what is in the queue before it is not waited for.
    fn bind_window(
        &mut self,
        window: &mut Window,
        mr: &Mr,
        offset: usize,
        len: u32,
    ) -> Result<u32, PostError> {
        let mut core = self.engine.enter();
        core.qps.may_post_send(self.qpn).map_err(|e| refused((0, e)))?;
        let keep = window.handle.downcast_mut::<WindowKeep>();
        let keep = keep.filter(|keep| Arc::ptr_eq(keep.port(), self.engine.port()));
        let key = keep.and_then(|keep| keep.bind(mr, offset, len)).ok_or(refused((0, Errno::INVAL)))?;
        (window.rkey, window.bound) = (key, len > 0);
        // It takes its place in the queue, as on every device.
        let wr = SendWr {
            wr_id: BIND_WR_ID,
            op: SendOp::LocalInvalidate(0),
            sges: SgeList::EMPTY,
            signaled: false,
        };
        core.qps.post_done(self.qpn, &wr, true, wc_status::MW_BIND_ERR).map_err(|e| refused((0, e)))?;
        Ok(key)
    }

    fn set_min_rnr_timer(&mut self, code: u8) -> Result<(), Error> {
        let fail = |hint: &str| {
            let source = io::Error::from_raw_os_error(libc::EINVAL);
            Err(Error { what: "set the minimum RNR timer".into(), source, hint: hint.into() })
        };
        if code > 31 {
            return fail("the code is 0..=31");
        }
        if self.engine.enter().qps.set_min_rnr_timer(self.qpn, code) {
            Ok(())
        } else {
            fail("the queue pair is not connected")
        }
    }
}

impl Drop for SoftQp {
    fn drop(&mut self) {
        // Buffers are used within turns only, and none is under way while we are inside.
        self.engine.remove(self.qpn);
        self.engine.port().shared.notices.push(Notice::Dropped { qpn: self.qpn });
    }
}
