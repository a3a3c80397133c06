//! Queue pairs: work requests in, data moved, completions out. What a device does, done by whichever thread posts.

use std::collections::VecDeque;
use std::net::SocketAddr;

use smallvec::SmallVec;

use super::keys::{Piece, Right, copy};
use super::state::{Cqe, State};
use crate::wc_status::*;
use crate::{BIND_WR_ID, CmId, RecvWr, SendOp, SendWr, Sge, SgeList, Wc, WcOp, WcStatus, WindowKind};

/// States that matter here. Source: IBTA 10.3.1 (RESET and SQD do not occur with a connection manager).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Receives may be posted, sends not yet.
    Init,
    /// Connected.
    ReadyToSend,
    /// Everything flushes.
    Error,
}

#[derive(Clone, Copy)]
pub(super) enum Work {
    Wr(SendWr),
    Bind { lkey: u32, addr: u64, len: u64, rkey: u32 },
}

impl Work {
    fn wr_id(&self) -> u64 {
        match self {
            Self::Wr(wr) => wr.wr_id,
            Self::Bind { .. } => BIND_WR_ID,
        }
    }
}

pub(super) struct QpState {
    pub host: u32,
    pub cq: u32,
    pub id: CmId,
    pub phase: Phase,
    /// The other queue pair, from acceptance on.
    pub peer: Option<u32>,
    /// Local and peer address, to find cuts.
    pub path: (SocketAddr, SocketAddr),
    /// A disconnect is under way: what cannot be delivered waits to be flushed.
    pub closing: bool,
    /// Of the peer; 7 is for ever. Time is not modelled: fewer retries are over at once.
    pub rnr_retry: u8,
    /// RDMA READs were agreed upon.
    pub reads: bool,
    pub sq: VecDeque<Work>,
    pub rq: VecDeque<RecvWr>,
    /// Slots in use until their completion (or, for unsignaled sends, a later one) is polled.
    pub send_used: u32,
    pub recv_used: u32,
    /// Unsignaled sends done since the last completion.
    pub silent: u32,
}

enum Step {
    Done,
    Wait,
    Fail { status: u32, peer: PeerFault },
}

/// What a failed request does to the responder.
enum PeerFault {
    None,
    /// Its queue pair breaks.
    Broken,
    /// Its queue pair breaks and the receive in front tells why.
    Recv(u32),
}

impl Step {
    fn local(status: u32) -> Self {
        Self::Fail { status, peer: PeerFault::None }
    }
}

impl State {
    /// Does all work of a queue pair's send queue that can be done now.
    pub fn run(&mut self, num: u32) {
        while let Some(qp) = self.qps.get(&num).filter(|q| q.phase == Phase::ReadyToSend) {
            let Some(work) = qp.sq.front().copied() else { return };
            match self.step(num, &work) {
                Step::Wait => return,
                Step::Done => self.retire(num, &work),
                Step::Fail { status, peer } => return self.fail(num, &work, status, peer),
            }
        }
    }

    fn step(&mut self, num: u32, work: &Work) -> Step {
        let (host, kind) = (self.qps[&num].host, self.config.device.windows);
        match *work {
            Work::Bind { lkey, addr, len, rkey } => {
                let owner = (kind == WindowKind::PerQp).then_some(num);
                if self.keys.bind(host, lkey, addr, len, rkey, owner) {
                    Step::Done
                } else {
                    Step::local(MW_BIND_ERR)
                }
            }
            Work::Wr(SendWr { op: SendOp::LocalInvalidate(key), .. }) => {
                if self.keys.invalidate(host, num, key) { Step::Done } else { Step::local(LOC_QP_OP_ERR) }
            }
            Work::Wr(wr) => self.transfer(num, &wr),
        }
    }

    /// The memory of local entries, `None` if one is not allowed.
    fn pieces(&self, host: u32, sges: &[Sge], write: bool) -> Option<SmallVec<[Piece; SgeList::MAX]>> {
        sges.iter().filter(|s| s.len > 0).map(|s| self.keys.local(host, s, write)).collect()
    }

