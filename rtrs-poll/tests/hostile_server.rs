//! The client against a server that lies. Every lie ends its path with a reason that names it, fails the request that
//! was in flight exactly once, and leaves all other memory alone.

mod common;

use std::time::Duration;

use common::disk::usr;
use common::probe::{Memory, Seen};
use common::rogue::Rogue;
use common::{Connected, DEPTH, MAX_IO, TestClient, once, path, session_options, short_heartbeat, wait_for};
use rtrs_poll::client::{Event, PathError, PathState, SessionId, SessionOptions};
use rtrs_proto::Errno;
use rtrs_proto::handshake;
use rtrs_proto::imm::{HB_ACK, HB_MSG, io_rsp};
use rtrs_proto::limits::Geometry;
use rtrs_proto::response::Reply;
use rtrs_proto::wire::SgDesc;
use verbs::SendOp;
use verbs::loopback::Fabric;
use zerocopy::IntoBytes;

struct Scene {
    rogue: Rogue,
    client: TestClient,
    memory: Memory,
}

impl Scene {
    fn new(rotating: bool) -> Self {
        let fabric = Fabric::new();
        let client = TestClient::start(&fabric, 1);
        let memory = Memory::new(&client.registry);
        memory.fill(0, &GUARD);
        Self { rogue: Rogue::new(&fabric, rotating), client, memory }
    }

    fn dial(&self, options: SessionOptions) -> SessionId {
        self.client.create(options)
    }

    fn connect(&mut self, options: SessionOptions) -> Connected {
        let id = self.dial(options);
        self.rogue.serve();
        self.client.wait_up(id, self.memory.clone())
    }

    /// One read on its way; its connection and buffer id.
    fn one_request(&mut self, c: &Connected, cookie: u64) -> (usize, u16) {
        let (_, key) = c.keys[0];
        let read = c.memory.read(TARGET, 4096, &usr(b'D', 0, 0), cookie);
        self.client.on_lane(0, move |_, io| read.submit(io, key)).expect("room");
        self.rogue.next_request()
    }

    fn answer(&mut self, con: usize, id: u16, key: u32) {
        let imm = io_rsp(id.into(), None, false);
        if self.rogue.rotating {
            self.rogue.send(con, SendOp::SendImm(imm), Reply::rkey_rsp(id, key).as_bytes());
        } else {
            self.rogue.imm(con, imm);
        }
    }

    fn good_answer(&mut self, con: usize, id: u16) {
        let key = self.rogue.rkey();
        self.answer(con, id, key);
    }

    /// The path is up and works.
    fn still_works(&mut self, c: &Connected) {
        let (con, id) = self.one_request(c, 77);
        self.good_answer(con, id);
        assert_eq!(self.client.completion(), (77, Ok(())));
    }

    /// The client ends the path, and fails its one request.
    fn is_closed(&mut self, c: &Connected, cookie: u64, case: &str, say: &str) {
        self.rogue.wait_gone();
        assert_eq!(self.client.completion(), (cookie, Err(Errno::ECONNABORTED)), "{case}");
        assert!(matches!(self.client.next_seen(), (0, Seen::Down)), "{case}");
        let (path, why, next) = self.client.path_down();
        assert!(path == c.path && next.is_none() && why.errno() == Errno::ECONNRESET, "{case}: {why}");
        assert!(why.to_string().contains(say), "{case}: '{why}' should say '{say}'");
        self.nothing_was_written(case);
        assert!(self.client.seen.try_recv().is_err(), "{case}: nothing more happens");
    }

    /// The attempt to connect ends.
    fn is_refused(&mut self, case: &str, say: &str) -> PathError {
        let (_, why, next) = self.client.path_down();
        assert!(next.is_none() && why.to_string().contains(say), "{case}: '{why}' should say '{say}'");
        assert!(matches!(self.client.event(), Event::SessionStalled { .. }), "{case}");
        assert!(self.client.seen.try_recv().is_err(), "{case}: no session ever came up");
        self.nothing_was_written(case);
        why
    }

