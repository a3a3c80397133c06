//! Sending: the packets of a turn as few messages of one system call. Consecutive packets of a queue pair that are of
//! equal length (the last may be shorter) form a run, which the kernel takes as one message and cuts up at the end of
//! its way (UDP_SEGMENT, udp(7)), or not at all if the receiver is on this host.
//!
//! ```text
//! arena   [BTH …][small payload, pad, ICRC][BTH …][pad, ICRC | BTH …]
//! iovecs  └──────────── one ─────────────┘└ one ┘ └payload in place┘ └ …
//! ```

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::null_mut;

use super::open::TxSocket;
use super::sys::RawAddr;

const UDP_SEGMENT: i32 = 103;

/// Packets per batch.
const PACKETS: usize = 256;
const MESSAGES: usize = 64;
const IOVS: usize = 1024;
/// One message: what every kernel with UDP_SEGMENT takes (`UDP_MAX_SEGMENTS`).
const MAX_RUN_PACKETS: usize = 64;
/// UDP payload of one message: 65535 less IPv6 or IPv4 and UDP header, less some care.
const MAX_RUN_BYTES: usize = 65_000;
/// Iovecs of one message (UIO_MAXIOV is 1024).
const MAX_RUN_IOVS: usize = 512;
/// A payload up to here is copied behind its header: cheaper than iovecs.
const SMALL: usize = 256;
/// Arena bytes of one packet at most: header, small payload, pad, ICRC.
const PER_PACKET: usize = 32 + SMALL + 3 + 4;
/// Iovecs that one packet may begin at most: header, the pieces of its payload (verbs::SgeList), the trailer.
const IOVS_PER_PACKET: usize = 8;

/// Where a queue pair's packets go.
#[derive(Clone, Copy)]
pub struct Dest {
    name: RawAddr,
    /// Said per packet if the socket is bound to no address.
    src: IpAddr,
}

impl Dest {
    /// From `src`, an address of this host.
    pub fn new(src: IpAddr, dst: SocketAddr) -> Self {
        Self { name: RawAddr::new(dst), src }
    }
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 80]);

#[derive(Clone, Copy)]
struct Message {
    first_iov: usize,
    iovs: usize,
    packets: usize,
    bytes: usize,
    segment: usize,
    /// A shorter packet has ended the run.
    closed: bool,
    /// Packets may join only those of the same queue pair: the receiver steers by the first.
    owner: u32,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The system took all of it.
    All,
    /// The system has no room: packets from this one on were not taken.
    Busy(usize),
    /// The system does not cut runs here: packets from this one on were not taken; single ones will be.
    NoRuns(usize),
    /// The system refuses this packet; it and those after it were not taken.
    Refused(usize, i32),
}

/// A sending socket and the batch being built.
pub struct Transmitter {
    fd: OwnedFd,
    port: u16,
    wildcard: bool,
    runs: bool,
    arena: Box<[u8]>,
    used: usize,
    iovs: Vec<libc::iovec>,
    messages: Vec<Message>,
    names: Vec<RawAddr>,
    controls: Box<[Control]>,
    headers: Box<[libc::mmsghdr]>,
    packets: usize,
}

// SAFETY: the raw pointers are into this struct's own heap memory, or into memory that whoever calls `external` lends
// until the batch is sent or cleared; `Transmitter` itself is used by one thread at a time (`&mut self`).
unsafe impl Send for Transmitter {}

impl Transmitter {
    /// `runs`: the kernel may be given several packets at once.
    pub fn new(socket: TxSocket, runs: bool) -> Self {
        // SAFETY: integers and pointers, of which zero is a value.
        let header: libc::mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        Self {
            fd: socket.fd,
            port: socket.port,
            wildcard: socket.wildcard,
            runs: runs && socket.segments,
            arena: vec![0; PACKETS * PER_PACKET].into(),
            used: 0,
            iovs: Vec::with_capacity(IOVS),
            messages: Vec::with_capacity(MESSAGES),
            names: Vec::with_capacity(MESSAGES),
            controls: vec![Control([0; 80]); MESSAGES].into(),
            headers: vec![header; MESSAGES].into(),
            packets: 0,
        }
    }

    /// Source port of all packets.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Another packet of any kind fits.
    pub fn has_room(&self) -> bool {
        self.packets < PACKETS
            && self.messages.len() < MESSAGES
            && self.iovs.len() + IOVS_PER_PACKET <= IOVS
            && self.used + PER_PACKET <= self.arena.len()
    }

