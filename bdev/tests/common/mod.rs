//! What the tests of bdevs share: memory of any shape, a bdev of each kind, and running requests to their end.
#![allow(dead_code, reason = "each test program uses its part")]

use std::any::Any;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bdev::{
    Completions, Descriptor, Event, Flags, IoChannel, IoRequest, Manager, Mode, Op, Segments, Status, delay,
    error, malloc, null, uring,
};
use iobuf::{Region, Registry, Segment};

/// Bytes that differ from block to block and from `seed` to `seed`.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A scatter list over own memory.
pub struct Memory {
    region: Arc<Region>,
    /// (offset, length)
    list: Vec<(usize, usize)>,
}

impl Memory {
    /// One segment for each length, the first `shift` bytes into a page, with gaps of 8 bytes between them unless
    /// they are whole sectors.
    pub fn scattered(lens: &[usize], shift: usize) -> Self {
        let gap = |len: usize| if len.is_multiple_of(512) { 0 } else { 8 };
        let total: usize = lens.iter().map(|l| l + gap(*l)).sum();
        let region = Region::new(total + shift).unwrap();
        let mut at = shift;
        let list = lens
            .iter()
            .map(|&len| {
                let entry = (at, len);
                at += len + gap(len);
                entry
            })
            .collect();
        Self { region, list }
    }

    pub fn segment(&self, index: usize) -> Segment {
        let (offset, len) = self.list[index];
        // SAFETY: tests keep the memory until their requests completed.
        unsafe { self.region.segment(offset, len) }.unwrap()
    }

    /// `len` bytes at `at` of a single-segment memory.
    pub fn piece(&self, at: usize, len: usize) -> Segment {
        // SAFETY: as above.
        unsafe { self.region.segment(self.list[0].0 + at, len) }.unwrap()
    }

    pub fn segments(&self) -> Segments {
        (0..self.list.len()).map(|i| self.segment(i)).collect()
    }

    pub fn fill(&self, mut bytes: &[u8]) {
        for &(offset, len) in &self.list {
            let (now, rest) = bytes.split_at(len);
            assert!(self.region.copy_in(offset, now));
            bytes = rest;
        }
        assert!(bytes.is_empty());
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for &(offset, len) in &self.list {
            let mut piece = vec![0; len];
            assert!(self.region.copy_out(offset, &mut piece));
            out.extend(piece);
        }
        out
    }
}

/// A request in the making.
pub struct Request(IoRequest);

pub fn request(op: Op, lba: u64, blocks: u64) -> Request {
    Request(IoRequest { op, flags: Flags::NONE, lba, blocks, segments: Segments::new(), cookie: 0 })
}

impl Request {
    pub fn with(mut self, memory: &Memory) -> Self {
        self.0.segments = memory.segments();
        self
    }

    pub fn segment(mut self, segment: Segment) -> Self {
        self.0.segments = Segments::from_slice(&[segment]);
        self
    }

    pub fn flags(mut self, flags: Flags) -> Self {
        self.0.flags = flags;
        self
    }

    pub fn io(mut self, cookie: u64) -> IoRequest {
        self.0.cookie = cookie;
        self.0
    }
}

/// Sleeps as an idle core would. False: the channel named nothing that has ended the sleep.
pub fn wait(channel: &IoChannel) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    if channel.ready() {
        return true;
    }
    let due = channel.deadline().map(|d| d.saturating_duration_since(Instant::now()));
    let timeout = due.unwrap_or(test_support::patience());
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    let fired = match channel.wait_fd() {
        Some(fd) => {
            // SAFETY: the channel is borrowed, so its descriptor stays open.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
        }
        None => due.inspect(|d| std::thread::sleep(*d)).is_some(),
    };
    fired || due.is_some()
}

/// Calls until true, without pauses: those that sleep do so as the channel says.
pub fn patiently(mut f: impl FnMut() -> bool) {
    let (start, patience) = (Instant::now(), test_support::patience());
    while !f() {
        assert!(start.elapsed() < patience, "nothing within {patience:?}");
    }
}

