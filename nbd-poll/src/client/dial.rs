//! From an address to a connection in its transmission phase. Control path; never blocks.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_proto::client::{Agreed, Framing, Haggle, HaggleError, Next, Tls, Wishes};
use nbd_proto::wire::TransmissionFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use crate::stream::{Moved, Stream};
use crate::tls::pipe::Pipe;
use crate::tls::{Handshake, TlsStream};

/// Bytes that a unix socket may hold for its reader: a few requests of the largest usual size.
const SOCKET_BUFFER: usize = 2 << 20;
/// A server that does not even acknowledge what was sent is given up after this time (TCP_USER_TIMEOUT, tcp(7)), and
/// one that has nothing to say is asked whether it lives.
const SILENCE: Duration = Duration::from_secs(30);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// Steps of one turn, so that one server cannot keep the thread.
const STEPS_PER_TURN: usize = 64;

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(addr) => addr.fmt(f),
        }
    }
}

/// How to encrypt.
#[derive(Clone, Debug)]
pub struct Secure {
    /// Whom to trust, and who to be.
    pub config: Arc<ClientConfig>,
    /// What the server's certificate must be for.
    pub name: ServerName<'static>,
}

/// A server of 1997, which says nothing about itself.
#[derive(Clone, Copy, Debug)]
pub struct Original {
    /// Of its export, bytes.
    pub size: u64,
    /// First word of its replies.
    pub reply_magic: u32,
}

/// What a connection is to become.
#[derive(Clone, Debug)]
pub struct DialOptions {
    /// What to ask for. [`Wishes::tls`] other than off needs `secure`.
    pub wishes: Wishes,
    /// How to encrypt.
    pub secure: Option<Secure>,
    /// No handshake at all.
    pub original: Option<Original>,
    /// For all of it.
    pub timeout: Duration,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// Nobody answers there.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Where.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// It took too long.
    #[error("{address}: no {what} in time")]
    TimedOut {
        /// Where.
        address: Address,
        /// What was waited for.
        what: &'static str,
    },
    /// The server closed the connection.
    #[error("{address}: the server has closed the connection during the {phase}{hint}")]
    Closed {
        /// Where.
        address: Address,
        /// "handshake" or "TLS handshake".
        phase: &'static str,
        /// What may be the reason.
        hint: &'static str,
    },
    /// The handshake failed.
    #[error("{address}: {error}")]
    Haggle {
        /// Where.
        address: Address,
        /// Why.
        error: HaggleError,
    },
    /// There is no encryption that one could trust.
    #[error("{address}: TLS: {source}")]
    Tls {
        /// Where.
        address: Address,
        /// Why.
        source: io::Error,
    },
}

impl DialError {
    /// As a positive errno.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Connect { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::TimedOut { .. } => libc::ETIMEDOUT,
            Self::Closed { .. } => libc::ECONNRESET,
            Self::Haggle { error: HaggleError::Refused { kind, .. }, .. } => refusal_errno(*kind),
            Self::Haggle { .. } => libc::EPROTO,
            Self::Tls { .. } => libc::EACCES,
        }
    }

    /// Nobody has answered at all, or not in time: another address, or another time, may do.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::TimedOut { .. })
    }
}

fn refusal_errno(kind: u32) -> i32 {
    use nbd_proto::haggle::wire::rep;
    match kind {
        rep::ERR_UNKNOWN => libc::ENOENT,
        rep::ERR_POLICY | rep::ERR_TLS_REQD => libc::EACCES,
        rep::ERR_SHUTDOWN => libc::ESHUTDOWN,
        rep::ERR_UNSUP | rep::ERR_PLATFORM => libc::EOPNOTSUPP,
        _ => libc::EINVAL,
    }
}

/// A connection whose next byte, in either direction, is the first of the transmission phase. May go to another thread.
#[derive(Debug)]
pub struct Dialled {
    pub(super) pipe: Pipe,
    /// With whom.
    pub address: Address,
    /// What was agreed upon.
    pub agreed: Agreed,
    /// TLS version and cipher suite.
    pub cipher: Option<String>,
}

#[derive(Debug)]
enum State {
    Connecting(Stream),
    Haggling(Pipe),
    StartingTls(Box<TlsStream>),
    Over,
}

/// One attempt.
#[derive(Debug)]
pub struct Dial {
    address: Address,
    options: DialOptions,
    deadline: Instant,
    state: State,
    haggle: Haggle,
    input: Vec<u8>,
}