    /// Begins a packet of `len` bytes of UDP payload for queue pair `owner` (any number of the caller's). Returns the
    /// IPv4 identification that the kernel will give it: its place in its run. Needs [`Transmitter::has_room`].
    pub fn begin(&mut self, owner: u32, dest: &Dest, len: usize) -> u16 {
        self.packets += 1;
        if let Some(run) = self.messages.last_mut()
            && self.runs
            && run.owner == owner
            && !run.closed
            && len <= run.segment
            && run.packets < MAX_RUN_PACKETS
            && run.bytes + len <= MAX_RUN_BYTES
            && run.iovs + IOVS_PER_PACKET <= MAX_RUN_IOVS
        {
            run.closed = len < run.segment;
            run.bytes += len;
            run.packets += 1;
            return (run.packets - 1) as u16;
        }
        self.names.push(dest.name);
        let index = self.messages.len();
        self.messages.push(Message {
            first_iov: self.iovs.len(),
            iovs: 0,
            packets: 1,
            bytes: len,
            segment: len,
            closed: false,
            owner,
        });
        if self.wildcard {
            self.put_source(index, dest.src);
        }
        0
    }

    /// The control data of message `index` begins with its source address.
    fn put_source(&mut self, index: usize, src: IpAddr) {
        let control = &mut self.controls[index].0;
        control.fill(0);
        match src {
            IpAddr::V4(ip) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from(ip).to_be() },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                put_cmsg(control, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            IpAddr::V6(ip) => {
                let info =
                    libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: ip.octets() }, ipi6_ifindex: 0 };
                put_cmsg(control, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
        }
    }