/// One request from submit to completion; a refusal counts as its status.
pub fn run(channel: &mut IoChannel, request: Request) -> Status {
    if let Err(rejected) = channel.submit(request.io(0xc0c0)) {
        return rejected.status;
    }
    channel.kick();
    let mut done = Completions::new();
    patiently(|| {
        wait(channel);
        channel.poll(&mut done)
    });
    assert_eq!((done.len(), done[0].cookie), (1, 0xc0c0));
    done[0].status
}

/// What a bdev under test needs: dropped after its last user.
pub type Guard = Option<Box<dyn Any>>;
type Make = Box<dyn Fn(&Arc<Manager>) -> (String, Guard)>;

fn guard(file: TempFile) -> Guard {
    Some(Box::new(file))
}

/// How to make the bdev under test.
pub struct Setup {
    make: Make,
    mode: Mode,
    keeps_data: bool,
    bounded: bool,
}

impl Setup {
    /// A bdev that `make` registers; it returns the name.
    pub fn of(make: impl Fn(&Arc<Manager>) -> (String, Guard) + 'static) -> Self {
        Self { make: Box::new(make), mode: Mode::ReadWrite, keeps_data: true, bounded: false }
    }

    pub fn null(block_size: u32) -> Self {
        let setup = Self::of(move |m| {
            let num_blocks = SIZE / u64::from(block_size);
            let p =
                null::Params { name: None, num_blocks, block_size, physical_block_size: None, uuid: None };
            (null::create(m, p).unwrap(), None)
        });
        Self { keeps_data: false, ..setup }
    }

    pub fn malloc(block_size: u32) -> Self {
        Self::of(move |m| (make_malloc(m, block_size), None))
    }

    pub fn uring(block_size: u32, direct: bool) -> Self {
        let setup = Self::of(move |m| {
            let file = TempFile::new(SIZE);
            let params = uring::Params {
                block_size: Some(block_size),
                direct,
                ..uring::Params::new("u", file.path.to_str().unwrap())
            };
            let name = uring::create(m, params).unwrap();
            if m.get_as::<uring::Uring>(&name).unwrap().direct() != direct {
                eprintln!(
                    "NOTE: {} has no direct I/O: this run tests the page cache twice",
                    file.path.display()
                );
            }
            (name, guard(file))
        });
        Self { bounded: true, ..setup }
    }

    /// Like a file system without fallocate: zeroes are written.
    pub fn uring_plain(block_size: u32) -> Self {
        let setup = Self::of(move |m| {
            let file = TempFile::new(SIZE);
            let params = uring::Params {
                block_size: Some(block_size),
                fallocate: false,
                kind: uring::Kind::Aio,
                ..uring::Params::new("a", file.path.to_str().unwrap())
            };
            (uring::create(m, params).unwrap(), guard(file))
        });
        Self { bounded: true, ..setup }
    }

    /// `base` below a delay of 200 µs reads and 300 µs writes.
    pub fn delayed(base: Self) -> Self {
        let Self { make, keeps_data, bounded, .. } = base;
        let setup = Self::of(move |m| {
            let (base_bdev_name, file) = make(m);
            let latencies =
                delay::Latencies { avg_read: 200, p99_read: 2000, avg_write: 300, p99_write: 3000 };
            let p = delay::Params { name: "D".into(), base_bdev_name, uuid: None, latencies };
            (delay::create(m, p).unwrap(), file)
        });
        Self { keeps_data, bounded, ..setup }
    }

    /// `base` below an error layer without injections.
    pub fn with_error_layer(base: Self) -> Self {
        let Self { make, keeps_data, bounded, .. } = base;
        let setup = Self::of(move |m| {
            let (base, file) = make(m);
            (error::create(m, &base, None).unwrap(), file)
        });
        Self { keeps_data, bounded, ..setup }
    }

    pub fn read_only(self) -> Self {
        Self { mode: Mode::ReadOnly, ..self }
    }

