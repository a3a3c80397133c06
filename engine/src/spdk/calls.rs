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
    /// `None` after SPDK closed it: the next call opens another one.
    port: Option<Port>,
    next_id: u64,
    waiting: HashMap<u64, Waiting>,
    /// Calls that could not be sent.
    failed: Vec<(u64, RpcError)>,
    /// Answers, of which the last may not be whole.
    inbox: Vec<u8>,
}

/// A call and whom its answer is for.
pub(super) struct Waiting {
    pub(super) caller: Caller,
    /// When it was sent.
    pub(super) since: Instant,
    /// Names that its parameters have for the bdev that it makes, if it makes one.
    names: Vec<String>,
}

pub(super) enum Caller {
    /// A client, or a call of this program's configuration.
    Responder(Responder),
    /// SPDK's configuration, or somebody who waits for the number.
    Own,
}

/// A call and its answer.
pub(super) struct Answered {
    pub(super) id: u64,
    pub(super) call: Waiting,
    pub(super) answer: Answer,
}

impl Calls {
    pub(super) fn new(port: Port) -> Self {
        Self { port: Some(port), next_id: 1, waiting: HashMap::new(), failed: Vec::new(), inbox: Vec::new() }
    }

    /// Sends a call; its answer has the number that is returned, and comes in any case.
    pub(super) fn send(&mut self, method: &str, params: Option<&Value>, caller: Caller) -> u64 {
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
        self.waiting.insert(id, Waiting { caller, since: Instant::now(), names: names_in_params(params) });
        if let Err(error) = self.post(method, &request) {
            self.failed.push((id, error));
        }
        id
    }

    fn post(&mut self, method: &str, request: &Value) -> Result<(), RpcError> {
        let (text, limits) = (request.to_string(), bdev::spdk::limits());
        if text.len() > limits.bytes || values(request) > limits.values {
            let text = format!(
                "{method}: the request has {} bytes and {} values; SPDK takes {} bytes and {} values: make several calls of it",
                text.len(),
                values(request),
                limits.bytes,
                limits.values
            );
            return Err(RpcError::errno(E2BIG, text));
        }
        if self.port.is_none() {
            let port = Port::open();
            self.port =
                Some(port.map_err(|e| RpcError::internal(format!("{method}: SPDK's JSON-RPC: {e}")))?);
        }
        if let Some(port) = &mut self.port {
            port.send(text.as_bytes());
        }
        Ok(())
    }

    /// Calls that will be answered soon, or may: SPDK works for them without pause. What takes longer (a device that hangs)
    /// is looked after as anything else.
    pub(super) fn working(&self) -> bool {
        self.waiting.values().any(|call| call.since.elapsed() < WORK)
    }

    /// What was answered since the last turn.
    pub(super) fn turn(&mut self) -> Vec<Answered> {
        let mut answers: Vec<(u64, Answer)> = self.failed.drain(..).map(|(id, e)| (id, Err(e))).collect();
        if let Some(port) = &mut self.port {
            let moved = port.turn(&mut self.inbox);
            let taken = take_answers(&mut self.inbox, &mut answers);
            if let Err(e) = moved.and(taken) {
                self.lost(&e, &mut answers);
            }
        }
        let found = |(id, answer): (u64, Answer)| {
            let call = self.waiting.remove(&id)?;
            Some(Answered { id, call, answer: answer.map_err(explained) })
        };
        answers.into_iter().filter_map(found).collect()
    }

    /// The connection is gone, and with it whatever answers were due.
    #[cold]
    fn lost(&mut self, why: &std::io::Error, answers: &mut Vec<(u64, Answer)>) {
        let said = bdev::spdk::recent_errors();
        tracing::error!(error = %why, spdk = said, "SPDK's JSON-RPC failed; the next call begins anew");
        self.port = None;
        self.inbox.clear();
        let answered: Vec<u64> = answers.iter().map(|(id, _)| *id).collect();
        let text = format!("{why}: whether the call was carried out is not known ({said})");
        for id in self.waiting.keys().filter(|id| !answered.contains(id)) {
            answers.push((*id, Err(RpcError::internal(&text))));
        }
    }
}

