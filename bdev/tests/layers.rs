//! What delay and error do on purpose, and removal through layers.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use bdev::error::{ErrorType, Injection};
use bdev::{Completions, Error, Event, HistogramConfig, Manager, Mode, Op, Status, delay, error, null};
use common::{Memory, Rig, Setup, pattern, request};

fn delay_rig(latencies: delay::Latencies) -> Rig {
    Rig::new(Setup::of(move |m| {
        let base_bdev_name = common::make_malloc(m, 512);
        let p = delay::Params { name: "D".into(), base_bdev_name, uuid: None, latencies };
        (delay::create(m, p).unwrap(), None)
    }))
}

fn error_rig() -> Rig {
    Rig::new(Setup::with_error_layer(Setup::malloc(512)))
}

/// An hour, in microseconds: longer than any test, on any machine.
const FOR_EVER: u64 = 3_600_000_000;

/// How long one request takes.
fn time(rig: &mut Rig, op: Op, memory: &Memory) -> Duration {
    let start = Instant::now();
    rig.ok(request(op, 0, 1).with(memory));
    start.elapsed()
}

#[test]
fn delays_are_kept_and_can_be_changed() {
    let mut rig = delay_rig(delay::Latencies {
        avg_read: 100_000,
        p99_read: 100_000,
        avg_write: FOR_EVER,
        p99_write: FOR_EVER,
    });
    let memory = Memory::scattered(&[512], 0);
    // Those that are delayed by little come while those that are delayed for ever do not.
    rig.channel.submit(request(Op::Write, 0, 1).with(&memory).io(1)).unwrap();
    let read = time(&mut rig, Op::Read, &memory);
    assert!(read >= Duration::from_millis(100), "never early: {read:?}");
    delay::update_latency(&rig.manager, "D", delay::LatencyType::P99Read, FOR_EVER).unwrap();
    delay::update_latency(&rig.manager, "D", delay::LatencyType::AvgRead, FOR_EVER).unwrap();
    // Only reads and writes are delayed.
    rig.ok(request(Op::Flush, 0, 0));
    assert_eq!(rig.channel.inflight(), 1, "the write waits");
    // What is held keeps its time, a reset ends it.
    let quick = |rig: &Rig, t| delay::update_latency(&rig.manager, "D", t, 100_000).unwrap();
    quick(&rig, delay::LatencyType::AvgWrite);
    quick(&rig, delay::LatencyType::P99Write);
    quick(&rig, delay::LatencyType::AvgRead);
    quick(&rig, delay::LatencyType::P99Read);
    let write = time(&mut rig, Op::Write, &memory);
    assert!(write >= Duration::from_millis(100), "never early: {write:?}");
    assert_eq!(rig.channel.inflight(), 1, "the first write waits still");
    rig.ok_after_all(request(Op::Reset, 0, 0), 2);

    let change = |t, us| delay::update_latency(&rig.manager, "D", t, us);
    assert_eq!(change(delay::LatencyType::AvgRead, 100_001).unwrap_err().errno(), 22, "more than p99");
    change(delay::LatencyType::P99Read, 200_000).unwrap();
    change(delay::LatencyType::AvgRead, 200_000).unwrap();
    let read = time(&mut rig, Op::Read, &memory);
    assert!(read >= Duration::from_millis(200), "never early: {read:?}");
}

#[test]
fn one_in_a_hundred_is_slow() {
    let mut rig = delay_rig(delay::Latencies { avg_read: 0, p99_read: FOR_EVER, avg_write: 0, p99_write: 0 });
    rig.manager.enable_histogram("D", Some(HistogramConfig::default())).unwrap();
    let memory = Memory::scattered(&[512], 0);
    let mut done = Completions::new();
    for i in 0..5000 {
        rig.channel.submit(request(Op::Read, i % 100, 1).with(&memory).io(i)).unwrap();
    }
    // A disk in memory has done all of them when it is asked: what does not come is held back.
    rig.channel.kick();
    for _ in 0..1000 {
        rig.channel.poll(&mut done);
    }
    let slow = 5000 - done.len();
    assert!((20..100).contains(&slow), "{slow} of 5000 slow, 50 expected");
    rig.ok_after_all(request(Op::Reset, 0, 0), slow + 1);
    assert_eq!(rig.manager.histogram("D").unwrap().to_hdr().len(), 5001, "and the reset");
}

