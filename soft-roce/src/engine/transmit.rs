//! Building and sending the packets of a turn.

use std::mem::MaybeUninit;

use roce_proto::icrc::Digest;
use roce_proto::keys::{self, Pinned};
use roce_proto::rc::{Outgoing, Payload};
use roce_proto::{Counter, Headers, Nanos};

use super::Engine;
use super::entry::Entry;
use super::place::pieces;
use super::qps::Qps;
use crate::udp::{Sent, Transmitter};

/// Packets that one queue pair may send before the others have their turn.
const SHARE: usize = 64;

/// What is known of the packets in the transmitter's batch.
pub struct Batch {
    /// In order: of which queue pair, and how it may be given back.
    packets: Vec<Built>,
    /// Storage for [`Lent::pins`] between turns.
    pins: Vec<Pinned<'static>>,
    /// Where the next turn begins in the list of active queue pairs.
    first: usize,
}

/// A packet in the batch.
struct Built {
    place: u16,
    /// UDP payload.
    bytes: u16,
    headers: Headers,
}

/// A packet that could not be built: its memory is not, or no longer, registered.
struct Unbuildable;

impl Batch {
    pub fn new() -> Self {
        Self { packets: Vec::with_capacity(256), pins: Vec::with_capacity(1024), first: 0 }
    }

    /// Sends what the active queue pairs have. True: the system had no room for all of it.
    pub fn transmit(&mut self, engine: &Engine, qps: &mut Qps, tx: &mut Transmitter, now: Nanos) -> bool {
        let mut pins = recycle(std::mem::take(&mut self.pins));
        let mut busy = false;
        // One round: each has its share, and whoever has more stays in the list for the next turn.
        let count = qps.active.len();
        self.first = if self.first < count { self.first } else { 0 };
        for i in 0..count {
            let place = qps.active[(self.first + i) % count];
            if !busy {
                busy = self.take_packets(engine, qps, tx, place, &mut pins, now);
            }
        }
        busy |= !self.flush(engine, qps, tx, &mut pins);
        self.first += 1;
        self.pins = recycle(pins);
        retire(qps, now);
        busy
    }

    /// Takes the share of the queue pair at `place`. True: the system has no room.
    fn take_packets<'k>(
        &mut self,
        engine: &'k Engine,
        qps: &mut Qps,
        tx: &mut Transmitter,
        place: u16,
        pins: &mut Vec<Pinned<'k>>,
        now: Nanos,
    ) -> bool {
        let mut hurried = false;
        for taken in 0..SHARE {
            if !tx.has_room() && !self.flush(engine, qps, tx, pins) {
                return true;
            }
            let Some(entry) = qps.table.at(place).filter(|entry| entry.active) else { return false };
            let mut packet = entry.rc.next_packet(now, engine.counters());
            if packet.is_none() && taken > 0 && !hurried {
                // An acknowledgement that waits for company has it now: as the end of a run it costs next to nothing.
                hurried = true;
                entry.rc.flush_acks();
                packet = entry.rc.next_packet(now, engine.counters());
            }
            let Some(packet) = packet else { return false };
            match build(entry, &engine.port.keys, tx, u32::from(place), &packet, pins) {
                Ok(bytes) => self.packets.push(Built { place, bytes, headers: packet.headers }),
                Err(Unbuildable) => qps.refuse(engine, place, &packet),
            }
        }
        false
    }

    /// Sends the batch. False: the system has no room; what it did not take is back with its queue pairs.
    fn flush<'k>(
        &mut self,
        engine: &'k Engine,
        qps: &mut Qps,
        tx: &mut Transmitter,
        pins: &mut Vec<Pinned<'k>>,
    ) -> bool {
        if self.packets.is_empty() {
            return true;
        }
        let counters = engine.counters();
        let result = tx.send();
        // The memory has been read.
        pins.clear();
        let taken = match result {
            Sent::All => self.packets.len(),
            Sent::Busy(n) | Sent::NoRuns(n) | Sent::Refused(n, _) => n.min(self.packets.len()),
        };
        counters.add(Counter::TxPackets, taken as u64);
        // Given back last first; so the last one is the first that was not taken.
        let mut first_left = None;
        for Built { place, headers, .. } in self.packets.drain(taken..).rev() {
            if let Some(entry) = qps.table.at(place) {
                entry.rc.unsent(&headers);
            }
            qps.activate(place);
            first_left = Some(place);
            if matches!(result, Sent::Busy(_)) {
                counters.count(Counter::TxBusy);
            }
        }
        counters.add(Counter::TxBytes, self.packets.iter().map(|packet| u64::from(packet.bytes)).sum());
        self.packets.clear();
        match result {
            Sent::All => {}
            Sent::Busy(_) => return false,
            Sent::NoRuns(_) => {
                tracing::warn!(
                    "the system cannot send runs of packets (UDP_SEGMENT) on this path; going on without"
                );
            }
            Sent::Refused(_, errno) => {
                if let Some(place) = first_left {
                    refused(qps, place, errno);
                }
            }
        }
        true
    }
}

