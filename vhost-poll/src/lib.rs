//! vhost-user-blk devices, polled: the device side of a virtual machine's disk.
//!
//! ```text
//!  control thread                                      a reactor
//!  Controller: listening socket                        Lane: one disk channel, some queues of one session
//!    └ Session per connection                            poll: ring ─▶ chain ─▶ request ─▶ DiskChannel::submit … kick
//!        wire: messages ─▶ state ── start, stop, … ────▶       ◀─ used ring, one call per batch ◀─ DiskChannel::poll
//!        memory: the guest's regions (iobuf)           before sleep: notifications on, the kick eventfd is watched
//! ```
//!
//! The crate knows nothing of bdevs: what it serves is a [`Disk`]. A guest shares its memory with this process, so every
//! value is read from it once, copied, checked, and then used. Buffers reach the disk where they are, without a copy.
//!
//! Read [`disk`] first, then [`controller`]. Sources: the vhost-user specification
//! (QEMU, docs/interop/vhost-user.rst), virtio 1.2 sections 2.7 (split ring), 2.8 (packed ring), 5.2 (block device).

#[cfg(not(target_endian = "little"))]
compile_error!("rings are little-endian, and this crate reads them as they are");

mod bell;
pub mod blk;
mod chain;
mod closing;
mod conn;
pub mod controller;
pub mod disk;
mod fd;
mod file;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod inflight;
mod lane;
pub mod memory;
mod queue;
pub mod ring;
mod session;
pub mod wire;

pub use controller::{Controller, ControllerOptions, ListenError};
pub use disk::{BlkStatus, Completion, Disk, DiskChannel, DiskInfo, Op, Request};
pub use queue::Coalescing;
pub use session::SessionInfo;
