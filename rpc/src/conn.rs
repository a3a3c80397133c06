//! One connection: its decoder, the replies it waits for, and what is still to be sent.

use crate::error::RpcError;
use crate::json::{MAX_REPLY_BYTES, to_ascii};
use crate::responder::Outcome;
use crate::wire::Decoder;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde_json::Value;
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;

/// While more than this waits to be sent, no further request is started.
const HIGH_WATER_BYTES: usize = 1 << 20;
/// A peer that lets more than this pile up is cut off. Reached only by many large deferred replies at a time.
const MAX_QUEUED_BYTES: usize = 2 * MAX_REPLY_BYTES;
/// While more requests than this wait for their replies, no further one is started. One batch may exceed it.
const MAX_IN_FLIGHT: usize = 256;

/// Where the outcome of a request belongs.
#[derive(Debug)]
pub(crate) struct ReplyTo {
    /// Slot of the connection in the server.
    pub(crate) slot: usize,
    /// Tells the connection from later ones in the same slot.
    pub(crate) generation: u64,
    /// Batch and position in it.
    pub(crate) batch: Option<(u64, usize)>,
    /// The request's id; `Null` for notifications.
    pub(crate) id: Value,
}

/// The replies of a batch, which are sent when all are there.
struct Batch {
    replies: Vec<Option<String>>,
    missing: usize,
}

/// What happens to the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Open,
    /// The peer has finished sending and all of it is decoded; it still gets its replies.
    HalfClosed,
    /// After a parse error: closed as soon as what is queued has been sent.
    Closing,
    /// To be removed.
    Dead,
}

pub(crate) struct Connection {
    pub(crate) fd: OwnedFd,
    pub(crate) generation: u64,
    pub(crate) decoder: Decoder,
    /// Whether requests may wait in the decoder, where epoll does not see them, for [`Connection::may_start`].
    pub(crate) held_back: bool,
    /// What epoll has been told to watch: (readable, writable).
    pub(crate) watched: (bool, bool),
    life: Life,
    /// Nobody reads what is sent.
    peer_gone: bool,
    queue: VecDeque<Vec<u8>>,
    /// Bytes of the first buffer in `queue` that have been sent.
    sent: usize,
    queued_bytes: usize,
    in_flight: usize,
    batches: HashMap<u64, Batch>,
    next_batch: u64,
}

impl Connection {
    pub(crate) fn new(fd: OwnedFd, generation: u64) -> Self {
        Self {
            fd,
            generation,
            decoder: Decoder::new(),
            held_back: false,
            watched: (true, false),
            life: Life::Open,
            peer_gone: false,
            queue: VecDeque::new(),
            sent: 0,
            queued_bytes: 0,
            in_flight: 0,
            batches: HashMap::new(),
            next_batch: 0,
        }
    }

    /// Whether a further request may be started.
    pub(crate) fn may_start(&self) -> bool {
        matches!(self.life, Life::Open | Life::HalfClosed)
            && self.queued_bytes <= HIGH_WATER_BYTES
            && (self.in_flight < MAX_IN_FLIGHT || self.peer_gone)
    }

    /// What epoll should watch.
    pub(crate) fn wants(&self) -> (bool, bool) {
        (self.life == Life::Open && self.may_start(), self.queued_bytes > 0)
    }

    /// Whether nothing more can come out of this connection.
    pub(crate) fn is_over(&self) -> bool {
        match self.life {
            Life::Open => false,
            Life::HalfClosed => self.peer_gone || (self.in_flight == 0 && self.queued_bytes == 0),
            Life::Closing => self.queued_bytes == 0,
            Life::Dead => true,
        }
    }

    /// The peer has closed both directions. What it sent before is still received and executed, but no reply goes
    /// out any more.
    pub(crate) fn hung_up(&mut self) {
        self.peer_gone = true;
        self.drop_queue();
    }

    fn drop_queue(&mut self) {
        self.queue.clear();
        self.sent = 0;
        self.queued_bytes = 0;
    }

