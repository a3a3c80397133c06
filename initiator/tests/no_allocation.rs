//! Requests of remote bdevs allocate nothing on their reactor once it runs: channel, cutting, bouncing, RTRS and soft RoCE;
//! NBD in every dialect.

mod nbd;
mod world;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bdev::{Completions, Descriptor, Flags, IoChannel, IoRequest, Manager, Mode, Op, Segments, Status};
use iobuf::Region;
use nbd::{Client, Server, Speaks};
use reactor::{Handle, Polled, Poller, PollerId, Turn};
use serde_json::json;
use test_support::{Counting, allocates_nothing, allocations};
use world::{Initiator, Net, Target, null};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEPTH: u64 = 16;
const WARM_UP: u64 = 2_000;
const MEASURED: u64 = 20_000;
/// Blocks of a request: one part of what a message carries here, and a rest.
const BLOCKS: usize = 24;

/// Keeps `DEPTH` requests busy: reads and writes, of memory that can be sent and memory that has to be bounced, and
/// discards.
struct Runner {
    channel: Option<IoChannel>,
    _descriptor: Descriptor,
    registered: Arc<Region>,
    foreign: Arc<Region>,
    done: Completions,
    completed: u64,
    /// When the warm-up was over, and what had been allocated by then.
    began: Option<(Instant, u64)>,
    result: mpsc::Sender<(Duration, u64)>,
    id: Rc<Cell<Option<PollerId>>>,
}

impl Runner {
    fn request(&self, cookie: u64) -> IoRequest {
        let region = if cookie % 4 < 2 { &self.registered } else { &self.foreign };
        // SAFETY: the runner keeps both until its requests have completed. What they hold means nothing here.
        let segment = unsafe { region.segment(0, BLOCKS * 512) };
        let (op, blocks, segments) = match cookie % 8 {
            7 => (Op::Discard, BLOCKS as u64, Segments::new()),
            n if n.is_multiple_of(2) => (Op::Read, BLOCKS as u64, Segments::from_iter(segment)),
            _ => (Op::Write, BLOCKS as u64, Segments::from_iter(segment)),
        };
        IoRequest { op, flags: Flags::NONE, lba: cookie * BLOCKS as u64, blocks, segments, cookie }
    }

    /// The next request for each that has completed.
    fn go_on(&mut self, mut channel: IoChannel) -> Option<IoChannel> {
        let mut done = std::mem::take(&mut self.done);
        for c in done.drain(..) {
            assert_eq!(c.status, Status::Ok);
            self.completed += 1;
            match self.completed {
                WARM_UP => self.began = Some((Instant::now(), allocations())),
                n if n == WARM_UP + MEASURED => {
                    let (began, before) = self.began.unwrap();
                    self.result.send((began.elapsed(), allocations() - before)).unwrap();
                }
                _ => {}
            }
            if self.completed < WARM_UP + MEASURED {
                channel.submit(self.request(c.cookie)).unwrap();
            }
        }
        self.done = done;
        channel.kick();
        (self.completed < WARM_UP + MEASURED || channel.inflight() > 0).then_some(channel)
    }
}

impl Poller for Runner {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        let Some(mut channel) = self.channel.take() else { return Polled::Idle };
        let busy = channel.poll(&mut self.done);
        self.channel = self.go_on(channel);
        if let (None, Some(id)) = (&self.channel, self.id.get()) {
            cx.remove_poller(id);
        }
        busy.into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        self.channel.as_ref().is_some_and(IoChannel::ready).into()
    }
}

/// Time of the measured requests on bdev `name`, and what they allocated.
fn measure(manager: &Arc<Manager>, reactor: &Handle, name: &str) -> (Duration, u64) {
    let registered = manager.registry().map(BLOCKS * 512).unwrap();
    let descriptor = manager.open(name, Mode::ReadWrite, Box::new(|_| ())).unwrap();
    let (result, measured) = mpsc::channel();
    reactor.send(move |cx| {
        let mut channel = descriptor.channel().unwrap();
        let mut runner = Runner {
            channel: None,
            _descriptor: descriptor,
            registered,
            foreign: Region::new(BLOCKS * 512).unwrap(),
            done: Completions::with_capacity(DEPTH as usize),
            completed: 0,
            began: None,
            result,
            id: Rc::default(),
        };
        (0..DEPTH).for_each(|cookie| channel.submit(runner.request(cookie)).unwrap());
        channel.kick();
        runner.channel = Some(channel);
        let id = runner.id.clone();
        id.set(Some(cx.add_poller("runner", Box::new(runner))));
    });
    let (time, allocations) = test_support::recv(&measured);
    println!(
        "{name}: {:.1} µs per request of {} bytes",
        time.as_secs_f64() * 1e6 / MEASURED as f64,
        BLOCKS * 512
    );
    (time, allocations)
}

#[test]
fn requests_allocate_nothing() {
    let net = Net::soft_roce();
    let target =
        Target::start(&net, &[null("n", 1 << 20, 512)], json!({"queue_depth": 64, "max_io_size": 8192}));
    let initiator = Initiator::new(&net);
    initiator.map(initiator.params("n", "n")).unwrap();
    let (_, allocations) = measure(&initiator.manager, &initiator.reactors[0], "n");
    assert!(allocates_nothing(allocations, MEASURED as usize), "{allocations} in {MEASURED} requests");
    initiator.unmap("n", true).unwrap();
    drop(target);
}

#[test]
fn requests_of_nbd_allocate_nothing() {
    let client = Client::new();
    for speaks in [Speaks::Simple, Speaks::Structured, Speaks::Extended] {
        let server = Server::start(speaks, 1 << 20);
        client.create(client.params(&server)).unwrap();
        let (_, allocations) = measure(&client.manager, &client.reactors[0], "N");
        assert!(
            allocates_nothing(allocations, MEASURED as usize),
            "{allocations} in {MEASURED} requests, {speaks:?}"
        );
        client.delete(true).unwrap();
    }
}

/// The counter counts.
#[test]
fn an_allocation_is_seen() {
    let before = allocations();
    let kept = RefCell::new(Box::new(1));
    assert_eq!(allocations(), before + 1, "{kept:?}");
}
