//! UDP sockets for RoCE: receiving in batches, steering by queue pair, sending in segmented runs.

mod open;
mod rx;
mod steer;
pub mod sys;
mod tx;

pub use open::{open_rx, open_tx};
pub use rx::{Datagram, Receiver};
pub use steer::SLOT_MASK;
pub use tx::{Dest, Sent, Transmitter};
