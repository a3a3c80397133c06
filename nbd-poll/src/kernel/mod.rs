//! The kernel's NBD driver: /dev/nbdN made of connected sockets whose other ends a [`crate::Connection`] serves.
//!
//! Two interfaces do the same: generic netlink ([`netlink`]), and ioctls ([`ioctl`]) where the family is missing. Only
//! netlink can give a device new sockets, which is what lets it outlive the process that made it. What a device is
//! doing, and who uses it, is in [`sysfs`].
//!
//! Every call here may block (a disconnect waits for the driver's work queue, which waits for sockets): use a thread
//! that serves nobody.

pub mod ioctl;
mod message;
pub mod netlink;
pub mod sysfs;

use std::io;

use nbd_proto::wire::TransmissionFlags;

/// Largest logical block of a kernel NBD device: a page.
pub const MAX_BLOCK_SIZE: u32 = 4096;

/// What a device is made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Bytes, whole blocks.
    pub size: u64,
    /// Bytes, a power of two from 512 to [`MAX_BLOCK_SIZE`].
    pub block_size: u32,
    /// What the driver may send. Several sockets need `CAN_MULTI_CONN`.
    pub flags: TransmissionFlags,
    /// A request that is not answered for so long has its connection closed and goes to another one; 0: after 30 s it
    /// goes to another connection if there are several, else it waits.
    pub timeout_sec: u64,
    /// How long requests wait for a new socket when none is alive; then they fail. 0: not at all.
    pub dead_conn_timeout_sec: u64,
    /// Stays with the device and must be named to give it new sockets (Linux 5.14; netlink only).
    pub backend: Option<String>,
}

/// The driver refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The module is not loaded, or was built without this interface.
    #[error("the kernel has no NBD driver: load it with \"modprobe nbd\"")]
    NoDriver,
    /// Not root.
    #[error("{what}: not permitted; CAP_SYS_ADMIN is needed")]
    Permission {
        /// What was tried, on what.
        what: String,
    },
    /// Any other error number.
    #[error("{what}: {source}")]
    System {
        /// What was tried, on what.
        what: String,
        /// The errno.
        source: io::Error,
    },
}

impl Error {
    /// `what` met `source`.
    pub fn new(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Permission { what },
            _ => Self::System { what, source },
        }
    }

    /// As a positive Linux errno.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoDriver => libc::ENODEV,
            Self::Permission { .. } => libc::EPERM,
            Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}
