//! Connections: the communication manager of InfiniBand as Linux speaks it over RoCE. Source: IBTA volume 1, chapter 12;
//! `cm.c`, `cma.c` (Linux 6.12). Messages are management datagrams (MADs) to queue pair 1.
//!
//! ```text
//!   active                              passive
//!   connect ── REQ ────────────────▶  Request            (MRA after a second without an answer)
//!                                       accept: QpReady
//!   QpReady ◀───────────── REP ──    │
//!   Established ── RTU ────────────▶  Established        (or the first data: `data_arrived`)
//!        …                                …
//!   disconnect: QpError ── DREQ ───▶  QpError, Disconnected
//!   Disconnected ◀──────── DREP ──    │
//!   time wait: QpnFree                time wait: QpnFree
//! ```
//!
//! REQ, REP and DREQ are repeated until they are answered or have been sent often enough; the answers RTU, DREP, REJ
//! and MRA are repeated when what they answer is. Nothing authenticates a message: one that is about a connection
//! counts only if it is from the connection's peer, to its local address, and names both communication IDs, 25 bits of
//! ours being random.

mod active;
mod admit;
mod agent;
mod close;
mod limit;
mod message;
mod passive;
mod rdma_cm;
mod wire;

use std::net::{IpAddr, SocketAddr};

use crate::{Nanos, Psn};

pub use agent::Agent;
pub use message::{Body, Ids, Message, Mra, Path, Rej, Rep, Req, reason};
pub use rdma_cm::{REQ_PRIVATE, address, gid, mtu_bytes, mtu_code, service_id, service_port};
pub use wire::MadBytes;

/// Bytes of consumer data that [`Agent::accept`] can carry.
pub const REP_PRIVATE: usize = 196;

/// Bytes of consumer data that [`Agent::reject`] can carry.
pub const REJ_PRIVATE: usize = 148;

/// A listener, named by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerId(pub u64);

/// A connection; outgoing ones are named by the caller, incoming ones by [`Config::next_id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// The first bytes of the GUIDs of this implementation; the bit "locally administered" is set.
const OWN_GUID: u64 = 0x72_6e62;

/// This provider instance's identity (CA GUID). Linux takes two connections with the same GUID and queue pair number
/// for one, so it must differ between processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// 72 6e 62 and five random bytes.
    pub guid: u64,
}

impl Identity {
    /// From random bits, of which 40 are used.
    pub fn new(random: u64) -> Self {
        Self { guid: OWN_GUID << 40 | random >> 24 }
    }
}

/// The peer is this implementation, too.
pub fn is_own_guid(guid: u64) -> bool {
    guid >> 40 == OWN_GUID
}

/// How an [`Agent`] behaves. Times are in nanoseconds.
#[derive(Clone, Debug)]
pub struct Config {
    /// Low 7 bits of every communication ID, so that processes which share an address find the owner of a message.
    pub tag: u8,
    /// Names incoming connections; never the name of a connection or listener that exists.
    pub next_id: fn() -> u64,
    /// Connections of peers that are not established yet, in all.
    pub max_half_open: u32,
    /// The same, of one address.
    pub max_half_open_per_source: u32,
    /// Ended connections that are remembered; the oldest is forgotten early.
    pub max_time_wait: usize,
    /// Messages answered per second, in all, that are not about a connection of ours: refusals, DREP, REJ.
    pub stranger_rate: u32,
    /// The same, per source (sources share budgets by hash).
    pub stranger_rate_per_source: u32,
    /// Pause before a REQ or DREQ is repeated first; doubled up to [`Config::max_retry_interval`].
    pub retry_interval: Nanos,
    /// Longest pause before a message is repeated.
    pub max_retry_interval: Nanos,
    /// Repeats of a REQ.
    pub req_retries: u8,
    /// Repeats of a DREQ.
    pub dreq_retries: u8,
    /// No message is repeated for longer than this, even if the peer asks for patience.
    pub give_up_after: Nanos,
    /// A consumer that has not answered a request for so long makes us ask the peer for patience.
    pub mra_after: Nanos,
    /// A request that the consumer has not answered for so long is refused.
    pub answer_timeout: Nanos,
}

