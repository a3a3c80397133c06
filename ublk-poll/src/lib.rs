//! ublk devices, driven by polling: /dev/ublkbN whose requests are answered by this program (Linux 6.4 or later,
//! module ublk_drv; Documentation/block/ublk.rst). Older drivers (6.0 to 6.3) take other command numbers only.
//!
//! ```text
//!  control thread: Control                          a reactor: Queue, one or more per device
//!  ADD_DEV ─────────▶ /dev/ublkcN
//!  SET_PARAMS        (geometry, limits)
//!  open /dev/ublkcN ─▶ CharDevice ───────────────▶ FETCH_REQ for every tag
//!  START_DEV ───────▶ /dev/ublkbN                   ◀─ a request: its descriptor lies in mapped memory
//!                                                      write: data copied in ─▶ poll() hands it out
//!                                                      … complete() ─▶ read: data copied out
//!                                                      COMMIT_AND_FETCH_REQ: answer, and the tag's next request
//!  STOP_DEV          (in-flight requests end first) ◀─ every tag ends with ENODEV: Queue::is_over
//!  DEL_DEV           when the queues are dropped
//!
//!  after a crash: the device is quiesced, its requests wait in the kernel
//!  START_USER_RECOVERY ─▶ open, FETCH_REQ as above ─▶ END_USER_RECOVERY
//! ```
//!
//! Both sides are a ring that is polled without blocking. Control commands may take long (START_DEV reads the
//! partition table through the very queues), so they run on kernel workers and end as completions too.
//!
//! Of the libublk project this crate uses the kernel interface (`libublk-rs-sys`). Its `UblkCtrl` and `UblkQueue` do
//! not fit here: their calls wait for the kernel, queues run on threads or an executor of theirs with buffers of
//! theirs, and state is kept in files; a reactor must not wait, and data lives in registered [`iobuf`] memory.

#[cfg(not(target_os = "linux"))]
compile_error!("ublk is an interface of Linux");

mod abi;
mod chardev;
mod control;
mod features;
mod params;
mod queue;
mod request;
mod ring;
mod tag;

pub use abi::{DevInfo, DevState, MAX_QUEUE_DEPTH, MAX_QUEUES, Params};
pub use chardev::CharDevice;
pub use control::{CONTROL_PATH, Command, Control, Done, Reply};
pub use features::{DeviceFlags, Features};
pub use params::{Geometry, GeometryError};
pub use queue::{Queue, QueueOptions, QueueStats};
pub use request::{Op, Request};
pub use ring::explain;
