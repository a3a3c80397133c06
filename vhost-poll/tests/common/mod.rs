//! A back end to test: a disk in memory, served by a reactor on a thread of its own.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::VecDeque;
use std::os::fd::{AsFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use iobuf::{Region, Registry, Segment};
use reactor::descriptors::Pool;
use reactor::{Handle, IdlePolicy, Reactor, ReactorStats, Turn};
use test_support::recv;
pub use test_support::until as eventually;
use vhost_poll::{
    BlkStatus, Completion, Controller, ControllerOptions, Disk, DiskChannel, DiskInfo, Op, Request,
};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// A disk in memory that can be told to hold requests back.
pub struct MemDisk {
    pub memory: Arc<Region>,
    pub info: Mutex<DiskInfo>,
    /// Completions wait while this is set.
    pub hold: AtomicBool,
    /// At most so many completions per turn, and only every so many turns; 0 = no limit.
    pub slow: AtomicU64,
    /// An abort ends what is held.
    pub aborts: AtomicBool,
    /// What was asked for, in order.
    pub log: Mutex<Vec<(Op, u64, u64)>>,
    /// A place in shared memory for the sectors of requests, in order: count, then sectors.
    pub order: Option<Arc<Region>>,
}

impl MemDisk {
    pub fn new(size: usize) -> Arc<Self> {
        Self::on(Region::new(size).unwrap(), None)
    }

    pub fn on(memory: Arc<Region>, order: Option<Arc<Region>>) -> Arc<Self> {
        let info = DiskInfo {
            size: memory.len() as u64,
            block_size: 512,
            physical_block_size: 4096,
            read_only: false,
            discard_granularity: 4096,
            write_zeroes: true,
            serial: "memory-disk".into(),
        };
        Arc::new(Self {
            memory,
            info: Mutex::new(info),
            hold: AtomicBool::new(false),
            aborts: AtomicBool::new(false),
            slow: AtomicU64::new(0),
            log: Mutex::default(),
            order,
        })
    }

    fn copy(&self, op: Op, mut at: usize, segments: &[Segment]) -> bool {
        segments.iter().all(|s| {
            let from = at;
            at += s.len as usize;
            // SAFETY: segments of a request stay valid until its completion and are not in the disk's own memory.
            unsafe {
                match op {
                    Op::Read => self.memory.read_to(from, s),
                    _ => self.memory.write_from(from, s),
                }
            }
        })
    }
}

pub struct MemChannel {
    disk: Arc<MemDisk>,
    /// Held requests: their data moves when they complete.
    queue: VecDeque<(Op, u64, u64, Vec<Segment>, u64)>,
    turns: u64,
    aborted: Vec<Completion>,
}

/// `Disk` for an `Arc<MemDisk>`.
pub struct Shared(pub Arc<MemDisk>);

impl Disk for Shared {
    type Channel = MemChannel;

    fn info(&self) -> DiskInfo {
        self.0.info.lock().unwrap().clone()
    }

    fn channel(&self) -> Result<MemChannel, String> {
        Ok(MemChannel { disk: self.0.clone(), queue: VecDeque::new(), turns: 0, aborted: Vec::new() })
    }
}

impl MemChannel {
    fn run(&self, op: Op, sector: u64, len: u64, segments: &[Segment]) -> BlkStatus {
        let size = self.disk.memory.len() as u64;
        let Some(at) =
            sector.checked_mul(512).filter(|at| at.checked_add(len).is_some_and(|end| end <= size))
        else {
            return BlkStatus::IoError;
        };
        let read_only = self.disk.info.lock().unwrap().read_only;
        if read_only && !matches!(op, Op::Read | Op::Flush) {
            return BlkStatus::IoError;
        }
        let ok = match op {
            Op::Read | Op::Write { .. } => self.disk.copy(op, at as usize, segments),
            Op::Flush => true,
            Op::Discard | Op::WriteZeroes { .. } => self.disk.memory.zero(at as usize, len as usize, false),
        };
        if ok { BlkStatus::Ok } else { BlkStatus::IoError }
    }
}

impl DiskChannel for MemChannel {
    fn submit(&mut self, r: Request<'_>) {
        let sum: u64 = r.segments.iter().map(|s| u64::from(s.len)).sum();
        assert!(matches!(r.op, Op::Read | Op::Write { .. }) == (sum > 0), "{r:?}");
        assert!(sum == 0 || sum == r.len, "{r:?}");
        self.disk.log.lock().unwrap().push((r.op, r.sector, r.len));
        if let Some(order) = &self.disk.order {
            let mut count = [0; 8];
            assert!(order.copy_out(0, &mut count));
            let count = u64::from_ne_bytes(count);
            // A fast machine fills it in a second; the beginning is what is looked at.
            if order.copy_in(8 + 8 * count as usize, &r.sector.to_ne_bytes()) {
                assert!(order.copy_in(0, &(count + 1).to_ne_bytes()));
            }
        }
        self.queue.push_back((r.op, r.sector, r.len, r.segments.to_vec(), r.cookie));
    }

    fn is_full(&self) -> bool {
        self.queue.len() >= 256
    }

    fn kick(&mut self) {}

    fn abort(&mut self) {
        if self.disk.aborts.load(Ordering::Relaxed) {
            let held = self.queue.drain(..);
            self.aborted.extend(held.map(|(.., cookie)| Completion { cookie, status: BlkStatus::IoError }));
        }
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.aborted);
        self.turns += 1;
        let slow = self.disk.slow.load(Ordering::Relaxed);
        if self.disk.hold.load(Ordering::Acquire) || (slow > 0 && !self.turns.is_multiple_of(slow)) {
            return;
        }
        // Slowly means out of order as well.
        let count = if slow > 0 { 3 } else { usize::MAX };
        for n in 0..count {
            let next = if slow > 0 && n % 2 == 1 { self.queue.pop_back() } else { self.queue.pop_front() };
            let Some((op, sector, len, segments, cookie)) = next else { break };
            let status = self.run(op, sector, len, &segments);
            done.push(Completion { cookie, status });
        }
    }

    fn wait_fd(&self) -> Option<RawFd> {
        None
    }

    fn deadline(&self) -> Option<Instant> {
        (!self.queue.is_empty()).then(|| Instant::now() + Duration::from_micros(200))
    }

    fn ready(&self) -> bool {
        !self.aborted.is_empty()
    }
}

