//! RDMA without RDMA hardware: a [`verbs`] provider over ordinary UDP sockets, wire-compatible with RoCEv2 adapters and
//! Linux rxe. It needs no privilege and no kernel module; UDP port 4791 of the addresses it is to use must be free.
//!
//! ```text
//! SoftRoce ─ cm ─▶ Cm ─┐
//!                 Cm ─┴▶ control::Control (lock) ─ roce_proto::cm::Agent ── socket 0 of each port: queue pair 1
//!                             │ mailbox  ▲ notices
//!                             ▼          │
//! port::Port = Device    engine::Engine = Cq ── socket n of the port, steered by queue pair number
//!   keys, sockets             └ queue pairs: roce_proto::rc::Qp; Qp is the user's handle
//! ```
//!
//! Who polls a completion queue runs its engine: sockets, queue pairs and timers of that queue. Nothing else does,
//! unless [`Options::progress_thread`] asks for it.

mod clock;
mod cm;
mod control;
mod cq;
mod engine;
mod exclusive;
mod faults;
#[cfg(fuzzing)]
pub mod fuzzing;
mod mailbox;
mod memory;
mod neighbours;
mod places;
mod port;
mod progress;
mod qp;
mod route;
mod shared;
mod udp;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use verbs::{Cm, Error};

use control::Control;
pub use faults::Faults;
pub use shared::Options;
use shared::Shared;

const PROVIDER: &str = "soft-roce";

/// Software RoCE of this process: its local addresses, with the queue pair numbers on them. Connection managers of one
/// `SoftRoce` share sockets and devices. Clones are the same.
#[derive(Clone)]
pub struct SoftRoce(Arc<Host>);

/// What all connection managers share.
struct Host {
    control: Mutex<Control>,
    /// Of [`Control::fd`], to be had without the lock.
    control_fd: OwnedFd,
}

impl Host {
    /// A thread that panicked under the lock has left an ordinary state behind: each change is one insert or removal.
    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn control_fd(&self) -> &OwnedFd {
        &self.control_fd
    }
}

impl SoftRoce {
    /// Opens nothing yet: addresses are opened when they are listened on or resolved to.
    ///
    /// # Errors
    /// Out of file descriptors or threads, or no directory in which the programs of this user can find each other (`places.rs`).
    pub fn new(options: Options) -> Result<Self, Error> {
        let host = Self::try_new(options).map_err(|source| {
            let hint = match source.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
                Some(libc::ENOSPC) => "at most 128 programs of one user at a time",
                _ => "",
            };
            Error { what: "start software RoCE".into(), source, hint: hint.into() }
        })?;
        Ok(Self(host))
    }

    fn try_new(options: Options) -> std::io::Result<Arc<Host>> {
        let progress = options.progress_thread;
        let control = Control::new(Arc::new(Shared::new(options)?))?;
        let control_fd = control.fd().try_clone_to_owned()?;
        let host = Arc::new(Host { control: Mutex::new(control), control_fd });
        if progress {
            progress::start(&host)?;
        }
        Ok(host)
    }

    /// A connection manager.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn cm(&self) -> Result<Box<dyn Cm>, Error> {
        Ok(Box::new(cm::SoftCm::new(self.0.clone())?))
    }
}

/// A connection manager with default options. All that are open at a time in this process share sockets and devices.
///
/// # Errors
/// As for [`SoftRoce::new`] and [`SoftRoce::cm`].
pub fn open() -> Result<Box<dyn Cm>, Error> {
    // The UDP port is one per host whatever a program is made of, so its parts had better share.
    static HOST: Mutex<Weak<Host>> = Mutex::new(Weak::new());
    let mut shared = HOST.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(host) = shared.upgrade() {
        return SoftRoce(host).cm();
    }
    let new = SoftRoce::new(Options::default())?;
    *shared = Arc::downgrade(&new.0);
    new.cm()
}
