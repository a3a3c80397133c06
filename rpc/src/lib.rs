//! JSON-RPC 2.0 as SPDK speaks it: a polled server, a method table, a configuration file and a small client.
//!
//! The wire is a Unix stream socket that carries JSON values one after another, without any framing; requests may
//! be pretty-printed, replies are compact ASCII and end with a newline (SPDK `lib/jsonrpc`, `lib/rpc`; JSON-RPC 2.0
//! specification). Everything runs on the control thread and never blocks:
//!
//! ```text
//!   socket ──bytes──▶ wire::Decoder ──Request──▶ MethodTable::call ──typed params──▶ handler
//!     ▲                                                                                 │ now or later,
//!   Server ◀──────────────── outbox (mpsc + eventfd) ◀── Responder::ok / err ◀──────────┘ from any thread
//! ```
//!
//! * [`MethodTable`]: what may be called, in which state, with which parameters. Parameters are ordinary
//!   `serde::Deserialize` structs; unknown keys are always refused.
//! * [`Server`]: the socket. One file descriptor (`as_fd`) to wait for, one method to poll.
//! * [`Responder`]: the promise of exactly one reply. It is `Send` and may outlive the request's connection.
//! * [`Config`] and [`Replay`]: the configuration file, which is a list of the same calls.
//! * [`wire`]: the byte machine without I/O, for tests and fuzzing.

mod client;
mod config;
mod conn;
mod errno;
mod error;
mod json;
mod listener;
mod params;
mod replay;
mod responder;
mod scan;
mod schema;
mod server;
mod suggest;
mod table;
pub mod wire;

pub use client::Client;
pub use config::{Call, Config, ConfigError, Position};
pub use errno::errno_name;
pub use error::{RpcError, code};
pub use json::{MAX_REPLY_BYTES, to_ascii};
pub use listener::ListenError;
pub use replay::{Failure, OnError, Progress, Replay};
pub use responder::{Outcome, Reply, Responder};
pub use schema::{Kind, Param};
pub use server::{MAX_CONNECTIONS, Server};
pub use table::{MethodInfo, MethodTable, NoParams, State, States};
