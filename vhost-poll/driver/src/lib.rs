//! The other side of vhost-user-blk: what a virtual machine monitor and its guest's driver do, in one process and polled.
//! For tests and load; the back end under test is not used by any of it.
//!
//! [`Disk`] is a whole disk; the parts below it ([`FrontEnd`], [`Ram`], [`DriverRing`]) also do what a well-behaved
//! front end or guest never would.

mod disk;
mod frontend;
mod ram;
mod ring;

pub use disk::{Disk, Options, Request};
pub use frontend::FrontEnd;
pub use ram::Ram;
pub use ring::{Buf, DriverRing, RingAddrs};

/// Status byte before the device has written it.
pub const NO_STATUS: u8 = 0xff;

/// How long a back end may be silent before it counts as hanging.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);
