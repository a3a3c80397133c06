//! The provider interface: what an RDMA implementation must offer to RTRS. Words and meanings are those of verbs(7).
//!
//! ```text
//! control thread                                             a reactor
//! Cm::listen ─▶ CmEvent::ConnectRequest
//!   Cm::device(id) ─▶ Arc<dyn Device> ── create_cq ────────▶ Box<dyn Cq>   (one per reactor and device)
//!   Cm::create_qp(id, caps, cq.handle()) ──────────────────▶ Box<dyn Qp>   post_recv …, then tell control
//!   Cm::accept ─▶ CmEvent::Established                       Cq::poll ─▶ Wc, Qp::post_send …
//!   CmEvent::Disconnected ─▶ Cm::disconnect ───────────────▶ flush completions; drop Qp, tell control
//!   Cm::destroy(id)
//! ```

use std::any::Any;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use iobuf::Region;

/// A verbs call failed: which, on what, why, and what would have been right.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}{}{}", if hint.is_empty() { "" } else { "; " }, hint)]
pub struct Error {
    /// The call and its object, e.g. "rdma_bind_addr 10.0.0.1:1234".
    pub what: String,
    /// The system's error.
    pub source: std::io::Error,
    /// What the operator can do, may be empty.
    pub hint: String,
}

/// Limits and identity of a device. Source: `ibv_query_device(3)`.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// As `ibv_devices(1)` lists it: "rxe0", "mlx5_0".
    pub name: String,
    /// "rdma-core", "soft-roce", "loopback".
    pub provider: &'static str,
    /// Work requests in one queue.
    pub max_qp_wr: u32,
    /// Entries of one completion queue.
    pub max_cqe: u32,
    /// Entries that are not in use cost nothing, while each completion queue does: one of [`DeviceInfo::max_cqe`] entries
    /// serves best.
    pub cq_grows: bool,
    /// Scatter entries of a send or receive.
    pub max_sge: u32,
    /// Bytes of one memory region.
    pub max_mr_bytes: u64,
    /// How memory windows work here.
    pub windows: WindowKind,
    /// A memory region is the pages that were there when it was registered, not its addresses: the device does not notice
    /// when others come in their place. See [`Region::may_pin`].
    pub pins: bool,
}

/// Memory windows of a device: keys that can be changed per request at the cost of a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowKind {
    /// None.
    Unsupported,
    /// A key is good on every queue pair of the protection domain (type 1, type 2A). The bounds are as good as the
    /// device: Linux rxe checks those of the region below only, and no device lets a peer invalidate type 1.
    PerDomain,
    /// A key is good only on the queue pair that bound it (type 2B).
    PerQp,
}

/// A protection domain of a device: keys of one open nothing to the queue pairs of another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Domain(pub u32);

impl Domain {
    /// The one that every device has.
    pub const COMMON: Self = Self(0);
}

/// What peers and the device may do with a memory region. Local read is always allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Whose queue pairs may use its keys, and those of windows on it.
    pub domain: Domain,
    /// Receives may land here.
    pub local_write: bool,
    /// Peers may RDMA WRITE here. Implies `local_write`.
    pub remote_write: bool,
    /// Peers may RDMA READ it.
    pub remote_read: bool,
    /// Windows may be bound to it.
    pub window_bind: bool,
}

/// A registered region. Dropping it deregisters; the pages stay mapped while any `Mr` lives.
pub struct Mr {
    // The provider's own handle, which deregisters; dropped before the memory.
    provider: Box<dyn Any + Send + Sync>,
    region: Arc<Region>,
    lkey: u32,
    rkey: u32,
}

impl Mr {
    /// For providers: `keep` deregisters when dropped.
    pub fn new(region: Arc<Region>, lkey: u32, rkey: u32, keep: Box<dyn Any + Send + Sync>) -> Self {
        Self { region, lkey, rkey, provider: keep }
    }
    /// For providers: what [`Mr::new`] was given.
    pub fn provider(&self) -> &(dyn Any + Send + Sync) {
        &*self.provider
    }
    /// Key for local scatter entries.
    pub fn lkey(&self) -> u32 {
        self.lkey
    }
    /// Key for peers.
    pub fn rkey(&self) -> u32 {
        self.rkey
    }
    /// The memory.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }
    /// A scatter entry for `len` bytes at `offset`; `None` if not all inside.
    pub fn sge(&self, offset: usize, len: u32) -> Option<Sge> {
        let end = offset.checked_add(len as usize)?;
        (end <= self.region.len()).then(|| Sge {
            addr: self.region.as_ptr() as u64 + offset as u64,
            len,
            lkey: self.lkey,
        })
    }
}

