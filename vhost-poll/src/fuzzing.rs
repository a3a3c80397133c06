//! A queue without a session and a reactor, for fuzz targets. Its disk keeps what it is asked for.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use crate::chain::Broken;
use crate::disk::{BlkStatus, Completion, DiskChannel, Request};
use crate::inflight::InflightArea;
use crate::queue::{Coalescing, Queue, QueueSetup, Scratch};
use crate::ring::{Base, Memory, RingConfig};

/// A request as the disk got it: cookie, and where its data is.
pub type Asked = (u64, Vec<(u64, u32)>);

/// A chain in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Head (split) or the driver's id (packed).
    pub id: u16,
    /// Its entry of the in-flight memory.
    pub entry: u16,
    /// Entries of the ring.
    pub count: u16,
}

struct Held(Vec<Asked>);

impl DiskChannel for Held {
    fn submit(&mut self, request: Request<'_>) {
        self.0.push((request.cookie, request.segments.iter().map(|s| (s.addr, s.len)).collect()));
    }

    fn is_full(&self) -> bool {
        false
    }

    fn kick(&mut self) {}

    fn poll(&mut self, _done: &mut Vec<Completion>) {}

    fn wait_fd(&self) -> Option<RawFd> {
        None
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn ready(&self) -> bool {
        false
    }

    fn abort(&mut self) {}
}

/// See the module.
pub struct Bench {
    queue: Queue,
    scratch: Scratch,
    disk: Option<Held>,
    now: Instant,
}

impl Bench {
    /// Starts queue `index`, and takes over what `inflight` says is in flight.
    ///
    /// # Errors
    /// As a session refuses it.
    pub fn start(
        index: u16,
        ring: RingConfig,
        memory: Memory,
        base: Base,
        inflight: InflightArea,
    ) -> Result<Self, Broken> {
        let setup = QueueSetup {
            controller: "bench".into(),
            index,
            ring,
            memory,
            base,
            inflight: Some(inflight),
            kick: None,
            call: None,
            err: None,
            enabled: true,
            write_back: Arc::new(AtomicBool::new(true)),
            serial: [b's'; 20],
            coalescing: Coalescing::default(),
        };
        let now = Instant::now();
        let queue = Queue::new(setup, now)?;
        Ok(Self { queue, scratch: Scratch::new(), disk: Some(Held(Vec::new())), now })
    }

    /// Takes up to `budget` chains; returns what the disk was asked for.
    pub fn fetch(&mut self, budget: usize) -> Vec<Asked> {
        self.queue.fetch(&mut self.disk, &mut self.scratch, budget);
        self.disk.as_mut().map(|held| std::mem::take(&mut held.0)).unwrap_or_default()
    }

    /// The disk is done with the request of `cookie`.
    pub fn complete(&mut self, cookie: u64) {
        self.queue.complete(cookie as u16, BlkStatus::Ok);
    }

    /// Shows the driver what was used.
    pub fn show(&mut self) {
        self.queue.show();
    }

    /// Ends what needs no disk, and shows the driver what was used.
    pub fn publish(&mut self) {
        self.queue.publish(self.now);
    }

    /// Chains in flight: those to be repeated, in order, then the others.
    pub fn open(&self) -> Vec<Open> {
        self.queue.open()
    }

    /// The driver broke the rules of the ring.
    pub fn is_broken(&self) -> bool {
        self.queue.is_broken()
    }
}
