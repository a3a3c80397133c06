//! RTRS over polled verbs: the client half. A session has several paths; requests survive the loss of all but the last.
//!
//! ```text
//! control thread: Client                            each reactor: Lane<U: Upper>
//!   resolve, create_qp, connect con 0..n of a path
//!         │  open_link(queue pairs, memory) ───────────▶ │  receives, INFO_REQ
//!         │ ◀──────────────────────────── info_rsp       │
//!         │  add_session, link_up(chunks), session_up ─▶ │ ──▶ U::session_up … Io::submit … U::completed
//!   Event::PathUp, SessionUp                             │
//!         │ ◀──────────────────────────── link_broken    │
//!   disconnect every con of the path                     │
//!         │  close_link ───────────────────────────────▶ │  queue pairs destroyed, requests go by another path
//!         │  session_down, if it was the last ─────────▶ │ ──▶ U::completed(ECONNABORTED), U::session_down
//!         │ ◀─────────────────── link_closed, drained    │
//!   Event::PathDown, SessionDown; after a while again
//! ```
//!
//! Where to read: `entry` for the states, `connect` and `close` for what moves them, `manage` for what may be asked for;
//! `lane::io` for the way of a request, `lane::answers` for that of its answer, `lane::links` and `lane::sessions` for
//! what becomes of it when its path is lost.
//!
//! # Who owns what
//! Buffer ids are the session's. Each reactor has a share of them, and a *link* to each path: some of its connections,
//! the server's buffers as that path reaches them, the keys of data memory on that path's device. A request takes an id
//! of its reactor and goes by any of its links; if the path is lost it goes by another one with the same id, which is
//! how a server can tell that it is the same. Requests and answers never leave their reactor, so the data path shares
//! nothing but two words per path: a sign of life, and the latency.
//!
//! # Exactly once
//! A request is in one slot, and ends when it is taken out of it: by an answer on the connection it went by last, or by
//! the end of the session. The queue pairs of a lost path are destroyed before its requests go anywhere, so no answer
//! of it can come any more, and no server can write into memory that the upper layer has back. (What the *server*
//! executes may be twice: it may have done its work when the path broke. Its side of that is in [`crate::Session`].)
//!
//! # When the server's session is another one
//! Nobody tells. It surely is the same as long as one path after the other joined while others were up; it may be a new
//! one when there was no path. So a session that has lost its last path goes down, with all its requests, before
//! another path comes up, and the layer above says again what it has said in it. As long as a path is up, others ask to
//! *join* (`first_conn` 0), which a server that has forgotten the session refuses.
//!
//! # Memory and keys
//! Data lies in the regions of an [`iobuf::Registry`], all of which are registered with every device that a path is on,
//! and it is never copied: a write's data goes out of it, a read's data comes by RDMA WRITE straight into it.
//!
//! The kernel's client makes a fast-registration key for each read and asks the server to invalidate it
//! (`NEED_INVAL`). User space has no fast registration, so a read here names the whole region's rkey and asks for no
//! invalidation, which an ordinary region would answer by breaking the queue pair. The price: while a path is
//! connected, its server could write to any byte of the regions, not only to those of present reads. So keep data
//! buffers in the registry only, nothing the program itself relies on.

mod close;
mod connect;
mod control;
mod entry;
mod error;
mod event;
mod info;
mod keys;
mod lane;
mod manage;
mod options;
mod path;
mod session;
mod silence;
mod upper;

pub use control::Client;
pub use error::{ControlError, PathError, Refused, SessionEnd};
pub use event::Event;
pub use info::{PathInfo, PathState, SessionInfo};
pub use lane::{Io, Lane, LaneRef, SessionKey};
pub use options::{PathSpec, Policy, Reconnect, SessionOptions};
pub use path::{PathId, PathStats};
pub use session::{Limits, Session, SessionId};
pub use upper::{Data, Submit, Upper, Via};
