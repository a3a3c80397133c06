//! Packets of 4 KiB between two queue pairs on the loopback device, with turns taken by hand.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use iobuf::Region;
use soft_roce::{Options, SoftRoce};
use verbs::{
    Access, Cm, CmEvent, CmId, ConnParams, Cq, Mr, Qp, QpCaps, RecvWr, SendOp, SendWr, SgeList, Wc, WcStatus,
};

use crate::{BATCH, Kind, LEN, Round};

const CAPS: QpCaps = QpCaps {
    max_send_wr: 64,
    max_recv_wr: 64,
    max_send_sge: 1,
    max_recv_sge: 1,
    domain: verbs::Domain::COMMON,
};
const PARAMS: ConnParams = ConnParams { read_depth: 4, ..ConnParams::FOREVER };
const ACCESS: Access = Access {
    domain: verbs::Domain::COMMON,
    local_write: true,
    remote_write: true,
    remote_read: true,
    window_bind: false,
};

/// One side of the connection. Dropped in this order.
struct End {
    qp: Box<dyn Qp>,
    cq: Box<dyn Cq>,
    mr: Mr,
    wcs: Vec<Wc>,
    _cm: Box<dyn Cm>,
}

impl End {
    fn new(mut cm: Box<dyn Cm>, id: CmId) -> Self {
        let device = cm.device(id).expect("a device");
        let memory: Arc<Region> = Region::new(BATCH * LEN).expect("memory");
        let mr = device.clone().register(memory, ACCESS).expect("registered memory");
        let cq = device.create_cq(256).expect("a completion queue");
        let qp = cm.create_qp(id, &CAPS, &cq.handle()).expect("a queue pair");
        Self { qp, cq, mr, wcs: vec![Wc::default(); 64], _cm: cm }
    }

    /// Takes a turn; returns how many completions came.
    fn turn(&mut self) -> usize {
        let n = self.cq.poll(&mut self.wcs).expect("a turn");
        assert!(self.wcs[..n].iter().all(|wc| wc.status == WcStatus::Success), "{:?}", &self.wcs[..n]);
        n
    }
}

fn event(cm: &mut dyn Cm) -> CmEvent {
    test_support::until_some("an event of connection management", || {
        cm.poll().expect("connection management")
    })
}

fn pair() -> (End, End) {
    let network = test_support::network();
    let ip = |n| IpAddr::from(test_support::address(network, n));
    let address = SocketAddr::new(ip(1), 7000);
    let host = SoftRoce::new(Options::default()).expect("soft-roce");
    let (mut server, mut client) = (host.cm().expect("a cm"), host.cm().expect("a cm"));
    server.listen(address, 1).expect("a listener");
    let id = client.resolve(Some(ip(2)), address, test_support::patience()).expect("an address");
    let CmEvent::Resolved(_) = event(&mut *client) else { panic!("the address is not resolved") };
    let mut client = End::new(client, id);
    client._cm.connect(id, PARAMS, b"").expect("a connection");
    let CmEvent::ConnectRequest { id: of_server, .. } = event(&mut *server) else { panic!("no request") };
    let mut server = End::new(server, of_server);
    server._cm.accept(of_server, PARAMS, b"").expect("an acceptance");
    let CmEvent::Established { .. } = event(&mut *client._cm) else { panic!("not established") };
    let CmEvent::Established { .. } = event(&mut *server._cm) else { panic!("not established") };
    (client, server)
}

/// RDMA WRITEs with immediate data, `depth` in one chain.
pub fn write_with_imm(_: Kind, depth: usize) -> Round {
    let (mut from, mut to) = pair();
    let remote = (to.mr.region().as_ptr() as u64, to.mr.rkey());
    let wrs: Vec<SendWr> = (0..depth)
        .map(|i| SendWr {
            wr_id: i as u64,
            op: SendOp::WriteImm { addr: remote.0 + (i * LEN) as u64, rkey: remote.1, imm: i as u32 },
            sges: SgeList::one(from.mr.sge(i * LEN, LEN as u32).expect("inside")),
            signaled: i + 1 == depth,
        })
        .collect();
    let receives: Vec<RecvWr> =
        (0..depth as u64).map(|wr_id| RecvWr { wr_id, sges: SgeList::EMPTY }).collect();
    to.qp.post_recv(&receives).expect("room");
    Box::new(move || {
        let mut sent = send_side(&mut from, &wrs);
        let (mut received, mut turns) = (0, 0);
        while received < depth || sent < 1 {
            received += receive_side(&mut to, &receives);
            // Acknowledgements wait for company, 20 µs at most: now they are due. The sender's window may need them.
            std::thread::sleep(Duration::from_micros(100));
            received += receive_side(&mut to, &receives);
            sent += send_side(&mut from, &[]);
            turns += 1;
            assert!(turns < 10_000, "packets are lost");
        }
    })
}

/// What is counted of the sender: posting, packets out, acknowledgements in.
#[inline(never)]
fn send_side(end: &mut End, wrs: &[SendWr]) -> usize {
    if !wrs.is_empty() {
        end.qp.post_send(wrs).expect("room");
    }
    end.turn()
}

/// What is counted of the receiver: packets in, receives posted anew, acknowledgements out.
#[inline(never)]
fn receive_side(end: &mut End, receives: &[RecvWr]) -> usize {
    let n = end.turn();
    if n > 0 {
        end.qp.post_recv(&receives[..n]).expect("room");
    }
    n
}
