//! What goes into a queue pair and comes out of it.

use crate::Headers;

/// What a send request does at the peer. Immediates are host-order numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// SEND.
    Send,
    /// SEND with immediate.
    SendImm(u32),
    /// SEND that invalidates a key of the peer.
    SendInvalidate(u32),
    /// RDMA WRITE.
    Write {
        /// Peer's virtual address.
        va: u64,
        /// Peer's key.
        rkey: u32,
    },
    /// RDMA WRITE that takes a receive of the peer and delivers `imm`.
    WriteImm {
        /// Peer's virtual address.
        va: u64,
        /// Peer's key.
        rkey: u32,
        /// Immediate.
        imm: u32,
    },
    /// RDMA READ. Goes out as several READ requests when it is long, so that responses do not flood our socket.
    Read {
        /// Peer's virtual address.
        va: u64,
        /// Peer's key.
        rkey: u32,
    },
}

/// A send-queue request.
#[derive(Clone, Copy, Debug)]
pub struct SendRequest<S> {
    /// What to do.
    pub op: Op,
    /// Bytes, at most 2^31.
    pub len: u32,
    /// Success is reported, too.
    pub signaled: bool,
    /// Where the bytes are: the driver's own descriptor. Read again for every transmission, until the completion.
    pub data: S,
}

/// Why a request failed. Source: `ibv_poll_cq(3)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// The queue pair is in the error state; says nothing about why.
    Flushed,
    /// A message was longer than the receive it met.
    LocalLength,
    /// Own memory could not be accessed.
    LocalProtection,
    /// The peer, or we as the peer's responder, refused a malformed or forbidden request (NAK 0x61).
    RemoteInvalidRequest,
    /// Key, bounds or permission did not fit (NAK 0x62).
    RemoteAccess,
    /// The peer could not do it (NAK 0x63).
    RemoteOperation,
    /// The peer did not answer.
    RetryExceeded,
    /// The peer had no receive for too long.
    RnrRetryExceeded,
}

/// Kind of a message that took a receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceivedKind {
    /// A SEND; its bytes are where the receive said.
    Recv,
    /// An RDMA WRITE with immediate; the receive's memory is untouched.
    RecvWriteImm,
}

/// A request that is done. Each posted request completes at most once, each queue in order; requests that were posted
/// without `signaled` complete only if they fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion<S, R> {
    /// Done and acknowledged by the peer.
    Sent {
        /// Of the request.
        data: S,
    },
    /// Not known to have been done.
    SendFailed {
        /// Of the request.
        data: S,
        /// Why.
        status: Status,
    },
    /// A message took this receive.
    Received {
        /// Of the receive.
        data: R,
        /// What came.
        kind: ReceivedKind,
        /// Bytes of the message.
        len: u32,
        /// Immediate, host order.
        imm: Option<u32>,
        /// Key of ours that the message invalidated.
        invalidated: Option<u32>,
        /// The peer asks for an event.
        solicited: bool,
    },
    /// No complete message took this receive.
    RecvFailed {
        /// Of the receive.
        data: R,
        /// Why.
        status: Status,
    },
}

/// Memory refused an access: unknown key, other domain, out of bounds, not permitted, or already gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessError;

/// The memory behind a queue pair. Every function may refuse; a refusal breaks the queue pair.
pub trait Memory<S, R> {
    /// Places one packet of an RDMA WRITE at `va`. Must check key, bounds and permission: keys may have been
    /// invalidated since the message began.
    ///
    /// # Errors
    /// The peer gets a remote access error.
    fn write(&mut self, rkey: u32, va: u64, payload: &[u8]) -> Result<(), AccessError>;

    /// A peer may write (else read) all of a message of several packets. `len` is not 0.
    ///
    /// # Errors
    /// The peer gets a remote access error.
    fn check(&mut self, rkey: u32, va: u64, len: u32, write: bool) -> Result<(), AccessError>;

    /// Places a packet of a SEND at `offset` of a receive. Ends within the `capacity` that was posted.
    ///
    /// # Errors
    /// The peer gets a remote operational error.
    fn receive(&mut self, into: &R, offset: u32, payload: &[u8]) -> Result<(), AccessError>;

    /// Places a packet of a READ response at `offset` of the request's memory. Ends within the request's `len`.
    ///
    /// # Errors
    /// The READ fails with [`Status::LocalProtection`].
    fn read_into(&mut self, of: &S, offset: u32, payload: &[u8]) -> Result<(), AccessError>;

    /// Invalidates a key on behalf of the peer.
    ///
    /// # Errors
    /// The peer gets a remote access error.
    fn invalidate(&mut self, rkey: u32) -> Result<(), AccessError>;
}

/// Bytes that follow the headers of a packet. Their pad is `len.wrapping_neg() & 3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload<S> {
    /// None.
    None,
    /// `len` bytes at `offset` of a send request's memory.
    Send {
        /// Of the request.
        data: S,
        /// Bytes from its start.
        offset: u32,
        /// Bytes, at most the MTU.
        len: u32,
    },
    /// A READ response: memory that the peer named. Check it again: the key may be gone ([`super::Qp::refuse_read`]).
    Memory {
        /// Key of ours.
        rkey: u32,
        /// Address under that key.
        va: u64,
        /// Bytes, at most the MTU.
        len: u32,
    },
}

/// A packet to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing<S> {
    /// Its headers.
    pub headers: Headers,
    /// What follows them.
    pub payload: Payload<S>,
}

/// Where a queue pair is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not connected: receives may be posted, packets are dropped.
    Init,
    /// Connected: sends and receives.
    Ready,
    /// Broken: everything is flushed, packets are dropped.
    Error,
}

/// A request was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// As many requests are outstanding as the queue was made for.
    #[error("the queue is full")]
    Full,
    /// Sends need a connected queue pair.
    #[error("the queue pair is not connected")]
    WrongState,
    /// More than 2^31 bytes.
    #[error("a message has at most 2^31 bytes")]
    TooLong,
    /// The peer serves no READs.
    #[error("the connection was set up without RDMA READ")]
    NoReads,
}
