//! A synchronous RTRS and RNBD client for tests: every byte it sends can be replaced, so that it can lie.
//!
//! ```text
//! Client::connect = Client::new, dial (cid 0, 1, …), send_info, wait_info      link.rs, client.rs
//!   rnbd.rs    open, read, write, … well formed, on top of Client::call
//!   frame.rs   one request, each field of which can be overridden before Client::send
//!   cases/     the hostile table: a name, what is done, what must come back
//!   runner.rs  runs it, and after each case proves with a bystander session that the server is alive and sane
//! ```
//!
//! It polls and waits with timeouts, on one thread; nothing here is meant to be fast. It works over every provider
//! of [`verbs`].

pub mod cases;
pub mod client;
pub mod frame;
mod link;
mod memory;
pub mod opts;
pub mod outcome;
pub mod place;
pub mod rnbd;
pub mod runner;

pub use client::Client;
pub use frame::Frame;
pub use opts::Opts;
pub use outcome::{ConnectError, Outcome};
pub use place::Place;
