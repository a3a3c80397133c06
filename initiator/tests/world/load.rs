//! A verifying load on a reactor: every slot writes its own range again and again, and reads it back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use bdev::{
    Completions, Descriptor, Event, Flags, IoChannel, IoRequest, Manager, Mode, Op, Segments, Status,
};
use iobuf::{Region, Segment};
use reactor::{Handle, Polled, Poller, PollerId, Turn};

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Requests that completed.
    pub done: u64,
    /// First failure.
    pub failed: Option<(Op, Status)>,
    pub failures: u64,
    /// First difference.
    pub mismatch: Option<String>,
}

impl Outcome {
    pub fn good(&self) {
        assert_eq!((self.failed, &self.mismatch), (None, &None), "{self:?}");
    }
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicU64,
    /// The bdev was removed.
    removed: AtomicBool,
    resized: AtomicU64,
}

/// A running load.
pub struct Load {
    shared: Arc<Shared>,
    outcome: mpsc::Receiver<Outcome>,
    reactor: Handle,
}

/// One range with its memory.
struct Slot {
    first: u64,
    blocks: u64,
    memory: Arc<Region>,
    /// Offsets and lengths of the write's pieces, and of the read's.
    out: Vec<(usize, usize)>,
    back: Vec<(usize, usize)>,
    stamp: u64,
    step: Op,
    /// What the range holds is not known: a change of it has failed.
    unknown: bool,
}

struct Worker {
    channel: Option<IoChannel>,
    descriptor: Option<Descriptor>,
    block_size: usize,
    slots: Vec<Slot>,
    waiting: Vec<usize>,
    outcome: Outcome,
    shared: Arc<Shared>,
    report: mpsc::Sender<Outcome>,
    id: Arc<Mutex<Option<PollerId>>>,
}

/// Where the second half of a slot's memory begins: for reading back.
const HALF: usize = 1 << 20;

impl Load {
    /// `slots` ranges of `blocks` blocks each of the bdev `name`, on `reactor`.
    pub fn start(manager: &Arc<Manager>, reactor: &Handle, name: &str, slots: u64, blocks: u64) -> Self {
        let shared = Arc::<Shared>::default();
        let (tx, outcome) = mpsc::channel();
        let seen = shared.clone();
        let events = Box::new(move |event| match event {
            Event::Removed => seen.removed.store(true, Ordering::Release),
            Event::Resized { blocks } => seen.resized.store(blocks, Ordering::Release),
        });
        let descriptor = manager.open(name, Mode::ReadWrite, events).unwrap();
        let block_size = descriptor.info().block_size as usize;
        let room = descriptor.blocks() / blocks;
        assert!(slots <= room, "{slots} ranges of {blocks} blocks on {} blocks", descriptor.blocks());
        let slots = (0..slots).map(|i| slot(manager, i, blocks, block_size)).collect();
        let (s, id) = (shared.clone(), Arc::new(Mutex::new(None)));
        reactor.send(move |cx| {
            let channel = descriptor.channel().unwrap();
            if let Some(fd) = channel.wait_fd() {
                cx.watch(fd).unwrap();
            }
            let mut worker = Worker {
                channel: Some(channel),
                descriptor: Some(descriptor),
                block_size,
                slots,
                waiting: Vec::new(),
                outcome: Outcome::default(),
                shared: s,
                report: tx,
                id: id.clone(),
            };
            worker.waiting = (0..worker.slots.len()).collect();
            *id.lock().unwrap() = Some(cx.add_poller("load", Box::new(worker)));
        });
        Self { shared, outcome, reactor: reactor.clone() }
    }

    /// Requests that have completed.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Waits until `n` more requests have completed.
    pub fn goes_on(&self, n: u64) {
        let from = self.done();
        super::until(format_args!("{n} requests after {from}"), || self.done() >= from + n);
    }

    /// The size that the last resize event told, 0 without any.
    pub fn resized(&self) -> u64 {
        self.shared.resized.load(Ordering::Acquire)
    }

    /// Ends it when what is in flight has ended.
    pub fn stop(self) -> Outcome {
        self.shared.stop.store(true, Ordering::Release);
        self.reactor.wake();
        self.outcome()
    }

    /// Waits for its end.
    pub fn outcome(self) -> Outcome {
        test_support::recv(&self.outcome)
    }

    /// As [`Load::stop`], without waiting: the outcome may come much later.
    pub fn ask_to_stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.reactor.wake();
    }

    /// The outcome, if it has ended.
    pub fn ended(&self) -> Option<Outcome> {
        self.outcome.try_recv().ok()
    }
}

/// Slots differ in the shape of their memory: whole, scattered, unaligned, and outside the registry.
fn slot(manager: &Arc<Manager>, i: u64, blocks: u64, block_size: usize) -> Slot {
    let len = blocks as usize * block_size;
    assert!(2 * len + 4096 <= HALF);
    let whole = vec![(0, len)];
    let scattered: Vec<(usize, usize)> =
        (0..blocks as usize).map(|b| (b * (block_size + 64), block_size)).collect();
    let odd = vec![(3, 100), (4096, len - 100)];
    let (out, back) = match i % 4 {
        0 | 3 => (whole.clone(), whole),
        1 => (scattered.clone(), scattered),
        _ => (odd.clone(), odd),
    };
    let memory = match i % 4 {
        3 => Region::new(2 * HALF).unwrap(),
        _ => manager.registry().map(2 * HALF).unwrap(),
    };
    let back = back.into_iter().map(|(at, len)| (HALF + at, len)).collect();
    Slot { first: i * blocks, blocks, memory, out, back, stamp: i + 1, step: Op::Write, unknown: false }
}

