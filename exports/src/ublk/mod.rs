//! ublk: a bdev as /dev/ublkbN of this host.
//!
//! ```text
//!   control thread                                       a reactor
//!   Ublk: RPC ▶ Disk: stages, one command at a time ──▶ Lane: ublk_poll::Queue ◀─▶ bdev IoChannel
//!     ublk_poll::Control (completions)               ◀── message when the lane has ended
//! ```
//!
//! A disk starts in `disk::Stage`s: added, parameters set, queues on their reactors, started. It stops when the kernel
//! says that every tag has ended, and its number is free once the kernel has deleted it.
//!
//! After a crash of the program the kernel keeps the disk and its requests (user recovery). Starting the same bdev under the
//! same number takes it over, as does `ublk_recover_disk`; see [`leftover`](self) for what is refused.

mod bridge;
mod disk;
mod lane;
mod lanes;
mod leftover;
mod methods;
mod recover;
mod start;
mod stop;
mod subsystem;
mod survey;
mod target;

pub use subsystem::Ublk;
