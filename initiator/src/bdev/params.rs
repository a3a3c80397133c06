//! What can be said about a mapping.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use rnbd_proto::open::AccessMode;
use rtrs_poll::Choice;
use rtrs_poll::client::{Policy, Reconnect};
use rtrs_proto::heartbeat;
use uuid::Uuid;

use super::error::MapError;

/// RTRS_PORT.
pub const DEFAULT_PORT: u16 = 1234;
/// What has reached a server is with its disk at once, and nothing more can come by a path that is lost at our end. Disks
/// for servers give up on a request within 7 s (error recovery control), so this is a moment more.
const STALE_IO: Duration = Duration::from_secs(10);
/// Longest session name and device path in bytes (`NAME_MAX` with its NUL).
const MAX_NAME: usize = 254;

/// A device of a server, and how it is to be treated.
#[derive(Clone, Debug)]
pub struct MapParams {
    /// Of the bdev.
    pub name: String,
    /// The session it belongs to, which is made if it does not exist.
    pub sessname: String,
    /// Its name at the server.
    pub device_path: String,
    /// Reading, or writing too.
    pub mode: AccessMode,
    /// Of the bdev; random if absent.
    pub uuid: Option<Uuid>,
    /// How the session is made; of no meaning if it exists.
    pub session: SessionParams,
    /// How long I/O waits while the device is not open; `None`: until it is, or the session is given up.
    pub fast_io_fail: Option<Duration>,
    /// How often the server is asked for the size; `None`: never.
    pub resize_check: Option<Duration>,
    /// A first attempt that fails is an ordinary loss, and the mapping stays.
    pub keep_trying: bool,
}

/// How a session is made.
#[derive(Clone, Debug)]
pub struct SessionParams {
    /// Ways to the server.
    pub paths: Vec<PathParam>,
    /// Of the server.
    pub port: u16,
    /// As [`Choice::parse`] takes it, or the name of another connection manager.
    pub provider: String,
    /// Connections of each path; `None`: one for each reactor, and one for administration.
    pub connections: Option<u16>,
    /// Among several paths.
    pub policy: Policy,
    /// After losses.
    pub reconnect: Reconnect,
    /// Without any path for so long, the session and its devices are given up; `None`: never.
    pub ctrlr_loss: Option<Duration>,
    /// So long a server may still execute what came by a lost path, from when the path was lost, or when it has executed a
    /// repetition. Until then, unless the path is connected again, nothing that may be under way there is overwritten.
    /// Zero: it is, as by the kernel's client.
    pub stale_io: Duration,
    /// For each step of connecting.
    pub connect_timeout: Duration,
    /// A path is lost when the server's end of the transport has acknowledged nothing for so long. Of soft-roce only:
    /// RDMA devices have their own timers.
    pub ack_timeout: Duration,
    /// Interval and patience.
    pub heartbeat: heartbeat::Config,
}

impl Default for SessionParams {
    fn default() -> Self {
        Self {
            paths: Vec::new(),
            port: DEFAULT_PORT,
            provider: "auto".into(),
            connections: None,
            policy: Policy::default(),
            reconnect: Reconnect::default(),
            ctrlr_loss: None,
            stale_io: STALE_IO,
            connect_timeout: Duration::from_secs(10),
            ack_timeout: Duration::from_secs(5),
            heartbeat: heartbeat::Config::default(),
        }
    }
}

impl MapParams {
    /// A device for reading and writing, with everything else as it is by default.
    pub fn new(name: &str, sessname: &str, device_path: &str, paths: Vec<PathParam>) -> Self {
        Self {
            name: name.into(),
            sessname: sessname.into(),
            device_path: device_path.into(),
            mode: AccessMode::ReadWrite,
            uuid: None,
            session: SessionParams { paths, ..SessionParams::default() },
            fast_io_fail: None,
            resize_check: Some(Duration::from_secs(10)),
            keep_trying: false,
        }
    }

    /// # Errors
    /// What can be seen to be wrong without asking anybody.
    pub(super) fn check(&self) -> Result<(), MapError> {
        let wrong = |parameter, text: String| Err(MapError::Invalid { parameter, text });
        if self.name.is_empty() {
            return wrong("name", "a bdev needs a name".into());
        }
        if self.sessname.is_empty()
            || self.sessname.len() > MAX_NAME
            || self.sessname.contains(['/', '.', '\0'])
        {
            return wrong(
                "sessname",
                "use 1 to 254 bytes without '/', '.' and NUL, such as a host name".into(),
            );
        }
        if self.device_path.is_empty() || self.device_path.len() > MAX_NAME || self.device_path.contains('\0')
        {
            return wrong("device_path", "use 1 to 254 bytes without NUL".into());
        }
        self.session.check(self.fast_io_fail)
    }
}

