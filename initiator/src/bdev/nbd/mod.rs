//! bdev_nbd: exports of NBD servers as bdevs.
//!
//! ```text
//!  control thread                              a reactor with connections of the device
//!  drives::Drives ── connection, close, fail ▶ lane::NbdLane ── Wire ──▶ nbd_poll::client::Connection ─▶ server
//!    dialer: resolve, connect, haggle             │   ▲                       │ answers, ends
//!    when to try again, size, end                 ▼   └───────────────────────┘
//!                                              super::disks::Disks ◀── channels of those who use the bdev
//! ```
//!
//! A connection belongs to one reactor; several are shared out among them, if the server allows several
//! (CAN_MULTI_CONN). Requests wait, are cut, repeated and ended by the same `Disks` as those of
//! bdev_rnbd.
//!
//! # What happens to requests when a connection is lost
//! They are repeated, on another connection of the same reactor or when there is one again. For that to be right,
//! nothing of the first attempt may be left at the server when what it did could undo something newer. NBD has no means
//! to ask a server for that, so it follows from how the connection ended:
//!
//! * *The server let go of it*: its side was closed, or its host answered with a reset. Whoever closes a socket reads
//!   nothing more from it; what a process had begun has ended with it, and what a living server has begun it finishes
//!   before it closes (nbdkit, nbd-server, and ours, which holds back others until then). Reads and flushes are
//!   repeated at once, what changes data after `lane::SETTLE`, because it may have been something in between that cut
//!   the connection, behind which the server still reads what has arrived.
//! * *It was given up here*: the server broke the protocol, or was silent for `io_timeout_sec`. It may find requests in
//!   its socket later. Our side is closed, and the server's is waited for: once it is closed, too, everything has been
//!   read and worked off. Reads and flushes are repeated at once, what changes data only then, or after `lane::STALE`,
//!   when the connection is reset, so that nothing more of it arrives.
//! * *The network is gone*: the host was silent for 30 s, or could not be reached any more. The kernel has thrown away
//!   what it had not sent. What changes data is repeated after `lane::STALE`.
//!
//! A proxy answers for its server: what it says of a connection is not what the server does with what it has of it.
//!
//! So a server that stands still for longer than that, with requests of a connection that it does not know to be dead,
//! can still execute an old write late. The kernel's client and qemu repeat everything at once; mind it where a server
//! may hang for that long, and leave `io_timeout_sec` at 0.
//!
//! ESHUTDOWN is no failure but an announcement: the request waits, as if its connection had been lost.
//!
//! Two things remain outside, as in bdev_rnbd: a write that was given up (`fast_io_fail_timeout_sec`) has failed, and
//! may still be executed; and a server that is restarted, or whose host loses power, may come back without the writes
//! that were not flushed, and has no means to tell: mind where its cache is.

mod create;
mod dialer;
mod drive;
mod drives;
mod error;
mod geometry;
mod lane;
mod link;
mod methods;
mod params;
mod subsystem;

pub use drives::{Done, DriveInfo, Drives};
pub use error::NbdError;
pub use params::{Dialect, NbdParams, Timeouts};
pub use subsystem::BdevNbd;
