//! A reactor's devices over a simulated session: a disk in memory that is lost and comes back.

use std::time::{Duration, Instant};

use bdev::{Completions, Flags, IoRequest, Op, Segments, Status};
use iobuf::{Pool, Region, Registry, Segment};
use proptest::prelude::*;

use super::super::disks::{Device, Disks, Gate};
use super::super::request::{Limits, Message, Opened, Unsent, Wire};
use super::*;

const DISK_BYTES: usize = 64 << 10;

/// What a server does with a message, in the order of arrival.
#[derive(Clone, Debug)]
struct Sent {
    cookie: u64,
    op: Op,
    fua: bool,
    sector: u64,
    len: u32,
    data: Vec<Segment>,
}

/// A session of bounded depth to a disk that works when the test says so.
struct Server {
    session: u32,
    depth: usize,
    pieces: usize,
    queue: Vec<Sent>,
    disk: Vec<u8>,
    registered: bool,
}

impl Wire<u32> for Server {
    fn send(&mut self, to: &Opened<u32>, m: &Message<'_>, cookie: u64) -> Result<(), Unsent> {
        if to.session != self.session {
            return Err(Unsent::Down);
        }
        if self.queue.len() == self.depth {
            return Err(Unsent::Busy);
        }
        assert!(m.len <= to.limits.of(m.op), "more than the server takes");
        assert!(m.data.len() <= 1 || m.op == Op::Write, "a read has one target");
        let bytes: u64 = m.data.iter().map(|s| u64::from(s.len)).sum();
        assert_eq!(bytes, if m.op.has_data() { u64::from(m.len) } else { 0 });
        if m.data.len() > self.pieces || !self.registered {
            return Err(Unsent::Memory);
        }
        assert!(m.data.iter().all(|s| s.region.index().is_some()), "unregistered memory was sent");
        assert!(!self.queue.iter().any(|s| s.cookie == cookie), "cookie {cookie} twice");
        let (data, len) = (m.data.to_vec(), m.len);
        self.queue.push(Sent { cookie, op: m.op, fua: m.fua, sector: m.sector, len, data });
        Ok(())
    }
}

impl Server {
    fn new() -> Self {
        let disk = vec![0; DISK_BYTES];
        Self { session: 1, depth: 8, pieces: 4, queue: Vec::new(), disk, registered: true }
    }

    /// Executes one message.
    fn execute(&mut self, s: &Sent) {
        let mut at = s.sector as usize * 512;
        for d in &s.data {
            let len = d.len as usize;
            // SAFETY: segments lie in regions that the tests keep, and nobody else touches them meanwhile.
            unsafe {
                match s.op {
                    Op::Read => std::ptr::copy_nonoverlapping(self.disk[at..].as_ptr(), d.as_ptr(), len),
                    _ => std::ptr::copy_nonoverlapping(d.as_ptr(), self.disk[at..].as_mut_ptr(), len),
                }
            }
            at += len;
        }
        if matches!(s.op, Op::WriteZeroes | Op::Discard) {
            self.disk[at..at + s.len as usize].fill(0);
        }
    }
}

struct Rig {
    disks: Disks<u32>,
    server: Server,
    now: Instant,
    device: u32,
    channel: u32,
    registry: std::sync::Arc<Registry>,
}

fn limits() -> Limits {
    Limits { data: 4096, discard: 8192, write_zeroes: 2048, secure_erase: 0 }
}

fn opened(epoch: u64) -> Opened<u32> {
    Opened { epoch, session: 1, id: 7, limits: limits() }
}

impl Rig {
    fn new(fast_io_fail: Option<Duration>) -> Self {
        let registry = Registry::new();
        let pool = Some(Pool::new(&registry, 2, 8192).unwrap());
        let mut disks = Disks { pool, ..Disks::default() };
        let device = disks.devices.insert(Device::new(5, 9, fast_io_fail, Gate::Open(opened(1))));
        let channel = disks.open_channel(device, None);
        Self { disks, server: Server::new(), now: Instant::now(), device, channel, registry }
    }

    fn submit(&mut self, op: Op, block: u64, blocks: u64, segments: &[Segment], cookie: u64) -> Status {
        let r = IoRequest {
            op,
            flags: Flags::NONE,
            lba: block,
            blocks,
            segments: Segments::from_slice(segments),
            cookie,
        };
        self.disks.submit(self.channel, r).map_or_else(|r| r.status, |()| Status::Ok)
    }

    fn run(&mut self) {
        self.disks.run(self.now, &mut self.server);
    }

    /// The server answers everything it has, and what follows from that.
    fn serve(&mut self) {
        self.run();
        while !self.server.queue.is_empty() {
            for s in std::mem::take(&mut self.server.queue) {
                self.server.execute(&s);
                self.disks.completed(s.cookie, Ok(()));
            }
            self.run();
        }
    }

