//! Calls of SPDK's methods and their answers.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bdev::spdk::Port;
use rpc::{Responder, RpcError};
use serde_json::{Value, json};

/// The answer to a call.
pub(super) type Answer = Result<Value, RpcError>;

/// Of SPDK's NVMe module. Every call of it has flushes of drives switched on.
pub(super) const NVME_OPTIONS: &str = "bdev_nvme_set_options";

/// Calls that SPDK has not answered yet, over its port.
pub(super) struct Calls {
    port: Port,
    next_id: u64,
    waiting: HashMap<u64, Responder>,
    /// Answers, of which the last may not be whole.
    inbox: Vec<u8>,
}

impl Calls {
    pub(super) fn new(port: Port) -> Self {
        Self { port, next_id: 1, waiting: HashMap::new(), inbox: Vec::new() }
    }

    /// Sends a call; its answer has the number that is returned.
    pub(super) fn send(&mut self, method: &str, params: Option<&Value>) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({"jsonrpc": "2.0", "id": id, "method": method});
        if let Some(params) = params.filter(|p| !p.is_null()) {
            request["params"] = params.clone();
        }
        // SPDK's default acknowledges flushes that the drive never sees, and its saved configurations have that default.
        if method == NVME_OPTIONS && bdev::spdk::flushes_nvme() {
            let params = &mut request["params"];
            if params.is_null() || params.is_object() {
                params["enable_flush"] = Value::Bool(true);
            }
        }
        self.port.send(request.to_string().as_bytes());
        id
    }

    /// Sends a call that `responder` answers.
    pub(super) fn forward(&mut self, method: &str, params: Option<&Value>, responder: Responder) {
        let id = self.send(method, params);
        self.waiting.insert(id, responder);
    }

    /// Calls without an answer yet.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whom an answer is for.
    pub(super) fn responder(&mut self, id: u64) -> Option<Responder> {
        self.waiting.remove(&id)
    }

    /// What SPDK answered since the last turn.
    pub(super) fn turn(&mut self) -> Vec<(u64, Answer)> {
        let outcome = self.port.turn(&mut self.inbox);
        let answers = take_answers(&mut self.inbox);
        if let Err(e) = outcome {
            // Dropped responders answer that there is no answer.
            tracing::error!(error = %e, "SPDK's JSON-RPC failed");
            self.waiting.clear();
        }
        answers
    }
}

/// The whole answers at the head of `inbox`, in order.
fn take_answers(inbox: &mut Vec<u8>) -> Vec<(u64, Answer)> {
    if inbox.is_empty() {
        return Vec::new();
    }
    let mut answers = Vec::new();
    let mut stream = serde_json::Deserializer::from_slice(inbox).into_iter::<Value>();
    let mut used = 0;
    while let Some(Ok(answer)) = stream.next() {
        used = stream.byte_offset();
        let id = answer["id"].as_u64().unwrap_or(0);
        answers.push((id, understand(&answer)));
    }
    inbox.drain(..used);
    if inbox.iter().all(u8::is_ascii_whitespace) {
        inbox.clear();
    }
    answers
}

fn understand(answer: &Value) -> Answer {
    let Some(error) = answer.get("error") else { return Ok(answer["result"].clone()) };
    let message = error["message"].as_str().unwrap_or("no message").to_owned();
    let mut refused = RpcError::new(error["code"].as_i64().unwrap_or(rpc::code::INTERNAL_ERROR), message);
    refused.data = error.get("data").cloned();
    Err(refused)
}

/// How long methods that answer at once may take.
const AT_ONCE: Duration = Duration::from_secs(10);

/// Names of all methods that SPDK's linked modules have. Needs no running SPDK.
pub(super) fn method_names(port: &mut Port) -> std::io::Result<Vec<String>> {
    port.send(br#"{"jsonrpc":"2.0","id":1,"method":"rpc_get_methods","params":{"include_aliases":true}}"#);
    let (mut inbox, start) = (Vec::new(), Instant::now());
    loop {
        port.turn(&mut inbox)?;
        match take_answers(&mut inbox).pop() {
            Some((_, Ok(names))) => return Ok(serde_json::from_value(names)?),
            Some((_, Err(e))) => return Err(std::io::Error::other(e)),
            None if start.elapsed() > AT_ONCE => return Err(std::io::ErrorKind::TimedOut.into()),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_pieces() {
        let text = "{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":[\"a\"]}\n{\"jsonrpc\":\"2.0\",\"id\":2,\"error\":{\"code\":-19,\"message\":\"No such device\"}}\n";
        for cut in 0..text.len() {
            let mut inbox = text.as_bytes()[..cut].to_vec();
            let mut answers = take_answers(&mut inbox);
            inbox.extend_from_slice(&text.as_bytes()[cut..]);
            answers.extend(take_answers(&mut inbox));
            assert_eq!(answers.len(), 2, "cut at {cut}");
            assert_eq!(answers[0], (1, Ok(json!(["a"]))));
            assert_eq!(answers[1].1.as_ref().unwrap_err().code, -19);
            assert!(inbox.is_empty());
        }
    }
}
