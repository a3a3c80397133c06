//! From bytes to requests, without I/O: what a connection does with what it receives.
//!
//! [`Decoder::push`] bytes as they come, then take messages with [`Decoder::next_message`] until there is none.
//! Every byte is looked at once by the scanner and once by the parser, however it was cut into pieces.

use crate::error::RpcError;
use crate::scan::{Limits, Scanner};
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

/// The largest request in bytes (SPDK `lib/jsonrpc/jsonrpc_internal.h`, `SPDK_JSONRPC_RECV_BUF_SIZE`).
pub const MAX_REQUEST_BYTES: usize = 256 << 10;
/// The largest number of JSON values in a request, counting scalars, keys, and both ends of arrays and objects
/// (same file, `SPDK_JSONRPC_MAX_VALUES`).
pub const MAX_VALUES: u32 = 8192;
/// The deepest nesting of arrays and objects (SPDK `lib/json/json_parse.c`, `SPDK_JSON_MAX_NESTING_DEPTH`).
pub const MAX_DEPTH: u32 = 64;

const LIMITS: Limits = Limits { depth: MAX_DEPTH, values: MAX_VALUES };

/// A request object that made sense.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The method's name.
    pub method: String,
    /// An object or an array; `null` counts as absent.
    pub params: Option<Value>,
    /// A string, a number, or `Null`: a notification, which gets no reply unless it fails.
    pub id: Value,
}

/// A request object that is refused with `error`, as far as it could be understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// The id to answer to; `Null` if there was none.
    pub id: Value,
    /// -32600 and why.
    pub error: RpcError,
}

/// One JSON value from the peer.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// One request; its reply is one object.
    Single(Result<Request, Refusal>),
    /// A batch of at least one request; its replies form one array.
    Batch(Vec<Result<Request, Refusal>>),
}

impl Message {
    /// How many requests there are in it.
    pub fn requests(&self) -> usize {
        match self {
            Message::Single(_) => 1,
            Message::Batch(items) => items.len(),
        }
    }
}

/// Cuts a stream of bytes into [`Message`]s.
#[derive(Debug)]
pub struct Decoder {
    /// Bytes from the first one of an unfinished value on.
    buffer: Vec<u8>,
    /// Bytes of `buffer` that belong to messages already taken.
    taken: usize,
    /// Bytes of `buffer` that the scanner has seen.
    scanned: usize,
    scanner: Scanner,
    /// Bytes of the stream before the buffer.
    before: u64,
    failed: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self {
            buffer: Vec::new(),
            taken: 0,
            scanned: 0,
            scanner: Scanner::new(LIMITS),
            before: 0,
            failed: false,
        }
    }

    /// How many bytes [`Decoder::push`] would take now: at least one after `next_message` has returned `None`,
    /// unless the decoder has failed.
    pub fn room(&self) -> usize {
        if self.failed { 0 } else { MAX_REQUEST_BYTES - self.buffer.len() }
    }

    /// Takes over a prefix of `bytes` and returns its length, at most [`Decoder::room`].
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.room());
        self.buffer.extend_from_slice(&bytes[..n]);
        n
    }

    /// The next message, or `None` if it is not complete yet.
    ///
    /// # Errors
    /// -32700: the bytes are not JSON or exceed a limit. There is no way to find the beginning of the next message,
    /// so the error is to be sent with id `null` and the connection closed; the decoder returns `None` from now on.
    pub fn next_message(&mut self) -> Option<Result<Message, RpcError>> {
        if self.failed {
            return None;
        }
        let result = match self.scanner.scan(&mut self.buffer[self.scanned..]) {
            Ok(None) => {
                self.scanned = self.buffer.len();
                self.discard_taken();
                if self.room() > 0 {
                    return None;
                }
                Err(RpcError::parse_error(format_args!("a request has more than {MAX_REQUEST_BYTES} bytes"))
                    .hint("split the request"))
            }
            Ok(Some(n)) => {
                let start = self.taken;
                self.taken = self.scanned + n;
                self.scanned = self.taken;
                parse_message(self.buffer[start..self.taken].trim_ascii_start())
            }
            Err((at, what)) => {
                let at = self.before + (self.scanned + at) as u64;
                Err(RpcError::parse_error(format_args!("{what} at byte {at} of this connection")))
            }
        };
        if result.is_err() {
            self.failed = true;
            self.buffer = Vec::new();
        }
        Some(result)
    }

    /// Gives room to the bytes to come. Called only when all complete messages are taken, hence at most one
    /// unfinished message is moved, and only once: afterwards it begins the buffer.
    fn discard_taken(&mut self) {
        if self.scanner.between_values() {
            self.taken = self.buffer.len();
        }
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.before += self.taken as u64;
            self.scanned -= self.taken;
            self.taken = 0;
        }
    }
}

