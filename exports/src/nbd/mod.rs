//! Kernel NBD: a bdev as /dev/nbdN of this host.
//!
//! ```text
//!   control thread                       helper threads                     a reactor
//!   RPC ▶ start: open bdev ────────────▶ prepare: whose is the device?
//!     CONNECT of socket pairs ◀─────────┘                     (or recover: RECONFIGURE of a dead device)
//!     one lane per socket ────────────────────────────────────────────────▶ Lane: nbd_poll::Connection ◀─▶ IoChannel
//!     answer ◀───────────────────────── settle: node, partitions               │
//!   RPC ▶ stop ────────────────────────▶ quiesce: flush, DISCONNECT             │
//!     answer ◀───────────────────────── gone: until the device is free ◀── every lane has ended
//! ```
//!
//! Calls to the kernel that may block run on threads of their own, because the reactors must serve the device meanwhile.
//! A socket that dies while the device lives (the kernel closes one whose request took too long) is replaced. After a
//! crash the kernel keeps the device for its dead-connection timeout, and starting the same bdev takes it over: see
//! `claim` for what is proof enough.

mod bridge;
mod claim;
mod disk;
mod lane;
mod methods;
mod prepare;
mod recover;
mod start;
mod stop;
mod subsystem;
mod worker;

pub use subsystem::Nbd;
