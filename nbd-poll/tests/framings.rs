//! A connection in every framing: any mixture of requests in any pieces, each answered once in the form agreed upon.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use iobuf::Registry;
use nbd_poll::{Buffers, Connection, Incoming, socket_pair};
use nbd_proto::framing::{ALLOCATION_CONTEXT, Agreed, Framing};
use nbd_proto::reply::Run;
use nbd_proto::request::{Command, Export};
use nbd_proto::wire::{
    ErrorCode, ExtendedReply, ORIGINAL_REPLY_MAGIC, OriginalReply, SimpleReply, StructuredReply,
    TransmissionFlags, chunk, cmd, cmd_flag, state,
};
use proptest::prelude::*;
use zerocopy::FromBytes;

/// Each request has a piece of the disk to itself.
const PIECE: usize = 32 << 10;
const COUNT: usize = 48;

/// What a client asks of the n-th piece.
#[derive(Clone, Copy, Debug)]
enum Ask {
    Write(usize),
    Read(usize),
    /// Of a part that nobody writes.
    Zeroes(usize),
    Status,
    /// Past the end.
    Wrong,
}

/// What it hears.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Done,
    Data(Vec<u8>),
    Hole(usize),
    Status(Vec<u8>),
    Error(u32),
}

fn header(
    framing: Framing,
    command: u16,
    cookie: usize,
    offset: usize,
    len: usize,
    payload: bool,
) -> Vec<u8> {
    let magic = framing.request_magic().to_be_bytes();
    let (cookie, offset) = ((cookie as u64).to_be_bytes(), (offset as u64).to_be_bytes());
    let (short, long) = ((len as u32).to_be_bytes(), (len as u64).to_be_bytes());
    let flagged = payload && framing == Framing::Extended;
    let flags = (if flagged { cmd_flag::PAYLOAD_LEN } else { 0 }).to_be_bytes();
    match framing {
        Framing::Original { .. } => {
            [&magic, &offset[4..], &short, &cookie, &u32::from(command).to_be_bytes()].concat()
        }
        Framing::Extended => {
            [&magic, flags.as_slice(), &command.to_be_bytes(), &cookie, &offset, &long].concat()
        }
        _ => [&magic, flags.as_slice(), &command.to_be_bytes(), &cookie, &offset, &short].concat(),
    }
}

fn request(framing: Framing, n: usize, ask: Ask) -> Vec<u8> {
    let at = n * PIECE;
    let head = |command, at, len, payload| header(framing, command, n, at, len, payload);
    match ask {
        Ask::Write(len) => [head(cmd::WRITE, at, len, true), vec![n as u8 + 1; len]].concat(),
        Ask::Read(len) => head(cmd::READ, at, len, false),
        Ask::Zeroes(len) => head(cmd::READ, at + PIECE / 2, len, false),
        Ask::Status if framing == Framing::Extended => {
            let payload =
                [(PIECE as u64).to_be_bytes().as_slice(), &ALLOCATION_CONTEXT.to_be_bytes()].concat();
            [head(cmd::BLOCK_STATUS, at, payload.len(), true), payload].concat()
        }
        Ask::Status => head(cmd::BLOCK_STATUS, at, PIECE, false),
        Ask::Wrong => [head(cmd::WRITE, COUNT * PIECE, 512, true), vec![0xee; 512]].concat(),
    }
}

/// What the answer must be; the first half of each piece is filled with its number.
fn right(framing: Framing, n: usize, ask: Ask) -> Told {
    match ask {
        Ask::Write(_) => Told::Done,
        Ask::Read(len) => Told::Data(vec![n as u8 + 1; len]),
        Ask::Zeroes(len) if framing.has_chunks() => Told::Hole(len),
        Ask::Zeroes(len) => Told::Data(vec![0; len]),
        Ask::Status if !framing.has_chunks() => Told::Error(ErrorCode::Einval as u32),
        Ask::Status if framing == Framing::Extended => {
            let extent = [(PIECE as u64).to_be_bytes(), u64::from(state::ZERO).to_be_bytes()].concat();
            Told::Status([&[0, 0, 0, 1, 0, 0, 0, 1], extent.as_slice()].concat())
        }
        Ask::Status => {
            Told::Status([[0, 0, 0, 1], (PIECE as u32).to_be_bytes(), state::ZERO.to_be_bytes()].concat())
        }
        Ask::Wrong => Told::Error(ErrorCode::Enospc as u32),
    }
}

