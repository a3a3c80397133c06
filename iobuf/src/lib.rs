//! Data memory: page-aligned [`Region`]s made on the control path, and what the data path passes around of them.
//!
//! A [`Region`] is registered once with everything that needs it (RDMA memory region, io_uring fixed buffers).
//! The data path never allocates and never owns memory: it passes [`Segment`]s, plain (address, length, region)
//! triples whose owner keeps the region alive until the I/O that uses them has completed.
//!
//! Peers may write into a region at any time (that is what RDMA is for), so no Rust reference into one is ever
//! made from code that cannot rule this out: copies go through [`Region::copy_out`] and [`Region::copy_in`].

mod budget;
mod fault;
mod pool;
mod provider;
mod region;
mod registry;

pub use budget::{trim_heap, usable_memory};
pub use fault::losses;
pub use pool::{Buffer, Pool};
pub use provider::Provider;
pub use region::{MapError, PAGE_SIZE, Region, Segment};
pub use registry::{RegionId, Registry, Snapshot};
