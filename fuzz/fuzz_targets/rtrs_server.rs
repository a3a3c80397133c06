//! An RTRS server over the loopback provider, and clients that say anything: connection requests, INFO_REQ, requests
//! right or nearly right, RDMA writes into chunks at any time, immediates and messages out of nowhere, while the layer
//! above answers when it likes. The server and its lane run on one reactor, on this thread, and each step of a client
//! is followed by some turns. No buffer is handed up twice at a time or reaches out of its chunk, no request is answered
//! twice, and in the end everything closes.
#![no_main]

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use iobuf::{Region, Registry};
use libfuzzer_sys::fuzz_target;
use reactor::{IdlePolicy, Polled, Poller, Reactor, Turn};
use rtrs_poll::{Incoming, Io, Options, ReqId, Server, Session, SessionEvents, Upper};
use rtrs_proto::client::{ClientImm, Rbufs, decode, info_req, parse_rkey_rsp};
use rtrs_proto::handshake::ConnectRequest;
use rtrs_proto::imm::{HB_ACK, HB_MSG};
use rtrs_proto::request::Direction;
use rtrs_proto::response::ReadStyle;
use rtrs_proto::wire::{MsgRdmaRead, MsgRdmaWrite, SgDesc, Uuid, msg_type};
use rtrs_proto::{Errno, Geometry};
use verbs::loopback::{Config, Fabric};
use verbs::*;
use zerocopy::IntoBytes;

const DEPTH: u16 = 4;
const CHUNK: u32 = 8192;
const PATHS: usize = 3;
const CONS: usize = 3;
/// Turns of the server after each step, and until everything must have ended.
const TURNS: u32 = 3;
const LAST: u32 = 400;
/// Bytes of a client's memory: what is sent, where receives land, and what the server may write.
const MEMORY: usize = 32768;
const RECV_AT: usize = 12288;
const RECV: u32 = 256;
const RECVS: usize = 8;
const DATA_AT: usize = 20480;
const CAPS: QpCaps = QpCaps { max_send_wr: 32, max_recv_wr: 16, max_send_sge: 2, max_recv_sge: 1, domain: verbs::Domain::COMMON };

/// Bytes of the input, zero at its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        self.0.split_off(..len.min(self.0.len())).unwrap_or_default()
    }
}

/// What the layer above and the clients know of each other.
#[derive(Default)]
struct Shared {
    /// First bytes of chunks, as told to clients.
    chunks: Vec<u64>,
    /// Answers to give in the next turn.
    release: usize,
    held: Vec<Request>,
    up: usize,
    down: usize,
    /// Everything is answered from now on.
    ending: bool,
}

struct Request {
    req: ReqId,
    data: Option<(u64, u32)>,
    read: bool,
    result: Result<(), Errno>,
}

struct SharedCell(Rc<RefCell<Shared>>);

/// The layer above. What it does with a request is in the user message, if there is one.
struct Disk(Rc<RefCell<Shared>>);

impl Disk {
    fn answer(io: &mut Io, request: &Request) {
        if let Some((addr, len)) = request.data {
            // SAFETY: the segment of a request that has not been answered.
            let data = unsafe { std::slice::from_raw_parts_mut(addr as *mut u8, len as usize) };
            if request.read {
                data.fill(0x77);
            } else {
                std::hint::black_box(data.iter().map(|b| u32::from(*b)).sum::<u32>());
            }
        }
        io.reply(request.req, request.result);
    }
}

impl Upper for Disk {
    fn request(&mut self, _: &mut Turn<'_>, io: &mut Io, incoming: Incoming<'_>) {
        let mut shared = self.0.borrow_mut();
        let what = incoming.usr.first().copied().unwrap_or(0);
        let data = incoming.data.map(|s| (s.as_ptr() as u64, s.len));
        let request = Request {
            req: incoming.req,
            data,
            read: matches!(incoming.direction, Direction::Read { .. }),
            result: if what & 2 == 0 { Ok(()) } else { Err(Errno::EIO) },
        };
        if let Some((addr, len)) = data {
            let inside =
                |chunk: &&u64| addr >= **chunk && addr + u64::from(len) <= **chunk + u64::from(CHUNK);
            assert!(shared.chunks.iter().any(|chunk| inside(&chunk)), "out of its chunk");
            let apart = |(a, l): (u64, u32)| addr >= a + u64::from(l) || a >= addr + u64::from(len);
            assert!(shared.held.iter().filter_map(|r| r.data).all(apart), "in use twice");
        }
        assert!(shared.held.iter().all(|r| r.req != incoming.req));
        if what & 1 == 0 && !shared.ending {
            return Self::answer(io, &request);
        }
        shared.held.push(request);
    }

