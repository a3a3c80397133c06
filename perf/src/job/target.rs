//! What `-T` names: a bdev of the configuration, or a device that is reached for the run.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde_json::{Map, Value, json};

/// A device.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// A bdev of the configuration, by name.
    Bdev(String),
    /// An export of an NBD server, by URI: becomes a bdev.
    Nbd(String),
    /// A device of an RNBD server: becomes a bdev.
    Rnbd(RnbdTarget),
    /// A vhost-user-blk socket, of which the load is front end and driver.
    Vhost(VhostTarget),
}

/// `rnbd://[SOURCE@]SERVER[:PORT][,…]/DEVICE[?provider=…&connections=…&sessname=…&mpath_policy=…]`
#[derive(Clone, Debug, PartialEq)]
pub struct RnbdTarget {
    text: String,
    device: String,
    paths: Vec<Value>,
    more: Map<String, Value>,
}

/// `vhost:PATH[?queues=N&packed&indirect&inflight]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostTarget {
    /// The socket.
    pub socket: PathBuf,
    /// Virtqueues, over which the requests of a core are spread.
    pub queues: u16,
    /// Packed rings.
    pub packed: bool,
    /// Requests in indirect tables.
    pub indirect: bool,
    /// Memory for requests in flight is shared, as by QEMU.
    pub inflight: bool,
}

const NBD_SCHEMES: [&str; 4] = ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"];
const RNBD: &str = "rnbd://";
const VHOST: &str = "vhost:";

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("-T: give a bdev's name, nbd://…, rnbd://… or vhost:SOCKET".into());
        }
        if NBD_SCHEMES.iter().any(|s| text.starts_with(s)) {
            return Ok(Self::Nbd(text.into()));
        }
        if let Some(rest) = text.strip_prefix(RNBD) {
            return RnbdTarget::parse(text, rest).map(Self::Rnbd).map_err(|e| format!("-T {text}: {e}"));
        }
        if let Some(rest) = text.strip_prefix(VHOST) {
            return VhostTarget::parse(rest).map(Self::Vhost).map_err(|e| format!("-T {text}: {e}"));
        }
        match text.split_once("://") {
            Some((scheme, _)) => {
                Err(format!("-T {text}: no scheme {scheme}; there are nbd, nbds, nbd+unix, rnbd and vhost:"))
            }
            None => Ok(Self::Bdev(text.into())),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bdev(name) | Self::Nbd(name) => f.write_str(name),
            Self::Rnbd(t) => f.write_str(&t.text),
            Self::Vhost(t) => write!(f, "{VHOST}{}", t.socket.display()),
        }
    }
}

impl Target {
    /// Method and parameters of the call that makes a bdev `name` of it.
    pub(super) fn call(&self, name: &str, read_only: bool) -> Option<(&'static str, Value)> {
        match self {
            Self::Bdev(_) | Self::Vhost(_) => None,
            Self::Nbd(uri) => {
                Some(("bdev_nbd_create", json!({"name": name, "uri": uri, "read_only": read_only})))
            }
            Self::Rnbd(t) => Some(("bdev_rnbd_map", t.params(name, read_only))),
        }
    }

    /// Whether both reach the same blocks, as far as the names tell.
    pub(super) fn same_device(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Vhost(a), Self::Vhost(b)) => a.socket == b.socket,
            _ => self == other,
        }
    }
}

/// `key` or `key=value` words of a query.
fn query(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split('&').filter(|w| !w.is_empty()).map(|w| w.split_once('=').unwrap_or((w, "")))
}

impl RnbdTarget {
    const FORM: &str = "write rnbd://[SOURCE@]SERVER[:PORT]/DEVICE";

    fn parse(text: &str, rest: &str) -> Result<Self, String> {
        let (place, words) = rest.split_once('?').unwrap_or((rest, ""));
        let (servers, device) = place.split_once('/').ok_or(Self::FORM)?;
        if device.is_empty() {
            return Err(Self::FORM.into());
        }
        let paths = servers.split(',').map(path).collect::<Result<_, _>>()?;
        let mut more = Map::new();
        for (key, value) in query(words) {
            let value: Value = match key {
                "provider" | "sessname" | "mpath_policy" => value.into(),
                "connections" => value.parse::<u16>().map_err(|_| "connections=: use a number")?.into(),
                _ => {
                    return Err(format!(
                        "{key}=: no such word; there are provider, sessname, connections and mpath_policy"
                    ));
                }
            };
            more.insert(key.into(), value);
        }
        Ok(Self { text: text.into(), device: device.into(), paths, more })
    }

