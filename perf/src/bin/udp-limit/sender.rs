//! Sending: the packets of a turn, joined into runs, in one `sendmmsg`.

use std::io;
use std::mem;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use libc::{cmsghdr, iovec, mmsghdr};

use crate::address::Address;
use crate::args::TAG_BYTES;
use crate::run::{Phase, Progress};

/// Most payload bytes of a run and of a packet: a UDP datagram over IPv4.
pub const MAX_RUN_BYTES: usize = 65535 - 20 - 8;

/// Most packets of a run that every kernel with `UDP_SEGMENT` takes.
const MAX_RUN_PACKETS: usize = 64;

/// Messages of one system call with and without `UDP_SEGMENT`.
const RUNS: usize = 64;
const PACKETS: usize = 256;

/// The ancillary message that asks for a run to be split, `udp(7)`.
#[repr(C)]
#[derive(Clone)]
struct Control {
    header: cmsghdr,
    segment: u16,
    padding: [u16; 3],
}

// SAFETY: CMSG_SPACE only computes.
const _: () = assert!(size_of::<Control>() == unsafe { libc::CMSG_SPACE(size_of::<u16>() as u32) } as usize);

/// What is to be sent at the end of a turn. Its payload bytes stay as the last user of their place left them.
pub struct Sender<'a> {
    socket: &'a UdpSocket,
    progress: &'a Progress,
    gso: bool,
    /// Bytes of a message's place in `data`.
    size: usize,
    data: Vec<u8>,
    runs: Vec<Run>,
    controls: Vec<Control>,
    iovecs: Vec<iovec>,
    headers: Vec<mmsghdr>,
}

/// A message being filled.
struct Run {
    to: Address,
    bytes: usize,
    packets: usize,
    /// Bytes of each packet but the last.
    segment: usize,
    /// A shorter packet ended it.
    closed: bool,
}

impl<'a> Sender<'a> {
    /// Room for a turn's messages, runs with `gso`, otherwise packets of up to `mtu` bytes. It waits for the kernel only
    /// until `progress` says that the run is over.
    pub fn new(socket: &'a UdpSocket, progress: &'a Progress, gso: bool, mtu: usize) -> Self {
        let (count, size) = if gso { (RUNS, MAX_RUN_BYTES.next_multiple_of(64)) } else { (PACKETS, mtu) };
        // SAFETY: CMSG_LEN only computes.
        let len = unsafe { libc::CMSG_LEN(size_of::<u16>() as u32) } as usize;
        let header = cmsghdr { cmsg_len: len, cmsg_level: libc::IPPROTO_UDP, cmsg_type: libc::UDP_SEGMENT };
        // SAFETY: integers and pointers only; all zero is a valid value.
        let (no_iovec, no_header) = unsafe { (mem::zeroed::<iovec>(), mem::zeroed::<mmsghdr>()) };
        Self {
            socket,
            progress,
            gso,
            size,
            data: vec![0xa5; count * size],
            runs: Vec::with_capacity(count),
            controls: vec![Control { header, segment: 0, padding: [0; 3] }; count],
            iovecs: vec![no_iovec; count],
            headers: vec![no_header; count],
        }
    }

    /// Adds a packet of `len` bytes to `to`, the first of them `tag`; sends the others first if there are too many.
    /// `len`: [`TAG_BYTES`] to the `mtu` of [`Sender::new`].
    pub fn packet(&mut self, to: &Address, tag: &[u8; TAG_BYTES], len: usize) -> io::Result<()> {
        if !self.add(to, tag, len) {
            self.flush()?;
            self.add(to, tag, len);
        }
        Ok(())
    }

    /// Adds a packet; false if all messages are in use.
    fn add(&mut self, to: &Address, tag: &[u8; TAG_BYTES], len: usize) -> bool {
        if !self.runs.last().is_some_and(|run| self.gso && run.takes(to, len)) {
            if self.runs.len() == self.headers.len() {
                return false;
            }
            self.runs.push(Run { to: *to, bytes: 0, packets: 0, segment: len, closed: false });
        }
        let place = (self.runs.len() - 1) * self.size;
        let run = self.runs.last_mut().expect("one was pushed above if there was none");
        let start = place + run.bytes;
        self.data[start..start + TAG_BYTES].copy_from_slice(tag);
        run.bytes += len;
        run.packets += 1;
        run.closed = len < run.segment;
        true
    }

