//! Stamped blocks: every 512 bytes say where they belong and which write put them there.

use crate::rng::mix;

const SECTOR: usize = 512;

/// Fills `out` for byte `offset` of the device. `run` tells one run's data from another's.
pub(crate) fn stamp(out: &mut [u8], offset: u64, generation: u32, run: u32) {
    for (i, sector) in out.chunks_mut(SECTOR).enumerate() {
        let place = offset + (i * SECTOR) as u64;
        for (w, bytes) in sector.chunks_mut(8).enumerate() {
            bytes.copy_from_slice(&word(w, place, generation, run).to_le_bytes()[..bytes.len()]);
        }
    }
}

/// The sector's place, then generation and run, then noise made of them.
fn word(index: usize, place: u64, generation: u32, run: u32) -> u64 {
    let what = u64::from(generation) << 32 | u64::from(run);
    match index {
        0 => place,
        1 => what,
        n => mix(place ^ what.rotate_left(17) ^ (n as u64) << 56),
    }
}

/// What is wrong with a sector, as far as its contents tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// All of the block is of an earlier write of this run: the last one is lost, or an old copy was read.
    Stale,
    /// Parts of the block are of the last write, others of an earlier one.
    Torn,
    /// A later write than any that was made.
    Future,
    /// It belongs elsewhere on the device.
    Misplaced,
    /// It is of another run: what this one wrote never came.
    OtherRun,
    /// Place and write are right, but not what follows.
    Altered,
    /// The read brought nothing: the buffer is as it was.
    Untouched,
    /// Nothing that was ever written.
    Garbage,
}

impl Wrong {
    fn words(self) -> &'static str {
        match self {
            Self::Stale => "stale data or a lost write",
            Self::Torn => "a torn write",
            Self::Future => "a write that was never made",
            Self::Misplaced => "misplaced data",
            Self::OtherRun => "data of another run",
            Self::Altered => "altered data",
            Self::Untouched => "a read that brought no data",
            Self::Garbage => "data that was never written",
        }
    }
}

/// Data that is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "data mismatch at byte {offset} of the device (sector {}): {}; expected generation {generation} of run {run:#x}, \
     found {found_generation} of run {found_run:#x} for byte {found_offset}",
    .offset / 512, .wrong.words()
)]
pub struct Mismatch {
    /// What it looks like.
    pub wrong: Wrong,
    /// Of the sector.
    pub offset: u64,
    /// Written last.
    pub generation: u32,
    /// This run's number.
    pub run: u32,
    /// Where the sector says it belongs.
    pub found_offset: u64,
    /// Which write it says it is of.
    pub found_generation: u32,
    /// Which run it says it is of.
    pub found_run: u32,
}

fn read(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("chunks of eight"))
}

/// The stamp of a sector: place, generation, run.
fn header(sector: &[u8]) -> (u64, u32, u32) {
    let what = read(&sector[8..16]);
    (read(&sector[..8]), (what >> 32) as u32, what as u32)
}

fn is_whole(sector: &[u8], (place, generation, run): (u64, u32, u32)) -> bool {
    sector.chunks_exact(8).enumerate().all(|(w, b)| read(b) == word(w, place, generation, run))
}

/// Makes a buffer such that a read which brings nothing is noticed.
pub(crate) const SPOILT: [u8; 16] = [0xff; 16];

/// Whether `data` is what [`stamp`] makes.
pub(crate) fn check(data: &[u8], offset: u64, generation: u32, run: u32) -> Result<(), Mismatch> {
    let want = |i: usize| (offset + (i * SECTOR) as u64, generation, run);
    let bad = data.chunks_exact(SECTOR).enumerate().find(|(i, sector)| !is_whole(sector, want(*i)));
    let Some((i, sector)) = bad else { return Ok(()) };
    let found = header(sector);
    let (place, ..) = want(i);
    let any_right = || data.chunks_exact(SECTOR).enumerate().any(|(i, s)| is_whole(s, want(i)));
    let wrong = if found == want(i) {
        Wrong::Altered
    } else if sector[..SPOILT.len()] == SPOILT {
        Wrong::Untouched
    } else if !is_whole(sector, found) {
        Wrong::Garbage
    } else if found.0 != place {
        Wrong::Misplaced
    } else if found.2 != run {
        Wrong::OtherRun
    } else if any_right() {
        Wrong::Torn
    } else if found.1 > generation {
        Wrong::Future
    } else {
        Wrong::Stale
    };
    let (found_offset, found_generation, found_run) = found;
    Err(Mismatch { wrong, offset: place, generation, run, found_offset, found_generation, found_run })
}

