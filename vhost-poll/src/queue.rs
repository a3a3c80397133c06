//! One virtqueue of a block device: from a chain in the ring to a request, and from its completion to a used entry.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::blk::{self, Asked, Range};
use crate::chain::{Broken, Chain, Descriptor};
use crate::disk::{BlkStatus, DiskChannel, Op, Request};
use crate::fd::Kick;
use crate::inflight::{InflightArea, PackedInflight, SplitInflight};
use crate::ring::packed::{PackedRing, Taken};
use crate::ring::split::SplitRing;
use crate::ring::{Base, Memory, RingConfig};

/// Interrupt coalescing (`vhost_controller_set_coalescing`): above `iops_threshold` requests per second of a queue,
/// interrupts are at least `delay_base_us` times the excess apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coalescing {
    /// Microseconds; 0 = none.
    pub delay_base_us: u32,
    /// Requests per second.
    pub iops_threshold: u32,
}

/// How often the rate of a queue is measured.
const RATE_WINDOW: Duration = Duration::from_millis(10);

#[derive(Debug)]
struct Pacing {
    config: Coalescing,
    window: Instant,
    requests: u32,
    delay: Duration,
    /// No interrupt before.
    next: Instant,
    /// The driver wants one.
    wanted: bool,
}

/// What the control thread knows of a queue when it starts.
#[derive(Debug)]
pub(crate) struct QueueSetup {
    /// The controller's name, for the log.
    pub(crate) controller: Arc<str>,
    pub(crate) index: u16,
    pub(crate) ring: RingConfig,
    pub(crate) memory: Memory,
    pub(crate) base: Base,
    pub(crate) inflight: Option<InflightArea>,
    pub(crate) kick: Option<Arc<Kick>>,
    pub(crate) call: Option<Arc<Bell>>,
    pub(crate) err: Option<Arc<Bell>>,
    pub(crate) enabled: bool,
    pub(crate) write_back: Arc<AtomicBool>,
    pub(crate) serial: [u8; 20],
    pub(crate) coalescing: Coalescing,
}

#[derive(Debug)]
enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

#[derive(Debug)]
enum Track {
    None,
    Split(SplitInflight),
    Packed(PackedInflight),
}

/// A request of a former process, to be done first.
#[derive(Debug)]
struct Replay {
    slot: Slot,
    descriptors: Vec<Descriptor>,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Head or buffer id, and entries of the ring.
    taken: Taken,
    /// Of the memory of requests in flight (packed).
    entry: u16,
    /// Requests to the disk that are not completed; 0 = free.
    pending: u16,
    status: BlkStatus,
    /// Bytes written to the chain if all goes well.
    len: u32,
    status_at: *mut u8,
}

impl Slot {
    fn new(taken: Taken, entry: u16) -> Self {
        Self { taken, entry, pending: 0, status: BlkStatus::Ok, len: 1, status_at: std::ptr::null_mut() }
    }
}

/// Scratch space that the queues of a lane share.
#[derive(Debug)]
pub(crate) struct Scratch {
    chain: Chain,
    ranges: Vec<Range>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self { chain: Chain::new(), ranges: Vec::with_capacity(blk::MAX_RANGES) }
    }
}

/// A started queue, on its reactor.
#[derive(Debug)]
pub(crate) struct Queue {
    controller: Arc<str>,
    index: u16,
    config: RingConfig,
    ring: Ring,
    track: Track,
    /// Split: by head. Packed: by `free`.
    slots: Vec<Slot>,
    free: Vec<u16>,
    outstanding: u32,
    /// Ended without the disk; a batch of used entries must not be interleaved with taking chains.
    ended: Vec<(u16, BlkStatus)>,
    replay: VecDeque<Replay>,
    pub(crate) kick: Option<Arc<Kick>>,
    pub(crate) call: Option<Arc<Bell>>,
    err: Option<Arc<Bell>>,
    pub(crate) enabled: bool,
    broken: Option<Broken>,
    /// The present memory table has no place for the ring, which is not touched until one has.
    homeless: bool,
    /// Takes nothing from the ring; what was taken comes to its end.
    pub(crate) draining: bool,
    /// What fails from now on stays in the memory of requests in flight, if there is one: whoever starts the queue again
    /// repeats it.
    pub(crate) keeps_failed: bool,
    armed: bool,
    write_back: Arc<AtomicBool>,
    serial: [u8; 20],
    pacing: Pacing,
}

