//! Who counts as one peer.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One peer, as far as it cannot choose who it is: who has one address of IPv6 has all of its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// An IPv4 address.
    V4(Ipv4Addr),
    /// The 64-bit network of an IPv6 address, by its first address.
    V6(Ipv6Addr),
    /// A user of this host.
    User(u32),
}

impl Source {
    /// The source that `ip` belongs to. An IPv4 address that is mapped to IPv6 is an IPv4 address.
    pub const fn of(ip: IpAddr) -> Source {
        match ip.to_canonical() {
            IpAddr::V4(v4) => Source::V4(v4),
            IpAddr::V6(v6) => Source::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        }
    }

    /// What tells sources of one kind apart, for hashing: the IPv4 address, the bits of the IPv6 network, the user id.
    pub const fn bits(self) -> u64 {
        match self {
            Source::V4(v4) => v4.to_bits() as u64,
            Source::V6(v6) => (v6.to_bits() >> 64) as u64,
            Source::User(uid) => uid as u64,
        }
    }
}

/// As people write it: `192.0.2.1`, `2001:db8::/64`, `user 7`.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::V4(v4) => write!(f, "{v4}"),
            Source::V6(v6) => write!(f, "{v6}/64"),
            Source::User(uid) => write!(f, "user {uid}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(ip: &str) -> Source {
        Source::of(ip.parse().unwrap())
    }

    #[test]
    fn what_a_peer_can_choose_does_not_count() {
        assert_ne!(source("192.0.2.1"), source("192.0.2.2"));
        assert_eq!(source("::ffff:192.0.2.1"), source("192.0.2.1"));
        assert_eq!(source("2001:db8:0:1::1"), source("2001:db8:0:1:ffff::2"));
        assert_ne!(source("2001:db8:0:1::1"), source("2001:db8:0:2::1"));
        let shown = [source("2001:db8:0:1::1"), source("192.0.2.1"), Source::User(7)].map(|s| s.to_string());
        assert_eq!(shown, ["2001:db8:0:1::/64", "192.0.2.1", "user 7"]);
    }
}
