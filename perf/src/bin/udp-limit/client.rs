//! The asking thread: keeps the depth outstanding and times each exchange.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::address::Address;
use crate::args::{Options, TAG_BYTES};
use crate::receiver::Receiver;
use crate::run::{Phase, Progress, Usage};
use crate::sender::Sender;

/// Before a round is measured: page faults, branch predictors and the cores' clocks settle.
const WARM_UP: Duration = Duration::from_millis(200);

/// An exchange without its whole reply after this long is lost and begun anew.
const LOST_AFTER: Duration = Duration::from_millis(50);

/// How often exchanges are checked for loss.
const CHECK_EVERY: Duration = Duration::from_millis(10);

/// Empty turns between two looks at the clock.
const IDLE_TURNS: u32 = 64;

/// What the asking thread did while it was measured.
#[derive(Debug)]
pub struct Asked {
    /// Exchanges finished.
    pub exchanges: u64,
    /// Packets of replies that belonged to an outstanding exchange.
    pub packets: u64,
    /// Bytes of these packets.
    pub bytes: u64,
    /// Exchanges begun anew, because nothing of the reply or not all of it came.
    pub lost: u64,
    /// Packets that were not part of an outstanding exchange's reply: too late, of the wrong size, from a stranger.
    pub ignored: u64,
    /// Turns that found replies.
    pub turns: u64,
    /// From handing the request to the kernel to having the whole reply, in nanoseconds.
    pub latency: Histogram<u64>,
    /// Time measured.
    pub elapsed: Duration,
    /// CPU time.
    pub usage: Usage,
}

/// Asks `server` through `socket` for one round, and ends the run.
pub fn ask(
    options: &Options,
    socket: &UdpSocket,
    server: Address,
    progress: &Progress,
) -> Result<Asked, String> {
    let mut client = Client::new(options, socket, server, progress);
    client.send()?;
    client.turns_for(WARM_UP)?;
    client.done = Asked::nothing();
    progress.enter(Phase::Measure);
    let (began, before) = (Instant::now(), Usage::of_this_thread());
    client.turns_for(options.duration())?;
    client.done.elapsed = began.elapsed();
    client.done.usage = Usage::of_this_thread() - before;
    Ok(client.done)
}

/// One exchange of the depth.
#[derive(Clone, Copy)]
struct Slot {
    /// Tells tries apart: a reply to an earlier one is ignored.
    generation: u32,
    /// Bytes of the reply that have not come yet.
    missing: usize,
    /// When the request was handed to the kernel.
    sent: Instant,
}

struct Client<'a> {
    options: &'a Options,
    socket: &'a UdpSocket,
    server: Address,
    progress: &'a Progress,
    receiver: Receiver,
    sender: Sender<'a>,
    slots: Vec<Slot>,
    /// Slots to be sent at the end of the turn.
    ready: Vec<usize>,
    next_check: Instant,
    done: Asked,
}

impl<'a> Client<'a> {
    fn new(options: &'a Options, socket: &'a UdpSocket, server: Address, progress: &'a Progress) -> Self {
        let now = Instant::now();
        let depth = options.depth as usize;
        Self {
            options,
            socket,
            server,
            progress,
            receiver: Receiver::new(options.gso, options.mtu),
            sender: Sender::new(socket, progress, options.gso, options.request),
            slots: vec![Slot { generation: 0, missing: options.reply, sent: now }; depth],
            ready: (0..depth).collect(),
            next_check: now + CHECK_EVERY,
            done: Asked::nothing(),
        }
    }

    /// Runs for this long, less if the server has ended the run.
    fn turns_for(&mut self, time: Duration) -> Result<(), String> {
        let end = Instant::now() + time;
        let mut idle = 0;
        while self.progress.phase() != Phase::Over {
            let found = self.receive()?;
            idle = if found { 0 } else { idle + 1 };
            if !found && idle % IDLE_TURNS != 0 {
                continue;
            }
            let now = Instant::now();
            if found {
                self.finish(now);
            }
            if now >= self.next_check {
                self.restart_lost(now);
            }
            self.send()?;
            if now >= end {
                break;
            }
        }
        Ok(())
    }

