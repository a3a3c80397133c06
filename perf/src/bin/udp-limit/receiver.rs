//! Receiving: one `recvmmsg` per turn into buffers that stay where they are.

use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::{ptr, slice};

use libc::{c_int, cmsghdr, iovec, mmsghdr, msghdr};

use crate::address::Address;

/// Bytes of a message's buffer with `UDP_GRO`: the largest run.
const RUN_BUFFER: usize = 1 << 16;

/// Messages of one turn with and without `UDP_GRO`.
const RUNS: usize = 16;
const PACKETS: usize = 64;

/// The ancillary message that says how long the packets of a run are, `udp(7)`.
#[repr(C)]
#[derive(Clone)]
struct Control {
    header: cmsghdr,
    value: c_int,
    padding: c_int,
}

// SAFETY: CMSG_SPACE only computes.
const _: () =
    assert!(size_of::<Control>() == unsafe { libc::CMSG_SPACE(size_of::<c_int>() as u32) } as usize);

/// Buffers for the messages of one turn. Bound to its thread: the headers hold pointers into the other fields.
pub struct Receiver {
    headers: Vec<mmsghdr>,
    /// Headers that the kernel has written to since they were prepared.
    written: usize,
    // The headers point into these; after construction nothing touches them but through those pointers.
    _data: Vec<u8>,
    _names: Vec<Address>,
    _controls: Vec<Control>,
    _iovecs: Vec<iovec>,
}

/// A message received: a packet or a run of packets of one sender.
pub struct Message<'a> {
    /// The packets, one after the other; each but the last has `segment` bytes.
    pub bytes: &'a [u8],
    /// Bytes of each packet but the last, at least 1.
    pub segment: usize,
    /// Sender.
    pub from: Address,
}

impl Message<'_> {
    /// The packets.
    pub fn packets(&self) -> slice::Chunks<'_, u8> {
        self.bytes.chunks(self.segment)
    }
}

impl Receiver {
    /// Room for a turn's messages, runs with `gro`, otherwise packets of up to `mtu` bytes.
    pub fn new(gro: bool, mtu: usize) -> Self {
        let (count, size) = if gro { (RUNS, RUN_BUFFER) } else { (PACKETS, mtu + 1) };
        let mut data = vec![0u8; count * size];
        let mut names = vec![Address::default(); count];
        // SAFETY: integers only; all zero is a valid value.
        let mut controls = vec![unsafe { mem::zeroed::<Control>() }; count];
        let mut iovecs: Vec<iovec> =
            data.chunks_mut(size).map(|b| iovec { iov_base: b.as_mut_ptr().cast(), iov_len: size }).collect();
        let (names_at, controls_at, iovecs_at) =
            (names.as_mut_ptr(), controls.as_mut_ptr(), iovecs.as_mut_ptr());
        let header = |i: usize| {
            // SAFETY: integers and pointers only; all zero is a valid value.
            let mut header: msghdr = unsafe { mem::zeroed() };
            header.msg_name = names_at.wrapping_add(i).cast();
            header.msg_control = controls_at.wrapping_add(i).cast();
            header.msg_iov = iovecs_at.wrapping_add(i);
            header.msg_iovlen = 1;
            mmsghdr { msg_hdr: header, msg_len: 0 }
        };
        let headers = (0..count).map(header).collect();
        Self { headers, written: count, _data: data, _names: names, _controls: controls, _iovecs: iovecs }
    }

    /// Takes up to `most` messages from the socket `fd` and returns their number, 0 if none is there.
    pub fn receive(&mut self, fd: RawFd, most: usize) -> io::Result<usize> {
        for header in &mut self.headers[..self.written] {
            header.msg_hdr.msg_namelen = Address::CAPACITY as u32;
            header.msg_hdr.msg_controllen = size_of::<Control>();
        }
        self.written = 0;
        let count = most.min(self.headers.len());
        // SAFETY: `count` headers, each with a name, an iovec with its buffer and a control buffer of its own, of the
        // lengths stated, in vectors that this value owns, never resizes and to which no reference exists.
        let rc = unsafe {
            libc::recvmmsg(fd, self.headers.as_mut_ptr(), count as u32, libc::MSG_DONTWAIT, ptr::null_mut())
        };
        if rc >= 0 {
            self.written = rc as usize;
            return Ok(self.written);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
            _ => Err(error),
        }
    }

    /// The messages of the last [`Receiver::receive`].
    pub fn messages(&self) -> impl Iterator<Item = Message<'_>> {
        self.headers[..self.written].iter().map(|header| {
            let message = &header.msg_hdr;
            let len = header.msg_len as usize;
            // SAFETY: `msg_iov`, `msg_name` and `msg_control` point to initialised values owned by `self`, and the
            // kernel wrote `len` bytes, no more than `iov_len`, of the buffer (MSG_TRUNC was not asked for). Nothing
            // writes them while `self` is borrowed: only `receive` does, with `&mut self`.
            let (bytes, mut from, control) = unsafe {
                let start = (*message.msg_iov).iov_base.cast::<u8>();
                (
                    slice::from_raw_parts(start, len),
                    *message.msg_name.cast::<Address>(),
                    &*message.msg_control.cast(),
                )
            };
            from.len = message.msg_namelen;
            let segment = run_segment(control, message.msg_controllen).unwrap_or(len).max(1);
            Message { bytes, segment, from }
        })
    }
}

/// The packet size of a run; `None` if the kernel said nothing of it: a single packet.
fn run_segment(control: &Control, len: usize) -> Option<usize> {
    let header = &control.header;
    let is_gro = len >= mem::offset_of!(Control, padding)
        && header.cmsg_level == libc::IPPROTO_UDP
        && header.cmsg_type == libc::UDP_GRO;
    if is_gro { usize::try_from(control.value).ok() } else { None }
}
