//! Error injection: a layer that passes everything through, except what it was told to spoil. As SPDK's, it is named
//! `EE_` and the base's name.
//!
//! Each operation has one injection at a time, for the next `num` requests over all channels. A request counts only
//! if at least `queue_depth` requests are in flight on its channel, itself included.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

use iobuf::Segment;
use uuid::Uuid;

use crate::descriptor::Descriptor;
use crate::device::{Bdev, Channel, ChannelError, DriverValue, Extent, Info};
use crate::io::{Completion, Completions, IoRequest, Op, Rejected, Segments, Status};
use crate::iochannel::IoChannel;
use crate::layer::{self, Table};
use crate::manager::{Error, Manager};

/// What happens to a chosen request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorType {
    /// It ends with `IoError` and never reaches the base.
    Failure,
    /// It is held until [`resume_pending`] (then it goes to the base) or a reset (then it ends `Aborted`).
    Pending,
    /// One byte of its data is changed on the way: what a read returns, what a write stores.
    CorruptData {
        /// Which byte of the request; behind its end nothing is changed.
        offset: u64,
        /// Exclusive-or with this, 1..=255.
        value: u8,
    },
    /// It ends with `Busy`, as if a slot or memory lacked.
    NoMem,
}

/// As `bdev_error_inject_error` takes them.
#[derive(Clone, Copy, Debug)]
pub struct Injection {
    /// Operation; `None`: all.
    pub op: Option<Op>,
    /// What happens.
    pub error: ErrorType,
    /// To how many requests of each operation.
    pub num: u32,
    /// Only if this many are in flight.
    pub queue_depth: u64,
}

/// The injection of one operation. `left` is set last and read first, so a request never sees half of a new one
/// with a count.
#[derive(Debug, Default)]
struct Cell {
    left: AtomicU32,
    kind: AtomicU8,
    queue_depth: AtomicU64,
    offset: AtomicU64,
    value: AtomicU8,
}

const FAILURE: u8 = 0;
const PENDING: u8 = 1;
const CORRUPT: u8 = 2;
const NO_MEM: u8 = 3;

impl Cell {
    fn set(&self, injection: &Injection) {
        self.left.store(0, Release);
        let kind = match injection.error {
            ErrorType::Failure => FAILURE,
            ErrorType::Pending => PENDING,
            ErrorType::NoMem => NO_MEM,
            ErrorType::CorruptData { offset, value } => {
                self.offset.store(offset, Relaxed);
                self.value.store(value, Relaxed);
                CORRUPT
            }
        };
        self.kind.store(kind, Relaxed);
        self.queue_depth.store(injection.queue_depth, Relaxed);
        self.left.store(injection.num, Release);
    }

    /// The injection for a request that makes `inflight`, counted.
    fn take(&self, inflight: u64) -> Option<u8> {
        if self.left.load(Acquire) == 0 || inflight < self.queue_depth.load(Relaxed) {
            return None;
        }
        let kind = self.kind.load(Relaxed);
        self.left.fetch_update(Acquire, Relaxed, |n| n.checked_sub(1)).ok().map(|_| kind)
    }
}

#[derive(Debug, Default)]
struct Shared {
    cells: [Cell; Op::ALL.len()],
    /// Moves with each `resume_pending`.
    resumed: AtomicU64,
}

/// The layer.
pub struct ErrorBdev {
    info: Info,
    shared: Arc<Shared>,
    base: Descriptor,
}

/// The name of the error bdev on `base_name`.
pub fn name_on(base_name: &str) -> String {
    format!("EE_{base_name}")
}

/// Makes and registers `EE_<base_name>`; returns that name.
///
/// # Errors
/// `Exists`, `NotFound` and `Busy` for the base.
pub fn create(manager: &Arc<Manager>, base_name: &str, uuid: Option<Uuid>) -> Result<String, Error> {
    let name = name_on(base_name);
    let base = layer::open_base(manager, base_name, "error", &name)?;
    let info = layer::info(base.info(), name.clone(), "Error Injection Disk", uuid);
    let layer = ErrorBdev { info, shared: Arc::default(), base: base.clone() };
    layer::register(manager, Arc::new(layer), &base)?;
    Ok(name)
}