    fn params(&self, name: &str, read_only: bool) -> Value {
        let mut params = self.more.clone();
        params.insert("name".into(), name.into());
        params.entry("sessname").or_insert_with(|| format!("rnbd-perf-{}-{name}", std::process::id()).into());
        params.insert("device_path".into(), self.device.clone().into());
        params.insert("paths".into(), self.paths.clone().into());
        params.insert("access_mode".into(), if read_only { "ro" } else { "rw" }.into());
        // A load whose server is gone is over.
        params.insert("fast_io_fail_timeout_sec".into(), 10.into());
        params.into()
    }
}

fn path(text: &str) -> Result<Value, String> {
    let wrong = || format!("'{text}': use an address such as 192.0.2.1, 192.0.2.1:1234 or [fd00::1]:1234");
    let (src, dst) = match text.split_once('@') {
        Some((src, dst)) => (Some(src.parse::<IpAddr>().map_err(|_| wrong())?), dst),
        None => (None, text),
    };
    let with_port = dst.parse::<SocketAddr>().map(|a| (a.ip(), Some(a.port())));
    let (ip, port) = with_port
        .or_else(|_| dst.trim_matches(['[', ']']).parse::<IpAddr>().map(|ip| (ip, None)))
        .map_err(|_| wrong())?;
    let mut path = json!({"dst": ip});
    if let Some(src) = src {
        path["src"] = json!(src);
    }
    if let Some(port) = port {
        path["trsvcid"] = port.to_string().into();
    }
    Ok(path)
}

impl VhostTarget {
    fn parse(rest: &str) -> Result<Self, String> {
        let (socket, words) = rest.split_once('?').unwrap_or((rest, ""));
        if socket.is_empty() {
            return Err("write vhost:PATH, the socket of a controller".into());
        }
        let mut t =
            Self { socket: socket.into(), queues: 1, packed: false, indirect: false, inflight: false };
        for (key, value) in query(words) {
            match (key, value) {
                ("queues", n) => {
                    let n = n.parse().ok().filter(|n| (1..=64).contains(n));
                    t.queues = n.ok_or("queues=: use 1 to 64")?;
                }
                ("packed", "") => t.packed = true,
                ("indirect", "") => t.indirect = true,
                ("inflight", "") => t.inflight = true,
                _ => return Err(format!("{key}: use queues=N, packed, indirect and inflight")),
            }
        }
        Ok(t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Target {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn names_and_uris() {
        assert_eq!(parse("Null0"), Target::Bdev("Null0".into()));
        assert_eq!(parse("Null0").call("x", true), None);
        let (method, params) = parse("nbd+unix:///d?socket=/s").call("n", true).expect("a call");
        assert_eq!(
            (method, &params["uri"], &params["read_only"]),
            ("bdev_nbd_create", &"nbd+unix:///d?socket=/s".into(), &true.into())
        );
        let text = "rnbd://10.0.0.2@10.0.0.1:5,[fd00::1]/pool/d?provider=soft-roce&connections=3";
        let (method, params) = parse(text).call("r", false).expect("a call");
        let paths = json!([{"src": "10.0.0.2", "dst": "10.0.0.1", "trsvcid": "5"}, {"dst": "fd00::1"}]);
        assert_eq!(
            (method, &params["paths"], &params["device_path"]),
            ("bdev_rnbd_map", &paths, &"pool/d".into())
        );
        assert_eq!((&params["connections"], &params["access_mode"]), (&3.into(), &"rw".into()));
        let Target::Vhost(v) = parse("vhost:/tmp/v.sock?queues=2&packed") else { panic!("a vhost socket") };
        assert_eq!((v.queues, v.packed, v.indirect), (2, true, false));
        assert!(parse("vhost:/a?packed").same_device(&parse("vhost:/a")));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, says) in [
            ("", "bdev's name"),
            ("http://x", "no scheme http"),
            ("rnbd://10.0.0.1", "/DEVICE"),
            ("rnbd://10.0.0.1/", "/DEVICE"),
            ("rnbd://host/d", "192.0.2.1"),
            ("rnbd://10.0.0.1/d?speed=9", "no such word"),
            ("vhost:", "vhost:PATH"),
            ("vhost:/s?queues=0", "1 to 64"),
            ("vhost:/s?fast", "queues=N"),
        ] {
            let e = text.parse::<Target>().unwrap_err();
            assert!(e.contains(says), "{text}: {e}");
        }
    }
}
