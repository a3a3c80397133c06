//! A device as a worker uses it: slots with a buffer each, at most one request per slot.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use bdev::{Completions, Descriptor, Flags, IoChannel, IoRequest, Op, Segments, Status};
use iobuf::{MapError, Region, Registry, Segment};

use crate::rng::Rng;

/// One request. The slot's buffer is its data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub slot: u32,
    pub op: Op,
    /// Number of the block, in blocks of the job.
    pub block: u64,
}

/// A device. Lives on one reactor.
pub(super) trait Queue: 'static {
    /// Takes a request. `Busy`: again after some completion.
    fn submit(&mut self, request: Request) -> Result<(), Status>;

    /// Hands the batch to the device.
    fn kick(&mut self);

    /// Appends what has completed; cookies are slots.
    fn poll(&mut self, done: &mut Completions);

    /// Copies `data` to the beginning of a free slot's buffer.
    fn put(&mut self, slot: u32, at: usize, data: &[u8]);

    /// Copies from the beginning of a free slot's buffer.
    fn get(&self, slot: u32, out: &mut [u8]);

    /// Becomes readable when there are completions.
    fn wait_fd(&self) -> Option<RawFd>;

    /// When there is something though no descriptor fires.
    fn deadline(&self) -> Option<Instant>;

    /// The reactor must not sleep now.
    fn ready(&self) -> bool;
}

/// A bdev's channel.
pub(super) struct BdevQueue {
    // Field order is drop order: the memory goes after what may still use it.
    channel: IoChannel,
    memory: Arc<Region>,
    block_size: usize,
    /// Blocks of the device in one of the job.
    each: u64,
    /// Of the first block of the job.
    first_lba: u64,
}

impl BdevQueue {
    /// A channel with `slots` buffers of `block_size` bytes, for a job whose first byte is `offset`.
    ///
    /// # Errors
    /// What the device or the system refuses, in words.
    pub fn new(
        descriptor: &Descriptor,
        registry: &Arc<Registry>,
        slots: u32,
        block_size: u32,
        offset: u64,
        seed: u64,
    ) -> Result<Self, String> {
        let channel = descriptor.channel().map_err(|e| e.to_string())?;
        let memory = registry
            .map(slots as usize * block_size as usize)
            .map_err(|e: MapError| format!("no memory for the buffers: {e}"))?;
        fill(memory.len(), seed, |at, page| {
            let inside = memory.copy_in(at, page);
            debug_assert!(inside, "regions are whole pages");
        });
        let logical = u64::from(descriptor.info().block_size);
        let block_size = block_size as usize;
        Ok(Self {
            channel,
            memory,
            block_size,
            each: block_size as u64 / logical,
            first_lba: offset / logical,
        })
    }

    #[inline]
    fn segment(&self, slot: u32) -> Segment {
        let at = self.memory.as_ptr() as u64 + slot as u64 * self.block_size as u64;
        Segment { addr: at, len: self.block_size as u32, region: self.memory.id() }
    }
}

impl Queue for BdevQueue {
    #[inline]
    fn submit(&mut self, r: Request) -> Result<(), Status> {
        let (mut lba, mut blocks) = (self.first_lba + r.block * self.each, self.each);
        // Slots are fewer than buffers, and the memory lives as long as the channel, which ends with its requests.
        let segments =
            if r.op.has_data() { Segments::from_slice(&[self.segment(r.slot)]) } else { Segments::new() };
        if !r.op.has_range() {
            (lba, blocks) = (0, 0);
        }
        let cookie = u64::from(r.slot);
        let request = IoRequest { op: r.op, flags: Flags::NONE, lba, blocks, segments, cookie };
        self.channel.submit(request).map_err(|rejected| rejected.status)
    }

    #[inline]
    fn kick(&mut self) {
        self.channel.kick();
    }

    #[inline]
    fn poll(&mut self, done: &mut Completions) {
        self.channel.poll(done);
    }

    fn put(&mut self, slot: u32, at: usize, data: &[u8]) {
        let inside = self.memory.copy_in(slot as usize * self.block_size + at, data);
        debug_assert!(inside, "each slot has its buffer");
    }

    fn get(&self, slot: u32, out: &mut [u8]) {
        let inside = self.memory.copy_out(slot as usize * self.block_size, out);
        debug_assert!(inside, "each slot has its buffer");
    }

    fn wait_fd(&self) -> Option<RawFd> {
        self.channel.wait_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        self.channel.deadline()
    }

    fn ready(&self) -> bool {
        self.channel.ready()
    }
}

/// Noise in pages, so that no layer can take a shortcut for zeroes.
pub(super) fn fill(len: usize, seed: u64, mut put: impl FnMut(usize, &[u8])) {
    let mut rng = Rng::new(seed);
    let mut page = [0; 4096];
    for at in (0..len).step_by(page.len()) {
        page.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&rng.next().to_le_bytes()));
        put(at, &page[..page.len().min(len - at)]);
    }
}
