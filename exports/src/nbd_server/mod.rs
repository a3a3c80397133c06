//! NBD server: bdevs for NBD clients over TCP and unix sockets (subsystem "nbd_server").
//!
//! ```text
//!  control thread                                         a reactor
//!  Server: exports, acceptors ── socket, descriptor ────▶ Lane: Client (nbd_poll::Connection) ─▶ Disk (bdev::IoChannel)
//!     ▲  accept and haggle (nbd_poll::listener)             │ run to completion
//!     └──────────── the connection has ended ───────────────┘
//! ```
//!
//! A connection is given to the reactor with the fewest users once its client has chosen an export, and stays there.
//! The connections of one export on one reactor share an I/O channel. A flush covers what was acknowledged on any
//! connection, because it is the bdev's; so clients may use several (CAN_MULTI_CONN).

mod activation;
mod allow;
mod census;
mod client;
mod dialect;
mod disk;
mod error;
mod export;
mod fence;
mod guarded;
mod lane;
mod methods;
mod pace;
mod question;
mod ranges;
mod server;
mod single;
mod subsystem;

pub use single::serve_stdin;
pub use subsystem::NbdServer;
