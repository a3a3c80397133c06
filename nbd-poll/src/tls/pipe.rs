//! A connection, encrypted or not.

use std::io;
use std::os::fd::RawFd;

use super::TlsStream;
use crate::stream::{Moved, Stream};

/// Moves bytes of one connection.
#[derive(Debug)]
pub(crate) enum Pipe {
    Plain(Stream),
    Tls(Box<TlsStream>),
}

impl Pipe {
    /// Reads into the pieces in order.
    ///
    /// # Safety
    /// Each piece is valid for writes of its length, and nobody else uses it now.
    pub(crate) unsafe fn read(&mut self, pieces: &[libc::iovec]) -> io::Result<Moved> {
        match self {
            // SAFETY: the caller's promise.
            Self::Plain(stream) => unsafe { stream.read(pieces) },
            // SAFETY: the caller's promise.
            Self::Tls(tls) => unsafe { tls.read(pieces) },
        }
    }

    /// Writes the pieces in order, which must not be empty. What was written is not looked at any more.
    ///
    /// # Safety
    /// Each piece is valid for reads of its length, and nobody changes it now.
    pub(crate) unsafe fn write(&mut self, pieces: &mut [libc::iovec]) -> io::Result<Moved> {
        match self {
            // SAFETY: the caller's promise.
            Self::Plain(stream) => unsafe { stream.write(pieces) },
            // SAFETY: the caller's promise.
            Self::Tls(tls) => unsafe { tls.write(pieces) },
        }
    }

    /// Sends what was written and is still here; false if the socket is full.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        match self {
            Self::Plain(_) => Ok(true),
            Self::Tls(tls) => tls.flush(),
        }
    }

    /// There is something to read, though the socket may be quiet.
    pub(crate) fn has_input(&mut self) -> bool {
        if let Self::Tls(tls) = self { tls.has_plaintext() } else { false }
    }

    /// Something waits for room in the socket.
    pub(crate) fn has_output(&self) -> bool {
        matches!(self, Self::Tls(tls) if tls.has_ciphertext())
    }

    /// Nothing more will be written.
    pub(crate) fn close_notify(&mut self) {
        if let Self::Tls(tls) = self {
            tls.close_notify();
            // What does not go now will not be missed.
            let _ = tls.flush();
        }
    }

    /// Nothing more is sent; the peer hears that once it has read everything.
    pub(crate) fn shut_down_write(&mut self) {
        self.stream().shut_down_write();
    }

    /// Reads what comes off the wire, encrypted or not.
    ///
    /// # Safety
    /// As for [`Pipe::read`].
    pub(crate) unsafe fn read_raw(&mut self, pieces: &[libc::iovec]) -> io::Result<Moved> {
        // SAFETY: the caller's promise.
        unsafe { self.stream().read(pieces) }
    }

    fn stream(&mut self) -> &mut Stream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(tls) => tls.stream(),
        }
    }

    /// As [`Stream::wait_fd`].
    pub(crate) fn wait_fd(&self) -> RawFd {
        match self {
            Self::Plain(stream) => stream.wait_fd(),
            Self::Tls(tls) => tls.wait_fd(),
        }
    }

    /// As [`Stream::want`].
    pub(crate) fn want(&mut self, read: bool, write: bool) {
        self.stream().want(read, write);
    }

    /// As [`Stream::forget`].
    pub(crate) fn forget(&mut self) {
        self.stream().forget();
    }

    /// See [`Stream::reset_on_close`].
    pub(crate) fn reset_on_close(&mut self) {
        self.stream().reset_on_close();
    }
}
