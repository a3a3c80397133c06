//! Why a call about mapped devices did nothing.

use rnbd_proto::Errno;
use rtrs_poll::client::{ControlError, PathError};

use super::reply::Refusal;
use crate::client::CallError;

/// No such file or directory.
pub(super) const ENOENT: i32 = 2;
/// Device or resource busy.
pub(super) const EBUSY: i32 = 16;
/// No such device.
pub(super) const ENODEV: i32 = 19;
/// Operation already in progress; the kernel's word for "it is so already".
pub(super) const EALREADY: i32 = 114;

/// A refusal, with what would have been right.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// A parameter that cannot be.
    #[error("{parameter}: {text}")]
    Invalid {
        /// Name of the parameter.
        parameter: &'static str,
        /// What would be right.
        text: String,
    },
    /// The name is in use.
    #[error("a bdev or mapping named {0} exists already")]
    NameExists(String),
    /// The device is mapped already.
    #[error("device_path {device_path} is mapped in session {session} already, as {name}")]
    Mapped {
        /// At the server.
        device_path: String,
        /// By name.
        session: String,
        /// Of the bdev.
        name: String,
    },
    /// No session, and no paths to make one.
    #[error("no session {0}")]
    NoSession(String),
    /// No such mapping.
    #[error("no mapped device {0}")]
    NoDevice(String),
    /// No such path.
    #[error("session {session} has no path {path}")]
    NoPath {
        /// By name.
        session: String,
        /// As asked for.
        path: String,
    },
    /// Somebody has it open.
    #[error("{name} is in use: {users} users have it open")]
    InUse {
        /// Of the bdev.
        name: String,
        /// Open descriptors.
        users: usize,
    },
    /// Not in this state.
    #[error("{name} is {state}")]
    State {
        /// Of the bdev.
        name: String,
        /// `init`, `open`, `closed` or `unmapped`.
        state: &'static str,
        /// As the kernel's client has it.
        errno: i32,
    },
    /// RTRS does not do it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The server could not be reached.
    #[error("session {session} cannot be connected: {text}")]
    Connect {
        /// By name.
        session: String,
        /// What each path met.
        text: String,
        /// Of the last failure.
        errno: Errno,
    },
    /// The device could not be opened.
    #[error("device_path {device_path}: {error}")]
    Open {
        /// At the server.
        device_path: String,
        /// Why.
        error: CallError,
    },
    /// The device is none that can be used.
    #[error("device_path {device_path}: {text}")]
    Device {
        /// At the server.
        device_path: String,
        /// What is wrong with it.
        text: String,
    },
    /// The session was given up, or the program is ending.
    #[error("session {session} has ended: {text}")]
    Ended {
        /// By name.
        session: String,
        /// Why.
        text: String,
    },
    /// A provider cannot be used.
    #[error("provider {name}: {text}")]
    Provider {
        /// As asked for.
        name: String,
        /// Why.
        text: String,
    },
    /// The bdev layer does not take it.
    #[error("{text}")]
    Bdev {
        /// In its words.
        text: String,
        /// In its number.
        errno: i32,
    },
}

impl MapError {
    /// As a positive Linux errno; those of the kernel's client where it has the case.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::Invalid { .. } | Self::Device { .. } => Errno::EINVAL,
            Self::NameExists(_) | Self::Mapped { .. } => Errno::EEXIST,
            Self::NoSession(_) => Errno::ENXIO,
            Self::NoDevice(_) | Self::NoPath { .. } | Self::Provider { .. } => Errno::ENODEV,
            Self::InUse { .. } => Errno::EBUSY,
            Self::Connect { errno, .. } => *errno,
            Self::Control(e) => e.errno(),
            Self::Open { error, .. } => error.errno(),
            Self::Ended { .. } => Errno::ECONNRESET,
            Self::State { errno, .. } | Self::Bdev { errno, .. } => return *errno,
        };
        errno.get().into()
    }

    /// What the caller can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NameExists(_) => "bdev_get_bdevs and bdev_rnbd_get_devices list the names in use",
            Self::Mapped { .. } => "use that bdev, or unmap it first; a device is mapped once in a session",
            Self::NoSession(_) => {
                "give paths to make the session; bdev_rnbd_get_sessions lists those there are"
            }
            Self::NoDevice(_) => "bdev_rnbd_get_devices lists the mapped devices",
            Self::NoPath { .. } => "bdev_rnbd_get_sessions lists the paths; a path is named src@dst or dst",
            Self::InUse { .. } => "stop what uses it, or say force",
            Self::State { errno: EBUSY, .. } => {
                "it is being worked on; bdev_rnbd_get_devices tells how it fares"
            }
            Self::Connect { errno: Errno::ETIMEDOUT, .. } => {
                "check address, port and firewall (UDP 4791 for soft-roce), and that the server runs"
            }
            Self::Connect { .. } => {
                "check address and port, that the server runs, and that sessname is not in use there"
            }
            Self::Open { error: CallError::Server(errno), .. } => return open_hint(*errno),
            Self::Device { .. } => "unmap and map it again to use it as it is now",
            _ => return None,
        })
    }
}

impl Refusal for MapError {
    fn errno(&self) -> i32 {
        self.errno()
    }

    fn hint(&self) -> Option<&'static str> {
        self.hint()
    }

    fn parameter(&self) -> Option<&'static str> {
        if let Self::Invalid { parameter, .. } = self { Some(parameter) } else { None }
    }
}

/// What a server means by refusing to open a device (`rnbd-srv.c`, process_msg_open).
fn open_hint(errno: Errno) -> Option<&'static str> {
    Some(match errno {
        Errno::ENOENT => {
            "the server has no device of that name, or has not exported it; it puts its dev_search_path before device_path"
        }
        Errno::EPERM => {
            "another client has it open for writing; access_mode ro is always possible, migration beside one writer"
        }
        Errno::EACCES => "the server does not offer it to this client",
        Errno::EROFS => "the device is read-only there; use access_mode ro",
        Errno::ENOTBLK => "it is no block device there",
        _ => return None,
    })
}

/// An errno with the words of a path's failure.
pub(super) fn connect(session: &str, text: String, last: Option<&PathError>) -> MapError {
    let errno = last.map_or(Errno::ETIMEDOUT, PathError::errno);
    MapError::Connect { session: session.to_owned(), text, errno }
}
