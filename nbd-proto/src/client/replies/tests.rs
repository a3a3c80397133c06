//! Replies, good and hostile.

use proptest::prelude::*;

use zerocopy::IntoBytes;

use super::*;
use crate::client::cover::MAX_RANGES;
use crate::wire::{ErrorCode, ORIGINAL_REPLY_MAGIC};

const ORIGINAL: Framing = Framing::Original { reply_magic: ORIGINAL_REPLY_MAGIC };

/// A server's bytes, cookies in the place of requests.
#[derive(Clone, Default)]
struct Server(Vec<u8>);

impl Server {
    fn simple(mut self, cookie: u64, error: u32) -> Self {
        let reply =
            SimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: cookie.into() };
        self.0.extend_from_slice(reply.as_bytes());
        self
    }

    fn original(mut self, cookie: u64, error: u32) -> Self {
        let magic = ORIGINAL_REPLY_MAGIC.into();
        let reply = OriginalReply { magic, handle: cookie.into(), error: error.into() };
        self.0.extend_from_slice(reply.as_bytes());
        self
    }

    fn chunk(self, cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Self {
        self.chunk_of(cookie, flags, kind, payload.len() as u32).raw(payload)
    }

    fn chunk_of(mut self, cookie: u64, flags: u16, kind: u16, length: u32) -> Self {
        let magic = STRUCTURED_REPLY_MAGIC.into();
        let (flags, kind) = (flags.into(), kind.into());
        let h = StructuredReply { magic, flags, kind, cookie: cookie.into(), length: length.into() };
        self.0.extend_from_slice(h.as_bytes());
        self
    }

    fn extended(mut self, cookie: u64, flags: u16, kind: u16, offset: u64, payload: &[u8]) -> Self {
        let magic = EXTENDED_REPLY_MAGIC.into();
        let (flags, kind, length) = (flags.into(), kind.into(), (payload.len() as u64).into());
        let h = ExtendedReply { magic, flags, kind, cookie: cookie.into(), offset: offset.into(), length };
        self.0.extend_from_slice(h.as_bytes());
        self.raw(payload)
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), bytes].concat()
}

fn hole(offset: u64, size: u32) -> Vec<u8> {
    Hole { offset: offset.into(), size: size.into() }.as_bytes().to_vec()
}

fn error(number: u32, text: &[u8]) -> Vec<u8> {
    let head = ErrorHead { error: number.into(), message_len: (text.len() as u16).into() };
    [head.as_bytes(), text].concat()
}

const DONE: u16 = chunk::FLAG_DONE;
/// What the tests have in flight: token 0 reads 1024 bytes at 4096, token 1 writes there, token 2 flushes.
const COOKIES: [u64; 3] = [1 << 32, 1 << 32 | 1, 1 << 32 | 2];

fn machine(framing: Framing) -> Replies {
    let mut m = Replies::new(framing);
    let ask = |token, command, offset, len| Ask { command, offset, len, token };
    assert_eq!(m.enter(&ask(0, Command::Read, 4096, 1024)).unwrap().0, RequestId(0));
    assert_eq!(m.enter(&ask(1, Command::Write { fua: false }, 4096, 1024)).unwrap().0, RequestId(1));
    if framing != ORIGINAL {
        assert_eq!(m.enter(&ask(2, Command::Flush, 0, 0)).unwrap().0, RequestId(2));
    }
    m
}

/// What became of the requests, and the memory of the read.
#[derive(Debug, PartialEq)]
struct Outcome {
    done: Vec<(u64, Result<(), u32>)>,
    memory: Vec<u8>,
}

