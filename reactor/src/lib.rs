//! Reactors: one thread that polls, and everything on it belongs to it alone.
//!
//! A [`Reactor`] runs [`Poller`]s in turns. Nothing on the data path is shared between reactors; other threads reach
//! one by sending a closure through its [`Handle`], which runs between two turns. When a turn finds no work the
//! [`IdlePolicy`] decides: poll on, or, after a while, sleep on the descriptors that the pollers watch.
//!
//! The same loop, unpinned and always ready to sleep, serves as control thread.

mod accepting;
mod core;
mod cpumask;
mod crowd;
pub mod descriptors;
mod mailbox;
mod poller;
mod stats;
mod team;
mod timer;
mod waker;

pub use crate::accepting::AcceptPause;
pub use crate::core::{Reactor, SetupError, Turn};
pub use crate::cpumask::{CpuMask, CpuMaskError};
pub use crate::mailbox::{Handle, IdlePolicy, Message};
pub use crate::poller::{Polled, Poller, PollerId};
pub use crate::stats::{PollerStats, ReactorStats};
pub use crate::team::Team;
pub use crate::timer::TimerId;
