//! Answers of methods about remote bdevs.

use std::fmt::Display;

use rpc::{Responder, RpcError};
use serde::Serialize;
use serde_json::{Map, Value};

/// Why a call did nothing.
pub(super) trait Refusal: Display {
    /// As a positive Linux errno.
    fn errno(&self) -> i32;
    /// What the caller can do about it.
    fn hint(&self) -> Option<&'static str>;
    /// The parameter that cannot be, if it is that.
    fn parameter(&self) -> Option<&'static str>;
}

/// As RPC says it.
pub(super) fn error(method: &str, e: &impl Refusal) -> RpcError {
    let text = format!("{method}: {e}");
    let error = match e.parameter() {
        Some(parameter) => RpcError::invalid_params(text).param(parameter),
        None => RpcError::errno(e.errno(), text),
    };
    let error = error.method(method);
    match e.hint() {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// A parameter of a call that cannot be.
pub(super) fn invalid(method: &str, param: &str, text: impl Into<String>) -> RpcError {
    RpcError::invalid_params(format!("{method}: {param}: {}", text.into())).method(method).param(param)
}

/// Answers with what comes of it.
pub(super) fn answer<T: Serialize + 'static, E: Refusal + 'static>(
    r: Responder,
) -> Box<dyn FnOnce(Result<T, E>)> {
    Box::new(move |result| {
        let method = r.method().to_owned();
        r.reply(result.map_err(|e| error(&method, &e)));
    })
}

/// Answers with true.
pub(super) fn answer_true<E: Refusal + 'static>(r: Responder) -> Box<dyn FnOnce(Result<(), E>)> {
    let answer = answer::<bool, E>(r);
    Box::new(move |result| answer(result.map(|()| true)))
}

/// Drops what is not known.
pub(super) fn known(value: Value) -> Value {
    match value {
        Value::Object(all) => all.into_iter().filter(|(_, v)| !v.is_null()).collect::<Map<_, _>>().into(),
        other => other,
    }
}
