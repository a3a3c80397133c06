//! What to map, in the words of the kernel client's `map_device` (drivers/block/rnbd/rnbd-clt-sysfs.c).

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::nbd::NbdSpec;

/// As many as the kernel client takes.
const MAX_PATHS: usize = 6;

/// What to map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// A device of an RNBD server.
    Rnbd(RnbdSpec),
    /// An export of an NBD server.
    Nbd(NbdSpec),
}

impl Spec {
    /// Reads `key=value` words, in any order.
    ///
    /// # Errors
    /// In words, which say what would be right.
    pub fn parse(words: &[String]) -> Result<Self, String> {
        if NbdSpec::is_one(words) {
            return NbdSpec::parse(words).map(Self::Nbd);
        }
        RnbdSpec::parse(words).map(Self::Rnbd)
    }

    /// Name of the bdev.
    pub fn bdev_name(&self) -> String {
        match self {
            Self::Rnbd(spec) => spec.bdev_name(),
            Self::Nbd(spec) => spec.bdev_name(),
        }
    }

    /// The call that maps it.
    pub fn call(&self) -> (&'static str, Value) {
        match self {
            Self::Rnbd(spec) => ("bdev_rnbd_map", spec.params()),
            Self::Nbd(spec) => ("bdev_nbd_create", spec.params()),
        }
    }

    /// Where the server is, for messages.
    pub fn servers(&self) -> String {
        match self {
            Self::Rnbd(spec) => spec.paths.iter().map(|p| p.dst.to_string()).collect::<Vec<_>>().join(", "),
            Self::Nbd(spec) => spec.server(),
        }
    }

    /// What it is, for messages.
    pub fn device(&self) -> String {
        match self {
            Self::Rnbd(spec) => format!("{} of session {}", spec.device_path, spec.sessname),
            Self::Nbd(spec) => format!("{} of {}", spec.device(), spec.server()),
        }
    }

    /// Said at the end.
    pub fn ended(&self) -> String {
        match self {
            Self::Rnbd(spec) => {
                format!("{} is not mapped any more, session {} is closed", spec.device_path, spec.sessname)
            }
            Self::Nbd(spec) => {
                format!("{} is not mapped any more, {} is disconnected", spec.device(), spec.server())
            }
        }
    }
}

/// A device of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RnbdSpec {
    /// Name of the session.
    pub sessname: String,
    /// Name of the device at the server.
    pub device_path: String,
    /// Where the server is, by which of our addresses.
    pub paths: Vec<Path>,
    /// What the other words say, as `bdev_rnbd_map` takes it.
    pub more: Map<String, Value>,
}

/// One way to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Our address, if it matters.
    pub src: Option<IpAddr>,
    /// The server's.
    pub dst: IpAddr,
    /// The server's, if each path has its own.
    pub port: Option<u16>,
}

impl RnbdSpec {
    /// Reads `key=value` words, in any order.
    ///
    /// # Errors
    /// In words, which say what would be right.
    pub fn parse(words: &[String]) -> Result<Self, String> {
        let mut seen = Vec::new();
        let (mut sessname, mut device_path) = (String::new(), String::new());
        let (mut paths, mut ports, mut more) = (Vec::<Path>::new(), Vec::new(), Map::new());
        for word in words {
            let (key, value) = word
                .split_once('=')
                .ok_or_else(|| format!("'{word}': write key=value; the keys are {}", KEYS.join(", ")))?;
            if key != "path" && key != "dest_port" && seen.contains(&key) {
                return Err(format!("{key}= is given twice"));
            }
            seen.push(key);
            match key {
                "sessname" => sessname = session_name(value)?,
                "device_path" => device_path = device_name(value)?,
                "path" => paths.push(Path::parse(value)?),
                "access_mode" => drop(more.insert(key.into(), access_mode(value)?.into())),
                "dest_port" => ports.push(port(value)?),
                "provider" => drop(more.insert(key.into(), value.into())),
                "reconnect_delay_sec"
                | "ctrlr_loss_timeout_sec"
                | "fast_io_fail_timeout_sec"
                | "stale_io_timeout_sec" => {
                    drop(more.insert(key.into(), seconds(key, value)?.into()));
                }
                "nr_poll_queues" => {
                    return Err("nr_poll_queues=: leave it out, reactors always poll under load".into());
                }
                _ => return Err(format!("{key}=: no such key; there are {}", KEYS.join(", "))),
            }
        }
        for (key, missing) in [
            ("sessname", sessname.is_empty()),
            ("device_path", device_path.is_empty()),
            ("path", paths.is_empty()),
        ] {
            if missing {
                return Err(format!("{key}= is missing; write, for example: {EXAMPLE}"));
            }
        }
        if paths.len() > MAX_PATHS {
            return Err(format!("{} paths: at most {MAX_PATHS} are right", paths.len()));
        }
        match &ports[..] {
            [] => {}
            [port] => drop(more.insert("trsvcid".into(), port.to_string().into())),
            _ if ports.len() == paths.len() => {
                paths.iter_mut().zip(ports).for_each(|(path, port)| path.port = Some(port));
            }
            _ => {
                let (n, of) = (ports.len(), paths.len());
                return Err(format!(
                    "dest_port= {n} times and path= {of} times: once is right, or one for each path"
                ));
            }
        }
        Ok(Self { sessname, device_path, paths, more })
    }