    /// Bytes of the present packet, copied: its headers, its trailer, a small payload.
    pub fn copy(&mut self, bytes: &[u8]) {
        let at = self.used;
        self.arena[at..at + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
        let base = self.arena[at..].as_mut_ptr().cast::<libc::c_void>();
        let Some(run) = self.messages.last_mut() else { return };
        // Contiguous with what went before in the same message?
        if run.iovs > 0
            && let Some(last) = self.iovs.last_mut()
            && std::ptr::eq(last.iov_base.wrapping_byte_add(last.iov_len), base)
        {
            last.iov_len += bytes.len();
            return;
        }
        self.iovs.push(libc::iovec { iov_base: base, iov_len: bytes.len() });
        run.iovs += 1;
    }

    /// A payload of so many bytes is better copied.
    pub fn is_small(len: usize) -> bool {
        len <= SMALL
    }

    /// `len` bytes of the present packet, read when the batch is sent.
    ///
    /// # Safety
    /// They stay mapped until then, or until the batch is cleared.
    pub unsafe fn external(&mut self, addr: *const u8, len: usize) {
        let Some(run) = self.messages.last_mut() else { return };
        self.iovs.push(libc::iovec { iov_base: addr.cast_mut().cast(), iov_len: len });
        run.iovs += 1;
    }

    /// Sends the batch from packet `from` on, which must begin a message, and empties it. Returns what became of it.
    /// A packet that the network refuses for reasons of its own (no route, a firewall) counts as sent and lost.
    pub fn send(&mut self) -> Sent {
        let count = self.messages.len();
        let mut done = 0;
        let mut packets = 0;
        self.prepare();
        let result = loop {
            if done == count {
                break Sent::All;
            }
            // SAFETY: `count` headers were prepared; their names, control data and iovecs are owned by `self` and
            // unchanged since, and the memory behind the iovecs is the arena or was lent by `external`'s contract.
            let n = unsafe {
                libc::sendmmsg(
                    self.fd.as_raw_fd(),
                    self.headers[done..].as_mut_ptr(),
                    (count - done) as u32,
                    libc::MSG_DONTWAIT,
                )
            };
            if n > 0 {
                let n = (n as usize).min(count - done);
                packets += self.messages[done..done + n].iter().map(|m| m.packets).sum::<usize>();
                done += n;
                continue;
            }
            let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
            match errno {
                libc::EINTR => {}
                libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => break Sent::Busy(packets),
                libc::EIO | libc::EINVAL | libc::EMSGSIZE if self.messages[done].packets > 1 => {
                    self.runs = false;
                    break Sent::NoRuns(packets);
                }
                libc::EMSGSIZE | libc::EBADF | libc::EINVAL | libc::EFAULT => {
                    break Sent::Refused(packets, errno);
                }
                _ => {
                    packets += self.messages[done].packets;
                    done += 1;
                }
            }
        };
        self.clear();
        result
    }

    /// Forgets the batch.
    pub fn clear(&mut self) {
        self.used = 0;
        self.packets = 0;
        self.iovs.clear();
        self.messages.clear();
        self.names.clear();
    }

    fn prepare(&mut self) {
        for (i, message) in self.messages.iter().enumerate() {
            let mut control = 0;
            if self.wildcard {
                let v6 = self.names[i].len() as usize == size_of::<libc::sockaddr_in6>();
                control += if v6 { space::<libc::in6_pktinfo>() } else { space::<libc::in_pktinfo>() };
            }
            if message.packets > 1 {
                put_cmsg(
                    &mut self.controls[i].0[control..],
                    libc::SOL_UDP,
                    UDP_SEGMENT,
                    message.segment as u16,
                );
                control += space::<u16>();
            }
            let header = &mut self.headers[i].msg_hdr;
            header.msg_name = (&raw mut self.names[i]).cast();
            header.msg_namelen = self.names[i].len();
            header.msg_iov = self.iovs[message.first_iov..].as_mut_ptr();
            header.msg_iovlen = message.iovs;
            header.msg_control = if control > 0 { (&raw mut self.controls[i]).cast() } else { null_mut() };
            header.msg_controllen = control;
            header.msg_flags = 0;
        }
    }
}

/// Bytes of a control message with a `T`, padding included.
const fn space<T>() -> usize {
    // SAFETY: pure arithmetic.
    unsafe { libc::CMSG_SPACE(size_of::<T>() as u32) as usize }
}

/// Writes one control message to the start of `out`.
fn put_cmsg<T: Copy>(out: &mut [u8], level: i32, kind: i32, value: T) {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    // cmsg(3): the length is followed by level and type, and data begin aligned behind them, which the header's size is.
    const { assert!(HEADER.is_multiple_of(align_of::<libc::cmsghdr>())) };
    out[..space::<T>()].fill(0);
    let len = HEADER + size_of::<T>();
    let header = libc::cmsghdr { cmsg_len: len as _, cmsg_level: level, cmsg_type: kind };
    // SAFETY: `out` has `space::<T>()` bytes (the slice above was checked), which is at least header and value; both
    // are plain C types and written unaligned.
    unsafe {
        out.as_mut_ptr().cast::<libc::cmsghdr>().write_unaligned(header);
        out.as_mut_ptr().add(HEADER).cast::<T>().write_unaligned(value);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Receiver, open_rx, open_tx};
    use super::*;

    /// An address that nobody else uses.
    fn own_ip() -> String {
        test_support::address(test_support::network(), 1).to_string()
    }

    const PORT: u16 = 47_910;

    fn sockets(ip: &str, port: u16, runs: bool) -> (Receiver, Transmitter, Dest) {
        let ip: IpAddr = ip.parse().unwrap();
        let dst = SocketAddr::new(ip, port);
        let rx = Receiver::new(open_rx(dst, true, 1 << 20).unwrap().fd);
        let mut seed = u32::from(port) ^ std::process::id();
        let tx = open_tx(ip, || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed >> 8
        });
        (rx, Transmitter::new(tx.unwrap(), runs), Dest::new(ip, dst))
    }

    fn put(tx: &mut Transmitter, owner: u32, dest: &Dest, packet: &[u8]) -> u16 {
        assert!(tx.has_room());
        let id = tx.begin(owner, dest, packet.len());
        let (head, rest) = packet.split_at(12.min(packet.len()));
        tx.copy(head);
        if rest.len() > 300 {
            // SAFETY: `packet` outlives the batch in every test.
            unsafe { tx.external(rest.as_ptr(), rest.len()) };
        } else {
            tx.copy(rest);
        }
        id
    }

    fn receive(rx: &mut Receiver, want: usize) -> Vec<Vec<u8>> {
        let mut got = Vec::new();
        while got.len() < want {
            let (n, dropped) = rx.receive().unwrap();
            assert_eq!(dropped, 0);
            for i in 0..n {
                let d = rx.datagram(i).unwrap();
                got.extend(d.bytes.chunks(d.segment).map(<[u8]>::to_vec));
            }
        }
        got
    }