impl SessionParams {
    /// The relations that bdev_nvme checks (`bdev_nvme_check_io_error_resiliency_params`).
    fn check(&self, fast_io_fail: Option<Duration>) -> Result<(), MapError> {
        let wrong = |parameter, text: &str| Err(MapError::Invalid { parameter, text: text.into() });
        let delay = self.reconnect.delay;
        if delay.is_zero() {
            return wrong("reconnect_delay_sec", "use at least 1");
        }
        if self.ctrlr_loss.is_some_and(|loss| loss < delay) {
            return wrong("ctrlr_loss_timeout_sec", "use -1 (never), or at least reconnect_delay_sec");
        }
        let Some(fast) = fast_io_fail else { return Ok(()) };
        if fast < delay {
            return wrong("fast_io_fail_timeout_sec", "use 0 (never), or at least reconnect_delay_sec");
        }
        if self.ctrlr_loss.is_some_and(|loss| loss < fast) {
            return wrong("fast_io_fail_timeout_sec", "use at most ctrlr_loss_timeout_sec");
        }
        Ok(())
    }

    /// The providers for `path`, in the order in which they are to be tried.
    pub(super) fn providers(&self, path: &PathParam) -> Vec<String> {
        match Choice::parse(&self.provider) {
            Some(choice) => {
                let local = path.src.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
                choice.candidates(local).iter().map(|p| p.name().to_owned()).collect()
            }
            None => vec![self.provider.clone()],
        }
    }
}

/// One way to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathParam {
    /// Our address; the system chooses without.
    pub src: Option<IpAddr>,
    /// The server's.
    pub dst: IpAddr,
    /// The server's, if it is not the session's.
    pub port: Option<u16>,
}

impl PathParam {
    /// The kernel's `[src,]dst` or `[src@]dst`, each an IP address with or without `ip:`.
    ///
    /// # Errors
    /// In words.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(['@', ',']) {
            Some((src, dst)) => Ok(Self { src: Some(address(src)?), dst: address(dst)?, port: None }),
            None => Ok(Self { src: None, dst: address(text)?, port: None }),
        }
    }

    /// With the server's port, `port` if it has none of its own.
    pub(super) fn dst(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.dst, self.port.unwrap_or(port))
    }
}

/// As in [`PathParam::parse`].
///
/// # Errors
/// In words.
pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    if text.starts_with("gid:") {
        return Err(format!(
            "'{text}': addresses by GID are not offered; use the IP address of the interface"
        ));
    }
    let ip = text.strip_prefix("ip:").unwrap_or(text);
    ip.parse().map_err(|_| format!("'{text}': use an IP address such as ip:10.0.0.1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> MapParams {
        MapParams::new("d", "s", "ram0", vec![PathParam::parse("ip:10.0.0.1").unwrap()])
    }

    #[test]
    fn paths_as_the_kernel_writes_them() {
        let path = |src: Option<&str>, dst: &str| PathParam {
            src: src.map(|s| s.parse().unwrap()),
            dst: dst.parse().unwrap(),
            port: None,
        };
        for (text, want) in [
            ("ip:10.0.0.1", path(None, "10.0.0.1")),
            ("10.0.0.1", path(None, "10.0.0.1")),
            ("ip:10.0.0.2@ip:10.0.0.1", path(Some("10.0.0.2"), "10.0.0.1")),
            ("ip:fd00::2,ip:fd00::1", path(Some("fd00::2"), "fd00::1")),
        ] {
            assert_eq!(PathParam::parse(text), Ok(want), "{text}");
        }
        for (bad, say) in [
            ("", "use an IP address"),
            ("gid:fe80::1", "GID"),
            ("ip:10.0.0.1@", "use an IP"),
            ("host", "'host'"),
        ] {
            assert!(PathParam::parse(bad).unwrap_err().contains(say), "{bad}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let with = |f: fn(&mut MapParams)| {
            let mut p = params();
            f(&mut p);
            p.check().expect_err("cannot be").to_string()
        };
        let sec = |n| Some(Duration::from_secs(n));
        assert!(params().check().is_ok());
        for (words, say) in [
            (with(|p| p.name.clear()), "name:"),
            (with(|p| p.sessname = "a.b".into()), "sessname:"),
            (with(|p| p.sessname = "x".repeat(255)), "sessname:"),
            (with(|p| p.device_path.clear()), "device_path:"),
            (with(|p| p.session.reconnect.delay = Duration::ZERO), "reconnect_delay_sec:"),
            (with(|p| p.session.ctrlr_loss = Some(Duration::from_secs(1))), "ctrlr_loss_timeout_sec:"),
            (with(|p| p.fast_io_fail = Some(Duration::from_secs(1))), "fast_io_fail_timeout_sec:"),
        ] {
            assert!(words.starts_with(say), "{words}");
        }
        let mut p = params();
        (p.fast_io_fail, p.session.ctrlr_loss) = (sec(20), sec(10));
        assert!(p.check().unwrap_err().to_string().contains("at most ctrlr_loss"));
        p.session.ctrlr_loss = sec(20);
        assert!(p.check().is_ok());
    }

    #[test]
    fn any_other_provider_is_taken_by_its_name() {
        let mut p = params().session;
        let path = p.paths[0];
        p.provider = "soft-roce".into();
        assert_eq!(p.providers(&path), ["soft-roce"]);
        p.provider = "loopback".into();
        assert_eq!(p.providers(&path), ["loopback"]);
        p.provider = "auto".into();
        assert_eq!(p.providers(&path).last().map(String::as_str), Some("soft-roce"));
    }
}