    /// Name of the bdev: as the kernel names the link in `ctl/devices/`.
    pub fn bdev_name(&self) -> String {
        format!("{}@{}", self.device_path.trim_matches('/').replace('/', "!"), self.sessname)
    }

    /// Parameters of `bdev_rnbd_map`.
    pub fn params(&self) -> Value {
        let path = |p: &Path| {
            let mut path = json!({"dst": p.dst});
            if let Some(src) = p.src {
                path["src"] = json!(src);
            }
            if let Some(port) = p.port {
                path["trsvcid"] = port.to_string().into();
            }
            path
        };
        let mut params = self.more.clone();
        params.insert("name".into(), self.bdev_name().into());
        params.insert("sessname".into(), self.sessname.clone().into());
        params.insert("device_path".into(), self.device_path.clone().into());
        params.insert("paths".into(), self.paths.iter().map(path).collect());
        params.into()
    }
}

const EXAMPLE: &str = "sessname=s1 path=ip:192.0.2.1 device_path=disk0";

const KEYS: [&str; 10] = [
    "sessname",
    "path",
    "device_path",
    "access_mode",
    "dest_port",
    "provider",
    "reconnect_delay_sec",
    "ctrlr_loss_timeout_sec",
    "fast_io_fail_timeout_sec",
    "stale_io_timeout_sec",
];

fn session_name(value: &str) -> Result<String, String> {
    if value.is_empty() || value.len() > 254 || value.contains(['/', '.', '\0']) {
        return Err(format!("sessname={value}: 1 to 254 bytes without '/' and '.' are right"));
    }
    Ok(value.into())
}

fn device_name(value: &str) -> Result<String, String> {
    if value.trim_matches('/').is_empty() || value.len() > 254 || value.contains('\0') {
        return Err(format!("device_path={value}: a name of 1 to 254 bytes is right, such as disk0"));
    }
    Ok(value.into())
}

fn access_mode(value: &str) -> Result<&str, String> {
    match value {
        "ro" | "rw" | "migration" => Ok(value),
        _ => Err(format!("access_mode={value}: use ro, rw or migration")),
    }
}

fn port(value: &str) -> Result<u16, String> {
    value.parse().map_err(|_| format!("dest_port={value}: a port number from 0 to 65535 is right"))
}

fn seconds(key: &str, value: &str) -> Result<i64, String> {
    value.parse().map_err(|_| format!("{key}={value}: a number of seconds is right"))
}

impl Path {
    /// `[SOURCE@]SERVER` or `[SOURCE,]SERVER`, each as `ip:ADDRESS`.
    fn parse(value: &str) -> Result<Self, String> {
        let (src, dst) = match value.split_once(['@', ',']) {
            Some((src, dst)) => (Some(src), dst),
            None => (None, value),
        };
        let address = |text: &str| {
            let ip = text.strip_prefix("ip:").and_then(|ip| ip.parse::<IpAddr>().ok());
            ip.ok_or_else(|| format!("path={value}: {}", no_address(text)))
        };
        Ok(Self { src: src.map(address).transpose()?, dst: address(dst)?, port: None })
    }
}