    /// Takes what is there; false if nothing is. Slots whose reply is whole become ready.
    fn receive(&mut self) -> Result<bool, String> {
        // More messages than packets outstanding cannot come: with one, the kernel need not look for a second.
        let most = self.slots.len() * self.options.packets();
        let count = self.receiver.receive(self.socket.as_raw_fd(), most);
        if count.map_err(|e| format!("recvmmsg of replies: {e}"))? == 0 {
            return Ok(false);
        }
        self.done.turns += 1;
        let sizes = (self.options.mtu.min(self.options.reply), self.options.tail());
        for message in self.receiver.messages() {
            let known = message.from == self.server;
            for packet in message.packets() {
                match outstanding(&mut self.slots, packet).filter(|_| known && is_one_of(packet.len(), sizes))
                {
                    Some((index, slot)) if slot.missing >= packet.len() => {
                        slot.missing -= packet.len();
                        self.done.packets += 1;
                        self.done.bytes += packet.len() as u64;
                        if slot.missing == 0 {
                            self.ready.push(index);
                        }
                    }
                    _ => self.done.ignored += 1,
                }
            }
        }
        Ok(true)
    }

    /// Counts the exchanges that this turn finished; they may be sent anew.
    fn finish(&mut self, now: Instant) {
        for &index in &self.ready {
            let slot = &mut self.slots[index];
            let latency = now.saturating_duration_since(slot.sent).as_nanos() as u64;
            self.done.latency.saturating_record(latency);
            slot.generation = slot.generation.wrapping_add(1);
            slot.missing = self.options.reply;
        }
        self.done.exchanges += self.ready.len() as u64;
    }

    /// Makes exchanges ready again of which nothing has been heard for too long. `finish` has been called.
    fn restart_lost(&mut self, now: Instant) {
        self.next_check = now + CHECK_EVERY;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if now.saturating_duration_since(slot.sent) < LOST_AFTER || self.ready.contains(&index) {
                continue;
            }
            slot.generation = slot.generation.wrapping_add(1);
            slot.missing = self.options.reply;
            self.ready.push(index);
            self.done.lost += 1;
        }
    }

    /// Sends the requests of the slots that are ready.
    fn send(&mut self) -> Result<(), String> {
        if self.ready.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let mut add = || -> io::Result<()> {
            for index in self.ready.drain(..) {
                let slot = &mut self.slots[index];
                slot.sent = now;
                self.sender.packet(&self.server, &tag(index, slot.generation), self.options.request)?;
            }
            self.sender.flush()
        };
        add().map_err(|e| format!("sendmmsg of requests: {e}"))
    }
}

impl Asked {
    fn nothing() -> Self {
        Self {
            exchanges: 0,
            packets: 0,
            bytes: 0,
            lost: 0,
            ignored: 0,
            turns: 0,
            latency: Histogram::new_with_bounds(1, 10_000_000_000, 3)
                .expect("1 ns to 10 s with 3 digits is valid"),
            elapsed: Duration::ZERO,
            usage: Usage::default(),
        }
    }
}

/// The first bytes of each packet of an exchange: its slot and which try it is.
fn tag(index: usize, generation: u32) -> [u8; TAG_BYTES] {
    (index as u64 | u64::from(generation) << 32).to_ne_bytes()
}

/// The outstanding exchange to which a packet belongs, if it does.
fn outstanding<'s>(slots: &'s mut [Slot], packet: &[u8]) -> Option<(usize, &'s mut Slot)> {
    let tag = u64::from_ne_bytes(*packet.first_chunk()?);
    let index = tag as u32 as usize;
    let slot = slots.get_mut(index)?;
    (slot.generation == (tag >> 32) as u32 && slot.missing > 0).then_some((index, slot))
}

fn is_one_of(len: usize, (whole, tail): (usize, usize)) -> bool {
    len == whole || len == tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packets_of_an_outstanding_try_are_counted() {
        let slot = |generation, missing| Slot { generation, missing, sent: Instant::now() };
        let mut slots = [slot(0, 10), slot(u32::MAX, 10), slot(3, 0)];
        let mut index = |bytes: &[u8]| outstanding(&mut slots, bytes).map(|(index, _)| index);
        assert_eq!(index(&tag(0, 0)), Some(0));
        assert_eq!(index(&tag(1, u32::MAX)), Some(1));
        assert_eq!(index(&tag(1, 0)), None, "an earlier try");
        assert_eq!(index(&tag(2, 3)), None, "whole already");
        assert_eq!(index(&tag(3, 0)), None, "no such slot");
        assert_eq!(index(&tag(0, 0)[..7]), None, "too short");
    }
}