/// Feeds `bytes` in pieces of `piece`; the memory begins as 0xee, so that whatever was not written shows.
fn run(m: &mut Replies, bytes: &[u8], piece: usize) -> Result<Outcome, Violation> {
    let mut out = Outcome { done: Vec::new(), memory: vec![0xee; 1024] };
    let mut staged = Vec::new();
    for part in bytes.chunks(piece) {
        staged.extend_from_slice(part);
        loop {
            let event = match m.want() {
                Want::Head => match m.head(&staged)? {
                    None => {
                        assert!(staged.len() < MAX_HEAD, "more than was promised is wanted");
                        break;
                    }
                    Some((n, event)) => {
                        staged.drain(..n);
                        event
                    }
                },
                _ if staged.is_empty() => break,
                Want::Data { id, at, left } => {
                    assert_eq!(id, RequestId(0), "only the read has memory");
                    let n = staged.len().min(left as usize);
                    // Panics where a machine would let the transport write outside.
                    out.memory[at as usize..at as usize + n].copy_from_slice(&staged[..n]);
                    staged.drain(..n);
                    m.data(n as u32)?
                }
                Want::Skip { left } => {
                    let n = staged.len().min(left as usize);
                    staged.drain(..n);
                    m.skipped(n as u32)?
                }
            };
            match event {
                Some(Event::Done { token, result, .. }) => out.done.push((token, result)),
                Some(Event::Zero { id, at, len, done }) => {
                    assert_eq!(id, RequestId(0));
                    out.memory[at as usize..(at + len) as usize].fill(0);
                    out.done.extend(done);
                }
                None => {}
            }
        }
    }
    Ok(out)
}

fn ok(framing: Framing, server: Server) -> Outcome {
    let whole = run(&mut machine(framing), &server.0, usize::MAX).unwrap();
    for piece in [1, 3, 20, 700] {
        let mut m = machine(framing);
        assert_eq!(run(&mut m, &server.0, piece).unwrap(), whole, "in pieces of {piece}");
    }
    whole
}

#[test]
fn heads_of_every_dialect() {
    let ask = Ask { command: Command::Write { fua: true }, offset: 0x1_0000, len: 512, token: 0 };
    let head = |framing| Replies::new(framing).enter(&ask).unwrap().1.to_vec();
    let cookie = [0, 0, 0, 1, 0, 0, 0, 0];
    let tail = [0, 0, 0, 0, 0, 1, 0, 0];
    let compact = [&[0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1], &cookie[..], &tail, &[0, 0, 2, 0]].concat();
    assert_eq!((head(Framing::Simple), head(Framing::Structured)), (compact.clone(), compact));
    let extended =
        [&[0x21, 0xe4, 0x1c, 0x71, 0, 0x21, 0, 1], &cookie[..], &tail, &[0, 0, 0, 0, 0, 0, 2, 0]].concat();
    assert_eq!(head(Framing::Extended), extended);
    let original = [&[0x12, 0x56, 0x09, 0x53, 0, 1, 0, 0, 0, 0, 2, 0], &cookie[..], &[0, 0, 0, 1]].concat();
    assert_eq!(head(ORIGINAL), original);
    assert_eq!(Head::disconnect(Framing::Simple)[..8], [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2]);
    assert!(Head::disconnect(ORIGINAL).is_empty());
}

#[test]
fn flags_of_commands() {
    for (command, wanted) in [
        (Command::Read, (cmd::READ, 0)),
        (Command::Flush, (cmd::FLUSH, 0)),
        (Command::Trim { fua: true }, (cmd::TRIM, 1)),
        (Command::WriteZeroes { fua: true, no_hole: true }, (cmd::WRITE_ZEROES, 3)),
        (Command::WriteZeroes { fua: false, no_hole: false }, (cmd::WRITE_ZEROES, 0)),
    ] {
        assert_eq!(words(command), wanted);
    }
}

#[test]
fn what_1997_had_no_words_for() {
    let mut m = Replies::new(ORIGINAL);
    let mut enter = |command, offset, len| m.enter(&Ask { command, offset, len, token: 0 }).map(|_| ());
    assert_eq!(enter(Command::Flush, 0, 0), Err(Unsendable::Dialect));
    assert_eq!(enter(Command::Trim { fua: false }, 0, 512), Err(Unsendable::Dialect));
    assert_eq!(enter(Command::Read, u64::from(u32::MAX) - 511, 512), Ok(()), "the last block of 4 GiB");
    assert_eq!(enter(Command::Read, u64::from(u32::MAX) - 511, 513), Err(Unsendable::Dialect));
    assert_eq!(enter(Command::Read, 1 << 32, 512), Err(Unsendable::Dialect));
}