/// The first reply of `bytes`, whose `READ` it may answer, and what follows.
fn reply<'a>(framing: Framing, asks: &[Ask], bytes: &'a [u8]) -> (usize, Told, &'a [u8]) {
    let plain = |cookie: u64, error: u32, rest: &'a [u8]| {
        let len = match asks[cookie as usize] {
            Ask::Read(len) | Ask::Zeroes(len) if error == 0 => len,
            _ => 0,
        };
        let (data, rest) = rest.split_at(len);
        let told = match (error, len) {
            (0, 0) => Told::Done,
            (0, _) => Told::Data(data.to_vec()),
            _ => Told::Error(error),
        };
        (cookie as usize, told, rest)
    };
    let magic = u32::from_be_bytes(bytes[..4].try_into().unwrap());
    match (framing, magic) {
        (Framing::Original { reply_magic }, _) => {
            let (r, rest) = OriginalReply::read_from_prefix(bytes).unwrap();
            assert_eq!(r.magic.get(), reply_magic);
            plain(r.handle.get(), r.error.get(), rest)
        }
        (Framing::Simple | Framing::Structured, nbd_proto::wire::SIMPLE_REPLY_MAGIC) => {
            let (r, rest) = SimpleReply::read_from_prefix(bytes).unwrap();
            let told = plain(r.cookie.get(), r.error.get(), rest);
            assert!(framing == Framing::Simple || told.1 == Told::Done, "{told:?} must be a chunk");
            told
        }
        (Framing::Structured, nbd_proto::wire::STRUCTURED_REPLY_MAGIC) => {
            let (r, rest) = StructuredReply::read_from_prefix(bytes).unwrap();
            assert_eq!(r.flags.get(), chunk::FLAG_DONE);
            let (payload, rest) = rest.split_at(r.length.get() as usize);
            (r.cookie.get() as usize, told(r.kind.get(), payload), rest)
        }
        (Framing::Extended, nbd_proto::wire::EXTENDED_REPLY_MAGIC) => {
            let (r, rest) = ExtendedReply::read_from_prefix(bytes).unwrap();
            assert_eq!(r.flags.get(), chunk::FLAG_DONE);
            let n = r.cookie.get() as usize;
            let wrong = matches!(asks[n], Ask::Wrong);
            let zeroes = matches!(asks[n], Ask::Zeroes(_));
            let at = if wrong { COUNT * PIECE } else { n * PIECE + if zeroes { PIECE / 2 } else { 0 } };
            assert_eq!(r.offset.get(), at as u64, "the offset of the request");
            let (payload, rest) = rest.split_at(r.length.get() as usize);
            (n, told(r.kind.get(), payload), rest)
        }
        other => panic!("{other:x?}"),
    }
}

fn told(kind: u16, payload: &[u8]) -> Told {
    match kind {
        chunk::NONE => Told::Done,
        chunk::OFFSET_DATA => Told::Data(payload[8..].to_vec()),
        chunk::OFFSET_HOLE => Told::Hole(u32::from_be_bytes(payload[8..].try_into().unwrap()) as usize),
        chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => Told::Status(payload.to_vec()),
        chunk::ERROR => Told::Error(u32::from_be_bytes(payload[..4].try_into().unwrap())),
        other => panic!("a chunk of type {other}"),
    }
}

/// A server whose disk is in memory.
struct Server {
    connection: Connection,
    disk: Vec<u8>,
    held: Vec<Incoming>,
}

impl Server {
    fn execute(&mut self, i: Incoming) {
        let at = i.request.offset() as usize;
        if let Command::BlockStatus { .. } = i.request.command() {
            let run = Run { len: i.request.len(), state: state::ZERO };
            return self.connection.reply_status(i.id, &[run]);
        }
        let mut disk = &mut self.disk[at..at + i.request.len() as usize];
        for s in &i.segments {
            let (now, later) = disk.split_at_mut(s.len as usize);
            // SAFETY: the connection keeps the memory until the reply below; nobody else touches it.
            let memory = unsafe { std::slice::from_raw_parts_mut(s.as_ptr(), s.len as usize) };
            if i.request.command() == Command::Read {
                memory.copy_from_slice(now);
            } else {
                now.copy_from_slice(memory);
            }
            disk = later;
        }
        self.connection.reply(i.id, Ok(()));
    }

