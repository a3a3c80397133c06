//! How much of a limit one peer may have, so that no peer uses up what all share.
//!
//! A server bounds what its peers can make it keep: sessions, connections, memory. A bound for all peers together lets
//! one of them shut out the others. So a [`Limit`] has two more bounds: a *share*, which is the most that one
//! [`Source`] may hold, and a *reserve*, which only sources may use that the server knows ([`Known`]).
#![forbid(unsafe_code)]

mod known;
mod limit;
mod source;

pub use known::Known;
pub use limit::{Limit, Over};
pub use source::Source;
