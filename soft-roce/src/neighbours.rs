//! Several processes of one user on one address. Each has its own sockets in the address' SO_REUSEPORT group, which the
//! kernel lets in only if they are one user's, and each must have its own slots of queue pair numbers, communication IDs and
//! listening ports. They are claimed as Unix sockets (`unix(7)`) in directories that are the user's alone
//! ([`Place`]); and what the kernel gives to the wrong process is passed on to the socket of that name. A name whose owner
//! has died answers nobody, and is taken over.
//!
//! ```text
//! ADDR.slot.SLOT   an engine's or connection manager's place in the group, low bits of its QPNs
//! ADDR.port.PORT   a listener
//! cm.TAG           a process, low bits of its communication IDs
//! ```

use std::collections::HashMap;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::time::Timespec;

use crate::engine::Source;
use crate::places::{Locked, Place};

/// Bytes before the packet: both addresses in their IPv6 form, source port, place in the run.
const HEADER: usize = 36;
/// The largest packet: 4096 bytes of payload and all headers, with room to spare.
const MAX_PACKET: usize = 8192;

/// Names that this process holds, and its way to others.
pub struct Neighbours {
    /// A name is claimed in all of them: others may see some only.
    places: Vec<Place>,
    /// All claims; readable when one of them has got something.
    watch: OwnedFd,
    claims: Mutex<Claims>,
    sender: UnixDatagram,
}

#[derive(Default)]
struct Claims {
    next: u64,
    sockets: HashMap<u64, Weak<UnixDatagram>>,
}

/// A name that is ours until this is dropped.
pub struct Claim {
    sockets: Vec<Bound>,
}

/// A socket and its file.
struct Bound {
    path: PathBuf,
    _socket: Arc<UnixDatagram>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        // While the socket is open nobody takes the name over, so the file is ours. One that stays is taken for stale.
        let _ = std::fs::remove_file(&self.path);
    }
}

const SLOT: &str = ".slot.";

/// Name of a slot on `ip`.
pub fn slot_name(ip: IpAddr, slot: u8) -> String {
    format!("{ip}{SLOT}{slot}")
}

/// Name of a listener on `ip`.
pub fn port_name(ip: IpAddr, port: u16) -> String {
    format!("{ip}.port.{port}")
}

/// Name of the process whose communication IDs carry `tag`.
pub fn cm_name(tag: u8) -> String {
    format!("cm.{tag}")
}

impl Neighbours {
    /// # Errors
    /// Out of file descriptors, or no [`Place`].
    pub fn new() -> io::Result<Self> {
        Self::in_places(Place::all()?)
    }

    pub(crate) fn in_places(places: Vec<Place>) -> io::Result<Self> {
        places.iter().try_for_each(forget_dead)?;
        let sender = UnixDatagram::unbound()?;
        sender.set_nonblocking(true)?;
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { places, watch, claims: Mutex::default(), sender })
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes a name.
    ///
    /// # Errors
    /// Another process (or this one) has it: EADDRINUSE.
    pub fn claim(&self, name: &str) -> io::Result<Claim> {
        let _locks = self.lock()?;
        self.claim_locked(name)
    }