/// One RDMA device (`ibv_context` and, unless it has more, one protection domain). Shared by all threads; calls cost a system call or more.
pub trait Device: Send + Sync {
    /// Limits and identity.
    fn info(&self) -> &DeviceInfo;

    /// Gives every statistic of the device by name; nothing if the provider has none of its own.
    fn counters(&self, _each: &mut dyn FnMut(&'static str, u64)) {}

    /// A domain for [`Access::domain`] and [`QpCaps::domain`] that nobody else has, so that a peer reaches nothing of the
    /// others whatever keys it knows. [`Domain::COMMON`] where the provider has only that.
    fn alloc_domain(&self) -> Domain {
        Domain::COMMON
    }

    /// Registers all of `region` under its own addresses.
    ///
    /// # Errors
    /// Over `RLIMIT_MEMLOCK`, over the device's limits. Source: `ibv_reg_mr(3)`.
    fn register(self: Arc<Self>, region: Arc<Region>, access: Access) -> Result<Mr, Error>;

    /// A completion queue of at least `entries`, to be moved to the thread that polls it.
    ///
    /// # Errors
    /// Over the device's limits. Source: `ibv_create_cq(3)`.
    fn create_cq(self: Arc<Self>, entries: u32) -> Result<Box<dyn Cq>, Error>;

    /// A memory window for [`Qp::bind_window`].
    ///
    /// # Errors
    /// Unsupported, or over the device's limits. Source: `ibv_alloc_mw(3)`.
    fn alloc_window(self: Arc<Self>) -> Result<Window, Error>;
}

/// A memory window; freed on drop. Its present key changes with every bind.
pub struct Window {
    /// The provider's handle.
    pub handle: Box<dyn Any + Send>,
    /// The key that the next bind will make valid is a function of this one; updated by `Qp::post_send`'s caller
    /// from [`Qp::bind_window`]'s result.
    pub rkey: u32,
    /// The key opens something. Set by `bind_window`; set it to false when [`Wc::invalidated`] or an own
    /// [`SendOp::LocalInvalidate`] named the key: a [`WindowKind::PerQp`] device must know before the next bind.
    pub bound: bool,
}

/// What [`Cm::create_qp`] needs of a completion queue; keeps it alive.
pub type CqHandle = Arc<dyn Any + Send + Sync>;

/// A completion queue, owned and polled by one thread.
pub trait Cq: Send {
    /// For `Cm::create_qp` on the control thread.
    fn handle(&self) -> CqHandle;

    /// Entries it can hold; more outstanding work than this on its queue pairs would overrun it.
    fn entries(&self) -> u32;

    /// Moves up to `out.len()` completions to the start of `out`; returns how many. Never blocks.
    ///
    /// # Errors
    /// The queue overran or the device failed: every queue pair on it is lost.
    fn poll(&mut self, out: &mut [Wc]) -> Result<usize, Error>;

    /// Becomes readable when a completion arrives after [`Cq::arm`].
    fn wait_fd(&self) -> RawFd;

    /// Consumes old notifications and asks for one with the next completion. Poll once more after it: completions
    /// that came before it notify nobody. Source: `ibv_req_notify_cq(3)`.
    ///
    /// # Errors
    /// The device failed.
    fn arm(&mut self) -> Result<(), Error>;
}

/// A local memory piece of a work request. Laid out as `struct ibv_sge`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sge {
    /// Virtual address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Of the [`Mr`] that covers it.
    pub lkey: u32,
}

/// Up to [`SgeList::MAX`] local pieces, by value.
#[derive(Clone, Copy, Debug, Default)]
pub struct SgeList {
    list: [Sge; Self::MAX],
    len: u8,
}

impl SgeList {
    /// Most entries.
    pub const MAX: usize = 4;
    /// No local memory.
    pub const EMPTY: Self = Self { list: [Sge { addr: 0, len: 0, lkey: 0 }; Self::MAX], len: 0 };
    /// One entry.
    pub fn one(sge: Sge) -> Self {
        let mut l = Self::EMPTY;
        l.list[0] = sge;
        l.len = 1;
        l
    }
    /// Adds an entry; false when full.
    #[must_use]
    pub fn push(&mut self, sge: Sge) -> bool {
        let Some(slot) = self.list.get_mut(self.len as usize) else { return false };
        *slot = sge;
        self.len += 1;
        true
    }
    /// The entries.
    pub fn as_slice(&self) -> &[Sge] {
        &self.list[..self.len as usize]
    }
    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.as_slice().iter().map(|s| u64::from(s.len)).sum()
    }
}