/// The system will never take the packets of this queue pair.
fn refused(qps: &mut Qps, place: u16, errno: i32) {
    let error = std::io::Error::from_raw_os_error(errno);
    if let Some(entry) = qps.table.at(place) {
        let peer = entry.link.as_ref().map(|link| tracing::field::display(link.peer));
        tracing::error!(qpn = entry.qpn, peer, %error, "the system refuses a packet: connection broken");
    }
    qps.fail(place);
}

/// Notes deadlines, and takes those who have nothing to send out of the list.
fn retire(qps: &mut Qps, now: Nanos) {
    let mut i = 0;
    while let Some(&place) = qps.active.get(i) {
        let mut stays = false;
        if let Some(entry) = qps.table.at(place)
            && entry.active
        {
            stays = entry.rc.wants_to_send(now);
            entry.active = stays;
            let at = entry.deadline();
            qps.table.set_deadline(place, at);
        }
        if stays {
            i += 1;
        } else {
            qps.active.swap_remove(i);
        }
    }
}

/// Bytes that are copied at a time for their checksum: the payload of a packet, which stays in the first-level cache.
const BLOCK: usize = 4096;

/// Writes one packet into the transmitter's batch; its payload stays where it is, pinned. Returns its bytes.
fn build<'k>(
    entry: &mut Entry,
    keys: &'k keys::Table,
    tx: &mut Transmitter,
    owner: u32,
    packet: &Outgoing<u32>,
    pins: &mut Vec<Pinned<'k>>,
) -> Result<u16, Unbuildable> {
    let before = pins.len();
    let len = match pin_payload(entry, keys, &packet.payload, pins) {
        Ok(len) => len,
        Err(refused) => {
            pins.truncate(before);
            return Err(refused);
        }
    };
    let Some(link) = &mut entry.link else { return Err(Unbuildable) };
    let pad = len.wrapping_neg() as usize & 3;
    let mut head = [0; Headers::MAX_LEN];
    let head_len = packet.headers.encode(pad as u8, &mut head);
    let udp_len = head_len + len as usize + pad + 4;
    let id = tx.begin(owner, &link.dest, udp_len);
    let mut digest = link.out.begin(udp_len, id, &head[..head_len]);
    tx.copy(&head[..head_len]);
    for pin in &pins[before..] {
        append(tx, &mut digest, pin, Transmitter::is_small(len as usize));
    }
    let mut tail = [0; 7];
    digest.update(&tail[..pad]);
    tail[pad..pad + 4].copy_from_slice(&digest.finish());
    tx.copy(&tail[..pad + 4]);
    Ok(udp_len as u16)
}

fn append(tx: &mut Transmitter, digest: &mut Digest, pin: &Pinned<'_>, small: bool) {
    let (start, len) = (pin.addr as *const u8, pin.len as usize);
    let mut block = [const { MaybeUninit::<u8>::uninit() }; BLOCK];
    for at in (0..len).step_by(BLOCK) {
        let n = BLOCK.min(len - at);
        // SAFETY: the table vouches that the bytes lie in a registered region which its owner cannot free before the guard
        // is dropped; `block` is on the stack and has room for `n`, which are initialised by the copy. A peer may write to
        // the region meanwhile, so no reference into it is made: the copy is of either state, and so is what the kernel
        // sends, whose ICRC then may not fit, which costs a repetition.
        let part = unsafe {
            std::ptr::copy_nonoverlapping(start.add(at), block.as_mut_ptr().cast(), n);
            std::slice::from_raw_parts(block.as_ptr().cast(), n)
        };
        digest.update(part);
        if small {
            tx.copy(part);
        }
    }
    if !small {
        // SAFETY: pinned until the batch is sent: `Batch::flush` drops the guards after that.
        unsafe { tx.external(start, len) };
    }
}

/// Pins the payload's pieces; returns its length.
fn pin_payload<'k>(
    entry: &Entry,
    keys: &'k keys::Table,
    payload: &Payload<u32>,
    pins: &mut Vec<Pinned<'k>>,
) -> Result<u32, Unbuildable> {
    match *payload {
        Payload::None => Ok(0),
        Payload::Send { data, offset, len } => {
            let slot = entry.sends.get(data).ok_or(Unbuildable)?;
            let mut sum = 0;
            for piece in pieces(slot.sges.as_slice(), offset, len) {
                let access = keys::Access::LocalRead;
                let pin = keys.pin(piece.lkey, entry.domain, piece.addr, u64::from(piece.len), access);
                pins.push(pin.map_err(|_| Unbuildable)?);
                sum += piece.len;
            }
            if sum == len { Ok(len) } else { Err(Unbuildable) }
        }
        Payload::Memory { len: 0, .. } => Ok(0),
        Payload::Memory { rkey, va, len } => {
            let pin = keys.pin(rkey, entry.domain, va, u64::from(len), keys::Access::RemoteRead);
            pins.push(pin.map_err(|_| Unbuildable)?);
            Ok(len)
        }
    }
}

/// An empty vector's storage for guards of another lifetime. The standard library collects in place.
fn recycle<'b>(mut pins: Vec<Pinned<'_>>) -> Vec<Pinned<'b>> {
    pins.clear();
    pins.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}
