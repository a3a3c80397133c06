//! Who may have an export.

use engine::Network;
use nbd_poll::listener::{Identity, Peer};
use serde::{Deserialize, Serialize};

use super::error::ServerError;

/// One kind of client; all that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Allow {
    /// Address or network of a client over TCP: 192.0.2.7, 192.0.2.0/24, fd00::/8.
    #[serde(skip_serializing_if = "Option::is_none")]
    addr: Option<String>,
    /// User of a client on a unix socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    /// Common name in the client's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_cn: Option<String>,
}

/// A list of them; an empty one lets everybody in.
#[derive(Clone, Debug, Default)]
pub(super) struct AllowList(Vec<(Allow, Option<Network>)>);

/// What a client may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Granted,
    /// Once it has shown a certificate, perhaps.
    NeedsTls,
    Denied,
}

impl AllowList {
    /// Reads what was given.
    ///
    /// # Errors
    /// [`ServerError::Allow`].
    pub(super) fn new(entries: Vec<Allow>) -> Result<Self, ServerError> {
        let entry = |allow: Allow| {
            if allow == Allow::default() {
                return Err(ServerError::Allow("an entry needs addr, uid or tls_cn".into()));
            }
            let network = allow.addr.as_deref().map(str::parse).transpose();
            let network = network.map_err(|e: engine::NoNetwork| ServerError::Allow(e.to_string()))?;
            Ok((allow, network))
        };
        entries.into_iter().map(entry).collect::<Result<_, _>>().map(Self)
    }

    /// As they were given.
    pub(super) fn entries(&self) -> Vec<&Allow> {
        self.0.iter().map(|(allow, _)| allow).collect()
    }

    /// Whether an entry says where clients come from, and `peer` does.
    pub(super) fn names(&self, peer: &Peer) -> bool {
        let says = |(allow, network): &&(Allow, Option<Network>)| network.is_some() || allow.uid.is_some();
        self.0.iter().filter(says).any(|entry| Self::is_place(entry, peer))
    }

    fn is_place((allow, network): &(Allow, Option<Network>), peer: &Peer) -> bool {
        match peer {
            Peer::Unix { uid, .. } => network.is_none() && allow.uid.is_none_or(|u| u == *uid),
            Peer::Tcp(addr) => allow.uid.is_none() && network.is_none_or(|n| n.has(addr.ip())),
        }
    }

    /// What `who` may have.
    pub(super) fn access(&self, who: &Identity) -> Access {
        let name = who.tls.as_ref().and_then(|t| t.common_name.as_deref());
        let mut rest =
            self.0.iter().filter(|e| Self::is_place(e, &who.peer)).map(|(allow, _)| allow.tls_cn.as_deref());
        if self.0.is_empty() || rest.clone().any(|cn| cn.is_none() || cn == name) {
            Access::Granted
        } else if who.tls.is_none() && rest.next().is_some() {
            Access::NeedsTls
        } else {
            Access::Denied
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use nbd_poll::listener::TlsIdentity;

    fn list(json: serde_json::Value) -> Result<AllowList, String> {
        AllowList::new(serde_json::from_value(json).unwrap()).map_err(|e| e.to_string())
    }

    fn tcp(addr: &str, cn: Option<Option<&str>>) -> Identity {
        let tls = cn.map(|cn| TlsIdentity { cipher: String::new(), common_name: cn.map(str::to_owned) });
        Identity { peer: Peer::Tcp((addr.parse::<IpAddr>().unwrap(), 1).into()), tls }
    }

    fn unix(uid: u32) -> Identity {
        Identity { peer: Peer::Unix { pid: 1, uid }, tls: None }
    }

    #[test]
    fn parts_of_an_entry_hold_together() {
        let all = list(serde_json::json!([])).unwrap();
        assert_eq!(all.access(&unix(5)), Access::Granted);
        let some = list(serde_json::json!([
            {"addr": "10.0.0.0/8"}, {"uid": 7}, {"addr": "192.0.2.0/24", "tls_cn": "alice"}, {"tls_cn": "bob"},
        ]))
        .unwrap();
        for (who, access) in [
            (tcp("10.1.2.3", None), Access::Granted),
            (unix(7), Access::Granted),
            (unix(0), Access::NeedsTls),
            (tcp("192.0.2.1", None), Access::NeedsTls),
            (tcp("192.0.2.1", Some(Some("alice"))), Access::Granted),
            (tcp("192.0.3.1", Some(Some("alice"))), Access::Denied),
            (tcp("192.0.3.1", Some(Some("bob"))), Access::Granted),
            (tcp("192.0.3.1", Some(None)), Access::Denied),
        ] {
            assert_eq!(some.access(&who), access, "{who}");
        }
        let names = |who: Identity| some.names(&who.peer);
        assert!(names(tcp("10.1.2.3", None)) && names(unix(7)) && names(tcp("192.0.2.9", None)));
        assert!(!names(tcp("192.0.3.1", None)) && !names(unix(8)) && !all.names(&unix(5).peer));
        let local = list(serde_json::json!([{"uid": 7}])).unwrap();
        assert_eq!(local.access(&unix(8)), Access::Denied);
        assert_eq!(local.access(&tcp("10.0.0.1", None)), Access::Denied);
        assert!(list(serde_json::json!([{}])).unwrap_err().contains("needs addr, uid or tls_cn"));
        assert!(list(serde_json::json!([{"addr": "10.0.0.0/99"}])).unwrap_err().contains("no network"));
    }
}