#[test]
fn simple_replies_in_any_order() {
    let [read, write, flush] = COOKIES;
    let server = Server::default().simple(flush, 0).simple(read, 0).raw(&[7; 1024]).simple(write, 28);
    let out = ok(Framing::Simple, server);
    assert_eq!(out.done, [(2, Ok(())), (0, Ok(())), (1, Err(28))]);
    assert_eq!(out.memory, [7; 1024]);
    let failed = ok(Framing::Simple, Server::default().simple(read, 5).simple(write, 0));
    assert_eq!((failed.done, failed.memory), (vec![(0, Err(5)), (1, Ok(()))], vec![0xee; 1024]));
}

#[test]
fn replies_of_1997() {
    let [read, write, _] = COOKIES;
    let out = ok(ORIGINAL, Server::default().original(write, 0).original(read, 0).raw(&[9; 1024]));
    assert_eq!((out.done, out.memory), (vec![(1, Ok(())), (0, Ok(()))], vec![9; 1024]));
}

#[test]
fn chunks_in_any_order() {
    let [read, write, flush] = COOKIES;
    let server = Server::default()
        .chunk(read, 0, chunk::OFFSET_DATA, &data(4096 + 512, &[2; 256]))
        .simple(write, 0)
        .chunk(read, 0, chunk::OFFSET_HOLE, &hole(4096, 512))
        .chunk(flush, DONE, chunk::NONE, &[])
        .chunk(read, DONE, chunk::OFFSET_DATA, &data(4096 + 768, &[3; 256]));
    let out = ok(Framing::Structured, server);
    assert_eq!(out.done, [(1, Ok(())), (2, Ok(())), (0, Ok(()))]);
    assert_eq!(out.memory, [vec![0; 512], vec![2; 256], vec![3; 256]].concat());
    // A hole, or an empty chunk, may come last.
    for last in [
        Server::default().chunk(read, DONE, chunk::OFFSET_HOLE, &hole(4096, 1024)),
        Server::default().chunk(read, 0, chunk::OFFSET_HOLE, &hole(4096, 1024)).chunk(
            read,
            DONE,
            chunk::NONE,
            &[],
        ),
    ] {
        let out = ok(Framing::Structured, last);
        assert_eq!((out.done, out.memory), (vec![(0, Ok(()))], vec![0; 1024]));
    }
}

#[test]
fn errors_in_chunks() {
    let [read, write, flush] = COOKIES;
    let offset = [&error(5, b"bad sector")[..], &4608u64.to_be_bytes()].concat();
    let server = Server::default()
        .chunk(read, 0, chunk::OFFSET_DATA, &data(4096, &[1; 512]))
        .chunk(read, 0, chunk::ERROR_OFFSET, &offset)
        .chunk(read, DONE, chunk::ERROR, &error(22, b""))
        .chunk(write, DONE, chunk::ERROR, &error(28, b"full"))
        // A type to come, with a tail that nobody knows.
        .chunk(flush, DONE, chunk::ERROR_BIT + 77, &[&error(12, b"x")[..], &[1; 9]].concat());
    let out = ok(Framing::Structured, server);
    assert_eq!(out.done, [(0, Err(5)), (1, Err(28)), (2, Err(12))], "the first error counts");
}

#[test]
fn extended_replies() {
    let [read, write, flush] = COOKIES;
    let server = Server::default()
        .extended(write, DONE, chunk::NONE, 4096, &[])
        .extended(read, 0, chunk::OFFSET_HOLE, 4096, &hole(4096, 24))
        .extended(flush, DONE, chunk::ERROR, 0, &error(108, b"going"))
        .extended(read, DONE, chunk::OFFSET_DATA, 4096, &data(4120, &[5; 1000]));
    let out = ok(Framing::Extended, server);
    assert_eq!(out.done, [(1, Ok(())), (2, Err(ErrorCode::Eshutdown as u32)), (0, Ok(()))]);
    assert_eq!(out.memory, [vec![0; 24], vec![5; 1000]].concat());
}

