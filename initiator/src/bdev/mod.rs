//! bdev_rnbd: devices of RNBD servers as bdevs.
//!
//! ```text
//!  control thread                         a reactor that serves the session
//!  maps::Maps ── open, close, fail ─────▶ disks::Disks ◀── channel::LocalChannel ◀── who uses the bdev here
//!    sessions, OPEN, resize                   ▲  │                ▲
//!                                             │  ▼ once per turn  └─ proxy::ProxyChannel ◀── other threads
//!                                         lane::DiskLane ─▶ RTRS
//! ```
//!
//! # What happens to requests when a session is lost
//! Everything that is not in flight waits in `disks::Disks`; what was in flight and is unanswered joins it, and is
//! sent once more when the device is open again. That is right because of these facts:
//!
//! 1. *Nothing completes twice.* A request completes when it has nothing left to cut and no part (`finish_if_over`),
//!    and leaves the table with that. A part leaves the table with its answer. RTRS ends each submission exactly once,
//!    so no answer finds another's part.
//! 2. *Nothing of the first attempt comes from us any more.* RTRS ends requests with ECONNABORTED only after the queue
//!    pairs of all paths that carried them are destroyed: no data of an old read lands in memory that the user has
//!    back, and no retransmission repeats an old write.
//! 3. *Nothing of the first attempt is left at the server when the second one starts.* The stale execution of a write
//!    is harmful once the repeated one has completed: the user may then write the same blocks again, and the stale one
//!    would overtake that. A path reconnects under the same path uuid, and a server admits it only when the old
//!    connections and their I/O are gone (Linux `rtrs-srv.c`, `__alloc_path` and `rtrs_srv_close_work`; ours does the
//!    same). So on a session of one path, being open again proves it. A session of several paths is open again with
//!    the first of them, while the server may still work for another: requests that change data and were in flight
//!    wait until every path that was connected at the loss is connected again, or for as long as a server may
//!    still execute them (`stale_io_timeout_sec`). Everything else, new writes included, goes at once.
//! 4. *A newer write does not wait for an older one, and need not*: they overlap only if the user has submitted the
//!    newer before the older completed, and then either order is right (as with any disk queue).
//! 5. *Flush* promises something for what has completed; a write that is yet to be repeated has not.
//!
//! # When one path of several is lost
//! RTRS repeats its requests by another path at once, as the kernel's client does, and as in 3 the server may still
//! execute the first attempt: the kernel's does, even after the repeated one has completed (ours rarely; see
//! docs/architecture.md). Waiting for the lost path would stop everything for as long as it is away. So requests are
//! repeated at once, but their ranges are *fenced* (`fence`): newer requests that change the same bytes wait until the
//! path is connected again, which proves that the server is done, or for `stale_io_timeout_sec` after the repetition was
//! answered. It is asked before a request is first sent, so changes of the same bytes that are all under way when the
//! path is lost are not kept apart; their order is open anyway. A path that is disconnected on request is emptied first,
//! so nothing has to be fenced.
//!
//! What a lost session leaves is fenced in the same way, and stays so if it is given up (`fast_io_fail_timeout_sec`,
//! `ctrlr_loss_timeout_sec`).
//!
//! What remains outside: a write that was given up has failed, but may be executed all the same. A server that loses its
//! volatile cache comes back without the writes that were not flushed, and RNBD has no means to tell: mind where its
//! cache is.

mod channel;
mod data;
mod disk;
mod disks;
mod error;
mod fence;
mod gate;
mod geometry;
mod lane;
mod maps;
mod methods;
pub mod nbd;
mod params;
mod proxy;
mod reply;
mod request;
mod send;
mod slots;
mod subsystem;

pub use disk::{PRODUCT_NAME, RnbdDisk};
pub use error::MapError;
pub use maps::{DeviceInfo, Done, Maps, SessionChanges, SessionReport, State};
pub use params::{DEFAULT_PORT, MapParams, PathParam, SessionParams};
pub use subsystem::BdevRnbd;
