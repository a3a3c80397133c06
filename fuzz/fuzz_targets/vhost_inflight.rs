//! A queue with memory for requests in flight, whose process dies and starts again. The first byte chooses ring and front
//! end, the rest is what disk, driver and front end do. An honest front end gets what was in flight repeated, in order; a
//! hostile one, which writes to rings and in-flight memory, gets each chain repeated once at most, and reaches nothing
//! else.
#![no_main]

mod vhost_guest;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::{Arc, LazyLock};

use iobuf::Region;
use libfuzzer_sys::fuzz_target;
use vhost_guest::{SIZE, boot, contains, poke};
use vhost_poll::fuzzing::{Asked, Bench};
use vhost_poll::inflight::InflightArea;
use vhost_poll::memory::GuestMemory;
use vhost_poll::ring::RingConfig;

/// The queue's index, with a neighbour on each side, and the bytes of a queue's part.
const QUEUE: u16 = 1;
const PART: usize = 576;
const PAGE: usize = 4096;
/// What is in the rest of the in-flight memory.
const CANARY: u8 = 0xa5;
/// Chains of an honest driver: of one to three descriptors.
const CHAINS: u16 = 8;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct Shared {
    area: InflightArea,
    region: Arc<Region>,
}

static SHARED: LazyLock<Shared> = LazyLock::new(|| {
    let (area, fd, len) = InflightArea::create(3, SIZE as u16).unwrap();
    assert_eq!(len, PAGE);
    Shared { area, region: Region::shared(fd.as_fd(), 0, len).unwrap() }
});

/// Writes into the queue's part of the in-flight memory.
fn poke_part(offset: usize, bytes: &[u8]) {
    let len = bytes.len().min(PART.saturating_sub(offset));
    assert!(SHARED.region.copy_in(PART * usize::from(QUEUE) + offset, &bytes[..len]));
}

/// The driver: what it may offer, and what it waits for.
struct Driver {
    packed: bool,
    free: Vec<u16>,
    /// Not taken yet.
    offered: VecDeque<u16>,
    /// Taken, and not used as far as the driver sees.
    flying: Vec<u16>,
    /// Entries by chain.
    counts: [usize; CHAINS as usize],
    next: u16,
    wrap: bool,
}

impl Driver {
    fn new(packed: bool) -> Self {
        Self {
            packed,
            free: (0..CHAINS).collect(),
            offered: VecDeque::new(),
            flying: Vec::new(),
            counts: [0; CHAINS as usize],
            next: 0,
            wrap: true,
        }
    }

    fn id(&self, chain: u16) -> u16 {
        if self.packed { chain } else { 2 * chain }
    }

    /// Makes a chain available: what is `kind` modulo 4, with data from 4 on, and without a header from 8 on.
    fn offer(&mut self, kind: u8) {
        let Some(chain) = self.free.pop() else { return };
        // A read, a write, a flush, and what no disk knows.
        let asks = [0u32, 1, 4, 99][usize::from(kind % 4)];
        let header = 2048 + 16 * u64::from(chain);
        poke(header, &asks.to_le_bytes());
        let mut parts = vec![(header, 16u32, 0u16), (3072 + u64::from(chain), 1, WRITE)];
        if kind >= 8 {
            parts.remove(0);
        } else if kind >= 4 {
            let data = (4096 + 512 * u64::from(chain), 512, if asks == 0 { WRITE } else { 0 });
            parts.insert(1, data);
        }
        if self.packed && self.entries() + parts.len() > SIZE as usize {
            self.free.push(chain);
            return;
        }
        self.counts[usize::from(chain)] = parts.len();
        if self.packed {
            self.put_packed(chain, &parts)
        } else {
            self.put_split(chain, &parts)
        }
        self.offered.push_back(chain);
    }

    /// Entries of the ring that are not the driver's.
    fn entries(&self) -> usize {
        self.offered.iter().chain(&self.flying).map(|chain| self.counts[usize::from(*chain)]).sum()
    }