    fn poll(&mut self, _: &mut Turn<'_>, io: &mut Io) -> bool {
        let mut shared = self.0.borrow_mut();
        let count = if shared.ending { shared.held.len() } else { shared.release.min(shared.held.len()) };
        shared.release = 0;
        for request in shared.held.drain(..count) {
            Self::answer(io, &request);
        }
        count > 0
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        Polled::Busy
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}

struct Sessions(Rc<RefCell<Shared>>);

impl SessionEvents for Sessions {
    fn session_up(&mut self, _: &mut Turn<'_>, _: &Arc<Session>) {
        self.0.borrow_mut().up += 1;
    }

    fn session_down(&mut self, _: &mut Turn<'_>, _: &Arc<Session>) {
        let mut shared = self.0.borrow_mut();
        shared.down += 1;
        assert!(shared.down <= shared.up);
    }
}

struct Con {
    qp: Option<Box<dyn Qp>>,
    id: CmId,
    path: usize,
    up: bool,
}

/// What a client knows of a path.
#[derive(Default)]
struct Path {
    rbufs: Option<Rbufs>,
    asked: HashMap<u16, usize>,
    answered: HashMap<u16, usize>,
}

/// The clients: one host with several paths, and what the input makes them do.
struct Clients {
    input: Vec<u8>,
    at: usize,
    turns: u32,
    ended: u32,
    geometry: Geometry,
    cm: Box<dyn Cm>,
    cq: Option<Box<dyn Cq>>,
    mr: Option<Mr>,
    window: Option<Window>,
    cons: Vec<Con>,
    paths: [Path; PATHS],
    shared: Rc<RefCell<Shared>>,
    server: Rc<RefCell<Server<Disk>>>,
    done: Rc<RefCell<bool>>,
}

fn server_addr() -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], 1234))
}

impl Clients {
    fn dial(&mut self, bits: u8, flaw: u8) {
        if self.cons.len() >= PATHS * CONS {
            return;
        }
        let path = usize::from(bits & 3) % PATHS;
        let src = IpAddr::from([10, 0, bits & 3, 2]);
        let Ok(id) = self.cm.resolve(Some(src), server_addr(), Duration::ZERO) else { return };
        self.events();
        let Some(device) = self.cm.device(id) else { return };
        if self.cq.is_none() {
            self.cq = Some(device.clone().create_cq(1024).unwrap());
            let access =
                Access { domain: verbs::Domain::COMMON, local_write: true, remote_write: true, window_bind: true, remote_read: false };
            self.mr = Some(device.clone().register(Region::new(MEMORY).unwrap(), access).unwrap());
            self.window = device.alloc_window().ok();
        }
        let cq = self.cq.as_ref().expect("made above").handle();
        let qp = self.cm.create_qp(id, &CAPS, &cq).unwrap();
        self.cons.push(Con { qp: Some(qp), id, path, up: false });
        let con = self.cons.len() - 1;
        (0..RECVS).for_each(|_| self.post_recv(con));
        // The first two paths are of one session.
        let cid = self.cons.iter().filter(|c| c.path == path).count() as u16 - 1;
        let request = ConnectRequest {
            cid: if flaw == 1 { 2 } else { cid },
            cid_num: 1 + u16::from(bits >> 2 & 3),
            recon_cnt: u16::from(flaw == 2),
            path_uuid: Uuid([1 + path as u8; 16]),
            session_uuid: Uuid([1 + path as u8 / 2; 16]),
            first_conn: flaw != 3,
        };
        let mut private = request.to_wire().as_bytes().to_vec();
        if flaw >= 64 {
            let at = usize::from(flaw) % private.len();
            private[at] ^= bits | 1;
        }
        let params = ConnParams { rnr_retry: bits >> 5, ..ConnParams::FOREVER };
        let _ = self.cm.connect(id, params, &private);
        if cid == 0 {
            self.paths[path] = Path::default();
        }
    }