#[test]
fn reset_lets_go_of_what_is_held_and_later_requests_are_delayed_again() {
    let mut rig =
        delay_rig(delay::Latencies { avg_read: FOR_EVER, p99_read: FOR_EVER, avg_write: 0, p99_write: 0 });
    let memory = Memory::scattered(&[512], 0);
    for i in 0..10 {
        rig.channel.submit(request(Op::Read, 0, 1).with(&memory).io(i)).unwrap();
    }
    let mut done = Completions::new();
    rig.channel.poll(&mut done);
    assert!(done.is_empty());
    rig.ok_after_all(request(Op::Reset, 0, 0), 11);
    delay::update_latency(&rig.manager, "D", delay::LatencyType::AvgRead, 10_000).unwrap();
    delay::update_latency(&rig.manager, "D", delay::LatencyType::P99Read, 10_000).unwrap();
    assert!(time(&mut rig, Op::Read, &memory) >= Duration::from_millis(10));
}

fn inject(rig: &Rig, op: Option<Op>, error: ErrorType, num: u32, queue_depth: u64) {
    error::inject(&rig.manager, &rig.name, Injection { op, error, num, queue_depth }).unwrap();
}

#[test]
fn failures_hit_the_chosen_operation_so_often_and_are_counted() {
    let mut rig = error_rig();
    let memory = Memory::scattered(&[512], 0);
    inject(&rig, Some(Op::Write), ErrorType::Failure, 2, 0);
    let mut write = || rig.run(request(Op::Write, 0, 1).with(&memory));
    assert_eq!([write(), write(), write()], [Status::IoError, Status::IoError, Status::Ok]);
    assert_eq!(rig.manager.stats(&rig.name).unwrap().errors(Status::IoError), 2);
    inject(&rig, None, ErrorType::NoMem, 1, 0);
    assert_eq!(rig.run(request(Op::Read, 0, 1).with(&memory)), Status::Busy);
    assert_eq!(rig.run(request(Op::Flush, 0, 0)), Status::Ok, "flush is a no-op above a bdev without cache");
    assert_eq!(rig.run(request(Op::Discard, 0, 1)), Status::Busy);
    assert_eq!(rig.run(request(Op::Discard, 0, 1)), Status::Ok);
    inject(&rig, Some(Op::Read), ErrorType::Failure, u32::MAX, 0);
    error::clear(&rig.manager, &rig.name).unwrap();
    rig.ok(request(Op::Read, 0, 1).with(&memory));
}

#[test]
fn queue_depth_chooses_requests() {
    let mut rig = error_rig();
    let memory = Memory::scattered(&[512], 0);
    inject(&rig, Some(Op::Read), ErrorType::Failure, 100, 3);
    rig.ok(request(Op::Read, 0, 1).with(&memory));
    for i in 0..4 {
        rig.channel.submit(request(Op::Read, i, 1).with(&memory).io(i)).unwrap();
    }
    let mut done = Completions::new();
    rig.drain(&mut done);
    done.sort_by_key(|c| c.cookie);
    let statuses: Vec<_> = done.iter().map(|c| c.status).collect();
    assert_eq!(statuses, [Status::Ok, Status::Ok, Status::IoError, Status::IoError]);
}

#[test]
fn corruption_changes_one_byte_on_the_way_and_not_the_submitters() {
    let mut rig = error_rig();
    let memory = Memory::scattered(&[100, 924], 0);
    let data = pattern(1024, 3);
    memory.fill(&data);
    inject(&rig, Some(Op::Write), ErrorType::CorruptData { offset: 513, value: 0xff }, 1, 0);
    rig.ok(request(Op::Write, 7, 2).with(&memory));
    assert_eq!(memory.bytes(), data, "mended after the write");
    let mut expected = data.clone();
    expected[513] ^= 0xff;
    assert_eq!(rig.read(7, 2), expected);
    inject(&rig, Some(Op::Read), ErrorType::CorruptData { offset: 0, value: 1 }, 1, 0);
    let first = rig.read(7, 2)[0];
    assert_eq!((first, rig.read(7, 2)[0]), (data[0] ^ 1, data[0]));
    let none = Injection {
        op: Some(Op::Flush),
        error: ErrorType::CorruptData { offset: 0, value: 1 },
        num: 1,
        queue_depth: 0,
    };
    assert!(error::inject(&rig.manager, &rig.name, none).is_err());
}

