//! Sockets that systemd has opened for this program (sd_listen_fds(3)).

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use super::error::ServerError;

/// `SD_LISTEN_FDS_START`: the first of them.
const FIRST: RawFd = 3;

/// Descriptors that were taken: each can be, once.
static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// What the environment says of them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Passed {
    count: usize,
    names: Vec<String>,
}

impl Passed {
    /// `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES`, for the process `pid`. Those of another process are not ours.
    fn read(pid: u32, var: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name| var(name).and_then(|v| v.parse::<u32>().ok());
        if number("LISTEN_PID") != Some(pid) {
            return Self::default();
        }
        // The kernel's own limit for one process is far below.
        let count = number("LISTEN_FDS").map_or(0, |n| n.min(4096) as usize);
        let names = var("LISTEN_FDNAMES").unwrap_or_default().split(':').map(str::to_owned).collect();
        Self { count, names }
    }

    /// The place of the socket that `wanted` names, or numbers from 0 on.
    fn find(&self, wanted: &str) -> Option<usize> {
        let by_name = self.names.iter().take(self.count).position(|n| n == wanted);
        by_name.or_else(|| wanted.parse().ok().filter(|i| *i < self.count))
    }
}

/// The socket that is called `wanted` in LISTEN_FDNAMES, or has that number among those passed.
///
/// # Errors
/// There is none, or it was taken before.
pub(super) fn take(wanted: &str) -> Result<OwnedFd, ServerError> {
    let wrong = |text| Err(ServerError::Listener { param: "activated", text });
    let passed = Passed::read(std::process::id(), |name| std::env::var(name).ok());
    let Some(place) = passed.find(wanted) else {
        return wrong(format!(
            "systemd has passed {} sockets, none of which is '{wanted}'; name one as FileDescriptorName= has it, or \
             number it from 0 on",
            passed.count
        ));
    };
    let fd = FIRST + place as RawFd;
    let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if taken.contains(&fd) {
        return wrong(format!("the socket '{wanted}' was taken by another listener"));
    }
    taken.push(fd);
    // SAFETY: LISTEN_PID says that descriptors from 3 on were opened for this process, LISTEN_FDS that this is one of
    // them, and `TAKEN` that nobody has taken it before; nobody else here knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_have_names_and_numbers() {
        let read = |pid, pairs: &[(&str, &str)]| {
            let find = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            Passed::read(pid, find)
        };
        let three = [("LISTEN_PID", "7"), ("LISTEN_FDS", "3"), ("LISTEN_FDNAMES", "rpc:nbd:1")];
        let passed = read(7, &three);
        assert_eq!([passed.find("rpc"), passed.find("nbd"), passed.find("0")], [Some(0), Some(1), Some(0)]);
        assert_eq!([passed.find("1"), passed.find("3"), passed.find("none")], [Some(2), None, None]);
        assert_eq!(read(8, &three).find("nbd"), None, "those of another process");
        assert_eq!(read(7, &three[..2]).find("2"), Some(2));
        assert_eq!(read(7, &[]).find("0"), None);
        assert!(take("none").is_err());
    }
}
