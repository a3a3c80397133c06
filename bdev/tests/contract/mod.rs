//! The contract of a bdev, for every backend and layer, in this crate or another: the same tests for each.
//!
//! A test program has `mod common;` and `#[macro_use] mod contract;` at its root, and then
//! `suite! { name => Setup; … }`.

use std::time::Duration;

use crate::common::{self, Memory, Rig, Setup, pattern, request};
use bdev::{Completions, Event, Flags, Mode, Op, Status};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

pub fn data_round_trip(setup: Setup) {
    let mut rig = Rig::new(setup);
    let bs = rig.block_size();
    // One segment, aligned; many odd ones; segments that cross blocks and pages; an unaligned start.
    let shapes: [&[usize]; 5] =
        [&[8 * bs], &[bs; 8], &[1, 8 * bs - 1], &[8 * bs - 3, 1, 1, 1], &[100, bs, 7 * bs - 100]];
    for (i, shape) in shapes.iter().enumerate() {
        for shift in [0, 1, 512] {
            let lba = 16 * i as u64;
            let source = Memory::scattered(shape, shift);
            source.fill(&pattern(8 * bs, lba + shift as u64));
            rig.ok(request(Op::Write, lba, 8).with(&source));
            let back = Memory::scattered(shapes[(i + 1) % shapes.len()], 512 - shift);
            rig.ok(request(Op::Read, lba, 8).with(&back));
            if rig.keeps_data {
                assert_eq!(back.bytes(), source.bytes(), "shape {i}, shift {shift}");
            }
        }
    }
}

pub fn large_and_long_lists(setup: Setup) {
    let mut rig = Rig::new(setup);
    let bs = rig.block_size();
    let blocks = 2 * MIB / bs as u64;
    let source = Memory::scattered(&[2 * MIB as usize], 0);
    source.fill(&pattern(2 * MIB as usize, 5));
    rig.ok(request(Op::Write, 1, blocks).with(&source));
    // More segments than one readv takes; unaligned for direct I/O; larger than a bounce buffer.
    for size in [bs, 1000] {
        let count = 2 * MIB as usize / size;
        let mut shape = vec![size; count];
        shape.push(2 * MIB as usize - size * count);
        let back = Memory::scattered(&shape, 0);
        rig.ok(request(Op::Read, 1, blocks).with(&back));
        if rig.keeps_data {
            assert!(back.bytes() == source.bytes(), "segments of {size}");
        }
    }
}

pub fn registered_memory(setup: Setup) {
    let mut rig = Rig::new(setup);
    let bs = rig.block_size();
    // Ids and addresses are used again with other memory behind them: data must follow the region, not the number.
    for round in 0..8u64 {
        let region = rig.manager.registry().map(64 << 10).unwrap();
        let data = pattern(4 * bs, round);
        assert!(region.copy_in(4096, &data));
        // SAFETY: `region` lives until both requests completed.
        let (out, back) = unsafe { (region.segment(4096, 4 * bs), region.segment(32 << 10, 4 * bs)) };
        rig.ok(request(Op::Write, 8, 4).segment(out.unwrap()));
        rig.ok(request(Op::Read, 8, 4).segment(back.unwrap()));
        let mut got = vec![0; 4 * bs];
        assert!(region.copy_out(32 << 10, &mut got));
        if rig.keeps_data {
            assert_eq!(got, data, "round {round}");
        }
    }
}

pub fn zeroes_and_discard(setup: Setup) {
    let mut rig = Rig::new(setup);
    let bs = rig.block_size();
    let n = 3 * MIB / bs as u64 / 2;
    let zeroes = vec![0; bs];
    for flags in [Flags::NONE, Flags::NO_UNMAP, Flags::FUA, Flags::FUA | Flags::NO_UNMAP] {
        rig.fill(0, n + 2);
        rig.ok(request(Op::WriteZeroes, 1, n).flags(flags));
        if rig.keeps_data {
            for lba in [1, 2, n / 2, n] {
                assert_eq!(rig.read(lba, 1), zeroes, "block {lba}, {flags:?}");
            }
            assert_eq!(rig.read(0, 1), rig.filled(0), "before the range, {flags:?}");
            assert_eq!(rig.read(n + 1, 1), rig.filled(n + 1), "behind the range, {flags:?}");
        }
    }
    if !rig.supports(Op::Discard) {
        assert_eq!(rig.run(request(Op::Discard, 1, n)), Status::Unsupported);
        return;
    }
    rig.fill(0, n + 2);
    rig.ok(request(Op::Discard, 1, n));
    if rig.keeps_data {
        let block = rig.read(n / 2, 1);
        assert!(block == zeroes || block == rig.filled(n / 2), "a discarded block holds neither");
        assert_eq!(rig.read(0, 1), rig.filled(0));
        assert_eq!(rig.read(n + 1, 1), rig.filled(n + 1));
    }
}

