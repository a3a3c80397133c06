//! Much data, over every kind of path and with every option.

#[path = "../../verbs/tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{CAPS, End, IN, OUT, Setup, World, pair};
use soft_roce::{Options, SoftRoce};
use verbs::*;

const MESSAGE: u32 = 60_001;

const DEEP: QpCaps = QpCaps { max_send_wr: 64, max_recv_wr: 64, ..CAPS };

/// Two addresses of the caller's own.
fn ips() -> String {
    common::ips(test_support::network())
}

fn pattern(number: u32) -> Vec<u8> {
    (0..MESSAGE).map(|i| (i.wrapping_mul(number | 1) >> 3) as u8 ^ number as u8).collect()
}

/// Takes turns by hand: no progress thread.
fn connected(options: Options, ips: &str, port: u16) -> (End, End) {
    let host = SoftRoce::new(options).unwrap();
    let world = World::new(move || host.cm().unwrap(), ips);
    pair(&world, &Setup { caps: DEEP, cqe: 256, ..Setup::new(port) })
}

/// The receiving side on a thread of its own, until it is stopped.
struct Receiver {
    thread: thread::JoinHandle<End>,
    stop: Arc<AtomicBool>,
}

/// Takes `count` messages, with a `pause` between polls, and goes on polling: acknowledgements need it.
fn receive(mut server: End, count: u32, pause: Duration, check: bool) -> Receiver {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    for wr_id in 0..32 {
        server.recv(wr_id, 0);
    }
    let thread = thread::spawn(move || {
        let mut next = 0;
        while !stopped.load(Ordering::Relaxed) {
            let mut out = [Wc::default(); 32];
            let n = server.cq.poll(&mut out).unwrap();
            for wc in &out[..n] {
                assert_eq!((wc.status, wc.op), (WcStatus::Success, WcOp::RecvWriteImm));
                assert_eq!((wc.imm, wc.byte_len), (Some(next), MESSAGE));
                if check {
                    assert!(server.bytes(IN, MESSAGE as usize) == pattern(next), "message {next}");
                }
                next += 1;
                server.recv(0, 0);
            }
            if !pause.is_zero() {
                thread::sleep(pause);
            }
        }
        assert_eq!(next, count);
        server
    });
    Receiver { thread, stop }
}

/// Sends `count` messages, `depth` at a time.
fn send(client: &mut End, to: (u64, u32), count: u32, depth: u32) {
    let (addr, rkey) = to;
    let (mut posted, mut done) = (0, 0);
    let (start, patience) = (Instant::now(), test_support::patience());
    while done < count {
        while posted < count && posted - done < depth {
            client.fill(OUT, &pattern(posted));
            client.post(u64::from(posted), SendOp::WriteImm { addr, rkey, imm: posted }, MESSAGE);
            posted += 1;
        }
        let mut out = [Wc::default(); 32];
        let n = client.cq.poll(&mut out).unwrap();
        for wc in &out[..n] {
            assert_eq!((wc.status, wc.wr_id), (WcStatus::Success, u64::from(done)));
            done += 1;
        }
        assert!(start.elapsed() < patience, "stuck after {done} of {count}");
    }
}

