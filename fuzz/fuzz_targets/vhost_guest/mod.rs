//! A guest whose memory has any contents, with a ring of 16 entries at its beginning.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, LazyLock};

use iobuf::{Region, Registry};
use vhost_poll::blk::{self, Asked};
use vhost_poll::memory::{GuestMemory, RegionSpec};
use vhost_poll::ring::{Chain, RingConfig};

/// All of the guest's memory: the ring at its beginning, then whatever the input goes on with.
pub const RAM: usize = 16 << 10;
/// Entries of the ring.
pub const SIZE: u32 = 16;

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

/// Fills the guest's memory: descriptors at 0, available ring (driver event suppression) at 512, used ring (device event
/// suppression) at 1024.
pub fn boot(input: &[u8], packed: bool) -> (RingConfig, Arc<GuestMemory>) {
    let mut ram = vec![0; RAM];
    let len = input.len().min(RAM);
    ram[..len].copy_from_slice(&input[..len]);
    assert!(GUEST.region.copy_in(0, &ram));
    let config =
        RingConfig { size: SIZE, desc: 0, avail: 512, used: 1024, packed, event_idx: true, indirect: true };
    (config, GUEST.memory.clone())
}

/// Writes into the guest's memory, as far as that goes.
#[allow(dead_code, reason = "not every target has a guest that goes on")]
pub fn poke(addr: u64, bytes: &[u8]) {
    let _ = GUEST.region.copy_in(addr as usize, bytes);
}

/// Whether these bytes are the guest's.
#[allow(dead_code, reason = "not every target asks")]
pub fn contains(addr: u64, len: u32) -> bool {
    let first = GUEST.memory.host(0, RAM as u64).unwrap() as u64;
    addr >= first && addr + u64::from(len) <= first + RAM as u64
}

/// What a chain names is in the guest's memory, and its lengths agree.
#[allow(dead_code, reason = "not every target reads chains itself")]
pub fn check(chain: &mut Chain) {
    let (readable, writable) = chain.parts();
    assert!(readable.iter().chain(writable).all(|s| contains(s.addr, s.len)));
    let mut ranges = Vec::new();
    if let Ok(Asked::Data(range)) = blk::parse(chain, &mut ranges, true) {
        let (readable, writable) = chain.parts();
        let sum: u64 = readable.iter().chain(writable).map(|s| u64::from(s.len)).sum();
        assert_eq!(sum, range.len);
    }
    assert!(ranges.len() <= blk::MAX_RANGES);
}