impl Slot {
    /// What each 8 bytes hold after write `stamp`.
    fn pattern(&self, len: usize) -> Vec<u8> {
        let word = |n: usize| (self.stamp << 32 | self.first << 16 | n as u64).to_le_bytes();
        (0..len / 8).flat_map(word).collect()
    }

    fn segments(&self, list: &[(usize, usize)]) -> Segments {
        let segment = |&(at, len): &(usize, usize)| -> Segment {
            // SAFETY: the worker keeps the memory until its requests have completed.
            unsafe { self.memory.segment(at, len) }.unwrap()
        };
        list.iter().map(segment).collect()
    }

    fn request(&self, cookie: u64, block_size: usize) -> IoRequest {
        let len = self.blocks as usize * block_size;
        let segments = match self.step {
            Op::Write => {
                let data = self.pattern(len);
                let mut from = 0;
                for &(at, len) in &self.out {
                    assert!(self.memory.copy_in(at, &data[from..from + len]));
                    from += len;
                }
                self.segments(&self.out)
            }
            _ => {
                // Nothing of before counts as read.
                assert!(self.memory.zero(HALF, HALF, false));
                self.segments(&self.back)
            }
        };
        let flags =
            if self.step == Op::Write && self.stamp.is_multiple_of(7) { Flags::FUA } else { Flags::NONE };
        IoRequest { op: self.step, flags, lba: self.first, blocks: self.blocks, segments, cookie }
    }

    fn check(&self, block_size: usize) -> Option<String> {
        let mut got = Vec::new();
        for &(at, len) in &self.back {
            let mut piece = vec![0; len];
            assert!(self.memory.copy_out(at, &mut piece));
            got.extend(piece);
        }
        let want = self.pattern(self.blocks as usize * block_size);
        let at = got.iter().zip(&want).position(|(g, w)| g != w)?;
        let word = |b: &[u8]| u64::from_le_bytes(b[at / 8 * 8..][..8].try_into().unwrap());
        Some(format!("block {} + {at}: {:x} instead of {:x}", self.first, word(&got), word(&want)))
    }
}

impl Worker {
    fn completed(&mut self, i: usize, status: Status) {
        self.outcome.done += 1;
        self.shared.done.fetch_add(1, Ordering::Relaxed);
        let slot = &mut self.slots[i];
        if status != Status::Ok {
            self.outcome.failed.get_or_insert((slot.step, status));
            self.outcome.failures += 1;
            slot.unknown |= slot.step == Op::Write;
            slot.step = Op::Write;
            slot.stamp += 1;
        } else if slot.step == Op::Write {
            slot.step = Op::Read;
            slot.unknown = false;
        } else {
            if !slot.unknown && self.outcome.mismatch.is_none() {
                self.outcome.mismatch = slot.check(self.block_size);
            }
            slot.step = Op::Write;
            slot.stamp += 1;
        }
        self.waiting.push(i);
    }

    fn submit(&mut self) -> bool {
        let Some(channel) = &mut self.channel else { return false };
        let mut any = false;
        for i in std::mem::take(&mut self.waiting) {
            let request = self.slots[i].request(i as u64, self.block_size);
            match channel.submit(request) {
                Ok(()) => any = true,
                Err(r) if r.status == Status::Busy => self.waiting.push(i),
                Err(r) => {
                    self.outcome.failed.get_or_insert((r.request.op, r.status));
                    self.outcome.failures += 1;
                    self.slots[i].unknown |= r.request.op == Op::Write;
                    self.slots[i].step = Op::Write;
                    self.waiting.push(i);
                }
            }
        }
        channel.kick();
        any
    }
}

impl Poller for Worker {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        let Some(channel) = &mut self.channel else { return Polled::Idle };
        let mut done = Completions::new();
        let mut any = channel.poll(&mut done);
        done.iter().for_each(|c| self.completed(c.cookie as usize, c.status));
        let ending = self.shared.stop.load(Ordering::Acquire) || self.shared.removed.load(Ordering::Acquire);
        if !ending {
            any |= self.submit();
        } else if self.channel.as_ref().is_some_and(|c| c.inflight() == 0) {
            self.channel = None;
            self.descriptor = None;
            let _ = self.report.send(self.outcome.clone());
            if let Some(id) = *self.id.lock().unwrap() {
                cx.remove_poller(id);
            }
        }
        any.into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        self.channel.as_ref().is_some_and(IoChannel::ready).into()
    }

    fn deadline(&self) -> Option<Instant> {
        let ending = self.shared.stop.load(Ordering::Acquire) || self.shared.removed.load(Ordering::Acquire);
        let look = ending.then(|| Instant::now() + std::time::Duration::from_millis(5));
        self.channel.as_ref()?.deadline().into_iter().chain(look).min()
    }
}
