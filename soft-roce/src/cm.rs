//! A connection manager: one user's view of the shared control state.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll;
use verbs::{Cm, CmEvent, CmId, ConnParams, CqHandle, Device, Error, Qp, QpCaps};

use crate::Host;
use crate::control::Control;

/// See the module. Dropping it disconnects and forgets all its connections.
pub struct SoftCm {
    host: Arc<Host>,
    owner: u32,
    fd: OwnedFd,
    // In `fd`'s set; not looked at otherwise.
    _bell: Arc<OwnedFd>,
}

impl SoftCm {
    pub fn new(host: Arc<Host>) -> Result<Self, Error> {
        Self::open(host).map_err(|source| Error {
            what: "open a connection manager".into(),
            source,
            hint: "raise the limit of open files (ulimit -n)".into(),
        })
    }

    fn open(host: Arc<Host>) -> std::io::Result<Self> {
        let fd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut control = host.control();
        let (owner, bell) = control.events.add()?;
        let (data, readable) = (epoll::EventData::new_u64(0), epoll::EventFlags::IN);
        epoll::add(&fd, bell.as_fd(), data, readable)?;
        if !control.shared.options.progress_thread {
            epoll::add(&fd, control.fd(), data, readable)?;
        }
        drop(control);
        Ok(Self { host, owner, fd, _bell: bell })
    }
}

impl SoftCm {
    /// Does something that may start, change or end a wait of connection management.
    fn change<R>(&self, f: impl FnOnce(&mut Control, u32) -> R) -> R {
        let mut control = self.host.control();
        let result = f(&mut control, self.owner);
        control.arm();
        result
    }
}

impl Cm for SoftCm {
    fn provider(&self) -> &'static str {
        crate::PROVIDER
    }

    fn wait_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn poll(&mut self) -> Result<Option<CmEvent>, Error> {
        let mut control = self.host.control();
        if let Some(event) = control.events.pop(self.owner) {
            return Ok(Some(event));
        }
        if control.is_ready() {
            control.turn();
        }
        Ok(control.events.pop(self.owner))
    }

    fn listen(&mut self, addr: SocketAddr, backlog: u32) -> Result<CmId, Error> {
        self.change(|control, owner| control.listen(owner, addr, backlog))
    }

    fn local_addr(&self, id: CmId) -> Option<SocketAddr> {
        self.host.control().listener_addr(id)
    }

    fn resolve(&mut self, src: Option<IpAddr>, dst: SocketAddr, _timeout: Duration) -> Result<CmId, Error> {
        self.change(|control, owner| control.resolve(owner, src, dst))
    }

    fn device(&self, id: CmId) -> Option<Arc<dyn Device>> {
        self.host.control().device_of(self.owner, id).map(|port| port as Arc<dyn Device>)
    }

    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.host.control().devices().into_iter().map(|port| port as Arc<dyn Device>).collect()
    }

    fn create_qp(&mut self, id: CmId, caps: &QpCaps, cq: &CqHandle) -> Result<Box<dyn Qp>, Error> {
        self.host.control().create_qp(self.owner, id, caps, cq)
    }

    fn connect(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        self.change(|control, owner| control.connect(owner, id, params, private))
    }

    fn accept(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        self.change(|control, owner| control.accept(owner, id, params, private))
    }

    fn reject(&mut self, id: CmId, private: &[u8]) -> Result<(), Error> {
        self.change(|control, owner| control.reject(owner, id, private))
    }

    fn disconnect(&mut self, id: CmId) -> Result<(), Error> {
        self.change(|control, owner| control.disconnect(owner, id))
    }

    fn destroy(&mut self, id: CmId) {
        self.change(|control, owner| control.destroy(owner, id));
    }
}

impl Drop for SoftCm {
    fn drop(&mut self) {
        self.host.control().leave(self.owner);
    }
}
