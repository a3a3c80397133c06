//! A peer made of parts: it connects like any other, and then sends what the test wants it to.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use roce_proto::cm::{Action, Agent, Attributes, Config, ConnId, ConnectParams, Depths, Identity, QpFacts};
use roce_proto::icrc::{Flow, FlowCrc};
use roce_proto::packet::{MAD_PACKET_LEN, encode_mad};
use roce_proto::{Aeth, Counters, Headers, Opcode, Packet, Parsed, Psn, Reth, UDP_PORT, packet};

/// The queue pair number of the peer.
const QPN: u32 = 0x12_3456;

pub struct RawPeer {
    socket: UdpSocket,
    ip: IpAddr,
    pub attrs: Attributes,
}

/// A socket whose datagrams have identification 0 and DF, as the ICRC supposes.
pub fn socket(ip: IpAddr) -> UdpSocket {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).unwrap();
    // Somebody may be listening on all addresses.
    sockopt::set_socket_reuseport(&socket, true).unwrap();
    bind(&socket, &SocketAddr::new(ip, UDP_PORT)).expect("a free RoCE port");
    let socket = UdpSocket::from(socket);
    let probe: libc::c_int = 3;
    // SAFETY: an int as the option wants it, on an open socket.
    let ret = unsafe {
        libc::setsockopt(socket.as_raw_fd(), 0, libc::IP_MTU_DISCOVER, (&raw const probe).cast(), 4)
    };
    assert_eq!(ret, 0);
    socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
    socket
}

/// `packet` with its ICRC for the way from `src` to `dst`.
pub fn sealed(src: IpAddr, dst: IpAddr, mut packet: Vec<u8>) -> Vec<u8> {
    let flow = FlowCrc::new(Flow { src, src_port: UDP_PORT, dst });
    let mut digest = flow.begin(packet.len() + 4, 0, &packet[..12]);
    digest.update(&packet[12..]);
    packet.extend(digest.finish());
    packet
}

/// The datagram of connection request number `n` from `ip` to a listener.
#[allow(dead_code, reason = "other test programs use it")]
pub fn connect_request(ip: IpAddr, to: SocketAddr, n: u64, private: &[u8]) -> Vec<u8> {
    let mut seed = n;
    let random = move || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        seed.wrapping_mul(0xbf58_476d_1ce4_e5b9)
    };
    let mut agent = Agent::new(Identity::new(n << 24), Config::new(0, || 77), Box::new(random));
    let qp = QpFacts { qpn: QPN, start_psn: Psn::new(100) };
    let params = ConnectParams { qp, mtu: 1024, retry: 7, rnr_retry: 7, reads: Depths::default(), private };
    agent.connect(0, ConnId(1), ip, to, &params).unwrap();
    let Some(Action::Send { src, dst, mad }) = agent.next_action() else { panic!("a request comes first") };
    let mut packet = [0; MAD_PACKET_LEN];
    encode_mad(0, &mad, &mut packet);
    sealed(src, dst, packet.to_vec())
}

impl RawPeer {
    /// Connects from `ip` to a listener; `poll` lets the other side work and accept.
    pub fn connect(ip: IpAddr, to: SocketAddr, mut poll: impl FnMut()) -> Self {
        let socket = socket(ip);
        let mut seed = u64::from(std::process::id()) << 32 | u64::from(to.port());
        let random = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            seed.rotate_left(17)
        };
        let identity = Identity::new(u64::from(to.port()) << 32 | 0x5eed_0000_0000_0000);
        let mut agent = Agent::new(identity, Config::new(0, || 77), Box::new(random));
        let qp = QpFacts { qpn: QPN, start_psn: Psn::new(100) };
        let params = ConnectParams {
            qp,
            mtu: 1024,
            retry: 7,
            rnr_retry: 7,
            reads: Depths::default(),
            private: b"raw",
        };
        agent.connect(0, ConnId(1), ip, to, &params).unwrap();
        let start = Instant::now();
        let (mut attrs, mut established) = (None, false);
        while !established {
            assert!(start.elapsed() < test_support::patience(), "no connection");
            while let Some(action) = agent.next_action() {
                match action {
                    Action::Send { src, dst, mad } => {
                        let mut packet = [0; MAD_PACKET_LEN];
                        encode_mad(0, &mad, &mut packet);
                        socket.send_to(&sealed(src, dst, packet.to_vec()), (dst, UDP_PORT)).unwrap();
                    }
                    Action::QpReady { attrs: a, .. } => attrs = Some(a),
                    Action::Established { .. } => established = true,
                    other => panic!("{other:?}"),
                }
            }
            poll();
            let mut buffer = [0; 2048];
            if let Ok((n, from)) = socket.recv_from(&mut buffer)
                && let Ok(Parsed::Mad(mad)) = packet::parse(&buffer[..n])
            {
                let now = start.elapsed().as_nanos() as u64;
                agent.receive(now, from.ip(), ip, mad.mad, |_, _| 4096, &Counters::default());
            }
        }
        Self { socket, ip, attrs: attrs.expect("QpReady comes first") }
    }

    /// A SEND of one packet with the sequence number that is next plus `ahead`.
    pub fn send_only(&self, ahead: i32) -> Headers {
        Headers {
            opcode: Opcode::SendOnly,
            solicited: false,
            ack_req: true,
            dest_qpn: self.attrs.dest_qpn,
            psn: self.attrs.send_psn.plus(ahead as u32),
            reth: Reth::default(),
            aeth: Aeth::default(),
            imm: 0,
            inv_rkey: 0,
        }
    }

    pub fn write_only(&self, va: u64, rkey: u32, len: u32) -> Headers {
        Headers { opcode: Opcode::WriteOnly, reth: Reth { va, rkey, len }, ..self.send_only(0) }
    }

    /// All but the ICRC.
    pub fn packet(&self, headers: &Headers, payload: &[u8]) -> Vec<u8> {
        let pad = (payload.len().wrapping_neg() & 3) as u8;
        let mut head = [0; Headers::MAX_LEN];
        let n = headers.encode(pad, &mut head);
        [&head[..n], payload, &[0; 3][..usize::from(pad)]].concat()
    }

    /// With a right ICRC.
    pub fn sealed(&self, packet: Vec<u8>) -> Vec<u8> {
        sealed(self.ip, self.attrs.peer, packet)
    }

    /// As it is.
    pub fn transmit(&self, datagram: &[u8]) {
        self.socket.send_to(datagram, (self.attrs.peer, UDP_PORT)).unwrap();
    }

    /// The next RC packet that comes within `patience`.
    pub fn answer(&self, patience: Duration) -> Option<Headers> {
        let start = Instant::now();
        while start.elapsed() < patience {
            let mut buffer = [0; 8192];
            let Ok((n, _)) = self.socket.recv_from(&mut buffer) else { continue };
            if let Ok(Parsed::Rc(Packet { headers, .. })) = packet::parse(&buffer[..n]) {
                assert_eq!(headers.dest_qpn, QPN);
                return Some(headers);
            }
        }
        None
    }
}