impl Answered {
    /// Names of the bdevs that the call made, as far as it is one that makes any: SPDK's methods answer with them, or with
    /// `true` if the caller chose the name.
    pub(super) fn made(&self) -> Vec<&str> {
        match &self.answer {
            Ok(Value::String(name)) => vec![name],
            Ok(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            Ok(Value::Object(made)) => made.get("name").and_then(Value::as_str).into_iter().collect(),
            Ok(Value::Bool(true)) => self.call.names.iter().map(String::as_str).collect(),
            _ => Vec::new(),
        }
    }
}

/// How long SPDK works without pause for a call.
const WORK: Duration = Duration::from_secs(60);

/// SPDK does not say in its answer which parameter it did not understand.
fn explained(error: RpcError) -> RpcError {
    if !error.message.contains("decode_object") {
        return error;
    }
    let (version, said) = (bdev::spdk::version(), bdev::spdk::recent_errors());
    error.hint(format!(
        "SPDK {version} does not take these parameters ({said}); its client of the same release sends what it takes"
    ))
}

/// "Argument list too long".
const E2BIG: i32 = 7;

/// Values as SPDK counts them.
fn values(of: &Value) -> usize {
    match of {
        Value::Array(list) => 2 + list.iter().map(values).sum::<usize>(),
        Value::Object(members) => 2 + members.values().map(|v| 1 + values(v)).sum::<usize>(),
        _ => 1,
    }
}

fn names_in_params(params: Option<&Value>) -> Vec<String> {
    let text = |key: &str| params.and_then(|p| p.get(key)).and_then(Value::as_str).map(str::to_owned);
    // An error bdev is called after its base: `vbdev_error.c`.
    text("name").into_iter().chain(text("base_name").map(|base| bdev::error::name_on(&base))).collect()
}

/// The whole answers at the head of `inbox`, in order.
///
/// # Errors
/// What is there is no JSON.
fn take_answers(inbox: &mut Vec<u8>, answers: &mut Vec<(u64, Answer)>) -> std::io::Result<()> {
    if inbox.is_empty() {
        return Ok(());
    }
    let mut stream = serde_json::Deserializer::from_slice(inbox).into_iter::<Value>();
    let mut used = 0;
    let outcome = loop {
        match stream.next() {
            None => break Ok(()),
            Some(Err(e)) if e.is_eof() => break Ok(()),
            Some(Err(e)) => break Err(std::io::Error::other(format!("SPDK's answer is no JSON: {e}"))),
            Some(Ok(answer)) => {
                used = stream.byte_offset();
                let id = answer["id"].as_u64().unwrap_or(0);
                answers.push((id, understand(&answer)));
            }
        }
    };
    inbox.drain(..used);
    if inbox.iter().all(u8::is_ascii_whitespace) {
        inbox.clear();
    }
    outcome
}

fn understand(answer: &Value) -> Answer {
    let Some(error) = answer.get("error") else { return Ok(answer["result"].clone()) };
    let message = error["message"].as_str().unwrap_or("no message").to_owned();
    let mut refused = RpcError::new(error["code"].as_i64().unwrap_or(rpc::code::INTERNAL_ERROR), message);
    refused.data = error.get("data").cloned();
    Err(refused)
}

/// How long methods that answer at once may take.
pub(super) const AT_ONCE: Duration = Duration::from_secs(10);

/// Names of all methods that SPDK's linked modules have. Needs no running SPDK.
pub(super) fn method_names(port: &mut Port) -> std::io::Result<Vec<String>> {
    port.send(br#"{"jsonrpc":"2.0","id":1,"method":"rpc_get_methods","params":{"include_aliases":true}}"#);
    let (mut inbox, start) = (Vec::new(), Instant::now());
    loop {
        port.turn(&mut inbox)?;
        let mut answers = Vec::new();
        take_answers(&mut inbox, &mut answers)?;
        match answers.pop() {
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
            let mut answers = Vec::new();
            take_answers(&mut inbox, &mut answers).unwrap();
            inbox.extend_from_slice(&text.as_bytes()[cut..]);
            take_answers(&mut inbox, &mut answers).unwrap();
            assert_eq!(answers.len(), 2, "cut at {cut}");
            assert_eq!(answers[0], (1, Ok(json!(["a"]))));
            assert_eq!(answers[1].1.as_ref().unwrap_err().code, -19);
            assert!(inbox.is_empty());
        }
        assert!(take_answers(&mut b"{]".to_vec(), &mut Vec::new()).is_err());
    }

    /// Turns until `count` calls were answered.
    fn answers(calls: &mut Calls, count: usize) -> Vec<Answered> {
        let (mut got, start) = (Vec::new(), Instant::now());
        while got.len() < count {
            got.extend(calls.turn());
            assert!(start.elapsed() < AT_ONCE * 6, "{} of {count} answers", got.len());
        }
        got
    }

    /// SPDK closes the connection for what it cannot read. Every call is answered, and the next one works. Needs no running
    /// SPDK, as `method_names`.
    #[test]
    fn a_lost_connection_ends_its_calls_only() {
        let mut calls = Calls::new(Port::open().unwrap());
        calls.port.as_mut().unwrap().send(b"{]");
        let lost = calls.send("rpc_get_methods", None, Caller::Own);
        let [answered] = answers(&mut calls, 1).try_into().ok().unwrap();
        assert_eq!((answered.id, answered.answer.is_err()), (lost, true));
        assert!(calls.waiting.is_empty() && calls.turn().is_empty());

        let limits = bdev::spdk::limits();
        let long = Value::from("x".repeat(limits.bytes));
        let many = Value::from(vec![0; limits.values]);
        for params in [&long, &many] {
            calls.send("rpc_get_methods", Some(params), Caller::Own);
        }
        let next = calls.send("rpc_get_methods", None, Caller::Own);
        for answered in answers(&mut calls, 3) {
            let code = answered.answer.as_ref().map_err(|e| e.code).err();
            assert_eq!(code, (answered.id != next).then_some(-i64::from(E2BIG)), "{:?}", answered.answer);
        }
    }

    #[test]
    fn values_are_counted_as_by_spdk() {
        // `test_parse_nesting` and others of SPDK's test/unit/lib/json: both ends of a list, and each name, are one each.
        for (value, count) in
            [(json!(1), 1), (json!([]), 2), (json!({"a": [1, 2], "b": {}}), 2 + 1 + 4 + 1 + 2)]
        {
            assert_eq!(values(&value), count, "{value}");
        }
    }

    #[test]
    fn what_a_call_made_is_what_it_answers() {
        let made = |params: Value, answer: Value| {
            let call =
                Waiting { caller: Caller::Own, since: Instant::now(), names: names_in_params(Some(&params)) };
            let answered = Answered { id: 1, call, answer: Ok(answer) };
            answered.made().into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(made(json!({"name": "Nvme0"}), json!(["Nvme0n1", "Nvme0n2"])), ["Nvme0n1", "Nvme0n2"]);
        assert_eq!(made(json!({"lvol_name": "v"}), json!("some-uuid")), ["some-uuid"]);
        assert_eq!(made(json!({"name": "R"}), json!(true)), ["R"]);
        assert_eq!(made(json!({"base_name": "B"}), json!(true)), ["EE_B"]);
        assert!(made(json!({"name": "R"}), json!([{"name": "R"}])).is_empty());
    }
}