    fn nothing_was_written(&self, case: &str) {
        assert!(self.memory.bytes(0, GUARD.len()) == GUARD, "{case}: memory of others was written");
    }
}

/// What lies before the target of requests.
const GUARD: [u8; 16384] = [0xa5; 16384];
const TARGET: usize = GUARD.len();

fn accept_with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut private = Rogue::new(&Fabric::new(), false).good_accept();
    private[at..at + bytes.len()].copy_from_slice(bytes);
    private
}

#[test]
fn bad_accepts() {
    let huge = [0xff; 4];
    for (case, private, say) in [
        ("nothing", vec![], "con 0: magic 0x0000"),
        ("magic", accept_with(0, &[0]), "con 0: magic 0x1b00"),
        ("version 3", accept_with(2, &[0, 3]), "con 0: protocol version 0x0300"),
        ("version 1", accept_with(2, &[0, 1]), "con 0: protocol version 0x0100"),
        ("errno", accept_with(4, &[1, 0]), "con 0: errno 1 in an accept"),
        ("negative errno", accept_with(4, &[0xef, 0xff]), "con 0: errno -17 in an accept"),
        ("no buffers", accept_with(6, &[0, 0]), "queue_depth 0"),
        ("many buffers", accept_with(6, &[0xff, 0xff]), "need more than 28 bits"),
        ("no data", accept_with(8, &[0; 4]), "max_io_size 0"),
        ("half a sector", accept_with(8, &[0xff, 1, 0, 0]), "max_io_size 511"),
        ("no header", accept_with(12, &[0; 4]), "max_hdr_size 0"),
        ("no room for OPEN", accept_with(12, &[0x1f, 1, 0, 0]), "max_hdr_size 287"),
        ("huge data", accept_with(8, &huge), "need more than 28 bits"),
        ("huge headers", accept_with(12, &huge), "need more than 28 bits"),
        ("huge both", accept_with(8, &[huge, huge].concat()), "need more than 28 bits"),
    ] {
        let mut s = Scene::new(false);
        s.dial(once());
        // Whether it has closed shows in `gone`.
        s.rogue.pump_until(&private, |r| r.gone > 0);
        assert!(matches!(s.is_refused(case, say), PathError::Protocol(_)), "{case}");
    }
}

#[test]
fn bad_accepts_of_later_connections() {
    for (case, private, say) in [
        ("nothing", vec![], "con 1: magic 0x0000"),
        ("magic", accept_with(1, &[0]), "con 1: magic 0x00bd"),
        ("version", accept_with(3, &[9]), "con 1: protocol version 0x0900"),
        ("errno", accept_with(4, &[5, 0]), "con 1: errno 5 in an accept"),
    ] {
        let mut s = Scene::new(false);
        s.rogue.later_accept = Some(private);
        s.dial(once());
        s.rogue.pump_until(&s_good(), |r| r.gone > 1);
        assert!(matches!(s.is_refused(case, say), PathError::Protocol(_)), "{case}");
    }
}

fn s_good() -> Vec<u8> {
    accept_with(0, &[])
}

#[test]
fn refusals_say_why() {
    let errno = |n: i16| [&[0; 4], &n.to_le_bytes()[..], &[0; 50]].concat();
    for (case, stall_after, private, say, want) in [
        ("errno 0", 0, errno(0), "con 0: the server refused: ECONNRESET", Errno::ECONNRESET),
        ("positive", 0, errno(17), "con 0: the server refused: ECONNABORTED", Errno::ECONNABORTED),
        ("exists", 0, errno(-17), "between the same addresses", Errno::EEXIST),
        ("unknown session", 0, errno(-6), "does not know this session", Errno::ENXIO),
        ("no memory", 0, errno(-12), "con 0: the server refused: ENOMEM", Errno::ENOMEM),
        ("no errno at all", 0, errno(-32768), "con 0: the server refused: EIO", Errno::EIO),
        ("nothing", 0, Vec::new(), "con 0: the server refused: ECONNRESET", Errno::ECONNRESET),
        ("later", 1, errno(-104), "con 1: the server refused: ECONNRESET", Errno::ECONNRESET),
    ] {
        let mut s = Scene::new(false);
        s.rogue.stall_after = stall_after;
        s.dial(once());
        let asked = s.rogue.wait_asked();
        s.rogue.reject(asked, &private);
        assert_eq!(s.is_refused(case, say).errno(), want, "{case}");
        s.rogue.wait_gone();
    }
}