/// Each ends the connection, for the reason given, however it arrives.
#[test]
fn hostile_replies() {
    use Framing::{Extended, Simple, Structured};
    let [read, write, flush] = COOKIES;
    let s = Server::default;
    let outside = |offset, len| Violation::Outside { offset, len, asked: 4096, asked_len: 1024 };
    let kind = |kind, command| Violation::Kind { kind, command };
    let length = |kind, length| Violation::Length { kind, length };
    let magic = |found, dialect| Violation::Magic { found, dialect };
    let cases: Vec<(&str, Framing, Server, Violation)> = vec![
        ("no reply at all", Simple, s().raw(&[0; 16]), magic(0, "simple")),
        ("a request", Simple, s().raw(&[0x25, 0x60, 0x95, 0x13, 0, 0]), magic(0x2560_9513, "simple")),
        ("chunk, none agreed", Simple, s().chunk(read, DONE, 0, &[]), magic(0x668e_33ef, "simple")),
        ("1997 in 2024", Simple, s().original(write, 0), magic(ORIGINAL_REPLY_MAGIC, "simple")),
        ("2024 in 1997", ORIGINAL, s().simple(write, 0), magic(0x6744_6698, "1997")),
        (
            "extended, not agreed",
            Structured,
            s().extended(read, 1, 0, 4096, &[]),
            magic(0x6e8a_278c, "structured"),
        ),
        ("simple, extended agreed", Extended, s().simple(write, 0), magic(0x6744_6698, "extended")),
        (
            "structured, extended agreed",
            Extended,
            s().chunk(write, 1, 0, &[]),
            magic(0x668e_33ef, "extended"),
        ),
        ("unknown cookie", Simple, s().simple(77, 0), Violation::Cookie(77)),
        ("place never used", Simple, s().simple(1 << 32 | 3, 0), Violation::Cookie(1 << 32 | 3)),
        ("place that is not there", Simple, s().simple(1 << 32 | 4096, 0), Violation::Cookie(1 << 32 | 4096)),
        ("former generation", Simple, s().simple(2, 0), Violation::Cookie(2)),
        ("second answer", Simple, s().simple(write, 0).simple(write, 0), Violation::Cookie(write)),
        (
            "second answer after data",
            Simple,
            s().simple(read, 0).raw(&[1; 1024]).simple(read, 5),
            Violation::Cookie(read),
        ),
        ("unknown cookie, 1997", ORIGINAL, s().original(9, 0), Violation::Cookie(9)),
        ("unknown cookie, chunk", Structured, s().chunk(9, 1, 0, &[]), Violation::Cookie(9)),
        ("unknown cookie, extended", Extended, s().extended(9, 1, 0, 0, &[]), Violation::Cookie(9)),
        (
            "chunk after the last",
            Structured,
            s().chunk(write, 1, 0, &[]).chunk(write, 1, 0, &[]),
            Violation::Cookie(write),
        ),
        ("simple READ, structured agreed", Structured, s().simple(read, 0), Violation::SimpleRead),
        ("simple error to READ", Structured, s().simple(read, 5), Violation::SimpleRead),
        ("unknown flag", Structured, s().chunk(write, 3, 0, &[]), Violation::Flags(3)),
        (
            "unknown flag, extended",
            Extended,
            s().extended(write, 0x8001, 0, 4096, &[]),
            Violation::Flags(0x8001),
        ),
        ("data for a WRITE", Structured, s().chunk(write, 1, 1, &data(4096, b"x")), kind(1, "WRITE")),
        ("hole for a FLUSH", Structured, s().chunk(flush, 1, 2, &hole(0, 1)), kind(2, "FLUSH")),
        ("block status for a READ", Structured, s().chunk(read, 1, 5, &[0; 12]), kind(5, "READ")),
        ("unknown type", Structured, s().chunk(read, 1, 99, &[]), kind(99, "READ")),
        ("extended status", Extended, s().extended(write, 1, 6, 4096, &[0; 24]), kind(6, "WRITE")),
        ("NONE with payload", Structured, s().chunk(write, 1, 0, &[1]), length(0, 1)),
        ("NONE without end", Structured, s().chunk(write, 0, 0, &[]), Violation::NotDone),
        ("NONE for a READ", Structured, s().chunk(read, 1, 0, &[]), Violation::Missing(1024)),
        ("no data in data", Structured, s().chunk(read, 1, 1, &data(4096, b"")), length(1, 8)),
        ("data without offset", Structured, s().chunk(read, 1, 1, &[0; 4]), length(1, 4)),
        ("empty hole", Structured, s().chunk(read, 1, 2, &hole(4096, 0)), length(2, 0)),
        ("short hole", Structured, s().chunk(read, 1, 2, &[0; 11]), length(2, 11)),
        ("long hole", Structured, s().chunk(read, 1, 2, &[0; 13]), length(2, 13)),
        ("data before", Structured, s().chunk(read, 0, 1, &data(4095, &[1; 9])), outside(4095, 9)),
        ("data behind", Structured, s().chunk(read, 0, 1, &data(5120, &[1; 1])), outside(5120, 1)),
        ("data over the end", Structured, s().chunk(read, 0, 1, &data(5119, &[1; 2])), outside(5119, 2)),
        (
            "data at the end of time",
            Structured,
            s().chunk(read, 0, 1, &data(u64::MAX, &[1; 2])),
            outside(u64::MAX, 2),
        ),
        (
            "data of 4 GiB",
            Structured,
            s().chunk_of(read, 0, 1, u32::MAX).raw(&data(4096, b"")),
            outside(4096, 0xffff_fff7),
        ),
        ("hole over the end", Structured, s().chunk(read, 1, 2, &hole(4096, 1025)), outside(4096, 1025)),
        (
            "hole of 4 GiB",
            Structured,
            s().chunk(read, 1, 2, &hole(4097, u32::MAX)),
            outside(4097, u32::MAX.into()),
        ),
        (
            "data twice",
            Structured,
            s().chunk(read, 0, 1, &data(4096, &[1; 9])).chunk(read, 0, 1, &data(4104, &[1; 9])),
            Violation::Overlap(4104),
        ),
        (
            "hole over data",
            Structured,
            s().chunk(read, 0, 1, &data(4200, &[1; 9])).chunk(read, 1, 2, &hole(4096, 1024)),
            Violation::Overlap(4096),
        ),
        (
            "a hole left",
            Structured,
            s().chunk(read, 0, 1, &data(4096, &[1; 512])).chunk(read, 1, 1, &data(4609, &[1; 511])),
            Violation::Missing(1024),
        ),
        (
            "end without the rest",
            Structured,
            s().chunk(read, 1, 1, &data(4096, &[1; 512])),
            Violation::Missing(1024),
        ),
        (
            "hole, end without the rest",
            Structured,
            s().chunk(read, 1, 2, &hole(4096, 512)),
            Violation::Missing(1024),
        ),
        ("error 0", Structured, s().chunk(write, 1, chunk::ERROR, &error(0, b"fine")), Violation::NoError),
        (
            "error without number",
            Structured,
            s().chunk(write, 1, chunk::ERROR, &[0; 5]),
            length(chunk::ERROR, 5),
        ),
        (
            "text longer than its chunk",
            Structured,
            s().chunk(write, 1, chunk::ERROR, &[0, 0, 0, 5, 0, 9, 1]),
            Violation::Text { text: 9, length: 7 },
        ),
        (
            "chunk longer than its text",
            Structured,
            s().chunk(write, 1, chunk::ERROR, &[0, 0, 0, 5, 0, 0, 1]),
            Violation::Text { text: 0, length: 7 },
        ),
        (
            "error without offset",
            Structured,
            s().chunk(read, 1, chunk::ERROR_OFFSET, &error(5, b"abc")),
            Violation::Text { text: 3, length: 9 },
        ),
        (
            "endless error",
            Structured,
            s().chunk_of(write, 1, chunk::ERROR_BIT + 9, u32::MAX).raw(&error(5, b"")),
            Violation::Text { text: 0, length: u32::MAX.into() },
        ),
        (
            "text of 64 KiB",
            Structured,
            s().chunk(write, 1, chunk::ERROR, &error(5, &[b'x'; 60000])),
            Violation::Text { text: 60000, length: 60006 },
        ),
        (
            "too many errors",
            Structured,
            (0..65).fold(s(), |s, _| s.chunk(read, 0, chunk::ERROR, &error(5, b"no"))),
            Violation::Errors,
        ),
        (
            "another offset",
            Extended,
            s().extended(read, 1, 1, 4097, &data(4096, &[1; 9])),
            Violation::Echo { asked: 4096, found: 4097 },
        ),
        (
            "another offset of a FLUSH",
            Extended,
            s().extended(flush, 1, 0, 1, &[]),
            Violation::Echo { asked: 0, found: 1 },
        ),
        (
            "pieces without end",
            Structured,
            (0..512).fold(s(), |s, i| s.chunk(read, 0, 1, &data(4096 + 2 * i, &[1]))).chunk(read, 1, 0, &[]),
            Violation::Missing(1024),
        ),
    ];
    assert!(cases.len() >= 50);
    for (what, framing, server, why) in cases {
        for piece in [usize::MAX, 1, 7] {
            let result = run(&mut machine(framing), &server.0, piece);
            assert_eq!(result, Err(why), "{what}, in pieces of {piece}");
        }
        assert!(!why.to_string().contains('\n'));
    }
}

