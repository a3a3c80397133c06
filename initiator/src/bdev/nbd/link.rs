//! How requests find the connections of their device.

use std::cell::RefCell;
use std::rc::Weak;

use bdev::Status;
use nbd_proto::wire::ErrorCode;
use rnbd_proto::Errno;

use crate::bdev::channel::{Here, LaneKey, Link};

/// A device by its number; on each reactor it has its own connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NbdLink(pub u64);

impl Link for NbdLink {
    const ANY_MEMORY: bool = true;
    const KEEPS_SPACE: bool = true;

    fn key() -> &'static LaneKey<Self> {
        thread_local! {
            static HERE: RefCell<Weak<Here<NbdLink>>> = const { RefCell::new(Weak::new()) };
        }
        &HERE
    }
}

/// A server's error in the words of [`super::super::request::status`]. `None`: ESHUTDOWN, which is no answer.
///
/// "Clients MUST treat a value they do not know as EINVAL"; what NBD calls EPERM is a write to what must not be
/// written.
pub(super) fn errno(error: u32) -> Option<Errno> {
    let code = ErrorCode::ALL.into_iter().find(|c| *c as u32 == error);
    Some(match code {
        Some(ErrorCode::Eshutdown) => return None,
        Some(ErrorCode::Eperm) => Errno::EROFS,
        Some(ErrorCode::Eio) => Errno::EIO,
        Some(ErrorCode::Enomem) => Errno::ENOMEM,
        Some(ErrorCode::Enospc) => Errno::ENOSPC,
        Some(ErrorCode::Enotsup) => Errno::EOPNOTSUPP,
        Some(ErrorCode::Einval | ErrorCode::Eoverflow) | None => Errno::EINVAL,
    })
}

/// What becomes of requests of a device that nobody can reach any more.
pub(super) const GONE: Status = Status::Gone;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bdev::request::status;

    #[test]
    fn every_error_has_a_status() {
        let wanted = [
            (1, Status::ReadOnly),
            (5, Status::IoError),
            (12, Status::Busy),
            (22, Status::Invalid),
            (28, Status::NoSpace),
            (75, Status::Invalid),
            (95, Status::Unsupported),
            (9999, Status::Invalid),
        ];
        for (number, want) in wanted {
            assert_eq!(errno(number).map(status), Some(want), "{number}");
        }
        assert_eq!(errno(108), None);
    }
}
