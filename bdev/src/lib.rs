//! Block devices ("bdevs") with one I/O channel per core and user.
//!
//! Read [`device`] first (the two backend traits and how they are used), then [`io`] (requests and statuses). Users
//! go through [`Manager`], [`Descriptor`] and [`IoChannel`]; a new backend starts from `examples/minimal.rs`.
//!
//! Backends: [`null`], [`malloc`], [`uring`] (files and block devices; also as "AIO disk"). Layers over another bdev:
//! [`delay`], [`error`]. With the feature `spdk`, SPDK's own bdevs: module `spdk`.

mod clock;
pub mod delay;
mod descriptor;
pub mod device;
mod emulate;
pub mod error;
mod histogram;
pub mod io;
mod iochannel;
mod layer;
pub mod malloc;
mod manager;
pub mod null;
#[cfg(feature = "spdk")]
pub mod spdk;
mod stats;
pub mod uring;
mod users;

pub use descriptor::{Claim, Descriptor, Event, Mode, User};
pub use device::{Bdev, Channel, ChannelError, DriverValue, Extent, Info, OpSet};
pub use histogram::{HistogramConfig, LatencyHistogram};
pub use io::{Completion, Completions, Flags, IoRequest, Op, Rejected, Segments, Status};
pub use iochannel::IoChannel;
pub use manager::{BdevStatus, Error, Manager, Notice, OnGone};
pub use stats::{IoStats, OpStats, ResetMode};
