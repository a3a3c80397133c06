//! A vhost-user-blk socket: the load is front end, guest and driver in one, polled, without interrupts.

use std::os::fd::RawFd;
use std::time::Instant;

use bdev::{Completion, Completions, Op, Status};
use vhost_driver::{Disk, Options};

use super::queue::{Queue, Request, fill};
use super::target::VhostTarget;

/// Sector of virtio-blk, bytes.
pub(super) const SECTOR: u32 = 512;
/// Most descriptors of a ring that every back end takes.
const MAX_RING: u32 = 1024;
/// VIRTIO_BLK_T_IN, OUT, FLUSH, DISCARD and WRITE_ZEROES (virtio 1.2, 5.2.6).
const KINDS: [(Op, u32); 5] =
    [(Op::Read, 0), (Op::Write, 1), (Op::Flush, 4), (Op::Discard, 11), (Op::WriteZeroes, 13)];
/// Of `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: u32 = 16;

/// A connection with its virtqueues. Slot `n` is a request of queue `n % queues`.
pub(super) struct VhostQueue {
    disk: Disk,
    queues: usize,
    /// By slot.
    places: Vec<Place>,
    /// By queue and request: the slot.
    slots: Vec<Vec<u32>>,
    /// Queues with something to show.
    submitted: Vec<bool>,
    block_size: u32,
    first_sector: u64,
    inflight: usize,
}

/// A request of the driver, which a slot keeps.
#[derive(Clone, Copy)]
struct Place {
    queue: usize,
    request: u16,
}

impl VhostQueue {
    /// Connects and starts the queues. Returns it and the bytes of the disk.
    ///
    /// # Errors
    /// In words.
    pub fn connect(
        target: &VhostTarget,
        slots: u32,
        block_size: u32,
        offset: u64,
        seed: u64,
    ) -> Result<(Self, u64), String> {
        let queues = u32::from(target.queues);
        let depth = slots.div_ceil(queues);
        // Header, data and status of every request at once.
        let descriptors = if target.indirect { depth } else { depth * 3 };
        if descriptors > MAX_RING {
            return Err(format!(
                "-q {slots}: {queues} queues of {MAX_RING} descriptors hold {} requests; use more queues, or indirect",
                MAX_RING / 3 * queues
            ));
        }
        let options = Options {
            queues: target.queues,
            queue_size: (descriptors + 1).next_power_of_two().clamp(64, MAX_RING) as u16,
            packed: target.packed,
            indirect: target.indirect,
            inflight: target.inflight,
            max_io: block_size,
            ..Options::default()
        };
        let queue_size = usize::from(options.queue_size);
        // Event indices save kicks, but not every back end has them.
        let plain = Options { event_idx: false, ..options.clone() };
        let connected = Disk::connect(&target.socket, options)
            .or_else(|first| Disk::connect(&target.socket, plain).map_err(|_| first));
        let mut disk = connected.map_err(|e| e.to_string())?;
        let sectors = disk.sectors().map_err(|e| e.to_string())?;
        let queues = usize::from(target.queues);
        let mut table = vec![vec![0; queue_size]; queues];
        let mut places = Vec::new();
        for slot in 0..slots {
            let queue = slot as usize % queues;
            let request = disk.take(queue).ok_or("a queue has too few requests")?;
            table[queue][usize::from(request)] = slot;
            places.push(Place { queue, request });
        }
        (0..queues).for_each(|q| disk.ring(q).disable_calls());
        let submitted = vec![false; queues];
        let first_sector = offset / u64::from(SECTOR);
        let mut this =
            Self { disk, queues, places, slots: table, submitted, block_size, first_sector, inflight: 0 };
        for slot in 0..slots {
            fill(block_size as usize, seed ^ u64::from(slot), |at, page| this.put(slot, at, page));
        }
        Ok((this, sectors.saturating_mul(u64::from(SECTOR))))
    }

    fn data(&self, slot: u32) -> u64 {
        let Place { queue, request } = self.places[slot as usize];
        self.disk.request(queue, request).data
    }
}

fn status(byte: u8) -> Status {
    match byte {
        0 => Status::Ok,
        2 => Status::Unsupported,
        _ => Status::IoError,
    }
}

impl Queue for VhostQueue {
    #[inline]
    fn submit(&mut self, r: Request) -> Result<(), Status> {
        let kind = KINDS.iter().find(|(op, _)| *op == r.op).map_or(u32::MAX, |(_, kind)| *kind);
        let per_block = self.block_size / SECTOR;
        let sector = self.first_sector + r.block * u64::from(per_block);
        let Place { queue, request } = self.places[r.slot as usize];
        let (sector, len) = match r.op {
            Op::Flush => (0, 0),
            Op::Discard | Op::WriteZeroes => {
                let mut range = [0; RANGE_LEN as usize];
                range[..8].copy_from_slice(&sector.to_le_bytes());
                range[8..12].copy_from_slice(&per_block.to_le_bytes());
                self.put(r.slot, 0, &range);
                (0, RANGE_LEN)
            }
            _ => (sector, self.block_size),
        };
        if !self.disk.submit(queue, request, kind, sector, len, r.op != Op::Read) {
            // It gave the request back; the slot keeps it.
            let again = self.disk.take(queue);
            debug_assert_eq!(again, Some(request));
            return Err(Status::Busy);
        }
        self.submitted[queue] = true;
        self.inflight += 1;
        Ok(())
    }

    fn kick(&mut self) {
        for queue in 0..self.queues {
            if std::mem::take(&mut self.submitted[queue]) {
                self.disk.publish(queue);
            }
        }
    }

    fn poll(&mut self, done: &mut Completions) {
        for queue in 0..self.queues {
            while let Some((request, byte)) = self.disk.poll(queue) {
                // The request that was given back last is the next to be taken, so that each slot keeps its own.
                let again = self.disk.take(queue);
                debug_assert_eq!(again, Some(request));
                let cookie = self.slots[queue][usize::from(request)].into();
                done.push(Completion { cookie, status: status(byte) });
                self.inflight -= 1;
            }
        }
    }

    fn put(&mut self, slot: u32, at: usize, data: &[u8]) {
        self.disk.ram.write(self.data(slot) + at as u64, data);
    }

    fn get(&self, slot: u32, out: &mut [u8]) {
        let from = self.disk.ram.ptr(self.data(slot), out.len());
        // SAFETY: `ptr` has checked that the bytes are in the guest's memory, which this disk maps; the device may write
        // them at any time, which tears a copy and never its bounds; `out` is exclusively borrowed and elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
    }

    fn wait_fd(&self) -> Option<RawFd> {
        None
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn ready(&self) -> bool {
        // Interrupts are off: nothing would wake a sleeper.
        self.inflight > 0
    }
}