    fn answer(&mut self, result: Result<(), Errno>) -> Sent {
        let s = self.server.queue.remove(0);
        if result.is_ok() {
            self.server.execute(&s);
        }
        self.disks.completed(s.cookie, result);
        s
    }

    /// The session loses its last path: of its messages the server has executed the first `executed`.
    fn lose(&mut self, executed: usize) {
        for (i, s) in std::mem::take(&mut self.server.queue).into_iter().enumerate() {
            if i < executed {
                self.server.execute(&s);
            }
            self.disks.completed(s.cookie, Err(Errno::ECONNABORTED));
        }
        self.server.session = 0;
        self.disks.session_down(1, self.now);
    }

    fn come_back(&mut self, epoch: u64, repeat_at: Option<Instant>) {
        self.come_back_as(opened(epoch), repeat_at);
    }

    fn come_back_as(&mut self, open: Opened<u32>, repeat_at: Option<Instant>) {
        self.server.session = 1;
        self.disks.open(5, open, repeat_at);
    }

    fn done(&mut self) -> Vec<(u64, Status)> {
        let mut done = Completions::new();
        self.disks.poll_channel(self.channel, &mut done);
        done.iter().map(|c| (c.cookie, c.status)).collect()
    }

    fn nothing_left(&self) {
        assert_eq!((self.disks.requests.len(), self.disks.parts.len()), (0, 0));
        assert_eq!(self.disks.pool.as_ref().unwrap().available(), 2, "a bounce buffer was lost");
        let d = self.disks.devices.get(self.device).unwrap();
        assert_eq!((d.inflight, d.queue.len(), d.ready.len(), d.lost.len(), d.fenced.len()), (0, 0, 0, 0, 0));
    }

    fn memory(&self, len: usize) -> std::sync::Arc<Region> {
        self.registry.map(len).unwrap()
    }
}

fn part(region: &Region, at: usize, len: usize) -> Segment {
    // SAFETY: the tests keep their regions until their requests have completed.
    unsafe { region.segment(at, len) }.unwrap()
}

fn bytes(region: &Region, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    assert!(region.copy_out(0, &mut out));
    out
}

fn fill(region: &Region, seed: u8) {
    let data: Vec<u8> = (0..region.len()).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    assert!(region.copy_in(0, &data));
}

#[test]
fn long_requests_are_cut_and_complete_once() {
    let mut rig = Rig::new(None);
    let (out, back) = (rig.memory(24 << 10), rig.memory(24 << 10));
    fill(&out, 3);
    let len = 18 * 1024;
    assert_eq!(rig.submit(Op::Write, 4, 36, &[part(&out, 0, len)], 1), Status::Ok);
    rig.run();
    let sizes: Vec<u32> = rig.server.queue.iter().map(|s| s.len).collect();
    assert_eq!(sizes, [4096, 4096, 4096, 4096, 2048]);
    assert!(rig.server.queue.iter().all(|s| s.data.len() == 1), "zero copy");
    assert_eq!(rig.done(), [], "nothing has been answered");
    rig.serve();
    assert_eq!(rig.done(), [(1, Status::Ok)]);
    assert_eq!(rig.submit(Op::Read, 4, 36, &[part(&back, 0, len)], 2), Status::Ok);
    rig.serve();
    assert_eq!(rig.done(), [(2, Status::Ok)]);
    assert_eq!(bytes(&back, len), bytes(&out, len));
    rig.nothing_left();
}

#[test]
fn scattered_reads_and_foreign_memory_are_bounced() {
    let mut rig = Rig::new(None);
    let (out, back) = (rig.memory(8192), rig.memory(16384));
    fill(&out, 9);
    let foreign = Region::new(8192).unwrap();
    fill(&foreign, 1);
    // Five pieces are one too many for the session; foreign memory is nothing to it at all.
    let scattered: Vec<Segment> = (0..5).map(|i| part(&out, i * 1024 + 512, 512)).collect();
    assert_eq!(rig.submit(Op::Write, 0, 5, &scattered, 1), Status::Ok);
    assert_eq!(rig.submit(Op::Write, 5, 2, &[part(&foreign, 0, 1024)], 2), Status::Ok);
    rig.serve();
    assert_eq!(rig.done(), [(1, Status::Ok), (2, Status::Ok)]);
    let targets = [part(&back, 100, 1000), part(&back, 3000, 2584)];
    assert_eq!(rig.submit(Op::Read, 0, 7, &targets, 3), Status::Ok);
    rig.serve();
    assert_eq!(rig.done(), [(3, Status::Ok)]);
    let (all, source) = (bytes(&back, 16384), bytes(&out, 8192));
    let got: Vec<u8> = [&all[100..1100], &all[3000..5584]].concat();
    let want: Vec<u8> = (0..5).flat_map(|i| source[i * 1024 + 512..][..512].to_vec()).collect();
    assert_eq!((&got[..2560], &got[2560..]), (&want[..], &bytes(&foreign, 1024)[..]));
    rig.nothing_left();
}