/// What a send work request does. Immediates are host-order values; providers put them on the wire big-endian.
#[derive(Clone, Copy, Debug)]
pub enum SendOp {
    /// SEND.
    Send,
    /// SEND with immediate.
    SendImm(u32),
    /// SEND with invalidate of the peer's key.
    SendInvalidate(u32),
    /// RDMA WRITE to the peer's `addr` under `rkey`.
    Write {
        /// Peer's virtual address.
        addr: u64,
        /// Peer's key.
        rkey: u32,
    },
    /// RDMA WRITE that also consumes a receive and delivers `imm`.
    WriteImm {
        /// Peer's virtual address; meaningless without data.
        addr: u64,
        /// Peer's key; meaningless without data.
        rkey: u32,
        /// Immediate.
        imm: u32,
    },
    /// RDMA READ of the peer's `addr` under `rkey` into the scatter entries. Needs [`ConnParams::read_depth`].
    Read {
        /// Peer's virtual address.
        addr: u64,
        /// Peer's key.
        rkey: u32,
    },
    /// Invalidates an own window or fast-registered key.
    LocalInvalidate(u32),
}

/// [`Wc::wr_id`] of a failed or flushed [`Qp::bind_window`], which has no `wr_id` of its own.
pub const BIND_WR_ID: u64 = u64::MAX;

/// A send work request.
#[derive(Clone, Copy, Debug)]
pub struct SendWr {
    /// Comes back in [`Wc::wr_id`].
    pub wr_id: u64,
    /// What to do.
    pub op: SendOp,
    /// Data, read from here until the request has completed (or a later one on the same queue pair has).
    pub sges: SgeList,
    /// Completes with a [`Wc`] even when it succeeds. Failures always complete with one.
    pub signaled: bool,
}

/// A receive work request.
#[derive(Clone, Copy, Debug)]
pub struct RecvWr {
    /// Comes back in [`Wc::wr_id`].
    pub wr_id: u64,
    /// Where a SEND lands; empty for RDMA WRITE with immediate.
    pub sges: SgeList,
}

/// What completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WcOp {
    /// A send-queue request of any kind.
    #[default]
    Send,
    /// A receive took a SEND (with [`Wc::imm`] if it carried one).
    Recv,
    /// A receive took the immediate of an RDMA WRITE.
    RecvWriteImm,
}

/// How it completed. Source: `ibv_poll_cq(3)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WcStatus {
    /// Done.
    #[default]
    Success,
    /// Flushed: the queue pair is in the error state. Says nothing about why, and may be all that a device ever says
    /// (Linux rxe flushes a request that failed by an own key, too).
    Flushed,
    /// The first error of a queue pair; the number is the provider's (`enum ibv_wc_status`).
    Error(u32),
}

/// A work completion. `op`, `byte_len`, `imm` are valid on success only.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wc {
    /// Of the work request.
    pub wr_id: u64,
    /// Of the queue pair.
    pub qp_num: u32,
    /// How it completed.
    pub status: WcStatus,
    /// What completed.
    pub op: WcOp,
    /// Bytes received or written by the peer.
    pub byte_len: u32,
    /// Immediate, host order.
    pub imm: Option<u32>,
    /// Key of ours that the peer invalidated.
    pub invalidated: Option<u32>,
}

/// Work requests from index `accepted` on were not queued.
#[derive(Debug, thiserror::Error)]
#[error("posting a work request failed after {accepted}: {source}")]
pub struct PostError {
    /// Leading requests that were queued.
    pub accepted: usize,
    /// ENOMEM: the queue is full.
    pub source: std::io::Error,
}

/// A reliable-connected queue pair, used by one thread. Dropping it destroys it and waits for the device to let go
/// of its buffers; completions of it may remain in its queue for one more poll.
pub trait Qp: Send {
    /// Number, as in [`Wc::qp_num`].
    fn num(&self) -> u32;

