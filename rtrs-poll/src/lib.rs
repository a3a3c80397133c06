//! RTRS over polled verbs: the server half here, the client half in [`client`].
//!
//! ```text
//! control thread: Server                     each reactor: Lane<U: Upper>
//!   CM events, admission, paths' memory        completion queues, connections, requests, heartbeats
//!         │  add_con / path_up / close_con ──────▶ │
//!         │ ◀── path_broken / info_req / closed    │ ──▶ U::request ──▶ … ──▶ Io::reply
//! ```
//!
//! Read [`Session`] for how paths of one client are kept from racing, then [`Lane`] for the data path.

pub mod client;
mod cqs;
mod lane;
mod options;
mod path;
mod provider;
mod server;
mod session;
mod upper;

pub use lane::{Io, Lane};
pub use options::Options;
pub use path::{MemoryError, Path, PathStats};
pub use provider::{Choice, Provider, owns_no_device};
pub use server::{ListenError, Listening, PathInfo, Server, SessionEvents, SessionInfo, Verdict};
pub use session::Session;
pub use upper::{Incoming, MAX_USR_LEN, ReqId, Upper};
