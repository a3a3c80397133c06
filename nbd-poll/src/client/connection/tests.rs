//! A connection over a real socket, with a server that is a script.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use iobuf::Region;
use nbd_proto::client::Agreed;
use nbd_proto::wire::{SIMPLE_REPLY_MAGIC, TransmissionFlags};

use super::*;
use crate::client::dial::Address;
use crate::stream::Stream;

/// A connection with its server, and memory with a guard on both sides.
struct Rig {
    client: Connection,
    server: UnixStream,
    memory: Arc<Region>,
    done: Vec<Done>,
    now: Instant,
}

const GUARD: usize = 4096;
const ROOM: usize = 1 << 20;

impl Rig {
    fn new(framing: Framing) -> Self {
        let (ours, server) = UnixStream::pair().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let agreed = Agreed {
            style: "test",
            tls: false,
            framing,
            size: 1 << 30,
            flags: TransmissionFlags(0),
            sizes: None,
            contexts: Vec::new(),
        };
        let pipe = Pipe::Plain(Stream::new(ours.into()).unwrap());
        let now = Instant::now();
        let dialled = Dialled { pipe, address: Address::Unix("/test".into()), agreed, cipher: None };
        let memory = Region::new(GUARD + ROOM + GUARD).unwrap();
        assert!(memory.copy_in(0, &[0xee; GUARD + ROOM + GUARD]));
        Self { client: Connection::new(dialled, now), server, memory, done: Vec::new(), now }
    }

    /// Memory of the request `token`: `pieces` of 4096 bytes, in reverse order, so that each is its own.
    fn segments(&self, token: u64, pieces: usize) -> Vec<Segment> {
        let base = GUARD + token as usize * 65536;
        // SAFETY: the rig keeps the memory, and tests give each token to one request.
        (0..pieces).rev().map(|i| unsafe { self.memory.segment(base + i * 4096, 4096) }.unwrap()).collect()
    }

    fn submit(&mut self, token: u64, command: Command, offset: u64, pieces: usize) {
        let data = self.segments(token, pieces);
        let ask = Ask { command, offset, len: pieces as u32 * 4096, token };
        // SAFETY: the memory lives as long as the rig.
        unsafe { self.client.submit(&ask, &data, self.now) }.unwrap();
    }

    /// Bytes of the request `token`.
    fn bytes(&self, token: u64, pieces: usize) -> Vec<u8> {
        let mut all = Vec::new();
        for s in self.segments(token, pieces) {
            let mut piece = vec![0; 4096];
            let offset = s.addr as usize - self.memory.as_ptr() as usize;
            assert!(self.memory.copy_out(offset, &mut piece));
            all.extend(piece);
        }
        all
    }

    fn fill(&self, token: u64, pieces: usize, bytes: &[u8]) {
        for (s, b) in self.segments(token, pieces).iter().zip(bytes.chunks(4096)) {
            assert!(self.memory.copy_in(s.addr as usize - self.memory.as_ptr() as usize, b));
        }
    }

    /// Turns until `until`, or the end.
    fn turn(&mut self, until: impl Fn(&Self) -> bool) {
        let give_up = Instant::now() + Duration::from_secs(20);
        while !until(self) && self.client.end().is_none() {
            self.client.send();
            self.client.receive(self.now, &mut self.done);
            assert!(Instant::now() < give_up, "it hangs");
        }
    }

    fn untouched(&self) -> bool {
        let mut guards = vec![0; GUARD];
        [0, GUARD + ROOM].into_iter().all(|at| {
            assert!(self.memory.copy_out(at, &mut guards));
            guards == [0xee; GUARD]
        })
    }

    /// The next request as the server reads it: flags and command, cookie, offset, length.
    fn heard(&mut self) -> (u32, [u8; 8], u64, u32) {
        let mut b = [0; 28];
        self.server.read_exact(&mut b).unwrap();
        let word = |at: usize| u32::from_be_bytes(b[at..at + 4].try_into().unwrap());
        (word(4), b[8..16].try_into().unwrap(), u64::from_be_bytes(b[16..24].try_into().unwrap()), word(24))
    }

    fn say(&mut self, cookie: [u8; 8], error: u32, data: &[u8]) {
        let reply = [&SIMPLE_REPLY_MAGIC.to_be_bytes(), &error.to_be_bytes(), &cookie[..], data].concat();
        self.server.write_all(&reply).unwrap();
    }
}

fn pattern(token: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u64 * 7 + token * 31) as u8).collect()
}

