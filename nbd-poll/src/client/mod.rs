//! NBD clients: connections to servers over TCP and unix sockets, in the clear or by TLS.
//!
//! ```text
//!   Dial  connect ─▶ haggle (nbd_proto::client) ─▶ [TLS] ─▶ Dialled     control path, polled, never blocks
//!                                                              │
//!   Connection::submit ─▶ queue ── one sendmsg ─▶ socket       ▼ goes to a reactor
//!        ▲                                          │ readv: data straight into the request's own memory
//!        └── done ◀── Connection::receive ◀── replies (nbd_proto::client::Replies)
//! ```

mod ahead;
mod connection;
mod dial;
mod remains;

pub use connection::{Connection, Done};
pub use dial::{Address, Dial, DialError, DialOptions, Dialled, Original, Secure};
pub use remains::{End, Remains};