impl Dial {
    /// Begins to connect.
    ///
    /// # Errors
    /// `Connect`, what can be told at once: an address that cannot be used, a unix socket with nobody behind it.
    pub fn start(address: Address, options: DialOptions, now: Instant) -> Result<Self, DialError> {
        let stream = connect(&address)
            .and_then(Stream::new)
            .map_err(|source| DialError::Connect { address: address.clone(), source })?;
        let haggle = Haggle::new(options.wishes.clone());
        let deadline = now + options.timeout;
        let mut dial =
            Self { address, options, deadline, state: State::Connecting(stream), haggle, input: Vec::new() };
        dial.want(false);
        Ok(dial)
    }

    /// Readable when [`Dial::poll`] has something to do. The same for the life of the attempt.
    pub fn wait_fd(&mut self) -> RawFd {
        match &mut self.state {
            State::Connecting(stream) => stream.wait_fd(),
            State::Haggling(pipe) => pipe.wait_fd(),
            State::StartingTls(tls) => tls.stream().wait_fd(),
            State::Over => -1,
        }
    }

    /// When it will be given up.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Goes on until it has to wait. `Some`: how it ended; then it is to be dropped.
    pub fn poll(&mut self, now: Instant) -> Option<Result<Dialled, DialError>> {
        for _ in 0..STEPS_PER_TURN {
            match self.step() {
                Ok(Step::Again) => {}
                Ok(Step::Wait { read }) => {
                    self.want(read);
                    break;
                }
                Ok(Step::Done(dialled)) => return Some(Ok(*dialled)),
                Err(e) => return Some(Err(e)),
            }
        }
        (now >= self.deadline).then(|| {
            let what = match self.state {
                State::Connecting(_) => "answer to the connection",
                State::StartingTls(_) => "end of the TLS handshake",
                _ => "end of the handshake (a server of 1997 would say nothing: dialect 1997)",
            };
            Err(DialError::TimedOut { address: self.address.clone(), what })
        })
    }

    fn want(&mut self, read: bool) {
        match &mut self.state {
            State::Connecting(stream) => stream.want(read, !read),
            State::Haggling(pipe) => pipe.want(read, !read),
            State::StartingTls(tls) => tls.stream().want(read, !read),
            State::Over => {}
        }
    }

