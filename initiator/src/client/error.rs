//! Why SESS_INFO, OPEN or CLOSE failed.

use rnbd_proto::Errno;
use rnbd_proto::device::DevGeometryError;

/// A call to the server failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// No such session, or it was lost meanwhile.
    #[error("the session is not connected")]
    NotConnected,
    /// The server's answer.
    #[error("the server answered {0}")]
    Server(Errno),
    /// A device name that no OPEN can carry.
    #[error("device path: use 1 to 254 bytes without NUL")]
    Name,
    /// What the server says of the device makes none; it has been closed again.
    #[error("the server describes an impossible device: {0}")]
    Geometry(#[from] DevGeometryError),
}

impl CallError {
    /// The errno that the kernel's client would give for it.
    pub const fn errno(&self) -> Errno {
        match self {
            Self::NotConnected => Errno::ENOTCONN,
            Self::Server(errno) => *errno,
            Self::Name | Self::Geometry(_) => Errno::EINVAL,
        }
    }
}
