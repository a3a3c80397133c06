//! Sending: parts go out in the order in which they came, until the session is full.

use std::time::{Duration, Instant};

use bdev::{Flags, Op, Segments, Status};
use iobuf::Segment;

use super::data;
use super::disks::{Device, Disks, Gate, is_fua};
use super::fence::Fence;
use super::request::{Message, Opened, Part, Unsent, Wire};

/// Pause before something is tried again that no completion will announce.
const RETRY: Duration = Duration::from_millis(1);
/// 512-byte units, as RNBD counts.
const SECTOR_SHIFT: u32 = 9;

impl<S: Copy + Eq> Disks<S> {
    /// Sends what can be sent, and ends what has waited too long. Once per turn; true if there was anything to do.
    pub fn run(&mut self, now: Instant, wire: &mut impl Wire<S>) -> bool {
        self.retry_at = None;
        let mut any = self.expire(now);
        for _ in 0..self.active.len() {
            let Some(device) = self.active.pop_front() else { break };
            if let Some(d) = self.devices.get_mut(device) {
                d.active = false;
                any |= self.run_device(device, now, wire);
            }
            if self.devices.get(device).is_some_and(has_work) {
                self.activate(device);
            }
        }
        any
    }

    fn run_device(&mut self, device: u32, now: Instant, wire: &mut impl Wire<S>) -> bool {
        let mut any = self.look_at_lost(device, now);
        if self.devices.get(device).is_some_and(|d| d.fenced_until.is_some_and(|at| at <= now)) {
            self.release_fenced(device);
        }
        loop {
            let Some(d) = self.devices.get(device) else { return any };
            let Gate::Open(open) = d.gate else { return any };
            let Some(&part) = d.ready.front() else {
                if self.cut(device, &open, now) {
                    continue;
                }
                return any;
            };
            if self.is_in_vain(part) {
                continue;
            }
            let result = self.send(part, &open, wire);
            let Some(d) = self.devices.get_mut(device) else { return any };
            match result {
                Ok(()) => {
                    d.ready.pop_front();
                    d.inflight += 1;
                    if let Some(part) = self.parts.get_mut(part) {
                        part.epoch = open.epoch;
                    }
                }
                // What is not up any more says so soon, and memory that was just made is registered soon.
                Err(Unsent::Busy | Unsent::Down | Unsent::Memory) => {
                    if d.inflight == 0 {
                        self.retry_at = Some(now + RETRY);
                    }
                    return any;
                }
                Err(Unsent::Never) => {
                    d.ready.pop_front();
                    self.part_ended(part, Status::IoError);
                }
            }
            any = true;
        }
    }

    /// Ends a part, the first that is ready, whose request has failed meanwhile.
    fn is_in_vain(&mut self, place: u32) -> bool {
        let request = self.parts.get(place).and_then(|p| self.requests.get(p.request));
        let Some((device, status)) = request.map(|r| (r.device, r.status)).filter(|(_, s)| *s != Status::Ok)
        else {
            return false;
        };
        if let Some(d) = self.devices.get_mut(device) {
            d.ready.pop_front();
        }
        self.part_ended(place, status);
        true
    }

    /// Sends one part, out of the request's own memory if that can be.
    fn send(&mut self, place: u32, open: &Opened<S>, wire: &mut impl Wire<S>) -> Result<(), Unsent> {
        let Self { parts, requests, scratch, any_memory, .. } = self;
        let part = parts.get(place).ok_or(Unsent::Never)?;
        let r = requests.get(part.request).ok_or(Unsent::Never)?;
        let most = open.limits.of(r.op);
        if part.len > most && most > 0 {
            // It was cut in an earlier opening, in which the server took more.
            self.divide(place, most)?;
            return self.send(place, open, wire);
        }
        let (cookie, op) = (u64::from(place), r.op);
        let (fua, keep) = (is_fua(r.op, r.flags), r.flags.has(Flags::NO_UNMAP));
        let sector = (r.offset + part.from) >> SECTOR_SHIFT;
        if !op.has_data() {
            let message = Message { op, fua, keep, sector, len: part.len, data: &[] };
            return wire.send(open, &message, cookie);
        }
        if part.bounce.is_none() {
            data::pieces(&r.segments, part.from, part.len, scratch);
            if *any_memory || can_be_direct(op, scratch) {
                let message = Message { op, fua, keep, sector, len: part.len, data: scratch };
                match wire.send(open, &message, cookie) {
                    Err(Unsent::Memory) => {}
                    sent => return sent,
                }
            }
            self.bounce(place)?;
        }
        let part = self.parts.get(place).ok_or(Unsent::Never)?;
        let segment = bounced(part).ok_or(Unsent::Never)?;
        wire.send(open, &Message { op, fua, keep, sector, len: part.len, data: &[segment] }, cookie)
    }

