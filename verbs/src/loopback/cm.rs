//! The connection manager of one host on a fabric.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::Shared;
use super::conn::{ConnPhase, error};
use super::device::{CqKeep, LoopDevice};
use super::engine::{Phase, QpState};
use super::qp::LoopQp;
use super::state::drain;
use crate::{Cm, CmEvent, CmId, ConnParams, CqHandle, Device, Error, Qp, QpCaps};

pub(super) struct LoopCm {
    pub shared: Arc<Shared>,
    pub host: u32,
    pub device: Arc<LoopDevice>,
    pub fd: Arc<OwnedFd>,
}

impl Cm for LoopCm {
    fn provider(&self) -> &'static str {
        super::PROVIDER
    }

    fn wait_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn poll(&mut self) -> Result<Option<CmEvent>, Error> {
        let mut state = self.shared.lock();
        let Some(channel) = state.channels.get_mut(&self.host) else { return Ok(None) };
        let event = channel.queue.pop_front();
        if channel.queue.is_empty() {
            drain(&channel.fd);
        }
        Ok(event)
    }

    fn listen(&mut self, addr: SocketAddr, backlog: u32) -> Result<CmId, Error> {
        self.shared.lock().listen(self.host, addr, backlog)
    }

    fn local_addr(&self, id: CmId) -> Option<SocketAddr> {
        let state = self.shared.lock();
        state.conns.get(&id).filter(|c| c.host == self.host).map(|c| c.local)
    }

    fn resolve(&mut self, src: Option<IpAddr>, dst: SocketAddr, _timeout: Duration) -> Result<CmId, Error> {
        self.shared.lock().resolve(self.host, src, dst)
    }

    fn devices(&self) -> Vec<Arc<dyn Device>> {
        vec![self.device.clone()]
    }

    fn device(&self, id: CmId) -> Option<Arc<dyn Device>> {
        let state = self.shared.lock();
        let conn = state.conns.get(&id).filter(|c| c.host == self.host)?;
        (!matches!(conn.phase, ConnPhase::Listening { .. })).then(|| self.device.clone() as Arc<dyn Device>)
    }

    fn create_qp(&mut self, id: CmId, caps: &QpCaps, cq: &CqHandle) -> Result<Box<dyn Qp>, Error> {
        let fail = |source: Errno, hint: &str| error(format!("create queue pair ({caps:?})"), source, hint);
        let cq = Arc::downcast::<CqKeep>(cq.clone())
            .ok()
            .filter(|cq| Arc::ptr_eq(&cq.shared, &self.shared) && cq.host == self.host)
            .ok_or_else(|| fail(Errno::INVAL, "the completion queue is of another device"))?;
        let mut state = self.shared.lock();
        let limit = &state.config.device;
        if caps.max_send_wr.max(caps.max_recv_wr) > limit.max_qp_wr {
            return Err(fail(Errno::INVAL, &format!("the device allows {} work requests", limit.max_qp_wr)));
        }
        if caps.max_send_sge.max(caps.max_recv_sge) > limit.max_sge {
            return Err(fail(Errno::INVAL, &format!("the device allows {} scatter entries", limit.max_sge)));
        }
        let num = state.number();
        let conn = state.conns.get_mut(&id).filter(|c| c.host == self.host && c.qp.is_none());
        let conn = conn.filter(|c| matches!(c.phase, ConnPhase::Resolved | ConnPhase::Requested));
        let conn = conn.ok_or_else(|| fail(Errno::INVAL, "not a new connection without a queue pair"))?;
        conn.qp = Some(num);
        let path = (conn.local, conn.peer);
        state.qps.insert(num, new_qp(self.host, cq.num, id, path));
        drop(state);
        Ok(Box::new(LoopQp { shared: self.shared.clone(), num, caps: *caps, _cq: cq }))
    }

    fn connect(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        self.shared.lock().connect(self.host, id, params, private)
    }

    fn accept(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        self.shared.lock().accept(self.host, id, params, private)
    }

    fn reject(&mut self, id: CmId, private: &[u8]) -> Result<(), Error> {
        self.shared.lock().reject(self.host, id, private)
    }

    fn disconnect(&mut self, id: CmId) -> Result<(), Error> {
        self.shared.lock().disconnect(self.host, id)
    }

    fn destroy(&mut self, id: CmId) {
        self.shared.lock().destroy(self.host, id);
    }
}

impl Drop for LoopCm {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let own: Vec<CmId> =
            state.conns.iter().filter(|(_, c)| c.host == self.host).map(|(id, _)| *id).collect();
        own.into_iter().for_each(|id| state.destroy(self.host, id));
        state.channels.remove(&self.host);
    }
}

fn new_qp(host: u32, cq: u32, id: CmId, path: (SocketAddr, SocketAddr)) -> QpState {
    QpState {
        host,
        cq,
        id,
        phase: Phase::Init,
        peer: None,
        path,
        closing: false,
        rnr_retry: 7,
        reads: false,
        sq: Default::default(),
        rq: Default::default(),
        send_used: 0,
        recv_used: 0,
        silent: 0,
    }
}
