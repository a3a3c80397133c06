//! The RNBD client.
//!
//! ```text
//! control thread: Initiator<C>                        each reactor: RnbdLane<C: Upper>
//!   create_session ─▶ RTRS session up ─▶ SESS_INFO ─▶ Event::Ready
//!   open    ─── Call ──────────────────────────────▶ con 0: OPEN ─▶ MsgOpenRsp
//!           ◀── Answer ───────────────────────────── Device
//!                                                    C: submit(io, key, &device, &IoRequest) … C::completed
//!   close   ─── Call ──────────────────────────────▶ con 0: CLOSE
//! ```
//!
//! Paths, failover and reconnecting are RTRS's work ([`rtrs_poll::client`]). Whenever a session has lost its last path
//! and comes up again, SESS_INFO is exchanged anew, [`Event::Ready`] carries a new generation, and every device has to
//! be opened again: the server has closed it, or may have.

mod admin;
mod control;
mod device;
mod error;
mod io;
mod lane;

pub use control::{Event, Initiator};
pub use device::Device;
pub use error::CallError;
pub use io::{IoRequest, Op, submit};
pub use lane::{MAX_COOKIE, RnbdLane};