/// Bounce buffers run out and come back; parts larger than one are divided; order is kept.
#[test]
fn few_buffers_serve_many_requests() {
    let mut rig = Rig::new(None);
    let open = Opened { limits: Limits { data: 32 << 10, ..limits() }, ..opened(2) };
    rig.disks.open(5, open, None);
    let foreign = Region::new(40 << 10).unwrap();
    fill(&foreign, 77);
    assert_eq!(rig.submit(Op::Write, 0, 64, &[part(&foreign, 0, 32 << 10)], 1), Status::Ok);
    assert_eq!(rig.submit(Op::Write, 64, 16, &[part(&foreign, 32 << 10, 8192)], 2), Status::Ok);
    rig.run();
    assert_eq!(rig.server.queue.len(), 2, "as many as there are buffers");
    rig.serve();
    assert_eq!(rig.done(), [(1, Status::Ok), (2, Status::Ok)]);
    assert_eq!(&rig.server.disk[..40 << 10], bytes(&foreign, 40 << 10));
    rig.nothing_left();
}

#[test]
fn memory_that_is_not_registered_yet_waits_for_a_buffer_that_is() {
    let mut rig = Rig::new(None);
    let out = rig.memory(4096);
    rig.server.registered = false;
    assert_eq!(rig.submit(Op::Write, 0, 8, &[part(&out, 0, 4096)], 1), Status::Ok);
    rig.run();
    assert!(rig.server.queue.is_empty() && rig.disks.deadline().is_some(), "it is tried again by itself");
    rig.server.registered = true;
    rig.serve();
    assert_eq!(rig.done(), [(1, Status::Ok)]);
    rig.nothing_left();
}

#[test]
fn operations_without_data_go_by_their_own_limits() {
    let mut rig = Rig::new(None);
    let discard = rig.submit(Op::Discard, 0, 48, &[], 1);
    let zeroes = rig.submit(Op::WriteZeroes, 8, 8, &[], 2);
    let (flush, erase) = (rig.submit(Op::Flush, 0, 0, &[], 3), rig.submit(Op::SecureErase, 0, 8, &[], 4));
    assert_eq!([discard, zeroes, flush, erase], [Status::Ok; 4]);
    rig.run();
    let sent: Vec<_> = rig.server.queue.iter().map(|s| (s.op, s.sector, s.len)).collect();
    let (d, z) = (Op::Discard, Op::WriteZeroes);
    let want = [(d, 0, 8192), (d, 16, 8192), (d, 32, 8192), (z, 8, 2048), (z, 12, 2048), (Op::Flush, 0, 0)];
    assert_eq!(sent, want);
    assert_eq!(rig.done(), [(4, Status::Unsupported)]);
    rig.serve();
    assert_eq!(rig.done(), [(1, Status::Ok), (2, Status::Ok), (3, Status::Ok)]);
    rig.nothing_left();
}

#[test]
fn forced_writes_say_so() {
    let mut rig = Rig::new(None);
    let out = rig.memory(8192);
    let segments = Segments::from_slice(&[part(&out, 0, 8192)]);
    let r = IoRequest { op: Op::Write, flags: Flags::FUA, lba: 0, blocks: 16, segments, cookie: 1 };
    rig.disks.submit(rig.channel, r).unwrap();
    rig.run();
    assert_eq!(rig.server.queue.iter().map(|s| s.fua).collect::<Vec<_>>(), [true, true], "each part");
    rig.serve();
    assert_eq!(rig.done(), [(1, Status::Ok)]);
}

#[test]
fn a_failed_part_fails_the_request_once() {
    let mut rig = Rig::new(None);
    let out = rig.memory(16384);
    rig.server.depth = 2;
    assert_eq!(rig.submit(Op::Write, 0, 32, &[part(&out, 0, 16384)], 1), Status::Ok);
    rig.run();
    rig.answer(Err(Errno::ENOSPC));
    rig.run();
    assert_eq!((rig.server.queue.len(), rig.done()), (1, vec![]), "its other part is still out");
    rig.answer(Ok(()));
    assert_eq!(rig.done(), [(1, Status::NoSpace)]);
    rig.nothing_left();
}

/// A write that moved to another path; then those that come after it. The way of the path that was lost is 9.
fn failed_over() -> (Rig, std::sync::Arc<Region>) {
    let mut rig = Rig::new(None);
    let out = rig.memory(4096);
    let fence = rig.disks.devices.get(rig.device).unwrap().fence.clone();
    fence.set_hold(Duration::from_secs(40));
    assert_eq!(rig.submit(Op::Write, 8, 8, &[part(&out, 0, 4096)], 1), Status::Ok);
    assert_eq!(rig.submit(Op::Read, 0, 8, &[part(&out, 0, 4096)], 2), Status::Ok);
    rig.run();
    let cookies: Vec<u64> = rig.server.queue.iter().map(|s| s.cookie).collect();
    cookies.into_iter().for_each(|c| rig.disks.failing_over(c, 9));
    rig.serve();
    assert_eq!(rig.done(), [(1, Status::Ok), (2, Status::Ok)]);
    (rig, out)
}

