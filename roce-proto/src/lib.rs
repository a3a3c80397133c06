//! RoCEv2 without sockets, clocks or threads: what goes on the wire (IBTA volume 1, annex A17 "RoCEv2").
//!
//! ```text
//! UDP payload ─ packet::parse ─▶ headers::Headers + payload ─ icrc::verify ─▶ rc::Qp   (reliable connection)
//!                             └▶ a MAD on queue pair 1 ────────────────────▶ cm::Agent (connections)
//! rc::Qp::next_packet, cm::Action::Send ─ headers::Headers::encode ─ icrc ─▶ UDP payload
//! keys::Table   which memory peers may touch
//! ```
//!
//! Time is a number of nanoseconds that the caller passes in; randomness comes from the caller, too.

#![forbid(unsafe_code)]

pub mod cm;
pub mod counters;
pub mod headers;
pub mod icrc;
pub mod keys;
pub mod packet;
pub mod psn;
pub mod rc;

pub use counters::{Counter, Counters};
pub use headers::{Aeth, Headers, Opcode, Reth};
pub use packet::{Mad, Packet, Parsed};
pub use psn::Psn;

/// The UDP port of RoCEv2. Source: IANA "roce"; `ib_verbs.h`, `ROCE_V2_UDP_DPORT`.
pub const UDP_PORT: u16 = 4791;

/// A point in time: nanoseconds since a moment of the caller's choice.
pub type Nanos = u64;
