//! A server by hand, that can say anything. Runs on the test's thread.

use std::sync::Arc;
use std::time::Instant;

use iobuf::Region;
use rtrs_proto::handshake;
use rtrs_proto::imm::{HB_ACK, HB_MSG};
use rtrs_proto::limits::Geometry;
use rtrs_proto::wire::SgDesc;
use verbs::loopback::Fabric;
use verbs::{
    Access, Cm, CmEvent, CmId, ConnParams, Cq, Device, Mr, Qp, QpCaps, RecvWr, SendOp, SendWr, SgeList, Wc,
    WcOp, WcStatus,
};
use zerocopy::IntoBytes;

use super::{DEPTH, MAX_IO, ends};

/// Where things to send lie behind the chunks.
const SCRATCH: usize = 4096;

pub struct Rogue {
    // Dropped in this order.
    cons: Vec<(CmId, Box<dyn Qp>)>,
    cq: Option<Box<dyn Cq>>,
    memory: Option<Mr>,
    device: Option<Arc<dyn Device>>,
    cm: Box<dyn Cm>,
    pub geometry: Geometry,
    pub rotating: bool,
    /// Immediates received: connection and value.
    inbox: Vec<(usize, u32)>,
    info_reqs: usize,
    /// Connections that ended.
    pub gone: usize,
    /// Connection requests that are not answered yet.
    pub asked: Vec<CmId>,
    /// Further requests are left in `asked`, once there are so many connections.
    pub stall_after: usize,
    /// Private data for the accept of connections other than the first, if it is to be different.
    pub later_accept: Option<Vec<u8>>,
}

impl Rogue {
    /// At the server's end of the first path.
    pub fn new(fabric: &Fabric, rotating: bool) -> Self {
        Self::at(fabric, rotating, 0)
    }

    /// At the server's end of the `n`th path.
    pub fn at(fabric: &Fabric, rotating: bool, n: u8) -> Self {
        let mut cm = fabric.cm();
        cm.listen(ends(n).1, 64).expect("free");
        Self::with_cm(cm, Geometry::new(DEPTH, MAX_IO, 4096).expect("valid"), rotating)
    }

    fn with_cm(cm: Box<dyn Cm>, geometry: Geometry, rotating: bool) -> Self {
        Self {
            cons: Vec::new(),
            cq: None,
            memory: None,
            device: None,
            cm,
            geometry,
            rotating,
            inbox: Vec::new(),
            info_reqs: 0,
            gone: 0,
            asked: Vec::new(),
            stall_after: usize::MAX,
            later_accept: None,
        }
    }

    fn chunks_len(&self) -> usize {
        self.geometry.total_bytes() as usize
    }

    fn memory(&self) -> &Mr {
        self.memory.as_ref().expect("connected")
    }

    /// Takes a connection, accepting with `private`.
    fn accept(&mut self, id: CmId, private: &[u8]) {
        let device = self.cm.device(id).expect("a device");
        if self.device.is_none() {
            self.cq = Some(device.clone().create_cq(8192).expect("a queue"));
            let access = Access { local_write: true, remote_write: true, ..Access::default() };
            let region = Region::new(self.chunks_len() + 2 * SCRATCH).expect("memory");
            self.memory = Some(device.clone().register(region, access).expect("registered"));
            self.device = Some(device);
        }
        let caps = QpCaps {
            max_send_wr: 256,
            max_recv_wr: 256,
            max_send_sge: 1,
            max_recv_sge: 1,
            domain: verbs::Domain::COMMON,
        };
        let cq = self.cq.as_ref().expect("made above").handle();
        let mut qp = self.cm.create_qp(id, &caps, &cq).expect("a queue pair");
        let con = self.cons.len();
        let info = self.memory().sge(self.chunks_len() + SCRATCH, 272).expect("inside");
        let first = if con == 0 { SgeList::one(info) } else { SgeList::EMPTY };
        let rest = (1..100).map(|_| SgeList::EMPTY);
        let wrs: Vec<RecvWr> =
            std::iter::once(first).chain(rest).map(|sges| RecvWr { wr_id: con as u64, sges }).collect();
        qp.post_recv(&wrs).expect("room");
        self.cm.accept(id, ConnParams::FOREVER, private).expect("accepted");
        self.cons.push((id, qp));
    }

    /// Handles events and completions that are there.
    fn pump(&mut self, accept_private: &[u8]) {
        while let Some(event) = self.cm.poll().expect("a working manager") {
            match event {
                CmEvent::ConnectRequest { id, .. } if self.cons.len() >= self.stall_after => {
                    self.asked.push(id)
                }
                CmEvent::ConnectRequest { id, .. } => {
                    let later = self.later_accept.clone().filter(|_| !self.cons.is_empty());
                    self.accept(id, later.as_deref().unwrap_or(accept_private));
                }
                CmEvent::Disconnected(id) => {
                    self.gone += 1;
                    self.cm.disconnect(id).expect("known");
                }
                _ => {}
            }
        }
        let mut wcs = [Wc::default(); 16];
        while let Some(cq) = &mut self.cq {
            let n = cq.poll(&mut wcs).expect("a working queue");
            for wc in &wcs[..n] {
                match (wc.status, wc.op, wc.imm) {
                    (WcStatus::Success, WcOp::RecvWriteImm, Some(imm)) => {
                        self.inbox.push((wc.wr_id as usize, imm))
                    }
                    (WcStatus::Success, WcOp::Recv, None) => self.info_reqs += 1,
                    _ => {}
                }
            }
            if n == 0 {
                break;
            }
        }
        std::thread::yield_now();
    }