    fn put_split(&mut self, chain: u16, parts: &[(u64, u32, u16)]) {
        let head = self.id(chain);
        // There is room for two; three are in a table of their own.
        let table = 2304 + 48 * u64::from(chain);
        let at = if parts.len() > 2 { table } else { 16 * u64::from(head) };
        let first = if parts.len() > 2 { 0 } else { head };
        for ((i, (addr, len, flags)), entry) in (0u64..).zip(parts).zip(first..) {
            let more = u16::from(i + 1 < parts.len() as u64);
            put_descriptor(at + 16 * i, *addr, *len, flags | more, entry + 1);
        }
        if at == table {
            put_descriptor(16 * u64::from(head), table, 48, INDIRECT, 0);
        }
        poke(516 + 2 * u64::from(self.next % SIZE as u16), &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        poke(514, &self.next.to_le_bytes());
    }

    fn put_packed(&mut self, chain: u16, parts: &[(u64, u32, u16)]) {
        for (i, (addr, len, flags)) in parts.iter().enumerate() {
            let more = u16::from(i + 1 < parts.len());
            let available = if self.wrap { 1 << 7 } else { 1 << 15 };
            put_descriptor(16 * u64::from(self.next), *addr, *len, chain, flags | more | available);
            self.next += 1;
            if u32::from(self.next) == SIZE {
                (self.next, self.wrap) = (0, !self.wrap);
            }
        }
    }

    /// The device took as many as are in flight now and were not before.
    fn taken(&mut self, count: usize) {
        self.flying.extend(self.offered.drain(..count));
    }

    /// It sees what was used: all but `open`.
    fn look(&mut self, open: &[u16]) {
        let ids: Vec<u16> = self.flying.iter().map(|c| self.id(*c)).collect();
        let mut ids = ids.iter();
        let free = &mut self.free;
        self.flying.retain(|chain| {
            let stays = ids.next().is_some_and(|id| open.contains(id));
            if !stays {
                free.push(*chain);
            }
            stays
        });
    }
}

fn put_descriptor(at: u64, addr: u64, len: u32, first: u16, second: u16) {
    let mut d = [0; 16];
    d[..8].copy_from_slice(&addr.to_le_bytes());
    d[8..12].copy_from_slice(&len.to_le_bytes());
    d[12..14].copy_from_slice(&first.to_le_bytes());
    d[14..].copy_from_slice(&second.to_le_bytes());
    poke(at, &d);
}

struct World {
    config: RingConfig,
    memory: Arc<GuestMemory>,
    bench: Bench,
    driver: Driver,
    honest: bool,
    /// What the disk has not answered.
    held: Vec<Asked>,
    /// Answered, and not shown.
    unshown: bool,
}

impl World {
    fn new(bits: u8, base: u32) -> Option<Self> {
        let (packed, honest) = (bits & 1 != 0, bits & 2 == 0);
        assert!(SHARED.region.copy_in(0, &[CANARY; PAGE]));
        poke_part(0, &[0; PART]);
        let (mut config, memory) = boot(&[], packed);
        config.event_idx = bits & 4 != 0;
        let bench = start(config, &memory, base)?;
        let driver = Driver::new(packed);
        Some(Self { config, memory, bench, driver, honest, held: Vec::new(), unshown: false })
    }

    fn open(&self) -> Vec<u16> {
        self.bench.open().iter().map(|o| o.id).collect()
    }

    fn fetch(&mut self, budget: usize) {
        // As a lane does: a batch of used entries is shown before more is taken.
        if self.unshown {
            self.publish(false);
        }
        let before = self.bench.open().len();
        let asked = self.bench.fetch(budget);
        assert!(asked.iter().flat_map(|(_, data)| data).all(|(addr, len)| contains(*addr, *len)));
        self.held.extend(asked);
        let mut slots: Vec<u64> = self.held.iter().map(|(cookie, _)| *cookie).collect();
        slots.sort_unstable();
        slots.dedup();
        assert!(slots.len() <= SIZE as usize);
        if self.honest {
            assert!(!self.bench.is_broken());
            self.driver.taken(self.bench.open().len() - before);
        }
    }

    fn complete(&mut self, which: u8) {
        if self.held.is_empty() {
            return;
        }
        let (cookie, _) = self.held.remove(usize::from(which) % self.held.len());
        self.bench.complete(cookie);
        self.unshown = true;
    }

    fn publish(&mut self, end: bool) {
        if end {
            self.bench.publish()
        } else {
            self.bench.show()
        }
        self.unshown = false;
        self.driver.look(&self.open());
    }

