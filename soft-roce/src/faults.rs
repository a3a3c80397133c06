//! A bad network, for tests: packets that arrive are lost, doubled, changed, or overtaken by the next one.

use crate::engine::Source;

/// What happens to arriving packets, each per thousand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The same seed gives the same decisions for the same sequence of packets.
    pub seed: u64,
    /// Vanish.
    pub lost: u16,
    /// Arrive twice.
    pub doubled: u16,
    /// One bit is flipped.
    pub changed: u16,
    /// Wait until the next packet has arrived.
    pub overtaken: u16,
}

/// Decides the fate of one socket's packets.
pub struct Weather {
    faults: Faults,
    state: u64,
    waiting: Option<(Source, Box<[u8]>)>,
}

impl Weather {
    /// `salt` tells sockets with the same options apart.
    pub fn new(faults: Faults, salt: u64) -> Self {
        Self { faults, state: faults.seed ^ salt.wrapping_mul(0xff51_afd7_ed55_8ccd), waiting: None }
    }

    /// Hands on what arrives because of `udp`.
    pub fn pass(&mut self, from: &Source, udp: &[u8], mut each: impl FnMut(&Source, &[u8])) {
        let late = self.waiting.take();
        let Faults { lost, doubled, changed, overtaken, .. } = self.faults;
        if self.happens(overtaken) {
            self.waiting = Some((*from, udp.into()));
        } else if self.happens(changed) {
            let mut udp = Box::<[u8]>::from(udp);
            let bit = self.random() as usize % (udp.len() * 8).max(1);
            if let Some(byte) = udp.get_mut(bit / 8) {
                *byte ^= 1 << (bit % 8);
            }
            each(from, &udp);
        } else if !self.happens(lost) {
            each(from, udp);
            if self.happens(doubled) {
                each(from, udp);
            }
        }
        if let Some((from, udp)) = late {
            each(&from, &udp);
        }
    }

    fn happens(&mut self, per_thousand: u16) -> bool {
        self.random() % 1000 < u64::from(per_thousand)
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(faults: Faults) -> Vec<Vec<u8>> {
        let from = Source { src: [127, 0, 0, 1].into(), src_port: 1, dst: [127, 0, 0, 1].into(), index: 0 };
        let mut weather = Weather::new(faults, 3);
        let mut got = Vec::new();
        for n in 0..1000u16 {
            weather.pass(&from, &n.to_be_bytes(), |_, udp| got.push(udp.to_vec()));
        }
        got
    }

    fn all() -> Vec<Vec<u8>> {
        (0..1000u16).map(|n| n.to_be_bytes().to_vec()).collect()
    }

    #[test]
    fn good_weather_changes_nothing() {
        assert_eq!(run(Faults::default()), all());
    }

    #[test]
    fn every_fault_happens_about_as_often_as_told() {
        let faults = Faults { seed: 1, ..Faults::default() };
        let lost = 1000 - run(Faults { lost: 100, ..faults }).len();
        let doubled = run(Faults { doubled: 100, ..faults }).len() - 1000;
        let changed =
            run(Faults { changed: 100, ..faults }).iter().zip(all()).filter(|(a, b)| *a != b).count();
        let overtaken = run(Faults { overtaken: 100, ..faults });
        let moved = overtaken.iter().zip(all()).filter(|(a, b)| *a != b).count() / 2;
        for n in [lost, doubled, changed, moved] {
            assert!((50..200).contains(&n), "{lost} {doubled} {changed} {moved}");
        }
        let mut sorted = overtaken;
        sorted.sort();
        assert!(sorted.len() >= 999 && sorted.iter().all(|p| all().contains(p)));
    }

    #[test]
    fn the_seed_decides() {
        let faults = Faults { seed: 5, lost: 100, doubled: 100, changed: 100, overtaken: 100 };
        assert_eq!(run(faults), run(faults));
        assert_ne!(run(faults), run(Faults { seed: 6, ..faults }));
    }
}