/// One whole JSON value as a message.
fn parse_message(json: &[u8]) -> Result<Message, RpcError> {
    let value = match parse_strict(json) {
        Ok(value) => value,
        // A repeated key: JSON, and the next request can be found.
        Err(error) if error.is_data() => {
            let error = RpcError::invalid_request(error);
            return Ok(Message::Single(Err(Refusal { id: Value::Null, error })));
        }
        Err(error) => return Err(RpcError::parse_error(error)),
    };
    Ok(match value {
        Value::Array(items) if items.is_empty() => Message::Single(Err(Refusal {
            id: Value::Null,
            error: RpcError::invalid_request("a batch must not be empty"),
        })),
        Value::Array(items) => Message::Batch(items.into_iter().map(parse_request).collect()),
        value => Message::Single(parse_request(value)),
    })
}

/// Applies the rules for request objects (JSON-RPC 2.0 section 4; SPDK `lib/jsonrpc/jsonrpc_server.c`).
fn parse_request(value: Value) -> Result<Request, Refusal> {
    let refuse = |id: &Value, why: &str| Refusal { id: id.clone(), error: RpcError::invalid_request(why) };
    let Value::Object(mut object) = value else {
        return Err(refuse(&Value::Null, "a request must be an object"));
    };
    let id = match object.remove("id").unwrap_or(Value::Null) {
        id @ (Value::String(_) | Value::Number(_) | Value::Null) => id,
        _ => return Err(refuse(&Value::Null, "'id' must be a string, a number or null")),
    };
    match object.remove("jsonrpc") {
        None => {}
        Some(Value::String(version)) if version == "2.0" => {}
        Some(_) => return Err(refuse(&id, "'jsonrpc' must be \"2.0\"")),
    }
    let method = match object.remove("method") {
        Some(Value::String(method)) => method,
        Some(_) => return Err(refuse(&id, "'method' must be a string")),
        None => return Err(refuse(&id, "'method' is missing")),
    };
    let params = match object.remove("params") {
        None | Some(Value::Null) => None,
        Some(params @ (Value::Object(_) | Value::Array(_))) => Some(params),
        Some(_) => return Err(refuse(&id, "'params' must be an object or an array")),
    };
    if let Some(key) = object.keys().next() {
        let why = format!("unknown key '{key}'; accepted: jsonrpc, method, params, id");
        return Err(refuse(&id, &why));
    }
    Ok(Request { method, params, id })
}

/// Parses JSON in which no object may have the same key twice. A repeated key is an error of `Category::Data`.
pub(crate) fn parse_strict(json: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice::<Strict>(json).map(|strict| strict.0)
}

