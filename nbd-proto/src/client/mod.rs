//! The client's side.
//!
//! ```text
//!   Uri ─▶ where the server is, and what is wanted of it
//!   Haggle   greeting ─▶ [STARTTLS] ─▶ [EXTENDED_HEADERS | STRUCTURED_REPLY] ─▶ [SET_META_CONTEXT] ─▶ GO | EXPORT_NAME
//!                oldstyle greeting ─────────────────────────────────────────────────────────────────▶ Agreed
//!   Replies  enter(Ask) ─▶ head to be sent … want(): a head, or "the next bytes are READ data of that request" ─▶ Event
//! ```
//!
//! Nothing that a server sends is believed: [`Haggle`] and [`Replies`] end a connection with a reason as soon as they
//! cannot tell any more what the next byte means, and what they keep for a server has a stated limit.

mod agreed;
mod cover;
mod haggle;
mod replies;
mod uri;

pub use crate::framing::Framing;
pub use agreed::{Agreed, Tls, Wishes};
pub use haggle::{Haggle, HaggleError, MAX_REPLIES, MAX_REPLY_DATA, Next};
pub use replies::{
    Ask, Command, Event, Head, MAX_ERRORS, MAX_HEAD, MAX_IN_FLIGHT, Replies, RequestId, Unsendable,
    Violation, Want,
};
pub use uri::{Server, Uri, UriError};
