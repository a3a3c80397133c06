//! TLS on a polled socket, for either end: rustls without I/O of its own, moved by the same calls as a plain socket.
//!
//! Data are copied once more than in the clear, between the caller's memory and the records. Keys come from files:
//! [`files`].

pub mod files;
pub(crate) mod pipe;
pub mod server;
mod subject;
mod trust;

pub use subject::common_name;

use std::io::{self, BufRead, Read, Write};

use rustls::Connection;
pub use rustls::pki_types::ServerName;

use crate::stream::{Moved, Stream};

/// Plaintext that waits to be encrypted, or ciphertext to be sent, at most, bytes.
const BUFFER: usize = 256 << 10;
/// Plaintext of one record (RFC 8446, section 5.1).
const RECORD: usize = 16 << 10;

/// TLS over a stream socket: one of the two ends.
#[derive(Debug)]
pub(crate) struct TlsStream {
    stream: Stream,
    tls: Connection,
}

/// What a handshake waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handshake {
    /// Bytes of the peer.
    Read,
    /// Room in the socket.
    Write,
    /// Nothing: it is done.
    Done,
}

impl TlsStream {
    pub(crate) fn new(stream: Stream, mut tls: Connection) -> Self {
        tls.set_buffer_limit(Some(BUFFER));
        Self { stream, tls }
    }

    /// The socket below.
    pub(crate) fn socket(&self) -> std::os::fd::BorrowedFd<'_> {
        self.stream.socket()
    }

    /// As [`Stream::wait_fd`].
    pub(crate) fn wait_fd(&self) -> std::os::fd::RawFd {
        self.stream.wait_fd()
    }

    pub(crate) fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// What was agreed upon: version and cipher suite, once the handshake is done.
    pub(crate) fn describe(&self) -> String {
        let version = self.tls.protocol_version().and_then(|v| v.as_str()).unwrap_or("TLS");
        let suite = self.tls.negotiated_cipher_suite().and_then(|s| s.suite().as_str()).unwrap_or("");
        format!("{version} {suite}").trim_end().to_owned()
    }

    /// Certificates that the peer has shown, its own first.
    #[allow(dead_code, reason = "for servers that choose whom to serve")]
    pub(crate) fn peer_certificates(&self) -> &[rustls::pki_types::CertificateDer<'static>] {
        self.tls.peer_certificates().unwrap_or_default()
    }

    /// Goes on with the handshake until it has to wait.
    ///
    /// # Errors
    /// The peer is gone or not to be trusted; a reason for it has been sent if that was possible.
    pub(crate) fn handshake(&mut self) -> io::Result<Handshake> {
        loop {
            if !self.flush()? {
                return Ok(Handshake::Write);
            }
            if !self.tls.is_handshaking() {
                return Ok(Handshake::Done);
            }
            match self.fill()? {
                Moved::Some(_) => {}
                Moved::WouldBlock => return Ok(Handshake::Read),
                Moved::End => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Plaintext waits in memory: the socket may be quiet all the same.
    pub(crate) fn has_plaintext(&mut self) -> bool {
        matches!(self.tls.reader().fill_buf(), Ok(bytes) if !bytes.is_empty())
    }

    /// Ciphertext waits for room in the socket.
    pub(crate) fn has_ciphertext(&self) -> bool {
        self.tls.wants_write()
    }

    /// Reads plaintext into the pieces in order.
    ///
    /// # Safety
    /// Each piece is valid for writes of its length, and nobody else uses it now.
    pub(crate) unsafe fn read(&mut self, pieces: &[libc::iovec]) -> io::Result<Moved> {
        let (mut total, mut pieces) = (0, pieces.iter().map(|p| (p.iov_base.cast::<u8>(), p.iov_len)));
        let mut place = pieces.next();
        while let Some((to, room)) = place {
            if room == 0 {
                place = pieces.next();
                continue;
            }
            let mut reader = self.tls.reader();
            let n = match reader.fill_buf() {
                Ok([]) if total == 0 => return Ok(Moved::End),
                Ok([]) => break,
                Ok(bytes) => {
                    let n = bytes.len().min(room);
                    // SAFETY: `n` bytes of the piece, which the caller vouches for; rustls' own buffer is elsewhere.
                    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, n) };
                    n
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // What is here is handed out before more is fetched.
                    if total > 0 {
                        break;
                    }
                    match self.fill()? {
                        Moved::Some(_) => continue,
                        other => return Ok(other),
                    }
                }
                // The peer closed without saying so in TLS: a cut, for all that is known.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof && total == 0 => return Ok(Moved::End),
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(e) => return Err(e),
            };
            reader.consume(n);
            total += n;
            place = Some((to.wrapping_add(n), room - n));
        }
        Ok(Moved::Some(total))
    }

    /// Takes bytes of the pieces in order, encrypts them, and sends as much as the socket takes. What was taken is not
    /// looked at any more, though the rest of its ciphertext may have to wait for [`TlsStream::flush`].
    ///
    /// # Safety
    /// Each piece is valid for reads of its length, and nobody changes it now.
    pub(crate) unsafe fn write(&mut self, pieces: &[libc::iovec]) -> io::Result<Moved> {
        let mut total = 0;
        // The memory may be shared with others (guests), to which no reference must exist.
        let mut record = [0u8; RECORD];
        'pieces: for piece in pieces {
            let mut at = 0;
            while at < piece.iov_len {
                if !self.flush()? && self.tls.wants_write() && total > 0 {
                    break 'pieces;
                }
                let n = (piece.iov_len - at).min(RECORD);
                let from = piece.iov_base.cast::<u8>().wrapping_add(at);
                // SAFETY: `n` bytes from `at` on are inside the piece; `record` is our own.
                unsafe { std::ptr::copy_nonoverlapping(from, record.as_mut_ptr(), n) };
                let taken = self.tls.writer().write(&record[..n])?;
                total += taken;
                at += taken;
                if taken < n {
                    break 'pieces;
                }
            }
        }
        self.flush()?;
        Ok(if total == 0 { Moved::WouldBlock } else { Moved::Some(total) })
    }

    /// Sends ciphertext; false if some is left.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Raw(&self.stream)) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// Tells the peer in TLS that nothing follows.
    pub(crate) fn close_notify(&mut self) {
        self.tls.send_close_notify();
    }

    /// Reads ciphertext once, and takes it apart.
    fn fill(&mut self) -> io::Result<Moved> {
        let n = match self.tls.read_tls(&mut Raw(&self.stream)) {
            Ok(0) => return Ok(Moved::End),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Moved::WouldBlock),
            Err(e) => return Err(e),
        };
        if let Err(e) = self.tls.process_new_packets() {
            // The alert that tells the peer why.
            let _ = self.flush();
            return Err(io::Error::new(io::ErrorKind::InvalidData, trust::explain(&e)));
        }
        Ok(Moved::Some(n))
    }
}

/// The socket as rustls wants it.
struct Raw<'a>(&'a Stream);

impl Read for Raw<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let piece = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: the buffer is exclusively borrowed.
        match unsafe { self.0.read(&[piece]) }? {
            Moved::Some(n) => Ok(n),
            Moved::WouldBlock => Err(io::ErrorKind::WouldBlock.into()),
            Moved::End => Ok(0),
        }
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut pieces = [libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() }];
        // SAFETY: the buffer is borrowed; sendmsg only reads it.
        match unsafe { self.0.write(&mut pieces) }? {
            Moved::Some(n) => Ok(n),
            Moved::WouldBlock => Err(io::ErrorKind::WouldBlock.into()),
            Moved::End => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
