//! JSON text that survives a client which decodes every received piece as UTF-8 by itself: ASCII only.

use crate::error::RpcError;
use serde::Serialize;
use serde_json::ser::Formatter;
use std::io;

/// The largest reply in bytes (SPDK `lib/jsonrpc/jsonrpc_internal.h`, `SPDK_JSONRPC_SEND_BUF_SIZE_MAX`).
pub const MAX_REPLY_BYTES: usize = 32 << 20;

/// `value` as compact JSON in which every character beyond ASCII is written as `\uXXXX`.
///
/// # Errors
/// -32603 if `value` cannot be JSON (a map key that is no string) or takes more than `limit` bytes; at most `limit`
/// bytes are ever held.
pub fn to_ascii<T: Serialize + ?Sized>(value: &T, limit: usize) -> Result<String, RpcError> {
    let mut bounded = Bounded { text: Vec::new(), limit, overflow: false };
    let result = value.serialize(&mut serde_json::Serializer::with_formatter(&mut bounded, Ascii));
    if bounded.overflow {
        return Err(RpcError::internal(format!("the reply is larger than {limit} bytes"))
            .hint("ask for fewer objects at a time"));
    }
    result.map_err(|error| RpcError::internal(format!("the reply cannot be written as JSON: {error}")))?;
    String::from_utf8(bounded.text).map_err(|error| RpcError::internal(error.to_string()))
}

/// The compact format, with `\uXXXX` for what is not ASCII.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(|c: char| !c.is_ascii()) {
            let (ascii, tail) = rest.split_at(at);
            out.write_all(ascii.as_bytes())?;
            let mut chars = tail.chars();
            if let Some(c) = chars.next() {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}")?;
                }
            }
            rest = chars.as_str();
        }
        out.write_all(rest.as_bytes())
    }
}

/// A growing buffer that refuses to grow beyond `limit`.
struct Bounded {
    text: Vec<u8>,
    limit: usize,
    overflow: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.text.len() {
            self.overflow = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn other_characters_are_escaped_as_utf16() {
        let value = json!({"n\u{e4}me": "\u{1f4be} d\u{ef}sk\n\"\u{7f}"});
        let text = to_ascii(&value, 1000).unwrap();
        assert_eq!(text, "{\"n\\u00e4me\":\"\\ud83d\\udcbe d\\u00efsk\\n\\\"\u{7f}\"}");
    }

    #[test]
    fn the_limit_is_exact() {
        assert_eq!(to_ascii("abcd", 6).unwrap(), "\"abcd\"");
        assert_eq!(to_ascii("abcde", 6).unwrap_err().code, -32603);
    }

    #[test]
    fn keys_must_be_strings() {
        let map = std::collections::BTreeMap::from([((1, 2), 3)]);
        assert_eq!(to_ascii(&map, 100).unwrap_err().code, -32603);
    }

    proptest! {
        #[test]
        fn ascii_and_back(text in "\\PC*", key in any::<String>()) {
            let value = json!({ key: [text] });
            let out = to_ascii(&value, 1 << 20).unwrap();
            prop_assert!(out.is_ascii());
            prop_assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), value);
        }
    }
}
