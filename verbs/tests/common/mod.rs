//! Two ends of a connection in one thread, over any provider.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use iobuf::Region;
use verbs::loopback::Fabric;
use verbs::*;

pub const FOREVER: ConnParams = ConnParams { read_depth: 4, ..ConnParams::FOREVER };
pub const CAPS: QpCaps =
    QpCaps { max_send_wr: 16, max_recv_wr: 16, max_send_sge: 2, max_recv_sge: 2, domain: Domain::COMMON };
/// Where receives and writes land, and where sends come from, in each end's region.
pub const IN: usize = 0;
pub const OUT: usize = 65536;
const REGION: usize = 131072;

/// Two addresses of a network, for [`World::new`].
pub fn ips(network: [u8; 3]) -> String {
    let [a, b, c] = network;
    format!("{a}.{b}.{c}.1,{a}.{b}.{c}.2")
}

/// Hosts to connect.
pub struct World {
    pub open: Box<dyn Fn() -> Box<dyn Cm>>,
    /// The server's address.
    pub ip: IpAddr,
    /// The client's.
    pub client_ip: IpAddr,
}

impl World {
    /// `ips`: the server's and the client's, "10.9.1.1,10.9.1.2".
    pub fn new(open: impl Fn() -> Box<dyn Cm> + 'static, ips: &str) -> Self {
        let (server, client) = ips.split_once(',').expect("SERVER,CLIENT");
        let parse = |ip: &str| ip.parse().expect("an IP address");
        Self { open: Box::new(open), ip: parse(server), client_ip: parse(client) }
    }

    pub fn loopback(fabric: Fabric) -> Self {
        Self::new(move || fabric.cm(), "10.9.1.1,10.9.1.2")
    }

    pub fn cm(&self) -> Box<dyn Cm> {
        (self.open)()
    }

    pub fn addr(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, port)
    }
}

/// Polls until `f` has something, without pauses: providers without a thread of their own move by it.
pub fn until<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let (start, patience) = (Instant::now(), test_support::patience());
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(start.elapsed() < patience, "no {what} within {patience:?}");
        std::thread::yield_now();
    }
}

pub fn event(cm: &mut dyn Cm, what: &str) -> CmEvent {
    until(what, || cm.poll().expect("event channel"))
}

/// One side of a connection with its own host.
pub struct End {
    // Dropped in this order, as `Qp`, `Cq` and `Mr` ask for nothing in particular: the providers keep what they need.
    pub qp: Box<dyn Qp>,
    pub cq: Box<dyn Cq>,
    pub mr: Mr,
    pub device: Arc<dyn Device>,
    pub id: CmId,
    pub cm: Box<dyn Cm>,
    pub listener: Option<CmId>,
    /// What the peer sent with its request or answer.
    pub private: Vec<u8>,
    /// Own and peer's address, server side.
    pub path: Option<(SocketAddr, SocketAddr)>,
}

pub const ALL: Access = Access {
    domain: Domain::COMMON,
    local_write: true,
    remote_write: true,
    remote_read: true,
    window_bind: false,
};
pub const WINDOWS: Access = Access {
    domain: Domain::COMMON,
    local_write: true,
    remote_write: false,
    remote_read: false,
    window_bind: true,
};

/// How the two ends of a test are made.
pub struct Setup {
    pub caps: QpCaps,
    pub cqe: u32,
    pub access: Access,
    pub params: ConnParams,
    pub port: u16,
}

impl Setup {
    pub fn new(port: u16) -> Self {
        Self { caps: CAPS, cqe: 64, access: ALL, params: FOREVER, port }
    }
}

type Equipment = (Box<dyn Qp>, Box<dyn Cq>, Mr, Arc<dyn Device>);

fn equip(cm: &mut dyn Cm, id: CmId, s: &Setup) -> Equipment {
    let device = cm.device(id).expect("a device");
    let mr = device.clone().register(Region::new(REGION).unwrap(), s.access).expect("register");
    let cq = device.clone().create_cq(s.cqe).expect("completion queue");
    let qp = cm.create_qp(id, &s.caps, &cq.handle()).expect("queue pair");
    (qp, cq, mr, device)
}

/// An address resolved, up to having a queue pair.
pub fn resolved(world: &World, s: &Setup, src: Option<IpAddr>) -> End {
    let mut cm = world.cm();
    let id = cm.resolve(src, world.addr(s.port), test_support::limit(30)).expect("resolve");
    match event(&mut *cm, "resolution") {
        CmEvent::Resolved(got) => assert_eq!(got, id),
        other => panic!("{other:?}"),
    }
    let (qp, cq, mr, device) = equip(&mut *cm, id, s);
    End { qp, cq, mr, device, id, cm, listener: None, private: Vec::new(), path: None }
}

