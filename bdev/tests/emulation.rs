//! What `IoChannel` adds, seen from below: a backend that writes down what it is asked and answers as told.

mod common;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use bdev::{
    Bdev, Channel, ChannelError, Completion, Completions, Flags, Info, IoChannel, IoRequest, Manager, Mode,
    Op, OpSet, Rejected, Status,
};
use common::{Memory, request};

/// What the backend saw: operation, first block, blocks, flags.
type Seen = (Op, u64, u64, u8);

#[derive(Default)]
struct Script {
    seen: Vec<Seen>,
    /// Answers to the next submits; `Ok(Ok)` when it is empty. `Err`: refused.
    answers: VecDeque<Result<Status, Status>>,
    /// Completions wait while this is set.
    hold: bool,
}

struct Fake {
    info: Info,
    script: Arc<Mutex<Script>>,
}

struct FakeChannel {
    script: Arc<Mutex<Script>>,
    done: Completions,
}

impl Bdev for Fake {
    fn info(&self) -> &Info {
        &self.info
    }

    fn blocks(&self) -> u64 {
        1 << 20
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        Ok(Box::new(FakeChannel { script: self.script.clone(), done: Completions::new() }))
    }
}

impl Channel for FakeChannel {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        let mut script = self.script.lock().unwrap();
        match script.answers.pop_front().unwrap_or(Ok(Status::Ok)) {
            Ok(status) => {
                script.seen.push((request.op, request.lba, request.blocks, request.flags.0));
                self.done.push(Completion { cookie: request.cookie, status });
                Ok(())
            }
            Err(status) => Err(Rejected { request, status }),
        }
    }

    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Completions) -> bool {
        if self.script.lock().unwrap().hold {
            return false;
        }
        done.append(&mut self.done);
        !done.is_empty()
    }

    fn ready(&self) -> bool {
        !self.done.is_empty() && !self.script.lock().unwrap().hold
    }
}

struct Bench {
    channel: IoChannel,
    script: Arc<Mutex<Script>>,
    memory: Memory,
    /// Owner of the zeroes that are written, and of the bdev.
    manager: Arc<Manager>,
}

/// A disk with a write cache, neither FUA nor write-zeroes, that discards 1000 blocks at most.
fn bench(change: impl Fn(&mut Info)) -> Bench {
    let mut info = Info {
        name: "fake".into(),
        aliases: vec!["alias".into()],
        product_name: "Fake",
        uuid: uuid::Uuid::nil(),
        block_size: 512,
        physical_block_size: 512,
        native: OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Discard]),
        native_fua: false,
        write_cache: true,
        read_only: false,
        volatile: false,
        discard_granularity: 512,
        rotational: false,
        max_unmap_blocks: 1000,
        buffer_align: 1,
    };
    change(&mut info);
    let script = Arc::new(Mutex::new(Script::default()));
    let manager = Manager::new(iobuf::Registry::new());
    manager.register(Arc::new(Fake { info, script: script.clone() })).unwrap();
    let channel = manager.open("alias", Mode::ReadWrite, Box::new(|_| ())).unwrap().channel().unwrap();
    Bench { channel, script, memory: Memory::scattered(&[512], 0), manager }
}

impl Bench {
    fn run(&mut self, request: common::Request) -> (Status, Vec<Seen>) {
        let status = common::run(&mut self.channel, request);
        assert_eq!(self.channel.inflight(), 0);
        (status, std::mem::take(&mut self.script.lock().unwrap().seen))
    }

    fn answer(&self, answers: &[Result<Status, Status>]) {
        self.script.lock().unwrap().answers.extend(answers);
    }
}

const WRITE: Seen = (Op::Write, 8, 1, 0);
const FLUSH: Seen = (Op::Flush, 0, 0, 0);

#[test]
fn fast_zeroes_are_never_written() {
    let fast = || request(Op::WriteZeroes, 8, 4).flags(Flags::FAST);
    let mut lacking = bench(|_| ());
    assert_eq!(lacking.run(fast()), (Status::Unsupported, vec![]));
    let mut native = bench(|i| i.native = i.native.with(Op::WriteZeroes));
    let seen = (Op::WriteZeroes, 8, 4, Flags::FAST.0);
    assert_eq!(native.run(fast()), (Status::Ok, vec![seen]));
    native.answer(&[Ok(Status::Unsupported)]);
    assert_eq!(native.run(fast()), (Status::Unsupported, vec![seen]), "found out at run time");
    assert_eq!(native.run(request(Op::Discard, 8, 4).flags(Flags::FAST)).0, Status::Invalid);
}

