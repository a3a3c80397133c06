//! What tests wait with and count allocations with, where they put their files, and addresses of their own.
//!
//! No test judges time: a machine with other work may let any thread stand still for seconds. Tests wait for states, by
//! [`until`] and its like. The limit is only there to end what hangs: it is generous, and `TIME_SCALE` multiplies it
//! where machines are slower still. What must not time out, and has a timeout, gets it from [`limit`], too.

mod counting;
mod exhausted;
mod files;
mod network;
mod wait;

pub use counting::{Counting, all_allocations, allocates_nothing, allocations};
pub use exhausted::Exhausted;
pub use files::Dir;
pub use network::{address, listens, network, port};
pub use wait::{limit, patience, recv, scale, until, until_some};
