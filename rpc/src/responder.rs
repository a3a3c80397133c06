//! The promise of one reply.

use crate::error::RpcError;
use crate::json::{MAX_REPLY_BYTES, to_ascii};
use serde::Serialize;
use serde_json::Value;
use std::fmt;

/// A successful result as compact ASCII JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply(pub(crate) String);

impl Reply {
    /// The JSON text.
    pub fn as_json(&self) -> &str {
        &self.0
    }

    /// The result as a value.
    pub fn to_value(&self) -> Value {
        serde_json::from_str(&self.0).unwrap_or_default()
    }
}

/// How a call ended.
pub type Outcome = Result<Reply, RpcError>;

/// Answers one call, now or later, from any thread; exactly once.
///
/// A responder that is dropped without an answer answers with -32603, so that no caller waits for ever. If the
/// caller has gone away, the answer goes nowhere. The result is turned into JSON by the thread that answers.
pub struct Responder {
    method: Box<str>,
    sink: Option<Box<dyn FnOnce(Outcome) + Send>>,
}

impl Responder {
    /// A responder that hands the outcome of `method` to `sink`, on the thread that answers.
    pub fn new(method: &str, sink: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self { method: method.into(), sink: Some(Box::new(sink)) }
    }

    /// The name that was called, which may be an alias.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// The call succeeded with `result`; `true` is the usual result of calls that only do something. A result that
    /// is no JSON or larger than [`MAX_REPLY_BYTES`] becomes -32603.
    pub fn ok(self, result: impl Serialize) {
        let outcome = to_ascii(&result, MAX_REPLY_BYTES).map(Reply);
        self.finish(outcome);
    }

    /// The call failed. The method's name is added to the error's data.
    pub fn err(self, error: RpcError) {
        self.finish(Err(error));
    }

    /// [`Responder::ok`] or [`Responder::err`].
    pub fn reply(self, result: Result<impl Serialize, RpcError>) {
        match result {
            Ok(value) => self.ok(value),
            Err(error) => self.err(error),
        }
    }

    fn finish(mut self, outcome: Outcome) {
        self.deliver(outcome);
    }

    fn deliver(&mut self, outcome: Outcome) {
        if let Some(sink) = self.sink.take() {
            sink(outcome.map_err(|error| error.default_method(&self.method)));
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if self.sink.is_some() {
            let text = format!("Internal error: {} ended without an answer", self.method);
            self.deliver(Err(RpcError::internal(text)));
        }
    }
}

impl fmt::Debug for Responder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Responder").field("method", &self.method).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::mpsc;

    fn responder() -> (Responder, mpsc::Receiver<Outcome>) {
        let (tx, rx) = mpsc::channel();
        (Responder::new("m", move |outcome| tx.send(outcome).unwrap()), rx)
    }

    #[test]
    fn answers_once() {
        let (r, rx) = responder();
        r.ok(json!({"a": "\u{e4}"}));
        assert_eq!(rx.recv().unwrap().unwrap().as_json(), r#"{"a":"\u00e4"}"#);
        assert!(rx.recv().is_err());
    }

    #[test]
    fn errors_get_the_method() {
        let (r, rx) = responder();
        r.err(RpcError::from_errno(17));
        assert_eq!(rx.recv().unwrap().unwrap_err().data.unwrap()["method"], "m");
    }

    #[test]
    fn dropped_is_an_internal_error() {
        let (r, rx) = responder();
        drop(r);
        assert_eq!(rx.recv().unwrap().unwrap_err().code, -32603);
        assert!(rx.recv().is_err());
    }

    #[test]
    fn answers_from_another_thread() {
        let (r, rx) = responder();
        std::thread::spawn(move || r.ok(true)).join().unwrap();
        assert_eq!(rx.recv().unwrap().unwrap().to_value(), json!(true));
    }
}
