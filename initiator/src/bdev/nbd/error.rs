//! Why a call about devices did nothing.

use nbd_poll::client::DialError;

use crate::bdev::reply::Refusal;

const ENOENT: i32 = 2;
const EBUSY: i32 = 16;
const EEXIST: i32 = 17;
const ENODEV: i32 = 19;
const EINVAL: i32 = 22;
const ECONNRESET: i32 = 104;
const EALREADY: i32 = 114;

/// A refusal, with what would have been right.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// A parameter that cannot be.
    #[error("{parameter}: {text}")]
    Invalid {
        /// Name of the parameter.
        parameter: &'static str,
        /// What would be right.
        text: String,
    },
    /// The name is in use.
    #[error("a bdev or NBD device named {0} exists already")]
    NameExists(String),
    /// No such device.
    #[error("no NBD device {0}")]
    NoDevice(String),
    /// Somebody has it open.
    #[error("{name} is in use: {users} users have it open")]
    InUse {
        /// Of the bdev.
        name: String,
        /// Open descriptors.
        users: usize,
    },
    /// It is so already.
    #[error("{name} is {state} already")]
    Already {
        /// Of the bdev.
        name: String,
        /// What it is.
        state: &'static str,
    },
    /// The server could not be reached, or refused.
    #[error("{text}")]
    Connect {
        /// In words.
        text: String,
        /// As a positive errno.
        errno: i32,
    },
    /// There is no address of that name.
    #[error("cannot find {host}: {text}")]
    Resolve {
        /// As asked for.
        host: String,
        /// Why.
        text: String,
    },
    /// There is no encryption with these files.
    #[error("TLS: {0}")]
    Tls(String),
    /// The export is none that can be used.
    #[error("the export cannot be used: {0}")]
    Export(String),
    /// It was given up, or the program is ending.
    #[error("{name} has ended: {text}")]
    Ended {
        /// Of the bdev.
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

impl From<&DialError> for NbdError {
    fn from(e: &DialError) -> Self {
        Self::Connect { text: e.to_string(), errno: e.errno() }
    }
}

impl NbdError {
    /// As a positive Linux errno.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Invalid { .. } | Self::Tls(_) | Self::Export(_) => EINVAL,
            Self::NameExists(_) => EEXIST,
            Self::NoDevice(_) => ENODEV,
            Self::InUse { .. } => EBUSY,
            Self::Already { .. } => EALREADY,
            Self::Resolve { .. } => ENOENT,
            Self::Ended { .. } => ECONNRESET,
            Self::Connect { errno, .. } | Self::Bdev { errno, .. } => *errno,
        }
    }

    /// What the caller can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NameExists(_) => "bdev_get_bdevs and bdev_nbd_get_devices list the names in use",
            Self::NoDevice(_) => "bdev_nbd_get_devices lists the devices",
            Self::InUse { .. } => "stop what uses it, or say force",
            Self::Connect { errno: ENOENT, .. } => "nbdinfo --list URI shows what a server offers",
            Self::Tls(_) => {
                "tls_certificates is a directory with ca-cert.pem, and for servers that ask for one client-cert.pem and client-key.pem"
            }
            _ => return None,
        })
    }
}

impl Refusal for NbdError {
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