/// Sets an injection on `name`; it replaces the earlier one of the same operation.
///
/// # Errors
/// `NotFound`, `WrongKind`, `Invalid`.
pub fn inject(manager: &Arc<Manager>, name: &str, injection: Injection) -> Result<(), Error> {
    let layer = manager.get_as::<ErrorBdev>(name)?;
    if let ErrorType::CorruptData { value: 0, .. } = injection.error {
        let reason = "0 would change nothing; 1..=255 is right".to_owned();
        return Err(Error::Invalid { parameter: "corrupt_value", reason });
    }
    let corrupts = matches!(injection.error, ErrorType::CorruptData { .. });
    if corrupts && injection.op.is_some_and(|op| !op.has_data()) {
        let reason = "only read and write have data to corrupt".to_owned();
        return Err(Error::Invalid { parameter: "io_type", reason });
    }
    let chosen = |op: &Op| injection.op.is_none_or(|o| o == *op) && (op.has_data() || !corrupts);
    Op::ALL.into_iter().filter(chosen).for_each(|op| layer.shared.cells[op as usize].set(&injection));
    Ok(())
}

/// Ends all injections of `name` (`io_type` "clear"). What is pending stays so.
///
/// # Errors
/// `NotFound`, `WrongKind`.
pub fn clear(manager: &Arc<Manager>, name: &str) -> Result<(), Error> {
    let layer = manager.get_as::<ErrorBdev>(name)?;
    layer.shared.cells.iter().for_each(|c| c.left.store(0, Release));
    Ok(())
}

/// Sends all pending requests of `name` to the base.
///
/// # Errors
/// `NotFound`, `WrongKind`.
pub fn resume_pending(manager: &Arc<Manager>, name: &str) -> Result<(), Error> {
    manager.get_as::<ErrorBdev>(name)?.shared.resumed.fetch_add(1, Release);
    Ok(())
}

impl ErrorBdev {
    /// Name of the bdev below.
    pub fn base_name(&self) -> &str {
        &self.base.info().name
    }
}

impl Bdev for ErrorBdev {
    fn info(&self) -> &Info {
        &self.info
    }

    fn blocks(&self) -> u64 {
        self.base.blocks()
    }

    fn extents(&self, lba: u64, blocks: u64, max: usize) -> Option<Vec<Extent>> {
        self.base.bdev().extents(lba, blocks, max)
    }

    fn has_extents(&self) -> bool {
        self.base.bdev().has_extents()
    }

    fn prefetch(&self, lba: u64, blocks: u64) {
        self.base.bdev().prefetch(lba, blocks);
    }

    fn prefetches(&self) -> bool {
        self.base.bdev().prefetches()
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        Ok(Box::new(ErrorChannel {
            base: self.base.channel()?,
            resumed: self.shared.resumed.load(Acquire),
            shared: self.shared.clone(),
            table: Table::new(),
            pending: VecDeque::new(),
            going: VecDeque::new(),
            ended: Completions::with_capacity(64),
            raw: Completions::with_capacity(64),
        }))
    }

    fn driver_specific(&self) -> Vec<(&'static str, DriverValue)> {
        let left = |op: Op| DriverValue::Number(u64::from(self.shared.cells[op as usize].left.load(Relaxed)));
        let mut values = vec![("base_bdev", DriverValue::Text(self.base_name().to_owned()))];
        values.extend(Op::ALL.into_iter().map(|op| (layer::rpc_name(op), left(op))));
        values
    }
}

/// How often a channel with pending requests looks whether they were resumed.
const LOOK: Duration = Duration::from_millis(10);

/// A byte that was or will be changed.
#[derive(Clone, Copy)]
struct Spoilt {
    at: Segment,
    value: u8,
    op: Op,
}

impl Spoilt {
    fn flip(self) {
        // SAFETY: a byte of a segment of a request in flight, which its submitter keeps valid until the completion;
        // the layer calls this only before that.
        unsafe {
            let byte = self.at.as_ptr();
            byte.write_volatile(byte.read_volatile() ^ self.value);
        }
    }
}

#[derive(Clone, Copy)]
struct Entry {
    cookie: u64,
    spoilt: Option<Spoilt>,
}

struct ErrorChannel {
    base: IoChannel,
    shared: Arc<Shared>,
    resumed: u64,
    table: Table<Entry>,
    pending: VecDeque<IoRequest>,
    /// Resumed, but the base was full.
    going: VecDeque<IoRequest>,
    ended: Completions,
    raw: Completions,
}