/// A server that stops answering at any step of connecting is given up.
#[test]
fn stalls_end() {
    // Longer than the steps before the stall take.
    let connect_timeout = test_support::limit(3);
    let stall = |case: &str, stall_after: usize, step: &str| {
        let mut s = Scene::new(false);
        s.rogue.stall_after = stall_after;
        s.dial(SessionOptions { connect_timeout, ..once() });
        if stall_after < 2 {
            s.rogue.wait_asked();
        } else {
            s.rogue.wait_info_req();
        }
        let say = format!("no answer to {step} within {connect_timeout:?}");
        assert_eq!(s.is_refused(case, &say).errno(), Errno::ETIMEDOUT, "{case}");
        s.rogue.wait_gone();
    };
    std::thread::scope(|scope| {
        scope.spawn(|| stall("con 0", 0, "the connection request of con 0"));
        scope.spawn(|| stall("con 1", 1, "the connection request of con 1"));
        scope.spawn(|| stall("INFO_REQ", 2, "INFO_REQ"));
    });
}

#[test]
fn disconnects_while_connecting() {
    for con in 0..2 {
        let mut s = Scene::new(false);
        s.dial(once());
        s.rogue.wait_info_req();
        s.rogue.disconnect(con);
        s.is_refused("while INFO_REQ waits", "when it heard the session's name");
    }
    let mut s = Scene::new(false);
    s.rogue.stall_after = 1;
    s.dial(once());
    s.rogue.wait_asked();
    s.rogue.disconnect(0);
    s.is_refused("before con 1", "con 0: disconnected by the server");
}

fn chunk() -> u32 {
    Geometry::new(DEPTH, MAX_IO, 4096).expect("valid").chunk_size()
}

#[test]
fn bad_info_rsps() {
    let rsp = |descs: &[SgDesc]| handshake::info_rsp(descs).expect("some");
    let (chunk, total) = (chunk(), chunk() * u32::from(DEPTH));
    for (case, message, say) in [
        ("nothing", vec![], "INFO_RSP of 0 bytes is too short: at least 8"),
        ("half a header", vec![1, 0, 1], "INFO_RSP of 3 bytes is too short: at least 8"),
        ("another type", vec![0; 24], "message type 0 where INFO_RSP (1) was due"),
        ("no descriptor", vec![1, 0, 0, 0, 0, 0, 0, 0], "0 descriptors"),
        ("five of 24", rsp(&[SgDesc::new(0, 0, chunk); 5]), "5 descriptors for 24 chunks: it must divide"),
        ("65535 of 24", vec![1, 0, 0xff, 0xff, 0, 0, 0, 0], "65535 descriptors for 24 chunks"),
        ("header only", vec![1, 0, 1, 0, 0, 0, 0, 0], "INFO_RSP of 8 bytes is too short: at least 24"),
        ("one of two", rsp(&[SgDesc::new(0, 0, chunk)])[..24].to_vec(), "hold 1 chunks, not 24"),
        ("broken chunk", rsp(&[SgDesc::new(0x1000, 1, total - 1)]), "multiple of the chunk size"),
        ("empty chunk", rsp(&[SgDesc::new(0x1000, 1, 0)]), "multiple of the chunk size"),
        ("end of memory", rsp(&[SgDesc::new(u64::MAX - 4096, 1, total)]), "exceeds the address space"),
        ("too many", rsp(&[SgDesc::new(0x1000, 1, total + chunk)]), "chunks, not 24"),
        ("too few", rsp(&[SgDesc::new(0x1000, 1, total - chunk)]), "hold 23 chunks, not 24"),
    ] {
        let mut s = Scene::new(false);
        s.dial(once());
        s.rogue.wait_info_req();
        s.rogue.send(0, SendOp::Send, &message);
        let why = s.is_refused(case, say);
        assert!(matches!(why, PathError::Protocol(_)) && why.errno() == Errno::ECONNRESET, "{case}");
        s.rogue.wait_gone();
    }
}

