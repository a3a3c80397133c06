//! Remote RNBD devices, used from user space.
//!
//! [`client`] opens devices of an RNBD server and does I/O on them: a control part on the control thread, and on each
//! reactor a lane that submits and completes requests.

pub mod bdev;
pub mod client;
