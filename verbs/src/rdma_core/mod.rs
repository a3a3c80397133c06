//! The system's RDMA devices, through libibverbs and librdmacm.
//!
//! Both libraries are loaded at run time (rdma-mummy-sys does it before `main`; functions of an absent library answer
//! EOPNOTSUPP), so one program runs on hosts with and without them. [`open`] says in words what is missing.
//!
//! ```text
//! open() ─▶ RdmaCm (cm.rs) ── rdma_event_channel, one Arc<Id> per rdma_cm_id
//!             └─ RdmaDevice (device.rs): one protection domain per ibv_context; Mr and Window guards (mr.rs)
//! RdmaCq (cq.rs): ibv_cq with its completion channel     RdmaQp (qp.rs): holds its Id and its queue
//! ```
//!
//! Every guard holds what it came from, and frees itself before it lets go of that. The libraries' own state behind
//! an `rdma_cm_id` is touched by two threads (the control thread's events and calls, a reactor's dropped queue
//! pair), so all rdma_cm calls of one channel go under its lock; the data path takes none.
//!
//! Memory windows: type 1 where the device has them, bound by `ibv_bind_mw`; otherwise type 2B.
//!
//! Not handled: unloading a device's kernel driver while registrations on it exist. librdmacm closes the
//! `ibv_context` of a dead device with the last `rdma_cm_id` on it, so drop registrations first.

mod addr;
mod cm;
mod cq;
mod device;
mod mr;
mod qp;

use std::ffi::CStr;
use std::io;

use crate::{Cm, Error};

const PROVIDER: &str = "rdma-core";

/// A connection manager on the system's RDMA devices. Needs `/dev/infiniband/rdma_cm`.
///
/// # Errors
/// No libraries, or no RDMA connection manager in the kernel; the hint says what to install or load.
pub fn open() -> Result<Box<dyn Cm>, Error> {
    for library in [c"libibverbs.so.1", c"librdmacm.so.1"] {
        probe(library)?;
    }
    Ok(Box::new(cm::RdmaCm::open()?))
}

/// Fails if the system has no such library. One that it has stays loaded, as it is in use already.
fn probe(library: &CStr) -> Result<(), Error> {
    // SAFETY: a valid C string; the libraries' initialisers have run already, before `main`, if they exist.
    let handle = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror answers null or a C string that stays valid until the thread's next dl* call.
    let message = unsafe {
        let text = libc::dlerror();
        if text.is_null() { "not found".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(Error {
        what: "no RDMA libraries (libibverbs.so.1, librdmacm.so.1)".into(),
        source: io::Error::new(io::ErrorKind::NotFound, message),
        hint: "install rdma-core (libibverbs1, librdmacm1, ibverbs-providers), or use the provider soft-roce"
            .into(),
    })
}

/// `errno` of the call that just failed, as our error.
fn last(what: impl Into<String>, hint: &str) -> Error {
    Error { what: what.into(), source: io::Error::last_os_error(), hint: hint.into() }
}

fn invalid(what: impl Into<String>, hint: &str) -> Error {
    Error { what: what.into(), source: io::Error::from_raw_os_error(libc::EINVAL), hint: hint.into() }
}

/// For libibverbs' functions that return an errno (some return -1 and set it).
fn os_error(ret: i32) -> io::Error {
    if ret > 0 { io::Error::from_raw_os_error(ret) } else { io::Error::last_os_error() }
}

/// Makes a descriptor of a library object non-blocking.
fn set_nonblocking(fd: i32, what: &str) -> Result<(), Error> {
    // SAFETY: fcntl with integer arguments on a descriptor that its library object keeps open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(last(format!("make the descriptor of the {what} non-blocking"), ""));
    }
    Ok(())
}