    fn events(&mut self) {
        while let Some(event) = self.cm.poll().unwrap() {
            let Some(con) = self.cons.iter_mut().find(|c| c.id == event.id()) else { continue };
            match event {
                CmEvent::Established { .. } => con.up = true,
                CmEvent::Disconnected(_) | CmEvent::Rejected { .. } | CmEvent::Failed { .. } => {
                    con.up = false
                }
                _ => {}
            }
        }
    }

    fn sge(&self, offset: usize, len: usize) -> SgeList {
        SgeList::one(
            self.mr.as_ref().expect("a connection is there").sge(offset, len as u32).expect("inside"),
        )
    }

    fn post_recv(&mut self, con: usize) {
        let sges = self.sge(RECV_AT, RECV as usize);
        if let Some(qp) = &mut self.cons[con].qp {
            let _ = qp.post_recv(&[RecvWr { wr_id: con as u64, sges }]);
        }
    }

    /// Sends `bytes`, which lie at the beginning of memory.
    fn post(&mut self, con: usize, op: SendOp, bytes: &[u8]) {
        let sges = if bytes.is_empty() { SgeList::EMPTY } else { self.sge(0, bytes.len()) };
        let mr = self.mr.as_ref().expect("a connection is there");
        assert!(mr.region().copy_in(0, bytes));
        if let Some(qp) = &mut self.cons[con].qp {
            let _ = qp.post_send(&[SendWr { wr_id: 1 << 32, op, sges, signaled: true }]);
        }
    }

    fn completions(&mut self) {
        let mut wcs = [Wc::default(); 16];
        while let Some(cq) = &mut self.cq {
            let n = cq.poll(&mut wcs).unwrap();
            for wc in &wcs[..n] {
                if wc.status == WcStatus::Success && matches!(wc.op, WcOp::Recv | WcOp::RecvWriteImm) {
                    self.received(wc);
                }
            }
            if n == 0 {
                break;
            }
        }
    }

    fn received(&mut self, wc: &Wc) {
        let con = wc.wr_id as usize;
        let mut bytes = vec![0; if wc.op == WcOp::Recv { wc.byte_len as usize } else { 0 }];
        assert!(self.mr.as_ref().expect("it is there").region().copy_out(RECV_AT, &mut bytes));
        self.post_recv(con);
        let path = &mut self.paths[self.cons[con].path];
        let Some(imm) = wc.imm else {
            if let Ok(rbufs) = Rbufs::parse(&self.geometry, &bytes) {
                let mut shared = self.shared.borrow_mut();
                shared.chunks.extend((0..DEPTH).filter_map(|id| rbufs.rbuf(id)).map(|rbuf| rbuf.addr));
                path.rbufs = Some(rbufs);
            }
            return;
        };
        if let ClientImm::Response { id, .. } = decode(&self.geometry, imm) {
            let count = path.answered.entry(id).or_default();
            *count += 1;
            assert!(*count <= path.asked.get(&id).copied().unwrap_or(0), "an answer to nothing");
            if let (Some(rbufs), Ok(rkey)) = (&mut path.rbufs, parse_rkey_rsp(&bytes, id)) {
                rbufs.set_rkey(id, rkey);
            }
        }
    }

    fn info(&mut self, con: usize, input: &mut Input, flaw: u8) {
        let mut message = info_req("client").expect("a good name").as_bytes().to_vec();
        if flaw > 0 {
            let bytes = input.bytes(usize::from(flaw));
            message[..bytes.len()].copy_from_slice(bytes);
            message.truncate(message.len() - usize::from(flaw) / 8);
        }
        self.post(con, SendOp::Send, &message);
    }

