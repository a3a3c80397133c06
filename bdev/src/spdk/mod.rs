//! SPDK's bdevs (NVMe, lvol, raid, …) as bdevs of this crate. Feature `spdk`.
//!
//! SPDK runs inside this program's threads, without its own reactors:
//!
//! ```text
//!   control thread: Runtime ── the app thread: subsystems, RPC, opening and closing, events     one spdk_thread
//!        │ poll, after the configuration has been loaded as well
//!        └ threads that SPDK's modules make, unless `adopt` gives them to a reactor
//!   any other thread that makes a channel: Local ── its own spdk_thread, its io channels
//!        └ polled by the channels while something is in flight, else by `poll_idle`
//! ```
//!
//! Reading order: [`Options`] and `env` start it, `runtime` is its life, `local` a thread's part of it, `disk` a bdev,
//! `channel` the data path, `memory` what devices can reach, `port` SPDK's own JSON-RPC. `ffi` has the few helpers around
//! C strings and lists. One environment for each process, once: SPDK keeps its state in global variables.

mod channel;
mod disk;
mod env;
mod ffi;
mod local;
mod log;
mod memory;
mod port;
mod runtime;
mod slot;

pub use disk::{Details, SpdkBdev, bdevs, name_of, offer};
pub use env::{Options, StartError};
pub use local::{Foreign, adopt, give_up_soon, leave, next_wake, poll_idle};
pub use log::recent_errors;
pub use memory::provider;
pub use port::{Limits, Port, States, limits, states_of};
pub use runtime::{Change, Examination, Init, Runtime, running};

/// The version of SPDK that this program was built with: "v26.05".
pub fn version() -> String {
    format!("v{}.{:02}", spdk_sys::SPDK_VERSION_MAJOR, spdk_sys::SPDK_VERSION_MINOR)
}

/// Whether this SPDK can send an NVMe drive a flush: v25.09 or later, with `enable_flush` of `bdev_nvme_set_options`. Others
/// complete flushes themselves. Source: SPDK's CHANGELOG.
pub fn flushes_nvme() -> bool {
    (spdk_sys::SPDK_VERSION_MAJOR, spdk_sys::SPDK_VERSION_MINOR) >= (25, 9)
}