#[test]
fn fua_is_write_and_flush() {
    let mut b = bench(|_| ());
    let fua = |b: &Bench| request(Op::Write, 8, 1).with(&b.memory).flags(Flags::FUA);
    let r = fua(&b);
    assert_eq!(b.run(r), (Status::Ok, vec![WRITE, FLUSH]));
    b.answer(&[Ok(Status::IoError)]);
    let r = fua(&b);
    assert_eq!(b.run(r), (Status::IoError, vec![WRITE]), "no flush after a failed write");
    b.answer(&[Ok(Status::Ok), Ok(Status::MediumError)]);
    let r = fua(&b);
    assert_eq!(b.run(r), (Status::MediumError, vec![WRITE, FLUSH]));
    // The flush meets a full device and is tried again.
    b.answer(&[Ok(Status::Ok), Err(Status::Busy), Err(Status::Busy), Ok(Status::Ok)]);
    let r = fua(&b);
    assert_eq!(b.run(r), (Status::Ok, vec![WRITE, FLUSH]));
    // Refused at once: the request comes back as it was.
    b.answer(&[Err(Status::Busy)]);
    let rejected = b.channel.submit(fua(&b).io(5)).unwrap_err();
    assert_eq!((rejected.request.flags, rejected.request.cookie), (Flags::FUA, 5));
    assert_eq!((rejected.status, b.channel.inflight()), (Status::Busy, 0));
}

#[test]
fn fua_costs_nothing_where_it_means_nothing() {
    let mut b = bench(|i| i.native_fua = true);
    let r = request(Op::Write, 8, 1).with(&b.memory).flags(Flags::FUA);
    assert_eq!(b.run(r), (Status::Ok, vec![(Op::Write, 8, 1, Flags::FUA.0)]));
    let mut b = bench(|i| i.write_cache = false);
    let r = request(Op::Write, 8, 1).with(&b.memory).flags(Flags::FUA);
    assert_eq!(b.run(r), (Status::Ok, vec![WRITE]));
    assert_eq!(b.run(request(Op::Flush, 0, 0)), (Status::Ok, vec![]));
}

#[test]
fn zeroes_are_written_in_bounded_pieces() {
    let mut b = bench(|_| ());
    let (status, seen) = b.run(request(Op::WriteZeroes, 10, 5000).flags(Flags::FUA | Flags::NO_UNMAP));
    assert_eq!(status, Status::Ok);
    let pieces = [(Op::Write, 10, 2048, 0), (Op::Write, 2058, 2048, 0), (Op::Write, 4106, 904, 0), FLUSH];
    assert_eq!(seen, pieces);
    b.answer(&[Ok(Status::Ok), Ok(Status::NoSpace)]);
    let (status, seen) = b.run(request(Op::WriteZeroes, 10, 5000));
    assert_eq!((status, seen.len()), (Status::NoSpace, 2), "stops at the first failure");
}

#[test]
fn native_zeroes_fall_back_when_they_turn_out_to_lack() {
    let mut b = bench(|i| i.native = i.native.with(Op::WriteZeroes));
    let zero = || request(Op::WriteZeroes, 0, 2000).flags(Flags::NO_UNMAP | Flags::FUA);
    let native = |lba| (Op::WriteZeroes, lba, 1000, Flags::NO_UNMAP.0);
    assert_eq!(b.run(zero()), (Status::Ok, vec![native(0), native(1000), FLUSH]));
    // By a completion, for the second half; and by a refusal, for all.
    b.answer(&[Ok(Status::Ok), Ok(Status::Unsupported)]);
    let (status, seen) = b.run(zero());
    assert_eq!((status, &seen[2..]), (Status::Ok, &[(Op::Write, 1000, 1000, 0), FLUSH][..]));
    b.answer(&[Err(Status::Unsupported)]);
    assert_eq!(b.run(zero()), (Status::Ok, vec![(Op::Write, 0, 2000, 0), FLUSH]));
}

