//! The control socket of a session: whole messages in, answers out, never blocking.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::wire::{HEADER_LEN, Header, MAX_FDS, MAX_PAYLOAD, WireError};

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ConnError {
    /// By the front end, between two messages.
    #[error("the front end closed the connection")]
    Closed,
    /// In a message.
    #[error("the front end closed the connection within a message")]
    CutOff,
    /// Contents.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// More descriptors than any message has.
    #[error("a message with more than {MAX_FDS} descriptors")]
    TooManyFds,
    /// Its replies pile up.
    #[error("the front end does not read its replies")]
    Stuffed,
    /// A system call.
    #[error("{0}")]
    System(#[from] Errno),
}

/// Descriptors of one receive: what the kernel allows (SCM_MAX_FD).
const FDS_AT_ONCE: usize = 253;

/// A message: header, payload, descriptors.
pub(crate) type Incoming<'a> = (Header, &'a [u8], Vec<OwnedFd>);

/// A connection and the message that is coming in.
#[derive(Debug)]
pub(crate) struct Conn {
    /// `None` once it is to be closed.
    socket: Option<OwnedFd>,
    buffer: Box<[u8; HEADER_LEN + MAX_PAYLOAD]>,
    have: usize,
    header: Option<Header>,
    fds: Vec<OwnedFd>,
}

impl Conn {
    /// `socket` does not block.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Some(socket),
            buffer: Box::new([0; HEADER_LEN + MAX_PAYLOAD]),
            have: 0,
            header: None,
            fds: Vec::new(),
        }
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    fn socket(&self) -> Result<BorrowedFd<'_>, ConnError> {
        self.socket.as_ref().map(AsFd::as_fd).ok_or(ConnError::Closed)
    }

    /// Ends it. What is still open, to be closed elsewhere: what came with half a message, and the socket, if more than that
    /// may be in it.
    pub(crate) fn end(&mut self) -> Vec<OwnedFd> {
        let mut left = std::mem::take(&mut self.fds);
        let Some(socket) = self.socket.take() else { return left };
        // From here on nothing comes, and descriptors come only with bytes.
        let ended = rustix::net::shutdown(&socket, rustix::net::Shutdown::Read);
        let unread = rustix::io::ioctl_fionread(&socket);
        if ended.is_err() || unread != Ok(0) {
            left.push(socket);
        }
        left
    }

    /// Descriptors that came with a message that is not all there.
    pub(crate) fn descriptors(&self) -> usize {
        self.fds.len()
    }

    /// Whether the front end has closed its end.
    pub(crate) fn hung_up(&self) -> bool {
        let Ok(socket) = self.socket() else { return true };
        let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().intersects(closed)
    }

    /// The next whole message, `None` if it is not there yet.
    pub(crate) fn recv(&mut self) -> Result<Option<Incoming<'_>>, ConnError> {
        loop {
            let want = HEADER_LEN + self.header.map_or(0, |h| h.size as usize);
            if self.have < want {
                if !self.fill(want)? {
                    return Ok(None);
                }
                continue;
            }
            let Some(header) = self.header.take() else {
                let mut bytes = [0; HEADER_LEN];
                bytes.copy_from_slice(&self.buffer[..HEADER_LEN]);
                self.header = Some(Header::parse(bytes)?);
                continue;
            };
            self.have = 0;
            let payload = &self.buffer[HEADER_LEN..HEADER_LEN + header.size as usize];
            return Ok(Some((header, payload, std::mem::take(&mut self.fds))));
        }
    }

    /// One receive up to `want` bytes. False: nothing there.
    fn fill(&mut self, want: usize) -> Result<bool, ConnError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_AT_ONCE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut self.buffer[self.have..want])];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let socket = self.socket.as_ref().ok_or(ConnError::Closed)?;
        let got = match recvmsg(socket, &mut parts, &mut control, flags) {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(Errno::CONNRESET) => return Err(ConnError::Closed),
            Err(e) => return Err(e.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > MAX_FDS || got.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ConnError::TooManyFds);
        }
        match got.bytes {
            0 if self.have == 0 => Err(ConnError::Closed),
            0 => Err(ConnError::CutOff),
            n => {
                self.have += n;
                Ok(true)
            }
        }
    }

    /// Answers `request`.
    pub(crate) fn reply(
        &self,
        request: u32,
        payload: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ConnError> {
        send(self.socket()?, &Header::reply(request, payload.len()), payload, fd)
    }
}

/// Sends one message whole, or fails: a front end waits for each answer, so there is always room for one.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    header: &[u8; HEADER_LEN],
    payload: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), ConnError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let parts = [IoSlice::new(header), IoSlice::new(payload)];
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match sendmsg(socket, &parts, &mut control, flags) {
        Ok(n) if n == HEADER_LEN + payload.len() => Ok(()),
        Ok(_) | Err(Errno::AGAIN) => Err(ConnError::Stuffed),
        Err(Errno::PIPE | Errno::CONNRESET) => Err(ConnError::Closed),
        Err(e) => Err(e.into()),
    }
}
