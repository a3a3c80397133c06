//! NBD, without I/O: bytes, and what may follow what.
//!
//! The transmission phase, as a server sees it (NBD `doc/proto.md`, "Transmission phase"; the kernel's `nbd.c` is a
//! client of exactly this, with what haggling would have settled handed over out of band):
//!
//! ```text
//!   client                                             server
//!   ── Request{READ, cookie, offset, len} ──────────▶  Event::Request
//!   ◀── SimpleReply{error=0, cookie}, data ──────────
//!   ── Request{WRITE, …}, len bytes of data ────────▶  Want::Payload … Event::Request
//!   ◀── SimpleReply{error, cookie} ──────────────────  in any order
//!   ── Request{DISC} ───────────────────────────────▶  Event::Disconnect: finish what is in flight, then close
//! ```
//!
//! * [`haggle`]: what comes before: the handshake, by which a client chooses an export.
//! * [`wire`]: structures and constants, any bytes.
//! * [`framing`]: the forms that requests and replies have: simple, structured, extended, and that of 1997.
//! * [`request`]: from a header to a [`Request`](request::Request) that fits its export, or to a refusal.
//! * [`transmission`]: the machine: whose bytes come next, and what to do with them.
//! * [`reply`]: what goes back.
//!
//! All integers are big-endian. Bulk data does not pass through here: the machine says where the next bytes belong,
//! and the transport reads them straight into the buffer.

#![forbid(unsafe_code)]

pub mod client;
pub mod framing;
pub mod haggle;
pub mod reply;
pub mod request;
pub mod transmission;
pub mod wire;