type Act = fn(&mut Rogue);

#[test]
fn other_messages_instead_of_info_rsp() {
    let answer: Act = |r| r.imm(1, io_rsp(0, None, false));
    let cases: [(&str, bool, Act, &str); 8] = [
        ("a heartbeat", false, |r| r.imm(0, HB_MSG), "con 0: a message other than INFO_RSP came first"),
        ("an answer", false, |r| r.imm(0, io_rsp(0, None, false)), "con 0: a message other than INFO_RSP"),
        ("an answer on con 1", false, answer, "con 1: an answer before any request"),
        ("a message on con 1", false, |r| r.send(1, SendOp::Send, &[]), "con 1: a message without immediate"),
        (
            "with immediate",
            false,
            |r| {
                let rsp = r.good_info_rsp();
                r.send(0, SendOp::SendImm(1), &rsp);
            },
            "con 0: a message other than INFO_RSP",
        ),
        (
            "with invalidation",
            false,
            |r| {
                let rsp = r.good_info_rsp();
                r.send(0, SendOp::SendInvalidate(0x1234_5678), &rsp);
            },
            "con 0:",
        ),
        (
            "longer than it can be",
            false,
            |r| r.send(0, SendOp::Send, &[1; 4096]),
            "con 0: work completion: local length error",
        ),
        (
            "a key on con 1",
            true,
            |r| r.send(1, SendOp::SendImm(io_rsp(0, None, false)), &[4, 0, 0, 0, 1, 0, 0, 0]),
            "con 1: an answer before any request",
        ),
    ];
    for (case, rotating, act, say) in cases {
        let mut s = Scene::new(rotating);
        s.dial(once());
        s.rogue.wait_info_req();
        act(&mut s.rogue);
        s.is_refused(case, say);
        s.rogue.wait_gone();
    }
}

/// A lie about the request in `id` that came by connection `con`.
type Lie = fn(&mut Rogue, con: usize, id: u16);

/// One read is in flight when the server lies.
fn lies(rotating: bool, cases: &[(&str, Lie, &str)]) {
    for (case, lie, say) in cases {
        let mut s = Scene::new(rotating);
        let c = s.connect(once());
        let (con, id) = s.one_request(&c, 3);
        lie(&mut s.rogue, con, id);
        s.is_closed(&c, 3, case, say);
    }
}

fn rsp(id: u16) -> u32 {
    io_rsp(id.into(), None, false)
}

