//! The error of a bdev as NBD says it, for sockets and for the kernel's driver alike.

use bdev::Status;
use nbd_proto::wire::ErrorCode;

/// What a client is told of a request that ended with `status`, which is not `Ok`. The specification ("Error values")
/// allows no others; ESHUTDOWN is for a server on its way down, as which clients see both a device that is gone and
/// requests that are aborted.
pub(crate) fn error_code(status: Status) -> ErrorCode {
    match status {
        Status::NoSpace => ErrorCode::Enospc,
        Status::Unsupported => ErrorCode::Enotsup,
        Status::Invalid | Status::OutOfRange => ErrorCode::Einval,
        Status::ReadOnly => ErrorCode::Eperm,
        Status::Busy => ErrorCode::Enomem,
        Status::Aborted | Status::Gone => ErrorCode::Eshutdown,
        Status::IoError | Status::MediumError | Status::TimedOut => ErrorCode::Eio,
        Status::Ok => unreachable!("callers look for success first"),
    }
}
