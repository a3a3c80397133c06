//! What the examples share: a provider chosen by name, and one thread that polls for the events and completions of all
//! its connections.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use iobuf::Region;
use verbs::{
    Access, Cm, CmEvent, CmId, ConnParams, Cq, Mr, Qp, QpCaps, RecvWr, RejectReason, SendOp, SendWr, SgeList,
    Wc, WcStatus,
};

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Completions of all connections together: a few hundred receives and sends at most.
const CQ_ENTRIES: u32 = 2048;
/// A peer that found no receive comes back after 0.64 ms.
const MIN_RNR_TIMER: u8 = 12;
/// As perftest and rping ask for. Sixteen READs in flight are within every adapter's limits.
const PARAMS: ConnParams = ConnParams { read_depth: 16, ..ConnParams::FOREVER };

/// A connection manager, and the completion queue that all its connections share.
pub struct Host {
    cm: Box<dyn Cm>,
    cq: Option<Box<dyn Cq>>,
    events: VecDeque<CmEvent>,
    completions: VecDeque<Wc>,
    turns: u32,
}

/// A connection with one piece of registered memory, which the peer may read and write.
pub struct Connection {
    pub id: CmId,
    pub qp: Box<dyn Qp>,
    pub mr: Mr,
}

impl Host {
    pub fn open(provider: &str) -> Result<Self> {
        let cm = match provider {
            "soft-roce" => soft_roce::open()?,
            "rdma-core" => verbs::rdma_core::open()?,
            other => return Err(format!("no provider \"{other}\"; there are soft-roce and rdma-core").into()),
        };
        Ok(Self { cm, cq: None, events: VecDeque::new(), completions: VecDeque::new(), turns: 0 })
    }

    pub fn listen(&mut self, addr: SocketAddr) -> Result<()> {
        self.cm.listen(addr, 8)?;
        println!("listening on {addr}");
        Ok(())
    }

    /// Waits for the next client and equips its connection; [`Host::accept`] is to follow.
    pub fn request(&mut self, depth: u32, bytes: usize) -> Result<Connection> {
        let id = self.wait("client", |host| {
            let found = host.events.iter().position(|e| matches!(e, CmEvent::ConnectRequest { .. }));
            Ok(found.and_then(|i| host.events.remove(i)).map(|e| e.id()))
        })?;
        self.equip(id, depth, bytes)
    }

    pub fn accept(&mut self, connection: &mut Connection) -> Result<()> {
        self.cm.accept(connection.id, PARAMS, b"")?;
        match self.event(connection.id)? {
            CmEvent::Established { .. } => Ok(connection.qp.set_min_rnr_timer(MIN_RNR_TIMER)?),
            other => Err(format!("accepting: {other:?}").into()),
        }
    }

    /// Connects, once somebody listens there.
    pub fn dial(
        &mut self,
        server: SocketAddr,
        source: Option<IpAddr>,
        depth: u32,
        bytes: usize,
    ) -> Result<Connection> {
        // The server may not listen yet.
        let (start, dialling) = (Instant::now(), test_support::limit(30));
        loop {
            let id = self.cm.resolve(source, server, dialling)?;
            match self.event(id)? {
                CmEvent::Resolved(_) => {}
                other => return Err(format!("no way to {server}: {other:?}").into()),
            }
            let mut connection = self.equip(id, depth, bytes)?;
            self.cm.connect(id, PARAMS, b"")?;
            match self.event(id)? {
                CmEvent::Established { .. } => {
                    connection.qp.set_min_rnr_timer(MIN_RNR_TIMER)?;
                    return Ok(connection);
                }
                CmEvent::Rejected { reason: RejectReason::INVALID_SERVICE_ID, .. }
                    if start.elapsed() < dialling =>
                {
                    drop(connection);
                    self.cm.destroy(id);
                    std::thread::sleep(Duration::from_millis(100));
                }
                other => return Err(format!("connecting to {server}: {other:?}").into()),
            }
        }
    }

    fn equip(&mut self, id: CmId, depth: u32, bytes: usize) -> Result<Connection> {
        let device = self.cm.device(id).ok_or("a connection without a device")?;
        let access = Access {
            domain: verbs::Domain::COMMON,
            local_write: true,
            remote_write: true,
            remote_read: true,
            window_bind: false,
        };
        let mr = device.clone().register(Region::new(bytes)?, access)?;
        if self.cq.is_none() {
            self.cq = Some(device.create_cq(CQ_ENTRIES)?);
        }
        let cq = self.cq.as_ref().ok_or("no completion queue")?.handle();
        let caps = QpCaps {
            max_send_wr: depth,
            max_recv_wr: depth,
            max_send_sge: 1,
            max_recv_sge: 1,
            domain: verbs::Domain::COMMON,
        };
        Ok(Connection { id, qp: self.cm.create_qp(id, &caps, &cq)?, mr })
    }

