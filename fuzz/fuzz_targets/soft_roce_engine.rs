//! Software RoCE with a peer that sends anything: connection requests, packets with a right ICRC and headers from the
//! input, raw bytes; while its user posts, polls, waits, disconnects. No work request ends twice or longer than it is,
//! peers reach only memory that is open to them, and all that is sent is a packet with a right ICRC.
#![no_main]

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use iobuf::Region;
use libfuzzer_sys::fuzz_target;
use roce_proto::cm::{Body, Ids, Message, Mra, Path, Rej, Req, gid, service_id};
use roce_proto::icrc::{Flow, FlowCrc, PeerIds};
use roce_proto::packet::{self, MAD_PACKET_LEN, Parsed, encode_mad};
use roce_proto::{Aeth, Headers, Opcode, Psn, Reth, UDP_PORT};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with, sockopt};
use soft_roce::{Options, SoftRoce, fuzzing};
use verbs::*;

const PORT: u16 = 7000;
const LEN: usize = 16384;
/// Bytes of a receive.
const RECV: u32 = 1024;
const CAPS: QpCaps = QpCaps { max_send_wr: 8, max_recv_wr: 8, max_send_sge: 2, max_recv_sge: 2, domain: verbs::Domain::COMMON };
const ENTRIES: u32 = 32;
/// What memory holds that no peer may see, what it may see, and what may be written.
const SECRET: u8 = 0xee;
const PUBLIC: u8 = 0x22;
/// The peer's queue pair.
const PEER_QPN: u32 = 0x12_3456;
/// What the server begins with.
const FIRST_PSN: Psn = Psn::new(100);
const OPEN: Access = Access { domain: verbs::Domain::COMMON, local_write: true, remote_write: true, remote_read: false, window_bind: true };
const READABLE: Access =
    Access { domain: verbs::Domain::COMMON, local_write: false, remote_write: false, remote_read: true, window_bind: false };
const CLOSED: Access =
    Access { domain: verbs::Domain::COMMON, local_write: false, remote_write: false, remote_read: false, window_bind: false };

/// A host that stays: opening its sockets takes longer than everything else.
struct Host {
    ip: IpAddr,
    soft: SoftRoce,
    _listener: Mutex<Box<dyn Cm>>,
    _cq: Mutex<Box<dyn Cq>>,
}

impl Host {
    fn new(ip: IpAddr, segmentation: bool) -> Self {
        let options = Options {
            segmentation,
            receive_buffer: 0,
            max_inflight: 8192,
            progress_thread: false,
            faults: None,
        };
        let soft = SoftRoce::new(options).unwrap();
        let mut cm = soft.cm().unwrap();
        cm.listen(SocketAddr::new(ip, PORT - 1), 1).unwrap();
        // The sockets of a completion queue stay while those of a later one do.
        let device = cm.devices().pop().expect("that of the listener");
        let mut cqs = [(); 2].map(|()| device.clone().create_cq(ENTRIES).unwrap()).into_iter();
        drop(cqs.next());
        let cq = cqs.next().expect("there are two");
        Self { ip, soft, _listener: Mutex::new(cm), _cq: Mutex::new(cq) }
    }
}

struct Place {
    hosts: [Host; 2],
    peer: IpAddr,
    stranger: IpAddr,
    /// The peer's, for what it is sent.
    socket: UdpSocket,
    open: Arc<Region>,
    readable: Arc<Region>,
    closed: Arc<Region>,
}

// Addresses of this process, as others may fuzz beside it.
static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let [.., a, b] = std::process::id().to_be_bytes();
    let ip = |net: u8| IpAddr::from([127, net, a, b]);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None).unwrap();
    sockopt::set_socket_reuseport(&socket, true).unwrap();
    bind(&socket, &SocketAddr::new(ip(202), UDP_PORT)).expect("a free RoCE port");
    let region = || Region::new(LEN).unwrap();
    Place {
        hosts: [Host::new(ip(201), true), Host::new(ip(204), false)],
        peer: ip(202),
        stranger: ip(203),
        socket: socket.into(),
        open: region(),
        readable: region(),
        closed: region(),
    }
});

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

/// What the server's user holds of a connection.
struct User {
    id: CmId,
    qp: Option<Box<dyn Qp>>,
    cq: Box<dyn Cq>,
    window: Window,
}

