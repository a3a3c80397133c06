//! Why a control operation is refused, in words for the operator.

use nbd_poll::listener::{Address, ListenError};
use rpc::RpcError;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum ServerError {
    #[error("an export named '{0}' exists already; delete it first or choose another name")]
    ExportExists(String),
    #[error("no export named '{0}'; nbd_server_get_exports lists those that exist")]
    NoExport(String),
    #[error("'{0}' is no export name: 1 to 4096 bytes without control characters are right")]
    Name(String),
    #[error("a description has at most 4096 bytes and no control characters")]
    Description,
    #[error("allow: {0}")]
    Allow(String),
    #[error("{param}: {text}")]
    Listener { param: &'static str, text: String },
    #[error(transparent)]
    Tls(#[from] nbd_poll::tls::files::TlsError),
    #[error(transparent)]
    Bdev(#[from] bdev::Error),
    #[error("nothing listens on {0}; nbd_server_get_listeners lists what does")]
    NoListener(Address),
    #[error("{0} is listened on already; remove that listener first")]
    ListenerExists(Address),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("cannot watch {0}: {1}")]
    Watch(Address, std::io::Error),
    #[error("no connection {0}; nbd_server_get_connections lists those that exist")]
    NoConnection(u64),
    #[error("the server is about to end")]
    Stopping,
}

impl ServerError {
    fn errno(&self) -> i32 {
        use rustix::io::Errno;
        match self {
            Self::ExportExists(_) | Self::ListenerExists(_) => Errno::EXIST.raw_os_error(),
            Self::NoExport(_) | Self::NoListener(_) | Self::NoConnection(_) => Errno::NOENT.raw_os_error(),
            Self::Name(_) | Self::Description | Self::Allow(_) | Self::Listener { .. } | Self::Tls(_) => {
                Errno::INVAL.raw_os_error()
            }
            Self::Bdev(e) => e.errno(),
            Self::Listen(e) => e.errno(),
            Self::Watch(_, e) => e.raw_os_error().unwrap_or(Errno::IO.raw_os_error()),
            Self::Stopping => Errno::SHUTDOWN.raw_os_error(),
        }
    }

    /// As the answer to `method`.
    pub(super) fn rpc(&self, method: &str) -> RpcError {
        let error = RpcError::errno(self.errno(), format!("{method}: {self}")).method(method);
        match self {
            Self::ExportExists(name) | Self::NoExport(name) => error.object("export", name),
            Self::Name(_) => error.param("name"),
            Self::Description => error.param("description"),
            Self::Allow(_) => error.param("allow"),
            Self::Listener { param, .. } => error.param(param),
            Self::Tls(_) => error.param("tls_certificates"),
            Self::Bdev(bdev::Error::NotFound { name }) => {
                error.object("bdev", name).hint("bdev_get_bdevs lists the bdevs")
            }
            Self::NoListener(address) | Self::ListenerExists(address) => {
                error.object("listener", address.to_string())
            }
            _ => error,
        }
    }
}
