//! Delay: a layer that makes a fast bdev look slow, as SPDK's. A read or write goes to the base at once and its
//! completion is held back until its latency has passed; one in a hundred gets the p99 latency.
//!
//! Other operations pass undelayed. Latencies may be changed while I/O runs; what is held back keeps its time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::clock::now_ns;
use crate::descriptor::Descriptor;
use crate::device::{Bdev, Channel, ChannelError, DriverValue, Extent, Info};
use crate::io::{Completion, Completions, IoRequest, Op, Rejected, Status};
use crate::iochannel::IoChannel;
use crate::layer::{self, Table};
use crate::manager::{Error, Manager};

/// The four latencies, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    /// 99 of 100 reads.
    pub avg_read: u64,
    /// 1 of 100 reads; at least `avg_read`.
    pub p99_read: u64,
    /// 99 of 100 writes.
    pub avg_write: u64,
    /// 1 of 100 writes; at least `avg_write`.
    pub p99_write: u64,
}

/// As `bdev_delay_create` takes them.
#[derive(Clone, Debug)]
pub struct Params {
    /// Name.
    pub name: String,
    /// The bdev below; it gets claimed.
    pub base_bdev_name: String,
    /// Random if absent.
    pub uuid: Option<Uuid>,
    /// At first.
    pub latencies: Latencies,
}

/// `latency_type` of `bdev_delay_update_latency`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatencyType {
    /// `avg_read`
    AvgRead,
    /// `p99_read`
    P99Read,
    /// `avg_write`
    AvgWrite,
    /// `p99_write`
    P99Write,
}

impl LatencyType {
    /// By its RPC name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "avg_read" => Self::AvgRead,
            "p99_read" => Self::P99Read,
            "avg_write" => Self::AvgWrite,
            "p99_write" => Self::P99Write,
            _ => return None,
        })
    }
}

/// The layer.
pub struct Delay {
    info: Info,
    /// By `LatencyType`, microseconds.
    latencies: Arc<[AtomicU64; 4]>,
    base: Descriptor,
}

/// An hour: a longer delay is taken for a mistake of units.
const MAX_US: u64 = 3_600_000_000;

fn check(l: Latencies) -> Result<(), Error> {
    let invalid = |parameter, reason: String| Err(Error::Invalid { parameter, reason });
    if l.avg_read > l.p99_read {
        return invalid(
            "p99_read_latency",
            format!("{} is less than avg_read_latency, {}", l.p99_read, l.avg_read),
        );
    }
    if l.avg_write > l.p99_write {
        let reason = format!("{} is less than avg_write_latency, {}", l.p99_write, l.avg_write);
        return invalid("p99_write_latency", reason);
    }
    if l.p99_read.max(l.p99_write) > MAX_US {
        return invalid(
            "p99_read_latency",
            format!("latencies are microseconds, at most {MAX_US} (an hour)"),
        );
    }
    Ok(())
}

/// Makes and registers one; returns its name.
///
/// # Errors
/// `Invalid`, `Exists`, `NotFound` and `Busy` for the base.
pub fn create(manager: &Arc<Manager>, params: Params) -> Result<String, Error> {
    check(params.latencies)?;
    let base = layer::open_base(manager, &params.base_bdev_name, "delay", &params.name)?;
    let info = layer::info(base.info(), params.name.clone(), "delay", params.uuid);
    let l = params.latencies;
    let latencies = Arc::new([l.avg_read, l.p99_read, l.avg_write, l.p99_write].map(AtomicU64::new));
    layer::register(manager, Arc::new(Delay { info, latencies, base: base.clone() }), &base)?;
    Ok(params.name)
}

/// Changes one latency of the delay bdev `name`.
///
/// # Errors
/// `NotFound`, `WrongKind`, `Invalid` if it does not go with the others.
pub fn update_latency(
    manager: &Arc<Manager>,
    name: &str,
    latency_type: LatencyType,
    latency_us: u64,
) -> Result<(), Error> {
    let delay = manager.get_as::<Delay>(name)?;
    let mut wish = delay.latencies();
    *match latency_type {
        LatencyType::AvgRead => &mut wish.avg_read,
        LatencyType::P99Read => &mut wish.p99_read,
        LatencyType::AvgWrite => &mut wish.avg_write,
        LatencyType::P99Write => &mut wish.p99_write,
    } = latency_us;
    check(wish)?;
    delay.latencies[latency_type as usize].store(latency_us, Relaxed);
    Ok(())
}

impl Delay {
    /// As they are now.
    pub fn latencies(&self) -> Latencies {
        let [avg_read, p99_read, avg_write, p99_write] =
            std::array::from_fn(|i| self.latencies[i].load(Relaxed));
        Latencies { avg_read, p99_read, avg_write, p99_write }
    }