    /// Queues all of `wrs` with one doorbell, in order.
    ///
    /// # Errors
    /// Queue full or queue pair gone; [`PostError::accepted`] leading ones are queued.
    fn post_send(&mut self, wrs: &[SendWr]) -> Result<(), PostError>;

    /// Queues all of `wrs`. Receives posted before the queue pair broke are flushed; one posted after may be accepted
    /// and never complete (Linux rxe), so do not wait for it.
    ///
    /// # Errors
    /// As `post_send`.
    fn post_recv(&mut self, wrs: &[RecvWr]) -> Result<(), PostError>;

    /// Queues a (re)bind of `window` to `len` bytes at `offset` of `mr` for remote writes, unsignaled; the former key
    /// is invalid from then on, `len` 0 leaves the window without any. Returns the new key, also put in `window.rkey`.
    ///
    /// # Errors
    /// As `post_send`; unsupported. Takes one slot of the send queue, two with [`WindowKind::PerQp`].
    fn bind_window(
        &mut self,
        window: &mut Window,
        mr: &Mr,
        offset: usize,
        len: u32,
    ) -> Result<u32, PostError>;

    /// Sets how long a peer waits after we had no receive for it (IBTA code 0..=31; 0 is 655 ms, 12 is 0.64 ms).
    ///
    /// # Errors
    /// The queue pair is not connected. Source: `ibv_modify_qp(3)`.
    fn set_min_rnr_timer(&mut self, code: u8) -> Result<(), Error>;
}

/// Queue sizes of a new queue pair.
#[derive(Clone, Copy, Debug)]
pub struct QpCaps {
    /// Send work requests.
    pub max_send_wr: u32,
    /// Receive work requests.
    pub max_recv_wr: u32,
    /// Scatter entries per send.
    pub max_send_sge: u32,
    /// Scatter entries per receive.
    pub max_recv_sge: u32,
    /// Of the keys that it may use.
    pub domain: Domain,
}

/// A connection, listener or resolution in progress; stays unique in the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CmId(pub u64);

/// Patience, as REQ and REP say it to the peer, and our own. `rnr_retry` programs the *peer's* queue pair; 7 is for ever.
#[derive(Clone, Copy, Debug)]
pub struct ConnParams {
    /// Transport retries, 0..=7 (active side only).
    pub retry: u8,
    /// Receiver-not-ready retries, 0..=7.
    pub rnr_retry: u8,
    /// RDMA READs in flight, each way; 0 forbids them. The lesser of both sides counts.
    pub read_depth: u8,
    /// The connection is given up when the peer has acknowledged nothing for so long (active side only); `None`: what
    /// the provider takes. Providers whose device has timers of its own keep those.
    pub give_up: Option<Duration>,
    /// How long the peer shall wait for an acknowledgement before it repeats, at least: 4.096 µs × 2^code, code 0..=31
    /// (passive side only); `None`: what the provider takes. Providers whose device says it keep that.
    pub ack_delay: Option<u8>,
}

impl ConnParams {
    /// All retries, no READs, and times as the provider takes them.
    pub const FOREVER: Self = Self { retry: 7, rnr_retry: 7, read_depth: 0, give_up: None, ack_delay: None };
}