#[test]
fn long_discards_are_split() {
    let mut b = bench(|_| ());
    assert_eq!(b.run(request(Op::Discard, 1, 1000)), (Status::Ok, vec![(Op::Discard, 1, 1000, 0)]));
    let (status, seen) = b.run(request(Op::Discard, 1, 2500));
    assert_eq!(status, Status::Ok);
    assert_eq!(seen, [(Op::Discard, 1, 1000, 0), (Op::Discard, 1001, 1000, 0), (Op::Discard, 2001, 500, 0)]);
    b.answer(&[Ok(Status::Unsupported)]);
    assert_eq!(b.run(request(Op::Discard, 1, 2500)).0, Status::Unsupported, "zeroes would be no discard");
}

#[test]
fn reset_waits_for_the_present_step_and_cuts_the_rest() {
    let mut b = bench(|_| ());
    b.script.lock().unwrap().hold = true;
    b.channel.submit(request(Op::WriteZeroes, 0, 10_000).io(1)).unwrap();
    b.channel.submit(request(Op::Write, 8, 1).with(&b.memory).flags(Flags::FUA).io(2)).unwrap();
    b.channel.submit(request(Op::Reset, 0, 0).io(3)).unwrap();
    b.channel.submit(request(Op::Write, 8, 1).with(&b.memory).io(4)).unwrap();
    let mut done = Completions::new();
    assert!(!b.channel.poll(&mut done) && !b.channel.ready());
    b.script.lock().unwrap().hold = false;
    while b.channel.inflight() > 0 {
        b.channel.poll(&mut done);
    }
    let mut got: Vec<_> = done.iter().map(|c| (c.cookie, c.status)).collect();
    let reset = got.iter().position(|(c, _)| *c == 3).unwrap();
    assert!([1, 2].iter().all(|c| got.iter().position(|(d, _)| d == c).unwrap() < reset), "{got:?}");
    got.sort_unstable_by_key(|(c, _)| *c);
    assert_eq!(got, [(1, Status::Aborted), (2, Status::Aborted), (3, Status::Ok), (4, Status::Ok)]);
    let seen = &b.script.lock().unwrap().seen;
    assert_eq!(seen.len(), 3, "one piece of zeroes and two writes: {seen:?}");
}

#[test]
fn what_nobody_waits_for_is_cut_short() {
    let mut b = bench(|_| ());
    b.script.lock().unwrap().hold = true;
    b.channel.submit(request(Op::WriteZeroes, 0, 10_000).io(1)).unwrap();
    b.channel.submit(request(Op::WriteZeroes, 0, 3_000).io(2)).unwrap();
    b.channel.cut_short(|cookie| cookie == 1);
    // Not those that come later.
    b.channel.submit(request(Op::WriteZeroes, 0, 3_000).io(1)).unwrap();
    b.script.lock().unwrap().hold = false;
    let mut done = Completions::new();
    while b.channel.inflight() > 0 {
        b.channel.poll(&mut done);
    }
    let mut got: Vec<_> = done.iter().map(|c| (c.cookie, c.status)).collect();
    got.sort_unstable_by_key(|(c, s)| (*c, *s == Status::Ok));
    assert_eq!(got, [(1, Status::Aborted), (1, Status::Ok), (2, Status::Ok)]);
    // A removed bdev gets no further step.
    b.script.lock().unwrap().hold = true;
    b.channel.submit(request(Op::WriteZeroes, 0, 10_000).io(3)).unwrap();
    b.manager.unregister("fake", Box::new(|| ())).unwrap();
    b.script.lock().unwrap().hold = false;
    done.clear();
    while b.channel.inflight() > 0 {
        b.channel.poll(&mut done);
    }
    assert_eq!(done[0].status, Status::Gone);
}

#[test]
fn impossible_properties_are_refused_in_words() {
    let manager = Manager::new(iobuf::Registry::new());
    type Change = fn(&mut Info);
    let table: [(Change, &str); 6] = [
        (|i| i.name.clear(), "name"),
        (|i| i.block_size = 1000, "block_size"),
        (|i| i.physical_block_size = 256, "physical_block_size"),
        (|i| i.native = OpSet::of(&[Op::Read]), "must read, and write"),
        (|i| i.native = OpSet::of(&[Op::Read, Op::Write]), "must support flush"),
        (|i| i.max_unmap_blocks = 0, "max_unmap_blocks"),
    ];
    for (change, text) in table {
        let b = bench(|_| ());
        let mut info = b.channel.info().clone();
        change(&mut info);
        let error = manager.register(Arc::new(Fake { info, script: b.script.clone() })).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
    assert!(manager.list().is_empty());
}