/// Queues in turn on `reactors`.
pub fn options(path: &Path, reactors: Vec<Handle>) -> ControllerOptions {
    let count = reactors.len();
    let next = AtomicU64::new(0);
    ControllerOptions {
        name: "test".into(),
        path: path.to_owned(),
        packed_ring: true,
        max_queues: 16,
        reactors,
        place: Box::new(move || (next.fetch_add(1, Ordering::Relaxed) as usize % count, Box::new(()))),
        registry: Registry::new(),
        max_descriptors: 64,
        descriptors: Pool::new(4096).share(),
    }
}

/// A served disk.
pub struct Backend {
    pub path: PathBuf,
    pub control: Handle,
    pub disk: Arc<MemDisk>,
    threads: Vec<JoinHandle<()>>,
    lanes: Vec<Handle>,
}

struct Cell(Controller<Shared>);

pub fn socket_path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("vhost-{name}-{}.sock", std::process::id()))
}

impl Backend {
    /// A back end whose only reactor is its control thread.
    pub fn start(name: &str, disk: Arc<MemDisk>) -> Self {
        Self::start_on(name, disk, 0)
    }

    /// A back end with `lanes` reactors besides its control thread.
    pub fn start_on(name: &str, disk: Arc<MemDisk>, lanes: usize) -> Self {
        Self::serve(&socket_path(name), disk, lanes, true)
    }

    pub fn serve(path: &Path, disk: Arc<MemDisk>, lanes: usize, packed_ring: bool) -> Self {
        let idle = IdlePolicy::Adaptive { spin: Duration::from_micros(50) };
        let mut handles = Vec::new();
        let mut threads = Vec::new();
        for i in 0..lanes {
            let (tx, rx) = mpsc::channel();
            threads.push(std::thread::spawn(move || {
                let reactor = Reactor::new(&format!("lane{i}"), None, idle).unwrap();
                tx.send(reactor.handle()).unwrap();
                reactor.run();
            }));
            handles.push(rx.recv().unwrap());
        }
        let (tx, rx) = mpsc::channel();
        let (served, owned, lane_handles) = (disk.clone(), path.to_owned(), handles.clone());
        threads.push(std::thread::spawn(move || {
            let mut control = Reactor::new("control", None, idle).unwrap();
            let handle = control.handle();
            let reactors = if lane_handles.is_empty() { vec![handle.clone()] } else { lane_handles };
            control.setup(|cx| {
                let options = ControllerOptions { packed_ring, ..options(&owned, reactors) };
                let controller = Controller::start(cx, Arc::new(Shared(served)), options).unwrap();
                cx.set_local(std::rc::Rc::new(Cell(controller)));
            });
            tx.send(handle).unwrap();
            control.run();
        }));
        let control = rx.recv().unwrap();
        Self { path: path.to_owned(), control, disk, threads, lanes: handles }
    }

    /// Runs `f` with the controller on the control thread, and returns what it returns.
    pub fn with<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Controller<Shared>, &mut Turn<'_>) -> R + Send + 'static,
    ) -> R {
        let (tx, rx) = mpsc::channel();
        self.control.send(move |cx| {
            let cell = cx.local::<Cell>().unwrap();
            tx.send(f(&cell.0, cx)).unwrap();
        });
        recv(&rx)
    }

    /// The first lane's reactor.
    pub fn lane_stats(&self) -> ReactorStats {
        self.lanes[0].stats()
    }

    /// Closes the controller and waits until it has ended.
    pub fn close(&self) {
        let (tx, rx) = mpsc::channel();
        self.control.send(move |cx| {
            let cell = cx.local::<Cell>().unwrap();
            cell.0.close(cx, move |_| tx.send(()).unwrap());
        });
        recv(&rx);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.disk.slow.store(0, Ordering::Relaxed);
            self.disk.hold.store(false, Ordering::Release);
            self.close();
        }
        self.control.stop();
        self.lanes.iter().for_each(Handle::stop);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.is_ok(), "the back end panicked");
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A file that a back end process keeps its disk in.
pub fn shared_file(path: &Path, len: usize) -> Arc<Region> {
    let file =
        std::fs::OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).unwrap();
    if file.metadata().unwrap().len() < len as u64 {
        file.set_len(len as u64).unwrap();
    }
    Region::shared(file.as_fd(), 0, len).unwrap()
}