#[test]
fn what_a_lost_path_may_still_write_is_not_overwritten() {
    let (mut rig, out) = failed_over();
    let last = part(&out, 0, 512);
    for (op, block, blocks, segments, cookie) in [
        (Op::Write, 15, 1, &[last][..], 3),
        (Op::Discard, 0, 48, &[], 4),
        // What the read covered, what lies behind, and what changes nothing.
        (Op::Write, 7, 1, &[last], 5),
        (Op::WriteZeroes, 16, 1, &[], 6),
        (Op::Read, 15, 1, &[last], 7),
        (Op::Flush, 0, 0, &[], 8),
    ] {
        assert_eq!(rig.submit(op, block, blocks, segments, cookie), Status::Ok);
    }
    rig.serve();
    assert_eq!(rig.done(), [5, 6, 7, 8].map(|c| (c, Status::Ok)));
    let after = rig.disks.deadline().unwrap() - rig.now;
    assert!(after >= Duration::from_secs(40) && after < Duration::from_secs(45), "{after:?}");
    // The path is back: the server has finished with its former connections.
    rig.disks.devices.get(rig.device).unwrap().fence.lower(9);
    rig.disks.unfence(5);
    rig.serve();
    assert_eq!(rig.done(), [(3, Status::Ok), (4, Status::Ok)]);
    assert_eq!(rig.disks.deadline(), None);
    rig.nothing_left();
}

/// A new write that is divided is no repetition, whatever else is fenced; the rest of a repetition is one.
#[test]
fn only_what_is_repeated_is_fenced() {
    let mut rig = Rig::new(None);
    let long = |epoch, data| Opened { limits: Limits { data, ..limits() }, ..opened(epoch) };
    rig.disks.open(5, long(2, 32 << 10), None);
    let (foreign, out) = (Region::new(16 << 10).unwrap(), rig.memory(4096));
    let fence = rig.disks.devices.get(rig.device).unwrap().fence.clone();
    fence.set_hold(Duration::from_secs(40));
    fence.raise(9, 60 << 10, 512);
    assert_eq!(rig.submit(Op::Write, 0, 32, &[part(&foreign, 0, 16 << 10)], 1), Status::Ok);
    rig.serve();
    assert_eq!(rig.done(), [(1, Status::Ok)]);
    assert_eq!(fence.until(0, 16 << 10, rig.now), None, "it was divided to go by buffers");
    assert_eq!(rig.submit(Op::Write, 32, 8, &[part(&out, 0, 4096)], 2), Status::Ok);
    rig.run();
    rig.lose(0);
    rig.come_back_as(long(3, 1024), None);
    rig.run();
    // Three of its four pieces.
    for _ in 0..3 {
        rig.answer(Ok(()));
    }
    let last = rig.server.queue[0].sector * 512;
    assert!(fence.until(last, 512, rig.now).is_some(), "its last piece is under way");
    rig.serve();
    assert_eq!(rig.done(), [(2, Status::Ok)]);
    rig.nothing_left();
}

#[test]
fn a_fence_ends_with_its_time() {
    let (mut rig, out) = failed_over();
    assert_eq!(rig.submit(Op::Write, 8, 8, &[part(&out, 0, 4096)], 3), Status::Ok);
    // Another way is back, not the lost one.
    rig.disks.devices.get(rig.device).unwrap().fence.lower(8);
    rig.disks.unfence(5);
    rig.now += Duration::from_secs(39);
    rig.serve();
    assert_eq!(rig.done(), []);
    // It began when the repeated write was answered, which was later than the rig's clock says.
    rig.now += Duration::from_secs(10);
    rig.serve();
    assert_eq!(rig.done(), [(3, Status::Ok)]);
    rig.nothing_left();
}

#[test]
fn what_is_fenced_ends_with_its_device_and_its_channel() {
    for reset in [true, false] {
        let (mut rig, out) = failed_over();
        assert_eq!(rig.submit(Op::Write, 8, 8, &[part(&out, 0, 4096)], 3), Status::Ok);
        rig.serve();
        if reset {
            assert_eq!(rig.submit(Op::Reset, 0, 0, &[], 4), Status::Ok);
            assert_eq!(rig.done(), [(3, Status::Aborted), (4, Status::Ok)]);
        } else {
            rig.disks.fail(5, Status::Gone);
            assert_eq!(rig.done(), [(3, Status::Gone)]);
        }
        rig.nothing_left();
        assert_eq!(rig.disks.deadline(), None, "nothing wakes the reactor for it");
    }
}

