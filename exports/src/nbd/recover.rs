//! New sockets for a device whose old ones are dead. Blocks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nbd_poll::kernel::netlink::{Change, Monitor, Netlink};
use nbd_poll::kernel::{self, sysfs};
use nbd_poll::socket_pair;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

/// How long the driver may take to find out that a socket is dead.
const DEAD_TIME: Duration = Duration::from_secs(10);
/// How often it is asked without an event of its own.
const RETRY: Duration = Duration::from_millis(50);

/// Which device.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub index: u32,
    /// As it was made with.
    pub backend: Option<String>,
    /// Bytes that the device shall have.
    pub size: u64,
    pub timeout_sec: u64,
    pub dead_conn_timeout_sec: u64,
}

/// Why a device got no sockets.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotRecovered {
    /// It has been disconnected.
    #[error("/dev/nbd{0} has been disconnected")]
    Gone(u32),
    /// Others serve it.
    #[error("the sockets of /dev/nbd{0} are alive: somebody serves it")]
    Alive(u32),
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
}

/// Gives the device `count` sockets in place of dead ones and returns our ends. Fewer, if it had fewer dead ones after
/// a while; none is an error.
///
/// The driver ignores a socket for which it has no dead one and reports success. But then nobody has the other end once
/// we close our copy of it, and our end says so at once.
pub(super) fn recover(target: &Target, count: usize) -> Result<Vec<OwnedFd>, NotRecovered> {
    let index = target.index;
    let mut netlink = Netlink::open()?;
    let monitor = netlink.monitor().ok();
    let until = Instant::now() + DEAD_TIME;
    let mut taken = Vec::with_capacity(count);
    while taken.len() < count {
        if !sysfs::state(index).is_some_and(|s| s.is_made()) {
            return Err(NotRecovered::Gone(index));
        }
        let what = || format!("a socket for /dev/nbd{index}");
        let (ours, kernels) = socket_pair().map_err(|e| kernel::Error::new(what(), e))?;
        let sockets = [kernels.as_fd()];
        // Another size is told once the device is served: the kernel lets all requests end before it takes one, and these
        // wait for the socket.
        let change = Change {
            timeout_sec: Some(target.timeout_sec),
            dead_conn_timeout_sec: Some(target.dead_conn_timeout_sec),
            backend: target.backend.as_deref(),
            sockets: &sockets,
            ..Default::default()
        };
        netlink.reconfigure(index, &change)?;
        drop(kernels);
        if !is_hung_up(ours.as_fd()) {
            taken.push(ours);
        } else if Instant::now() < until {
            wait_for_event(monitor.as_ref());
        } else if taken.is_empty() {
            return Err(NotRecovered::Alive(index));
        } else {
            break;
        }
    }
    Ok(taken)
}

/// The other end is closed.
fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    let found = poll(&mut fds, Some(&Timespec::default()));
    found.is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

/// Until the driver reports a dead link, or for a moment.
fn wait_for_event(monitor: Option<&Monitor>) {
    let Some(monitor) = monitor else { return std::thread::sleep(RETRY) };
    let timeout = Timespec::try_from(RETRY).unwrap_or_default();
    let mut fds = [PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN)];
    let _ = poll(&mut fds, Some(&timeout));
    while let Some(index) = monitor.next_dead_link() {
        tracing::debug!(index, "the kernel reports a dead NBD link");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_nobody_took_hangs_up_at_once() {
        let (ours, theirs) = socket_pair().unwrap();
        assert!(!is_hung_up(ours.as_fd()));
        let kept = theirs.try_clone().unwrap();
        drop(theirs);
        assert!(!is_hung_up(ours.as_fd()), "the kernel has a copy");
        drop(kept);
        assert!(is_hung_up(ours.as_fd()));
    }
}
