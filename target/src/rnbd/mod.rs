//! The RNBD front end: devices of clients, from OPEN on the control thread to I/O on the reactors.
//!
//! ```text
//!   lane (each reactor)                         control thread
//!   SESS_INFO, OPEN, CLOSE  ── message ───────▶ Control: name → bdev, access rules, device ids
//!          reply_message    ◀── message ──────
//!   IO: device id → channel (first use: looked up in Shared) → bdev → reply
//!   close_device            ◀── message ──────  CLOSE, session end, bdev removed
//!     when its I/O is done   ── message ──────▶ release access, drop the descriptor, answer CLOSE
//! ```

mod bdevs;
mod control;
mod export;
mod files;
mod geometry;
mod identity;
mod lane;
mod methods;
mod names;
mod shared;
mod strangers;
mod subsystem;
mod texts;

pub use control::{Control, OpenInfo, SessionDevices};
pub use export::{Allow, Export, ExportError, Exports};
pub use identity::Standing;
pub use lane::RnbdLane;
pub use names::{Asking, Bdevs, By, File, Found, Refused};
pub use shared::Shared;
pub use subsystem::{Rnbd, RnbdState, Server};