pub fn flush_and_fua(setup: Setup) {
    let mut rig = Rig::new(setup);
    let memory = Memory::scattered(&[rig.block_size()], 0);
    memory.fill(&pattern(rig.block_size(), 77));
    rig.ok(request(Op::Flush, 0, 0));
    rig.ok(request(Op::Write, 3, 1).with(&memory).flags(Flags::FUA));
    rig.ok(request(Op::Flush, 0, 0));
    if rig.keeps_data {
        assert_eq!(rig.read(3, 1), memory.bytes());
    }
}

pub fn refusals(setup: Setup) {
    let mut rig = Rig::new(setup);
    let (bs, end) = (rig.block_size(), rig.descriptor.blocks());
    let one = Memory::scattered(&[bs], 0);
    let short = Memory::scattered(&[bs - 1], 0);
    let none = Memory::scattered(&[0], 0);
    let table = [
        (request(Op::Read, end, 1).with(&one), Status::OutOfRange),
        (request(Op::Read, end - 1, 2).with(&one), Status::OutOfRange),
        (request(Op::Read, u64::MAX, 1).with(&one), Status::OutOfRange),
        (request(Op::Write, u64::MAX, u64::MAX).with(&one), Status::OutOfRange),
        (request(Op::WriteZeroes, 1, u64::MAX), Status::OutOfRange),
        (request(Op::Read, 0, 0), Status::Invalid),
        (request(Op::Write, 0, 0).with(&none), Status::Invalid),
        (request(Op::Read, 0, 1), Status::Invalid),
        (request(Op::Read, 0, 2).with(&one), Status::Invalid),
        (request(Op::Write, 0, 1).with(&short), Status::Invalid),
        (request(Op::WriteZeroes, 0, 1).with(&one), Status::Invalid),
        (request(Op::WriteZeroes, 0, 0), Status::Invalid),
        (request(Op::Flush, 1, 0), Status::Invalid),
        (request(Op::Flush, 0, 1), Status::Invalid),
        (request(Op::Reset, 0, 0).with(&one), Status::Invalid),
        (request(Op::Read, 0, 1).with(&one).flags(Flags::FUA), Status::Invalid),
        (request(Op::Write, 0, 1).with(&one).flags(Flags::NO_UNMAP), Status::Invalid),
        (request(Op::Write, 0, 1).with(&one).flags(Flags(0x80)), Status::Invalid),
        (request(Op::SecureErase, 0, 1), Status::Unsupported),
    ];
    for (i, (request, status)) in table.into_iter().enumerate() {
        let rejected = rig.channel.submit(request.io(4711)).expect_err("refused");
        assert_eq!((rejected.status, rejected.request.cookie), (status, 4711), "row {i}");
    }
    assert_eq!(rig.channel.inflight(), 0);
    let mut done = Completions::new();
    assert!(!rig.channel.poll(&mut done));
    let stats = rig.manager.stats(&rig.name).unwrap();
    assert_eq!((stats.errors(Status::OutOfRange), stats.errors(Status::Unsupported)), (5, 1));
    rig.ok(request(Op::Read, end - 1, 1).with(&one));
}

pub fn read_only_descriptor(setup: Setup) {
    let mut rig = Rig::new(setup.read_only());
    let one = Memory::scattered(&[rig.block_size()], 0);
    rig.ok(request(Op::Read, 0, 1).with(&one));
    rig.ok(request(Op::Flush, 0, 0));
    assert_eq!(rig.run(request(Op::Write, 0, 1).with(&one)), Status::ReadOnly);
    assert_eq!(rig.run(request(Op::WriteZeroes, 0, 1)), Status::ReadOnly);
    if rig.supports(Op::Discard) {
        assert_eq!(rig.run(request(Op::Discard, 0, 1)), Status::ReadOnly);
    }
}