impl ErrorChannel {
    fn forward(&mut self, mut request: IoRequest, spoilt: Option<Spoilt>) -> Result<(), Rejected> {
        // A write is spoilt before the base reads it, and mended afterwards: the memory is the submitter's.
        let before = spoilt.filter(|s| s.op == Op::Write);
        if let Some(s) = before {
            s.flip();
        }
        let cookie = request.cookie;
        request.cookie = self.table.put(Entry { cookie, spoilt });
        self.base.submit(request).map_err(|mut rejected| {
            self.table.take(rejected.request.cookie);
            rejected.request.cookie = cookie;
            if let Some(s) = before {
                s.flip();
            }
            rejected
        })
    }

    fn end(&mut self, cookie: u64, status: Status) -> Result<(), Rejected> {
        self.ended.push(Completion { cookie, status });
        Ok(())
    }

    /// Nothing waits any more: a reset came.
    fn abort_pending(&mut self) {
        for request in self.pending.drain(..).chain(self.going.drain(..)) {
            self.ended.push(Completion { cookie: request.cookie, status: Status::Aborted });
        }
    }

    fn look(&mut self) {
        let resumed = self.shared.resumed.load(Acquire);
        if resumed != self.resumed {
            self.resumed = resumed;
            self.going.append(&mut self.pending);
        }
        if self.going.is_empty() {
            return;
        }
        while let Some(request) = self.going.pop_front() {
            let cookie = request.cookie;
            match self.forward(request, None) {
                Ok(()) => {}
                Err(Rejected { request, status: Status::Busy }) if self.base.inflight() > 0 => {
                    self.going.push_front(request);
                    break;
                }
                Err(Rejected { status, .. }) => self.ended.push(Completion { cookie, status }),
            }
        }
        self.base.kick();
    }
}

/// The byte of `segments` at `offset` of the request.
fn locate(segments: &Segments, mut offset: u64) -> Option<Segment> {
    for s in segments {
        if offset < u64::from(s.len) {
            return Some(Segment { addr: s.addr + offset, len: 1, region: s.region });
        }
        offset -= u64::from(s.len);
    }
    None
}

impl Channel for ErrorChannel {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        let inflight =
            (self.table.len() + self.pending.len() + self.going.len() + self.ended.len() + 1) as u64;
        let cell = &self.shared.cells[request.op as usize];
        let (op, kind) = (request.op, cell.take(inflight));
        let spoilt = match kind {
            Some(CORRUPT) => {
                let (offset, value) = (cell.offset.load(Relaxed), cell.value.load(Relaxed));
                locate(&request.segments, offset).map(|at| Spoilt { at, value, op })
            }
            Some(PENDING) => {
                self.pending.push_back(request);
                return Ok(());
            }
            Some(FAILURE) => return self.end(request.cookie, Status::IoError),
            Some(_) => return self.end(request.cookie, Status::Busy),
            None => None,
        };
        if op == Op::Reset {
            self.abort_pending();
        }
        self.forward(request, spoilt)
    }

    fn kick(&mut self) {
        self.base.kick();
    }

    fn poll(&mut self, done: &mut Completions) -> bool {
        let before = done.len();
        if !self.pending.is_empty() || !self.going.is_empty() {
            self.look();
        }
        done.append(&mut self.ended);
        let mut raw = std::mem::take(&mut self.raw);
        self.base.poll(&mut raw);
        for completion in raw.drain(..) {
            let entry = self.table.take(completion.cookie);
            // Spoils what was read, mends what was written.
            if let Some(s) = entry.spoilt.filter(|s| s.op == Op::Write || completion.status == Status::Ok) {
                s.flip();
            }
            done.push(Completion { cookie: entry.cookie, status: completion.status });
        }
        self.raw = raw;
        done.len() > before
    }

    fn wait_fd(&self) -> Option<RawFd> {
        self.base.wait_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        let look = (!self.pending.is_empty() || !self.going.is_empty()).then(|| Instant::now() + LOOK);
        look.into_iter().chain(self.base.deadline()).min()
    }

    fn ready(&self) -> bool {
        !self.ended.is_empty() || self.base.ready()
    }
}
