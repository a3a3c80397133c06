//! The control socket, front end's side. Blocking.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use vhost::vhost_user::message::FrontendReq;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;

/// A connection to a back end.
#[derive(Debug)]
pub struct FrontEnd {
    /// The socket, for what the methods do not offer.
    pub stream: UnixStream,
}

impl FrontEnd {
    /// Connects. Answers are waited for two minutes at most.
    ///
    /// # Errors
    /// The system's.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(crate::PATIENCE))?;
        Ok(Self { stream })
    }

    /// Sends a message of any contents.
    ///
    /// # Errors
    /// The system's.
    pub fn send_raw(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(12 + payload.len());
        for word in [request, flags, payload.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        self.send_bytes(&message, fds)
    }

    /// Sends bytes that need not be a whole message.
    ///
    /// # Errors
    /// The system's.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors"));
        }
        let sent =
            rustix::net::sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Sends a message that has no answer.
    ///
    /// # Errors
    /// The system's.
    pub fn send(&self, request: FrontendReq, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_raw(request.into(), VERSION, payload, fds)
    }

    /// Sends a message and waits for its acknowledgement (REPLY_ACK); true if that says success.
    ///
    /// # Errors
    /// The system's; the back end closed the connection.
    pub fn send_acked(
        &self,
        request: FrontendReq,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<bool> {
        self.send_raw(request.into(), VERSION | NEED_REPLY, payload, fds)?;
        Ok(self.reply()?.0 == 0u64.to_ne_bytes())
    }

    /// Sends a message and waits for its answer.
    ///
    /// # Errors
    /// The system's; the back end closed the connection.
    pub fn call(
        &self,
        request: FrontendReq,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        self.send(request, payload, fds)?;
        self.reply()
    }

    /// Asks for a number.
    ///
    /// # Errors
    /// As [`FrontEnd::call`].
    pub fn number(&self, request: FrontendReq) -> io::Result<u64> {
        let (reply, _) = self.call(request, &[], &[])?;
        let bytes = reply.try_into().map_err(|_| io::Error::other("an answer that is no number"))?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Receives an answer: payload and descriptors.
    ///
    /// # Errors
    /// The system's; the back end closed the connection.
    pub fn reply(&self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut header)];
        let flags = RecvFlags::WAITALL | RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(&self.stream, &mut parts, &mut control, flags)?;
        if got.bytes < 12 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        let len = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        let mut payload = vec![0; len as usize];
        (&self.stream).read_exact(&mut payload)?;
        Ok((payload, fds))
    }

    /// True once the back end has closed the connection.
    pub fn is_closed(&self) -> bool {
        let mut byte = [0];
        matches!((&self.stream).read(&mut byte), Ok(0))
            || rustix::net::send(&self.stream, &[], SendFlags::NOSIGNAL).is_err()
    }
}