    /// What is written is not kept (null).
    pub fn without_data(self) -> Self {
        Self { keeps_data: false, ..self }
    }

    pub fn bounded(self) -> Self {
        Self { bounded: true, ..self }
    }
}

/// Bytes of every test device.
pub const SIZE: u64 = 8 << 20;

pub fn make_malloc(m: &Arc<Manager>, block_size: u32) -> String {
    let num_blocks = SIZE / u64::from(block_size);
    let p = malloc::Params { name: None, num_blocks, block_size, physical_block_size: None, uuid: None };
    malloc::create(m, p).unwrap()
}

/// A bdev of its own manager, opened, with one channel.
pub struct Rig {
    pub channel: IoChannel,
    pub descriptor: Descriptor,
    pub events: Arc<Mutex<Vec<Event>>>,
    pub manager: Arc<Manager>,
    pub name: String,
    pub keeps_data: bool,
    pub bounded: bool,
    _guard: Guard,
}

impl Rig {
    pub fn new(setup: Setup) -> Self {
        let manager = Manager::new(Registry::new());
        let (name, guard) = (setup.make)(&manager);
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = events.clone();
        let hear = Box::new(move |e| seen.lock().unwrap().push(e));
        let descriptor = manager.open(&name, setup.mode, hear).unwrap();
        let channel = descriptor.channel().unwrap();
        let Setup { keeps_data, bounded, .. } = setup;
        Self { channel, descriptor, events, manager, name, keeps_data, bounded, _guard: guard }
    }

    pub fn block_size(&self) -> usize {
        self.descriptor.info().block_size as usize
    }

    pub fn supports(&self, op: Op) -> bool {
        self.descriptor.info().supported().has(op)
    }

    pub fn run(&mut self, request: Request) -> Status {
        run(&mut self.channel, request)
    }

    pub fn ok(&mut self, request: Request) {
        let what = format!("{:?} {} {}", request.0.op, request.0.lba, request.0.blocks);
        assert_eq!(self.run(request), Status::Ok, "{what}");
    }

    /// Submits `request` behind others and expects `count` successes in all.
    pub fn ok_after_all(&mut self, request: Request, count: usize) {
        self.channel.submit(request.io(0xc0c0)).unwrap();
        let mut done = Completions::new();
        self.drain(&mut done);
        assert_eq!(done.iter().filter(|c| c.status == Status::Ok).count(), count, "{done:?}");
    }

    /// What [`Rig::fill`] writes to block `lba`.
    pub fn filled(&self, lba: u64) -> Vec<u8> {
        pattern(self.block_size(), lba + 1)
    }

    pub fn fill(&mut self, lba: u64, blocks: u64) {
        let memory = Memory::scattered(&[self.block_size() * blocks as usize], 0);
        memory.fill(&(lba..lba + blocks).flat_map(|b| self.filled(b)).collect::<Vec<_>>());
        self.ok(request(Op::Write, lba, blocks).with(&memory));
    }

    pub fn read(&mut self, lba: u64, blocks: u64) -> Vec<u8> {
        let memory = Memory::scattered(&[self.block_size() * blocks as usize], 0);
        self.ok(request(Op::Read, lba, blocks).with(&memory));
        memory.bytes()
    }

    /// Polls until nothing is in flight.
    pub fn drain(&mut self, done: &mut Completions) {
        self.channel.kick();
        patiently(|| {
            wait(&self.channel);
            self.channel.poll(done);
            self.channel.inflight() == 0
        });
    }
}

/// A file that is deleted on drop.
pub struct TempFile {
    pub path: PathBuf,
}

impl TempFile {
    /// `bytes` long, all holes, in Cargo's directory for test files (on a disk, so that direct I/O works), or in that of
    /// `TEST_FILES` for those who run the test programs elsewhere.
    pub fn new(bytes: u64) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::var_os("TEST_FILES").unwrap_or(env!("CARGO_TARGET_TMPDIR").into());
        let dir = PathBuf::from(dir);
        let path = dir.join(format!("bdev-{}-{n}.img", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        Self { path }
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
