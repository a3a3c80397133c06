//! A split ring in memory of any contents: descriptors at 0, available ring at 512, used ring at 1024.
#![no_main]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, LazyLock};

use iobuf::{Region, Registry};
use libfuzzer_sys::fuzz_target;
use vhost_poll::blk::{self, Asked};
use vhost_poll::memory::{GuestMemory, RegionSpec};
use vhost_poll::ring::split::SplitRing;
use vhost_poll::ring::{Chain, RingConfig};

/// All of the guest's memory: the ring at its beginning, then whatever the input goes on with.
const RAM: usize = 16 << 10;
const SIZE: u32 = 16;
const AVAIL: u64 = 512;
const USED: u64 = 1024;

struct Guest {
    _fd: OwnedFd,
    region: Arc<Region>,
    memory: Arc<GuestMemory>,
}

// Guest addresses begin at 0, so that small numbers in the input are addresses in memory.
static GUEST: LazyLock<Guest> = LazyLock::new(|| {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, RAM as u64).unwrap();
    let region = Region::shared(fd.as_fd(), 0, RAM).unwrap();
    let spec = RegionSpec { guest_addr: 0, size: RAM as u64, user_addr: 0, mmap_offset: 0 };
    let table = [(spec, fd.as_fd())];
    let memory = Arc::new(GuestMemory::map(&Registry::new(), &GuestMemory::default(), &table).unwrap());
    Guest { _fd: fd, region, memory }
});

/// What a chain names is in the guest's memory, and its lengths agree.
fn check(chain: &mut Chain) {
    let first = GUEST.memory.host(0, RAM as u64).unwrap() as u64;
    let (readable, writable) = chain.parts();
    for s in readable.iter().chain(writable) {
        assert!(s.addr >= first && s.addr + u64::from(s.len) <= first + RAM as u64);
    }
    let mut ranges = Vec::new();
    if let Ok(Asked::Data(range)) = blk::parse(chain, &mut ranges, true) {
        let (readable, writable) = chain.parts();
        let sum: u64 = readable.iter().chain(writable).map(|s| u64::from(s.len)).sum();
        assert_eq!(sum, range.len);
    }
    assert!(ranges.len() <= blk::MAX_RANGES);
}

fuzz_target!(|input: &[u8]| {
    let mut ram = vec![0; RAM];
    let len = input.len().min(RAM);
    ram[..len].copy_from_slice(&input[..len]);
    assert!(GUEST.region.copy_in(0, &ram));
    let config = RingConfig {
        size: SIZE,
        desc: 0,
        avail: AVAIL,
        used: USED,
        packed: false,
        event_idx: true,
        indirect: true,
    };
    let mut chain = Chain::new();
    let mut ring = SplitRing::new(config, GUEST.memory.clone(), 0).unwrap();
    for _ in 0..=SIZE {
        let Ok(Some(head)) = ring.take() else { break };
        if ring.read(head, &mut chain).is_ok() {
            check(&mut chain);
        }
        ring.push_used(head, 1);
        ring.publish();
    }
});