impl Config {
    /// The values to use.
    pub fn new(tag: u8, next_id: fn() -> u64) -> Self {
        Self {
            tag: tag & TAG_MASK as u8,
            next_id,
            max_half_open: 1024,
            max_half_open_per_source: 256,
            max_time_wait: 4096,
            stranger_rate: 2000,
            stranger_rate_per_source: 200,
            retry_interval: 250 * MS,
            max_retry_interval: 4000 * MS,
            req_retries: 15,
            dreq_retries: 6,
            give_up_after: 90_000 * MS,
            mra_after: 1000 * MS,
            answer_timeout: 60_000 * MS,
        }
    }
}

const MS: Nanos = 1_000_000;
const TAG_MASK: u32 = 0x7f;

/// The tag of the process that chose `comm_id`.
pub fn tag_of(comm_id: u32) -> u8 {
    (comm_id & TAG_MASK) as u8
}

/// Whom a message is for, on a host where several processes share an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Whoever listens on the port.
    Port(u16),
    /// Whoever chose this communication ID, see [`tag_of`].
    CommId(u32),
    /// Whoever is connected with the sender's communication ID: any.
    Any,
}

impl Route {
    /// `None`: for nobody, not a message of connections.
    pub fn of(mad: &MadBytes) -> Option<Self> {
        Some(match Message::parse(mad)?.body {
            Body::Req(req) => Self::Port(service_port(req.service_id).unwrap_or(0)),
            Body::Rej(rej) if rej.ids.remote == 0 => Self::Any,
            Body::Rej(Rej { ids, .. }) | Body::Mra(Mra { ids, .. }) | Body::Rep(Rep { ids, .. }) => {
                Self::CommId(ids.remote)
            }
            Body::Rtu(ids) | Body::Drep(ids) | Body::Dreq { ids, .. } => Self::CommId(ids.remote),
        })
    }
}

/// A local queue pair as a peer must know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QpFacts {
    /// Number, 24 bits, not 0, 1 or 0xffffff.
    pub qpn: u32,
    /// First PSN the queue pair expects.
    pub start_psn: Psn,
}

/// RDMA READs in flight that a side allows; the peer's opposite number counts where it is less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depths {
    /// READs of the peer that are served at a time.
    pub serve: u8,
    /// READs to the peer that are issued at a time.
    pub issue: u8,
}

/// What an outgoing connection asks for.
#[derive(Clone, Copy, Debug)]
pub struct ConnectParams<'a> {
    /// Its queue pair.
    pub qp: QpFacts,
    /// Path MTU in bytes: 256, 512 … 4096. Both directions use it.
    pub mtu: u32,
    /// Transport retries of both queue pairs, 0..=7.
    pub retry: u8,
    /// RNR retries of the *peer's* queue pair, 0..=7; 7 is for ever.
    pub rnr_retry: u8,
    /// READs.
    pub reads: Depths,
    /// At most [`REQ_PRIVATE`] bytes for the peer's consumer.
    pub private: &'a [u8],
}

/// How an incoming connection is accepted.
#[derive(Clone, Copy, Debug)]
pub struct AcceptParams<'a> {
    /// Its queue pair.
    pub qp: QpFacts,
    /// RNR retries of the *peer's* queue pair, 0..=7; 7 is for ever.
    pub rnr_retry: u8,
    /// Target ACK Delay, 0..=31: the peer's timer will not be shorter than 4.096 µs × 2^code.
    pub ack_delay: u8,
    /// READs.
    pub reads: Depths,
    /// At most [`REP_PRIVATE`] bytes for the peer's consumer.
    pub private: &'a [u8],
}

