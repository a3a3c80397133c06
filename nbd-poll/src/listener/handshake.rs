//! One handshake on its socket.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use nbd_proto::haggle::{self, Catalog, MAX_INPUT, Outcome, ServerHaggle, Settings};
use rustix::io::Errno;
use rustix::net::SendFlags;

use super::address::Peer;

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
    #[error("there are as many connections as max_connections allows")]
    Full,
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
    pub(super) socket: OwnedFd,
    pub(super) peer: Peer,
    pub(super) deadline: Instant,
    haggle: ServerHaggle,
    /// Read and not used yet: never more than the present message of the handshake.
    input: Vec<u8>,
}

impl Handshake {
    pub(super) fn new(socket: OwnedFd, peer: Peer, settings: Settings, deadline: Instant) -> Self {
        Self { socket, peer, deadline, haggle: ServerHaggle::new(settings), input: Vec::new() }
    }

    /// Goes on until it has to wait.
    pub(super) fn turn(&mut self, catalog: &dyn Catalog) -> Result<Progress, HandshakeError> {
        for _ in 0..STEPS_PER_TURN {
            if !self.send()? {
                return Ok(Progress::Write);
            }
            if self.haggle.outcome().is_some() {
                return Ok(Progress::Done);
            }
            let used = self.haggle.handle_input(&self.input, catalog).map_err(HandshakeError::Protocol)?;
            self.input.drain(..used);
            if used == 0 && self.haggle.transmit().is_empty() && !self.read()? {
                return Ok(Progress::Read);
            }
        }
        Ok(Progress::Write)
    }

    /// How it ended; after [`Progress::Done`].
    pub(super) fn outcome(&self) -> Option<&Outcome> {
        self.haggle.outcome()
    }

    /// Refuses whatever the client asks for from now on.
    pub(super) fn stop(&mut self) {
        self.haggle.stop();
    }

    /// Sends what there is; false if the socket is full.
    fn send(&mut self) -> Result<bool, HandshakeError> {
        while !self.haggle.transmit().is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.socket, self.haggle.transmit(), flags) {
                Ok(n) => self.haggle.transmitted(n),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(HandshakeError::Closed),
                Err(e) => return Err(HandshakeError::Failed(e.into())),
            }
        }
        Ok(true)
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
        let result = loop {
            match rustix::io::read(&self.socket, &mut self.input[have..]) {
                Err(Errno::INTR) => {}
                result => break result,
            }
        };
        self.input.truncate(have + *result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) | Err(Errno::CONNRESET) => Err(HandshakeError::Closed),
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(e) => Err(HandshakeError::Failed(e.into())),
        }
    }
}
