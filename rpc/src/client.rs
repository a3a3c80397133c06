//! A small blocking client, for tests and tools.

use crate::error::RpcError;
use crate::json::{MAX_REPLY_BYTES, to_ascii};
use crate::scan::{Limits, Scanner};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// No limit of their own: the server's limit on a reply's bytes bounds its values.
const LIMITS: Limits = Limits { depth: 64, values: u32::MAX };

/// A connection to a JSON-RPC server on a Unix socket. Calls wait for their replies, 60 s at most unless
/// [`Client::set_timeout`] says otherwise.
///
/// Failures of the connection are reported like those of the server, with code `-errno` (or -32603 for a reply that
/// makes no sense) and the socket's path in the message.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: UnixStream,
    buffer: Vec<u8>,
    next_id: u64,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// Code `-errno`: -2 (no such socket), -111 (nobody listens), -13 (not permitted).
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, RpcError> {
        let path = path.as_ref().to_owned();
        let stream = UnixStream::connect(&path).map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(5);
            RpcError::errno(errno, format!("cannot connect to {}: {error}", path.display()))
                .hint("is the server running, and does it use this socket (-r)?")
        })?;
        let mut client = Self { path, stream, buffer: Vec::new(), next_id: 1 };
        client.set_timeout(Some(Duration::from_secs(60)))?;
        Ok(client)
    }

    /// How long a call waits for bytes of its reply; `None` is for ever.
    ///
    /// # Errors
    /// -22 if the time is zero.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<(), RpcError> {
        self.stream.set_read_timeout(timeout).map_err(|_| RpcError::errno(22, "a timeout must not be zero"))
    }

    /// Calls `method` with `params`; `Value::Null` stands for none.
    ///
    /// # Errors
    /// What the server answered, or code `-errno` if there was no answer.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, RpcError> {
        let id = self.next_id;
        self.next_id += 1;
        self.send(&request(method, params, Some(id)))?;
        let reply = self.receive()?;
        let answered = reply.get("id").cloned().unwrap_or_default();
        // Null: the server could not read our id.
        if answered != json!(id) && !answered.is_null() {
            return Err(self.nonsense(&format!("a reply to request {answered} instead of {id}")));
        }
        self.outcome(reply)
    }

    /// Calls all of `calls` as one batch and returns the outcomes in the same order.
    ///
    /// # Errors
    /// The batch as a whole failed. Failures of single calls are in the list.
    pub fn call_batch(&mut self, calls: &[(&str, Value)]) -> Result<Vec<Result<Value, RpcError>>, RpcError> {
        let first = self.next_id;
        self.next_id += calls.len() as u64;
        let requests: Vec<Value> =
            calls.iter().zip(first..).map(|((m, p), id)| request(m, p.clone(), Some(id))).collect();
        self.send(&Value::Array(requests))?;
        match self.receive()? {
            Value::Array(mut replies) if replies.len() == calls.len() => {
                replies.sort_by_key(|reply| reply["id"].as_u64());
                Ok(replies.into_iter().map(|reply| self.outcome(reply)).collect())
            }
            Value::Array(replies) => {
                Err(self.nonsense(&format!("{} replies to {} calls", replies.len(), calls.len())))
            }
            reply => match self.outcome(reply) {
                Err(error) => Err(error),
                Ok(_) => Err(self.nonsense("one result for a batch")),
            },
        }
    }

    /// Sends a notification: no reply is awaited.
    ///
    /// # Errors
    /// Code `-errno` if it could not be sent.
    pub fn notify(&mut self, method: &str, params: Value) -> Result<(), RpcError> {
        self.send(&request(method, params, None))
    }

    /// Sends any JSON.
    fn send(&mut self, value: &Value) -> Result<(), RpcError> {
        let text = to_ascii(value, MAX_REPLY_BYTES)? + "\n";
        self.send_bytes(text.as_bytes())
    }

    /// Sends any bytes, for tests of the server.
    ///
    /// # Errors
    /// Code `-errno` if they could not be sent.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), RpcError> {
        self.stream.write_all(bytes).map_err(|error| self.broken(&error))
    }

    /// Waits for one JSON value of any kind, for tests of the server.
    ///
    /// # Errors
    /// Code `-errno` if none came; -104 (ECONNRESET) if the server closed the connection.
    pub fn receive(&mut self) -> Result<Value, RpcError> {
        let mut scanner = Scanner::new(LIMITS);
        let mut scanned = 0;
        let mut piece = [0; 16 << 10];
        loop {
            match scanner.scan(&mut self.buffer[scanned..]) {
                Ok(Some(n)) => {
                    let json: Vec<u8> = self.buffer.drain(..scanned + n).collect();
                    return serde_json::from_slice(&json).map_err(|error| self.nonsense(&error.to_string()));
                }
                Ok(None) => scanned = self.buffer.len(),
                Err((_, what)) => return Err(self.nonsense(&what)),
            }
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(self.broken(&std::io::Error::from_raw_os_error(104))),
                Ok(n) => self.buffer.extend_from_slice(&piece[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(&error)),
            }
        }
    }

    fn outcome(&self, mut reply: Value) -> Result<Value, RpcError> {
        if let Some(error) = reply.get_mut("error").map(Value::take) {
            return Err(
                serde_json::from_value(error).unwrap_or_else(|error| self.nonsense(&error.to_string()))
            );
        }
        match reply.get_mut("result").map(Value::take) {
            Some(result) => Ok(result),
            None => Err(self.nonsense("a reply without result and error")),
        }
    }

    fn broken(&self, error: &std::io::Error) -> RpcError {
        let errno = match error.kind() {
            std::io::ErrorKind::WouldBlock => 110,
            _ => error.raw_os_error().unwrap_or(5),
        };
        RpcError::errno(
            errno,
            format!("no reply from {}: {}", self.path.display(), crate::errno::strerror(errno)),
        )
    }

    fn nonsense(&self, what: &str) -> RpcError {
        RpcError::internal(format!("{} does not speak JSON-RPC 2.0: {what}", self.path.display()))
    }
}

fn request(method: &str, params: Value, id: Option<u64>) -> Value {
    let mut request = json!({"jsonrpc": "2.0", "method": method});
    if !params.is_null() {
        request["params"] = params;
    }
    if let Some(id) = id {
        request["id"] = json!(id);
    }
    request
}
