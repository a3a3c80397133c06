//! The error object of a reply.

use crate::errno::{errno_name, strerror};
use crate::table::State;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Error codes that are not negated error numbers (JSON-RPC 2.0 section 5.1; SPDK `include/spdk/jsonrpc.h`).
pub mod code {
    /// The bytes are no JSON; the connection is closed.
    pub const PARSE_ERROR: i64 = -32700;
    /// JSON, but no request object.
    pub const INVALID_REQUEST: i64 = -32600;
    /// No such method, or not in the allow-list.
    pub const METHOD_NOT_FOUND: i64 = -32601;
    /// A parameter is unknown, missing or of the wrong type.
    pub const INVALID_PARAMS: i64 = -32602;
    /// The server failed.
    pub const INTERNAL_ERROR: i64 = -32603;
    /// The method may not be called in the present state (SPDK `SPDK_JSONRPC_ERROR_INVALID_STATE`).
    pub const INVALID_STATE: i64 = -1;
}

/// The `error` member of a reply: `{"code", "message", "data"?}`.
///
/// `message` is for people: it names the method, the parameter or object, and what would be right. `data`, where
/// present, is an object for programs with some of `method`, `param`, `object`, `errno`, `errno_name`, `state`,
/// `hint`; SPDK's client prints it as well.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} (code {code})")]
pub struct RpcError {
    /// One of [`code`], or a negated error number such as -19.
    pub code: i64,
    /// Text for people.
    pub message: String,
    /// Details for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
}

impl RpcError {
    /// An error with any code and no data.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), data: None }
    }

    /// -32700, see [`code::PARSE_ERROR`]. `why` follows SPDK's text.
    pub fn parse_error(why: impl std::fmt::Display) -> Self {
        Self::new(code::PARSE_ERROR, format!("Parse error: {why}"))
    }

    /// -32600, see [`code::INVALID_REQUEST`]. `why` follows SPDK's text.
    pub fn invalid_request(why: impl std::fmt::Display) -> Self {
        Self::new(code::INVALID_REQUEST, format!("Invalid request: {why}"))
    }

    /// -32601, with the most similar method name, if there is one, as the hint.
    pub fn method_not_found(method: &str, similar: Option<&str>) -> Self {
        let error = |text| Self::new(code::METHOD_NOT_FOUND, text).method(method);
        match similar {
            Some(similar) => error(format!("Method not found: '{method}'; did you mean '{similar}'?"))
                .hint(format!("did you mean '{similar}'?")),
            None => error(format!("Method not found: '{method}'"))
                .hint("rpc_get_methods lists what this server offers"),
        }
    }

    /// -32602. `message` names the method, the parameter and what would be right.
    pub fn invalid_params(message: impl Into<String>) -> Self {
        Self::new(code::INVALID_PARAMS, message)
    }

    /// -32603: not the caller's fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(code::INTERNAL_ERROR, message)
    }

    /// `errno` (positive, as in `errno(3)`) as code `-errno`, with `errno` and `errno_name` in the data.
    pub fn errno(errno: i32, message: impl Into<String>) -> Self {
        let error = Self::new(-i64::from(errno), message).with("errno", errno);
        match errno_name(errno) {
            Some(name) => error.with("errno_name", name),
            None => error,
        }
    }

    /// Like [`RpcError::errno`] with the text of `strerror(3)`, as most SPDK modules answer.
    pub fn from_errno(errno: i32) -> Self {
        Self::errno(errno, strerror(errno))
    }

    /// -1 with SPDK's text: `method` may not be called in `state`.
    pub fn wrong_state(method: &str, state: State) -> Self {
        let (text, hint) = match state {
            State::Startup => (
                "Method may only be called after framework is initialized using framework_start_init RPC.",
                "call framework_start_init first",
            ),
            State::Runtime => (
                "Method may only be called before framework is initialized. Use --wait-for-rpc command line \
                 parameter and then issue this RPC before the framework_start_init RPC.",
                "put the call into the configuration file, or restart with --wait-for-rpc",
            ),
        };
        Self::new(code::INVALID_STATE, text).method(method).with("state", state.name()).hint(hint)
    }

    /// Adds one member to `data`, replacing an earlier one of that name.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.members().insert(key.to_owned(), value.into());
        self
    }

    /// Adds the method's name to the data. The method table does this by itself for every error of a handler.
    pub fn method(self, method: &str) -> Self {
        self.with("method", method)
    }

    /// Adds the parameter's name to the data.
    pub fn param(self, param: &str) -> Self {
        self.with("param", param)
    }

    /// Adds the object that the error is about: `.object("bdev", "M0")` gives `"object": {"bdev": "M0"}`.
    pub fn object(self, kind: &str, name: impl Into<String>) -> Self {
        let object = Map::from_iter([(kind.to_owned(), Value::from(name.into()))]);
        self.with("object", object)
    }

    /// Adds what the caller can do about it.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        self.with("hint", hint.into())
    }

    /// Adds the method's name unless some is there already.
    pub(crate) fn default_method(mut self, method: &str) -> Self {
        self.members().entry("method").or_insert_with(|| method.into());
        self
    }

    /// `data` as an object; data of another kind becomes its member `detail`.
    fn members(&mut self) -> &mut Map<String, Value> {
        if !matches!(self.data, Some(Value::Object(_))) {
            let mut map = Map::new();
            if let Some(detail) = self.data.take() {
                map.insert("detail".to_owned(), detail);
            }
            self.data = Some(Value::Object(map));
        }
        match &mut self.data {
            Some(Value::Object(map)) => map,
            _ => unreachable!("made an object above"),
        }
    }
}

/// An I/O error of the operating system as code `-errno`; -5 (EIO) if it has no number.
impl From<std::io::Error> for RpcError {
    fn from(error: std::io::Error) -> Self {
        Self::errno(error.raw_os_error().unwrap_or(5), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errno_becomes_a_negative_code_with_its_name() {
        let error = RpcError::from_errno(19).object("bdev", "M0").hint("bdev_get_bdevs lists the bdevs");
        assert_eq!(
            serde_json::to_value(&error).unwrap(),
            json!({"code": -19, "message": "No such device", "data": {
                "errno": 19, "errno_name": "ENODEV", "object": {"bdev": "M0"},
                "hint": "bdev_get_bdevs lists the bdevs"}})
        );
    }

    #[test]
    fn error_without_data_has_no_data_member() {
        let text = serde_json::to_string(&RpcError::new(-5, "x")).unwrap();
        assert_eq!(text, r#"{"code":-5,"message":"x"}"#);
    }

    #[test]
    fn data_of_another_kind_is_kept() {
        let error = RpcError { data: Some(json!([1])), ..RpcError::new(-5, "x") }.default_method("m");
        assert_eq!(error.data, Some(json!({"detail": [1], "method": "m"})));
    }
}