    /// Nobody else claims anything until this is dropped.
    fn lock(&self) -> io::Result<Vec<Locked<'_>>> {
        self.places.iter().map(Place::lock).collect()
    }

    fn claim_locked(&self, name: &str) -> io::Result<Claim> {
        let sockets: io::Result<_> = self.places.iter().map(|place| self.bind(place.file(name))).collect();
        Ok(Claim { sockets: sockets? })
    }

    fn bind(&self, path: PathBuf) -> io::Result<Bound> {
        if answers(&path) {
            return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
        }
        // What a process has left that was killed.
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let socket = UnixDatagram::bind(&path)?;
        let bound = Bound { path, _socket: Arc::new(socket) };
        let socket = &bound._socket;
        // Nobody but this user and root can write to it; who does is looked at all the same.
        rustix::net::sockopt::set_socket_passcred(socket, true)?;
        socket.set_nonblocking(true)?;
        let mut claims = self.claims();
        claims.next += 1;
        let id = claims.next;
        epoll::add(&self.watch, socket, epoll::EventData::new_u64(id), epoll::EventFlags::IN)?;
        claims.sockets.retain(|_, socket| socket.strong_count() > 0);
        claims.sockets.insert(id, Arc::downgrade(socket));
        Ok(bound)
    }

    /// Somebody has the name.
    pub fn is_taken(&self, name: &str) -> bool {
        // Not by trying to take it, which others could see.
        self.places.iter().any(|place| answers(&place.file(name)))
    }

    /// Somebody has a slot on `ip`, or on all addresses, or on any if `ip` is unspecified: whoever joins the group on `ip`
    /// has company. `but`: this does not count.
    pub fn has_company(&self, ip: IpAddr, but: &Claim) -> bool {
        let meets = |name: &str| {
            let other = name.split_once(SLOT).and_then(|(ip, _)| ip.parse::<IpAddr>().ok());
            other.is_some_and(|other| {
                other.is_ipv4() == ip.is_ipv4()
                    && (other == ip || other.is_unspecified() || ip.is_unspecified())
            })
        };
        self.places.iter().any(|place| {
            let others = place.names().filter(|name| meets(name)).map(|name| place.file(&name));
            let mut others = others.filter(|path| !but.sockets.iter().any(|own| own.path == *path));
            others.any(|path| answers(&path))
        })
    }

    /// Takes the first free of the names of `numbers`.
    ///
    /// # Errors
    /// None is free: ENOSPC.
    pub fn claim_first(
        &self,
        numbers: std::ops::Range<u8>,
        name: impl Fn(u8) -> String,
    ) -> io::Result<(u8, Claim)> {
        self.claim_first_and(numbers, name, |_| ()).map(|(number, claim, ())| (number, claim))
    }

    /// As [`Neighbours::claim_first`], and runs `then` before anybody else claims anything.
    ///
    /// # Errors
    /// As for that.
    pub fn claim_first_and<T>(
        &self,
        numbers: std::ops::Range<u8>,
        name: impl Fn(u8) -> String,
        then: impl FnOnce(&Claim) -> T,
    ) -> io::Result<(u8, Claim, T)> {
        let _locks = self.lock()?;
        for number in numbers {
            match self.claim_locked(&name(number)) {
                Ok(claim) => {
                    let also = then(&claim);
                    return Ok((number, claim, also));
                }
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }

    /// Passes a packet on to whoever has `name`. False: nobody has, or its queue is full.
    pub fn pass(&self, name: &str, from: &Source, udp: &[u8]) -> bool {
        let mut message = [0; HEADER + MAX_PACKET];
        let Some(body) = message.get_mut(HEADER..HEADER + udp.len()) else { return false };
        body.copy_from_slice(udp);
        message[..16].copy_from_slice(&v6(from.src).octets());
        message[16..32].copy_from_slice(&v6(from.dst).octets());
        message[32..34].copy_from_slice(&from.src_port.to_ne_bytes());
        message[34..36].copy_from_slice(&from.index.to_ne_bytes());
        let message = &message[..HEADER + udp.len()];
        self.places.iter().any(|place| self.sender.send_to(message, place.file(name)).is_ok())
    }

    /// Readable when [`Neighbours::receive`] has something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// Gives what other processes have passed on to `each`. True: there was something.
    pub fn receive(&self, mut each: impl FnMut(&Source, &[u8])) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut events = Vec::with_capacity(8);
        if epoll::wait(&self.watch, spare_capacity(&mut events), Some(&now)).is_err() {
            return false;
        }
        for event in &events {
            let socket = self.claims().sockets.get(&event.data.u64()).and_then(Weak::upgrade);
            let Some(socket) = socket else { continue };
            // A bounded share of what may be a flood.
            for _ in 0..64 {
                let mut buffer = [0; HEADER + MAX_PACKET];
                let Some((len, trusted)) = receive_one(&socket, &mut buffer) else { break };
                if trusted && let Some((from, udp)) = decode(&buffer[..len]) {
                    each(&from, udp);
                }
            }
        }
        !events.is_empty()
    }
}

/// Removes names of processes that were killed: nobody else would, if they are not asked for again.
fn forget_dead(place: &Place) -> io::Result<()> {
    let _lock = place.lock()?;
    let dead = place.names().map(|name| place.file(&name)).filter(|path| !answers(path));
    dead.for_each(|path| drop(std::fs::remove_file(path)));
    Ok(())
}

/// A living process has the name `path`.
fn answers(path: &Path) -> bool {
    UnixDatagram::unbound().and_then(|socket| socket.connect(path)).is_ok()
}

fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

