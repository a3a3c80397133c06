//! A path as methods take it: `"ip:10.0.0.1"`, `"ip:10.0.0.2@ip:10.0.0.1"`, or `{"src": …, "dst": …, "trsvcid": …}`.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use crate::bdev::params::{PathParam, address};

/// A way to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Path(pub PathParam);

/// As [`crate::bdev::Maps`] names paths.
impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.src {
            Some(src) => write!(f, "{src}@{}", self.0.dst),
            None => self.0.dst.fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for Path {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(PathVisitor)
    }
}

struct PathVisitor;

impl<'de> Visitor<'de> for PathVisitor {
    type Value = Path;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path such as \"ip:10.0.0.1\" or {\"src\": \"10.0.0.2\", \"dst\": \"10.0.0.1\"}")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Path, E> {
        PathParam::parse(text).map(Path).map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Path, A::Error> {
        let (mut src, mut dst, mut port) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let value: Option<String> = map.next_value()?;
            if key == "trsvcid" {
                let wrong = |text| format!("trsvcid '{text}': use a port number such as \"1234\"");
                let number = value.map(|text| text.parse::<u16>().map_err(|_| wrong(text))).transpose();
                port = number.map_err(de::Error::custom)?;
                continue;
            }
            let place = match key.as_str() {
                "src" => &mut src,
                "dst" => &mut dst,
                _ => return Err(de::Error::unknown_field(&key, &["src", "dst", "trsvcid"])),
            };
            if let Some(text) = value {
                *place = Some(address(&text).map_err(de::Error::custom)?);
            }
        }
        let dst = dst.ok_or_else(|| de::Error::missing_field("dst"))?;
        Ok(Path(PathParam { src, dst, port }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parse(value: Value) -> Result<String, String> {
        serde_json::from_value::<Path>(value).map(|p| p.to_string()).map_err(|e| e.to_string())
    }

    #[test]
    fn both_forms() {
        assert_eq!(parse(json!("ip:10.0.0.1")).unwrap(), "10.0.0.1");
        assert_eq!(parse(json!("ip:10.0.0.2,ip:10.0.0.1")).unwrap(), "10.0.0.2@10.0.0.1");
        assert_eq!(parse(json!({"dst": "ip:10.0.0.1"})).unwrap(), "10.0.0.1");
        assert_eq!(parse(json!({"src": "10.0.0.2", "dst": "10.0.0.1"})).unwrap(), "10.0.0.2@10.0.0.1");
        assert_eq!(parse(json!({"src": null, "dst": "::1"})).unwrap(), "::1");
        let own = serde_json::from_value::<Path>(json!({"dst": "::1", "trsvcid": "99"})).unwrap();
        assert_eq!((own.0.dst(1), own.0.port), ("[::1]:99".parse().unwrap(), Some(99)));
        for (bad, say) in [
            (json!({}), "dst"),
            (json!({"dst": "x"}), "use an IP address"),
            (json!({"dst": "::1", "port": "1"}), "port"),
            (json!({"dst": "::1", "trsvcid": "65536"}), "use a port number"),
            (json!(7), "a path such as"),
            (json!("gid:fe80::1"), "GID"),
        ] {
            let e = parse(bad.clone()).unwrap_err();
            assert!(e.contains(say), "{bad}: {e}");
        }
    }
}
