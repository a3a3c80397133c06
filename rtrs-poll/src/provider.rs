//! Which RDMA provider carries RTRS.

use std::fs;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::path::{Path, PathBuf};

use verbs::{Cm, Error};

/// A provider of [`verbs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// The system's RDMA devices.
    RdmaCore,
    /// RoCEv2 in this program, over ordinary UDP sockets.
    SoftRoce,
}

impl Provider {
    /// As [`Cm::provider`] says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::RdmaCore => "rdma-core",
            Self::SoftRoce => "soft-roce",
        }
    }

    /// Opens it.
    ///
    /// # Errors
    /// Its libraries or its kernel part are missing.
    pub fn open(self) -> Result<Box<dyn Cm>, Error> {
        match self {
            Self::RdmaCore => verbs::rdma_core::open(),
            Self::SoftRoce => soft_roce::open(),
        }
    }
}

/// What a user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// rdma-core if a device owns the local address, else soft-roce.
    #[default]
    Auto,
    /// This one.
    Only(Provider),
}

impl Choice {
    /// What [`Choice::parse`] takes.
    pub const NAMES: [&'static str; 3] = ["auto", "rdma-core", "soft-roce"];

    /// `None` for a name that is not in [`Choice::NAMES`].
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            "rdma-core" => Some(Self::Only(Provider::RdmaCore)),
            "soft-roce" => Some(Self::Only(Provider::SoftRoce)),
            _ => None,
        }
    }

    /// Providers to try on a local address, in order. Use the next if one fails as [`owns_no_device`] says, or if it
    /// cannot be opened.
    pub fn candidates(self, local: IpAddr) -> &'static [Provider] {
        match self {
            Self::Only(Provider::RdmaCore) => &[Provider::RdmaCore],
            Self::Only(Provider::SoftRoce) => &[Provider::SoftRoce],
            // rdma-core listens on the unspecified address without any device, and nobody would ever come.
            Self::Auto if local.is_unspecified() && !any_device() => &[Provider::SoftRoce],
            Self::Auto => &[Provider::RdmaCore, Provider::SoftRoce],
        }
    }
}

/// Whether an RDMA device of the host serves this network namespace. All devices are listed in all namespaces, so that
/// of an Ethernet port counts only if one of its addresses can be bound to here.
fn any_device() -> bool {
    entries("/sys/class/infiniband".as_ref())
        .flat_map(|device| entries(&device.join("ports")).collect::<Vec<_>>())
        .any(|port| serves(&port))
}

fn serves(port: &Path) -> bool {
    let link_layer = fs::read_to_string(port.join("link_layer")).unwrap_or_default();
    link_layer.trim() == "InfiniBand"
        || entries(&port.join("gids"))
            .filter_map(|gid| fs::read_to_string(gid).ok())
            .any(|gid| is_local(gid.trim()))
}

/// An address can be bound to. `gid`: as the kernel prints it, an IPv6 address, IPv4 ones mapped.
fn is_local(gid: &str) -> bool {
    let Ok(ip) = gid.parse::<Ipv6Addr>() else { return false };
    let ip = ip.to_canonical();
    !ip.is_unspecified() && UdpSocket::bind((ip, 0)).is_ok()
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(dir).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()))
}

/// The error says that no RDMA device has the address.
pub fn owns_no_device(error: &Error) -> bool {
    matches!(error.source.raw_os_error(), Some(libc::ENODEV | libc::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for name in Choice::NAMES {
            let choice = Choice::parse(name).expect(name);
            if let Choice::Only(provider) = choice {
                assert_eq!(provider.name(), name);
            }
            assert!(!choice.candidates([192, 0, 2, 1].into()).is_empty());
        }
        assert_eq!(Choice::parse("rxe"), None);
    }

    #[test]
    fn gids_are_local_or_not() {
        assert!(is_local("0000:0000:0000:0000:0000:ffff:7f00:0001"));
        assert!(!is_local("0000:0000:0000:0000:0000:ffff:c000:0201"));
        assert!(!is_local("0000:0000:0000:0000:0000:0000:0000:0000"));
        assert!(!is_local("nonsense"));
    }
}
