//! A client on the other end of a socket, and a device in memory that answers in any order.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use iobuf::Registry;
use nbd_poll::{Buffers, Connection, End, Incoming, MAX_IN_FLIGHT, socket_pair};
use nbd_proto::request::{Command, Export};
use nbd_proto::wire::{
    ErrorCode, REQUEST_MAGIC, RequestHeader, SIMPLE_REPLY_MAGIC, SimpleReply, TransmissionFlags, cmd,
};
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec};
use zerocopy::{FromBytes, IntoBytes};

const SIZE: usize = 8 << 20;

fn export() -> Export {
    let flags = TransmissionFlags(0b1_0110_1101);
    Export { size: SIZE as u64, block_size: 512, any_range: false, max_payload: 4 << 20, flags }
}

fn header(command: u16, cookie: u64, offset: usize, length: usize) -> RequestHeader {
    RequestHeader {
        magic: REQUEST_MAGIC.into(),
        flags: 0.into(),
        command: command.into(),
        cookie: cookie.into(),
        offset: (offset as u64).into(),
        length: (length as u32).into(),
    }
}

/// The server with its device.
struct Bench {
    connection: Connection,
    buffers: Buffers,
    disk: Vec<u8>,
    held: Vec<Incoming>,
    client: UnixStream,
    /// What the client still has to send, and what it has got.
    to_send: Vec<u8>,
    got: Vec<u8>,
    most_in_flight: usize,
}

impl Bench {
    fn new() -> Self {
        Self::sharing(Buffers::new(&Registry::default()).unwrap())
    }

    fn sharing(buffers: Buffers) -> Self {
        let (ours, theirs): (OwnedFd, OwnedFd) = socket_pair().unwrap();
        let client = UnixStream::from(theirs);
        client.set_nonblocking(true).unwrap();
        let connection = Connection::new(ours, export(), buffers.clone()).unwrap();
        let disk = (0..SIZE).map(|i| (i / 512 * 7 + i) as u8).collect();
        Self {
            connection,
            buffers,
            disk,
            held: Vec::new(),
            client,
            to_send: Vec::new(),
            got: Vec::new(),
            most_in_flight: 0,
        }
    }

    /// The device does its work on one request.
    fn execute(&mut self, i: Incoming) {
        let at = i.request.offset() as usize;
        let mut disk = self.disk.get_mut(at..at + i.request.len() as usize).expect("checked");
        match i.request.command() {
            Command::WriteZeroes { .. } => disk.fill(0),
            command => {
                for s in &i.segments {
                    let (now, later) = disk.split_at_mut(s.len as usize);
                    // SAFETY: the connection keeps the memory until the reply below; nobody else touches it.
                    let memory = unsafe { std::slice::from_raw_parts_mut(s.as_ptr(), s.len as usize) };
                    if command == Command::Read {
                        memory.copy_from_slice(now)
                    } else {
                        now.copy_from_slice(memory)
                    }
                    disk = later;
                }
                assert!(i.segments.is_empty() || disk.is_empty(), "segments cover the range");
            }
        }
        self.connection.reply(i.id, Ok(()));
    }

    /// One turn of the server; `order` chooses which of the held requests end, `keep` how many stay.
    fn turn(&mut self, order: usize, keep: usize) -> bool {
        let mut new = Vec::new();
        let mut busy = self.connection.receive(&mut new);
        self.held.append(&mut new);
        self.most_in_flight = self.most_in_flight.max(self.connection.in_flight());
        while self.held.len() > keep {
            let request = self.held.swap_remove(order % self.held.len());
            self.execute(request);
            busy = true;
        }
        self.connection.send();
        busy
    }