fn decode(message: &[u8]) -> Option<(Source, &[u8])> {
    let (header, udp) = message.split_first_chunk::<HEADER>()?;
    let [src @ .., _, _, _, _] = header;
    let (src, dst) = src.split_first_chunk::<16>()?;
    let dst: &[u8; 16] = dst.try_into().ok()?;
    let from = Source {
        src: Ipv6Addr::from(*src).to_canonical(),
        src_port: u16::from_ne_bytes([header[32], header[33]]),
        dst: Ipv6Addr::from(*dst).to_canonical(),
        index: u16::from_ne_bytes([header[34], header[35]]),
    };
    Some((from, udp))
}

/// One message's length, and whether it is from a process of our user or of root. Source: `unix(7)`, SCM_CREDENTIALS.
fn receive_one(socket: &UnixDatagram, buffer: &mut [u8]) -> Option<(usize, bool)> {
    #[repr(C, align(8))]
    struct Control([u8; 64]);
    let mut control = Control([0; 64]);
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: integers and pointers, of which zero is a value.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = size_of::<Control>();
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header describes `buffer` and `control`, both exclusively borrowed, with their sizes.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let len = usize::try_from(len).ok()?;
    let mut trusted = false;
    // SAFETY: the kernel has written `msg_controllen` bytes of well-formed messages; one of this level and type holds a
    // `ucred`, read unaligned.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while !at.is_null() {
            if (*at).cmsg_level == libc::SOL_SOCKET && (*at).cmsg_type == libc::SCM_CREDENTIALS {
                let cred = libc::CMSG_DATA(at).cast::<libc::ucred>().read_unaligned();
                trusted = cred.uid == 0 || cred.uid == libc::geteuid();
            }
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    Some((len, trusted && header.msg_flags & libc::MSG_TRUNC == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Source {
        Source { src: "192.0.2.1".parse().unwrap(), src_port: 5, dst: "::1".parse().unwrap(), index: 3 }
    }

    #[test]
    fn a_name_has_one_owner_and_gets_what_is_passed_on() {
        let (a, b) = (Neighbours::new().unwrap(), Neighbours::new().unwrap());
        let name = format!("test.{}", std::process::id());
        assert!(!a.pass(&name, &source(), b"nobody"));
        let claim = b.claim(&name).unwrap();
        assert_eq!(a.claim(&name).err().unwrap().kind(), io::ErrorKind::AddrInUse);
        assert!(a.is_taken(&name) && !a.is_taken(&format!("{name}.free")));
        assert!(a.pass(&name, &source(), b"packet"));
        let mut got = Vec::new();
        assert!(b.receive(|from, udp| got.push((
            from.src,
            from.src_port,
            from.dst,
            from.index,
            udp.to_vec()
        ))));
        let s = source();
        assert_eq!(got, [(s.src, s.src_port, s.dst, s.index, b"packet".to_vec())]);
        drop(claim);
        assert!(!a.pass(&name, &source(), b"gone"));
        a.claim(&name).unwrap();
    }

    #[test]
    fn the_first_free_number_is_taken() {
        let n = Neighbours::new().unwrap();
        let name = |i| format!("test-first.{}.{i}", std::process::id());
        let (a, _first) = n.claim_first(2..4, name).unwrap();
        let (b, _second) = n.claim_first(2..4, name).unwrap();
        assert_eq!((a, b), (2, 3));
        assert_eq!(n.claim_first(2..4, name).err().unwrap().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn the_name_of_a_process_that_was_killed_is_taken_over() {
        let n = Neighbours::new().unwrap();
        let name = format!("test-killed.{}", std::process::id());
        // Closed, and the file left.
        drop(UnixDatagram::bind(n.places[0].file(&name)).unwrap());
        assert!(!n.is_taken(&name) && !n.pass(&name, &source(), b"nobody"));
        let _claim = n.claim(&name).unwrap();
        assert!(n.is_taken(&name));
    }

    #[test]
    fn company_is_who_has_the_same_address() {
        let n = Neighbours::new().unwrap();
        // Of the documentation: nobody has them.
        let ip = |last: u8| IpAddr::from([203, 0, 113, last]);
        let take = |ip, slot| n.claim_first(slot..slot + 1, |slot| slot_name(ip, slot)).unwrap().1;
        let first = take(ip(7), 0);
        assert!(!n.has_company(ip(7), &first));
        let second = take(ip(7), 1);
        assert!(n.has_company(ip(7), &first) && n.has_company(ip(7), &second));
        assert!(!n.has_company("2001:db8::7".parse().unwrap(), &first));
        assert!(n.has_company("0.0.0.0".parse().unwrap(), &first));
        drop(second);
        assert!(!n.has_company(ip(7), &first));
    }
}
