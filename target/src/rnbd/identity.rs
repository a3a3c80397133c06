//! Who may call himself what, as far as addresses and `allow` entries tell.
//!
//! A session's name and uuid are what a client says, in clear text. Its address is more: on a network whose addresses cannot
//! be forged, the host that it comes from. So the `allow` entries, of all exports together, say how well an address stands
//! for a session name ([`Standing`]), and who stands better goes first: in joining a session, and in taking its name.

use std::net::IpAddr;

use rtrs_poll::Verdict;

use super::export::{Allow, Exports};

/// What `allow` entries say of a session name and an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Nothing.
    Unknown,
    /// An entry has the session's name, and no address: whoever says the name.
    Name,
    /// An entry has the address, for any session.
    Address,
    /// An entry has both.
    Both,
}

impl Standing {
    fn by(allow: &Allow, session: &str, peer: IpAddr) -> Self {
        match (&allow.session, &allow.addr) {
            _ if !allow.fits(session, peer) => Self::Unknown,
            (Some(_), Some(_)) => Self::Both,
            (None, Some(_)) => Self::Address,
            _ => Self::Name,
        }
    }

    /// An entry has the address.
    pub fn has_address(self) -> bool {
        self >= Self::Address
    }

    /// For listings.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unknown => "nothing",
            Self::Name => "name",
            Self::Address => "address",
            Self::Both => "name and address",
        }
    }
}

impl Exports {
    /// How an address stands for a session name.
    pub fn standing(&self, session: &str, peer: IpAddr) -> Standing {
        let entries = self.table.iter().flat_map(|export| &export.allow);
        entries.map(|allow| Standing::by(allow, session, peer)).max().unwrap_or(Standing::Unknown)
    }

    /// The best of several addresses of a session.
    pub fn best_standing(&self, session: &str, peers: &[IpAddr]) -> Standing {
        let all = peers.iter().map(|peer| self.standing(session, *peer));
        all.max().unwrap_or(Standing::Unknown)
    }

    /// May a path from `peer` join the session that has paths from `present`?
    pub fn may_join(&self, session: &str, peer: IpAddr, present: &[IpAddr]) -> Verdict {
        let (theirs, ours) = (self.standing(session, peer), self.best_standing(session, present));
        match (theirs.has_address(), ours.has_address()) {
            (true, true) => Verdict::Welcome,
            (false, true) => Verdict::Refused(
                "allow entries name the addresses of this session, and this is none of them".into(),
            ),
            (true, false) => Verdict::Displaces,
            (false, false) if self.bind_sessions && !present.iter().any(|p| same(*p, peer)) => {
                Verdict::Refused(
                    "bind_sessions: the session's paths come from another address, and no allow entry names this one".into(),
                )
            }
            (false, false) => Verdict::Welcome,
        }
    }

    /// May a session from `peer` have the name of the one that has paths from `holders`?
    pub fn may_take_name(&self, session: &str, peer: IpAddr, holders: &[IpAddr]) -> Verdict {
        let (theirs, ours) = (self.standing(session, peer), self.best_standing(session, holders));
        if theirs.has_address() && theirs > ours {
            Verdict::Displaces
        } else {
            Verdict::Refused("the name is in use".into())
        }
    }
}

fn same(a: IpAddr, b: IpAddr) -> bool {
    a.to_canonical() == b.to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rnbd::export::Export;

    fn exports(entries: &[(Option<&str>, Option<&str>)]) -> Exports {
        let allow = |(session, addr): &(Option<&str>, Option<&str>)| Allow {
            session: session.map(Into::into),
            addr: addr.map(Into::into),
        };
        let mut exports = Exports::default();
        let allow = entries.iter().map(allow).collect();
        let export = Export { device_path: "d".into(), bdev_name: "M".into(), read_only: false, allow };
        exports.add(export).unwrap();
        exports
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn entries_say_how_an_address_stands_for_a_name() {
        let e =
            exports(&[(Some("alice"), Some("10.0.0.7")), (None, Some("10.1.0.0/16")), (Some("bob"), None)]);
        for (session, addr, standing) in [
            ("alice", "10.0.0.7", Standing::Both),
            ("alice", "::ffff:10.0.0.7", Standing::Both),
            ("alice", "10.1.2.3", Standing::Address),
            ("eve", "10.1.2.3", Standing::Address),
            ("alice", "10.0.0.8", Standing::Unknown),
            ("eve", "10.0.0.7", Standing::Unknown),
            ("bob", "192.0.2.1", Standing::Name),
            ("bob", "10.1.2.3", Standing::Address),
        ] {
            assert_eq!(e.standing(session, ip(addr)), standing, "{session} {addr}");
        }
        let none = exports(&[]);
        assert_eq!(none.standing("alice", ip("10.0.0.7")), Standing::Unknown, "everybody is nobody");
    }

    #[test]
    fn who_stands_better_gets_the_name() {
        let e =
            exports(&[(Some("alice"), Some("10.0.0.7")), (None, Some("10.1.0.0/16")), (Some("bob"), None)]);
        let displaces =
            |session, peer, holder| e.may_take_name(session, ip(peer), &[ip(holder)]) == Verdict::Displaces;
        assert!(displaces("alice", "10.0.0.7", "192.0.2.1") && displaces("alice", "10.0.0.7", "10.1.0.1"));
        assert!(displaces("any", "10.1.0.1", "192.0.2.1") && displaces("bob", "10.1.0.1", "192.0.2.1"));
        for (session, peer, holder) in [
            ("alice", "10.1.0.1", "10.0.0.7"),
            ("alice", "192.0.2.1", "10.0.0.7"),
            ("any", "10.1.0.1", "10.1.0.2"),
            ("any", "192.0.2.1", "192.0.2.2"),
            ("bob", "192.0.2.1", "192.0.2.2"),
        ] {
            assert!(!displaces(session, peer, holder), "{session} {peer} {holder}");
        }
        let holders = [ip("192.0.2.1"), ip("10.0.0.7")];
        assert_ne!(
            e.may_take_name("alice", ip("10.1.0.1"), &holders),
            Verdict::Displaces,
            "one of them is right"
        );
    }

    #[test]
    fn a_session_stays_with_the_addresses_that_entries_name() {
        let mut e = exports(&[(Some("alice"), Some("10.0.0.0/24")), (None, Some("10.1.0.0/16"))]);
        let join = |e: &Exports, session, peer, present: &[&str]| {
            e.may_join(session, ip(peer), &present.iter().map(|p| ip(p)).collect::<Vec<_>>())
        };
        assert_eq!(join(&e, "alice", "10.0.0.8", &["10.0.0.7"]), Verdict::Welcome);
        assert_eq!(join(&e, "alice", "10.1.0.8", &["10.0.0.7"]), Verdict::Welcome);
        assert!(matches!(join(&e, "alice", "10.2.0.1", &["10.0.0.7"]), Verdict::Refused(_)));
        assert_eq!(join(&e, "alice", "10.0.0.7", &["10.2.0.1"]), Verdict::Displaces);
        // Sessions that no entry is about.
        assert_eq!(join(&e, "eve", "10.2.0.1", &["10.2.0.2"]), Verdict::Welcome);
        e.bind_sessions = true;
        assert!(matches!(join(&e, "eve", "10.2.0.1", &["10.2.0.2"]), Verdict::Refused(_)));
        assert_eq!(join(&e, "eve", "10.2.0.2", &["::ffff:10.2.0.2"]), Verdict::Welcome);
        assert_eq!(join(&e, "alice", "10.0.0.8", &["10.0.0.7"]), Verdict::Welcome);
    }
}