struct World {
    host: &'static Host,
    cm: Box<dyn Cm>,
    user: Option<User>,
    keys: [Mr; 3],
    /// Of the server's REP.
    ids: Ids,
    qpn: u32,
    /// What it expects next, as far as the peer knows.
    psn: Psn,
    own_peer: bool,
    next_wr: u64,
    /// Bytes by work request that has not ended.
    open: HashMap<u64, u32>,
    /// Waits to be sent together.
    run: Vec<Vec<u8>>,
    /// For what the peer receives.
    buffer: Vec<u8>,
}

/// `packet` with its ICRC.
fn seal((src, src_port): (IpAddr, u16), dst: IpAddr, id: u16, mut packet: Vec<u8>) -> Vec<u8> {
    let flow = FlowCrc::new(Flow { src, src_port, dst });
    let mut digest = flow.begin(packet.len() + 4, id, &packet[..12]);
    digest.update(&packet[12..]);
    packet.extend(digest.finish());
    packet
}

impl World {
    fn new(bits: u8) -> Self {
        let host = &PLACE.hosts[usize::from(bits & 1)];
        // Last words of what was before.
        while recvfrom(&PLACE.socket, &mut [0; 1][..], RecvFlags::DONTWAIT).is_ok() {}
        let mut cm = host.soft.cm().unwrap();
        cm.listen(SocketAddr::new(host.ip, PORT), 8).unwrap();
        let device = cm.devices().pop().expect("that of the listener");
        let keys = [(&PLACE.open, OPEN), (&PLACE.readable, READABLE), (&PLACE.closed, CLOSED)]
            .map(|(region, access)| device.clone().register(region.clone(), access).unwrap());
        for (mr, byte) in keys.iter().zip([0, PUBLIC, SECRET]) {
            assert!(mr.region().copy_in(0, &[byte; LEN]));
        }
        Self {
            host,
            cm,
            user: None,
            keys,
            ids: Ids { local: 7, remote: 0 },
            qpn: 0,
            psn: FIRST_PSN,
            own_peer: false,
            next_wr: 0,
            open: HashMap::new(),
            run: Vec::new(),
            buffer: vec![0; 8192],
        }
    }

    fn inject(&self, src: IpAddr, src_port: u16, bytes: &[u8], segment: usize) {
        self.host.soft.inject(SocketAddr::new(src, src_port), self.host.ip, bytes, segment);
    }

    fn mad(&self, body: Body) {
        self.raw_mad(&Message { tid: 1, body }.encode());
    }

    fn raw_mad(&self, mad: &[u8; 256]) {
        let mut packet = [0; MAD_PACKET_LEN];
        encode_mad(0, mad, &mut packet);
        let packet = seal((PLACE.peer, UDP_PORT), self.host.ip, 0, packet.to_vec());
        self.inject(PLACE.peer, UDP_PORT, &packet, packet.len());
    }

    /// A request to connect that is good but for what the input makes of it.
    fn request(&mut self, bits: u8, depth: u8) {
        self.own_peer = bits & 1 != 0;
        let mut private = [0; 92];
        private[1] = 0x40;
        for (at, ip) in [(16, PLACE.peer), (32, self.host.ip)] {
            let IpAddr::V4(ip) = ip else { return };
            private[at..at + 4].copy_from_slice(&ip.octets());
        }
        let path = Path {
            local_gid: gid(PLACE.peer),
            remote_gid: gid(self.host.ip),
            ack_timeout: bits & 31,
            ..Path::default()
        };
        self.mad(Body::Req(Req {
            local_id: self.ids.local,
            service_id: service_id(PORT),
            guid: if self.own_peer { 0x72_6e62 << 40 | 5 } else { 0x11 },
            qpn: PEER_QPN,
            responder_resources: depth & 15,
            initiator_depth: depth >> 4,
            remote_timeout: 20,
            transport: 0,
            start_psn: FIRST_PSN,
            local_timeout: 20,
            retry: bits >> 5,
            rnr_retry: depth & 7,
            pkey: 0xffff,
            mtu_code: 1 + (bits >> 1) % 5,
            max_retries: 15,
            primary: path,
            alternate: Path::default(),
            private,
        }));
    }