/// A value whose objects had no repeated keys.
pub(crate) struct Strict(pub(crate) Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(de: D) -> Result<Self, D::Error> {
        StrictVisitor.deserialize(de).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> DeserializeSeed<'de> for StrictVisitor {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, de: D) -> Result<Value, D::Error> {
        de.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    /// A whole number is one however it is written: 512.0 and 1e3 count as 512 and 1000, as SPDK takes them. Beyond 2^53 a
    /// `f64` does not tell whole numbers apart.
    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        const EXACT: f64 = 9_007_199_254_740_992.0;
        let whole = v.fract() == 0.0 && v.abs() <= EXACT;
        Ok(if whole { (v as i64).into() } else { v.into() })
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(StrictVisitor)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!("key '{key}' is given twice")));
            }
            object.insert(key, map.next_value_seed(StrictVisitor)?);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// Everything that a decoder says about `bytes` when they come in pieces of the given sizes.
    fn decode(bytes: &[u8], mut sizes: impl Iterator<Item = usize>) -> Vec<Result<Message, RpcError>> {
        let mut decoder = Decoder::new();
        let mut out = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let n = sizes.next().unwrap_or(usize::MAX).clamp(1, rest.len());
            let mut piece = &rest[..n];
            rest = &rest[n..];
            while !piece.is_empty() {
                piece = &piece[decoder.push(piece)..];
                while let Some(message) = decoder.next_message() {
                    out.push(message);
                }
                if decoder.room() == 0 {
                    return out;
                }
            }
        }
        out
    }

    fn one(text: &str) -> Result<Message, RpcError> {
        let mut all = decode(text.as_bytes(), std::iter::empty());
        assert_eq!(all.len(), 1, "{text}: {all:?}");
        all.remove(0)
    }

    fn refusal(text: &str) -> Refusal {
        match one(text) {
            Ok(Message::Single(Err(refusal))) => refusal,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn request_with_everything() {
        let message = one(r#"{"jsonrpc":"2.0","method":"m","params":{"a":1},"id":"x"}"#).unwrap();
        let request = Request { method: "m".into(), params: Some(json!({"a": 1})), id: json!("x") };
        assert_eq!(message, Message::Single(Ok(request)));
    }

    #[test]
    fn whole_numbers_count_as_such_however_they_are_written() {
        let text = r#"{"method":"m","params":[512.0,1e3,-2.0,-0.0,1.5,1e300,18446744073709551615],"id":7.0}"#;
        let Ok(Message::Single(Ok(request))) = one(text) else { panic!("a good request") };
        assert_eq!(request.params, Some(json!([512, 1000, -2, 0, 1.5, 1e300, u64::MAX])));
        assert_eq!(request.id, json!(7));
    }

    #[test]
    fn request_with_the_least() {
        for text in [r#"{"method":"m"}"#, r#"{"method":"m","params":null,"id":null}"#] {
            let request = Request { method: "m".into(), params: None, id: Value::Null };
            assert_eq!(one(text).unwrap(), Message::Single(Ok(request)));
        }
    }

    #[test]
    fn requests_against_the_rules_are_refused_with_their_id() {
        for (text, id, why) in [
            (r#"{"method":"m","id":5,"extra":1}"#, json!(5), "'extra'"),
            (r#"{"id":5}"#, json!(5), "'method' is missing"),
            (r#"{"method":1,"id":5}"#, json!(5), "'method' must"),
            (r#"{"method":"m","jsonrpc":"1.0","id":"a"}"#, json!("a"), "\"2.0\""),
            (r#"{"method":"m","jsonrpc":2.0,"id":"a"}"#, json!("a"), "\"2.0\""),
            (r#"{"method":"m","params":7,"id":"a"}"#, json!("a"), "'params'"),
            (r#"{"method":"m","id":[1]}"#, Value::Null, "'id'"),
            (r#"{"method":"m","id":true}"#, Value::Null, "'id'"),
            (r#"{"method":"m","id":1,"id":2}"#, Value::Null, "'id' is given twice"),
            (r#"{"method":"m","params":{"a":1,"a":2}}"#, Value::Null, "'a' is given twice"),
            ("[]", Value::Null, "empty"),
            ("\"text\"", Value::Null, "object"),
            ("12 ", Value::Null, "object"),
            ("null", Value::Null, "object"),
        ] {
            let refusal = refusal(text);
            assert_eq!(refusal.error.code, -32600, "{text}");
            assert_eq!(refusal.id, id, "{text}");
            assert!(refusal.error.message.contains(why), "{text}: {}", refusal.error.message);
        }
    }

    #[test]
    fn batch_keeps_order_and_judges_each_item() {
        let Ok(Message::Batch(items)) = one(r#"[{"method":"a","id":1},7,{"method":"b"}]"#) else {
            panic!("no batch")
        };
        assert_eq!(items.len(), 3);
        assert_eq!(items[0].as_ref().unwrap().method, "a");
        assert_eq!(items[1].as_ref().unwrap_err().error.code, -32600);
        assert_eq!(items[2].as_ref().unwrap().id, Value::Null);
    }

    #[test]
    fn broken_json_is_noticed_at_once_and_ends_the_stream() {
        for text in ["{foo", "hello", "{\"method\":\"m\",}", "[1-2]", "[01]", "[1.]", r#"["\ud800"]"#, "]"] {
            let all = decode(format!("{text} {{\"method\":\"m\"}}").as_bytes(), std::iter::repeat(1));
            assert_eq!(all.len(), 1, "{text}");
            assert_eq!(all[0].as_ref().unwrap_err().code, -32700, "{text}");
        }
        let all = decode(b"[\"\xff\"]", std::iter::empty());
        assert_eq!(all[0].as_ref().unwrap_err().code, -32700);
    }

    #[test]
    fn limits_are_exact() {
        let nested = |n: usize| format!("{{\"method\":\"m\",\"params\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(one(&nested(MAX_DEPTH as usize - 1)).is_ok());
        assert_eq!(one(&nested(MAX_DEPTH as usize)).unwrap_err().code, -32700);
        // The object's two ends, two keys, one string and the array's two ends come on top of the items.
        let items = |n: usize| format!("{{\"method\":\"m\",\"params\":[{}]}}", vec!["1"; n].join(","));
        assert!(one(&items(MAX_VALUES as usize - 7)).is_ok());
        assert_eq!(one(&items(MAX_VALUES as usize - 6)).unwrap_err().code, -32700);
    }

    #[test]
    fn size_limit_holds_for_one_request_and_not_for_the_stream() {
        let fill = |n: usize| format!("{{\"method\":\"{}\"}}", "x".repeat(n));
        let frame = fill(0).len();
        assert!(one(&fill(MAX_REQUEST_BYTES - frame)).is_ok());
        assert_eq!(one(&fill(MAX_REQUEST_BYTES - frame + 1)).unwrap_err().code, -32700);
        let many =
            "\n {\"method\":\"m\"} ".repeat(MAX_REQUEST_BYTES / 8) + &" ".repeat(2 * MAX_REQUEST_BYTES);
        let all = decode(many.as_bytes(), std::iter::repeat(5000));
        assert_eq!(all.len(), MAX_REQUEST_BYTES / 8);
        assert!(all.iter().all(Result::is_ok));
    }

    const STREAM: &str = "{\n  \"jsonrpc\": \"2.0\",\n  \"method\": \"n\u{e4}me\\n\\u00e4\",\n  \"id\": 1\n}\n \
        [{\"method\":\"a\",\"params\":[1.5e3,true,null,\"\\\"}\"]},7]12 /* x */ {\"method\":\"z\"}[]";

    #[test]
    fn every_split_in_two_and_single_bytes_decode_alike() {
        let whole = decode(STREAM.as_bytes(), std::iter::empty());
        assert_eq!(whole.len(), 5);
        for at in 1..STREAM.len() {
            assert_eq!(decode(STREAM.as_bytes(), [at].into_iter()), whole, "split at {at}");
        }
        assert_eq!(decode(STREAM.as_bytes(), std::iter::repeat(1)), whole);
    }

    /// Not a measurement: a quadratic decoder would need many minutes for this.
    #[test]
    fn single_bytes_are_not_quadratic() {
        let text = format!("{{\"method\":\"{}\"}}", "x".repeat(MAX_REQUEST_BYTES - 100));
        assert_eq!(decode(text.repeat(4).as_bytes(), std::iter::repeat(1)).len(), 4);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(sizes in prop::collection::vec(1usize..40, 0..60)) {
            let whole = decode(STREAM.as_bytes(), std::iter::empty());
            prop_assert_eq!(decode(STREAM.as_bytes(), sizes.into_iter()), whole);
        }

        #[test]
        fn garbage_never_panics_and_pieces_do_not_matter(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"{}[]\",:\\/*u 1-ntf\n"[..])], 0..200),
            sizes in prop::collection::vec(1usize..20, 0..60),
        ) {
            let whole = decode(&bytes, std::iter::empty());
            prop_assert_eq!(decode(&bytes, sizes.into_iter()), whole);
        }

        /// What the scanner lets through as a whole value is what the parser accepts, apart from what only the
        /// parser checks; and what the parser accepts, the scanner finds whole.
        #[test]
        fn scanner_agrees_with_parser(
            bytes in prop::collection::vec(prop::sample::select(&b"{}[]\",:1 a"[..]), 1..12),
        ) {
            if bytes.first().is_some_and(|b| b"{[".contains(b)) {
                let parsed = serde_json::from_slice::<Value>(&bytes);
                let scanned = Scanner::new(LIMITS).scan(&mut bytes.clone());
                match parsed {
                    Ok(_) => prop_assert!(matches!(scanned, Ok(Some(_)))),
                    Err(error) if error.is_eof() => prop_assert!(!matches!(scanned, Ok(Some(_)))),
                    Err(_) => {}
                }
            }
        }
    }
}