    fn transfer(&mut self, num: u32, wr: &SendWr) -> Step {
        let qp = &self.qps[&num];
        let reading = matches!(wr.op, SendOp::Read { .. });
        let Some(local) = self.pieces(qp.host, wr.sges.as_slice(), reading) else {
            return Step::local(LOC_PROT_ERR);
        };
        if self.is_cut(qp.path.0, qp.path.1) {
            return Step::Wait;
        }
        let peer = qp.peer.and_then(|p| self.qps.get(&p).map(|q| (p, q)));
        let (peer_num, peer) = match peer {
            Some((p, q)) if q.phase == Phase::ReadyToSend => (p, q),
            Some((_, q)) if q.phase == Phase::Init => return Step::Wait,
            _ if qp.closing => return Step::Wait,
            _ => return Step::local(RETRY_EXC_ERR),
        };
        let takes_receive = !matches!(wr.op, SendOp::Write { .. } | SendOp::Read { .. });
        if takes_receive && peer.rq.is_empty() {
            return if qp.rnr_retry == 7 { Step::Wait } else { Step::local(RNR_RETRY_EXC_ERR) };
        }
        match wr.op {
            SendOp::Write { addr, rkey } => self.write(peer_num, &local, addr, rkey, None),
            SendOp::WriteImm { addr, rkey, imm } => self.write(peer_num, &local, addr, rkey, Some(imm)),
            SendOp::Send => self.send(peer_num, &local, None, None),
            SendOp::SendImm(imm) => self.send(peer_num, &local, Some(imm), None),
            SendOp::SendInvalidate(key) => self.send(peer_num, &local, None, Some(key)),
            SendOp::Read { addr, rkey } => self.read(peer_num, &local, addr, rkey),
            SendOp::LocalInvalidate(_) => unreachable!("step() keeps local work here"),
        }
    }

    fn write(&mut self, peer: u32, from: &[Piece], addr: u64, rkey: u32, imm: Option<u32>) -> Step {
        let host = self.qps[&peer].host;
        let bytes = from.iter().map(|p| p.len as u64).sum();
        // Without data neither key nor address is looked at (IBTA 9.7.4.1.6).
        if bytes > 0 {
            let Some(to) = self.keys.remote(host, peer, rkey, addr, bytes, Right::Write) else {
                return Step::Fail { status: REM_ACCESS_ERR, peer: PeerFault::Broken };
            };
            copy(from, &[to]);
        }
        if imm.is_some() {
            self.received(peer, Wc { op: WcOp::RecvWriteImm, byte_len: bytes as u32, imm, ..Wc::default() });
        }
        Step::Done
    }

    fn read(&mut self, peer: u32, to: &[Piece], addr: u64, rkey: u32) -> Step {
        let qp = &self.qps[&peer];
        if !qp.reads {
            return Step::Fail { status: REM_INV_REQ_ERR, peer: PeerFault::Broken };
        }
        let bytes = to.iter().map(|p| p.len as u64).sum();
        if bytes > 0 {
            let Some(from) = self.keys.remote(qp.host, peer, rkey, addr, bytes, Right::Read) else {
                return Step::Fail { status: REM_ACCESS_ERR, peer: PeerFault::Broken };
            };
            copy(&[from], to);
        }
        Step::Done
    }

    fn send(&mut self, peer: u32, from: &[Piece], imm: Option<u32>, invalidate: Option<u32>) -> Step {
        let qp = &self.qps[&peer];
        let host = qp.host;
        let recv = qp.rq.front().expect("transfer() saw it");
        let bytes: u64 = from.iter().map(|p| p.len as u64).sum();
        if bytes > recv.sges.bytes() {
            return Step::Fail { status: REM_INV_REQ_ERR, peer: PeerFault::Recv(LOC_LEN_ERR) };
        }
        let Some(to) = self.pieces(host, recv.sges.as_slice(), true) else {
            return Step::Fail { status: REM_OP_ERR, peer: PeerFault::Recv(LOC_PROT_ERR) };
        };
        // A key that cannot be invalidated is the responder's own error, of which the requester hears nothing but
        // silence (IBTA 9.9.2.3, class J).
        if invalidate.is_some_and(|key| !self.keys.invalidate(host, peer, key)) {
            return Step::Fail { status: RETRY_EXC_ERR, peer: PeerFault::Recv(REM_INV_REQ_ERR) };
        }
        copy(from, &to);
        let wc = Wc { op: WcOp::Recv, byte_len: bytes as u32, imm, invalidated: invalidate, ..Wc::default() };
        self.received(peer, wc);
        Step::Done
    }

