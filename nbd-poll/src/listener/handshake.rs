//! One handshake on its socket.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use nbd_proto::haggle::{self, MAX_INPUT, Outcome, ServerHaggle, Settings};
use rustls::ServerConfig;

use super::address::Peer;
use super::identity::{Identity, Seen, Shelf};
use super::link::Socket;
use crate::stream::Moved;
use crate::tls;

/// Steps of one turn, so that one client cannot keep the thread.
const STEPS_PER_TURN: usize = 64;

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// It broke the rules, or there is no other way to refuse what it wants.
    #[error(transparent)]
    Protocol(haggle::Error),
    /// It closed the connection.
    #[error("the client has closed the connection before it chose an export")]
    Closed,
    /// It took too long.
    #[error("no export chosen in time")]
    TimedOut,
    /// As many connections as there may be.
    #[error(
        "it has as many connections as one source may have, or there are as many as max_connections allows"
    )]
    Full,
    /// Another client came, and there are as many handshakes as there may be.
    #[error(
        "it has made room for another client: there are as many handshakes as there may be, and most from where it is"
    )]
    Displaced,
    /// Bytes in the clear where TLS begins.
    #[error("bytes in the clear behind STARTTLS")]
    Plaintext,
    /// There is no TLS between the two.
    #[error("TLS is not established: {0}")]
    Tls(io::Error),
    /// The server ended meanwhile.
    #[error("the server is about to end")]
    Stopped,
    /// The socket failed.
    #[error("the connection has failed: {0}")]
    Failed(#[from] io::Error),
}

/// What a handshake waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Bytes of the client.
    Read,
    /// Room for the answer, or just its next turn.
    Write,
    /// Nothing: it is over.
    Done,
}

#[derive(Debug)]
pub(super) struct Handshake {
    /// `None` only after TLS could not even be begun.
    socket: Option<Socket>,
    pub(super) who: Identity,
    /// For the whole handshake: nothing puts it off.
    pub(super) deadline: Instant,
    /// Something has come from the client since that was last asked.
    spoke: bool,
    /// The turn in which the client last said something, or came.
    pub(super) heard: u64,
    haggle: ServerHaggle,
    /// For STARTTLS, until then.
    tls: Option<Arc<ServerConfig>>,
    /// TLS is being established.
    shaking_hands: bool,
    /// Read and not used yet: never more than the present message of the handshake.
    input: Vec<u8>,
}

impl Handshake {
    pub(super) fn new(
        socket: OwnedFd,
        peer: Peer,
        settings: Settings,
        tls: Option<Arc<ServerConfig>>,
        number: u64,
        deadline: Instant,
    ) -> Self {
        Self {
            socket: Some(Socket::Plain(socket)),
            who: Identity { peer, tls: None },
            deadline,
            spoke: false,
            heard: number,
            haggle: ServerHaggle::new(settings),
            tls,
            shaking_hands: false,
            input: Vec::new(),
        }
    }

    /// Goes on until it has to wait. `number`: of this turn, of all that the acceptor has had.
    pub(super) fn turn(&mut self, number: u64, shelf: &dyn Shelf) -> Result<Progress, HandshakeError> {
        // What TLS reads for itself shows nowhere but in its turns.
        let tls = self.shaking_hands;
        let progress = self.go_on(shelf);
        if std::mem::take(&mut self.spoke) || tls {
            self.heard = number;
        }
        progress
    }

    fn go_on(&mut self, shelf: &dyn Shelf) -> Result<Progress, HandshakeError> {
        for _ in 0..STEPS_PER_TURN {
            if self.shaking_hands && !self.shake_hands()? {
                return Ok(if self.socket()?.flush()? { Progress::Read } else { Progress::Write });
            }
            if !self.send()? {
                return Ok(Progress::Write);
            }
            match self.haggle.outcome() {
                Some(Outcome::StartTls) => {
                    self.start_tls()?;
                    continue;
                }
                Some(_) => return Ok(Progress::Done),
                None => {}
            }
            let seen = Seen { shelf, who: &self.who };
            let used = self.haggle.handle_input(&self.input, &seen).map_err(HandshakeError::Protocol)?;
            self.input.drain(..used);
            let idle = used == 0 && self.haggle.transmit().is_empty() && self.haggle.outcome().is_none();
            if idle && !self.read()? {
                return Ok(Progress::Read);
            }
        }
        Ok(Progress::Write)
    }

    /// The client's socket.
    ///
    /// # Errors
    /// It is gone.
    pub(super) fn socket(&mut self) -> Result<&mut Socket, HandshakeError> {
        self.socket.as_mut().ok_or(HandshakeError::Closed)
    }

    /// What became of it: the socket and how the handshake ended, if it did.
    pub(super) fn into_parts(self) -> (Option<Socket>, Identity, Option<Outcome>) {
        let outcome = self.haggle.outcome().cloned();
        (self.socket, self.who, outcome)
    }

    /// Refuses whatever the client asks for from now on.
    pub(super) fn stop(&mut self) {
        self.haggle.stop();
    }

    /// The client has STARTTLS acknowledged. What it may have sent behind that in the clear is in the socket still,
    /// where TLS finds it and gives up: nobody can slip options of his own in front of the client's.
    fn start_tls(&mut self) -> Result<(), HandshakeError> {
        if !self.input.is_empty() {
            return Err(HandshakeError::Plaintext);
        }
        let config = self.tls.take().ok_or(HandshakeError::Plaintext)?;
        let socket = self.socket.take().ok_or(HandshakeError::Closed)?;
        self.socket = Some(socket.encrypt(config)?);
        self.shaking_hands = true;
        Ok(())
    }

    /// True when TLS is established.
    fn shake_hands(&mut self) -> Result<bool, HandshakeError> {
        let done = self.socket()?.shake_hands().map_err(HandshakeError::Tls)? == tls::Handshake::Done;
        if done {
            self.shaking_hands = false;
            self.who.tls = self.socket()?.identity();
            self.haggle.encrypted();
        }
        Ok(done)
    }

    /// Sends what there is; false if the socket is full.
    fn send(&mut self) -> Result<bool, HandshakeError> {
        while !self.haggle.transmit().is_empty() {
            let socket = self.socket.as_mut().ok_or(HandshakeError::Closed)?;
            match socket.send(self.haggle.transmit())? {
                Moved::Some(n) => self.haggle.transmitted(n),
                Moved::WouldBlock => return Ok(false),
                Moved::End => return Err(HandshakeError::Closed),
            }
        }
        Ok(self.socket()?.flush()?)
    }

    /// Reads what the handshake is missing and not a byte more: what follows belongs to the transmission phase. False
    /// if nothing has come.
    fn read(&mut self) -> Result<bool, HandshakeError> {
        let have = self.input.len();
        let missing = self.haggle.missing(&self.input).min(MAX_INPUT.saturating_sub(have));
        if missing == 0 {
            return Ok(true);
        }
        self.input.resize(have + missing, 0);
        let socket = self.socket.as_mut().ok_or(HandshakeError::Closed)?;
        let result = socket.receive(&mut self.input[have..]);
        self.input.truncate(have + if let Ok(Moved::Some(n)) = result { n } else { 0 });
        match result? {
            Moved::Some(_) => {
                self.spoke = true;
                Ok(true)
            }
            Moved::WouldBlock => Ok(false),
            Moved::End => Err(HandshakeError::Closed),
        }
    }
}