    /// Reads once, into a decoder that has no complete message left. Returns whether bytes came.
    pub(crate) fn receive(&mut self, scratch: &mut [u8]) -> bool {
        if self.life != Life::Open {
            return false;
        }
        let room = self.decoder.room().min(scratch.len());
        match rustix::net::recv(&self.fd, &mut scratch[..room], RecvFlags::empty()) {
            Ok((0, _)) => self.life = Life::HalfClosed,
            Ok((n, _)) => {
                self.decoder.push(&scratch[..n]);
                return true;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.life = Life::Dead,
        }
        false
    }

    /// Counts a request that has been started.
    pub(crate) fn started(&mut self, requests: usize) {
        self.in_flight += requests;
    }

    /// Makes room for the replies of a batch of `len` requests and returns its number.
    pub(crate) fn open_batch(&mut self, len: usize) -> u64 {
        let number = self.next_batch;
        self.next_batch += 1;
        self.batches.insert(number, Batch { replies: vec![None; len], missing: len });
        number
    }

    /// Takes the outcome of a request that was counted by [`Connection::started`].
    pub(crate) fn finished(&mut self, batch: Option<(u64, usize)>, id: &Value, outcome: Outcome) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let reply = reply_text(id, outcome);
        let Some((number, position)) = batch else {
            if let Some(text) = reply {
                self.enqueue(text);
            }
            return;
        };
        let Some(batch) = self.batches.get_mut(&number) else { return };
        batch.replies[position] = reply;
        batch.missing -= 1;
        if batch.missing == 0
            && let Some(batch) = self.batches.remove(&number)
        {
            self.enqueue_batch(batch);
        }
    }

    /// Answers -32700 to nobody in particular; the connection ends when that has been sent.
    pub(crate) fn parse_error(&mut self, error: RpcError) {
        if let Some(text) = reply_text(&Value::Null, Err(error)) {
            self.enqueue(text);
        }
        self.life = Life::Closing;
    }

    /// A batch of notifications has no reply at all (JSON-RPC 2.0 section 6).
    fn enqueue_batch(&mut self, batch: Batch) {
        let replies: Vec<String> = batch.replies.into_iter().flatten().collect();
        let bytes: usize = replies.iter().map(|reply| reply.len() + 1).sum();
        if replies.is_empty() {
            return;
        }
        if bytes + 1 > MAX_REPLY_BYTES {
            let error = RpcError::internal(format!(
                "the replies to the batch have more than {MAX_REPLY_BYTES} bytes"
            ))
            .hint("the requests have been executed; send smaller batches");
            if let Some(text) = reply_text(&Value::Null, Err(error)) {
                self.enqueue(text);
            }
            return;
        }
        self.enqueue(format!("[{}]", replies.join(",")));
    }

    fn enqueue(&mut self, text: String) {
        if self.peer_gone {
            return;
        }
        let mut bytes = text.into_bytes();
        bytes.push(b'\n');
        self.queued_bytes += bytes.len();
        self.queue.push_back(bytes);
        if self.queued_bytes > MAX_QUEUED_BYTES {
            tracing::warn!(
                bytes = self.queued_bytes,
                "RPC client does not read its replies; connection closed"
            );
            self.life = Life::Dead;
        }
    }