impl Queue {
    pub(crate) fn new(setup: QueueSetup, now: Instant) -> Result<Self, Broken> {
        let (config, size) = (setup.ring, setup.ring.size);
        let part = setup.inflight.map(|area| area.queue(setup.index, size)).transpose()?;
        let mut replay = VecDeque::new();
        let (mut ring, mut track) = (open_ring(config, setup.memory, setup.base)?, Track::None);
        match (&mut ring, part) {
            (_, None) => {}
            (Ring::Split(ring), Some(part)) => {
                let (inflight, heads) = SplitInflight::recover(part, ring)?;
                let undone =
                    |id| Replay { slot: Slot::new(Taken { id, count: 1 }, 0), descriptors: Vec::new() };
                replay.extend(heads.into_iter().map(undone));
                track = Track::Split(inflight);
            }
            (Ring::Packed(ring), Some(part)) => {
                let (inflight, list) = PackedInflight::recover(part, ring)?;
                replay.extend(
                    list.into_iter()
                        .map(|u| Replay { slot: Slot::new(u.taken, u.entry), descriptors: u.descriptors }),
                );
                track = Track::Packed(inflight);
            }
        }
        if !replay.is_empty() {
            let controller = &*setup.controller;
            tracing::info!(
                controller,
                queue = setup.index,
                requests = replay.len(),
                "repeating requests in flight"
            );
        }
        let mut queue = Self {
            controller: setup.controller,
            index: setup.index,
            config,
            ring,
            track,
            slots: vec![Slot::new(Taken { id: 0, count: 0 }, 0); size as usize],
            free: if config.packed { (0..size as u16).rev().collect() } else { Vec::new() },
            outstanding: 0,
            ended: Vec::with_capacity(size as usize),
            replay,
            kick: setup.kick,
            call: setup.call,
            err: setup.err,
            enabled: setup.enabled,
            broken: None,
            homeless: false,
            draining: false,
            keeps_failed: false,
            armed: true,
            write_back: setup.write_back,
            serial: setup.serial,
            pacing: Pacing {
                config: setup.coalescing,
                window: now,
                requests: 0,
                delay: Duration::ZERO,
                next: now,
                wanted: false,
            },
        };
        // What was used last, perhaps by a former process, may not have been announced.
        queue.signal();
        Ok(queue)
    }

    /// Requests in the disk, and those of a former process that are still to be repeated.
    pub(crate) fn inflight(&self) -> usize {
        self.outstanding as usize + self.replay.len() + self.ended.len()
    }