/// What a queue pair needs to run: everything both sides agreed upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Where packets must be addressed to, and are sent from.
    pub local: IpAddr,
    /// Where packets must come from, and are sent to.
    pub peer: IpAddr,
    /// Own queue pair.
    pub qpn: u32,
    /// The peer's.
    pub dest_qpn: u32,
    /// First PSN to send.
    pub send_psn: Psn,
    /// First PSN to expect.
    pub recv_psn: Psn,
    /// Path MTU in bytes, 256..=4096.
    pub mtu: u32,
    /// IBTA time code 1..=31.
    pub ack_timeout: u8,
    /// 0..=7.
    pub retry: u8,
    /// 0..=7; 7 is for ever.
    pub rnr_retry: u8,
    /// READs of the peer to serve at a time; 0 forbids them.
    pub serve_reads: u8,
    /// READs to have outstanding at a time; 0 forbids them.
    pub issue_reads: u8,
    /// The peer is this implementation, see [`is_own_guid`].
    pub own_peer: bool,
}

/// Why a connection could not be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// No answer to any of our requests.
    #[error("no answer to any connection request")]
    NoAnswer,
    /// We accepted, and the peer never said that it heard it.
    #[error("the peer did not confirm the connection")]
    NoConfirmation,
    /// The consumer let a request wait for too long.
    #[error("the request was not answered in time")]
    Unanswered,
    /// The peer accepted with values that make no sense.
    #[error("the peer's reply is not valid")]
    BadReply,
}

/// What the caller has to do, in this order. Events are for the consumer and do not come after [`Agent::destroy`].
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a MAD to queue pair 1 of `dst`.
    Send {
        /// From this local address.
        src: IpAddr,
        /// The peer's.
        dst: IpAddr,
        /// The datagram.
        mad: Box<MadBytes>,
    },
    /// Event: a peer wants to connect. Answer with [`Agent::accept`] or [`Agent::reject`].
    Request {
        /// Who was called.
        listener: ListenerId,
        /// The new connection.
        conn: ConnId,
        /// The consumer's data, zero-padded.
        private: [u8; REQ_PRIVATE],
        /// Our address.
        local: SocketAddr,
        /// The peer's; the port is informational.
        peer: SocketAddr,
        /// The peer is this implementation.
        own_peer: bool,
        /// Path MTU in bytes.
        mtu: u32,
        /// READs: `serve` is what the peer may issue, `issue` what it can serve.
        reads: Depths,
    },
    /// The queue pair shall receive from now on and may send.
    QpReady {
        /// Whose.
        conn: ConnId,
        /// How.
        attrs: Attributes,
    },
    /// The queue pair shall go to the error state: flush, and drop what comes. Comes after [`Agent::destroy`], too.
    QpError {
        /// Whose.
        conn: ConnId,
    },
    /// Event: both sides are ready.
    Established {
        /// Which.
        conn: ConnId,
        /// Of the peer's consumer, zero-padded; empty on the passive side.
        private: Vec<u8>,
    },
    /// Event: the peer refused or gave up, before the connection was established.
    Rejected {
        /// Which.
        conn: ConnId,
        /// See [`reason`].
        reason: u16,
        /// Of the peer's consumer, zero-padded.
        private: Vec<u8>,
    },
    /// Event: could not be set up.
    Unreachable {
        /// Which.
        conn: ConnId,
        /// Why.
        why: Why,
    },
    /// Event: the connection has ended, by the peer, by a finished [`Agent::disconnect`], or because a peer that lost
    /// its state wants to begin anew.
    Disconnected {
        /// Which.
        conn: ConnId,
    },
    /// No packet for this queue pair can be on its way any more: the number may be given to another. Comes once for
    /// each that [`Agent::connect`] or [`Agent::accept`] took.
    QpnFree {
        /// The number.
        qpn: u32,
    },
}

/// A call was refused; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such connection, or it has been destroyed.
    #[error("no such connection")]
    Unknown,
    /// The connection is past or before that.
    #[error("the connection is not in a state for that")]
    WrongState,
    /// The consumer's data do not fit.
    #[error("more than {0} bytes of private data")]
    PrivateTooLong(usize),
    /// Values out of range: both addresses of one family, MTU 256..=4096, QPN a usable one.
    #[error("invalid argument")]
    Invalid,
    /// A connection or listener of that name exists.
    #[error("the name is taken")]
    Exists,
    /// Another listener has the port on this address.
    #[error("address in use")]
    InUse,
}
