//! What `rnbd-target` and `rnbd-initiator` share: bdevs and reactors under JSON-RPC, from start-up to shutdown.
//!
//! [`app`] is the running program. What it serves bdevs through, or gets them from, joins as a [`Subsystem`]; the
//! engine knows none by name. [`methods`] are the RPC methods that every program has, [`args`] the command line that
//! they share, [`placement`] spreads users over reactors.

pub mod app;
pub mod args;
pub mod isolation;
pub mod log;
pub mod methods;
mod network;
pub mod notify;
mod pending;
pub mod placement;
mod shutdown;
#[cfg(feature = "spdk")]
pub mod spdk;
mod startup;
mod state;
mod subsystem;

pub use app::{App, Error, Options};
pub use network::{Network, NoNetwork};
pub use shutdown::Ask;
pub use subsystem::{BdevKind, InUse, MethodText, ShutdownDone, Subsystem};
