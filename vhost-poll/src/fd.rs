//! Event descriptors that a front end sends: kick, call, error. It holds them as well, with their flags and counters, so
//! nothing here relies on what either is at any time.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, ReadWriteFlags};

use crate::bell::Bell;

/// Where a driver tells that it has work.
#[derive(Debug)]
pub(crate) struct Kick(OwnedFd);

/// Not an eventfd, or not to be used.
#[derive(Debug, thiserror::Error)]
pub enum EventFdError {
    /// Reading or writing anything else might block, or reach a file.
    #[error("a kick, call or error descriptor is {0}; an eventfd is right")]
    Kind(String),
    /// A system call on it.
    #[error("kick, call or error descriptor: {0}")]
    System(#[from] Errno),
    /// No way to signal it.
    #[error(
        "a call or error descriptor cannot be signalled without waiting, neither by io_uring nor by AIO: {0}"
    )]
    Bell(std::io::Error),
}

/// Refuses what is no eventfd. It stays open: to close anything else might wait.
pub(crate) fn check(fd: &OwnedFd) -> Result<(), EventFdError> {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
    match link.to_bytes() {
        b"anon_inode:[eventfd]" => Ok(()),
        _ => Err(EventFdError::Kind(link.to_string_lossy().into_owned())),
    }
}

/// A bell for a call or error descriptor of a front end, which is an eventfd.
pub(crate) fn bell(fd: OwnedFd) -> Result<Bell, EventFdError> {
    Bell::new(fd).map_err(EventFdError::Bell)
}

impl Kick {
    /// Takes a descriptor from a front end, which is an eventfd.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sets it to zero. Never waits, whatever O_NONBLOCK is at the moment (Linux 5.8 and later; before, it leaves the
    /// counter, and the reactor is woken for nothing).
    pub(crate) fn drain(&self) {
        let mut count = [0u8; 8];
        // At the present position, which an eventfd has none of: preadv2(2).
        let here = u64::MAX;
        let _ =
            rustix::io::preadv2(&self.0, &mut [IoSliceMut::new(&mut count)], here, ReadWriteFlags::NOWAIT);
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

    #[test]
    fn a_kick_is_drained_and_an_empty_one_that_blocks_holds_nobody_up() {
        let fd = eventfd(3, EventfdFlags::CLOEXEC).unwrap();
        let ours = Kick::new(fd.try_clone().unwrap());
        let thread = std::thread::spawn(move || {
            ours.drain();
            ours.drain();
        });
        test_support::until("two looks", || thread.is_finished());
        let mut set = [PollFd::new(&fd, PollFlags::IN)];
        assert_eq!(poll(&mut set, Some(&Timespec::default())), Ok(0));
    }

    #[test]
    fn only_eventfds_are_taken() {
        let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(check(&memory), Err(EventFdError::Kind(_))));
        assert!(check(&eventfd(0, EventfdFlags::CLOEXEC).unwrap()).is_ok());
        assert!(bell(eventfd(0, EventfdFlags::CLOEXEC).unwrap()).is_ok());
    }
}