    /// Looks at events, and takes the first connection.
    fn poll_cm(&mut self) {
        while let Some(event) = self.cm.poll().unwrap() {
            let CmEvent::ConnectRequest { id, .. } = event else { continue };
            if self.user.is_some() {
                let _ = self.cm.reject(id, b"no");
                self.cm.destroy(id);
                continue;
            }
            let device = self.cm.device(id).unwrap();
            let cq = device.clone().create_cq(ENTRIES).unwrap();
            let window = device.alloc_window().unwrap();
            let qp = self.cm.create_qp(id, &CAPS, &cq.handle()).unwrap();
            self.qpn = qp.num();
            self.user = Some(User { id, qp: Some(qp), cq, window });
            (0..4).for_each(|_| self.post_recv(RECV));
            let params = ConnParams { read_depth: 4, ..ConnParams::FOREVER };
            // The peer may have given up already.
            let _ = self.cm.accept(id, params, b"");
        }
    }

    fn next_wr(&mut self, len: u32) -> u64 {
        self.next_wr += 1;
        assert!(self.open.insert(self.next_wr, len).is_none());
        self.next_wr
    }

    fn sge(&self, key: usize, offset: u16, len: u32) -> SgeList {
        let offset = usize::from(offset) % (LEN - len as usize);
        SgeList::one(self.keys[key].sge(offset, len).unwrap())
    }

    fn post_recv(&mut self, len: u32) {
        let sges = self.sge(0, (self.next_wr * 1031) as u16, len);
        let wr_id = self.next_wr(len);
        let qp = self.user.as_mut().and_then(|user| user.qp.as_mut());
        if qp.is_none_or(|qp| qp.post_recv(&[RecvWr { wr_id, sges }]).is_err()) {
            self.open.remove(&wr_id);
        }
    }

    fn post_send(&mut self, what: u8, place: u16) {
        let len = u32::from(what >> 3) * 97;
        let sges = match what & 7 {
            // Nobody but the peer of a READ writes it.
            5 => self.sge(0, place, len),
            _ => self.sge(1, place, len),
        };
        let wr_id = self.next_wr(u32::MAX);
        let (addr, rkey) = (u64::from(place), 1);
        let Some(user) = &mut self.user else { return };
        let Some(qp) = &mut user.qp else { return };
        let op = match what & 7 {
            0 => SendOp::Send,
            1 => SendOp::SendImm(5),
            2 => SendOp::SendInvalidate(6),
            3 => SendOp::Write { addr, rkey },
            4 => SendOp::WriteImm { addr, rkey, imm: 7 },
            5 => SendOp::Read { addr, rkey },
            6 => SendOp::LocalInvalidate(user.window.rkey),
            _ => {
                let _ = qp.bind_window(&mut user.window, &self.keys[0], usize::from(place) % LEN / 2, len);
                return;
            }
        };
        let _ = qp.post_send(&[SendWr { wr_id, op, sges, signaled: place & 1 == 0 }]);
    }

    /// A turn of the engine.
    fn poll_cq(&mut self) {
        let Some(user) = &mut self.user else { return };
        let mut out = [Wc::default(); 8];
        let Ok(n) = user.cq.poll(&mut out) else { return };
        for wc in &out[..n] {
            if wc.wr_id == BIND_WR_ID {
                continue;
            }
            let len = self.open.remove(&wc.wr_id).expect("it has not ended");
            assert!(wc.status != WcStatus::Success || wc.op != WcOp::Recv || wc.byte_len <= len);
            assert_eq!(wc.qp_num, self.qpn);
        }
    }

    /// Looks at what was sent.
    fn receive(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        while let Ok((n, _, Some(from))) = recvfrom(&PLACE.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            let from = SocketAddr::try_from(from).unwrap();
            assert_eq!(from.ip(), self.host.ip);
            self.check(from.port(), &buffer[..n]);
        }
        self.buffer = buffer;
    }

    fn check(&mut self, src_port: u16, udp: &[u8]) {
        let flow = FlowCrc::new(Flow { src: self.host.ip, src_port, dst: PLACE.peer });
        assert!(flow.verify(udp, PeerIds::Own { index_in_run: 0 }) || flow.verify(udp, PeerIds::Foreign));
        match packet::parse(udp) {
            Ok(Parsed::Mad(mad)) => {
                if let Some(Message { body: Body::Rep(rep), .. }) = Message::parse(mad.mad) {
                    assert_eq!(rep.qpn, self.qpn);
                    (self.ids.remote, self.psn) = (rep.ids.local, rep.start_psn);
                }
            }
            Ok(Parsed::Rc(packet)) => {
                assert_eq!(packet.headers.dest_qpn, PEER_QPN);
                assert!(packet.payload.iter().all(|b| *b == PUBLIC), "something else than may be read");
            }
            Err(reason) => panic!("{reason:?}"),
        }
    }

