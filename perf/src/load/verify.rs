//! Stamped blocks: every 512 bytes say where they belong and which write put them there.

use super::rng::mix;

const SECTOR: usize = 512;

/// Fills `out` for byte `offset` of the device. `run` tells one run's data from another's.
pub(super) fn stamp(out: &mut [u8], offset: u64, generation: u32, run: u32) {
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

/// Data that is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "data mismatch at byte {offset} of the device (sector {}): expected generation {generation} of run {run:#x}, \
     found {found_generation} of run {found_run:#x} for byte {found_offset}{}",
    .offset / 512, if *.header_right { ", with other content" } else { "" }
)]
pub struct Mismatch {
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
    /// Place, generation and run are right, but not what follows.
    pub header_right: bool,
}

/// Whether `data` is what [`stamp`] makes.
pub(super) fn check(data: &[u8], offset: u64, generation: u32, run: u32) -> Result<(), Mismatch> {
    let read = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("chunks of eight"));
    for (i, sector) in data.chunks_exact(SECTOR).enumerate() {
        let place = offset + (i * SECTOR) as u64;
        let right =
            sector.chunks_exact(8).enumerate().all(|(w, b)| read(b) == word(w, place, generation, run));
        if !right {
            let (found_offset, what) = (read(&sector[..8]), read(&sector[8..16]));
            let (found_generation, found_run) = ((what >> 32) as u32, what as u32);
            let header_right = (found_offset, found_generation, found_run) == (place, generation, run);
            return Err(Mismatch {
                offset: place,
                generation,
                run,
                found_offset,
                found_generation,
                found_run,
                header_right,
            });
        }
    }
    Ok(())
}

/// What was written to each block, and which are in flight.
pub(super) struct Ledger {
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

    #[test]
    fn stamped_data_checks_and_any_other_does_not() {
        let mut data = vec![0; 4096];
        stamp(&mut data, 8192, 3, 7);
        assert_eq!(check(&data, 8192, 3, 7), Ok(()));
        for (offset, generation, run) in [(12288, 3, 7), (8192, 2, 7), (8192, 3, 8)] {
            let e = check(&data, offset, generation, run).unwrap_err();
            assert_eq!((e.found_offset, e.found_generation, e.found_run), (8192, 3, 7));
        }
        for at in [0, 15, 16, 511, 512, 4095] {
            let mut bad = data.clone();
            bad[at] ^= 1;
            let e = check(&bad, 8192, 3, 7).unwrap_err();
            assert_eq!(e.offset, 8192 + (at as u64 / 512) * 512, "{e}");
            assert_eq!(e.header_right, at % 512 >= 16, "{e}");
        }
    }

    /// A torn write: the second half is of an earlier generation.
    #[test]
    fn a_torn_block_is_found_where_it_is_torn() {
        let (mut old, mut new) = (vec![0; 4096], vec![0; 4096]);
        stamp(&mut old, 0, 1, 1);
        stamp(&mut new, 0, 2, 1);
        new[2048..].copy_from_slice(&old[2048..]);
        let e = check(&new, 0, 2, 1).unwrap_err();
        assert_eq!((e.offset, e.found_generation), (2048, 1));
    }

    #[test]
    fn generations_never_are_unknown() {
        assert_eq!([0, 1, IN_FLIGHT - 1].map(Ledger::after), [1, 2, 1]);
    }
}