    /// A request as it lies in a chunk, its parts as large as the input says.
    fn frame(&mut self, input: &mut Input) -> (u32, Vec<u8>, u32) {
        let [kind, blocks, usr_len, what] = [(); 4].map(|()| input.byte());
        let len = u32::from(blocks % 12) * 512;
        let usr = vec![what; usr_len.into()];
        let (hole, mut bytes) = if kind & 1 == 0 { (0, vec![0x33; len as usize]) } else { (len, Vec::new()) };
        bytes.extend(&usr);
        let usr_len = if kind & 2 == 0 { usr.len() as u16 } else { input.word() };
        if kind & 1 == 0 {
            bytes.extend(
                MsgRdmaWrite { msg_type: msg_type::WRITE.into(), usr_len: usr_len.into() }.as_bytes(),
            );
        } else {
            let sg_cnt = if kind & 4 == 0 { u16::from(len > 0) } else { input.word() };
            let flags = u16::from(kind >> 3 & 1);
            let head = MsgRdmaRead {
                msg_type: msg_type::READ.into(),
                usr_len: usr_len.into(),
                flags: flags.into(),
                sg_cnt: sg_cnt.into(),
            };
            bytes.extend(head.as_bytes());
            let mr = self.mr.as_ref().expect("a connection is there");
            let rkey = match (kind >> 4 & 3, &self.window) {
                (1, Some(window)) => window.rkey,
                (2, _) => mr.rkey() ^ 1,
                _ => mr.rkey(),
            };
            let addr = mr.region().as_ptr() as u64 + DATA_AT as u64;
            let desc_len = if kind & 64 == 0 { len } else { input.word().into() };
            bytes.extend(SgDesc::new(addr, rkey, desc_len).as_bytes());
        }
        if kind & 128 != 0 {
            // Any byte of the end, where the headers are.
            let from_end = usize::from(input.byte()) % bytes.len().min(48) + 1;
            let at = bytes.len() - from_end;
            bytes[at] ^= input.byte();
        }
        (hole, bytes, len + usr.len() as u32)
    }

    fn request(&mut self, con: usize, argument: u8, input: &mut Input) {
        let (hole, bytes, off) = self.frame(input);
        let id = u16::from(argument) % DEPTH;
        let path = &mut self.paths[self.cons[con].path];
        let Some(rbuf) = path.rbufs.as_ref().and_then(|rbufs| rbufs.rbuf(id)) else { return };
        *path.asked.entry(id).or_default() += 1;
        let off = if argument & 8 == 0 { off } else { input.word().into() };
        let imm = self.geometry.imm_layout().io_req(id, off);
        let fits = bytes.len().min(12288);
        self.post(
            con,
            SendOp::WriteImm { addr: rbuf.addr + u64::from(hole), rkey: rbuf.rkey, imm },
            &bytes[..fits],
        );
    }

    /// A write that nobody hears of.
    fn scribble(&mut self, con: usize, argument: u8, input: &mut Input) {
        let (offset, len) = (input.word(), usize::from(input.byte()));
        let id = u16::from(argument) % DEPTH;
        let path = &self.paths[self.cons[con].path];
        let Some(rbuf) = path.rbufs.as_ref().and_then(|rbufs| rbufs.rbuf(id)) else { return };
        let bytes = input.bytes(len);
        let rkey = if argument & 8 == 0 { rbuf.rkey } else { rbuf.rkey ^ u32::from(offset) };
        self.post(con, SendOp::Write { addr: rbuf.addr + u64::from(offset), rkey }, bytes);
    }

    fn immediate(&mut self, con: usize, argument: u8, input: &mut Input) {
        let imm = match argument {
            0..=2 => HB_MSG,
            3 => HB_ACK,
            _ => u32::from(input.word()) << 16 | u32::from(input.word()),
        };
        let layout = self.geometry.imm_layout();
        let path = &mut self.paths[self.cons[con].path];
        for id in 0..DEPTH {
            // It may be a request; the server says what it is.
            if (layout.io_req(id, 0)..layout.io_req(id, 0) + CHUNK).contains(&imm) {
                *path.asked.entry(id).or_default() += 1;
            }
        }
        self.post(con, SendOp::WriteImm { addr: 0, rkey: 0, imm }, &[]);
    }

    fn step(&mut self, cx: &mut Turn<'_>, input: &mut Input) {
        let op = input.byte();
        let (what, argument) = (op & 15, op >> 4);
        if what < 3 {
            return self.dial(input.byte(), input.byte());
        }
        if what == 3 {
            self.shared.borrow_mut().release = argument.into();
            return;
        }
        if self.cons.is_empty() {
            return;
        }
        let con = usize::from(input.byte()) % self.cons.len();
        match what {
            4 | 5 => self.info(con, input, argument / 4 * 10),
            6..=9 => self.request(con, argument, input),
            10 => self.scribble(con, argument, input),
            11 => self.immediate(con, argument, input),
            12 => {
                let len = usize::from(input.byte());
                self.post(con, SendOp::Send, input.bytes(len));
            }
            13 => {
                let id = self.cons[con].id;
                let _ = self.cm.disconnect(id);
                if argument & 1 != 0 {
                    self.cons[con].qp = None;
                }
                if argument & 2 != 0 {
                    self.cm.destroy(id);
                }
            }
            14 => {
                let mr = self.mr.as_ref().expect("a connection is there");
                if let (Some(window), Some(qp)) = (&mut self.window, &mut self.cons[con].qp) {
                    let _ = qp.bind_window(window, mr, DATA_AT, u32::from(argument) * 512);
                }
            }
            _ => {
                let mut server = self.server.borrow_mut();
                match argument {
                    0 | 1 => drop(server.disconnect_path(cx, "client", None)),
                    2 => server.abort(cx),
                    3 => server.reset_path_stats(None, None),
                    _ => drop(server.sessions(cx.now)),
                }
            }
        }
    }