    /// The client sends and receives at most so much at a time.
    fn client_turn(&mut self, out: usize, max_in: usize) -> bool {
        let mut busy = false;
        if !self.to_send.is_empty() {
            match self.client.write(&self.to_send[..out.min(self.to_send.len())]) {
                Ok(n) => {
                    self.to_send.drain(..n);
                    busy = true;
                }
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
        let mut buffer = vec![0; max_in];
        match self.client.read(&mut buffer) {
            Ok(n) => {
                self.got.extend_from_slice(&buffer[..n]);
                busy |= n > 0;
            }
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        busy
    }

    fn run(&mut self, out: usize, max_in: usize) {
        let (mut order, mut idle) = (1, 0);
        // What a server's turn sends shows in the client's next one.
        while idle < 2 {
            let busy = self.client_turn(out, max_in) | self.turn(order, 0);
            idle = if busy { 0 } else { idle + 1 };
            order = (order * 31 + 7) % 1009;
        }
    }

    /// The replies, each with the data that `len_of` says it has.
    fn replies(&mut self, len_of: impl Fn(u64) -> usize) -> Vec<(u64, u32, Vec<u8>)> {
        let mut rest = &std::mem::take(&mut self.got)[..];
        let mut replies = Vec::new();
        while !rest.is_empty() {
            let (reply, after) = SimpleReply::read_from_prefix(rest).unwrap();
            assert_eq!(reply.magic.get(), SIMPLE_REPLY_MAGIC);
            let len = if reply.error.get() == 0 { len_of(reply.cookie.get()) } else { 0 };
            replies.push((reply.cookie.get(), reply.error.get(), after[..len].to_vec()));
            rest = &after[len..];
        }
        replies
    }
}

#[test]
fn writes_then_reads_of_every_size() {
    let mut b = Bench::new();
    let sizes = [512, 4096, 16384, 16896, 131_072, 131_584, 1 << 20, (1 << 20) + 512, 4 << 20];
    for (n, size) in sizes.into_iter().enumerate() {
        let data: Vec<u8> = (0..size).map(|i| (i * 13 + n) as u8).collect();
        b.to_send.extend_from_slice(header(cmd::WRITE, n as u64, 512, size).as_bytes());
        b.to_send.extend_from_slice(&data);
        b.run(1 << 16, 1 << 16);
        assert_eq!(b.replies(|_| 0), [(n as u64, 0, vec![])]);
        assert_eq!(b.disk[512..512 + size], data);
        b.to_send.extend_from_slice(header(cmd::READ, 77, 512, size).as_bytes());
        b.run(1 << 16, 1 << 16);
        assert!(b.replies(|_| size) == [(77, 0, data)], "{size}");
    }
    assert_eq!(b.buffers.in_use(), (0, 0));
}

#[test]
fn a_flood_is_taken_in_portions() {
    let mut b = Bench::new();
    for n in 0..1000 {
        b.to_send.extend_from_slice(header(cmd::READ, n, 0, 131_072).as_bytes());
    }
    // The device holds everything back: memory bounds what is taken.
    b.client_turn(usize::MAX, 1);
    for _ in 0..100 {
        b.turn(0, usize::MAX);
    }
    assert_eq!(b.held.len(), 64);
    assert!(!b.connection.before_sleep(), "nothing to do until a request is answered");
    // The client does not read: the socket is full, then room comes back.
    b.run(1 << 20, 1 << 20);
    assert_eq!(b.replies(|_| 131_072).len(), 1000);
    // Requests without data are bounded by their number.
    for n in 0..1000 {
        b.to_send.extend_from_slice(header(cmd::WRITE_ZEROES, n, 0, 512).as_bytes());
    }
    b.client_turn(usize::MAX, 1);
    for _ in 0..100 {
        b.turn(0, usize::MAX);
    }
    assert_eq!(b.held.len(), MAX_IN_FLIGHT);
    b.run(1 << 20, 1 << 20);
    assert_eq!(b.replies(|_| 0).len(), 1000);
    assert_eq!(b.most_in_flight, MAX_IN_FLIGHT);
}

#[test]
fn a_blocked_socket_loses_nothing() {
    let mut b = Bench::new();
    for n in 0..64 {
        b.to_send.extend_from_slice(header(cmd::READ, n, n as usize * 512, 131_072).as_bytes());
    }
    b.client_turn(usize::MAX, 1);
    // Everything is answered before the client reads a byte.
    for _ in 0..20 {
        b.turn(3, 0);
    }
    assert!(!b.connection.before_sleep(), "waits for the client");
    while b.client_turn(1, 1000) | b.turn(5, 0) {}
    let replies = b.replies(|_| 131_072);
    assert_eq!(replies.len(), 64);
    for (cookie, error, data) in replies {
        assert_eq!(error, 0);
        assert!(data == b.disk[cookie as usize * 512..][..131_072]);
    }
}

/// A server that sleeps whenever it may is woken for everything that can go on.
#[test]
fn sleep_loses_nothing() {
    for len in [512, 131_072, 524_288, 2 << 20] {
        let mut b = Bench::new();
        let count = (32 << 20 >> 19).max((16 << 20) / len).min(1000) as u64;
        for n in 0..count {
            b.to_send.extend_from_slice(header(cmd::READ, n, 0, len).as_bytes());
        }
        let (mut got, mut asleep) = (0, 0);
        while asleep < 2 {
            // The client reads in bursts, so that the socket is full in between.
            let mut busy = false;
            while b.client_turn(1 << 16, 1 << 20) {
                busy = true;
            }
            got += std::mem::take(&mut b.got).len();
            let fd = b.connection.wait_fd();
            // SAFETY: the connection keeps its descriptor open meanwhile.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let mut ready = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            let woken = rustix::event::poll(&mut ready, Some(&Timespec::default())).unwrap() > 0;
            if woken {
                while b.turn(7, 0) || b.connection.before_sleep() {}
            }
            asleep = if busy || woken { 0 } else { asleep + 1 };
        }
        assert_eq!(got, count as usize * (len + 16), "requests of {len} bytes");
    }
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let mut slow = Bench::new();
    let mut other = Bench::sharing(slow.buffers.clone());
    for n in 0..200 {
        slow.to_send.extend_from_slice(header(cmd::READ, n, 0, 131_072).as_bytes());
    }
    slow.client_turn(usize::MAX, 1);
    for _ in 0..100 {
        slow.turn(0, 0);
    }
    let (_, large) = slow.buffers.in_use();
    assert_eq!(large, 64, "all answers wait for their reader");
    for (n, len) in [(1, 131_072), (2, 512), (3, 1 << 20)] {
        other.to_send.extend_from_slice(header(cmd::READ, n, 0, len).as_bytes());
    }
    other.run(1 << 16, 1 << 16);
    let len_of = |cookie| [0, 131_072, 512, 1 << 20][cookie as usize];
    let mut cookies: Vec<u64> = other.replies(len_of).iter().map(|r| r.0).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, [1, 2, 3]);
    slow.run(1 << 20, 1 << 20);
    assert_eq!(slow.replies(|_| 131_072).len(), 200);
    assert_eq!(slow.buffers.in_use(), (0, 0));
}

#[test]
fn errors_are_answered_and_the_payload_of_a_refused_write_is_skipped() {
    let mut b = Bench::new();
    b.to_send.extend_from_slice(header(cmd::WRITE, 1, SIZE, 9000 / 512 * 512).as_bytes());
    b.to_send.extend_from_slice(&[9; 9000 / 512 * 512]);
    b.to_send.extend_from_slice(header(cmd::READ, 2, 1, 512).as_bytes());
    b.to_send.extend_from_slice(header(cmd::READ, 3, 0, 512).as_bytes());
    b.client_turn(usize::MAX, 1);
    b.turn(0, usize::MAX);
    let held = b.held.pop().unwrap();
    b.connection.reply(held.id, Err(ErrorCode::Eio));
    b.run(100, 100);
    assert_eq!(b.replies(|_| 0), [(1, 28, vec![]), (2, 22, vec![]), (3, 5, vec![])]);
}

#[test]
fn a_disconnect_waits_for_what_is_in_flight() {
    let mut b = Bench::new();
    b.to_send.extend_from_slice(header(cmd::READ, 1, 0, 512).as_bytes());
    b.to_send.extend_from_slice(header(cmd::DISC, 0, 0, 0).as_bytes());
    b.client_turn(usize::MAX, 1);
    b.turn(0, usize::MAX);
    assert!(matches!(b.connection.end(), Some(End::Disconnect)) && !b.connection.is_done());
    b.turn(0, 0);
    b.client_turn(1, 1000);
    assert_eq!(b.replies(|_| 512).len(), 1);
    assert!(b.connection.is_done());
}

#[test]
fn a_client_that_vanishes_takes_its_answers_along() {
    for (sent, truncated) in [(28, false), (20, true), (28 + 28 + 100, true)] {
        let mut b = Bench::new();
        let mut bytes = header(cmd::READ, 1, 0, 131_072).as_bytes().to_vec();
        bytes.extend_from_slice(header(cmd::WRITE, 2, 0, 512).as_bytes());
        bytes.resize(1000, 1);
        b.client.write_all(&bytes[..sent]).unwrap();
        b.turn(0, usize::MAX);
        b.client.shutdown(std::net::Shutdown::Both).unwrap();
        b.turn(0, usize::MAX);
        let end = b.connection.end();
        assert_eq!(matches!(end, Some(End::Truncated)), truncated, "{end:?}");
        assert_eq!(matches!(end, Some(End::Closed)), !truncated, "{end:?}");
        assert_eq!(b.connection.in_flight(), b.held.len());
        b.turn(0, 0);
        assert!(b.connection.is_done() && !b.connection.before_sleep());
        assert_eq!(b.buffers.in_use(), (0, 0));
    }
}

#[test]
fn garbage_ends_the_connection() {
    let mut b = Bench::new();
    b.client.write_all(&[0; 64]).unwrap();
    b.turn(0, 0);
    assert!(matches!(b.connection.end(), Some(End::Violation(_))));
}

#[test]
fn the_descriptor_fires_for_what_is_wanted() {
    use rustix::event::{PollFd, PollFlags, poll};
    use std::os::fd::BorrowedFd;
    let mut b = Bench::new();
    let fd = b.connection.wait_fd();
    let fires = || {
        // SAFETY: the connection that owns the descriptor lives until the end of the test.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&rustix::time::Timespec::default()))
            .unwrap()
            == 1
    };
    assert!(!b.connection.before_sleep() && !fires());
    b.client.write_all(header(cmd::READ, 1, 0, 4 << 20).as_bytes()).unwrap();
    assert!(fires());
    b.turn(0, 0);
    assert!(!b.connection.before_sleep() && !fires(), "full socket");
    while b.client_turn(1, 1 << 20) {}
    assert!(fires(), "room in the socket");
    b.run(1, 1 << 20);
    assert_eq!(b.replies(|_| 4 << 20).len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Disjoint ranges, so that the order of execution does not matter: every request is answered once, and the disk
    /// holds what was written.
    #[test]
    fn any_mixture_in_any_pieces(
        requests in prop::collection::vec((0u16..3, 1usize..40), 1..60),
        out in 1usize..5000,
        max_in in 100usize..5000,
        keep in 0usize..20,
    ) {
        let mut b = Bench::new();
        let mut wanted = b.disk.clone();
        for (n, (kind, blocks)) in requests.iter().enumerate() {
            let (at, len) = (n * 65536, blocks * 512);
            match kind {
                0 => b.to_send.extend_from_slice(header(cmd::READ, n as u64, at, len).as_bytes()),
                1 => {
                    b.to_send.extend_from_slice(header(cmd::WRITE, n as u64, at, len).as_bytes());
                    b.to_send.extend(std::iter::repeat_n(n as u8, len));
                    wanted[at..at + len].fill(n as u8);
                }
                _ => {
                    b.to_send.extend_from_slice(header(cmd::WRITE_ZEROES, n as u64, at, len).as_bytes());
                    wanted[at..at + len].fill(0);
                }
            }
        }
        for order in 0..10 {
            b.client_turn(out, max_in);
            b.turn(order * 7, keep);
        }
        b.run(out, max_in);
        let mut replies = b.replies(|n| if requests[n as usize].0 == 0 { requests[n as usize].1 * 512 } else { 0 });
        replies.sort();
        prop_assert_eq!(replies.len(), requests.len());
        for (n, (cookie, error, data)) in replies.into_iter().enumerate() {
            prop_assert_eq!((cookie, error), (n as u64, 0));
            prop_assert!(data == wanted[n * 65536..][..data.len()]);
        }
        prop_assert!(b.disk == wanted);
        prop_assert_eq!(b.buffers.in_use(), (0, 0));
    }
}