impl CmId {
    /// For providers: a number nobody in the process has.
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Reason codes of [`CmEvent::Rejected`] that the product tells apart. Source: IBTA 12.6.7.2.
pub struct RejectReason;

impl RejectReason {
    /// Nobody listens on that port ("invalid service ID").
    pub const INVALID_SERVICE_ID: i32 = 8;
    /// The peer's program said no; its private data may say why.
    pub const CONSUMER: i32 = 28;
}

/// Connection-manager events; the provider has already copied and acknowledged them.
#[derive(Debug)]
pub enum CmEvent {
    /// A peer wants to connect. Answer with `create_qp` + `accept`, or with `reject` + `destroy`.
    ConnectRequest {
        /// The listener.
        listener: CmId,
        /// The new connection.
        id: CmId,
        /// Private data as the peer sent it, possibly zero-padded by the transport.
        private: Vec<u8>,
        /// Our address.
        local: SocketAddr,
        /// The peer's.
        peer: SocketAddr,
    },
    /// Active side: address and route are known; `create_qp` and `connect` may follow.
    Resolved(CmId),
    /// Both sides: ready. Active side: with the peer's private data.
    Established {
        /// Which.
        id: CmId,
        /// Of the accept, active side only.
        private: Vec<u8>,
    },
    /// Active side: the peer said no.
    Rejected {
        /// Which.
        id: CmId,
        /// IB CM reason code; 28 is the consumer's own no, 8 nobody listening.
        reason: i32,
        /// Of the reject.
        private: Vec<u8>,
    },
    /// The peer disconnected, or our disconnect finished.
    Disconnected(CmId),
    /// Could not be set up or was lost, with the transport's words.
    Failed {
        /// Which.
        id: CmId,
        /// Event name and status.
        reason: String,
    },
    /// The device is going away: close everything on it.
    DeviceRemoved(CmId),
}

impl CmEvent {
    /// The connection (or listener) the event is about; the new one for a request.
    pub fn id(&self) -> CmId {
        match self {
            Self::ConnectRequest { id, .. }
            | Self::Resolved(id)
            | Self::Established { id, .. }
            | Self::Rejected { id, .. }
            | Self::Disconnected(id)
            | Self::Failed { id, .. }
            | Self::DeviceRemoved(id) => *id,
        }
    }
}

/// A connection manager: one per provider and control thread, never blocks (beside short system calls).
pub trait Cm: Send {
    /// "rdma-core", "soft-roce", "loopback".
    fn provider(&self) -> &'static str;

    /// Becomes readable when [`Cm::poll`] has something.
    fn wait_fd(&self) -> RawFd;

    /// The next event, `None` if there is none now.
    ///
    /// # Errors
    /// The channel itself broke.
    fn poll(&mut self) -> Result<Option<CmEvent>, Error>;

    /// Listens on `addr` (an unspecified IPv6 address takes IPv4 as well).
    ///
    /// # Errors
    /// Address in use, no RDMA device behind the address. Source: `rdma_bind_addr(3)`, `rdma_listen(3)`.
    fn listen(&mut self, addr: SocketAddr, backlog: u32) -> Result<CmId, Error>;

    /// The address a listener really has (port 0 resolved).
    fn local_addr(&self, id: CmId) -> Option<SocketAddr>;

    /// Starts an outgoing connection: [`CmEvent::Resolved`] or [`CmEvent::Failed`] follows.
    ///
    /// # Errors
    /// At once refused by the system.
    fn resolve(&mut self, src: Option<IpAddr>, dst: SocketAddr, timeout: Duration) -> Result<CmId, Error>;

    /// The device a connection is on (after `ConnectRequest` or `Resolved`).
    fn device(&self, id: CmId) -> Option<Arc<dyn Device>>;

    /// The port of that device, counted from 1 (after `ConnectRequest` or `Resolved`). Devices without hardware have
    /// one.
    fn port(&self, id: CmId) -> u8 {
        let _ = id;
        1
    }

    /// Every device used so far.
    fn devices(&self) -> Vec<Arc<dyn Device>>;

    /// Gives the connection its queue pair, with sends and receives completing on `cq`.
    ///
    /// # Errors
    /// Over the device's limits; unknown id; `cq` of another device. Source: `rdma_create_qp(3)`.
    fn create_qp(&mut self, id: CmId, caps: &QpCaps, cq: &CqHandle) -> Result<Box<dyn Qp>, Error>;

    /// Sends the request. `private`: at most 56 bytes.
    ///
    /// # Errors
    /// Source: `rdma_connect(3)`.
    fn connect(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error>;

    /// Accepts; the queue pair may receive from now on. `private`: at most 196 bytes.
    ///
    /// # Errors
    /// Source: `rdma_accept(3)`.
    fn accept(&mut self, id: CmId, params: ConnParams, private: &[u8]) -> Result<(), Error>;

    /// Refuses with the consumer's reason code. `private`: at most 148 bytes.
    ///
    /// # Errors
    /// Source: `rdma_reject(3)`.
    fn reject(&mut self, id: CmId, private: &[u8]) -> Result<(), Error>;

    /// Moves the queue pair to the error state, so that its work flushes, and tells the peer. Idempotent.
    ///
    /// # Errors
    /// Source: `rdma_disconnect(3)`.
    fn disconnect(&mut self, id: CmId) -> Result<(), Error>;

    /// Forgets a connection or listener; no events of it come any more. The system's object goes when the `Qp` has
    /// been dropped too. Unknown ids are ignored.
    fn destroy(&mut self, id: CmId);
}