    pub fn pump_until(&mut self, accept_private: &[u8], mut done: impl FnMut(&mut Self) -> bool) {
        let (begin, patience) = (Instant::now(), test_support::patience());
        while !done(self) {
            assert!(begin.elapsed() < patience, "the client does not do what it should");
            self.pump(accept_private);
        }
    }

    /// What an honest server would accept with.
    pub fn good_accept(&self) -> Vec<u8> {
        handshake::accept(&self.geometry, self.rotating).as_bytes().to_vec()
    }

    /// What an honest server would answer INFO_REQ with.
    pub fn good_info_rsp(&self) -> Vec<u8> {
        let base = self.memory().region().as_ptr() as u64;
        let desc = SgDesc::new(base, self.memory().rkey(), self.geometry.total_bytes());
        handshake::info_rsp(&[desc]).expect("one descriptor")
    }

    /// Accepts connections until INFO_REQ has come.
    pub fn wait_info_req(&mut self) {
        let private = self.good_accept();
        self.pump_until(&private, |r| r.info_reqs > 0);
    }

    /// Brings a path up as an honest server would.
    pub fn serve(&mut self) {
        self.wait_info_req();
        let rsp = self.good_info_rsp();
        self.send(0, SendOp::Send, &rsp);
    }

    /// Lets the client close every connection.
    pub fn wait_gone(&mut self) {
        self.pump_until(&[], |r| r.gone >= r.cons.len());
    }

    /// Ends a connection.
    pub fn disconnect(&mut self, con: usize) {
        self.cm.disconnect(self.cons[con].0).expect("known");
    }

    /// Accepts connections until one more is asked for than it is to take.
    pub fn wait_asked(&mut self) -> CmId {
        let private = self.good_accept();
        self.pump_until(&private, |r| !r.asked.is_empty());
        self.asked.remove(0)
    }

    /// Destroys a queue pair without a word.
    pub fn drop_qp(&mut self, con: usize) {
        self.cm.destroy(self.cons[con].0);
        self.gone = 1;
    }

    /// Answers the heartbeats that have come in.
    pub fn answer_heartbeats(&mut self) {
        let beats = self.inbox.iter().filter(|(_, imm)| *imm == HB_MSG).count();
        self.inbox.retain(|(_, imm)| *imm != HB_MSG);
        (0..beats).for_each(|_| self.imm(0, HB_ACK));
    }

    /// Forgets all connections and takes new ones.
    pub fn again(old: Self) -> Self {
        let Self { mut cons, mut cm, geometry, rotating, .. } = old;
        cons.drain(..).for_each(|(id, qp)| {
            drop(qp);
            cm.destroy(id);
        });
        Self::with_cm(cm, geometry, rotating)
    }

    /// Says no.
    pub fn reject(&mut self, id: CmId, private: &[u8]) {
        self.cm.reject(id, private).expect("asked");
    }

    /// What the client wrote into chunk `id`, at `at`.
    pub fn chunk(&self, id: u16, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let chunk = usize::from(id) * self.geometry.chunk_size() as usize;
        assert!(self.memory().region().copy_out(chunk + at, &mut bytes));
        bytes
    }

    /// The next immediate.
    pub fn next(&mut self) -> (usize, u32) {
        self.pump_until(&[], |r| !r.inbox.is_empty());
        self.inbox.remove(0)
    }

    /// The next request: connection and buffer id.
    pub fn next_request(&mut self) -> (usize, u16) {
        loop {
            let (con, imm) = self.next();
            if let rtrs_proto::Imm::IoReq { id, .. } = self.geometry.imm_layout().decode(imm) {
                return (con, id as u16);
            }
        }
    }

    /// Posts `op` with `bytes`, and waits until they are on their way.
    pub fn send(&mut self, con: usize, op: SendOp, bytes: &[u8]) {
        assert!(self.try_send(con, op, bytes), "room");
    }

    /// As [`Rogue::send`]; false if the device does not even take it.
    pub fn try_send(&mut self, con: usize, op: SendOp, bytes: &[u8]) -> bool {
        let at = self.chunks_len();
        assert!(bytes.len() <= SCRATCH && self.memory().region().copy_in(at, bytes));
        let sge = self.memory().sge(at, bytes.len() as u32).expect("inside");
        let sges = if bytes.is_empty() { SgeList::EMPTY } else { SgeList::one(sge) };
        let wr = SendWr { wr_id: 1000, op, sges, signaled: true };
        self.cons[con].1.post_send(&[wr]).is_ok()
    }

    pub fn imm(&mut self, con: usize, imm: u32) {
        self.send(con, SendOp::WriteImm { addr: 0, rkey: 0, imm }, &[]);
    }

    /// Key of all chunks.
    pub fn rkey(&self) -> u32 {
        self.memory().rkey()
    }
}
