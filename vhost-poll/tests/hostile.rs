//! Rings that break the rules: the back end answers what can be answered, stops the ring otherwise, and reaches no memory
//! but the guest's.

mod common;

use std::os::fd::AsFd;
use std::sync::Arc;

use common::*;
use proptest::prelude::*;
use vhost::vhost_user::message::FrontendReq as R;
use vhost_driver::{Buf, Disk, DriverRing, NO_STATUS, Options, Ram};
use vhost_poll::blk::{self, Asked};
use vhost_poll::memory::{GuestMemory, RegionSpec};
use vhost_poll::ring::packed::PackedRing;
use vhost_poll::ring::split::SplitRing;
use vhost_poll::ring::{Chain, RingConfig};

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// A guest with queue 0 to break and queue 1 to show that all is well.
struct Guest {
    disk: Disk,
    err: std::os::fd::OwnedFd,
}

impl Guest {
    fn connect(backend: &Backend, packed: bool) -> Self {
        let options = Options { queues: 2, queue_size: 16, packed, ..Options::default() };
        let disk = Disk::connect(&backend.path, options).unwrap();
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let err = rustix::event::eventfd(0, flags).unwrap();
        assert!(disk.front.send_acked(R::SET_VRING_ERR, &0u64.to_ne_bytes(), &[err.as_fd()]).unwrap());
        Self { disk, err }
    }

    /// Writes a descriptor of the split ring or of an indirect table.
    fn desc(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut d = Vec::from(addr.to_le_bytes());
        d.extend(len.to_le_bytes());
        d.extend(flags.to_le_bytes());
        d.extend(next.to_le_bytes());
        self.disk.ram.write(table + 16 * u64::from(index), &d);
    }

    fn ring_broke(&self) -> bool {
        let mut count = [0; 8];
        rustix::io::read(&self.err, &mut count) == Ok(8)
    }

    /// The other queue of the same guest still works.
    fn is_served(&mut self, what: &str) {
        let slot = self.disk.take(1).unwrap();
        assert!(self.disk.submit(1, slot, IN, 0, 512, false));
        self.disk.publish(1);
        assert_eq!(self.disk.wait(1).unwrap().1, 0, "{what}");
    }
}

/// The memory of a request.
struct Place {
    header: u64,
    data: u64,
    status: u64,
    table: u64,
}

type Break = fn(&mut Guest, &Place);

/// The rings, the headers, the data: whatever is touched first when it is gone.
#[test]
fn a_front_end_that_truncates_its_memory_loses_its_connection_alone() {
    let backend = Backend::start("truncate", MemDisk::new(1 << 20));
    let mut other = Guest::connect(&backend, false);
    for (packed, left) in [(false, 0), (true, 0), (false, 4096), (false, 8192), (true, 16384), (false, 65536)]
    {
        let mut guest = Guest::connect(&backend, packed);
        guest.is_served("as long as its memory is there");
        eventually("two front ends", || backend.with(|c, _| c.sessions().len()) == 2);
        for _ in 0..4 {
            let slot = guest.disk.take(0).unwrap();
            assert!(guest.disk.submit(0, slot, OUT, 0, 512, true));
        }
        rustix::fs::ftruncate(guest.disk.ram.fd(), left).unwrap();
        guest.disk.publish(0);
        guest.disk.kick(0);
        eventually("it is alone again", || backend.with(|c, _| c.sessions().len()) == 1);
        other.is_served("another front end");
    }
}