    /// Sends everything added, again and again while the kernel has no room.
    pub fn flush(&mut self) -> io::Result<()> {
        let fd = self.socket.as_raw_fd();
        self.prepare();
        let mut sent = 0;
        while sent < self.runs.len() {
            let headers = &mut self.headers[sent..self.runs.len()];
            // SAFETY: `prepare` pointed these headers at names, iovecs, payload and control messages of the lengths
            // stated, in vectors that this value owns and that nothing has touched since. The kernel only reads them
            // (and writes `msg_len` of the headers) and keeps no pointer.
            let rc =
                unsafe { libc::sendmmsg(fd, headers.as_mut_ptr(), headers.len() as u32, libc::MSG_DONTWAIT) };
            if rc >= 0 {
                sent += rc as usize;
                continue;
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS) if self.progress.phase() != Phase::Over => {}
                Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS) => break,
                _ => return Err(error),
            }
        }
        self.runs.clear();
        Ok(())
    }

    /// Describes the runs to the kernel.
    fn prepare(&mut self) {
        let data = self.data.as_mut_ptr();
        for (i, run) in self.runs.iter_mut().enumerate() {
            self.iovecs[i] = iovec { iov_base: data.wrapping_add(i * self.size).cast(), iov_len: run.bytes };
            self.controls[i].segment = run.segment as u16;
            let header = &mut self.headers[i].msg_hdr;
            header.msg_name = run.to.as_mut_ptr();
            header.msg_namelen = run.to.len;
            header.msg_iov = &raw mut self.iovecs[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[i]).cast();
            header.msg_controllen = if run.packets > 1 { size_of::<Control>() } else { 0 };
        }
    }
}

impl Run {
    /// Whether a packet of `len` bytes to `to` may follow: equal ones, at the end one shorter, `udp(7)`.
    fn takes(&self, to: &Address, len: usize) -> bool {
        !self.closed
            && len <= self.segment
            && self.packets < MAX_RUN_PACKETS
            && self.bytes + len <= MAX_RUN_BYTES
            && self.to == *to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: [u8; TAG_BYTES] = [0; TAG_BYTES];

    fn with_sender<T>(gso: bool, check: impl FnOnce(&mut Sender<'_>) -> T) -> T {
        let socket = UdpSocket::bind(("127.0.0.1", 0)).expect("a free port");
        check(&mut Sender::new(&socket, &Progress::default(), gso, 4140))
    }

    /// Bytes and packets of the messages that packets of these sizes become.
    fn runs(gso: bool, sizes: impl IntoIterator<Item = usize>) -> Vec<(usize, usize)> {
        with_sender(gso, |sender| {
            sizes.into_iter().for_each(|len| assert!(sender.add(&Address::default(), &TAG, len)));
            sender.runs.iter().map(|run| (run.bytes, run.packets)).collect()
        })
    }

    #[test]
    fn equal_packets_fill_runs_below_64_kib() {
        assert_eq!(runs(true, [4140; 32]), [(62100, 15), (62100, 15), (8280, 2)]);
    }

    #[test]
    fn a_run_has_at_most_64_packets() {
        assert_eq!(runs(true, [100; 70]), [(6400, 64), (600, 6)]);
    }

    #[test]
    fn a_shorter_packet_ends_a_run_and_a_longer_one_begins_the_next() {
        assert_eq!(runs(true, [4140, 2732, 2732, 4140]), [(6872, 2), (2732, 1), (4140, 1)]);
    }

    #[test]
    fn another_destination_begins_a_run() {
        with_sender(true, |sender| {
            for len in [0, 16, 16] {
                let mut to = Address::default();
                to.len = len;
                assert!(sender.add(&to, &TAG, 100));
            }
            assert_eq!(sender.runs.iter().map(|run| run.packets).collect::<Vec<_>>(), [1, 2]);
        });
    }

    #[test]
    fn without_gso_each_packet_is_a_message() {
        assert_eq!(runs(false, [4140, 4140, 100]), [(4140, 1), (4140, 1), (100, 1)]);
    }

    #[test]
    fn a_full_sender_says_so() {
        with_sender(false, |sender| {
            let added = (0..1000).take_while(|_| sender.add(&Address::default(), &TAG, 8)).count();
            assert_eq!(added, PACKETS);
        });
    }
}