#[test]
fn short_and_long_reads_in_any_order_land_in_their_memory() {
    // One piece is read ahead and copied, eight go straight; mixed, too.
    for pieces in [[1, 1, 1], [8, 8, 8], [1, 8, 2]] {
        let mut rig = Rig::new(Framing::Simple);
        for (token, n) in (0..).zip(pieces) {
            rig.submit(token, Command::Read, token * 65536, n);
        }
        rig.client.send();
        let asked: Vec<_> = (0..3).map(|_| rig.heard()).collect();
        for token in [2usize, 0, 1] {
            let (what, cookie, offset, len) = asked[token];
            assert_eq!((what, offset, len as usize), (0, token as u64 * 65536, pieces[token] * 4096));
            rig.say(cookie, 0, &pattern(token as u64, len as usize));
        }
        rig.turn(|r| r.done.len() == 3);
        assert_eq!(
            rig.done.iter().map(|d| (d.token, d.result)).collect::<Vec<_>>(),
            [(2, Ok(())), (0, Ok(())), (1, Ok(()))]
        );
        for (token, n) in (0..).zip(pieces) {
            assert_eq!(rig.bytes(token, n), pattern(token, n * 4096));
        }
        assert!(rig.untouched() && rig.client.in_flight() == 0);
    }
}

#[test]
fn many_pieces_are_read_in_several_calls() {
    let mut rig = Rig::new(Framing::Simple);
    let data: Vec<Segment> = (0..200)
        // SAFETY: the rig keeps the memory.
        .map(|i| unsafe { rig.memory.segment(GUARD + i * 1024, 512) }.unwrap())
        .collect();
    let ask = Ask { command: Command::Read, offset: 0, len: 200 * 512, token: 9 };
    // SAFETY: the memory lives as long as the rig.
    unsafe { rig.client.submit(&ask, &data, rig.now) }.unwrap();
    rig.client.send();
    let (_, cookie, _, _) = rig.heard();
    rig.say(cookie, 0, &pattern(1, 200 * 512));
    rig.turn(|r| r.done.len() == 1);
    let want = pattern(1, 200 * 512);
    for i in 0..200 {
        let mut piece = [0; 1024];
        assert!(rig.memory.copy_out(GUARD + i * 1024, &mut piece));
        assert_eq!((&piece[..512], &piece[512..]), (&want[i * 512..][..512], [0xee; 512].as_slice()));
    }
}

#[test]
fn writes_arrive_whole_though_the_socket_is_small() {
    let mut rig = Rig::new(Framing::Simple);
    for token in 0..12 {
        rig.fill(token, 16, &pattern(token, 65536));
        rig.submit(token, Command::Write { fua: token % 2 == 1 }, token << 16, 16);
    }
    rig.submit(12, Command::Flush, 0, 0);
    let mut server = rig.server.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        for token in 0..12u64 {
            let mut b = vec![0; 28 + 65536];
            server.read_exact(&mut b).unwrap();
            assert_eq!(b[4..8], [0, (token % 2) as u8, 0, 1]);
            assert_eq!(&b[28..], pattern(token, 65536));
            let reply = [&SIMPLE_REPLY_MAGIC.to_be_bytes(), &[0; 4], &b[8..16]].concat();
            server.write_all(&reply).unwrap();
        }
        let mut b = [0; 28];
        server.read_exact(&mut b).unwrap();
        assert_eq!(b[6..8], [0, 3]);
        server.write_all(&[&SIMPLE_REPLY_MAGIC.to_be_bytes(), &[0, 0, 0, 28], &b[8..16]].concat()).unwrap();
    });
    rig.turn(|r| r.done.len() == 13);
    reader.join().unwrap();
    assert_eq!(rig.done[12].result, Err(28));
    assert!(rig.done[..12].iter().all(|d| d.result == Ok(())));
}

#[test]
fn a_full_connection_says_so() {
    let mut rig = Rig::new(Framing::Simple);
    let ask = Ask { command: Command::Flush, offset: 0, len: 0, token: 1 };
    for _ in 0..MAX_IN_FLIGHT {
        // SAFETY: no memory.
        unsafe { rig.client.submit(&ask, &[], rig.now) }.unwrap();
    }
    // SAFETY: no memory.
    assert_eq!(unsafe { rig.client.submit(&ask, &[], rig.now) }, Err(Unsendable::Full));
}

#[test]
fn silence_is_counted_from_the_first_request() {
    let mut rig = Rig::new(Framing::Simple);
    assert_eq!(rig.client.silent_since(), None);
    rig.now += Duration::from_secs(100);
    rig.submit(0, Command::Read, 0, 1);
    assert_eq!(rig.client.silent_since(), Some(rig.now));
    rig.client.send();
    let (_, cookie, ..) = rig.heard();
    rig.now += Duration::from_secs(5);
    rig.say(cookie, 0, &[1; 100]);
    while !rig.client.receive(rig.now, &mut rig.done) {}
    assert_eq!(rig.client.silent_since(), Some(rig.now), "half an answer is a sign of life");
}