#[test]
fn what_a_dropped_channel_was_writing_is_fenced_for_a_time() {
    let mut rig = Rig::new(None);
    let out = rig.memory(4096);
    rig.disks.devices.get(rig.device).unwrap().fence.set_hold(Duration::from_secs(10));
    assert_eq!(rig.submit(Op::Write, 8, 8, &[part(&out, 0, 4096)], 1), Status::Ok);
    rig.run();
    let cookie = rig.server.queue.remove(0).cookie;
    let other = rig.disks.open_channel(rig.device, None);
    rig.disks.close_channel(std::mem::replace(&mut rig.channel, other));
    rig.disks.failing_over(cookie, Fence::NO_WAY);
    rig.disks.completed(cookie, Err(Errno::ECANCELED));
    rig.nothing_left();
    assert_eq!(rig.submit(Op::Write, 8, 8, &[part(&out, 0, 4096)], 2), Status::Ok);
    rig.serve();
    assert_eq!(rig.done(), []);
    rig.now += Duration::from_secs(20);
    rig.serve();
    assert_eq!(rig.done(), [(2, Status::Ok)]);
}

#[test]
fn what_a_lost_session_leaves_is_repeated_in_order() {
    let mut rig = Rig::new(None);
    let out = rig.memory(16384);
    fill(&out, 5);
    rig.server.depth = 2;
    for i in 0..4 {
        let segment = part(&out, i * 4096, 4096);
        assert_eq!(rig.submit(Op::Write, i as u64 * 8, 8, &[segment], i as u64), Status::Ok);
    }
    rig.run();
    rig.lose(1);
    rig.run();
    assert!(rig.server.queue.is_empty() && rig.done().is_empty());
    // An opening of before the loss comes late.
    rig.disks.open(5, opened(1), None);
    rig.run();
    assert!(rig.server.queue.is_empty());
    rig.come_back(2, None);
    rig.server.depth = 8;
    rig.run();
    let sectors: Vec<u64> = rig.server.queue.iter().map(|s| s.sector).collect();
    assert_eq!(sectors, [0, 8, 16, 24], "the old ones first");
    rig.serve();
    assert_eq!(rig.done(), (0..4).map(|i| (i, Status::Ok)).collect::<Vec<_>>());
    assert_eq!(&rig.server.disk[..16384], bytes(&out, 16384));
    rig.nothing_left();
}

/// A server that comes back with smaller limits gets what was lost in smaller parts, whatever memory it is in.
#[test]
fn what_a_lost_session_leaves_fits_what_the_server_takes_now() {
    let mut rig = Rig::new(None);
    let (out, back) = (rig.memory(8192), rig.memory(4096));
    let foreign = Region::new(8192).unwrap();
    fill(&out, 5);
    fill(&foreign, 9);
    assert_eq!(rig.submit(Op::Write, 0, 8, &[part(&out, 0, 4096)], 1), Status::Ok);
    assert_eq!(rig.submit(Op::Write, 8, 8, &[part(&foreign, 0, 4096)], 2), Status::Ok);
    assert_eq!(rig.submit(Op::Read, 32, 8, &[part(&back, 0, 4096)], 3), Status::Ok);
    assert_eq!(rig.submit(Op::Discard, 64, 32, &[], 4), Status::Ok);
    rig.server.disk[16384..20480].fill(7);
    rig.server.disk[32768..49152].fill(8);
    rig.run();
    // Cut, and not sent.
    rig.server.depth = rig.server.queue.len();
    assert_eq!(rig.submit(Op::Write, 16, 8, &[part(&out, 4096, 4096)], 5), Status::Ok);
    rig.run();
    rig.lose(0);
    let small = Limits { data: 1024, discard: 512, write_zeroes: 0, secure_erase: 0 };
    rig.server.depth = 3;
    rig.come_back_as(Opened { limits: small, ..opened(2) }, None);
    rig.serve();
    let mut done = rig.done();
    done.sort_unstable_by_key(|d| d.0);
    assert_eq!(done, [1, 2, 3, 4, 5].map(|i| (i, Status::Ok)));
    let want = [&bytes(&out, 4096)[..], &bytes(&foreign, 4096), &bytes(&out, 8192)[4096..]].concat();
    assert_eq!(&rig.server.disk[..12288], want);
    assert_eq!(bytes(&back, 4096), [7; 4096]);
    assert_eq!(rig.server.disk[32768..49152], [0; 16384]);
    rig.nothing_left();
}

