//! NBD transports that are polled: sockets, and the kernel's NBD driver. Nothing here knows of bdevs or RPC.
//!
//! ```text
//!   socket ──readv──▶ headers staged, payload straight into a buffer of the pools ──▶ Connection::receive ─▶ Incoming
//!     ▲                                                                                                       │ I/O
//!     └──── one sendmsg for many replies, data out of the buffers ◀── Connection::send ◀── Connection::reply ◀┘
//! ```
//!
//! * [`Connection`]: the server's end of one socket in the transmission phase; one reactor owns it.
//! * [`Buffers`]: data memory of the connections of one reactor.
//! * [`client`]: the other end: connections to servers, over TCP and unix sockets, with TLS.
//! * [`listener`]: TCP and unix sockets of a server, up to the choice of an export. Control path.
//! * [`kernel`]: makes /dev/nbdN out of the other end of such sockets, and follows what becomes of it. Control path.

mod buffers;
pub mod client;
mod connection;
pub mod kernel;
pub mod listener;
mod outbox;
mod slots;
mod staging;
mod stream;
pub mod tls;

pub use buffers::{Buffers, LARGE_BUFFER, SMALL_BUFFER, Share};
pub use connection::{Connection, End, Incoming, MAX_PAYLOAD};
pub use slots::{MAX_IN_FLIGHT, RequestId};
pub use stream::socket_pair;

/// Scatter list of a request; more than four segments are a request of more than four large buffers.
pub type Segments = smallvec::SmallVec<[iobuf::Segment; 4]>;
