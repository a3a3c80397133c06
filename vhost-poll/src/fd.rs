//! Event descriptors that a front end sends: kick, call, error.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;

/// An eventfd that never blocks this process.
#[derive(Debug)]
pub(crate) struct EventFd(OwnedFd);

/// Not an eventfd.
#[derive(Debug, thiserror::Error)]
pub enum EventFdError {
    /// Reading or writing anything else might block, or reach a file.
    #[error("a kick, call or error descriptor is {0}; an eventfd is right")]
    Kind(String),
    /// A system call on it.
    #[error("kick, call or error descriptor: {0}")]
    System(#[from] Errno),
}

impl EventFd {
    /// Takes a descriptor from a front end, if it is an eventfd, and makes it non-blocking.
    pub(crate) fn check(fd: OwnedFd) -> Result<Self, EventFdError> {
        let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
        if link.to_bytes() != b"anon_inode:[eventfd]" {
            return Err(EventFdError::Kind(link.to_string_lossy().into_owned()));
        }
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(rustix::fs::OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        }
        Ok(Self(fd))
    }

    /// Adds one. A full counter wakes its reader as well, so that it fails does not matter.
    pub(crate) fn signal(&self) {
        let _ = rustix::io::write(self.0.as_fd(), &1u64.to_ne_bytes());
    }

    /// Sets it to zero.
    pub(crate) fn drain(&self) {
        let _ = rustix::io::read(self.0.as_fd(), &mut [0u8; 8]);
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn only_eventfds_and_they_never_block() {
        let fd = EventFd::check(eventfd(0, EventfdFlags::CLOEXEC).unwrap()).unwrap();
        fd.drain();
        fd.signal();
        fd.drain();
        let read = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(EventFd::check(read), Err(EventFdError::Kind(_))));
    }
}