#[test]
fn lies_with_static_keys() {
    lies(
        false,
        &[
            (
                "nobody asked",
                |r, con, id| r.imm(con, rsp((id + 1) % DEPTH)),
                "which has no request in flight",
            ),
            ("no such buffer", |r, con, _| r.imm(con, rsp(DEPTH)), "means nothing to a client"),
            (
                "highest buffer",
                |r, con, _| r.imm(con, io_rsp(0x7_ffff, None, true)),
                "means nothing to a client",
            ),
            (
                "failure of nobody",
                |r, con, id| r.imm(con, io_rsp(u32::from((id + 5) % DEPTH), Some(Errno::EIO), false)),
                "no request in flight",
            ),
            ("another connection", |r, con, id| r.imm(1 - con, rsp(id)), "came on another connection"),
            (
                "as SEND",
                |r, con, id| r.send(con, SendOp::SendImm(rsp(id)), &[]),
                "an answer as SEND, though keys are static",
            ),
            ("plain SEND", |r, con, _| r.send(con, SendOp::Send, &[]), "a message without immediate"),
            (
                "plain SEND on con 0",
                |r, _, _| r.send(0, SendOp::Send, &[]),
                "con 0: a message without immediate",
            ),
            ("SEND without room", |r, con, _| r.send(con, SendOp::Send, &[0; 64]), "local length error"),
            (
                "a key and an answer",
                |r, con, id| r.send(con, SendOp::SendImm(rsp(id)), Reply::rkey_rsp(id, 1).as_bytes()),
                "local length error",
            ),
            (
                "INFO_RSP again",
                |r, _, _| {
                    let m = r.good_info_rsp();
                    r.send(0, SendOp::Send, &m)
                },
                "con 0: work completion: local length error",
            ),
            ("a request", |r, con, _| r.imm(con, 0x0000_1000), "immediate 0x00001000, which means nothing"),
            ("type 3", |r, con, _| r.imm(con, 0x3000_0000), "immediate 0x30000000, which means nothing"),
            ("type 7", |r, con, _| r.imm(con, 0x7000_0001), "immediate 0x70000001, which means nothing"),
            ("type 10", |r, _, _| r.imm(0, 0xa000_0000), "con 0: immediate 0xa0000000, which means nothing"),
            ("type 15", |r, con, _| r.imm(con, 0xffff_ffff), "immediate 0xffffffff, which means nothing"),
            (
                "heartbeat as SEND",
                |r, _, _| r.send(0, SendOp::SendImm(HB_MSG), &[]),
                "con 0: a heartbeat as SEND",
            ),
            (
                "beat answered by SEND",
                |r, con, _| r.send(con, SendOp::SendImm(HB_ACK), &[]),
                "a heartbeat as SEND",
            ),
            (
                "invalidates nothing",
                |r, con, _| r.send(con, SendOp::SendInvalidate(0xdead_beef), &[]),
                "con 1:",
            ),
            ("disconnects con 0", |r, _, _| r.disconnect(0), "con 0: disconnected by the server"),
            ("disconnects con 1", |r, _, _| r.disconnect(1), "con 1: disconnected by the server"),
            ("a queue pair goes", |r, con, _| r.drop_qp(con), "con 1:"),
        ],
    );
}

#[test]
fn lies_with_rotating_keys() {
    fn key_message(id: u16) -> Vec<u8> {
        Reply::rkey_rsp(id, 5).as_bytes().to_vec()
    }
    lies(
        true,
        &[
            ("no message", |r, con, id| r.send(con, SendOp::SendImm(rsp(id)), &[]), "without its next key"),
            (
                "seven bytes",
                |r, con, id| r.send(con, SendOp::SendImm(rsp(id)), &key_message(id)[..7]),
                "without its next key",
            ),
            (
                "nine bytes",
                |r, con, id| r.send(con, SendOp::SendImm(rsp(id)), &[4, 0, id as u8, 0, 1, 1, 1, 1, 1]),
                "local length error",
            ),
            (
                "another buffer's key",
                |r, con, id| r.send(con, SendOp::SendImm(rsp(id)), &key_message(id + 1)),
                "with an immediate for buffer",
            ),
            (
                "no buffer's key",
                |r, con, id| r.send(con, SendOp::SendImm(rsp(id)), &key_message(u16::MAX)),
                "RKEY_RSP for buffer 65535",
            ),
            (
                "another message",
                |r, con, id| {
                    r.send(con, SendOp::SendImm(rsp(id)), &[&[9, 0], &key_message(id)[2..]].concat())
                },
                "message type 9 where RKEY_RSP (4) was due",
            ),
            ("no key", |r, con, id| r.imm(con, rsp(id)), "without its next key"),
            (
                "nobody asked",
                |r, con, id| r.send(con, SendOp::SendImm(rsp(id + 1)), &key_message(id + 1)),
                "no request in flight",
            ),
            (
                "another connection",
                |r, con, id| r.send(1 - con, SendOp::SendImm(rsp(id)), &key_message(id)),
                "came on another connection",
            ),
            (
                "no immediate",
                |r, con, id| r.send(con, SendOp::Send, &key_message(id)),
                "a message without immediate",
            ),
            (
                "unknown, with key",
                |r, con, id| r.send(con, SendOp::SendImm(0x5000_0000), &key_message(id)),
                "immediate 0x50000000",
            ),
        ],
    );
}

