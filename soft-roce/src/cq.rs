//! The user's end of an engine: its completion queue.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use verbs::{Cq, CqHandle, Device, Error, Wc};

use crate::engine::Engine;

/// A completion queue. Polling it runs its engine.
pub struct SoftCq(Arc<Engine>);

impl SoftCq {
    pub fn new(engine: Arc<Engine>) -> Self {
        Self(engine)
    }
}

impl Cq for SoftCq {
    fn handle(&self) -> CqHandle {
        self.0.clone()
    }

    fn entries(&self) -> u32 {
        self.0.entries()
    }

    fn poll(&mut self, out: &mut [Wc]) -> Result<usize, Error> {
        self.0.poll(out).map_err(|source| Error {
            what: format!("poll completion queue on {}", self.0.port().info().name),
            source,
            hint: "the queue overran or its socket failed; its connections are lost".into(),
        })
    }

    fn wait_fd(&self) -> RawFd {
        self.0.wait_fd().as_raw_fd()
    }

    fn arm(&mut self) -> Result<(), Error> {
        self.0.arm();
        Ok(())
    }
}