#[test]
fn changes_wait_until_no_older_execution_can_be_left() {
    let mut rig = Rig::new(None);
    let (out, back) = (rig.memory(4096), rig.memory(4096));
    assert_eq!(rig.submit(Op::Write, 0, 8, &[part(&out, 0, 4096)], 1), Status::Ok);
    assert_eq!(rig.submit(Op::Read, 8, 8, &[part(&back, 0, 4096)], 2), Status::Ok);
    rig.run();
    rig.lose(0);
    let at = rig.now + Duration::from_secs(30);
    rig.come_back(2, Some(at));
    assert_eq!(rig.submit(Op::Write, 16, 8, &[part(&out, 0, 4096)], 3), Status::Ok);
    rig.run();
    let sent: Vec<_> = rig.server.queue.iter().map(|s| (s.op, s.sector)).collect();
    assert_eq!(sent, [(Op::Read, 8), (Op::Write, 16)], "reads and new writes need not wait");
    assert_eq!(rig.disks.deadline(), Some(at));
    rig.serve();
    assert_eq!(rig.done(), [(2, Status::Ok), (3, Status::Ok)]);
    rig.now = at;
    rig.serve();
    assert_eq!((rig.done(), rig.disks.deadline()), (vec![(1, Status::Ok)], None));
    rig.nothing_left();
}

/// ECONNABORTED without a loss is an answer like others: it must not be repeated for ever.
#[test]
fn a_server_that_answers_econnaborted_fails_the_request() {
    let mut rig = Rig::new(None);
    assert_eq!(rig.submit(Op::Flush, 0, 0, &[], 1), Status::Ok);
    rig.run();
    rig.answer(Err(Errno::ECONNABORTED));
    rig.run();
    assert_eq!(rig.done(), [(1, Status::IoError)]);
    rig.nothing_left();
}

#[test]
fn a_device_that_the_server_does_not_know_waits_to_be_opened_again() {
    let mut rig = Rig::new(None);
    let out = rig.memory(4096);
    for cookie in 0..2 {
        assert_eq!(rig.submit(Op::Write, 0, 8, &[part(&out, 0, 4096)], cookie), Status::Ok);
    }
    rig.run();
    rig.answer(Err(Errno::ENOTCONN));
    rig.answer(Err(Errno::ENOTCONN));
    rig.run();
    assert_eq!((rig.disks.unknown.clone(), rig.server.queue.len()), (vec![(5, 1)], 0));
    rig.come_back(2, None);
    rig.serve();
    assert_eq!(rig.done(), [(0, Status::Ok), (1, Status::Ok)]);
    rig.nothing_left();
}

#[test]
fn waiting_ends_after_fast_io_fail() {
    let mut rig = Rig::new(Some(Duration::from_secs(5)));
    let out = rig.memory(4096);
    assert_eq!(rig.submit(Op::Write, 0, 8, &[part(&out, 0, 4096)], 1), Status::Ok);
    rig.run();
    let lost_at = rig.now;
    rig.lose(0);
    assert_eq!(rig.submit(Op::Flush, 0, 0, &[], 2), Status::Ok);
    assert_eq!(rig.disks.deadline(), Some(lost_at + Duration::from_secs(5)));
    rig.now += Duration::from_millis(4999);
    rig.run();
    assert_eq!(rig.done(), []);
    rig.now += Duration::from_millis(1);
    rig.run();
    assert_eq!(rig.done(), [(1, Status::TimedOut), (2, Status::TimedOut)]);
    assert_eq!((rig.submit(Op::Flush, 0, 0, &[], 3), rig.disks.deadline()), (Status::TimedOut, None));
    rig.nothing_left();
    rig.come_back(2, None);
    assert_eq!(rig.submit(Op::Flush, 0, 0, &[], 4), Status::Ok);
    rig.serve();
    assert_eq!(rig.done(), [(4, Status::Ok)]);
}

#[test]
fn a_device_that_is_given_up_fails_everything_until_revived() {
    let mut rig = Rig::new(None);
    assert_eq!(rig.submit(Op::Flush, 0, 0, &[], 1), Status::Ok);
    rig.run();
    rig.lose(0);
    rig.disks.fail(5, Status::Gone);
    assert_eq!((rig.done(), rig.submit(Op::Flush, 0, 0, &[], 2)), (vec![(1, Status::Gone)], Status::Gone));
    rig.disks.revive(5, rig.now);
    assert_eq!(rig.submit(Op::Flush, 0, 0, &[], 3), Status::Ok);
    rig.come_back(2, None);
    rig.serve();
    assert_eq!(rig.done(), [(3, Status::Ok)]);
    rig.nothing_left();
}

#[test]
fn reset_ends_what_waits_and_leaves_what_is_out() {
    let mut rig = Rig::new(None);
    let out = rig.memory(16384);
    rig.server.depth = 1;
    assert_eq!(rig.submit(Op::Write, 0, 8, &[part(&out, 0, 4096)], 1), Status::Ok);
    assert_eq!(rig.submit(Op::Write, 8, 8, &[part(&out, 0, 4096)], 2), Status::Ok);
    rig.run();
    assert_eq!(rig.submit(Op::Reset, 0, 0, &[], 3), Status::Ok);
    assert_eq!(rig.done(), [(2, Status::Aborted), (3, Status::Ok)]);
    // It is not repeated either: whoever resets does not want it any more.
    rig.lose(0);
    assert_eq!(rig.done(), [(1, Status::Aborted)]);
    rig.nothing_left();
}

