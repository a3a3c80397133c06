//! A queue pair of an engine: the state machine, the work requests it knows by number, and its way to the peer.

use std::net::{IpAddr, SocketAddr};

use roce_proto::cm::{self, Attributes};
use roce_proto::icrc::{Flow, FlowCrc};
use roce_proto::{Counters, Nanos, UDP_PORT, rc};
use rustix::io::Errno;
use verbs::{QpCaps, RecvWr, SendOp, SendWr, SgeList, Wc, WcOp, WcStatus, wc_status};

use super::completions::Completions;
use super::slots::Slots;
use crate::udp::Dest;

/// The state machine names work requests by their number in [`Entry::sends`] and [`Entry::recvs`].
pub type RcQp = rc::Qp<u32, u32>;
/// What it reports.
pub type Done = rc::Completion<u32, u32>;

/// How a send-queue request ends.
#[derive(Clone, Copy)]
enum Fate {
    /// As the state machine says.
    Wire,
    /// Was done when it was posted.
    Done,
    /// With this error, when its turn comes. Nothing after it is done.
    Fails(u32),
}

/// A send-queue request.
#[derive(Clone, Copy)]
pub struct SendSlot {
    wr_id: u64,
    pub sges: SgeList,
    signaled: bool,
    fate: Fate,
}

/// The way to the peer and back.
pub struct Link {
    /// Packets must come from here,
    pub peer: IpAddr,
    /// … to here.
    pub local: IpAddr,
    pub dest: Dest,
    /// The peer is this implementation, whose IPv4 identifications are known.
    pub own_peer: bool,
    pub out: FlowCrc,
    /// Of the port that the peer sends from, once known.
    pub back: Option<(u16, FlowCrc)>,
}

impl Link {
    /// For packets that leave from UDP port `src_port`.
    pub fn new(attrs: &Attributes, src_port: u16) -> Self {
        Self {
            peer: attrs.peer,
            local: attrs.local,
            dest: Dest::new(attrs.local, SocketAddr::new(attrs.peer, UDP_PORT)),
            own_peer: attrs.own_peer,
            out: FlowCrc::new(Flow { src: attrs.local, src_port, dst: attrs.peer }),
            back: None,
        }
    }
}

/// See the module.
pub struct Entry {
    pub qpn: u32,
    pub conn: cm::ConnId,
    /// Of the keys that it may use, its peer's too.
    pub domain: u32,
    pub rc: RcQp,
    pub sends: Slots<SendSlot>,
    pub recvs: Slots<RecvWr>,
    /// From the moment on that it is connected.
    pub link: Option<Link>,
    /// A request that can only fail is in the send queue: whatever is posted after it is flushed.
    poisoned: bool,
    /// A request whose own memory was found to be gone when it was its turn to be sent.
    unreadable: Option<u32>,
    /// Control knows that the peer is ready.
    pub heard: bool,
    /// In the engine's list of queue pairs that may have something to send.
    pub active: bool,
}

const NO_SEND: SendSlot = SendSlot { wr_id: 0, sges: SgeList::EMPTY, signaled: false, fate: Fate::Wire };
const NO_RECV: RecvWr = RecvWr { wr_id: 0, sges: SgeList::EMPTY };

impl Entry {
    pub fn new(qpn: u32, conn: cm::ConnId, caps: &QpCaps) -> Self {
        Self {
            qpn,
            conn,
            domain: caps.domain.0,
            rc: RcQp::new(caps.max_send_wr, caps.max_recv_wr),
            sends: Slots::new(caps.max_send_wr, NO_SEND),
            recvs: Slots::new(caps.max_recv_wr, NO_RECV),
            link: None,
            poisoned: false,
            unreadable: None,
            heard: false,
            active: false,
        }
    }

    /// Requests that may be in its queues.
    pub fn requests(&self) -> usize {
        self.sends.depth() as usize + self.recvs.depth() as usize
    }