    /// Waits for the peer to hang up.
    pub fn hung_up(&mut self, connection: &Connection) -> Result<()> {
        let id = connection.id;
        self.wait("disconnect", |host| Ok(host.disconnected(id).then_some(())))
    }

    /// Hangs up, and waits until the peer knows.
    pub fn hang_up(&mut self, connection: Connection) -> Result<()> {
        let id = connection.id;
        if !self.disconnected(id) {
            self.cm.disconnect(id)?;
            self.hung_up(&connection)?;
        }
        // The answer if the peer hung up first: with the kernel's connection manager it comes from here.
        self.cm.disconnect(id)?;
        drop(connection);
        self.cm.destroy(id);
        Ok(())
    }

    fn disconnected(&self, id: CmId) -> bool {
        self.events.iter().any(|e| matches!(e, CmEvent::Disconnected(got) if *got == id))
    }

    /// The next completion of work with this `wr_id`; `None` when the peer has hung up instead.
    pub fn completion(&mut self, id: CmId, wr_id: u64) -> Result<Option<Wc>> {
        self.wait("completion", |host| {
            if let Some(failed) = host.completions.iter().find(|wc| matches!(wc.status, WcStatus::Error(_))) {
                return Err(format!("work failed: {failed:?}").into());
            }
            let mine = |wc: &Wc| wc.wr_id == wr_id && wc.status == WcStatus::Success;
            let found = host.completions.iter().position(mine);
            let wc = found.and_then(|i| host.completions.remove(i));
            Ok(if wc.is_none() && host.disconnected(id) { Some(None) } else { wc.map(Some) })
        })
    }

    /// As [`Host::completion`], where the peer has no reason to hang up.
    pub fn completed(&mut self, id: CmId, wr_id: u64) -> Result<Wc> {
        self.completion(id, wr_id)?.ok_or_else(|| "the peer hung up too early".into())
    }

    fn event(&mut self, id: CmId) -> Result<CmEvent> {
        self.wait("answer", |host| {
            let found = host.events.iter().position(|e| e.id() == id);
            Ok(found.and_then(|i| host.events.remove(i)))
        })
    }

    /// Polls everything until `look` finds something.
    pub fn wait<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Result<Option<T>>) -> Result<T> {
        let (start, patience) = (Instant::now(), test_support::patience());
        loop {
            if let Some(found) = look(self)? {
                return Ok(found);
            }
            if start.elapsed() > patience {
                return Err(format!("no {what} within {patience:?}").into());
            }
            self.turn()?;
        }
    }

    fn turn(&mut self) -> Result<()> {
        if let Some(cq) = &mut self.cq {
            let mut out = [Wc::default(); 32];
            let n = cq.poll(&mut out)?;
            self.completions.extend(&out[..n]);
        }
        // Events are rare and looking for them is a system call; others may need the processor meanwhile.
        self.turns = self.turns.wrapping_add(1);
        if self.turns.is_multiple_of(32) || self.cq.is_none() {
            self.events.extend(self.cm.poll()?);
            std::thread::yield_now();
        }
        Ok(())
    }
}

impl Connection {
    fn sges(&self, offset: usize, len: u32) -> Result<SgeList> {
        Ok(SgeList::one(self.mr.sge(offset, len).ok_or("outside the region")?))
    }

    /// Where the peer finds `offset`.
    pub fn address(&self, offset: usize) -> u64 {
        self.mr.region().as_ptr() as u64 + offset as u64
    }

    pub fn receive(&mut self, wr_id: u64, offset: usize, len: u32) -> Result<()> {
        let sges = self.sges(offset, len)?;
        Ok(self.qp.post_recv(&[RecvWr { wr_id, sges }])?)
    }

    pub fn send(&mut self, wr_id: u64, op: SendOp, offset: usize, len: u32, signaled: bool) -> Result<()> {
        let sges = self.sges(offset, len)?;
        Ok(self.qp.post_send(&[SendWr { wr_id, op, sges, signaled }])?)
    }

    pub fn put(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        if self.mr.region().copy_in(offset, bytes) { Ok(()) } else { Err("outside the region".into()) }
    }

    pub fn get(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        if self.mr.region().copy_out(offset, bytes) { Ok(()) } else { Err("outside the region".into()) }
    }
}