/// More than fits: `Busy` gives the request back, completions make room, each cookie comes out once.
pub fn full_and_again(setup: Setup) {
    let mut rig = Rig::new(setup);
    let bs = rig.block_size();
    let memory = Memory::scattered(&[bs; 3], 0);
    let (mut sent, mut busy) = (0u64, 0);
    let mut done = Completions::new();
    while sent < 3000 {
        let r = request(Op::Read, sent % 1000, 1).segment(memory.segment((sent % 3) as usize));
        match rig.channel.submit(r.io(sent)) {
            Ok(()) => sent += 1,
            Err(rejected) => {
                assert_eq!((rejected.status, rejected.request.cookie), (Status::Busy, sent));
                assert!(rig.channel.inflight() > 0, "busy though idle");
                busy += 1;
                rig.channel.kick();
                common::wait(&rig.channel);
                rig.channel.poll(&mut done);
            }
        }
    }
    rig.drain(&mut done);
    assert_eq!(busy > 0, rig.bounded, "refused {busy} times");
    let mut cookies: Vec<_> = done.iter().map(|c| c.cookie).collect();
    cookies.sort_unstable();
    assert!(cookies.iter().copied().eq(0..3000), "each cookie once");
    assert!(done.iter().all(|c| c.status == Status::Ok));
    assert_eq!(rig.manager.stats(&rig.name).unwrap().op(Op::Read).ops, 3000);
}

pub fn nothing_completes_before_poll_and_waiting_ends(setup: Setup) {
    let mut rig = Rig::new(setup);
    let one = Memory::scattered(&[rig.block_size()], 0);
    let mut done = Completions::new();
    assert!(!rig.channel.poll(&mut done), "idle");
    for (cookie, op) in [(1, Op::Read), (2, Op::Flush), (3, Op::WriteZeroes), (4, Op::Reset)] {
        let r = if op.has_range() { request(op, 0, 1) } else { request(op, 0, 0) };
        let r = if op == Op::Read { r.with(&one) } else { r };
        rig.channel.submit(r.io(cookie)).unwrap();
        assert_eq!(rig.channel.inflight(), 1);
        rig.channel.kick();
        // A core may sleep as the channel says, and must not sleep for ever.
        common::patiently(|| {
            assert!(common::wait(&rig.channel), "{op:?}: neither ready nor readable nor due");
            rig.channel.poll(&mut done)
        });
        assert_eq!(done.pop().map(|c| (c.cookie, c.status)), Some((cookie, Status::Ok)));
        assert_eq!((rig.channel.inflight(), rig.channel.ready()), (0, false));
    }
}

pub fn reset_with_requests_in_flight(setup: Setup) {
    let mut rig = Rig::new(setup);
    let bs = rig.block_size();
    let memory = Memory::scattered(&[bs], 0);
    for round in 0..10u64 {
        let mut done = Completions::new();
        for cookie in 0..40 {
            let r = match cookie % 4 {
                0 => request(Op::WriteZeroes, 0, 3 * MIB / bs as u64),
                1 => request(Op::Flush, 0, 0),
                _ => request(Op::Read, cookie, 1).with(&memory),
            };
            rig.channel.submit(r.io(cookie)).unwrap();
        }
        if round % 2 == 0 {
            rig.channel.kick();
        }
        rig.channel.submit(request(Op::Reset, 0, 0).io(100)).unwrap();
        rig.channel.submit(request(Op::Read, 0, 1).with(&memory).io(101)).unwrap();
        rig.channel.submit(request(Op::Reset, 0, 0).io(102)).unwrap();
        rig.drain(&mut done);
        let at = |cookie| done.iter().position(|c| c.cookie == cookie).expect("completed");
        assert_eq!(done.len(), 43);
        assert!((0..40).all(|c| at(c) < at(100)), "reset came before its predecessors: {done:?}");
        assert!(at(100) < at(102) && at(101) < at(102));
        assert_eq!((done[at(100)].status, done[at(102)].status), (Status::Ok, Status::Ok));
        assert!(done.iter().all(|c| matches!(c.status, Status::Ok | Status::Aborted)), "{done:?}");
    }
    rig.ok(request(Op::Read, 0, 1).with(&memory));
}