    /// Queues a send. `local`: its scatter entries are registered as they must be.
    ///
    /// # Errors
    /// INVAL before the connection is there, NOMEM if the queue is full.
    pub fn post_send(&mut self, wr: &SendWr, local: bool) -> Result<(), Errno> {
        let op = match wr.op {
            SendOp::Send => rc::Op::Send,
            SendOp::SendImm(imm) => rc::Op::SendImm(imm),
            SendOp::SendInvalidate(key) => rc::Op::SendInvalidate(key),
            SendOp::Write { addr, rkey } => rc::Op::Write { va: addr, rkey },
            SendOp::WriteImm { addr, rkey, imm } => rc::Op::WriteImm { va: addr, rkey, imm },
            SendOp::Read { addr, rkey } => rc::Op::Read { va: addr, rkey },
            SendOp::LocalInvalidate(_) => return Err(Errno::INVAL),
        };
        self.may_post_send()?;
        let fate = if local { Fate::Wire } else { Fate::Fails(wc_status::LOC_PROT_ERR) };
        if local && !self.poisoned {
            let len = u32::try_from(wr.sges.bytes()).map_err(|_| Errno::INVAL)?;
            let request = rc::SendRequest { op, len, signaled: true, data: self.sends.next() };
            self.rc.post_send(request).map_err(|e| match e {
                rc::PostError::Full => Errno::NOMEM,
                rc::PostError::WrongState | rc::PostError::TooLong | rc::PostError::NoReads => Errno::INVAL,
            })?;
        }
        self.push(wr, fate);
        Ok(())
    }

    /// Queues something that was done already (`ok`), or could not be: then it ends with `status`.
    ///
    /// # Errors
    /// As for [`Entry::post_send`].
    pub fn post_done(&mut self, wr: &SendWr, ok: bool, status: u32) -> Result<(), Errno> {
        self.may_post_send()?;
        self.push(wr, if ok { Fate::Done } else { Fate::Fails(status) });
        Ok(())
    }

    /// A send can be queued now.
    pub fn may_post_send(&self) -> Result<(), Errno> {
        if self.rc.state() == rc::State::Init {
            return Err(Errno::INVAL);
        }
        if self.sends.is_full() { Err(Errno::NOMEM) } else { Ok(()) }
    }

    fn push(&mut self, wr: &SendWr, fate: Fate) {
        let fate = if self.poisoned { Fate::Fails(wc_status::WR_FLUSH_ERR) } else { fate };
        self.poisoned |= matches!(fate, Fate::Fails(_));
        self.sends.push(SendSlot { wr_id: wr.wr_id, sges: wr.sges, signaled: wr.signaled, fate });
    }

    /// Queues a receive.
    ///
    /// # Errors
    /// NOMEM if the queue is full.
    pub fn post_recv(&mut self, wr: &RecvWr) -> Result<(), Errno> {
        if self.recvs.is_full() {
            return Err(Errno::NOMEM);
        }
        let capacity = u32::try_from(wr.sges.bytes()).unwrap_or(u32::MAX);
        self.rc.post_recv(self.recvs.next(), capacity).map_err(|_| Errno::NOMEM)?;
        self.recvs.push(*wr);
        Ok(())
    }

    /// Turns what the state machine has reported into work completions, and completes local requests whose turn has
    /// come.
    pub fn report(&mut self, done: &mut Vec<Done>, completions: &mut Completions) {
        loop {
            for done in done.drain(..) {
                self.report_one(done, completions);
            }
            if self.settle(completions) {
                return;
            }
            // A local request failed, which breaks the queue pair.
            self.rc.fail(&mut |c| done.push(c));
        }
    }

