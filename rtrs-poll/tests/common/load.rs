//! A load that checks its data: each slot writes its block of the disk, reads it back, compares, and goes on with
//! other contents. A request that the loss of the session left open is made again.

use rtrs_poll::client::{Io, Refused, SessionKey};
use rtrs_proto::Errno;

use super::disk::usr;
use super::probe::{Memory, Request};

/// Cookies from here on are a load's.
pub const LOAD_COOKIE: u64 = 1 << 32;
const BLOCK: u32 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// To be submitted.
    Due,
    InFlight,
    /// Until the session is up again.
    Held,
    Stopped,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    reading: bool,
    round: u32,
}

pub struct Load {
    key: SessionKey,
    memory: Memory,
    /// Of the disk: its first block.
    first: u64,
    slots: Vec<Slot>,
    stopping: bool,
    pub counts: Counts,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks written and read back as they were.
    pub verified: u64,
    /// Requests that ended with ECONNABORTED.
    pub aborted: u64,
    /// Slots that are not stopped.
    pub running: usize,
}

impl Load {
    /// `slots` requests at once, to blocks of the disk from `first` on.
    pub fn new(key: SessionKey, memory: Memory, first: u64, slots: usize) -> Self {
        let slots = vec![Slot { state: State::Due, reading: false, round: 1 }; slots];
        let counts = Counts { running: slots.len(), ..Counts::default() };
        Self { key, memory, first, slots, stopping: false, counts }
    }

    /// Slots stop after their present request.
    pub fn stop(&mut self) {
        self.stopping = true;
        for i in 0..self.slots.len() {
            if matches!(self.slots[i].state, State::Held | State::Due) {
                self.end(i);
            }
        }
    }

    fn end(&mut self, i: usize) {
        self.slots[i].state = State::Stopped;
        self.counts.running -= 1;
    }

    fn contents(i: usize, round: u32) -> Vec<u8> {
        let word = (u64::from(round) << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (0..u64::from(BLOCK) / 8).flat_map(|n| (word ^ n).to_le_bytes()).collect()
    }

    fn request(&self, i: usize) -> Request {
        let usr = usr(b'D', 0, (self.first + i as u64) * u64::from(BLOCK));
        let (at, cookie) = (i * 2 * BLOCK as usize, LOAD_COOKIE + i as u64);
        if self.slots[i].reading {
            self.memory.read(at + BLOCK as usize, BLOCK, &usr, cookie)
        } else {
            self.memory.write(at, BLOCK, &usr, cookie)
        }
    }

    fn submit(&mut self, io: &mut Io, i: usize) {
        let slot = self.slots[i];
        assert_ne!(slot.state, State::InFlight, "a slot has one request");
        let at = i * 2 * BLOCK as usize;
        if slot.reading {
            self.memory.fill(at + BLOCK as usize, &[0xdd; BLOCK as usize]);
        } else {
            self.memory.fill(at, &Self::contents(i, slot.round));
        }
        self.slots[i].state = match self.request(i).submit(io, self.key) {
            Ok(()) => State::InFlight,
            Err(Refused::Busy | Refused::Unregistered) => State::Due,
            Err(Refused::Down) => State::Held,
            Err(other) => panic!("{other}"),
        };
    }

    pub fn session_up(&mut self, io: &mut Io) {
        for i in 0..self.slots.len() {
            if self.slots[i].state == State::Held {
                self.submit(io, i);
            }
        }
    }

    pub fn completed(&mut self, io: &mut Io, i: usize, result: Result<(), Errno>) {
        let slot = &mut self.slots[i];
        assert_eq!(slot.state, State::InFlight, "every request ends once");
        slot.state = State::Due;
        match result {
            Ok(()) => self.succeeded(i),
            Err(Errno::ECONNABORTED) => {
                self.counts.aborted += 1;
                self.slots[i].state = State::Held;
            }
            Err(other) => panic!("slot {i}: {other}"),
        }
        if self.stopping {
            self.end(i);
        } else if self.slots[i].state == State::Due {
            self.submit(io, i);
        }
    }

    fn succeeded(&mut self, i: usize) {
        let Slot { reading, round, .. } = self.slots[i];
        if reading {
            let got = self.memory.bytes(i * 2 * BLOCK as usize + BLOCK as usize, BLOCK as usize);
            assert!(got == Self::contents(i, round), "slot {i}, round {round}: other data came back");
            self.counts.verified += 1;
            self.slots[i].round += 1;
        }
        self.slots[i].reading = !reading;
    }

    pub fn poll(&mut self, io: &mut Io) -> bool {
        let mut any = false;
        for i in 0..self.slots.len() {
            // Refused as down while the session was up: its paths are being lost, or come back.
            if self.slots[i].state == State::Due || self.slots[i].state == State::Held {
                self.submit(io, i);
                any |= self.slots[i].state != State::Held;
            }
        }
        any
    }
}