pub fn removal_with_requests_in_flight(setup: Setup) {
    let mut rig = Rig::new(setup);
    let memory = Memory::scattered(&[rig.block_size()], 0);
    for cookie in 0..20 {
        rig.channel.submit(request(Op::Read, cookie, 1).with(&memory).io(cookie)).unwrap();
    }
    rig.channel.kick();
    let (sender, gone) = std::sync::mpsc::channel();
    rig.manager.unregister(&rig.name, Box::new(move || sender.send(()).unwrap())).unwrap();
    assert_eq!(rig.events.lock().unwrap().as_slice(), [Event::Removed]);
    let rejected = rig.channel.submit(request(Op::Read, 0, 1).with(&memory).io(99)).unwrap_err();
    assert_eq!(rejected.status, Status::Gone);
    let mut done = Completions::new();
    rig.drain(&mut done);
    assert_eq!(done.len(), 20);
    assert!(gone.try_recv().is_err(), "still open");
    drop(rig);
    gone.try_recv().expect("gone with its last user");
}

/// Dropping a channel with requests in flight must leave their memory alone afterwards.
pub fn drop_with_requests_in_flight(setup: Setup) {
    let mut rig = Rig::new(setup);
    let bs = rig.block_size();
    rig.fill(0, 64);
    let memory = Memory::scattered(&[64 * bs], 0);
    for cookie in 0..64 {
        let piece = memory.piece(cookie as usize * bs, bs);
        rig.channel.submit(request(Op::Read, cookie, 1).segment(piece).io(cookie)).unwrap();
    }
    rig.channel.kick();
    rig.channel = rig.descriptor.channel().unwrap();
    let marks = vec![0xa5; 64 * bs];
    memory.fill(&marks);
    std::thread::sleep(Duration::from_millis(20));
    assert!(memory.bytes() == marks, "the device wrote into memory that was given back");
    rig.ok(request(Op::Read, 0, 64).with(&memory));
}

pub fn channels_on_two_threads(setup: Setup) {
    let rig = Rig::new(setup);
    let (bs, keeps) = (rig.block_size(), rig.keeps_data);
    let work = |descriptor: bdev::Descriptor, first: u64| {
        let mut channel = descriptor.channel().unwrap();
        let (out, back) = (Memory::scattered(&[bs], 0), Memory::scattered(&[bs], 0));
        for i in 0..200u64 {
            let lba = first + i % 16;
            out.fill(&pattern(bs, first << 32 | i));
            assert_eq!(common::run(&mut channel, request(Op::Write, lba, 1).with(&out)), Status::Ok);
            assert_eq!(common::run(&mut channel, request(Op::Read, lba, 1).with(&back)), Status::Ok);
            assert!(!keeps || back.bytes() == out.bytes(), "block {lba}");
        }
    };
    std::thread::scope(|s| {
        let handles: Vec<_> = (0..2u64)
            .map(|t| {
                let d = rig.descriptor.clone();
                s.spawn(move || work(d, t * 16))
            })
            .collect();
        handles.into_iter().for_each(|h| h.join().unwrap());
    });
    let stats = rig.manager.stats(&rig.name).unwrap();
    assert_eq!((stats.op(Op::Read).ops, stats.op(Op::Write).bytes), (400, 400 * bs as u64));
    assert!(stats.op(Op::Read).min_latency_ns <= stats.op(Op::Read).max_latency_ns);
}

/// One operation of the random test, in blocks of a small area.
#[derive(Clone, Debug)]
struct Action {
    op: Op,
    flags: Flags,
    lba: u64,
    blocks: u64,
    cut: usize,
    shift: usize,
}

const AREA: u64 = 64;