    /// Shortens a part, the first that is ready, to `len` bytes. The rest becomes a part of its own, behind it.
    #[cold]
    fn divide(&mut self, place: u32, len: u32) -> Result<(), Unsent> {
        let part = self.parts.get_mut(place).ok_or(Unsent::Never)?;
        let r = self.requests.get_mut(part.request).ok_or(Unsent::Never)?;
        let d = self.devices.get_mut(r.device).ok_or(Unsent::Never)?;
        let (from, rest) = (part.from + u64::from(len), part.len.saturating_sub(len));
        part.len -= rest;
        if rest > 0 {
            // The fence of a repetition stands until the last piece of it is answered.
            if part.epoch > 0 && d.fence.is_up() && r.op.modifies() {
                d.fence.raise(Fence::NO_WAY, r.offset + from, rest.into());
            }
            r.parts += 1;
            let rest = Part { request: part.request, from, len: rest, bounce: None, epoch: part.epoch };
            let rest = self.parts.insert(rest);
            d.ready.insert(1.min(d.ready.len()), rest);
        }
        Ok(())
    }

    /// Gives a part a buffer, with its data if it is a write. A part that is longer than a buffer becomes two.
    fn bounce(&mut self, place: u32) -> Result<(), Unsent> {
        let buffer = self.pool.as_ref().ok_or(Unsent::Never)?.take().ok_or(Unsent::Busy)?;
        self.divide(place, buffer.len() as u32)?;
        let Self { parts, requests, .. } = self;
        let part = parts.get_mut(place).ok_or(Unsent::Never)?;
        let r = requests.get(part.request).ok_or(Unsent::Never)?;
        if r.op == Op::Write {
            // SAFETY: the request has not completed: this part of it has not even been sent.
            let copied = unsafe { data::fill(&buffer, &r.segments, part.from, part.len) };
            if !copied {
                return Err(Unsent::Never);
            }
        }
        part.bounce = Some(buffer);
        Ok(())
    }

    /// Parts that a lost session left: those of an earlier opening may go again; one of the present opening cannot
    /// have been lost, so the server itself has answered ECONNABORTED, and is taken at its word.
    fn look_at_lost(&mut self, device: u32, now: Instant) -> bool {
        let Some(d) = self.devices.get_mut(device) else { return false };
        let Gate::Open(open) = d.gate else { return false };
        let due = d.repeat_at.is_none_or(|at| at <= now);
        if d.lost.is_empty() || !(d.look || (due && d.repeat_at.is_some())) {
            return false;
        }
        d.look = false;
        if due {
            d.repeat_at = None;
        }
        let (mut again, mut answered) = (Vec::new(), Vec::new());
        let (parts, requests) = (&self.parts, &self.requests);
        d.lost.retain(|place| {
            let Some(part) = parts.get(*place) else { return false };
            if part.epoch == open.epoch {
                answered.push(*place);
            } else if due || requests.get(part.request).is_none_or(|r| !r.op.modifies()) {
                again.push(*place);
            } else {
                return true;
            }
            false
        });
        // In their old order, before everything newer.
        again.iter().rev().for_each(|place| d.ready.push_front(*place));
        answered.iter().for_each(|place| self.part_ended(*place, Status::IoError));
        !again.is_empty() || !answered.is_empty()
    }
}

/// Registered memory, and for a read all in one piece: that is as much as the kernel's server takes.
fn can_be_direct(op: Op, pieces: &Segments) -> bool {
    (op == Op::Write || pieces.len() == 1) && pieces.iter().all(|s| s.region.index().is_some())
}

fn bounced(part: &Part) -> Option<Segment> {
    // SAFETY: the part keeps the buffer until it has been answered.
    part.bounce.as_ref().and_then(|b| unsafe { b.segment(part.len as usize) })
}

fn has_work<S>(d: &Device<S>) -> bool {
    !(d.queue.is_empty() && d.ready.is_empty() && d.lost.is_empty() && d.fenced.is_empty())
}