/// The second answer finds nobody, or, which is why it must not be let pass, somebody else's request.
#[test]
fn an_answer_twice_costs_the_path() {
    for rotating in [false, true] {
        let mut s = Scene::new(rotating);
        let c = s.connect(once());
        let (con, id) = s.one_request(&c, 1);
        s.good_answer(con, id);
        s.good_answer(con, id);
        assert_eq!(s.client.completion(), (1, Ok(())));
        s.rogue.wait_gone();
        let (_, why, _) = s.client.path_down();
        assert!(why.to_string().contains("no request in flight"), "{why}");
        assert!(matches!(s.client.next_seen(), (0, Seen::Down)));
        assert!(s.client.seen.try_recv().is_err());
    }
}

/// Keys or addresses that open nothing break the queue pair when the client uses them.
#[test]
fn keys_that_open_nothing_cost_the_path() {
    let mut s = Scene::new(true);
    let c = s.connect(once());
    let (con, id) = s.one_request(&c, 1);
    s.answer(con, id, 0xdead_beef);
    assert_eq!(s.client.completion(), (1, Ok(())));
    let (_, key) = c.keys[0];
    let read = c.memory.read(TARGET, 4096, &usr(b'D', 0, 0), 2);
    s.client.on_lane(0, move |_, io| read.submit(io, key)).expect("room");
    s.is_closed(&c, 2, "a key of nothing", "remote access error");

    let mut s = Scene::new(false);
    let id = s.dial(once());
    s.rogue.wait_info_req();
    let nowhere = SgDesc::new(0x1000, s.rogue.rkey(), chunk() * u32::from(DEPTH));
    s.rogue.send(0, SendOp::Send, &handshake::info_rsp(&[nowhere]).expect("one"));
    let c = s.client.wait_up(id, s.memory.clone());
    let (_, key) = c.keys[0];
    let write = c.memory.write(TARGET, 4096, &usr(b'D', 0, 0), 2);
    s.client.on_lane(0, move |_, io| write.submit(io, key)).expect("room");
    s.is_closed(&c, 2, "an address of nothing", "remote access error");
}

/// What a client's request shows of its memory: the place, the length, and the key.
fn desc_of(r: &Rogue, id: u16) -> (u64, u32) {
    // Behind the room for 4096 bytes of data: 16 bytes of user message, 8 of header, then address, key, length.
    let d = r.chunk(id, 4096 + 16 + 8, 16);
    let word = |at: usize| u32::from_le_bytes(d[at..at + 4].try_into().expect("4 bytes"));
    assert_eq!(word(12), 4096);
    (u64::from_le_bytes(d[..8].try_into().expect("8 bytes")), word(8))
}

/// RDMA outside of the registered memory, or other than WRITE, is the device's business: the server gets nothing.
#[test]
fn memory_that_was_not_offered_cannot_be_reached() {
    type Reach = fn(u64, u32) -> SendOp;
    let reach: [(&str, Reach); 4] = [
        ("another key", |addr, rkey| SendOp::Write { addr, rkey: rkey ^ 0x5a5a_0000 }),
        ("before the region", |addr, rkey| SendOp::Write { addr: addr - TARGET as u64 - 64, rkey }),
        ("end of memory", |_, rkey| SendOp::Write { addr: u64::MAX - 8, rkey }),
        ("a read", |addr, rkey| SendOp::Read { addr, rkey }),
    ];
    for (case, op) in reach {
        let mut s = Scene::new(false);
        let c = s.connect(once());
        let (con, id) = s.one_request(&c, 3);
        let (addr, rkey) = desc_of(&s.rogue, id);
        if s.rogue.try_send(con, op(addr, rkey), &[0xbb; 64]) {
            s.is_closed(&c, 3, case, "con 1:");
        } else {
            // Refused before it left the server.
            s.good_answer(con, id);
            assert_eq!(s.client.completion(), (3, Ok(())));
        }
        s.nothing_was_written(case);
    }
}