    /// Packets whose bytes 4..8 name queue pair 1, so that the group's first socket gets them.
    fn packet(len: usize, tag: u8) -> Vec<u8> {
        let mut packet = vec![tag; len];
        packet[4..8].copy_from_slice(&[0, 0, 0, 1]);
        packet
    }

    #[test]
    fn runs_arrive_as_packets_in_order_with_and_without_segmentation() {
        for runs in [true, false] {
            let (mut rx, mut tx, dest) = sockets(&own_ip(), PORT, runs);
            let lens = [1000, 1000, 1000, 40, 50, 50, 2000];
            let packets: Vec<_> = lens.iter().enumerate().map(|(i, len)| packet(*len, i as u8)).collect();
            let ids: Vec<u16> = packets.iter().map(|p| put(&mut tx, 7, &dest, p)).collect();
            assert_eq!(ids, if runs { [0, 1, 2, 3, 0, 1, 0] } else { [0; 7] });
            assert_eq!(tx.send(), Sent::All);
            assert_eq!(receive(&mut rx, 7), packets);
        }
    }

    #[test]
    fn queue_pairs_do_not_share_a_run() {
        let (mut rx, mut tx, dest) = sockets(&own_ip(), PORT, true);
        let packets = [packet(64, 1), packet(64, 2), packet(64, 3)];
        let ids = [put(&mut tx, 1, &dest, &packets[0]), put(&mut tx, 2, &dest, &packets[1])];
        assert_eq!((ids, put(&mut tx, 2, &dest, &packets[2])), ([0, 0], 1));
        assert_eq!(tx.send(), Sent::All);
        assert_eq!(receive(&mut rx, 3), packets);
    }

    #[test]
    fn a_full_batch_is_within_every_limit() {
        let (mut rx, mut tx, dest) = sockets(&own_ip(), PORT, true);
        let large = packet(4140, 9);
        let mut n = 0;
        while tx.has_room() {
            put(&mut tx, 1, &dest, &large);
            n += 1;
        }
        assert!(n > 200, "{n}");
        assert_eq!(tx.send(), Sent::All);
        assert!(receive(&mut rx, n).iter().all(|p| *p == large));
    }

    #[test]
    fn ipv6_and_wildcard_sources_work() {
        for (wildcard, ip) in [("::", "::1".to_owned()), ("0.0.0.0", own_ip())] {
            let port = test_support::port();
            let (mut rx, mut tx, _) = sockets(wildcard, port, true);
            let ip: IpAddr = ip.parse().unwrap();
            let dest = Dest::new(ip, SocketAddr::new(ip, port));
            let sent = [packet(100, 1), packet(100, 2)];
            for p in &sent {
                put(&mut tx, 1, &dest, p);
            }
            assert_eq!(tx.send(), Sent::All);
            let got = loop {
                let (n, _) = rx.receive().unwrap();
                if n > 0 {
                    let d = rx.datagram(0).unwrap();
                    break (d.src, d.src_port, d.dst, d.segment, d.bytes.to_vec());
                }
            };
            assert_eq!(got, (ip, tx.port(), Some(ip), 100, sent.concat()));
        }
    }

    #[test]
    fn a_packet_too_large_for_the_path_is_refused() {
        let (_rx, mut tx, dest) = sockets(&own_ip(), PORT, true);
        let large = vec![0; 65_530];
        tx.begin(1, &dest, large.len());
        // SAFETY: `large` outlives the batch.
        unsafe { tx.external(large.as_ptr(), large.len()) };
        assert_eq!(tx.send(), Sent::Refused(0, libc::EMSGSIZE));
    }

    #[test]
    fn sockets_of_a_group_take_packets_by_their_number() {
        let addr = SocketAddr::new(own_ip().parse().unwrap(), PORT);
        let mut group: Vec<Receiver> =
            (0..5).map(|i| Receiver::new(open_rx(addr, i == 0, 0).unwrap().fd)).collect();
        let (_, mut tx, _) = sockets(&own_ip(), PORT, true);
        let dest = Dest::new(addr.ip(), addr);
        // Queue pair number → index of its socket.
        for (qpn, index) in [(1u32, 0usize), (0x80, 0), (0xabcd01, 1), (0x12_3484, 4), (3, 3)] {
            let mut p = packet(20, 1);
            p[4..8].copy_from_slice(&(qpn | 0xff00_0000).to_be_bytes());
            put(&mut tx, qpn, &dest, &p);
            assert_eq!(tx.send(), Sent::All);
            assert_eq!(receive(&mut group[index], 1), [p]);
        }
    }
}
