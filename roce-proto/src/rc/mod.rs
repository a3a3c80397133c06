//! One reliable connection: requester and responder of a queue pair (IBTA volume 1, chapter 9.7).
//!
//! ```text
//! post_send ─▶ Requester ─ requests ──▶ next_packet ─▶ network ─▶ receive ─▶ Responder ─▶ Memory, Received
//! Sent ◀────── Requester ◀─ receive ◀── network ◀── next_packet ◀─ ACK, NAK, READ responses ─┘   (and vice versa)
//! ```
//!
//! The driver, per turn: `receive` for every packet that came, `post_*` for what the consumer wants, `next_packet` until
//! there is none, and `on_time` when [`Qp::deadline`] has passed. Before it sleeps it calls [`Qp::flush_acks`] and sends
//! what comes of it. Nothing is allocated after [`Qp::new`], and the work per packet does not depend on queue depths.
//!
//! Bytes never pass through: what to send is named by descriptors and read again when a packet is repeated.

mod ack;
mod config;
mod reads;
mod requester;
mod responder;
mod ring;
mod types;
mod window;

pub use config::{Config, MAX_MESSAGE, MAX_READS};
pub use types::{
    AccessError, Completion, Memory, Op, Outgoing, Payload, PostError, ReceivedKind, SendRequest, State,
    Status,
};
pub use window::{MAX_PSNS, PACKET_OVERHEAD};

use crate::{Counter, Counters, Headers, Nanos, Opcode};
use requester::{NEVER, Outcome, Requester};
use responder::Responder;

/// A queue pair. `S` and `R` are the driver's descriptors of send and receive requests.
pub struct Qp<S, R> {
    state: State,
    requester: Requester<S>,
    responder: Responder<R>,
    /// Whose turn it is when both have packets.
    answer_next: bool,
}

impl<S: Copy, R: Copy> Qp<S, R> {
    /// A queue pair for so many outstanding requests. Allocates all it will ever need.
    pub fn new(sq_depth: u32, rq_depth: u32) -> Self {
        Self {
            state: State::Init,
            requester: Requester::new(sq_depth),
            responder: Responder::new(rq_depth),
            answer_next: true,
        }
    }

    /// Makes it ready to send and receive. Ignored unless in [`State::Init`].
    pub fn connect(&mut self, config: Config, now: Nanos) {
        if self.state == State::Init {
            self.requester.connect(&config, now);
            self.responder.connect(&config);
            self.state = State::Ready;
        }
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        self.state
    }

    /// Queues a send request. In [`State::Error`] it is accepted, too: the next [`Qp::on_time`] flushes it, and
    /// [`Qp::deadline`] says "now".
    ///
    /// # Errors
    /// Not queued: full, not connected, longer than [`MAX_MESSAGE`], a READ where none was agreed on.
    pub fn post_send(&mut self, request: SendRequest<S>) -> Result<(), PostError> {
        match self.state {
            State::Init => Err(PostError::WrongState),
            State::Ready | State::Error => self.requester.post(&request),
        }
    }

    /// Queues a receive for a message of at most `capacity` bytes, in any state; in [`State::Error`] as
    /// [`Qp::post_send`].
    ///
    /// # Errors
    /// Not queued: full.
    pub fn post_recv(&mut self, data: R, capacity: u32) -> Result<(), PostError> {
        self.responder.post(data, capacity)
    }

    /// A packet from the peer. It must have been checked: addresses, ICRC, and that `dest_qpn` is this queue pair.
    /// `payload` is without the `pad` bytes behind it.
    #[allow(clippy::too_many_arguments)]
    pub fn receive(
        &mut self,
        now: Nanos,
        headers: &Headers,
        payload: &[u8],
        pad: u8,
        mem: &mut impl Memory<S, R>,
        counters: &Counters,
        out: &mut impl FnMut(Completion<S, R>),
    ) {
        if self.state != State::Ready {
            counters.count(Counter::WrongState);
            return;
        }
        let outcome = match headers.opcode {
            Opcode::Acknowledge => {
                self.requester.acknowledge(now, headers, counters, &mut |data| out(Completion::Sent { data }))
            }
            Opcode::ReadResponseFirst
            | Opcode::ReadResponseMiddle
            | Opcode::ReadResponseLast
            | Opcode::ReadResponseOnly => {
                let place = |of: &S, offset| mem.read_into(of, offset, payload).is_ok();
                self.requester.read_response(now, headers, payload, counters, place, &mut |data| {
                    out(Completion::Sent { data })
                })
            }
            Opcode::AtomicAcknowledge => {
                counters.count(Counter::StaleResponse);
                Outcome::Fine
            }
            _ => {
                if let Some(status) = self.responder.request(now, headers, payload, pad, mem, counters, out) {
                    self.break_off(Status::Flushed, status, out);
                }
                return;
            }
        };
        if let Outcome::Fatal(status) = outcome {
            self.break_off(status, Status::Flushed, out);
        }
    }

