//! The socket of a client: as it is, or inside TLS.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustls::{ServerConfig, ServerConnection};

use super::identity::TlsIdentity;
use crate::stream::{Moved, Stream};
use crate::tls::{Handshake, TlsStream, common_name};

/// A client's socket after its handshake; becomes a [`Connection`](crate::Connection).
#[derive(Debug)]
pub enum Socket {
    /// As it is; its next byte is the first of a request.
    Plain(OwnedFd),
    /// Inside TLS; the first requests may be in memory already.
    Tls(Encrypted),
}

/// A socket inside TLS.
#[derive(Debug)]
pub struct Encrypted(pub(crate) Box<TlsStream>);

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Plain(socket) => socket.as_fd(),
            Self::Tls(tls) => tls.0.socket(),
        }
    }
}

impl From<OwnedFd> for Socket {
    fn from(socket: OwnedFd) -> Self {
        Self::Plain(socket)
    }
}

impl Socket {
    /// TLS from here on, as the server that `config` says. Nothing of it has been said yet. The descriptor stays the
    /// same one.
    pub(super) fn encrypt(self, config: Arc<ServerConfig>) -> io::Result<Self> {
        let Self::Plain(socket) = self else { return Ok(self) };
        let tls = ServerConnection::new(config).map_err(io::Error::other)?;
        Ok(Self::Tls(Encrypted(Box::new(TlsStream::new(Stream::new(socket)?, tls.into())))))
    }

    /// Goes on with the handshake of TLS; done at once without.
    pub(super) fn shake_hands(&mut self) -> io::Result<Handshake> {
        match self {
            Self::Plain(_) => Ok(Handshake::Done),
            Self::Tls(tls) => tls.0.handshake(),
        }
    }

    /// Who TLS says the client is.
    pub(super) fn identity(&self) -> Option<TlsIdentity> {
        let Self::Tls(tls) = self else { return None };
        let certificate = tls.0.peer_certificates().first();
        let common_name = certificate.and_then(|c| common_name(c)).map(str::to_owned);
        Some(TlsIdentity { cipher: tls.0.describe(), common_name })
    }

    /// Writes some of `bytes`, which must not be empty.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<Moved> {
        let piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        match self {
            Self::Plain(socket) => {
                let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
                moved(rustix::net::send(socket, bytes, flags), Moved::WouldBlock)
            }
            // SAFETY: `bytes` is borrowed, and only read.
            Self::Tls(tls) => unsafe { tls.0.write(&[piece]) },
        }
    }

    /// Sends what was written and is still here; false if the socket is full.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        match self {
            Self::Plain(_) => Ok(true),
            Self::Tls(tls) => tls.0.flush(),
        }
    }

    /// Reads some bytes into `bytes`, which must not be empty.
    pub(super) fn receive(&mut self, bytes: &mut [u8]) -> io::Result<Moved> {
        let piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        match self {
            Self::Plain(socket) => moved(rustix::io::read(socket, bytes), Moved::End),
            // SAFETY: `bytes` is exclusively borrowed.
            Self::Tls(tls) => unsafe { tls.0.read(&[piece]) },
        }
    }
}

fn moved(result: rustix::io::Result<usize>, zero: Moved) -> io::Result<Moved> {
    use rustix::io::Errno;
    match result {
        Ok(0) => Ok(zero),
        Ok(n) => Ok(Moved::Some(n)),
        // The next turn goes on.
        Err(Errno::AGAIN | Errno::INTR) => Ok(Moved::WouldBlock),
        Err(Errno::PIPE | Errno::CONNRESET) => Ok(Moved::End),
        Err(e) => Err(e.into()),
    }
}