    fn turn(&mut self, order: usize) -> bool {
        let before = self.held.len();
        let moved = self.connection.receive(&mut self.held);
        let busy = moved || self.held.len() > before || !self.held.is_empty();
        while !self.held.is_empty() {
            let request = self.held.swap_remove(order % self.held.len());
            self.execute(request);
        }
        self.connection.send();
        busy
    }
}

fn talk(framing: Framing, asks: &[Ask], out: usize, max_in: usize) -> (Vec<u8>, Vec<u8>) {
    let flags = TransmissionFlags(0x1dfd).0 & if framing.is_original() { 2 } else { 0xffff };
    let export = Export {
        size: (COUNT * PIECE) as u64,
        block_size: 512,
        any_range: false,
        max_payload: PIECE as u32,
        flags: TransmissionFlags(flags),
    };
    let (ours, theirs) = socket_pair().unwrap();
    let mut client = UnixStream::from(theirs);
    client.set_nonblocking(true).unwrap();
    let agreed = Agreed { framing, allocation: framing.has_chunks() };
    let buffers = Buffers::new(&Registry::default()).unwrap();
    let disk = (0..COUNT * PIECE).map(|i| if i % PIECE < PIECE / 2 { (i / PIECE) as u8 + 1 } else { 0 });
    let mut server = Server {
        connection: Connection::with(ours.into(), export, agreed, buffers.clone()).unwrap(),
        disk: disk.collect(),
        held: Vec::new(),
    };
    let stream: Vec<u8> = asks.iter().enumerate().flat_map(|(n, ask)| request(framing, n, *ask)).collect();
    let (mut sent, mut got, mut idle, mut order) = (0, Vec::new(), 0, 1);
    while idle < 3 {
        let mut busy = false;
        match client.write(&stream[sent..stream.len().min(sent + out)]) {
            Ok(n) => (sent, busy) = (sent + n, n > 0),
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        busy |= server.turn(order);
        order = (order * 31 + 7) % 1009;
        let mut piece = vec![0; max_in];
        match client.read(&mut piece) {
            Ok(n) => {
                got.extend_from_slice(&piece[..n]);
                busy |= n > 0;
            }
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        idle = if busy { 0 } else { idle + 1 };
    }
    assert!(server.connection.end().is_none(), "{:?}", server.connection.end());
    assert_eq!(buffers.in_use(), (0, 0));
    (got, server.disk)
}

fn ask() -> impl Strategy<Value = Ask> {
    let len = || prop_oneof![6 => 1usize..17, 1 => Just(32)].prop_map(|blocks| blocks * 512);
    prop_oneof![
        4 => len().prop_map(Ask::Write),
        3 => len().prop_map(Ask::Read),
        2 => len().prop_map(Ask::Zeroes),
        1 => Just(Ask::Status),
        1 => Just(Ask::Wrong),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_mixture_in_any_pieces(
        asks in prop::collection::vec(ask(), 1..COUNT),
        out in prop_oneof![1usize..200, 1000usize..70_000],
        max_in in 100usize..9000,
    ) {
        let original = Framing::Original { reply_magic: ORIGINAL_REPLY_MAGIC };
        for framing in [Framing::Simple, Framing::Structured, Framing::Extended, original] {
            let (got, disk) = talk(framing, &asks, out, max_in);
            let (mut rest, mut answers) = (&got[..], vec![None; asks.len()]);
            while !rest.is_empty() {
                let (n, told, after) = reply(framing, &asks, rest);
                prop_assert_eq!(answers[n].replace(told), None, "answered twice");
                rest = after;
            }
            for (n, (answer, ask)) in answers.into_iter().zip(&asks).enumerate() {
                prop_assert_eq!(answer, Some(right(framing, n, *ask)), "{:?}: {:?}", framing, ask);
            }
            for (i, byte) in disk.iter().enumerate() {
                let (n, at) = (i / PIECE, i % PIECE);
                let written = matches!(asks.get(n), Some(Ask::Write(len)) if at < *len);
                let filled = written || at < PIECE / 2;
                prop_assert_eq!(*byte, if filled { n as u8 + 1 } else { 0 }, "byte {}", i);
            }
        }
    }
}