    /// Sends as much as the peer takes now.
    pub(crate) fn flush(&mut self) {
        while let Some(buffer) = self.queue.front() {
            match rustix::net::send(&self.fd, &buffer[self.sent..], SendFlags::NOSIGNAL) {
                Ok(n) => {
                    self.sent += n;
                    self.queued_bytes -= n;
                    if self.sent == buffer.len() {
                        self.queue.pop_front();
                        self.sent = 0;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => return self.hung_up(),
            }
        }
    }

    /// Before closing: unread bytes would make the peer see a reset after the last reply.
    pub(crate) fn discard_input(&self, scratch: &mut [u8]) {
        for _ in 0..16 {
            match rustix::net::recv(&self.fd, &mut *scratch, RecvFlags::empty()) {
                Ok((n, _)) if n > 0 => {}
                _ => return,
            }
        }
    }
}

/// The reply object; `None` for a successful notification.
fn reply_text(id: &Value, outcome: Outcome) -> Option<String> {
    // An id came in with at most `MAX_REQUEST_BYTES`, so that it always fits.
    let id_text = to_ascii(id, MAX_REPLY_BYTES).unwrap_or_else(|_| "null".to_owned());
    let head = format!("{{\"jsonrpc\":\"2.0\",\"id\":{id_text},");
    let error = match outcome {
        Ok(_) if id.is_null() => return None,
        Ok(reply) if head.len() + reply.0.len() + 20 <= MAX_REPLY_BYTES => {
            return Some(head + "\"result\":" + &reply.0 + "}");
        }
        Ok(_) => RpcError::internal(format!("the reply is larger than {MAX_REPLY_BYTES} bytes")),
        Err(error) => error,
    };
    let text = to_ascii(&error, MAX_REPLY_BYTES / 2)
        .unwrap_or_else(|_| "{\"code\":-32603,\"message\":\"the error text is too large\"}".to_owned());
    Some(head + "\"error\":" + &text + "}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::responder::Reply;
    use serde_json::json;

    fn connection() -> (Connection, std::os::unix::net::UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Connection::new(ours.into(), 0), theirs)
    }

    fn queued(connection: &Connection) -> Vec<String> {
        connection.queue.iter().map(|b| String::from_utf8(b.clone()).unwrap()).collect()
    }

    #[test]
    fn replies_have_the_order_of_members_of_spdk() {
        assert_eq!(
            reply_text(&json!("\u{e4}"), Ok(Reply("true".into()))).unwrap(),
            r#"{"jsonrpc":"2.0","id":"\u00e4","result":true}"#
        );
        assert_eq!(
            reply_text(&Value::Null, Err(RpcError::new(-5, "x"))).unwrap(),
            r#"{"jsonrpc":"2.0","id":null,"error":{"code":-5,"message":"x"}}"#
        );
        assert_eq!(reply_text(&Value::Null, Ok(Reply("true".into()))), None);
    }

    #[test]
    fn batch_is_answered_when_complete_in_the_order_of_requests() {
        let (mut c, _peer) = connection();
        let batch = c.open_batch(3);
        c.started(3);
        c.finished(Some((batch, 2)), &json!(3), Ok(Reply("3".into())));
        c.finished(Some((batch, 1)), &Value::Null, Ok(Reply("2".into())));
        assert_eq!(queued(&c).len(), 0);
        c.finished(Some((batch, 0)), &json!(1), Ok(Reply("1".into())));
        assert_eq!(
            queued(&c),
            ["[{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":1},{\"jsonrpc\":\"2.0\",\"id\":3,\"result\":3}]\n"]
        );
    }

    #[test]
    fn full_queue_and_many_requests_stop_reading() {
        let (mut c, _peer) = connection();
        c.started(MAX_IN_FLIGHT);
        assert_eq!(c.wants(), (false, false));
        let big = format!("\"{}\"", "x".repeat(HIGH_WATER_BYTES));
        for _ in 0..MAX_IN_FLIGHT {
            c.finished(None, &Value::Null, Ok(Reply("1".into())));
        }
        assert_eq!(c.wants(), (true, false));
        c.finished(None, &json!(1), Ok(Reply(big)));
        assert_eq!(c.wants(), (false, true));
    }

    #[test]
    fn replies_that_nobody_reads_are_bounded() {
        let (mut c, _peer) = connection();
        let big = format!("\"{}\"", "x".repeat(MAX_REPLY_BYTES - 100));
        for _ in 0..3 {
            assert!(!c.is_over());
            c.finished(None, &json!(1), Ok(Reply(big.clone())));
        }
        assert!(c.is_over());
    }

    #[test]
    fn too_large_a_result_becomes_an_error() {
        let reply = Reply(format!("\"{}\"", "x".repeat(MAX_REPLY_BYTES - 2)));
        let text = reply_text(&json!(1), Ok(reply)).unwrap();
        assert!(text.contains("-32603"), "{}", &text[..100]);
    }
}
