//! NBD URIs (NBD `doc/uri.md`, RFC 3986).

use std::fmt;

use crate::haggle::wire::{MAX_STRING, NBD_PORT};

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Server {
    /// TCP.
    Tcp {
        /// Name or address; IPv6 without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// Path of a unix socket.
    Unix(String),
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => f.write_str(path),
        }
    }
}

/// An NBD URI, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// `nbds`, `nbds+unix`: encryption is required.
    pub tls: bool,
    /// Where the server is.
    pub server: Server,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// `tls-certificates`: directory with `ca-cert.pem`, and perhaps `client-cert.pem` and `client-key.pem`.
    pub tls_certificates: Option<String>,
    /// `tls-hostname`: what the server's certificate must be for, in place of the host.
    pub tls_hostname: Option<String>,
    /// `tls-verify-peer`: false accepts whoever answers.
    pub tls_verify_peer: bool,
}

/// Why a text is no NBD URI that can be used here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{uri}': {why}; right are, for example, nbd://host/export and nbd+unix:///export?socket=/run/nbd.sock"
)]
pub struct UriError {
    /// As given.
    pub uri: String,
    /// What is wrong with it.
    pub why: String,
}

impl Uri {
    /// Whether `text` means to be an NBD URI.
    pub fn is_one(text: &str) -> bool {
        text.split_once("://").is_some_and(|(scheme, _)| scheme.to_ascii_lowercase().starts_with("nbd"))
    }

    /// Takes `text` apart.
    ///
    /// # Errors
    /// [`UriError`]. Query parameters that are not known are refused, as the specification asks.
    pub fn parse(text: &str) -> Result<Self, UriError> {
        parse(text).map_err(|why| UriError { uri: text.into(), why })
    }
}

fn parse(text: &str) -> Result<Uri, String> {
    let (scheme, rest) = text.split_once("://").ok_or("no scheme before ://")?;
    let (tls, unix) = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        other => return Err(format!("the scheme {other} is none of nbd, nbds, nbd+unix and nbds+unix")),
    };
    if rest.contains('#') {
        return Err("a fragment (#) means nothing here".into());
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(path)?;
    if export.len() > MAX_STRING || export.contains('\0') {
        return Err(format!("the name of the export must have at most {MAX_STRING} bytes and no NUL"));
    }
    let mut query = Query::parse(query)?;
    let server = match (unix, query.socket.take()) {
        (true, Some(socket)) if authority.is_empty() => Server::Unix(socket),
        (true, Some(_)) => return Err(format!("'{authority}' names a host, and a unix socket has none")),
        (true, None) => return Err("socket= is missing".into()),
        (false, Some(_)) => return Err("socket= goes with nbd+unix only".into()),
        (false, None) => tcp(authority)?,
    };
    Ok(Uri {
        tls,
        server,
        export,
        tls_certificates: query.certificates,
        tls_hostname: query.hostname,
        tls_verify_peer: query.verify_peer,
    })
}

fn tcp(authority: &str) -> Result<Server, String> {
    // A user name is for pre-shared keys, which are not offered.
    if authority.contains('@') {
        return Err("a user name is for pre-shared keys (tls-type=psk), which are not offered".into());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => {
            let (host, port) = v6.split_once(']').ok_or("']' is missing behind the IPv6 address")?;
            let port = match port.strip_prefix(':') {
                Some(port) => port,
                None if port.is_empty() => "",
                None => return Err(format!("'{port}' behind the address")),
            };
            (host.to_owned(), port)
        }
        None => {
            let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
            (decode(host)?, port)
        }
    };
    let port = if port.is_empty() {
        NBD_PORT
    } else {
        port.parse().map_err(|_| format!("'{port}' is no port: 1 to 65535 are possible"))?
    };
    // libnbd and qemu take a missing host for this one, too.
    let host = if host.is_empty() { "localhost".into() } else { host };
    Ok(Server::Tcp { host, port })
}

/// What may stand behind the question mark.
struct Query {
    socket: Option<String>,
    certificates: Option<String>,
    hostname: Option<String>,
    verify_peer: bool,
}