    fn step(&mut self) -> Result<Step, DialError> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Connecting(stream) => self.connected(stream),
            State::Haggling(pipe) => self.haggling(pipe),
            State::StartingTls(tls) => self.starting_tls(tls),
            State::Over => Ok(Step::Wait { read: true }),
        }
    }

    fn connected(&mut self, stream: Stream) -> Result<Step, DialError> {
        let failed = |source: io::Error| DialError::Connect { address: self.address.clone(), source };
        if !stream.is_writable().map_err(failed)? {
            self.state = State::Connecting(stream);
            return Ok(Step::Wait { read: false });
        }
        stream.take_error().map_err(failed)?;
        if let Some(original) = self.options.original {
            let agreed = Agreed {
                style: "1997",
                tls: false,
                framing: Framing::Original { reply_magic: original.reply_magic },
                size: original.size,
                flags: TransmissionFlags(0),
                sizes: None,
                contexts: Vec::new(),
            };
            return Ok(self.done(Pipe::Plain(stream), agreed));
        }
        self.state = State::Haggling(Pipe::Plain(stream));
        Ok(Step::Again)
    }

    fn haggling(&mut self, mut pipe: Pipe) -> Result<Step, DialError> {
        let step = match self.haggle.next() {
            Next::Write => self.write(&mut pipe)?,
            Next::Read => self.read(&mut pipe)?,
            Next::StartTls => return self.start_tls(pipe),
            Next::Transmission(agreed) => return Ok(self.done(pipe, agreed)),
        };
        self.state = State::Haggling(pipe);
        Ok(step)
    }

    fn write(&mut self, pipe: &mut Pipe) -> Result<Step, DialError> {
        let out = self.haggle.transmit();
        let mut pieces = [libc::iovec { iov_base: out.as_ptr().cast_mut().cast(), iov_len: out.len() }];
        // SAFETY: `out` is borrowed until behind the call, which only reads it.
        match unsafe { pipe.write(&mut pieces) } {
            Ok(Moved::Some(n)) => {
                self.haggle.transmitted(n);
                Ok(Step::Again)
            }
            Ok(Moved::WouldBlock) => Ok(Step::Wait { read: false }),
            Ok(Moved::End) => Err(self.closed("handshake", matches!(pipe, Pipe::Tls(_)))),
            Err(source) => Err(DialError::Connect { address: self.address.clone(), source }),
        }
    }

    /// Reads what the handshake is missing and not a byte more: what follows belongs to TLS or to the transmission
    /// phase.
    fn read(&mut self, pipe: &mut Pipe) -> Result<Step, DialError> {
        match pipe.flush() {
            Ok(true) => {}
            Ok(false) => return Ok(Step::Wait { read: false }),
            Err(source) => return Err(DialError::Tls { address: self.address.clone(), source }),
        }
        let have = self.input.len();
        let missing = self.haggle.missing(&self.input);
        self.input.resize(have + missing, 0);
        let to = &mut self.input[have..];
        let pieces = [libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() }];
        // SAFETY: `to` is exclusively borrowed.
        let moved = unsafe { pipe.read(&pieces) };
        let n = if let Ok(Moved::Some(n)) = &moved { *n } else { 0 };
        self.input.truncate(have + n);
        match moved {
            Ok(Moved::Some(_)) => {}
            Ok(Moved::WouldBlock) => return Ok(Step::Wait { read: true }),
            Ok(Moved::End) => return Err(self.closed("handshake", matches!(pipe, Pipe::Tls(_)))),
            Err(source) if matches!(pipe, Pipe::Tls(_)) => {
                return Err(DialError::Tls { address: self.address.clone(), source });
            }
            Err(source) => return Err(DialError::Connect { address: self.address.clone(), source }),
        }
        let used = self.haggle.handle_input(&self.input).map_err(|error| self.refused(error))?;
        self.input.drain(..used);
        Ok(Step::Again)
    }

    fn refused(&self, error: HaggleError) -> DialError {
        DialError::Haggle { address: self.address.clone(), error }
    }

    fn start_tls(&mut self, pipe: Pipe) -> Result<Step, DialError> {
        let tls = |source| DialError::Tls { address: self.address.clone(), source };
        let (Pipe::Plain(stream), Some(secure)) = (pipe, &self.options.secure) else {
            return Err(tls(io::Error::other("no keys were given, or the server wants TLS within TLS")));
        };
        let client = ClientConnection::new(secure.config.clone(), secure.name.clone());
        let client = client.map_err(|e| tls(io::Error::other(e)))?;
        self.state = State::StartingTls(Box::new(TlsStream::new(stream, client.into())));
        Ok(Step::Again)
    }

    fn starting_tls(&mut self, mut tls: Box<TlsStream>) -> Result<Step, DialError> {
        let step = match tls.handshake() {
            Ok(Handshake::Read) => Step::Wait { read: true },
            Ok(Handshake::Write) => Step::Wait { read: false },
            Ok(Handshake::Done) => {
                self.haggle.tls_started();
                self.state = State::Haggling(Pipe::Tls(tls));
                return Ok(Step::Again);
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(self.closed("TLS handshake", true));
            }
            Err(source) => return Err(DialError::Tls { address: self.address.clone(), source }),
        };
        self.state = State::StartingTls(tls);
        Ok(step)
    }

    /// `encrypted`: from TLS 1.3 on a server that does not want this client says so only after the handshake of TLS.
    fn closed(&self, phase: &'static str, encrypted: bool) -> DialError {
        let hint = if encrypted {
            " (does it trust the client's certificate, and is there such an export?)"
        } else if self.options.wishes.tls == Tls::Off {
            " (is there such an export, and may this host have it without TLS?)"
        } else {
            " (is there such an export, and may this host have it?)"
        };
        DialError::Closed { address: self.address.clone(), phase, hint }
    }

    fn done(&self, pipe: Pipe, agreed: Agreed) -> Step {
        let cipher = if let Pipe::Tls(tls) = &pipe { Some(tls.describe()) } else { None };
        Step::Done(Box::new(Dialled { pipe, address: self.address.clone(), agreed, cipher }))
    }
}

enum Step {
    Again,
    Wait { read: bool },
    Done(Box<Dialled>),
}

/// A non-blocking socket on its way to `address`.
fn connect(address: &Address) -> io::Result<OwnedFd> {
    const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);
    let (socket, result) = match address {
        Address::Unix(path) => {
            let unix = SocketAddrUnix::new(path.as_path())?;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
            // Best effort: beyond net.core.wmem_max only root may go.
            if sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
                let _ = sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
            }
            let result = rustix::net::connect(&socket, &unix);
            (socket, result)
        }
        Address::Tcp(addr) => {
            let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let socket = rustix::net::socket_with(family, SocketType::STREAM, FLAGS, None)?;
            sockopt::set_tcp_nodelay(&socket, true)?;
            sockopt::set_socket_keepalive(&socket, true)?;
            sockopt::set_tcp_keepidle(&socket, KEEPALIVE_IDLE)?;
            sockopt::set_tcp_keepintvl(&socket, KEEPALIVE_INTERVAL)?;
            sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_PROBES)?;
            sockopt::set_tcp_user_timeout(&socket, SILENCE.as_millis() as u32)?;
            let result = rustix::net::connect(&socket, addr);
            (socket, result)
        }
    };
    match result {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests;
