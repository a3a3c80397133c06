//! Receiving: a batch of datagrams per system call, each of which may be several packets that the kernel has merged.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::null_mut;

use super::sys::RawAddr;

const UDP_GRO: i32 = 104;
const SO_RXQ_OVFL: i32 = 40;

/// Datagrams per call.
const BATCH: usize = 32;
/// The largest datagram.
const BUFFER: usize = 65536;

/// Room for the ancillary data of one datagram: merged size, drops, destination address.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 128]);

/// What one datagram brought.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// Sender.
    pub src: IpAddr,
    /// Sender's port.
    pub src_port: u16,
    /// Where it was sent to, if the socket is bound to no address.
    pub dst: Option<IpAddr>,
    /// One packet after the other.
    pub bytes: &'a [u8],
    /// Bytes of each packet but the last, which may be shorter.
    pub segment: usize,
}

/// A socket with its buffers.
pub struct Receiver {
    fd: OwnedFd,
    buffers: Box<[u8]>,
    headers: Box<[libc::mmsghdr]>,
    iovs: Box<[libc::iovec]>,
    names: Box<[RawAddr]>,
    controls: Box<[Control]>,
    /// Of the datagrams received last.
    facts: Box<[Facts]>,
    /// The kernel's count of datagrams it had no room for.
    dropped: u32,
    /// Headers that the last call has changed.
    used: usize,
}

// SAFETY: the raw pointers in `headers` and `iovs` point into this struct's own boxes, which move with it; they are set
// once, when the boxes exist, and used by `receive` only, which has exclusive access.
unsafe impl Send for Receiver {}

#[derive(Clone, Copy, Default)]
struct Facts {
    segment: usize,
    dst: Option<IpAddr>,
    truncated: bool,
}

impl Receiver {
    pub fn new(fd: OwnedFd) -> Self {
        // SAFETY: integers and pointers, of which zero is a value.
        let header: libc::mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        let mut new = Self {
            fd,
            buffers: vec![0; BATCH * BUFFER].into(),
            headers: vec![header; BATCH].into(),
            iovs: vec![libc::iovec { iov_base: null_mut(), iov_len: 0 }; BATCH].into(),
            names: vec![RawAddr::empty(); BATCH].into(),
            controls: vec![Control([0; 128]); BATCH].into(),
            facts: vec![Facts::default(); BATCH].into(),
            dropped: 0,
            used: BATCH,
        };
        for i in 0..BATCH {
            let base = new.buffers[i * BUFFER..].as_mut_ptr().cast();
            new.iovs[i] = libc::iovec { iov_base: base, iov_len: BUFFER };
            let header = &mut new.headers[i].msg_hdr;
            header.msg_name = (&raw mut new.names[i]).cast();
            header.msg_iov = &raw mut new.iovs[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut new.controls[i]).cast();
        }
        new
    }

    /// The socket.
    pub fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }

    /// Fetches what has come, without waiting: how many datagrams, and how many the kernel has dropped before them.
    ///
    /// # Errors
    /// The socket failed. Pending errors of single packets are no failure.
    pub fn receive(&mut self) -> io::Result<(usize, u32)> {
        for header in &mut self.headers[..self.used] {
            header.msg_hdr.msg_namelen = RawAddr::ROOM;
            header.msg_hdr.msg_controllen = size_of::<Control>();
            header.msg_hdr.msg_flags = 0;
        }
        // A call that fails or brings fewer has touched the first header at most beside what it brought.
        // SAFETY: `BATCH` headers, each with a buffer of `BUFFER` bytes, a name and control data of the stated sizes,
        // all of them owned by `self` and exclusively borrowed.
        let n = unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_DONTWAIT,
                null_mut(),
            )
        };
        self.used = 1;
        if n < 0 {
            let error = io::Error::last_os_error();
            // Whatever ICMP had to say about a packet of ours is not about this socket.
            return match error.raw_os_error() {
                Some(libc::EBADF | libc::ENOTSOCK | libc::EINVAL | libc::EFAULT | libc::ENOMEM) => Err(error),
                _ => Ok((0, 0)),
            };
        }
        let n = (n as usize).min(BATCH);
        self.used = (n + 1).min(BATCH);
        let before = self.dropped;
        for i in 0..n {
            self.facts[i] = self.read_control(i);
        }
        Ok((n, self.dropped.wrapping_sub(before)))
    }

    /// More may be waiting.
    pub fn is_full(n: usize) -> bool {
        n == BATCH
    }

    fn read_control(&mut self, i: usize) -> Facts {
        let header = &self.headers[i];
        let mut facts = Facts {
            segment: header.msg_len as usize,
            dst: None,
            truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        };
        // SAFETY: the kernel has filled `msg_control` with `msg_controllen` bytes of well-formed messages, which these
        // macros walk; each read is unaligned and of the type that Linux documents for level and type (ip(7), ipv6(7),
        // udp(7), socket(7)), so inside the message.
        unsafe {
            let mut at = libc::CMSG_FIRSTHDR(&header.msg_hdr);
            while !at.is_null() {
                let data = libc::CMSG_DATA(at);
                match ((*at).cmsg_level, (*at).cmsg_type) {
                    (libc::SOL_UDP, UDP_GRO) => {
                        facts.segment = data.cast::<i32>().read_unaligned().max(1) as usize;
                    }
                    (libc::SOL_SOCKET, SO_RXQ_OVFL) => {
                        self.dropped = data.cast::<u32>().read_unaligned();
                    }
                    (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                        let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                        facts.dst = Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)).into());
                    }
                    (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                        let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                        facts.dst = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                    }
                    _ => {}
                }
                at = libc::CMSG_NXTHDR(&header.msg_hdr, at);
            }
        }
        facts
    }

    /// Datagram `i` of those received last; `None` if it is none that can be handled.
    pub fn datagram(&self, i: usize) -> Option<Datagram<'_>> {
        let len = self.headers[i].msg_len as usize;
        let (src, src_port) = self.names[i].get()?;
        let facts = self.facts[i];
        if facts.truncated {
            return None;
        }
        let bytes = &self.buffers[i * BUFFER..][..len.min(BUFFER)];
        Some(Datagram { src, src_port, dst: facts.dst, bytes, segment: facts.segment.max(1) })
    }
}
