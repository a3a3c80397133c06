//! Whom a client counts for, where many share what there is.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::address::Peer;

/// Where clients come from, as far as they cannot choose it: who has one address of IPv6 has all of its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// An address of IPv4.
    V4(Ipv4Addr),
    /// A /64 of IPv6, by its first address.
    V6(Ipv6Addr),
    /// A user of this host.
    User(u32),
}

impl Source {
    /// Of a client.
    pub fn of(peer: &Peer) -> Self {
        match peer {
            Peer::Unix { uid, .. } => Self::User(*uid),
            // Clients of IPv4 come to a listener on `::` with addresses of IPv6.
            Peer::Tcp(address) => match address.ip().to_canonical() {
                IpAddr::V4(ip) => Self::V4(ip),
                IpAddr::V6(ip) => Self::V6(Ipv6Addr::from(u128::from(ip) & !u128::from(u64::MAX))),
            },
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(ip) => ip.fmt(f),
            Self::V6(ip) => write!(f, "{ip}/64"),
            Self::User(uid) => write!(f, "user {uid}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_can_choose_does_not_count() {
        let of = |ip: &str, port: u16| Source::of(&Peer::Tcp((ip.parse::<IpAddr>().unwrap(), port).into()));
        assert_eq!(of("192.0.2.1", 1), of("192.0.2.1", 2));
        assert_eq!(of("192.0.2.1", 1), of("::ffff:192.0.2.1", 2));
        assert_ne!(of("192.0.2.1", 1), of("192.0.2.2", 1));
        assert_eq!(of("2001:db8:1:2::1", 1), of("2001:db8:1:2:ffff:ffff:ffff:ffff", 1));
        assert_ne!(of("2001:db8:1:2::1", 1), of("2001:db8:1:3::1", 1));
        let user = |pid, uid| Source::of(&Peer::Unix { pid, uid });
        assert!(user(1, 7) == user(2, 7) && user(1, 7) != user(1, 8));
        let shown = [of("192.0.2.1", 1), of("2001:db8::1", 1), user(1, 7)].map(|s| s.to_string());
        assert_eq!(shown, ["192.0.2.1", "2001:db8::/64", "user 7"]);
    }
}
