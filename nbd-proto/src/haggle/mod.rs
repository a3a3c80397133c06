//! Haggling: from a fresh connection to an agreement about an export.
//!
//! ```text
//!   server                                   client
//!   NBDMAGIC IHAVEOPT flags          ──▶
//!                                    ◀──     flags
//!                                    ◀──     LIST                       (any number of options, fixed newstyle only)
//!   SERVER name description, …  ACK  ──▶
//!                                    ◀──     INFO name, types
//!   INFO export, …              ACK  ──▶
//!                                    ◀──     GO name, types             or EXPORT_NAME name
//!   INFO export, …              ACK  ──▶                                or size, flags, 124 zeroes
//!   ─────────────── transmission: see the rest of this crate ───────────────
//! ```
//!
//! [`ServerHaggle`] is the server's side: fixed newstyle, and newstyle (EXPORT_NAME only) for clients that want it so.
//! Not implemented, and refused with ERR_UNSUP as the specification has it: STARTTLS, STRUCTURED_REPLY, metadata
//! contexts, EXTENDED_HEADERS. Source: NBD `doc/proto.md`.

mod catalog;
mod option;
mod reply;
mod server;
#[cfg(test)]
mod tests;
pub mod wire;

pub use catalog::{BlockSizes, Catalog, Export, Refusal};
pub use option::{InfoRequest, Malformed, OptionRequest, Wanted};
pub use server::{
    Chosen, Error, MAX_INPUT, MAX_OPTION_DATA, MAX_OPTIONS, MAX_OUTPUT, MAX_SKIPPED_DATA, Outcome,
    ServerHaggle, Settings,
};