#[test]
fn a_closed_channel_takes_its_device_along() {
    let mut rig = Rig::new(None);
    let out = rig.memory(8192);
    rig.server.depth = 1;
    assert_eq!(rig.submit(Op::Write, 0, 16, &[part(&out, 0, 8192)], 1), Status::Ok);
    rig.run();
    rig.disks.close_channel(rig.channel);
    assert_eq!(rig.submit(Op::Flush, 0, 0, &[], 2), Status::Gone);
    assert_eq!(rig.disks.devices.len(), 1, "a part is out");
    rig.answer(Ok(()));
    assert_eq!((rig.disks.devices.len(), rig.disks.channels.len(), rig.disks.requests.len()), (0, 0, 0));
    rig.disks.open(5, opened(2), None);
    rig.run();
}

#[test]
fn a_channel_takes_so_many_and_no_more() {
    let mut rig = Rig::new(None);
    for cookie in 0..MAX_REQUESTS as u64 {
        assert_eq!(rig.submit(Op::Flush, 0, 0, &[], cookie), Status::Ok);
    }
    assert_eq!(rig.submit(Op::Flush, 0, 0, &[], 9999), Status::Busy);
    rig.serve();
    assert_eq!(rig.done().len(), MAX_REQUESTS);
    assert_eq!(rig.submit(Op::Flush, 0, 0, &[], 9999), Status::Ok);
}

/// What may happen next in the random test.
#[derive(Clone, Debug)]
enum Step {
    Write { block: u64, blocks: u64, shape: usize },
    Read { block: u64, blocks: u64, shape: usize },
    Zero { block: u64, blocks: u64 },
    Flush,
    Answer(usize),
    Lose(usize),
    Open { data: u32 },
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..100u64, 1..28u64, 0..4usize);
    prop_oneof![
        4 => range().prop_map(|(block, blocks, shape)| Step::Write { block, blocks, shape }),
        4 => range().prop_map(|(block, blocks, shape)| Step::Read { block, blocks, shape }),
        1 => range().prop_map(|(block, blocks, _)| Step::Zero { block, blocks }),
        1 => Just(Step::Flush),
        8 => (0..8usize).prop_map(Step::Answer),
        1 => (0..8usize).prop_map(Step::Lose),
        2 => (1..10u32).prop_map(|blocks| Step::Open { data: blocks * 512 }),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// Losses, resets and answers in any order: every request completes exactly once; a block that only completed
    /// writes touch holds the last of them; reads bring what was there.
    #[test]
    fn every_request_completes_once_and_blocks_hold_the_last_write(steps in prop::collection::vec(step(), 1..120)) {
        Model::new().play(&steps)?;
    }
}

/// What each request was, and what blocks may hold.
struct Model {
    rig: Rig,
    epoch: u64,
    up: bool,
    next: u64,
    /// By cookie: range, memory and, for writes, what they put into each block.
    open: std::collections::HashMap<u64, Pending>,
    /// Contents of blocks that are known: `None` while a change is under way or of unknown outcome.
    known: Vec<Option<u8>>,
    /// Changes under way by block.
    changing: Vec<u32>,
    /// Blocks with changes that ran side by side.
    mixed: Vec<bool>,
}

struct Pending {
    op: Op,
    range: std::ops::Range<usize>,
    value: u8,
    /// What the blocks of a read held when it began, where nothing changed them since.
    expect: Vec<Option<u8>>,
    memory: std::sync::Arc<Region>,
    list: Vec<(usize, usize)>,
}

impl Model {
    fn new() -> Self {
        let mut rig = Rig::new(None);
        rig.server.depth = 5;
        Self {
            rig,
            epoch: 1,
            up: true,
            next: 0,
            open: std::collections::HashMap::new(),
            known: vec![Some(0); 128],
            changing: vec![0; 128],
            mixed: vec![false; 128],
        }
    }

