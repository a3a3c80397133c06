//! The client's data path allocates nothing once it runs. Prints what a request costs it:
//! `cargo test --release -p rtrs-poll --test no_allocation -- --nocapture`

mod mirror;

use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use iobuf::{Region, Registry, Segment};
use mirror::MirrorCm;
use reactor::{IdlePolicy, Reactor, Turn};
use rtrs_poll::client::{
    Client, Data, Io, PathSpec, Policy, Session, SessionKey, SessionOptions, Submit, Upper, Via,
};
use rtrs_proto::Errno;
use rtrs_proto::limits::Geometry;
use test_support::{Counting, allocates_nothing, allocations};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEPTH: u64 = 64;
const WARM_UP: u64 = 20_000;
const MEASURED: u64 = 400_000;

/// Keeps all buffer ids busy, and counts.
struct Runner {
    completed: u64,
    began: Option<(Instant, u64)>,
    result: Sender<(Duration, u64)>,
    memory: Arc<Region>,
}

impl Runner {
    fn segment(&self) -> Segment {
        // SAFETY: the mirror touches no data, so requests may share it; the region lives as long as the runner.
        unsafe { self.memory.segment(0, 4096) }.expect("inside")
    }

    fn submit(&self, io: &mut Io, key: SessionKey, cookie: u64) {
        let segment = self.segment();
        let data = if cookie.is_multiple_of(2) { Data::Read(Some(segment)) } else { Data::Write(&[segment]) };
        let submitted = io.submit(key, &Submit { via: Via::Io, usr: &[7; 32], data, cookie });
        submitted.expect("there is an id for each");
    }
}

impl Upper for Runner {
    fn session_up(&mut self, _: &mut Turn<'_>, io: &mut Io, key: SessionKey, _: &Arc<Session>) {
        (0..DEPTH).for_each(|cookie| self.submit(io, key, cookie));
    }

    fn completed(
        &mut self,
        _: &mut Turn<'_>,
        io: &mut Io,
        key: SessionKey,
        cookie: u64,
        result: Result<(), Errno>,
    ) {
        assert_eq!(result, Ok(()));
        self.completed += 1;
        let allocations = allocations();
        if self.completed == WARM_UP {
            self.began = Some((Instant::now(), allocations));
        }
        if let (true, Some((began, before))) = (self.completed == WARM_UP + MEASURED, self.began) {
            let _ = self.result.send((began.elapsed(), allocations - before));
        }
        if self.completed < WARM_UP + MEASURED {
            self.submit(io, key, cookie);
        }
    }

    fn session_down(&mut self, _: &mut Turn<'_>, _: &mut Io, _: SessionKey) {}

    fn poll(&mut self, _: &mut Turn<'_>, _: &mut Io) -> bool {
        false
    }
}

/// Over one path, and over several by each policy.
#[test]
fn requests_allocate_nothing() {
    run(1, Policy::MinInflight);
    for (policy, ..) in Policy::ALL {
        run(3, policy);
    }
}

fn run(paths: u8, policy: Policy) {
    let (tx, rx) = mpsc::channel();
    let (ready_tx, ready) = mpsc::channel();
    // One reactor for both sides: the provider needs no second one.
    let thread = std::thread::spawn(move || {
        let mut reactor = Reactor::new("both", None, IdlePolicy::Poll).expect("descriptors");
        let handle = reactor.handle();
        reactor.setup(|cx| {
            let result = tx.clone();
            let registry = Registry::new();
            let memory = registry.map(4096).expect("memory");
            let runner = move |_: &mut Turn<'_>| {
                let (result, memory) = (result.clone(), memory.clone());
                Runner { completed: 0, began: None, result, memory }
            };
            let client = Client::install(cx, &[cx.handle().clone()], registry, runner, |_, _| ());
            let geometry = Geometry::new(DEPTH as u16, 61440, 4096).expect("valid");
            client.borrow_mut().add_cm(cx, MirrorCm::boxed(geometry)).expect("watchable");
            let paths = (1..=paths).map(|n| PathSpec::new("mirror", ([10, 0, 0, n], 1234).into())).collect();
            let options = SessionOptions { policy, ..SessionOptions::new("s", paths) };
            client.borrow_mut().create_session(cx, options).expect("good options");
        });
        ready_tx.send(handle).expect("the test waits for it");
        reactor.run();
    });
    let handle = ready.recv().expect("the reactor starts");
    let (time, allocations) = test_support::recv(&rx);
    handle.stop();
    thread.join().expect("no panic");
    println!(
        "{paths} paths, {}: {:.0} ns per request, submitted, answered by the mirror, completed",
        policy.name(),
        time.as_nanos() as f64 / MEASURED as f64
    );
    assert!(allocates_nothing(allocations, MEASURED as usize), "{allocations} in {MEASURED} requests");
}
