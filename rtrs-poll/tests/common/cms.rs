//! Connection managers for tests that need several providers.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use verbs::{Cm, CmEvent, CmId, ConnParams, CqHandle, Device, Error, Qp, QpCaps};

/// Another one under another name; one without devices resolves nothing.
pub struct Renamed {
    pub name: &'static str,
    pub inner: Box<dyn Cm>,
    pub has_device: bool,
}

impl Cm for Renamed {
    fn provider(&self) -> &'static str {
        self.name
    }
    fn wait_fd(&self) -> RawFd {
        self.inner.wait_fd()
    }
    fn poll(&mut self) -> Result<Option<CmEvent>, Error> {
        self.inner.poll()
    }
    fn listen(&mut self, addr: SocketAddr, backlog: u32) -> Result<CmId, Error> {
        self.inner.listen(addr, backlog)
    }
    fn local_addr(&self, id: CmId) -> Option<SocketAddr> {
        self.inner.local_addr(id)
    }
    fn resolve(&mut self, src: Option<IpAddr>, dst: SocketAddr, timeout: Duration) -> Result<CmId, Error> {
        if self.has_device {
            return self.inner.resolve(src, dst, timeout);
        }
        let source = std::io::Error::from_raw_os_error(libc::ENODEV);
        Err(Error { what: format!("resolve {dst}"), source, hint: String::new() })
    }
    fn device(&self, id: CmId) -> Option<Arc<dyn Device>> {
        self.inner.device(id)
    }
    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.inner.devices()
    }
    fn create_qp(&mut self, id: CmId, caps: &QpCaps, cq: &CqHandle) -> Result<Box<dyn Qp>, Error> {
        self.inner.create_qp(id, caps, cq)
    }
    fn connect(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        self.inner.connect(id, params, private)
    }
    fn accept(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error> {
        self.inner.accept(id, params, private)
    }
    fn reject(&mut self, id: CmId, private: &[u8]) -> Result<(), Error> {
        self.inner.reject(id, private)
    }
    fn disconnect(&mut self, id: CmId) -> Result<(), Error> {
        self.inner.disconnect(id)
    }
    fn destroy(&mut self, id: CmId) {
        self.inner.destroy(id);
    }
}