/// A server that misbehaves while a read, a write and a flush are in flight: how it ends, and that all three come back.
#[test]
fn hostile_servers_end_the_connection() {
    type Script = fn(&mut Rig, [[u8; 8]; 3]);
    let cases: [(&str, Script, &str); 12] = [
        ("garbage", |r, _| r.server.write_all(&[0; 64]).unwrap(), "begins with 0x00000000"),
        (
            "HTTP",
            |r, _| r.server.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap(),
            "begins with 0x48545450",
        ),
        ("nobody's answer", |r, _| r.say([9; 8], 0, &[]), "which is not in flight"),
        ("an answer twice", |r, c| (0..2).for_each(|_| r.say(c[2], 0, &[])), "which is not in flight"),
        ("an error with data", |r, c| r.say(c[0], 5, &[7; 4096]), "begins with 0x07070707"),
        ("data for a write", |r, c| r.say(c[1], 0, &[7; 32]), "begins with 0x07070707"),
        ("data for a flush", |r, c| r.say(c[2], 0, &[7; 32]), "begins with 0x07070707"),
        ("more data than asked for", |r, c| r.say(c[0], 0, &[7; 40000]), "begins with 0x07070707"),
        (
            "a chunk",
            |r, _| r.server.write_all(&[0x66, 0x8e, 0x33, 0xef, 0, 1]).unwrap(),
            "begins with 0x668e33ef",
        ),
        ("the end", |_, _| (), "the server has closed the connection"),
        (
            "half a head",
            |r, _| r.server.write_all(&SIMPLE_REPLY_MAGIC.to_be_bytes()).unwrap(),
            "in the middle of a reply",
        ),
        ("half of the data", |r, c| r.say(c[0], 0, &[7; 16384]), "in the middle of a reply"),
    ];
    for (what, script, says) in cases {
        let mut rig = Rig::new(Framing::Simple);
        rig.submit(0, Command::Read, 0, 8);
        rig.submit(1, Command::Write { fua: false }, 0, 1);
        rig.submit(2, Command::Flush, 0, 0);
        rig.client.send();
        let read = rig.heard().1;
        let write = rig.heard().1;
        rig.server.read_exact(&mut [0; 4096]).unwrap();
        let flush = rig.heard().1;
        script(&mut rig, [read, write, flush]);
        rig.server.shutdown(std::net::Shutdown::Both).unwrap();
        rig.turn(|_| false);
        let end = rig.client.end().unwrap();
        assert!(end.to_string().contains(says), "{what}: {end}");
        assert_eq!(end.is_servers(), !matches!(end, End::Violation(_)), "{what}");
        let mut tokens: Vec<u64> = rig.done.iter().map(|d| d.token).collect();
        rig.client.lost(|token| tokens.push(token));
        tokens.sort_unstable();
        assert_eq!(tokens, [0, 1, 2], "{what}: each comes back once");
        assert!(rig.untouched(), "{what}");
        let after = Ask { command: Command::Flush, offset: 0, len: 0, token: 3 };
        // SAFETY: no memory.
        assert!(unsafe { rig.client.submit(&after, &[], rig.now) }.is_err());
    }
}

#[test]
fn an_answer_to_a_write_that_was_not_sent_ends_the_connection() {
    let mut rig = Rig::new(Framing::Simple);
    // More than the socket holds.
    for token in 0..16 {
        rig.submit(token, Command::Write { fua: false }, token << 16, 16);
    }
    rig.client.send();
    assert!(rig.client.blocked, "the socket takes everything: enlarge the test");
    // The last of them, as a server would guess it.
    rig.say([0, 0, 0, 1, 0, 0, 0, 15], 1, &[]);
    rig.turn(|_| false);
    assert!(matches!(rig.client.end(), Some(End::Early)));
    let mut count = rig.done.len();
    rig.client.lost(|_| count += 1);
    assert_eq!(count, 16);
}

#[test]
fn remains_wait_for_the_server() {
    let mut rig = Rig::new(Framing::Simple);
    rig.submit(0, Command::Write { fua: false }, 0, 1);
    rig.client.send();
    rig.client.give_up("no patience");
    assert!(!rig.client.end().unwrap().is_servers());
    let mut server = rig.server;
    let mut remains = rig.client.into_remains();
    assert!(!remains.is_closed());
    // It reads what there was, and then the end.
    let mut all = Vec::new();
    server.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 28 + 4096);
    server.write_all(&[0; 16]).unwrap();
    assert!(!remains.is_closed(), "it answers, so it may be working");
    drop(server);
    assert!(remains.is_closed());
}

#[test]
fn good_bye() {
    let mut rig = Rig::new(Framing::Simple);
    rig.client.disconnect();
    assert_eq!(rig.heard().0, 2, "DISC");
    assert!(rig.client.end().is_some());
}