fn action() -> impl Strategy<Value = Action> {
    let op = prop_oneof![
        3 => Just(Op::Write), 3 => Just(Op::Read), 1 => Just(Op::WriteZeroes), 1 => Just(Op::Discard), 1 => Just(Op::Flush)
    ];
    (op, 0u8..4, 0..AREA, 1..24u64, 0usize..20_000, 0usize..600).prop_map(
        |(op, flags, lba, blocks, cut, shift)| {
            let flags = match op {
                Op::Write => Flags(flags & 1),
                Op::WriteZeroes => Flags(flags),
                _ => Flags::NONE,
            };
            Action { op, flags, lba, blocks: blocks.min(AREA - lba), cut, shift }
        },
    )
}

/// Any sequence of operations leaves what the model says.
pub fn random_sequences(setup: Setup) {
    let rig = Rig::new(setup);
    if !rig.keeps_data {
        return;
    }
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) };
    let sequences = prop::collection::vec(action(), 1..40);
    // The runner's closure is `Fn`.
    let rig = std::cell::RefCell::new(rig);
    let result = proptest::test_runner::TestRunner::new(config)
        .run(&sequences, |actions| replay(&mut rig.borrow_mut(), &actions));
    result.unwrap();
}

/// Plays `actions` on a zeroed area and on a model in memory: `None` for a discarded block, which may hold anything
/// of its past.
fn replay(rig: &mut Rig, actions: &[Action]) -> Result<(), TestCaseError> {
    let bs = rig.block_size();
    rig.ok(request(Op::WriteZeroes, 0, AREA));
    let mut model: Vec<Option<Vec<u8>>> = vec![Some(vec![0; bs]); AREA as usize];
    for (step, a) in actions.iter().enumerate() {
        let bytes = a.blocks as usize * bs;
        let memory = Memory::scattered(&[a.cut.min(bytes), bytes - a.cut.min(bytes)], a.shift);
        let range = a.lba as usize..(a.lba + a.blocks) as usize;
        let r = request(a.op, a.lba, a.blocks).flags(a.flags);
        match a.op {
            Op::Write => {
                memory.fill(&pattern(bytes, step as u64));
                rig.ok(r.with(&memory));
                let written = memory.bytes();
                let blocks = written.chunks(bs).map(|b| Some(b.to_vec()));
                model[range].iter_mut().zip(blocks).for_each(|(m, b)| *m = b);
            }
            Op::Read => {
                rig.ok(r.with(&memory));
                let got = memory.bytes();
                for (i, (m, b)) in model[range].iter().zip(got.chunks(bs)).enumerate() {
                    let same = m.as_ref().is_none_or(|m| m == b);
                    prop_assert!(same, "step {step}: block {} differs", a.lba + i as u64);
                }
            }
            Op::WriteZeroes => {
                rig.ok(r);
                model[range].fill(Some(vec![0; bs]));
            }
            Op::Discard if rig.supports(Op::Discard) => {
                rig.ok(r);
                model[range].fill(None);
            }
            Op::Discard => {}
            _ => rig.ok(request(Op::Flush, 0, 0)),
        }
    }
    Ok(())
}

pub fn mode_is_kept(setup: Setup) {
    let rig = Rig::new(setup);
    assert_eq!(rig.descriptor.mode(), Mode::ReadWrite);
    let status = rig.manager.status(&rig.name).unwrap();
    assert_eq!((status.blocks, status.opens), (rig.descriptor.blocks(), 1));
    assert!(status.supported.has(Op::WriteZeroes) && status.supported.has(Op::Reset));
}

/// A module of tests for each name, on what the [`Setup`] makes.
macro_rules! suite {
    ($($(#[$attr:meta])* $name:ident => $setup:expr;)*) => { $(
        $(#[$attr])*
        mod $name {
            use super::*;
            suite!(@tests $setup, data_round_trip large_and_long_lists registered_memory zeroes_and_discard
                flush_and_fua refusals read_only_descriptor full_and_again
                nothing_completes_before_poll_and_waiting_ends reset_with_requests_in_flight
                removal_with_requests_in_flight drop_with_requests_in_flight channels_on_two_threads
                random_sequences mode_is_kept);
        }
    )* };
    (@tests $setup:expr, $($test:ident)*) => { $(
        #[test]
        fn $test() {
            $crate::contract::$test($setup);
        }
    )* };
}