    /// Requests in the disk.
    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding as usize
    }

    /// Where the ring stands.
    pub(crate) fn base(&self) -> Base {
        match &self.ring {
            Ring::Split(r) => r.last_avail().into(),
            Ring::Packed(r) => r.base(),
        }
    }

    /// The same ring in another memory table. Only while nothing is in flight. A front end may take a region away and bring
    /// it back while the queue runs: without the region of its ring the queue waits.
    pub(crate) fn set_memory(&mut self, memory: Memory) {
        match open_ring(self.config, memory, self.base()) {
            Ok(ring) => (self.ring, self.homeless) = (ring, false),
            Err(why @ Broken::Ring(_)) => {
                tracing::info!(
                    controller = &*self.controller,
                    queue = self.index,
                    "vhost: {why} any more: the queue waits until it is there again"
                );
                self.homeless = true;
            }
            Err(why) => self.fail(why),
        }
        self.armed = true;
    }

    /// It takes requests from its ring.
    #[inline]
    fn is_served(&self) -> bool {
        self.broken.is_none() && self.enabled && !self.homeless
    }

    /// Takes up to `budget` chains and submits what they ask for; returns how many there were.
    pub(crate) fn fetch<C: DiskChannel>(
        &mut self,
        disk: &mut Option<C>,
        scratch: &mut Scratch,
        budget: usize,
    ) -> usize {
        if !self.is_served() {
            return 0;
        }
        if self.armed {
            self.disarm();
        }
        let mut count = 0;
        while count < budget && !disk.as_ref().is_some_and(DiskChannel::is_full) {
            match self.next(&mut scratch.chain) {
                Ok(Some(slot)) => {
                    if let Err(why) = self.start(slot, disk, scratch) {
                        self.fail(why);
                        break;
                    }
                }
                Ok(None) => break,
                Err(why) => {
                    self.fail(why);
                    break;
                }
            }
            count += 1;
        }
        self.pacing.requests = self.pacing.requests.saturating_add(count as u32);
        count
    }

    /// The next request, into `chain` and a slot.
    #[inline]
    fn next(&mut self, chain: &mut Chain) -> Result<Option<u16>, Broken> {
        if !self.replay.is_empty() {
            return self.next_replay(chain);
        }
        if self.draining {
            return Ok(None);
        }
        match &mut self.ring {
            Ring::Split(ring) => {
                let Some(head) = ring.take()? else { return Ok(None) };
                let slot = &mut self.slots[usize::from(head)];
                if slot.pending > 0 {
                    return Err(Broken::InFlight(head));
                }
                ring.read(head, chain)?;
                *slot = Slot::new(Taken { id: head, count: 1 }, 0);
                if let Track::Split(track) = &mut self.track {
                    track.taken(head);
                }
                Ok(Some(head))
            }
            Ring::Packed(ring) => {
                let Some(taken) = ring.take(chain)? else { return Ok(None) };
                let Some(index) = self.free.pop() else { return Err(Broken::TooLong(self.slots.len())) };
                let mut entry = 0;
                if let Track::Packed(track) = &mut self.track {
                    let full = Broken::InflightArea("more descriptors are in flight than the ring has");
                    entry = track.taken(ring.taken()).ok_or(full)?;
                }
                self.slots[usize::from(index)] = Slot::new(taken, entry);
                Ok(Some(index))
            }
        }
    }

    #[cold]
    fn next_replay(&mut self, chain: &mut Chain) -> Result<Option<u16>, Broken> {
        let Some(replay) = self.replay.pop_front() else { return Ok(None) };
        let index = match &self.ring {
            Ring::Split(ring) => {
                ring.read(replay.slot.taken.id, chain)?;
                replay.slot.taken.id
            }
            Ring::Packed(ring) => {
                ring.read(&replay.descriptors, chain)?;
                self.free.pop().ok_or(Broken::TooLong(self.slots.len()))?
            }
        };
        self.slots[usize::from(index)] = replay.slot;
        Ok(Some(index))
    }

    /// Does what the chain asks for.
    #[inline]
    fn start<C: DiskChannel>(
        &mut self,
        index: u16,
        disk: &mut Option<C>,
        scratch: &mut Scratch,
    ) -> Result<(), Broken> {
        let Scratch { chain, ranges } = scratch;
        let status_at = chain.last;
        let write_back = self.write_back.load(Ordering::Relaxed);
        let mut asked = blk::parse(chain, ranges, write_back)?;
        let slot = &mut self.slots[usize::from(index)];
        slot.status_at = status_at.unwrap_or(std::ptr::null_mut());
        slot.pending = 1;
        self.outstanding += 1;
        if disk.is_none() && !matches!(asked, Asked::Nothing(_) | Asked::Id) {
            asked = Asked::Nothing(BlkStatus::IoError);
        }
        let cookie = u64::from(self.index) << 16 | u64::from(index);
        let Some(disk) = disk.as_mut() else {
            return self.answer(index, asked, chain);
        };
        match asked {
            Asked::Data(Range { op, sector, len }) => {
                let segments = match op {
                    Op::Read => &chain.segments[chain.readable..],
                    _ => &chain.segments[..chain.readable],
                };
                if op == Op::Read {
                    slot.len = (len as u32).saturating_add(1);
                }
                disk.submit(Request { op, sector, len, segments, cookie });
            }
            Asked::Flush => disk.submit(Request { op: Op::Flush, sector: 0, len: 0, segments: &[], cookie }),
            Asked::Ranges => {
                slot.pending = ranges.len() as u16;
                for Range { op, sector, len } in ranges.drain(..) {
                    disk.submit(Request { op, sector, len, segments: &[], cookie });
                }
            }
            Asked::Id | Asked::Nothing(_) => return self.answer(index, asked, chain),
        }
        Ok(())
    }

    /// What needs no disk.
    fn answer(&mut self, index: u16, asked: Asked, chain: &Chain) -> Result<(), Broken> {
        let status = match asked {
            Asked::Id => {
                chain.write(&self.serial);
                let room = chain.writable_len.min(self.serial.len() as u64) as u32;
                self.slots[usize::from(index)].len = room + 1;
                BlkStatus::Ok
            }
            Asked::Nothing(status) => status,
            Asked::Data(_) | Asked::Flush | Asked::Ranges => BlkStatus::IoError,
        };
        self.ended.push((index, status));
        Ok(())
    }

    /// The disk is done with (a part of) the request in `index`.
    #[inline]
    pub(crate) fn complete(&mut self, index: u16, status: BlkStatus) {
        let slot = &mut self.slots[usize::from(index)];
        slot.status = slot.status.max(status);
        slot.pending -= 1;
        if slot.pending > 0 {
            return;
        }
        self.outstanding -= 1;
        let slot = *slot;
        if self.keeps_failed && slot.status != BlkStatus::Ok && !matches!(self.track, Track::None) {
            if matches!(self.ring, Ring::Packed(_)) {
                self.free.push(index);
            }
            return;
        }
        let len = if slot.status == BlkStatus::Ok { slot.len } else { 1 };
        // SAFETY: `parse` made sure that the chain has a last writable byte, which is in a region that stays mapped while
        // requests of it are in flight (a new memory table comes only to a queue without any).
        unsafe { slot.status_at.write_volatile(blk::status_byte(slot.status)) };
        match (&mut self.ring, &mut self.track) {
            (Ring::Split(ring), track) => {
                if let Track::Split(track) = track {
                    track.using(slot.taken.id);
                }
                ring.push_used(slot.taken.id, len);
            }
            (Ring::Packed(ring), track) => {
                if let Track::Packed(track) = track {
                    track.using(slot.entry, slot.taken.count);
                }
                ring.push_used(slot.taken, len);
                self.free.push(index);
            }
        }
    }

    /// Shows the driver what was used, so that it can go on while this side does. [`Queue::publish`] follows in the same
    /// turn.
    #[inline]
    pub(crate) fn show(&mut self) {
        match (&mut self.ring, &mut self.track) {
            (Ring::Split(ring), track) if ring.unpublished() > 0 => {
                ring.show();
                if let Track::Split(track) = track {
                    track.used(ring.published());
                }
            }
            (Ring::Packed(ring), track) if ring.unpublished() > 0 => {
                if let Track::Packed(track) = track {
                    track.before_publish();
                }
                ring.show();
                if let Track::Packed(track) = track {
                    track.used();
                }
            }
            _ => {}
        }
    }

    /// Shows the driver what was used, and interrupts it if it wants that.
    #[inline]
    pub(crate) fn publish(&mut self, now: Instant) {
        while let Some((index, status)) = self.ended.pop() {
            self.complete(index, status);
        }
        self.show();
        let wanted = match &mut self.ring {
            Ring::Split(ring) => ring.unannounced() > 0 && ring.publish(),
            Ring::Packed(ring) => ring.unannounced() > 0 && ring.publish(),
        };
        if self.pacing.config.delay_base_us == 0 {
            if wanted {
                self.signal();
            }
        } else {
            self.pace(wanted, now);
        }
    }

    fn signal(&mut self) {
        if let Some(call) = &self.call {
            call.ring();
        }
    }

    /// Tells the driver now, whatever it said: after a change of its call descriptor.
    pub(crate) fn set_call(&mut self, call: Option<Arc<Bell>>) {
        self.call = call;
        self.signal();
    }

    /// Where to tell that the ring is stopped; tells at once if it is.
    pub(crate) fn set_err(&mut self, err: Option<Arc<Bell>>) {
        self.err = err;
        if let Some(err) = self.err.as_ref().filter(|_| self.broken.is_some()) {
            err.ring();
        }
    }

    pub(crate) fn set_coalescing(&mut self, config: Coalescing) {
        self.pacing.config = config;
        self.pacing.delay = Duration::ZERO;
        if std::mem::take(&mut self.pacing.wanted) {
            self.signal();
        }
    }

    fn pace(&mut self, wanted: bool, now: Instant) {
        let p = &mut self.pacing;
        p.wanted |= wanted;
        if now.duration_since(p.window) >= RATE_WINDOW {
            let threshold =
                (u64::from(p.config.iops_threshold) * RATE_WINDOW.as_millis() as u64 / 1000).max(1);
            let excess = u64::from(p.requests).saturating_sub(threshold);
            p.delay = Duration::from_micros(u64::from(p.config.delay_base_us) * excess / threshold);
            (p.window, p.requests) = (now, 0);
        }
        if p.wanted && now >= p.next {
            p.wanted = false;
            p.next = now + p.delay;
            self.signal();
        }
    }

    /// When an interrupt that was put off is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.pacing.wanted.then_some(self.pacing.next)
    }

    /// The reactor will sleep: the driver shall kick. True: there is work.
    pub(crate) fn arm(&mut self) -> bool {
        // Also of a queue that is not served: its descriptor must not keep waking the reactor.
        if !self.is_served() {
            if let Some(kick) = &self.kick {
                kick.drain();
            }
            return false;
        }
        if !self.replay.is_empty() || !self.ended.is_empty() {
            return true;
        }
        if self.draining {
            return false;
        }
        self.armed = true;
        let more = match &mut self.ring {
            Ring::Split(ring) => ring.enable_kicks(),
            Ring::Packed(ring) => ring.enable_kicks(),
        };
        more || self.kick.is_none()
    }

    /// Awake: kicks are not needed.
    fn disarm(&mut self) {
        self.armed = false;
        if let Some(kick) = &self.kick {
            kick.drain();
        }
        match &mut self.ring {
            Ring::Split(ring) => ring.disable_kicks(),
            Ring::Packed(ring) => ring.disable_kicks(),
        }
    }

    /// For [`crate::fuzzing::Bench`].
    #[cfg(fuzzing)]
    pub(crate) fn open(&self) -> Vec<crate::fuzzing::Open> {
        let packed = matches!(self.ring, Ring::Packed(_));
        let replay = self.replay.iter().map(|r| &r.slot);
        let slots = replay.chain(self.slots.iter().filter(|s| s.pending > 0));
        slots
            .map(|s| crate::fuzzing::Open {
                id: s.taken.id,
                entry: if packed { s.entry } else { s.taken.id },
                count: s.taken.count,
            })
            .collect()
    }

    /// For [`crate::fuzzing::Bench`].
    #[cfg(fuzzing)]
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Stops for good: the guest's driver broke the rules of the ring.
    #[cold]
    fn fail(&mut self, why: Broken) {
        let (controller, queue) = (&*self.controller, self.index);
        tracing::warn!(controller, queue, "vhost: the ring is stopped until its driver resets it: {why}");
        self.broken = Some(why);
        self.replay.clear();
        if let Some(err) = &self.err {
            err.ring();
        }
    }
}

fn open_ring(config: RingConfig, memory: Memory, base: Base) -> Result<Ring, Broken> {
    Ok(match config.packed {
        false => Ring::Split(SplitRing::new(config, memory, base as u16)?),
        true => Ring::Packed(PackedRing::new(config, memory, base)?),
    })
}

/// A base for a packed ring that has not been used.
pub(crate) const PACKED_START: Base = {
    let start = 1 << 15;
    start | start << 16
};