    /// The next packet that may go out. Answers and requests take turns, so that neither starves.
    pub fn next_packet(&mut self, now: Nanos, counters: &Counters) -> Option<Outgoing<S>> {
        match self.state {
            State::Init => None,
            State::Error => self.responder.next_packet(now),
            State::Ready if self.answer_next => {
                self.answer_next = false;
                self.responder.next_packet(now).or_else(|| self.requester.next_packet(now, counters))
            }
            State::Ready => {
                self.answer_next = true;
                self.requester.next_packet(now, counters).or_else(|| self.responder.next_packet(now))
            }
        }
    }

    /// A packet of [`Qp::next_packet`] could not be sent. Of several, the newest must be given first, and all packets
    /// that came after it must be given, too. It comes out again later.
    pub fn unsent(&mut self, headers: &Headers) {
        match headers.opcode {
            Opcode::Acknowledge
            | Opcode::ReadResponseFirst
            | Opcode::ReadResponseMiddle
            | Opcode::ReadResponseLast
            | Opcode::ReadResponseOnly => self.responder.unsent(headers),
            _ => self.requester.unsent(headers.psn),
        }
    }

    /// [`Qp::next_packet`] would probably give a packet.
    pub fn wants_to_send(&self, now: Nanos) -> bool {
        match self.state {
            State::Init => false,
            State::Error => self.responder.wants_to_send(now),
            State::Ready => self.responder.wants_to_send(now) || self.requester.wants_to_send(now),
        }
    }

    /// When to call [`Qp::on_time`] and [`Qp::next_packet`] if nothing else happens before.
    pub fn deadline(&self) -> Option<Nanos> {
        let deadline = match self.state {
            State::Init => NEVER,
            State::Error if self.requester.has_requests() || self.responder.has_receives() => 0,
            State::Error => self.responder.deadline(),
            State::Ready => self.requester.deadline().min(self.responder.deadline()),
        };
        (deadline != NEVER).then_some(deadline)
    }

    /// The time is `now`: retransmits, gives up, flushes what was posted after an error. Calling it early is harmless.
    pub fn on_time(&mut self, now: Nanos, counters: &Counters, out: &mut impl FnMut(Completion<S, R>)) {
        match self.state {
            State::Init => {}
            State::Ready => {
                if let Outcome::Fatal(status) = self.requester.on_time(now, counters) {
                    self.break_off(status, Status::Flushed, out);
                }
            }
            State::Error => self.break_off(Status::Flushed, Status::Flushed, out),
        }
    }

    /// No packets will be asked for in a while: acknowledgements that wait for company become due now.
    pub fn flush_acks(&mut self) {
        self.responder.hurry();
    }

    /// Breaks the connection off: to [`State::Error`], everything is flushed. An owed ACK or NAK may still come out.
    pub fn fail(&mut self, out: &mut impl FnMut(Completion<S, R>)) {
        self.break_off(Status::Flushed, Status::Flushed, out);
    }

    /// A packet of [`Qp::next_packet`] with [`Payload::Memory`] cannot be sent because that memory is no longer
    /// accessible: the peer gets a remote access error, and the queue pair breaks.
    pub fn refuse_read(
        &mut self,
        headers: &Headers,
        counters: &Counters,
        out: &mut impl FnMut(Completion<S, R>),
    ) {
        if self.state == State::Ready {
            self.responder.refuse_read(headers.psn, counters);
            self.break_off(Status::Flushed, Status::Flushed, out);
        }
    }

    /// Sets the code 0..=31 of the wait that is asked of a peer for which there is no receive.
    pub fn set_min_rnr_timer(&mut self, code: u8) {
        self.responder.set_min_rnr_timer(code);
    }

    /// A request of the peer was executed: it knows of the connection (IBTA 12.9.7.2, "implied RTU").
    pub fn heard_from_peer(&self) -> bool {
        self.responder.heard()
    }

    fn break_off(&mut self, send: Status, receive: Status, out: &mut impl FnMut(Completion<S, R>)) {
        self.state = State::Error;
        // The reason first: users look no further.
        if send == Status::Flushed {
            self.responder.flush(receive, out);
            self.requester.flush(send, out);
        } else {
            self.requester.flush(send, out);
            self.responder.flush(receive, out);
        }
    }
}