    fn play(mut self, steps: &[Step]) -> Result<(), TestCaseError> {
        for step in steps {
            match *step {
                Step::Write { block, blocks, shape } => self.submit(Op::Write, block, blocks, shape),
                Step::Read { block, blocks, shape } => self.submit(Op::Read, block, blocks, shape),
                Step::Zero { block, blocks } => self.submit(Op::WriteZeroes, block, blocks, 0),
                Step::Flush => self.submit(Op::Flush, 0, 0, 0),
                Step::Answer(n) => self.answer(n),
                Step::Lose(n) if self.up => {
                    self.up = false;
                    self.rig.lose(n);
                }
                Step::Open { data } if !self.up => self.open(data),
                Step::Reset => self.reset(),
                Step::Lose(_) | Step::Open { .. } => {}
            }
            self.rig.run();
            self.collect()?;
        }
        if !self.up {
            self.open(limits().data);
        }
        self.rig.serve();
        self.collect()?;
        prop_assert!(self.open.is_empty(), "never completed: {:?}", self.open.keys());
        self.rig.nothing_left();
        for (block, known) in self.known.iter().enumerate() {
            let disk = self.rig.server.disk[block * 512];
            prop_assert!(known.is_none_or(|k| k == disk), "block {block}: {disk}, not {known:?}");
        }
        Ok(())
    }

    fn open(&mut self, data: u32) {
        self.up = true;
        self.epoch += 1;
        let zero = data.min(limits().write_zeroes);
        let limits = Limits { data, write_zeroes: zero, ..limits() };
        self.rig.come_back_as(Opened { limits, ..opened(self.epoch) }, None);
    }

    fn answer(&mut self, n: usize) {
        if n < self.rig.server.queue.len() {
            let s = self.rig.server.queue.remove(n);
            self.rig.server.execute(&s);
            self.rig.disks.completed(s.cookie, Ok(()));
        }
    }

    fn reset(&mut self) {
        let cookie = self.next;
        self.next += 1;
        let (memory, list) = (Region::new(1).unwrap(), Vec::new());
        let (range, expect) = (0..0, Vec::new());
        self.open.insert(cookie, Pending { op: Op::Reset, range, value: 0, expect, memory, list });
        assert_eq!(self.rig.submit(Op::Reset, 0, 0, &[], cookie), Status::Ok);
    }

    fn submit(&mut self, op: Op, block: u64, blocks: u64, shape: usize) {
        let cookie = self.next;
        self.next += 1;
        let (len, value) = (blocks as usize * 512, (cookie % 250) as u8 + 1);
        let value = if op == Op::WriteZeroes { 0 } else { value };
        let list: Vec<(usize, usize)> = match shape {
            _ if !op.has_data() => Vec::new(),
            0 => vec![(0, len)],
            1 => vec![(0, 256), (1024, len - 256)],
            _ => (0..blocks as usize).map(|i| (i * 1024, 512)).collect(),
        };
        let room = 2 * len + 2048;
        let memory = if shape == 3 { Region::new(room).unwrap() } else { self.rig.memory(room) };
        assert!(memory.copy_in(0, &vec![value; room]));
        let segments: Vec<Segment> = list.iter().map(|&(at, len)| part(&memory, at, len)).collect();
        let range = block as usize..(block + blocks) as usize;
        if op.modifies() {
            for b in range.clone() {
                self.mixed[b] = self.changing[b] > 0;
                self.changing[b] += 1;
                self.known[b] = None;
                // A read under way may see either.
                self.forget_reads(b);
            }
        }
        let expect = range.clone().map(|b| self.known[b]).collect();
        self.open.insert(cookie, Pending { op, range, value, expect, memory, list });
        let status = self.rig.submit(op, block, blocks, &segments, cookie);
        assert_eq!(status, Status::Ok);
    }

    fn forget_reads(&mut self, block: usize) {
        for p in self.open.values_mut().filter(|p| p.op == Op::Read && p.range.contains(&block)) {
            p.expect[block - p.range.start] = None;
        }
    }

    fn collect(&mut self) -> Result<(), TestCaseError> {
        for (cookie, status) in self.rig.done() {
            let Some(p) = self.open.remove(&cookie) else {
                return Err(TestCaseError::fail(format!("cookie {cookie} completed twice")));
            };
            prop_assert!(matches!(status, Status::Ok | Status::Aborted), "{status:?}");
            if p.op.modifies() {
                for b in p.range.clone() {
                    self.changing[b] -= 1;
                    let alone = self.changing[b] == 0 && !self.mixed[b];
                    self.known[b] = (alone && status == Status::Ok).then_some(p.value);
                }
            }
            if p.op == Op::Read && status == Status::Ok {
                check_read(&p)?;
            }
        }
        Ok(())
    }
}

fn check_read(p: &Pending) -> Result<(), TestCaseError> {
    let mut all = vec![0; p.memory.len()];
    assert!(p.memory.copy_out(0, &mut all));
    let got: Vec<u8> = p.list.iter().flat_map(|&(at, len)| all[at..at + len].to_vec()).collect();
    for (i, expect) in p.expect.iter().enumerate() {
        let block = &got[i * 512..(i + 1) * 512];
        let same = expect.is_none_or(|e| block.iter().all(|b| *b == e));
        prop_assert!(same, "block {}: {:?}, not {expect:?}", p.range.start + i, &block[..4]);
    }
    Ok(())
}