/// The key of a request's buffer is an ordinary region's, which no peer may invalidate.
#[test]
fn own_keys_cannot_be_invalidated() {
    let mut s = Scene::new(false);
    let c = s.connect(once());
    let (con, id) = s.one_request(&c, 3);
    let (_, rkey) = desc_of(&s.rogue, id);
    s.rogue.send(con, SendOp::SendInvalidate(rkey), &[]);
    s.is_closed(&c, 3, "invalidated", "con 1:");
    // It opens as before for others.
    let (id, memory) = (c.id, s.memory.clone());
    let path = c.path;
    s.client.with(move |cl, cx| cl.reconnect_path(cx, id, path)).expect("closed");
    s.rogue = Rogue::again(s.rogue);
    s.rogue.serve();
    let c = s.client.wait_up(id, memory);
    s.still_works(&c);
}

#[test]
fn a_silent_server_is_given_up() {
    let mut s = Scene::new(false);
    let c = s.connect(SessionOptions { heartbeat: short_heartbeat(), ..once() });
    s.one_request(&c, 3);
    s.is_closed(&c, 3, "silence", "no heartbeat from the server");
}

/// It beats, but does not work.
#[test]
fn a_server_that_only_beats_is_given_up_if_asked_to() {
    let mut s = Scene::new(false);
    let io_timeout = Some(Duration::from_millis(200));
    let c = s.connect(SessionOptions { heartbeat: short_heartbeat(), io_timeout, ..once() });
    let began = std::time::Instant::now();
    s.one_request(&c, 3);
    s.rogue.pump_until(&[], |r| {
        r.answer_heartbeats();
        r.gone > 0
    });
    assert!(began.elapsed() >= Duration::from_millis(200), "not before its time");
    s.is_closed(&c, 3, "idleness", "no answer to the I/O request in buffer");
}

/// What does no harm is let pass.
#[test]
fn heartbeats_of_any_kind_are_answered_or_ignored() {
    for rotating in [false, true] {
        let mut s = Scene::new(rotating);
        let c = s.connect(once());
        for con in [0, 1] {
            (0..3).for_each(|_| s.rogue.imm(con, HB_ACK));
        }
        // As many as the rogue has receives for.
        for _ in 0..90 {
            s.rogue.imm(0, HB_MSG);
            assert_eq!(s.rogue.next(), (0, HB_ACK));
        }
        s.still_works(&c);
    }
}

/// Many at once: more than the client has room to answer. It goes on.
#[test]
fn a_flood_of_heartbeats() {
    let mut s = Scene::new(false);
    let c = s.connect(once());
    for _ in 0..40 {
        (0..4).for_each(|_| s.rogue.imm(1, HB_MSG));
    }
    for _ in 0..90 {
        assert_eq!(s.rogue.next(), (1, HB_ACK));
    }
    drop(c);
}

/// Every errno comes through, and is only an errno.
#[test]
fn errnos_of_any_size() {
    let mut s = Scene::new(false);
    let c = s.connect(once());
    for n in [1, 5, 133, 200, 511] {
        let (con, id) = s.one_request(&c, 9);
        let errno = Errno::from_raw(n).expect("not 0");
        s.rogue.imm(con, io_rsp(id.into(), Some(errno), n % 2 == 0));
        assert_eq!(s.client.completion(), (9, Err(errno)));
    }
    s.still_works(&c);
}