/// Why `text` is no `ip:ADDRESS`, and what would be right.
fn no_address(text: &str) -> String {
    let Some(name) = text.strip_prefix("ip:") else {
        let rest = match text.strip_prefix("gid:") {
            Some(_) => "gid: is not offered; write ip: and an IP address",
            None => "write ip:192.0.2.1, or ip:OUR_ADDRESS@ip:SERVER",
        };
        return rest.into();
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    if bare != name && bare.parse::<IpAddr>().is_ok() {
        return format!("write ip:{bare}, without brackets");
    }
    if name.is_empty() {
        return "the address after ip: is missing, such as ip:192.0.2.1".into();
    }
    format!("'{name}' is no IP address, and names are not looked up: write an address such as ip:192.0.2.1")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<RnbdSpec, String> {
        RnbdSpec::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_kernels_own_example() {
        let spec = parse("sessname=blya path=ip:10.50.100.66 device_path=ram0").unwrap();
        assert_eq!(spec.bdev_name(), "ram0@blya");
        let params = json!({"name": "ram0@blya", "sessname": "blya", "device_path": "ram0",
            "paths": [{"dst": "10.50.100.66"}]});
        assert_eq!(spec.params(), params);
    }

    #[test]
    fn everything_in_any_order() {
        let spec = parse(
            "access_mode=ro device_path=/pool/d path=ip:10.0.0.2@ip:10.0.0.1 dest_port=7 sessname=s \
             path=ip:fd00::2,ip:fd00::1 provider=soft-roce ctrlr_loss_timeout_sec=-1",
        )
        .unwrap();
        let params = json!({"name": "pool!d@s", "sessname": "s", "device_path": "/pool/d", "access_mode": "ro",
            "trsvcid": "7", "provider": "soft-roce", "ctrlr_loss_timeout_sec": -1,
            "paths": [{"src": "10.0.0.2", "dst": "10.0.0.1"}, {"src": "fd00::2", "dst": "fd00::1"}]});
        assert_eq!(spec.params(), params);
    }

    #[test]
    fn each_path_may_have_its_port() {
        let spec = parse(
            "sessname=s device_path=d path=ip:10.0.0.1 dest_port=7 path=ip:10.0.0.3@ip:10.0.0.2 dest_port=8",
        )
        .unwrap();
        let params = spec.params();
        let paths = json!([{"dst": "10.0.0.1", "trsvcid": "7"},
            {"src": "10.0.0.3", "dst": "10.0.0.2", "trsvcid": "8"}]);
        assert_eq!((&params["paths"], &params["trsvcid"]), (&paths, &Value::Null));
    }

    #[test]
    fn refusals_say_what_is_right() {
        let good = "sessname=s device_path=d path=ip:10.0.0.1";
        for (line, says) in [
            ("", "sessname= is missing"),
            ("sessname=s path=ip:10.0.0.1", "device_path= is missing"),
            ("sessname=s device_path=d", "path= is missing"),
            (&format!("{good} sessname=t"), "given twice"),
            (&format!("{good} colour=red"), "no such key; there are sessname"),
            (&format!("{good} fast"), "write key=value"),
            (&format!("{good} access_mode=wo"), "ro, rw or migration"),
            (&format!("{good} dest_port=65536"), "0 to 65535"),
            (&format!("{good} dest_port=1 dest_port=2"), "once is right, or one for each path"),
            (&format!("{good} path=10.0.0.2"), "write ip:192.0.2.1"),
            (&format!("{good} path=gid:fe80::1"), "gid: is not offered"),
            (&format!("{good} path=ip:10.0.0.2@"), "write ip:192.0.2.1"),
            (&format!("{good} path=ip:localhost"), "names are not looked up"),
            (&format!("{good} path=ip:[2001:db8::1]"), "write ip:2001:db8::1, without brackets"),
            (&format!("{good} path=ip:"), "is missing"),
            (&format!("{good} nr_poll_queues=1"), "leave it out"),
            (&format!("{good} reconnect_delay_sec=soon"), "a number of seconds"),
            (&format!("{good}{}", " path=ip:10.0.0.2".repeat(6)), "at most 6"),
            ("sessname=a.b device_path=d path=ip:10.0.0.1", "without '/' and '.'"),
            ("sessname=s device_path=/ path=ip:10.0.0.1", "such as disk0"),
        ] {
            let why = parse(line).expect_err(line);
            assert!(why.contains(says), "{line}: {why}");
        }
    }
}