/// Server and client, connected. The client sends "hello" with its request, the server "welcome" with its answer.
pub fn pair(world: &World, s: &Setup) -> (End, End) {
    let mut server_cm = world.cm();
    let listener = server_cm.listen(world.addr(s.port), 8).expect("listen");
    let mut client = resolved(world, s, Some(world.client_ip));
    client.cm.connect(client.id, s.params, b"hello").expect("connect");
    let mut server = match event(&mut *server_cm, "connect request") {
        CmEvent::ConnectRequest { listener: l, id, private, local, peer } => {
            assert_eq!(l, listener);
            let (qp, cq, mr, device) = equip(&mut *server_cm, id, s);
            let (listener, path) = (Some(listener), Some((local, peer)));
            End { qp, cq, mr, device, id, cm: server_cm, listener, private, path }
        }
        other => panic!("{other:?}"),
    };
    server.cm.accept(server.id, s.params, b"welcome").expect("accept");
    match event(&mut *client.cm, "acceptance") {
        CmEvent::Established { id, private } => {
            assert_eq!(id, client.id);
            client.private = private;
        }
        other => panic!("{other:?}"),
    }
    match event(&mut *server.cm, "establishment") {
        CmEvent::Established { id, .. } => assert_eq!(id, server.id),
        other => panic!("{other:?}"),
    }
    (server, client)
}

impl End {
    pub fn fill(&self, offset: usize, data: &[u8]) {
        assert!(self.mr.region().copy_in(offset, data));
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(self.mr.region().copy_out(offset, &mut out));
        out
    }

    pub fn sge(&self, offset: usize, len: u32) -> SgeList {
        SgeList::one(self.mr.sge(offset, len).unwrap())
    }

    /// Address of `offset` for the peer.
    pub fn addr(&self, offset: usize) -> u64 {
        self.mr.region().as_ptr() as u64 + offset as u64
    }

    pub fn recv(&mut self, wr_id: u64, len: u32) {
        let sges = if len == 0 { SgeList::EMPTY } else { self.sge(IN + wr_id as usize * 4096, len) };
        self.qp.post_recv(&[RecvWr { wr_id, sges }]).expect("post receive");
    }

    pub fn wr(&self, wr_id: u64, op: SendOp, len: u32) -> SendWr {
        let sges = if len == 0 { SgeList::EMPTY } else { self.sge(OUT, len) };
        SendWr { wr_id, op, sges, signaled: true }
    }

    pub fn post(&mut self, wr_id: u64, op: SendOp, len: u32) {
        let wr = self.wr(wr_id, op, len);
        self.qp.post_send(&[wr]).expect("post send");
    }

    /// The next completion.
    pub fn wc(&mut self) -> Wc {
        until("completion", || {
            let mut out = [Wc::default()];
            (self.cq.poll(&mut out).expect("poll") == 1).then_some(out[0])
        })
    }

    pub fn wcs(&mut self, n: usize) -> Vec<Wc> {
        (0..n).map(|_| self.wc()).collect()
    }

    /// Polls for a while: nothing must come.
    pub fn silent(&mut self) {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(100) {
            let mut out = [Wc::default()];
            assert_eq!(self.cq.poll(&mut out).expect("poll"), 0, "{:?}", out[0]);
        }
    }

    pub fn expect_send(&mut self, wr_id: u64) {
        let wc = self.wc();
        assert_eq!((wc.wr_id, wc.status, wc.op), (wr_id, WcStatus::Success, WcOp::Send), "{wc:?}");
        assert_eq!(wc.qp_num, self.qp.num());
    }

    /// Linux' software RoCE device, which takes some liberties.
    pub fn is_rxe(&self) -> bool {
        self.device.info().name.starts_with("rxe")
    }

    /// A failed request tells why; rxe, depending on the kernel, names another error or only flushes it.
    pub fn expect_own_error(&mut self, wr_id: u64, status: u32) {
        let wc = self.wc();
        assert_eq!(wc.wr_id, wr_id, "{wc:?}");
        if self.is_rxe() {
            assert_ne!(wc.status, WcStatus::Success);
        } else {
            assert_eq!(wc.status, WcStatus::Error(status));
        }
    }

    pub fn disconnected(&mut self) {
        match event(&mut *self.cm, "disconnect event") {
            CmEvent::Disconnected(id) => assert_eq!(id, self.id),
            other => panic!("{other:?}"),
        }
    }
}

/// All posted work of both ends as (wr_id, status), in any order between send and receive queue.
pub fn statuses(wcs: &[Wc]) -> Vec<(u64, WcStatus)> {
    let mut all: Vec<_> = wcs.iter().map(|w| (w.wr_id, w.status)).collect();
    all.sort_by_key(|(id, _)| *id);
    all
}
