//! An export of an NBD server, by its URI.

use std::time::Instant;

use nbd_proto::client::Uri;
use serde_json::{Map, Value, json};

use super::words::{Opened, waits};

/// What to map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdSpec {
    /// As given.
    uri: String,
    /// Taken apart.
    parts: Uri,
    /// What the other words say, as `bdev_nbd_create` takes it.
    more: Map<String, Value>,
}

const KEYS: [&str; 9] = [
    "path",
    "access_mode",
    "connections",
    "dialect",
    "size",
    "reconnect_delay_sec",
    "ctrlr_loss_timeout_sec",
    "fast_io_fail_timeout_sec",
    "io_timeout_sec",
];

impl NbdSpec {
    /// Whether these words are about an NBD server.
    pub fn is_one(words: &[String]) -> bool {
        words.iter().any(|w| w.strip_prefix("path=").is_some_and(Uri::is_one))
    }

    /// Reads `key=value` words, in any order.
    ///
    /// # Errors
    /// In words, which say what would be right.
    pub fn parse(words: &[String]) -> Result<Self, String> {
        let (mut found, mut more) = (None, Map::new());
        for word in words {
            let (key, value) = word
                .split_once('=')
                .ok_or_else(|| format!("'{word}': write key=value; the keys are {}", KEYS.join(", ")))?;
            let number = || value.parse::<i64>().map_err(|_| format!("{key}={value}: a number is right"));
            let value: Value = match key {
                "path" if found.is_some() => {
                    return Err("path= is given twice: an NBD server has one URI".into());
                }
                "path" => {
                    found = Some((value.to_owned(), Uri::parse(value).map_err(|e| format!("path={e}"))?));
                    continue;
                }
                "access_mode" => match value {
                    "ro" => true.into(),
                    "rw" => false.into(),
                    _ => return Err(format!("access_mode={value}: use ro or rw")),
                },
                "dialect" => value.into(),
                "connections"
                | "size"
                | "io_timeout_sec"
                | "reconnect_delay_sec"
                | "ctrlr_loss_timeout_sec"
                | "fast_io_fail_timeout_sec" => number()?.into(),
                "sessname" | "device_path" => {
                    return Err(format!("{key}=: leave it out, the URI names the server and its export"));
                }
                _ => {
                    return Err(format!(
                        "{key}=: no such key for an NBD server; there are {}",
                        KEYS.join(", ")
                    ));
                }
            };
            let name = if key == "access_mode" { "read_only" } else { key };
            if more.insert(name.into(), value).is_some() {
                return Err(format!("{key}= is given twice"));
            }
        }
        let (uri, parts) = found.ok_or("path= is missing; write, for example: path=nbd://192.0.2.1/disk0")?;
        Ok(Self { uri, parts, more })
    }

    /// Name of the bdev: that of the export.
    pub fn bdev_name(&self) -> String {
        let name = self.parts.export.trim_matches('/').replace('/', "!");
        if name.is_empty() { "nbd".into() } else { name }
    }

    /// Where the server is.
    pub fn server(&self) -> String {
        self.parts.server.to_string()
    }

    /// For messages.
    pub fn device(&self) -> String {
        match self.parts.export.as_str() {
            "" => "the default export".into(),
            name => format!("export {name}"),
        }
    }

    /// Parameters of `bdev_nbd_create`.
    pub fn params(&self) -> Value {
        let mut params = self.more.clone();
        params.insert("name".into(), self.bdev_name().into());
        params.insert("uri".into(), self.uri.clone().into());
        params.into()
    }
}

/// What becomes of it, in words: the difference between two looks.
#[derive(Debug)]
pub struct NbdWatch {
    device: String,
    name: String,
    /// What was said of the connections last, and since when there has been none.
    told: Option<String>,
    cut_since: Option<Instant>,
    opened: Opened,
}

impl NbdWatch {
    pub fn new(spec: &NbdSpec) -> Self {
        Self {
            device: spec.device(),
            name: spec.bdev_name(),
            told: None,
            cut_since: None,
            opened: Opened::default(),
        }
    }

    /// Parameters of `bdev_nbd_get_devices`.
    pub fn asks(&self) -> Value {
        json!({"name": self.name})
    }