    fn end(&mut self, cx: &mut Turn<'_>) {
        match self.ended {
            0 => {
                // Some clients go first, some hang on.
                if self.input.first().is_some_and(|b| b & 8 != 0) {
                    self.cons.clear();
                }
                self.shared.borrow_mut().ending = true;
                let done = self.done.clone();
                self.server.borrow_mut().shutdown(cx, move |_| *done.borrow_mut() = true);
            }
            n if n == LAST / 2 && !*self.done.borrow() => self.server.borrow_mut().abort(cx),
            _ => {}
        }
        self.ended += 1;
        if *self.done.borrow() && self.ended > 2 {
            assert!(self.server.borrow().sessions(cx.now).is_empty());
            assert_eq!(self.shared.borrow().up, self.shared.borrow().down);
            cx.handle().clone().stop();
        }
        assert!(self.ended < LAST, "does not close");
    }
}

struct Driver(Clients);

impl Poller for Driver {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        let clients = &mut self.0;
        clients.events();
        clients.completions();
        clients.turns += 1;
        if clients.at >= clients.input.len() {
            clients.end(cx);
        } else if clients.turns % TURNS == 0 {
            let bytes = std::mem::take(&mut clients.input);
            let mut input = Input(&bytes[clients.at..]);
            clients.step(cx, &mut input);
            clients.at = bytes.len() - input.0.len();
            clients.input = bytes;
        }
        Polled::Busy
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fuzz_target!(|input: &[u8]| {
    let Some(bits) = input.first() else { return };
    let geometry = Geometry::new(DEPTH, CHUNK - 4096, 4096).unwrap();
    let mut config = Config::default();
    config.device.windows =
        [WindowKind::PerDomain, WindowKind::PerQp, WindowKind::PerDomain, WindowKind::Unsupported]
            [usize::from(bits >> 1 & 3)];
    let fabric = Fabric::with_config(config);
    let options = Options {
        geometry,
        rotate_rkeys: bits & 1 != 0,
        reads: if bits & 16 == 0 { ReadStyle::Invalidate } else { ReadStyle::OneMessage },
        max_sessions: 2,
        share_percent: 100,
        max_paths: 3,
        max_connections: 8,
        ..Options::default()
    };
    let mut reactor = Reactor::new("fuzz", None, IdlePolicy::Poll).unwrap();
    let handle = reactor.handle();
    let shared = Rc::new(RefCell::new(Shared::default()));
    reactor.setup(|cx| {
        cx.set_local(Rc::new(SharedCell(shared.clone())));
        let server = Server::install(
            cx,
            options,
            Arc::new(Registry::default()),
            &[handle],
            |cx| Disk(cx.local::<SharedCell>().expect("set above").0.clone()),
            Rc::new(RefCell::new(Sessions(shared.clone()))),
        );
        server.borrow_mut().add_cm(cx, fabric.cm()).unwrap();
        server.borrow_mut().listen(server_addr(), "loopback", None).unwrap();
        let clients = Clients {
            input: input.to_vec(),
            at: 1,
            turns: 0,
            ended: 0,
            geometry,
            cm: fabric.cm(),
            cq: None,
            mr: None,
            window: None,
            cons: Vec::new(),
            paths: Default::default(),
            shared: shared.clone(),
            server,
            done: Rc::default(),
        };
        cx.add_poller("clients", Box::new(Driver(clients)));
    });
    reactor.run();
    // Nothing stays.
    drop(fabric);
    assert_eq!(Rc::strong_count(&shared), 1);
    static FIRST: LazyLock<usize> = LazyLock::new(descriptors);
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    if RUNS.fetch_add(1, Ordering::Relaxed) % 1024 == 0 {
        assert!(descriptors() <= *FIRST + 16);
    }
});