    /// Headers that the input chooses, of an opcode and near the next sequence number.
    fn headers(&mut self, input: &mut Input) -> Headers {
        let [opcode, psn, flags, key, offset] = [(); 5].map(|()| input.byte());
        let which = usize::from(key % 3);
        let window = self.user.as_ref().map_or(0, |user| user.window.rkey);
        let rkey = match key >> 4 {
            0 => window,
            1 => self.keys[which].rkey() ^ 1 << (offset & 31),
            _ => self.keys[which].rkey(),
        };
        // Near the beginning, near the end, or far away.
        let base = self.keys[which].region().as_ptr() as u64;
        let va = match flags & 3 {
            0 | 1 => base + u64::from(offset) * 64,
            2 => base + LEN as u64 - u64::from(offset),
            _ => base.wrapping_sub(u64::from(offset) << (flags >> 2)),
        };
        let len = if flags & 0x40 == 0 {
            u32::from(input.byte()) * 8
        } else {
            u32::from(input.word()) << (flags & 15)
        };
        let opcode = Opcode::ALL[usize::from(opcode) % Opcode::ALL.len()];
        // Requests are in order, or nearly; answers are to anything that was sent.
        let psn = match (is_answer(opcode), psn) {
            (true, _) => FIRST_PSN.plus((psn & 31).into()),
            (false, 0..128) => self.psn.plus((psn % 4 / 3).into()),
            (false, _) => self.psn.plus(i32::from(psn as i8) as u32),
        };
        Headers {
            opcode,
            solicited: flags & 8 != 0,
            ack_req: flags & 4 == 0,
            dest_qpn: if key & 15 == 15 { self.qpn ^ 1 << (flags & 31) & 0xff_ffff } else { self.qpn },
            psn,
            reth: Reth { va, rkey, len },
            aeth: Aeth { syndrome: key, msn: u32::from(offset) },
            imm: u32::from(offset),
            inv_rkey: rkey,
        }
    }

    fn rc_packet(&mut self, input: &mut Input) -> Vec<u8> {
        let headers = self.headers(input);
        let payload = vec![0x5a; usize::from(input.byte()) * 5];
        let pad = (payload.len().wrapping_neg() & 3) as u8;
        let mut head = [0; Headers::MAX_LEN];
        if matches!(headers.opcode, Opcode::AtomicAcknowledge | Opcode::CompareSwap | Opcode::FetchAdd) {
            // Not sent by the codec.
            let mut packet = vec![headers.opcode.to_wire(), 0x40, 0xff, 0xff, 0];
            packet.extend(&self.qpn.to_be_bytes()[1..]);
            packet.extend(self.psn.get().to_be_bytes());
            packet.extend([0x11; 28]);
            return packet;
        }
        let n = headers.encode(pad, &mut head);
        if !is_answer(headers.opcode) {
            self.psn = headers.psn.plus(1);
        }
        [&head[..n], &payload, &[0; 3][..usize::from(pad)]].concat()
    }

    /// Sends what waits, with `packet` at its end: all of the first one's length, or nothing goes together.
    fn transmit(&mut self, src: IpAddr, port: u16, packet: Vec<u8>, wait: bool) {
        let index = if self.own_peer { self.run.len() as u16 } else { 0 };
        let sealed = seal((src, port), self.host.ip, index, packet);
        self.run.push(sealed);
        let segment = self.run[0].len();
        if wait && self.run.len() < 8 && self.run.iter().all(|p| p.len() == segment) {
            return;
        }
        let run = std::mem::take(&mut self.run).concat();
        self.inject(src, port, &run, segment);
    }

