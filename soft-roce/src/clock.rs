//! Time and randomness for the state machines, which have none of their own.

use rustix::rand::{GetRandomFlags, getrandom};

#[cfg(not(fuzzing))]
use roce_proto::Nanos;

/// Nanoseconds of CLOCK_MONOTONIC.
#[cfg(not(fuzzing))]
pub fn now() -> Nanos {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

#[cfg(fuzzing)]
pub(crate) use crate::fuzzing::now;

/// Unpredictable bits of the kernel's generator. Keeps some in stock, as each system call gives up to 256 bytes.
pub struct Random {
    stock: [u8; 256],
    left: usize,
}

impl Random {
    pub const fn new() -> Self {
        Self { stock: [0; 256], left: 0 }
    }

    pub fn u32(&mut self) -> u32 {
        if self.left < 4 {
            self.refill();
        }
        self.left -= 4;
        let bytes = &mut self.stock[self.left..self.left + 4];
        // What was given out is not kept.
        let value = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        bytes.fill(0);
        value
    }

    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) << 32 | u64::from(self.u32())
    }

    fn refill(&mut self) {
        self.left = 0;
        #[cfg(fuzzing)]
        while self.left < self.stock.len() {
            self.stock[self.left..][..8].copy_from_slice(&crate::fuzzing::draw().to_ne_bytes());
            self.left += 8;
        }
        while self.left < self.stock.len() {
            match getrandom(&mut self.stock[self.left..], GetRandomFlags::empty()) {
                Ok(n) => self.left += n,
                Err(rustix::io::Errno::INTR) => {}
                // Since Linux 3.17 there is no way to fail but this one; predictable keys would be worse.
                Err(e) => panic!("getrandom(2): {e}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_differ() {
        let mut random = Random::new();
        let mut seen: Vec<u64> = (0..1000).map(|_| random.u64()).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 1000);
    }
}