    fn report_one(&mut self, done: Done, completions: &mut Completions) {
        match done {
            Done::Sent { .. } => {
                self.settle(completions);
                self.sent(WcStatus::Success, completions);
            }
            Done::SendFailed { data, status } => {
                self.settle(completions);
                let own = self.unreadable == Some(data);
                let status = if own { WcStatus::Error(wc_status::LOC_PROT_ERR) } else { wc_status(status) };
                self.sent(status, completions);
            }
            Done::Received { kind, len, imm, invalidated, .. } => {
                let op = match kind {
                    rc::ReceivedKind::Recv => WcOp::Recv,
                    rc::ReceivedKind::RecvWriteImm => WcOp::RecvWriteImm,
                };
                self.received(Wc { op, byte_len: len, imm, invalidated, ..Wc::default() }, completions);
            }
            Done::RecvFailed { status, .. } => {
                let wc = Wc { status: wc_status(status), op: WcOp::Recv, ..Wc::default() };
                self.received(wc, completions);
            }
        }
    }

    fn sent(&mut self, status: WcStatus, completions: &mut Completions) {
        let Some(slot) = self.sends.pop() else { return };
        if slot.signaled || status != WcStatus::Success {
            completions.push(Wc { wr_id: slot.wr_id, qp_num: self.qpn, status, ..Wc::default() });
        }
    }

    fn received(&mut self, wc: Wc, completions: &mut Completions) {
        let Some(slot) = self.recvs.pop() else { return };
        completions.push(Wc { wr_id: slot.wr_id, qp_num: self.qpn, ..wc });
    }

    /// Completes local requests in front. False: one of them failed while the queue pair was in order.
    fn settle(&mut self, completions: &mut Completions) -> bool {
        loop {
            let broken = self.rc.state() == rc::State::Error;
            let status = match self.sends.front().map(|slot| slot.fate) {
                None | Some(Fate::Wire) => return true,
                Some(Fate::Done) if broken => WcStatus::Flushed,
                Some(Fate::Done) => WcStatus::Success,
                Some(Fate::Fails(_)) if broken => WcStatus::Flushed,
                Some(Fate::Fails(status)) => WcStatus::Error(status),
            };
            self.sent(status, completions);
            if matches!(status, WcStatus::Error(_)) {
                return false;
            }
        }
    }

    /// A packet cannot be built because its memory is not registered any more: the peer's error if the peer named it,
    /// else ours. The queue pair breaks.
    pub fn refuse(&mut self, packet: &rc::Outgoing<u32>, counters: &Counters, done: &mut Vec<Done>) {
        match packet.payload {
            rc::Payload::Memory { .. } => {
                self.rc.refuse_read(&packet.headers, counters, &mut |c| done.push(c))
            }
            rc::Payload::Send { data, .. } => {
                self.unreadable = Some(data);
                self.rc.fail(&mut |c| done.push(c));
            }
            rc::Payload::None => self.rc.fail(&mut |c| done.push(c)),
        }
    }

    /// When something is due without packets.
    pub fn deadline(&self) -> Nanos {
        self.rc.deadline().unwrap_or(Nanos::MAX)
    }

    /// Connects it. `counters` and completions are not concerned: nothing was sent yet.
    pub fn connect(&mut self, link: Link, config: rc::Config, now: Nanos) {
        if self.rc.state() == rc::State::Init {
            self.link = Some(link);
            self.rc.connect(config, now);
        }
    }

    /// Does what is due by now.
    pub fn on_time(&mut self, now: Nanos, counters: &Counters, done: &mut Vec<Done>) {
        self.rc.on_time(now, counters, &mut |c| done.push(c));
    }
}

fn wc_status(status: rc::Status) -> WcStatus {
    WcStatus::Error(match status {
        rc::Status::Flushed => return WcStatus::Flushed,
        rc::Status::LocalLength => wc_status::LOC_LEN_ERR,
        rc::Status::LocalProtection => wc_status::LOC_PROT_ERR,
        rc::Status::RemoteInvalidRequest => wc_status::REM_INV_REQ_ERR,
        rc::Status::RemoteAccess => wc_status::REM_ACCESS_ERR,
        rc::Status::RemoteOperation => wc_status::REM_OP_ERR,
        rc::Status::RetryExceeded => wc_status::RETRY_EXC_ERR,
        rc::Status::RnrRetryExceeded => wc_status::RNR_RETRY_EXC_ERR,
    })
}