#[test]
fn fragments_are_bounded() {
    let mut m = Replies::new(Framing::Structured);
    m.enter(&Ask { command: Command::Read, offset: 0, len: 1 << 20, token: 0 }).unwrap();
    for i in 0.. {
        let bytes = Server::default().chunk(COOKIES[0], 0, chunk::OFFSET_HOLE, &hole(i * 2, 1)).0;
        match m.head(&bytes) {
            Ok(Some(_)) => assert!(i < MAX_RANGES as u64),
            other => {
                assert_eq!(other, Err(Violation::Fragments));
                break;
            }
        }
    }
}

#[test]
fn a_full_table_and_a_lost_connection() {
    let mut m = Replies::new(Framing::Simple);
    let ask = |token| Ask { command: Command::Flush, offset: 0, len: 0, token };
    for token in 0..MAX_IN_FLIGHT as u64 {
        assert!(m.enter(&ask(token)).is_ok());
    }
    assert_eq!(m.enter(&ask(999)).err(), Some(Unsendable::Full));
    let mut lost = Vec::new();
    m.drain(|token| lost.push(token));
    lost.sort_unstable();
    assert_eq!(lost, (0..MAX_IN_FLIGHT as u64).collect::<Vec<_>>());
    assert_eq!((m.in_flight(), m.want()), (0, Want::Head));
    let (_, head) = m.enter(&ask(1)).unwrap();
    // The former user of the place had another cookie.
    assert_eq!(u32::from_be_bytes(head[8..12].try_into().unwrap()), 2);
}

