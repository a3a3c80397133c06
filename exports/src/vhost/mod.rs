//! vhost-user-blk: a bdev as the disk of a virtual machine.
//!
//! ```text
//!   control thread                                        a reactor
//!   VhostState: name ▶ Entry: vhost_poll::Controller ───▶ vhost_poll's lane ◀─▶ disk::BdevChannel ◀─▶ bdev IoChannel
//!     bdev resized ▶ guests read their configuration again
//!     bdev removed ▶ requests fail, channels are dropped, then the descriptor
//! ```
//!
//! A guest's memory becomes regions of the program's registry, so that devices use it without a copy.

mod disk;
mod methods;
mod state;
mod subsystem;

pub use subsystem::Vhost;
