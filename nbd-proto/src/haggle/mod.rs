//! Haggling: from a fresh connection to an agreement about an export.
//!
//! ```text
//!   server                                   client
//!   NBDMAGIC IHAVEOPT flags          ──▶
//!                                    ◀──     flags
//!                                    ◀──     LIST                       (any number of options, fixed newstyle only)
//!   SERVER name description, …  ACK  ──▶
//!                                    ◀──     STARTTLS
//!   ACK                              ──▶      then all of it inside TLS, from the options on
//!                                    ◀──     STRUCTURED_REPLY           or EXTENDED_HEADERS
//!   ACK                              ──▶
//!                                    ◀──     SET_META_CONTEXT name, queries
//!   META_CONTEXT id, name       ACK  ──▶
//!                                    ◀──     INFO name, types
//!   INFO export, …              ACK  ──▶
//!                                    ◀──     GO name, types             or EXPORT_NAME name
//!   INFO export, …              ACK  ──▶                                or size, flags, 124 zeroes
//!   ─────────────── transmission: see the rest of this crate ───────────────
//! ```
//!
//! [`ServerHaggle`] is the server's side: fixed newstyle, newstyle (EXPORT_NAME only) for clients that want it so, and
//! what there was before: oldstyle, where the server only says what it has, and 1997, where nobody says anything.
//! Source: NBD `doc/proto.md`, and its branch `extension-ext-header`.

mod catalog;
mod option;
mod reply;
mod server;
mod settings;
#[cfg(test)]
mod tests;
pub mod wire;

pub use catalog::{BlockSizes, Catalog, Export, Refusal};
pub use option::{InfoRequest, Malformed, MetaRequest, OptionRequest, Wanted};
pub use server::{MAX_INPUT, MAX_OPTION_DATA, MAX_OPTIONS, MAX_OUTPUT, MAX_SKIPPED_DATA, ServerHaggle};
pub use settings::{Chosen, Error, Outcome, Settings, Style, Tls};