proptest! {
    /// A server that answers a read in any order of any pieces: memory and outcome are right.
    #[test]
    fn any_split(cuts in prop::collection::btree_set(1u32..1024, 0..12), holes in any::<u16>(), seed in any::<u64>(),
                 extended in any::<bool>(), piece in 1usize..200) {
        let bounds: Vec<u32> = std::iter::once(0).chain(cuts).chain([1024]).collect();
        let mut parts: Vec<(u32, u32)> = bounds.windows(2).map(|w| (w[0], w[1])).collect();
        // A shuffle without a generator.
        parts.sort_by_key(|(from, _)| seed.rotate_left(from % 63).wrapping_mul(u64::from(*from) | 1));
        let mut server = Server::default();
        let mut memory = vec![0u8; 1024];
        let last = parts.len() - 1;
        for (i, (from, to)) in parts.iter().enumerate() {
            let flags = if i == last { DONE } else { 0 };
            let offset = 4096 + u64::from(*from);
            let (kind, payload) = if holes >> (i % 16) & 1 == 1 {
                (chunk::OFFSET_HOLE, hole(offset, to - from))
            } else {
                let bytes = vec![i as u8 + 1; (to - from) as usize];
                memory[*from as usize..*to as usize].copy_from_slice(&bytes);
                (chunk::OFFSET_DATA, data(offset, &bytes))
            };
            server = if extended {
                server.extended(COOKIES[0], flags, kind, 4096, &payload)
            } else {
                server.chunk(COOKIES[0], flags, kind, &payload)
            };
        }
        let framing = if extended { Framing::Extended } else { Framing::Structured };
        let out = run(&mut machine(framing), &server.0, piece).unwrap();
        prop_assert_eq!(out.done, vec![(0, Ok(()))]);
        prop_assert_eq!(out.memory, memory);
    }

    /// Whatever comes, nothing is written outside and nothing ends twice.
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300), dialect in 0u8..4, piece in 1usize..50) {
        let framing = [ORIGINAL, Framing::Simple, Framing::Structured, Framing::Extended][usize::from(dialect)];
        let mut m = machine(framing);
        let before = m.in_flight();
        if let Ok(out) = run(&mut m, &bytes, piece) {
            prop_assert_eq!(out.done.len() + m.in_flight(), before);
        }
    }
}
