//! A non-blocking stream socket: vectored system calls, and one descriptor to wait for whichever direction is wanted.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

/// Bytes that a socket may hold for its reader: a few requests of the largest size that Linux sends.
const SOCKET_BUFFER: usize = 2 << 20;

/// Two connected sockets for one connection to the kernel: ours, non-blocking, and the kernel's.
///
/// # Errors
/// No descriptors or memory left. Source: socketpair(2).
pub fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, kernels) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    for socket in [&ours, &kernels] {
        // Beyond net.core.wmem_max only for root; the kernel's limit is good enough otherwise.
        if sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
            sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER)?;
        }
    }
    Ok((ours, kernels))
}

/// What a call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// Bytes, at least 1.
    Some(usize),
    /// Nothing now.
    WouldBlock,
    /// The peer has closed.
    End,
}

/// A socket and the epoll set around it.
#[derive(Debug)]
pub(crate) struct Stream {
    epoll: OwnedFd,
    socket: OwnedFd,
    interest: epoll::EventFlags,
}

impl Stream {
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let interest = epoll::EventFlags::IN;
        epoll::add(&epoll, &socket, epoll::EventData::new_u64(0), interest)?;
        Ok(Self { epoll, socket, interest })
    }

    /// The socket itself.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Readable when the socket is ready for what [`Stream::want`] asked for, or has failed.
    pub(crate) fn wait_fd(&self) -> RawFd {
        self.epoll.as_fd().as_raw_fd()
    }

    /// Chooses what to wait for. A system call, if it changed.
    pub(crate) fn want(&mut self, read: bool, write: bool) {
        let mut interest = epoll::EventFlags::empty();
        interest.set(epoll::EventFlags::IN, read);
        interest.set(epoll::EventFlags::OUT, write);
        if interest != self.interest
            && epoll::modify(&self.epoll, &self.socket, epoll::EventData::new_u64(0), interest).is_ok()
        {
            self.interest = interest;
        }
    }

    /// Whether it may be written to now: a connection that is being made is not (connect(2)).
    pub(crate) fn is_writable(&self) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one entry, exclusively borrowed; a timeout of 0 does not wait.
        match retry(|| unsafe { libc::poll(&mut poll, 1, 0) } as libc::ssize_t)? {
            0 => Ok(false),
            _ => Ok(true),
        }
    }

    /// The error that the socket has met, such as that of a connection that could not be made; takes it away.
    pub(crate) fn take_error(&self) -> io::Result<()> {
        Ok(sockopt::socket_error(&self.socket)??)
    }

    /// Nothing more is sent; the peer hears that once it has read everything.
    pub(crate) fn shut_down_write(&self) {
        // Fails only if the connection is gone already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
    }

    /// When it is closed, what was not sent is thrown away, instead of being sent for as long as it takes (socket(7),
    /// SO_LINGER).
    pub(crate) fn reset_on_close(&self) {
        // Fails on no socket that is open.
        let _ = sockopt::set_socket_linger(&self.socket, Some(std::time::Duration::ZERO));
    }

    /// Waits for nothing any more: a socket whose peer is gone would fire for ever.
    pub(crate) fn forget(&mut self) {
        let _ = epoll::delete(&self.epoll, &self.socket);
    }

    /// Reads into the pieces in order.
    ///
    /// # Safety
    /// Each piece is valid for writes of its length, and nobody else uses it now.
    pub(crate) unsafe fn read(&self, pieces: &[libc::iovec]) -> io::Result<Moved> {
        // SAFETY: an open descriptor, and pieces that the caller vouches for.
        let n = retry(|| unsafe {
            libc::readv(self.socket.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int)
        });
        moved(n, Moved::End)
    }

    /// Writes the pieces in order; they must not be empty.
    ///
    /// # Safety
    /// Each piece is valid for reads of its length, and nobody changes it now.
    pub(crate) unsafe fn write(&self, pieces: &mut [libc::iovec]) -> io::Result<Moved> {
        // SAFETY: all zeroes is a valid msghdr: no name, no control data (sendmsg(2)).
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = pieces.len() as _;
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: an open descriptor; `message` and the pieces live during the call.
        let n = retry(|| unsafe { libc::sendmsg(self.socket.as_raw_fd(), &message, flags) });
        moved(n, Moved::WouldBlock)
    }
}

/// Repeats a call that a signal cut short.
fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn moved(n: io::Result<usize>, zero: Moved) -> io::Result<Moved> {
    match n {
        Ok(0) => Ok(zero),
        Ok(n) => Ok(Moved::Some(n)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Moved::WouldBlock),
        Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => {
            Ok(Moved::End)
        }
        Err(e) => Err(e),
    }
}
