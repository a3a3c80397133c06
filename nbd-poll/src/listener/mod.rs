//! NBD servers on TCP and unix sockets, up to the choice of an export. Control path.
//!
//! ```text
//!   Listener ── accept ──▶ Handshake (nbd_proto::haggle) ── GO, EXPORT_NAME ──▶ Accepted ──▶ Connection on a reactor
//!       └───────────── Acceptor: both, with limits and times ────────────┘
//! ```

mod acceptor;
mod address;
mod handshake;
mod identity;
mod link;
mod socket;

pub use acceptor::{Accepted, Acceptor, AcceptorOptions, Event};
pub use address::{Address, Peer};
pub use handshake::HandshakeError;
pub use identity::{Identity, Shelf, TlsIdentity};
pub use link::{Encrypted, Socket};
pub use socket::{ListenError, Listener, peer_of};