    /// Lines about what is new in its result.
    pub fn see(&mut self, devices: &Value, now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        let Some(d) = devices.as_array().and_then(|d| d.first()) else { return lines };
        let up: Vec<&str> =
            d["connections"].as_array().into_iter().flatten().filter_map(|c| c["address"].as_str()).collect();
        let why = d["last_error"].as_str().unwrap_or("no answer yet");
        let told = match (up.first(), self.cut_since) {
            (Some(address), cut) => {
                if let Some(since) = cut {
                    let seconds = now.duration_since(since).as_secs_f64();
                    lines.push(format!("connected again after {seconds:.1} s"));
                    self.cut_since = None;
                }
                let tls =
                    d["connections"][0]["cipher"].as_str().map_or_else(String::new, |c| format!(", {c}"));
                let (n, dialect) = (up.len(), d["dialect"].as_str().unwrap_or_default());
                let s = if n == 1 { "" } else { "s" };
                Some(format!("{n} connection{s} to {address}, {dialect} replies{tls}"))
            }
            (None, None) if self.told.is_some() => {
                self.cut_since = Some(now);
                Some(format!("no connection is left ({why}): {}", waits(d, "there is one")))
            }
            (None, Some(_)) if d["given_up"] == true => Some(format!("given up: {why}")),
            _ => None,
        };
        if let Some(told) = told.filter(|t| self.told.as_ref() != Some(t)) {
            lines.push(told.clone());
            self.told = Some(told);
        }
        if d["num_blocks"].is_u64() && !up.is_empty() {
            let opened = self.opened.see(d, if d["read_only"] == true { "ro" } else { "rw" });
            lines.extend(opened.map(|what| format!("{}: {what}", self.device)));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn parse(line: &str) -> Result<NbdSpec, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        assert!(NbdSpec::is_one(&words), "{line}");
        NbdSpec::parse(&words)
    }

    #[test]
    fn words_and_what_they_become() {
        let spec =
            parse("path=nbd://192.0.2.1/pool/d access_mode=ro connections=4 fast_io_fail_timeout_sec=9")
                .unwrap();
        let params = json!({"name": "pool!d", "uri": "nbd://192.0.2.1/pool/d", "read_only": true, "connections": 4,
            "fast_io_fail_timeout_sec": 9});
        assert_eq!((spec.params(), spec.server()), (params, "192.0.2.1:10809".into()));
        let spec = parse("dialect=1997 path=nbd+unix:///?socket=/s size=4096").unwrap();
        assert_eq!((spec.bdev_name(), spec.device()), ("nbd".into(), "the default export".into()));
        assert!(!NbdSpec::is_one(&["path=ip:10.0.0.1".into(), "sessname=nbd://".into()]));
        for (line, says) in [
            ("path=nbd://h path=nbd://h", "one URI"),
            ("path=nbd://h/?x=1", "x is not known"),
            ("path=nbd://h sessname=s", "leave it out"),
            ("path=nbd://h device_path=d", "leave it out"),
            ("path=nbd://h access_mode=migration", "ro or rw"),
            ("path=nbd://h connections=many", "a number is right"),
            ("path=nbd://h provider=auto", "no such key for an NBD server"),
            ("path=nbd://h size=1 size=2", "given twice"),
            ("path=nbd://h fast", "write key=value"),
        ] {
            assert!(parse(line).unwrap_err().contains(says), "{line}");
        }
    }

    #[test]
    fn a_connection_comes_goes_and_returns() {
        let (mut w, t) = (NbdWatch::new(&parse("path=nbd://h/d").unwrap()), Instant::now());
        let device = |addresses: &[&str], why: Option<&str>| {
            let connections: Vec<Value> = addresses.iter().map(|a| json!({"address": a})).collect();
            json!([{"connections": connections, "dialect": "structured", "last_error": why, "num_blocks": 2048,
                "block_size": 512, "read_only": false, "fast_io_fail_timeout_sec": 9}])
        };
        assert!(w.see(&Value::Null, t).is_empty() && w.see(&device(&[], None), t).is_empty());
        let up = device(&["10.0.0.1:10809"], None);
        let opened = "export d: opened (rw), 1 MiB, blocks of 512 bytes";
        assert_eq!(w.see(&up, t), ["1 connection to 10.0.0.1:10809, structured replies", opened]);
        assert!(w.see(&up, t).is_empty());
        let lost = "no connection is left (gone): I/O waits until there is one, or for at most 9 s";
        assert_eq!(w.see(&device(&[], Some("gone")), t), [lost]);
        assert!(w.see(&device(&[], Some("refused")), t).is_empty());
        let lines = w.see(&up, t + Duration::from_secs(3));
        assert_eq!(lines[0], "connected again after 3.0 s");
    }
}
