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

mod control;
mod export;
mod geometry;
mod lane;
mod methods;
mod shared;
mod subsystem;
mod texts;

pub use control::{Control, OpenInfo, SessionDevices};
pub use export::{Allow, Export, ExportError, Exports, Found};
pub use lane::RnbdLane;
pub use shared::Shared;
pub use subsystem::{Rnbd, RnbdState, Server};
