//! RTRS 2.0 wire format and protocol machines, without I/O.
//!
//! RTRS (Linux `drivers/infiniband/ulp/rtrs`) carries small opaque messages plus bulk data over RC queue pairs.
//! This crate knows bytes and states only: no sockets, no verbs, no clock (time comes in as `now_ns`, any
//! monotonic nanosecond count), no threads, and no allocation per request.
//!
//! ```text
//!  client                                                       server
//!    CM REQ {ConnReq, cid 0..cid_num}  ──────────────────▶  admission::SessionTable::admit
//!    ◀────────────────────────────  CM REP or REJ {ConnRsp}
//!    SEND InfoReq on cid 0  ─────────────────────────────▶  SessionTable::info_req
//!    ◀───────────────────────────────────────  SEND InfoRsp + SgDesc[]
//!    RDMA WRITE_WITH_IMM into chunk  (imm::Imm::IoReq)  ─▶  request::Header, request::Request
//!    ◀──────────────────  data WRITE, imm::Imm::IoRsp      response::plan
//!    ◀─────────  zero-length WRITE_WITH_IMM, both ways  ─▶  heartbeat::Heartbeat
//! ```
//!
//! `wire` has the exact bytes, `imm` the 32-bit immediates, `limits` the sizes both sides agree on. The server
//! side is `handshake` (connect messages), `admission`, `request`, `response`; the initiator side is `client`.
#![forbid(unsafe_code)]

pub mod admission;
pub mod client;
pub mod errno;
pub mod handshake;
pub mod heartbeat;
pub mod imm;
pub mod limits;
pub mod request;
pub mod response;
mod slab;
pub mod wire;

pub use errno::Errno;
pub use imm::{Imm, ImmLayout};
pub use limits::Geometry;