#[test]
fn pending_requests_resume_or_are_reset() {
    let mut rig = error_rig();
    let memory = Memory::scattered(&[512], 0);
    inject(&rig, Some(Op::Write), ErrorType::Pending, 2, 0);
    let mut done = Completions::new();
    for cookie in [1, 2] {
        memory.fill(&pattern(512, cookie));
        rig.channel.submit(request(Op::Write, 5, 1).with(&memory).io(cookie)).unwrap();
        std::thread::sleep(Duration::from_millis(15));
        assert!(!rig.channel.poll(&mut done), "held");
        if cookie == 1 {
            error::resume_pending(&rig.manager, &rig.name).unwrap();
            rig.drain(&mut done);
            assert_eq!(done.pop().map(|c| c.status), Some(Status::Ok));
            assert_eq!(rig.read(5, 1), pattern(512, 1));
        } else {
            rig.channel.submit(request(Op::Reset, 0, 0).io(3)).unwrap();
            rig.drain(&mut done);
            let got: Vec<_> = done.iter().map(|c| (c.cookie, c.status)).collect();
            assert_eq!(got, [(2, Status::Aborted), (3, Status::Ok)]);
        }
    }
    assert_eq!(rig.read(5, 1), pattern(512, 1), "the aborted write never reached the base");
}

#[test]
fn layers_are_as_volatile_as_their_base() {
    let manager = Manager::new(iobuf::Registry::new());
    let params =
        null::Params { name: None, uuid: None, num_blocks: 8, block_size: 512, physical_block_size: None };
    let bases =
        [(common::make_malloc(&manager, 512), true), (null::create(&manager, params).unwrap(), false)];
    for (base, volatile) in bases {
        let base_bdev_name = error::create(&manager, &base, None).unwrap();
        let name = format!("D_{base}");
        let latencies = delay::Latencies::default();
        delay::create(&manager, delay::Params { name, base_bdev_name, uuid: None, latencies }).unwrap();
        for name in [base.clone(), format!("EE_{base}"), format!("D_{base}")] {
            assert_eq!(manager.get(&name).unwrap().info().volatile, volatile, "{name}");
        }
    }
}

#[test]
fn removal_of_a_base_takes_its_layers_along() {
    let manager = Manager::new(iobuf::Registry::new());
    let base = common::make_malloc(&manager, 512);
    let ee = error::create(&manager, &base, None).unwrap();
    let p = delay::Params {
        name: "top".into(),
        base_bdev_name: ee.clone(),
        uuid: None,
        latencies: delay::Latencies::default(),
    };
    delay::create(&manager, p.clone()).unwrap();
    let refused = manager.open(&base, Mode::ReadWrite, Box::new(|_| ())).unwrap_err();
    assert!(refused.to_string().contains("error bdev EE_Malloc0"), "{refused}");
    assert!(matches!(
        delay::create(&manager, delay::Params { name: "x".into(), ..p }),
        Err(Error::Busy { .. })
    ));

    let heard = Arc::new(AtomicU32::new(0));
    let h = heard.clone();
    let count = Box::new(move |e| {
        assert_eq!(e, Event::Removed);
        h.fetch_add(1, SeqCst);
    });
    let d = manager.open("top", Mode::ReadWrite, count).unwrap();
    let channel = d.channel().unwrap();
    let gone = Arc::new(AtomicU32::new(0));
    let g = gone.clone();
    manager
        .unregister(
            &base,
            Box::new(move || {
                g.fetch_add(1, SeqCst);
            }),
        )
        .unwrap();
    assert_eq!((heard.load(SeqCst), gone.load(SeqCst), manager.list().len()), (1, 0, 0));
    drop(channel);
    drop(d);
    assert_eq!(gone.load(SeqCst), 1, "the stack unwinds from the top");
    common::make_malloc(&manager, 512);
}

#[test]
fn resize_passes_upwards_and_deletion_releases_the_claim() {
    let manager = Manager::new(iobuf::Registry::new());
    let p = null::Params {
        name: Some("n".into()),
        num_blocks: 100,
        block_size: 512,
        physical_block_size: None,
        uuid: None,
    };
    null::create(&manager, p).unwrap();
    let ee = error::create(&manager, "n", None).unwrap();
    let d = manager.open(&ee, Mode::ReadOnly, Box::new(|_| ())).unwrap();
    null::resize(&manager, "n", 300).unwrap();
    assert_eq!(d.blocks(), 300);
    drop(d);
    manager.delete::<error::ErrorBdev>(&ee, Box::new(|| ())).unwrap();
    assert!(manager.status("n").unwrap().claim.is_none());
    manager.open("n", Mode::ReadWrite, Box::new(|_| ())).unwrap();
}