/// What was written to each block, and which are in flight.
pub(crate) struct Ledger {
    /// Generation, 0 if unknown, in the low 31 bits; the highest: in flight.
    blocks: Vec<u32>,
}

const IN_FLIGHT: u32 = 1 << 31;

impl Ledger {
    pub fn new(count: usize) -> Self {
        Self { blocks: vec![0; count] }
    }

    /// The generation that follows; never 0.
    pub fn after(generation: u32) -> u32 {
        ((generation + 1) & !IN_FLIGHT).max(1)
    }

    pub fn generation(&self, block: u64) -> u32 {
        self.blocks[block as usize] & !IN_FLIGHT
    }

    pub fn set(&mut self, block: u64, generation: u32) {
        let b = &mut self.blocks[block as usize];
        *b = (*b & IN_FLIGHT) | generation;
    }

    /// False if it is in flight.
    pub fn claim(&mut self, block: u64) -> bool {
        let b = &mut self.blocks[block as usize];
        let free = *b & IN_FLIGHT == 0;
        *b |= IN_FLIGHT;
        free
    }

    /// The first block from `at` on, round the end, that is not in flight.
    pub fn claim_from(&mut self, at: u64) -> Option<u64> {
        let count = self.blocks.len() as u64;
        (0..count).map(|i| (at + i) % count).find(|b| self.claim(*b))
    }

    pub fn release(&mut self, block: u64) {
        self.blocks[block as usize] &= !IN_FLIGHT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamped(offset: u64, generation: u32, run: u32) -> Vec<u8> {
        let mut data = vec![0; 4096];
        stamp(&mut data, offset, generation, run);
        data
    }

    #[test]
    fn stamped_data_checks_and_any_other_does_not() {
        let data = stamped(8192, 3, 7);
        assert_eq!(check(&data, 8192, 3, 7), Ok(()));
        for (offset, generation, run, wrong) in [
            (12288, 3, 7, Wrong::Misplaced),
            (8192, 4, 7, Wrong::Stale),
            (8192, 2, 7, Wrong::Future),
            (8192, 3, 8, Wrong::OtherRun),
        ] {
            let e = check(&data, offset, generation, run).unwrap_err();
            assert_eq!((e.found_offset, e.found_generation, e.found_run, e.wrong), (8192, 3, 7, wrong));
        }
        for at in [0, 15, 16, 511, 512, 4095] {
            let mut bad = data.clone();
            bad[at] ^= 1;
            let e = check(&bad, 8192, 3, 7).unwrap_err();
            assert_eq!(e.offset, 8192 + (at as u64 / 512) * 512, "{e}");
            let wrong = if at % 512 >= 16 { Wrong::Altered } else { Wrong::Garbage };
            assert_eq!(e.wrong, wrong, "byte {at}");
        }
        let mut untouched = data.clone();
        untouched[512..528].copy_from_slice(&SPOILT);
        assert_eq!(check(&untouched, 8192, 3, 7).unwrap_err().wrong, Wrong::Untouched);
        assert_eq!(check(&[0; 4096], 8192, 3, 7).unwrap_err().wrong, Wrong::Garbage);
    }

    #[test]
    fn a_torn_block_is_found_where_it_is_torn() {
        let (old, mut new) = (stamped(0, 1, 1), stamped(0, 2, 1));
        new[2048..].copy_from_slice(&old[2048..]);
        let e = check(&new, 0, 2, 1).unwrap_err();
        assert_eq!((e.offset, e.found_generation, e.wrong), (2048, 1, Wrong::Torn));
        assert!(e.to_string().contains("a torn write"), "{e}");
    }

    #[test]
    fn generations_never_are_unknown() {
        assert_eq!([0, 1, IN_FLIGHT - 1].map(Ledger::after), [1, 2, 1]);
    }
}