#[test]
fn broken_split_rings_are_stopped() {
    let cases: [(&str, Break); 12] = [
        ("an available index far ahead", |g, _| {
            let at = g.disk.ring(0).addrs.avail + 2;
            g.disk.ram.write(at, &1000u16.to_le_bytes());
        }),
        ("a head outside of the table", |g, _| g.disk.ring(0).put_avail(16)),
        ("a chain that bites its tail", |g, p| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(t, 0, p.header, 16, F_NEXT, 1);
            g.desc(t, 1, p.data, 512, F_NEXT, 0);
            g.disk.ring(0).put_avail(0);
        }),
        ("a next outside of the table", |g, p| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(t, 0, p.header, 16, F_NEXT, 99);
            g.disk.ring(0).put_avail(0);
        }),
        ("writable before readable", |g, p| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(t, 0, p.data, 512, F_NEXT | F_WRITE, 1);
            g.desc(t, 1, p.header, 16, F_NEXT, 2);
            g.desc(t, 2, p.status, 1, F_WRITE, 0);
            g.disk.ring(0).put_avail(0);
        }),
        ("no place for a status", |g, p| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(t, 0, p.header, 16, F_NEXT, 1);
            g.desc(t, 1, p.data, 512, 0, 0);
            g.disk.ring(0).put_avail(0);
        }),
        ("a status outside of memory", |g, p| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(t, 0, p.header, 16, F_NEXT, 1);
            g.desc(t, 1, 0xdead_0000_0000, 1, F_WRITE, 0);
            g.disk.ring(0).put_avail(0);
        }),
        ("an indirect table outside of memory", |g, _| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(t, 0, u64::MAX - 15, 48, F_INDIRECT, 0);
            g.disk.ring(0).put_avail(0);
        }),
        ("an indirect table of 17 bytes", |g, p| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(t, 0, p.table, 17, F_INDIRECT, 0);
            g.disk.ring(0).put_avail(0);
        }),
        ("an indirect table in an indirect table", |g, p| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(p.table, 0, p.table, 16, F_INDIRECT, 0);
            g.desc(t, 0, p.table, 16, F_INDIRECT, 0);
            g.disk.ring(0).put_avail(0);
        }),
        ("an indirect table that is followed", |g, p| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(t, 0, p.table, 16, F_INDIRECT | F_NEXT, 1);
            g.disk.ring(0).put_avail(0);
        }),
        ("an indirect table that bites its tail", |g, p| {
            let t = g.disk.ring(0).addrs.desc;
            g.desc(p.table, 0, p.header, 16, F_NEXT, 1);
            g.desc(p.table, 1, p.header, 16, F_NEXT, 0);
            g.desc(t, 0, p.table, 32, F_INDIRECT, 0);
            g.disk.ring(0).put_avail(0);
        }),
    ];
    let backend = Backend::start("split-hostile", MemDisk::new(1 << 20));
    for (what, break_it) in cases {
        let mut guest = Guest::connect(&backend, false);
        // The feature is negotiated, whatever this driver does otherwise.
        guest.disk = Disk::connect(
            &backend.path,
            Options { queues: 2, queue_size: 16, indirect: true, ..Options::default() },
        )
        .unwrap();
        let err = guest.err.as_fd();
        assert!(guest.disk.front.send_acked(R::SET_VRING_ERR, &0u64.to_ne_bytes(), &[err]).unwrap());
        let slot = guest.disk.take(0).unwrap();
        let r = guest.disk.request(0, slot);
        let place = Place { header: r.header, data: r.data, status: r.status, table: r.table };
        break_it(&mut guest, &place);
        if !what.contains("far ahead") {
            guest.disk.publish(0);
        } else {
            kick(&guest, 0);
        }
        eventually(what, || guest.ring_broke());
        assert_eq!(guest.disk.poll(0), None, "{what}");
        guest.is_served(what);
        // Stopped in order all the same.
        guest.disk.stop_queue(0).unwrap();
    }
}

fn kick(guest: &Guest, queue: u64) {
    let fd = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    guest.disk.front.send(R::SET_VRING_KICK, &queue.to_ne_bytes(), &[fd.as_fd()]).unwrap();
}

#[test]
fn a_chain_in_flight_is_not_taken_again() {
    let mem = MemDisk::new(1 << 20);
    let backend = Backend::start("twice", mem.clone());
    let mut guest = Guest::connect(&backend, false);
    mem.hold.store(true, std::sync::atomic::Ordering::Release);
    let slot = guest.disk.take(0).unwrap();
    assert!(guest.disk.submit(0, slot, IN, 0, 512, false));
    guest.disk.ring(0).put_avail(0);
    guest.disk.ring(0).put_avail(0);
    guest.disk.publish(0);
    eventually("the ring is stopped", || guest.ring_broke());
    mem.hold.store(false, std::sync::atomic::Ordering::Release);
    guest.is_served("the same chain twice");
    assert_eq!(guest.disk.poll(0).map(|(_, status)| status), Some(0), "the first is completed");
}