    fn step(&mut self, op: u8, input: &mut Input) {
        let argument = op >> 4;
        match op & 15 {
            0..=4 => {
                let packet = self.rc_packet(input);
                let src = if argument == 15 { PLACE.stranger } else { PLACE.peer };
                let port = if argument & 7 == 7 { 50000 } else { UDP_PORT };
                self.transmit(src, port, packet, argument & 8 != 0);
            }
            5 => {
                // Any bytes behind a header that gets there.
                let len = usize::from(input.byte());
                let mut packet = input.bytes(len).to_vec();
                packet.resize(packet.len().max(12), 0);
                packet[1] &= 0xf0;
                packet[2..4].fill(0xff);
                packet[4..8].copy_from_slice(&self.qpn.to_be_bytes());
                self.transmit(PLACE.peer, UDP_PORT, packet, false);
            }
            6 => {
                let len = usize::from(input.byte());
                self.inject(PLACE.peer, UDP_PORT, input.bytes(len), usize::from(argument) * 16);
            }
            7 => self.manage(argument, input),
            8 => self.poll_cq(),
            9 => self.poll_cm(),
            10 => self.post_send(input.byte(), input.word()),
            11 => self.post_recv(u32::from(argument) * 64),
            12 => {
                fuzzing::pass(1 << (20 + argument));
                self.poll_cq();
                self.poll_cm();
            }
            13 => {
                if let Some(user) = &mut self.user {
                    let _ = user.cq.arm();
                    if let Some(qp) = &mut user.qp {
                        let _ = qp.set_min_rnr_timer(argument * 3);
                    }
                }
            }
            14 => {
                if let Some(user) = &mut self.user {
                    let _ = self.cm.disconnect(user.id);
                    if argument > 7 {
                        self.cm.destroy(user.id);
                    }
                }
            }
            _ => {
                if argument == 3
                    && let Some(user) = &mut self.user
                {
                    user.qp = None;
                }
            }
        }
        self.receive();
    }

    /// All is forgotten, by the host as well.
    fn end(mut self) {
        if let Some(user) = self.user.take() {
            let _ = self.cm.disconnect(user.id);
            drop(user.qp);
            self.cm.destroy(user.id);
        }
        for _ in 0..12 {
            self.poll_cm();
            fuzzing::pass(20_000_000_000);
        }
        self.receive();
    }

    /// A message of connection management.
    fn manage(&mut self, kind: u8, input: &mut Input) {
        let ids = self.ids;
        match kind {
            0..=2 => self.mad(Body::Rtu(ids)),
            3 => self.mad(Body::Dreq { ids, remote_qpn: self.qpn }),
            4 => self.mad(Body::Drep(ids)),
            5 => self.mad(Body::Mra(Mra { ids, of: input.byte() & 3, timeout: 20 })),
            6 => self.mad(Body::Rej(Rej {
                ids,
                of: input.byte() & 3,
                reason: 28,
                info_len: 0,
                info: [0; 72],
                private: [0; 148],
            })),
            7 => {
                let mut mad = [0; 256];
                let bytes = input.bytes(64);
                mad[..bytes.len()].copy_from_slice(bytes);
                mad[..4].copy_from_slice(&[1, 7, 2, 3]);
                self.raw_mad(&mad);
            }
            // Again, another one, and one for a queue pair of the same number.
            8..=11 => {
                self.ids.local = self.ids.local.wrapping_add(u32::from(kind & 1));
                self.request(input.byte(), input.byte());
            }
            _ => self.poll_cm(),
        }
    }
}

fn is_answer(opcode: Opcode) -> bool {
    use Opcode::*;
    matches!(
        opcode,
        ReadResponseFirst | ReadResponseMiddle | ReadResponseLast | ReadResponseOnly | Acknowledge
    )
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fuzz_target!(|input: &[u8]| {
    fuzzing::reset();
    let mut input = Input(input);
    let [bits, request, depth, stage] = [(); 4].map(|()| input.byte());
    let mut world = World::new(bits);
    world.request(request, depth);
    if stage & 3 > 0 {
        world.poll_cm();
        world.receive();
    }
    if stage & 3 > 1 {
        world.manage(0, &mut input);
        world.poll_cm();
    }
    for _ in 0..64 {
        let Some(op) = input.0.split_off_first() else { break };
        world.step(*op, &mut input);
    }
    for _ in 0..8 {
        world.poll_cq();
    }
    world.receive();
    for (mr, byte) in world.keys[1..].iter().zip([PUBLIC, SECRET]) {
        let mut bytes = [0; LEN];
        assert!(mr.region().copy_out(0, &mut bytes) && bytes == [byte; LEN], "written by nobody who may");
    }
    world.end();
    // Nothing stays open.
    static FIRST: LazyLock<usize> = LazyLock::new(descriptors);
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    if RUNS.fetch_add(1, Ordering::Relaxed) % 1024 == 0 {
        assert!(descriptors() <= *FIRST + 16);
    }
});