/// A lie costs its path only: the request goes by the other one, and ends once.
#[test]
fn a_liar_costs_only_its_path() {
    let fabric = Fabric::new();
    let (mut liar, mut honest) = (Rogue::at(&fabric, false, 0), Rogue::at(&fabric, false, 1));
    let client = TestClient::start(&fabric, 1);
    let memory = Memory::new(&client.registry);
    let mut options = session_options(1);
    options.reconnect.max_attempts = Some(0);
    let id = client.create(options);
    liar.serve();
    let c = client.wait_up(id, memory);
    client.with(move |cl, cx| cl.add_path(cx, id, path(1))).expect("another way");
    honest.serve();
    wait_for("both paths", || client.path_info(id, client.info(id).paths[1].id).state.name() == "connected");
    let (_, key) = c.keys[0];
    let read = c.memory.read(0, 4096, &usr(b'D', 0, 0), 5);
    client.on_lane(0, move |_, io| read.submit(io, key)).expect("room");
    let (con, buffer) = liar.next_request();
    // About another path's buffer, which has no request here.
    liar.imm(con, rsp((buffer + 1) % DEPTH));
    let (again, same) = honest.next_request();
    assert_eq!(same, buffer, "it keeps its buffer");
    liar.wait_gone();
    honest.imm(again, rsp(buffer));
    assert_eq!(client.completion(), (5, Ok(())));
    let (path, why, next) = client.path_down();
    assert!(path == c.path && next.is_none(), "{why}");
    assert!(why.to_string().contains("no request in flight"), "{why}");
    let info = client.info(id);
    assert!(info.connected && info.generation == 1);
    assert_eq!(
        info.paths.iter().map(|p| (p.stats.inflight, p.stats.failovers)).collect::<Vec<_>>(),
        [(0, 0), (0, 1)]
    );
    assert!(client.seen.try_recv().is_err());
}

/// Paths of one session have one server, which has one set of limits; the session's are settled by the first.
#[test]
fn a_path_with_other_limits_stays_out() {
    let geometry = |depth, max_io| Geometry::new(depth, max_io, 4096).expect("valid");
    let fabric = Fabric::new();
    let (mut first, mut other) = (Rogue::at(&fabric, false, 0), Rogue::at(&fabric, false, 1));
    let client = TestClient::start(&fabric, 1);
    let memory = Memory::new(&client.registry);
    let id = client.create(session_options(1));
    first.serve();
    client.wait_up(id, memory);
    client.with(move |cl, cx| cl.add_path(cx, id, path(1))).expect("another way");
    let misfit = |say: &str| {
        let why = client.await_event(|e| match e {
            Event::PathDown { why: PathError::Misfit(why), next_attempt: Some(_), .. } => Some(why.clone()),
            _ => None,
        });
        assert!(why.contains(say), "{why}");
    };
    for (odd, say) in [
        (geometry(DEPTH + 1, MAX_IO), "queue depth is 25, that of the session's other paths 24"),
        (geometry(DEPTH - 1, MAX_IO), "queue depth is 23, that of the session's other paths 24"),
        (geometry(DEPTH, MAX_IO - 4096), "max_io_size is 57344, less than the 61440"),
    ] {
        other.geometry = odd;
        let private = other.good_accept();
        other.pump_until(&private, |r| r.gone > 0);
        misfit(say);
        other = Rogue::again(other);
    }
    // It comes by itself once the server has seen to it.
    other.geometry = geometry(DEPTH, MAX_IO);
    other.serve();
    wait_for("both paths", || client.info(id).paths.iter().all(|p| p.state == PathState::Connected));
    // Both are lost, and come back as different servers: who has answered in full first decides.
    first.disconnect(0);
    other.disconnect(0);
    client.await_event(|e| matches!(e, Event::SessionDown { .. }).then_some(()));
    (first, other) = (Rogue::again(first), Rogue::again(other));
    (first.geometry, other.geometry) = (geometry(3, 4096), geometry(5, 8192));
    first.wait_info_req();
    other.wait_info_req();
    other.send(0, SendOp::Send, &other.good_info_rsp());
    let limits = client.await_event(|e| match e {
        Event::SessionUp { session, generation: 2 } => Some(session.limits),
        _ => None,
    });
    assert_eq!((limits.queue_depth, limits.max_io_size), (5, 8192));
    first.send(0, SendOp::Send, &first.good_info_rsp());
    misfit("queue depth is 3, that of the session's other paths 5");
    assert!(client.info(id).connected);
}