    /// Name of the bdev below.
    pub fn base_name(&self) -> &str {
        &self.base.info().name
    }
}

impl Bdev for Delay {
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
        Ok(Box::new(DelayChannel {
            base: self.base.channel()?,
            latencies: self.latencies.clone(),
            table: Table::new(),
            held: BinaryHeap::with_capacity(64),
            released_ns: 0,
            ended: Completions::new(),
            random: 0x9e37_79b9_7f4a_7c15,
            raw: Completions::with_capacity(64),
        }))
    }

    fn driver_specific(&self) -> Vec<(&'static str, DriverValue)> {
        let l = self.latencies();
        vec![
            ("name", DriverValue::Text(self.info.name.clone())),
            ("base_bdev_name", DriverValue::Text(self.base_name().to_owned())),
            ("avg_read_latency", DriverValue::Number(l.avg_read)),
            ("p99_read_latency", DriverValue::Number(l.p99_read)),
            ("avg_write_latency", DriverValue::Number(l.avg_write)),
            ("p99_write_latency", DriverValue::Number(l.p99_write)),
        ]
    }
}

#[derive(Clone, Copy)]
struct Entry {
    cookie: u64,
    start_ns: u64,
    delay_ns: u64,
}

/// A completion in waiting; the earliest is the greatest (for the heap).
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    due_ns: Reverse<u64>,
    cookie: u64,
    /// `Status` by number: only its identity matters here.
    status: u8,
}

impl Held {
    fn completion(self) -> Completion {
        Completion { cookie: self.cookie, status: Status::ALL[usize::from(self.status)] }
    }
}

struct DelayChannel {
    base: IoChannel,
    latencies: Arc<[AtomicU64; 4]>,
    table: Table<Entry>,
    held: BinaryHeap<Held>,
    /// Requests from before the last reset are not held back.
    released_ns: u64,
    /// Let go by a reset; for the next poll.
    ended: Completions,
    random: u64,
    raw: Completions,
}

impl DelayChannel {
    /// Nanoseconds for the next request. xorshift64: no need for more than "one in a hundred, irregularly".
    fn delay_ns(&mut self, op: Op) -> u64 {
        let average = match op {
            Op::Read => LatencyType::AvgRead,
            Op::Write => LatencyType::AvgWrite,
            _ => return 0,
        };
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let p99 = usize::from(self.random.is_multiple_of(100));
        self.latencies[average as usize + p99].load(Relaxed) * 1000
    }

    /// A reset: what is held has been done by the base already, so it ends as the base ended it.
    fn release(&mut self, now: u64) {
        self.released_ns = now;
        self.ended.extend(self.held.drain().map(Held::completion));
    }

    fn completed(&mut self, completion: Completion, now: u64, done: &mut Completions) {
        let entry = self.table.take(completion.cookie);
        let due = entry.start_ns + entry.delay_ns;
        let status = completion.status;
        if due <= now || entry.start_ns <= self.released_ns {
            done.push(Completion { cookie: entry.cookie, status });
        } else {
            self.held.push(Held { due_ns: Reverse(due), cookie: entry.cookie, status: status as u8 });
        }
    }
}

impl Channel for DelayChannel {
    fn submit(&mut self, mut request: IoRequest) -> Result<(), Rejected> {
        let (cookie, op) = (request.cookie, request.op);
        let start_ns = now_ns();
        let delay_ns = self.delay_ns(op);
        request.cookie = self.table.put(Entry { cookie, start_ns, delay_ns });
        if let Err(mut rejected) = self.base.submit(request) {
            self.table.take(rejected.request.cookie);
            rejected.request.cookie = cookie;
            return Err(rejected);
        }
        if op == Op::Reset {
            self.release(start_ns);
        }
        Ok(())
    }

    fn kick(&mut self) {
        self.base.kick();
    }

    fn poll(&mut self, done: &mut Completions) -> bool {
        let before = done.len();
        let mut raw = std::mem::take(&mut self.raw);
        self.base.poll(&mut raw);
        done.append(&mut self.ended);
        if !raw.is_empty() || !self.held.is_empty() {
            let now = now_ns();
            while self.held.peek().is_some_and(|h| h.due_ns.0 <= now) {
                done.extend(self.held.pop().map(Held::completion));
            }
            raw.drain(..).for_each(|c| self.completed(c, now, done));
        }
        self.raw = raw;
        done.len() > before
    }

    fn wait_fd(&self) -> Option<RawFd> {
        self.base.wait_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        let held = self.held.peek().map(|h| {
            let left = h.due_ns.0.saturating_sub(now_ns());
            Instant::now() + Duration::from_nanos(left)
        });
        held.into_iter().chain(self.base.deadline()).min()
    }

    fn ready(&self) -> bool {
        !self.ended.is_empty() || self.base.ready()
    }
}
