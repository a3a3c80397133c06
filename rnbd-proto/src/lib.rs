//! RNBD 2.0 wire format and request checks, without I/O.
//!
//! RNBD (Linux `drivers/block/rnbd`) is the block protocol inside RTRS user messages: SESS_INFO once per session,
//! OPEN per device, then IO, and CLOSE. Requests travel as RTRS user messages, the answers to SESS_INFO and OPEN as
//! RTRS read data, and every result as an errno in the RTRS response immediate.
//!
//! [`wire`] has the exact bytes, [`device`] what a client is told about a device. [`io`] turns a `MsgIo` into a
//! request that made sense for its device, [`open`] checks names and access rights, [`session`] keeps the devices that
//! one session has open.
#![forbid(unsafe_code)]

pub mod device;
pub mod io;
pub mod open;
pub mod session;
pub mod wire;

pub use rtrs_proto::errno;
pub use rtrs_proto::errno::Errno;
