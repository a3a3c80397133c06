//! What a driver sees of used entries that are shown in pieces, and whether it is interrupted for them.

use std::sync::Arc;

use iobuf::Registry;
use vhost_driver::{Buf, DriverRing, Ram};
use vhost_poll::memory::{GuestMemory, RegionSpec};
use vhost_poll::ring::packed::PackedRing;
use vhost_poll::ring::split::SplitRing;
use vhost_poll::ring::{Chain, RingConfig};

const SIZE: u16 = 16;

struct Guest {
    driver: DriverRing,
    config: RingConfig,
    memory: Arc<GuestMemory>,
    bufs: [Buf; 2],
    _ram: Ram,
}

fn guest(packed: bool, event_idx: bool) -> Guest {
    let mut ram = Ram::new(1 << 20);
    let driver = DriverRing::new(&mut ram, SIZE, packed, event_idx);
    let spec = RegionSpec {
        guest_addr: ram.guest_base(),
        size: ram.len() as u64,
        user_addr: ram.user(ram.guest_base()),
        mmap_offset: 0,
    };
    let memory = GuestMemory::map(&Registry::new(), &GuestMemory::default(), &[(spec, ram.fd())]).unwrap();
    let config = RingConfig {
        size: SIZE.into(),
        desc: ram.user(driver.addrs.desc),
        avail: ram.user(driver.addrs.avail),
        used: ram.user(driver.addrs.used),
        packed,
        event_idx,
        indirect: false,
    };
    let bufs = [(16, false), (1, true)].map(|(len, write)| Buf { addr: ram.alloc(16, 16), len, write });
    Guest { driver, config, memory: Arc::new(memory), bufs, _ram: ram }
}

enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

impl Ring {
    fn new(guest: &Guest) -> Self {
        let (config, memory) = (guest.config, guest.memory.clone());
        if config.packed {
            Self::Packed(PackedRing::new(config, memory, 0x8000_8000).unwrap())
        } else {
            Self::Split(SplitRing::new(config, memory, 0).unwrap())
        }
    }

    /// Takes one chain and uses it.
    fn serve(&mut self) {
        let mut chain = Chain::new();
        match self {
            Self::Split(ring) => {
                let head = ring.take().unwrap().unwrap();
                ring.read(head, &mut chain).unwrap();
                ring.push_used(head, 1);
            }
            Self::Packed(ring) => {
                let taken = ring.take(&mut chain).unwrap().unwrap();
                ring.push_used(taken, 1);
            }
        }
    }

    fn show(&mut self) {
        match self {
            Self::Split(ring) => ring.show(),
            Self::Packed(ring) => ring.show(),
        }
    }

    fn publish(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.publish(),
            Self::Packed(ring) => ring.publish(),
        }
    }
}

/// Several times around the ring: pieces of three chains, which the driver takes as they are shown.
#[test]
fn pieces_are_seen_at_once_and_announced_once() {
    for (packed, event_idx) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut guest = guest(packed, event_idx);
        let mut ring = Ring::new(&guest);
        for turn in 0..50 {
            let interrupts = turn % 2 == 0;
            if interrupts {
                guest.driver.enable_calls()
            } else {
                guest.driver.disable_calls()
            }
            for _ in 0..6 {
                assert!(guest.driver.add(&guest.bufs, false).is_some());
            }
            guest.driver.publish();
            for piece in 0..2 {
                for _ in 0..3 {
                    ring.serve();
                    assert!(guest.driver.pop().is_none(), "not shown yet: piece {piece} of turn {turn}");
                }
                ring.show();
                assert!((0..3).all(|_| guest.driver.pop().is_some()));
                assert!(guest.driver.pop().is_none());
            }
            assert_eq!(ring.publish(), interrupts, "packed {packed}, event_idx {event_idx}, turn {turn}");
        }
    }
}

/// What was used after the last piece was shown is seen with the announcement.
#[test]
fn publishing_shows_the_rest() {
    for packed in [false, true] {
        let mut guest = guest(packed, true);
        let mut ring = Ring::new(&guest);
        (0..3).for_each(|_| assert!(guest.driver.add(&guest.bufs, false).is_some()));
        guest.driver.publish();
        guest.driver.enable_calls();
        ring.serve();
        ring.show();
        ring.serve();
        ring.serve();
        assert!(ring.publish());
        assert_eq!(std::iter::from_fn(|| guest.driver.pop()).count(), 3);
    }
}