    /// Completes the receive in front.
    fn received(&mut self, num: u32, wc: Wc) {
        let Some(qp) = self.qps.get_mut(&num) else { return };
        let Some(recv) = qp.rq.pop_front() else { return };
        let cq = qp.cq;
        let wc = Wc { wr_id: recv.wr_id, qp_num: num, ..wc };
        self.complete(cq, Cqe { wc, frees_send: 0, frees_recv: 1 });
    }

    /// Takes the finished request in front off the send queue.
    fn retire(&mut self, num: u32, work: &Work) {
        // A full completion queue may have flushed everything meanwhile.
        let Some(qp) = self.qps.get_mut(&num).filter(|q| q.phase == Phase::ReadyToSend) else { return };
        qp.sq.pop_front();
        qp.silent += 1;
        if matches!(work, Work::Wr(SendWr { signaled: true, .. })) {
            self.sent(num, work.wr_id(), WcStatus::Success);
        }
    }

    /// A completion for the send queue, which gives back its slot and those of the unsignaled ones before it.
    fn sent(&mut self, num: u32, wr_id: u64, status: WcStatus) {
        let Some(qp) = self.qps.get_mut(&num) else { return };
        let frees_send = std::mem::take(&mut qp.silent);
        let cq = qp.cq;
        let wc = Wc { wr_id, qp_num: num, status, ..Wc::default() };
        self.complete(cq, Cqe { wc, frees_send, frees_recv: 0 });
    }

    fn fail(&mut self, num: u32, work: &Work, status: u32, peer: PeerFault) {
        let Some(qp) = self.qps.get_mut(&num) else { return };
        let other = qp.peer;
        qp.phase = Phase::Error;
        qp.sq.pop_front();
        qp.silent += 1;
        self.sent(num, work.wr_id(), WcStatus::Error(status));
        if let Some(other) = other {
            self.fail_peer(other, peer);
        }
        self.break_off(num);
    }

    /// Fails the request in front, if there is one, and flushes the rest.
    pub fn break_qp(&mut self, num: u32, status: u32) {
        match self.qps.get(&num).and_then(|q| q.sq.front().copied()) {
            Some(work) => self.fail(num, &work, status, PeerFault::None),
            None => self.break_off(num),
        }
    }

    fn fail_peer(&mut self, num: u32, fault: PeerFault) {
        match fault {
            PeerFault::None => {}
            PeerFault::Broken => self.break_off(num),
            PeerFault::Recv(status) => {
                self.received(num, Wc { status: WcStatus::Error(status), ..Wc::default() });
                self.break_off(num);
            }
        }
    }

    /// Moves a queue pair to the error state: everything outstanding flushes, and what the peer still had for it
    /// finds nobody. Does nothing the second time.
    pub fn break_off(&mut self, num: u32) {
        let Some(qp) = self.qps.get_mut(&num) else { return };
        qp.phase = Phase::Error;
        let peer = qp.peer;
        while let Some(work) = self.qps.get_mut(&num).and_then(|q| q.sq.pop_front()) {
            if let Some(qp) = self.qps.get_mut(&num) {
                qp.silent += 1;
            }
            self.sent(num, work.wr_id(), WcStatus::Flushed);
        }
        while self.qps.get(&num).is_some_and(|q| !q.rq.is_empty()) {
            self.received(num, Wc { status: WcStatus::Flushed, ..Wc::default() });
        }
        if let Some(peer) = peer {
            self.run(peer);
        }
    }
}