impl Receiver {
    fn finish(self) -> End {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn verified(options: Options, ips: &str, port: u16, count: u32) -> (End, End) {
    let (server, mut client) = connected(options, ips, port);
    let to = (server.addr(IN), server.mr.rkey());
    let server = receive(server, count, Duration::ZERO, true);
    // One at a time: the next would overwrite it.
    send(&mut client, to, count, 1);
    (server.finish(), client)
}

fn counter(end: &End, name: &str) -> u64 {
    let mut value = 0;
    end.device.counters(&mut |n, v| value += if n == name { v } else { 0 });
    value
}

#[test]
fn bytes_arrive_right_with_and_without_segmentation() {
    for segmentation in [true, false] {
        let options = Options { segmentation, ..Options::default() };
        let (server, client) = verified(options, &ips(), 7100, 60);
        for end in [&server, &client] {
            for name in ["rx_drop_icrc", "rx_drop_source", "rx_drop_short", "rx_forwarded"] {
                assert_eq!(counter(end, name), 0, "{name}");
            }
        }
    }
}

#[test]
fn bytes_arrive_right_over_ipv6() {
    if std::net::UdpSocket::bind("[::1]:0").is_err() {
        eprintln!("skipped: this system has no IPv6 loopback address");
        return;
    }
    verified(Options::default(), "::1,::1", 7101, 60);
}

#[test]
fn messages_in_flight_arrive_in_order() {
    let (server, mut client) = connected(Options::default(), &ips(), 7102);
    let to = (server.addr(IN), server.mr.rkey());
    let server = receive(server, 1000, Duration::ZERO, false);
    send(&mut client, to, 1000, 16);
    server.finish();
}

/// A receiver that sleeps most of the time, behind a buffer of a few packets: slow, but it goes on.
#[test]
fn a_slow_receiver_is_not_overrun_for_ever() {
    let options = Options { receive_buffer: 20_000, segmentation: false, ..Options::default() };
    let (server, mut client) = connected(options, &ips(), 7103);
    let to = (server.addr(IN), server.mr.rkey());
    let server = receive(server, 100, Duration::from_millis(1), false);
    send(&mut client, to, 100, 16);
    let server = server.finish();
    // The buffer was too small indeed, or this showed nothing.
    assert!(counter(&server, "rx_overflow") > 0);
    // The window finds its size, however often either side is held up: else each packet would be sent for ever.
    let retransmits = counter(&client, "tx_retransmits");
    println!("{retransmits} retransmissions of 1500 packets");
    assert!(retransmits < 20 * 1500, "{retransmits}");
}

/// Both ends sleep on their descriptors instead of spinning.
#[test]
fn sleeping_ends_wake_each_other() {
    let (mut server, mut client) = connected(Options::default(), &ips(), 7104);
    fn wait(end: &mut End) -> Wc {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        loop {
            let mut out = [Wc::default()];
            if end.cq.poll(&mut out).unwrap() == 1 {
                return out[0];
            }
            end.cq.arm().unwrap();
            if end.cq.poll(&mut out).unwrap() == 1 {
                return out[0];
            }
            // SAFETY: the queue that owns it lives in `end`.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(end.cq.wait_fd()) };
            let patience = Timespec::try_from(test_support::patience()).unwrap();
            assert_eq!(
                poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)),
                Ok(1),
                "nobody woke us"
            );
        }
    }
    server.recv(1, 64);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let echo = thread::spawn(move || {
        for _ in 0..200 {
            while wait(&mut server).op != WcOp::Recv {}
            server.recv(1, 64);
            server.post(2, SendOp::Send, 8);
        }
        // The last request's acknowledgement is still owed, and the last answer's has yet to come.
        while !stopped.load(Ordering::Relaxed) {
            server.cq.poll(&mut [Wc::default()]).unwrap();
        }
        server
    });
    let timeouts = |end: &End| counter(end, "ack_timeouts");
    let start = Instant::now();
    for _ in 0..200 {
        client.recv(1, 64);
        client.post(2, SendOp::Send, 8);
        let ops = [wait(&mut client).op, wait(&mut client).op];
        assert!(ops.contains(&WcOp::Recv) && ops.contains(&WcOp::Send));
    }
    println!("200 round trips in {:?}", start.elapsed());
    stop.store(true, Ordering::Relaxed);
    let server = echo.join().unwrap();
    // Answers must not hang on timers; a few do where one side is held up.
    let late = timeouts(&client) + timeouts(&server);
    assert!(late < 50, "{late} of 400 messages were waited for until a timer woke somebody");
}

/// Who posts after arming, and then sleeps, is woken to send it.
#[test]
fn posting_after_arming_wakes_the_sender() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let (mut server, mut client) = connected(Options::default(), &ips(), 7108);
    server.recv(1, 64);
    client.cq.arm().unwrap();
    assert_eq!(client.cq.poll(&mut [Wc::default()]).unwrap(), 0);
    client.post(2, SendOp::Send, 8);
    // SAFETY: the queue that owns it lives in `client`.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(client.cq.wait_fd()) };
    let patience = Timespec::try_from(test_support::patience()).unwrap();
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)), Ok(1));
    assert_eq!(client.cq.poll(&mut [Wc::default()]).unwrap(), 0);
    assert_eq!(server.wc().wr_id, 1);
}

#[test]
fn two_queues_of_one_address_work_side_by_side() {
    let (host, ips) = (SoftRoce::new(Options::default()).unwrap(), ips());
    let run = |port: u16| {
        let (host, ips) = (host.clone(), ips.clone());
        thread::spawn(move || {
            let world = World::new(move || host.cm().unwrap(), &ips);
            let (server, mut client) = pair(&world, &Setup { caps: DEEP, cqe: 256, ..Setup::new(port) });
            let to = (server.addr(IN), server.mr.rkey());
            let server = receive(server, 40, Duration::ZERO, true);
            send(&mut client, to, 40, 1);
            server.finish()
        })
    };
    let threads = [run(7105), run(7106), run(7107)];
    for thread in threads {
        assert_eq!(counter(&thread.join().unwrap(), "rx_drop_qpn"), 0);
    }
}