    /// The process dies, and another one takes over. False: it does not want to.
    fn restart(&mut self, base: u32) -> bool {
        let flying: Vec<u16> = self.driver.flying.iter().map(|c| self.driver.id(*c)).collect();
        self.held.clear();
        self.unshown = false;
        let Some(bench) = start(self.config, &self.memory, base) else {
            assert!(!self.honest);
            return false;
        };
        self.bench = bench;
        if self.honest {
            assert_eq!(self.open(), flying);
        }
        true
    }

    /// The disk answers everything; then nothing is in flight.
    fn drain(&mut self) {
        for _ in 0..=2 * SIZE {
            self.fetch(SIZE as usize);
            while !self.held.is_empty() {
                self.complete(0);
            }
            self.publish(true);
        }
        if self.honest {
            assert!(self.open().is_empty() && self.driver.free.len() == usize::from(CHAINS));
            assert!(self.restart(0x8000_8000) && self.open().is_empty());
        }
    }
}

/// Each chain to be repeated is there once.
fn start(config: RingConfig, memory: &Arc<GuestMemory>, base: u32) -> Option<Bench> {
    let bench = Bench::start(QUEUE, config, memory.clone(), base, SHARED.area.clone()).ok()?;
    let open = bench.open();
    let mut entries: Vec<u16> = open.iter().map(|o| o.entry).collect();
    entries.sort_unstable();
    entries.dedup();
    assert_eq!(entries.len(), open.len());
    assert!(entries.iter().all(|e| u32::from(*e) < SIZE));
    assert!(open.iter().map(|o| u32::from(o.count)).sum::<u32>() <= SIZE);
    Some(bench)
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> &'a [u8] {
    rest.split_off(..len.min(rest.len())).unwrap_or_default()
}

fn number(rest: &mut &[u8]) -> u32 {
    let mut bytes = [0; 4];
    let got = take(rest, 4);
    bytes[..got.len()].copy_from_slice(got);
    u32::from_le_bytes(bytes)
}

/// One step; false if there is no process any more.
fn step(world: &mut World, what: u8, rest: &mut &[u8]) -> bool {
    let argument = what >> 4;
    match what & 15 {
        0..=2 => world.driver.offer(argument),
        3 | 4 => world.fetch(usize::from(argument) + 1),
        5 | 6 => world.complete(argument),
        7 => world.publish(false),
        8 => world.publish(true),
        9 => {
            let base = if world.honest { 0x8000_8000 } else { number(rest) };
            return world.restart(base);
        }
        _ if world.honest => {}
        10 | 11 => {
            let place = number(rest);
            poke(u64::from(place) % 2048, take(rest, usize::from(argument) + 1));
        }
        12 => {
            // The driver of a packed ring reads and writes the same entries; so does a liar.
            let place = number(rest);
            let used = if what & 16 == 0 { 0x80u16 } else { 0x8000 };
            poke(u64::from(place % SIZE) * 16 + 14, &(used | (place >> 16) as u16 & 7).to_le_bytes());
        }
        13 | 14 => {
            let place = number(rest);
            poke_part(place as usize % PART, take(rest, usize::from(argument) + 1));
        }
        _ => {
            // An entry of the in-flight memory: flag and next, as both rings have them nearly.
            let place = number(rest);
            let [at, flag, next, count] = place.to_le_bytes();
            let (entry, field) = if world.config.packed {
                (32 + 32 * usize::from(at % 16), 2)
            } else {
                (16 + 16 * usize::from(at % 16), 6)
            };
            poke_part(entry, &[flag & 1]);
            poke_part(entry + field, &u16::from(next % 20).to_le_bytes());
            if world.config.packed {
                poke_part(entry + 6, &u16::from(count % 20).to_le_bytes());
            }
        }
    }
    true
}

fuzz_target!(|input: &[u8]| {
    let Some((bits, mut rest)) = input.split_first() else { return };
    let base = if bits & 2 == 0 { [0, 0x8000_8000][usize::from(bits & 1)] } else { number(&mut rest) };
    let Some(mut world) = World::new(*bits, base) else { return };
    let mut alive = true;
    while let Some(what) = rest.split_off_first() {
        alive = step(&mut world, *what, &mut rest);
        if !alive {
            break;
        }
    }
    if alive {
        world.drain();
    }
    let mut page = [0; PAGE];
    assert!(SHARED.region.copy_out(0, &mut page));
    page[PART * usize::from(QUEUE)..][..PART].fill(CANARY);
    assert_eq!(page, [CANARY; PAGE], "another queue's part was written");
});