impl Query {
    fn parse(text: &str) -> Result<Self, String> {
        let mut query = Self { socket: None, certificates: None, hostname: None, verify_peer: true };
        for pair in text.split(['&', ';']).filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("'{pair}' has no value"))?;
            let value = decode(value)?;
            match key {
                "socket" if value.is_empty() || value.starts_with('\0') => {
                    return Err("socket= must be a path; the abstract name space is not offered".into());
                }
                "socket" => query.socket = Some(value),
                "tls-certificates" => query.certificates = Some(value),
                "tls-hostname" => query.hostname = Some(value),
                "tls-verify-peer" => {
                    query.verify_peer = match value.as_str() {
                        "0" | "false" => false,
                        "1" | "true" => true,
                        _ => return Err(format!("tls-verify-peer={value}: 0 or 1 are right")),
                    }
                }
                "tls-type" if value == "x509" => {}
                "tls-type" => return Err(format!("tls-type={value}: only x509 is offered")),
                "tls-psk-file" | "tls-username" => {
                    return Err(format!("{key}: pre-shared keys are not offered, only x509 certificates"));
                }
                _ => return Err(format!("the query parameter {key} is not known")),
            }
        }
        Ok(query)
    }
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let hex = rest.get(..2).and_then(|h| std::str::from_utf8(h).ok());
        let value = hex.filter(|h| !h.starts_with('+')).and_then(|h| u8::from_str_radix(h, 16).ok());
        bytes.push(value.ok_or_else(|| format!("'{text}': two hexadecimal digits must follow %"))?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| format!("'{text}' is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16) -> Server {
        Server::Tcp { host: host.into(), port }
    }

    #[test]
    fn the_examples_of_the_specification() {
        for (text, server, export) in [
            ("nbd://example.com:10809/export", tcp("example.com", 10809), "export"),
            ("nbd+unix:///export?socket=nbd.sock", Server::Unix("nbd.sock".into()), "export"),
            ("nbd://example.com/", tcp("example.com", 10809), ""),
            ("nbd://example.com", tcp("example.com", 10809), ""),
            ("nbd://example.com//disk", tcp("example.com", 10809), "/disk"),
            ("nbd://example.com/hello%20world", tcp("example.com", 10809), "hello world"),
            ("NBD://[fd00::1]:9/x", tcp("fd00::1", 9), "x"),
            ("nbd://[::1]/", tcp("::1", 10809), ""),
            ("nbd:///disk", tcp("localhost", 10809), "disk"),
        ] {
            let uri = Uri::parse(text).unwrap();
            assert_eq!((uri.server, uri.export.as_str(), uri.tls), (server, export, false), "{text}");
            assert!(uri.tls_verify_peer);
        }
    }

    #[test]
    fn encryption() {
        let uri = Uri::parse(
            "nbds+unix:///d?socket=/a%26b&tls-certificates=/etc/pki&tls-hostname=h&tls-verify-peer=0&tls-type=x509",
        )
        .unwrap();
        assert!(uri.tls && !uri.tls_verify_peer);
        assert_eq!(uri.server, Server::Unix("/a&b".into()));
        assert_eq!(uri.tls_certificates.as_deref(), Some("/etc/pki"));
        assert_eq!(uri.tls_hostname.as_deref(), Some("h"));
        assert!(Uri::parse("nbds://h").unwrap().tls);
    }

    #[test]
    fn refusals_name_what_is_wrong() {
        for (text, says) in [
            ("disk0", "no scheme"),
            ("http://h/", "none of nbd"),
            ("nbd+vsock://2/", "none of nbd"),
            ("nbd+unix:///x", "socket= is missing"),
            ("nbd+unix://h/x?socket=s", "names a host"),
            ("nbd+unix:///?socket=%00abstract", "abstract name space"),
            ("nbd://h/?socket=s", "goes with nbd+unix"),
            ("nbd://h:port/", "is no port"),
            ("nbd://h:65536/", "is no port"),
            ("nbd://[::1/", "']' is missing"),
            ("nbd://[::1]x/", "behind the address"),
            ("nbd://u@h/", "pre-shared keys"),
            ("nbds://h/?tls-psk-file=f", "pre-shared keys"),
            ("nbds://h/?tls-type=psk", "only x509"),
            ("nbds://h/?tls-verify-peer=2", "0 or 1"),
            ("nbd://h/?colour=red", "colour is not known"),
            ("nbd://h/?socket", "has no value"),
            ("nbd://h/%zz", "hexadecimal"),
            ("nbd://h/%+1", "hexadecimal"),
            ("nbd://h/%e", "hexadecimal"),
            ("nbd://h/%ff", "not UTF-8"),
            ("nbd://h/a%00b", "no NUL"),
            ("nbd://h/#f", "fragment"),
        ] {
            let e = Uri::parse(text).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains("nbd://host/export"), "{text}: {e}");
        }
        assert!(Uri::is_one("nbd://x") && Uri::is_one("nbds+unix:///") && !Uri::is_one("ip:10.0.0.1"));
    }

    proptest! {
        #[test]
        fn any_text_has_an_answer(text in "(nbds?(\\+unix)?://)?[a-z0-9:/?&=%\\[\\]@#.é-]{0,60}") {
            if let Ok(uri) = Uri::parse(&text) {
                prop_assert!(uri.export.len() <= MAX_STRING);
            }
        }
    }
}