/// What can be answered is answered, and the ring goes on.
#[test]
fn bad_buffers_fail_the_request_only() {
    let backend = Backend::start("bad-buffers", MemDisk::new(1 << 20));
    for packed in [false, true] {
        let mut guest = Guest::connect(&backend, packed);
        let last = guest.disk.ram.guest_base() + guest.disk.ram.len() as u64 - 256;
        let bad = [
            Buf { addr: 0xdead_0000_0000, len: 512, write: false },
            Buf { addr: last, len: 512, write: false },
            Buf { addr: u64::MAX - 100, len: 512, write: false },
            Buf { addr: 0, len: u32::MAX, write: false },
        ];
        for buf in bad {
            for (kind, write) in [(OUT, false), (IN, true)] {
                let slot = guest.disk.take(0).unwrap();
                assert!(guest.disk.submit_bufs(0, slot, kind, 0, &[Buf { write, ..buf }]));
                guest.disk.publish(0);
                assert_eq!(guest.disk.wait(0).unwrap().1, 1, "{buf:x?}");
            }
        }
        // A header outside of memory, and one that is too short.
        for header in [Buf { addr: 0, len: 16, write: false }, Buf { len: 15, addr: last, write: false }] {
            let slot = guest.disk.take(0).unwrap();
            let r = guest.disk.request(0, slot);
            guest.disk.ram.write(r.status, &[NO_STATUS]);
            let status = Buf { addr: r.status, len: 1, write: true };
            let id = guest.disk.ring(0).add(&[header, status], false).unwrap();
            guest.disk.publish(0);
            let mut used = None;
            eventually("an answer", || {
                used = guest.disk.ring(0).pop();
                used.is_some()
            });
            assert_eq!(used, Some((id, 1)));
            assert_eq!(guest.disk.ram.read(r.status, 1), [1]);
        }
        assert!(!guest.ring_broke());
        guest.is_served("bad buffers");
    }
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let backend = Backend::start("bad-rings", MemDisk::new(1 << 20));
    let cases: [(&str, u32, i64); 6] = [
        ("no entry", 0, 0),
        ("17 entries", 17, 0),
        ("65536 entries", 65536, 0),
        ("outside of memory", 16, 1 << 40),
        ("an end outside of memory", 32768, 0),
        ("a table at an odd place", 16, 8),
    ];
    for (what, size, shift) in cases {
        let mut guest = Guest::connect(&backend, false);
        guest.disk.stop_queue(0).unwrap();
        let state = |n: u32| [0u32.to_ne_bytes(), n.to_ne_bytes()].concat();
        guest.disk.front.send(R::SET_VRING_NUM, &state(size), &[]).unwrap();
        let a = guest.disk.ring(0).addrs;
        let mut addr = state(0);
        for part in [a.desc, a.used, a.avail] {
            let user = guest.disk.ram.user(part).wrapping_add_signed(if part == a.desc { shift } else { 0 });
            addr.extend(user.to_ne_bytes());
        }
        addr.extend(0u64.to_ne_bytes());
        guest.disk.front.send(R::SET_VRING_ADDR, &addr, &[]).unwrap();
        // A table at an odd place is refused as a message already.
        if shift == 8 {
            eventually(what, || guest.disk.front.is_closed());
            continue;
        }
        kick(&guest, 0);
        guest.is_served(what);
        guest.disk.stop_queue(0).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
}

const RAM: usize = 64 << 10;

fn guest_memory(ram: &Ram) -> Arc<GuestMemory> {
    // Two regions with a hole between them.
    let half = RAM as u64 / 2;
    let base = ram.guest_base();
    let spec = |i: u64| RegionSpec {
        guest_addr: base + i * half + i * 0x10_0000,
        size: half,
        user_addr: ram.user(base) + i * half + i * 0x10_0000,
        mmap_offset: i * half,
    };
    let registry = iobuf::Registry::new();
    Arc::new(
        GuestMemory::map(&registry, &GuestMemory::default(), &[(spec(0), ram.fd()), (spec(1), ram.fd())])
            .unwrap(),
    )
}

/// Every segment is in the guest's memory, and lengths agree.
fn check(memory: &GuestMemory, ram: &Ram, chain: &mut Chain) {
    let (readable, writable) = chain.parts();
    let ends = [0, 1].map(|i| {
        let base = ram.guest_base() + i * (RAM as u64 / 2 + 0x10_0000);
        let host = memory.host(base, RAM as u64 / 2).unwrap() as u64;
        host..host + RAM as u64 / 2
    });
    for s in readable.iter().chain(writable) {
        let inside = ends.iter().any(|r| r.contains(&s.addr) && s.addr + u64::from(s.len) <= r.end);
        // The regions may lie behind each other here, and then a segment may go over both.
        let joined = ends[0].start.min(ends[1].start)..ends[0].end.max(ends[1].end);
        let touching = ends[0].end == ends[1].start || ends[1].end == ends[0].start;
        assert!(inside || touching && joined.contains(&s.addr) && s.addr + u64::from(s.len) <= joined.end);
    }
    let sum = |list: &[iobuf::Segment]| list.iter().map(|s| u64::from(s.len)).sum::<u64>();
    if !chain.is_faulty() {
        assert_eq!((sum(readable), sum(writable)), chain.lens());
    }
    let mut ranges = Vec::new();
    let before = chain.lens();
    if let Ok(Asked::Data(range)) = blk::parse(chain, &mut ranges, true) {
        let (readable, writable) = chain.parts();
        assert_eq!(sum(readable) + sum(writable), range.len, "{before:?}");
    }
}

/// Bytes that are mostly descriptors: addresses in and around the guest's memory, small lengths, all flags.
fn descriptors(base: u64) -> impl Strategy<Value = Vec<u8>> {
    let addr = prop_oneof![
        8 => (0..RAM as u64).prop_map(move |o| base + o / 16 * 16),
        2 => (0..0x20_0000u64).prop_map(move |o| base + o),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => (0..40u32).prop_map(|n| n * 16), 2 => Just(1u32), 1 => any::<u32>()];
    let flags = prop_oneof![6 => 0..4u16, 2 => Just(F_INDIRECT), 1 => any::<u16>()];
    proptest::collection::vec((addr, len, flags, 0..18u16), 64).prop_map(|list| {
        list.iter()
            .flat_map(|(addr, len, flags, next)| {
                [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                    .concat()
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_split_ring(table in descriptors(0x4000_0000), heads in proptest::collection::vec(0..20u16, 1..16)) {
        let mut ram = Ram::new(RAM);
        let mut driver = DriverRing::new(&mut ram, 16, false, true);
        let memory = guest_memory(&ram);
        let a = driver.addrs;
        // The descriptors of the ring, and what may be taken for indirect tables.
        ram.write(a.desc, &table[..256]);
        ram.write(ram.guest_base() + RAM as u64 / 2 + 256, &table);
        let config = RingConfig {
            size: 16, desc: ram.user(a.desc), avail: ram.user(a.avail), used: ram.user(a.used),
            packed: false, event_idx: true, indirect: true,
        };
        let mut ring = SplitRing::new(config, memory.clone(), 0).unwrap();
        heads.iter().for_each(|h| driver.put_avail(*h));
        driver.publish();
        let mut chain = Chain::new();
        for _ in 0..17 {
            match ring.take() {
                Ok(Some(head)) => if ring.read(head, &mut chain).is_ok() { check(&memory, &ram, &mut chain) },
                Ok(None) | Err(_) => break,
            }
        }
    }

    #[test]
    fn any_packed_ring(mut table in descriptors(0x4000_0000), wraps in any::<u16>()) {
        let mut ram = Ram::new(RAM);
        let driver = DriverRing::new(&mut ram, 16, true, true);
        let memory = guest_memory(&ram);
        let a = driver.addrs;
        for i in 0..16 {
            // Mostly available: AVAIL set, USED clear; flags are in the last two bytes here.
            let flags = u16::from_le_bytes([table[16 * i + 12], table[16 * i + 13]]);
            let phase = if wraps >> i & 1 == 1 || i < 8 { 1 << 7 } else { 1 << 15 };
            table[16 * i + 14..16 * i + 16].copy_from_slice(&(flags & 7 | phase).to_le_bytes());
        }
        ram.write(a.desc, &table[..256]);
        ram.write(ram.guest_base() + RAM as u64 / 2 + 256, &table);
        let config = RingConfig {
            size: 16, desc: ram.user(a.desc), avail: ram.user(a.avail), used: ram.user(a.used),
            packed: true, event_idx: true, indirect: true,
        };
        let mut ring = PackedRing::new(config, memory.clone(), 0x8000_8000).unwrap();
        let mut chain = Chain::new();
        let mut taken = 0;
        while let Ok(Some(one)) = ring.take(&mut chain) {
            check(&memory, &ram, &mut chain);
            taken += u32::from(one.count);
            prop_assert!(taken <= 32, "more than the ring has");
            ring.push_used(one, 1);
            ring.publish();
        }
    }
}
