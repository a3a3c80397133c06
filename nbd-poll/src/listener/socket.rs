//! The listening socket.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::address::{Address, Peer};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 512;
/// `unix(7)`: `sun_path` has 108 bytes, the last of which is NUL.
const MAX_PATH: usize = 107;
/// Bytes that an accepted socket may hold for its reader: a few requests of the largest usual size.
const SOCKET_BUFFER: usize = 2 << 20;
/// A silent TCP client is asked whether it lives after a minute, and given up after two.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 6;

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Somebody answers there.
    #[error("{0} is in use by another program; stop it or choose another address")]
    InUse(Address),
    /// There is something else at the path, and it is not removed.
    #[error("{} exists and is not a socket; choose another path", .0.display())]
    NotASocket(PathBuf),
    /// Longer than the system's limit.
    #[error("the socket path {} has {length} bytes; 1 to {MAX_PATH} are possible", path.display())]
    Path {
        /// As asked for.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Somebody else's socket is not what was promised.
    #[error("{0} is not a listening stream socket (TCP or unix)")]
    NotListening(String),
    /// A system call failed.
    #[error("cannot {what} {address}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// Where.
        address: Address,
        /// Why it failed.
        source: io::Error,
    },
}

impl ListenError {
    /// As a positive errno.
    pub fn errno(&self) -> i32 {
        match self {
            Self::InUse(_) => libc::EADDRINUSE,
            Self::NotASocket(_) | Self::NotListening(_) => libc::ENOTSOCK,
            Self::Path { .. } => libc::ENAMETOOLONG,
            Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// A listening socket; the file of a unix socket goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    address: Address,
    /// Device and inode of the socket's file, so that nobody else's is removed.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Listens. A unix socket has mode 0600 from its first moment; the file of a server that died is replaced. Port 0
    /// takes a free one.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        match address {
            Address::Unix(path) => Self::bind_unix(address, path),
            Address::Tcp(addr) => Self::bind_tcp(address, *addr),
            Address::Stdio => Err(ListenError::NotListening("standard input".into())),
        }
    }

    fn bind_unix(address: &Address, path: &Path) -> Result<Self, ListenError> {
        let length = path.as_os_str().len();
        if length == 0 || length > MAX_PATH {
            return Err(ListenError::Path { path: path.into(), length });
        }
        let unix = SocketAddrUnix::new(path).map_err(system("use", address))?;
        remove_stale(address, path, &unix)?;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)
            .map_err(system("make a socket for", address))?;
        // Linux gives the file the mode of the socket's inode (`unix_bind` in net/unix/af_unix.c), so that there is
        // no moment in which others could connect.
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::fchmod(&socket, mode).map_err(system("restrict", address))?;
        rustix::net::bind(&socket, &unix).map_err(|e| match e {
            Errno::ADDRINUSE => ListenError::InUse(address.clone()),
            e => system("bind", address)(e),
        })?;
        pass_no_descriptors(&socket);
        // From here on the file is ours, and goes if the rest fails.
        let file = std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let listener = Self { socket, address: address.clone(), file };
        rustix::fs::chmodat(CWD, path, mode, AtFlags::empty()).map_err(system("restrict", address))?;
        rustix::net::listen(&listener.socket, BACKLOG).map_err(system("listen on", address))?;
        Ok(listener)
    }

    fn bind_tcp(address: &Address, addr: SocketAddr) -> Result<Self, ListenError> {
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, SocketType::STREAM, FLAGS, None)
            .map_err(system("make a socket for", address))?;
        sockopt::set_socket_reuseaddr(&socket, true).map_err(system("reuse", address))?;
        if addr.is_ipv6() && addr.ip() != Ipv6Addr::UNSPECIFIED {
            sockopt::set_ipv6_v6only(&socket, true).map_err(system("restrict to IPv6", address))?;
        }
        rustix::net::bind(&socket, &addr).map_err(|e| match e {
            Errno::ADDRINUSE => ListenError::InUse(address.clone()),
            e => system("bind", address)(e),
        })?;
        rustix::net::listen(&socket, BACKLOG).map_err(system("listen on", address))?;
        let bound = rustix::net::getsockname(&socket).map_err(system("look at", address))?;
        let bound = SocketAddr::try_from(bound).unwrap_or(addr);
        Ok(Self { socket, address: Address::Tcp(bound), file: None })
    }

    /// Takes over a socket on which somebody else has made us listen (socket activation); `name` is its name for errors.
    /// The file of a unix socket stays when this is dropped.
    ///
    /// # Errors
    /// [`ListenError::NotListening`].
    pub fn adopt(socket: OwnedFd, name: &str) -> Result<Self, ListenError> {
        let wrong = || ListenError::NotListening(name.into());
        let stream = sockopt::socket_type(&socket).is_ok_and(|t| t == SocketType::STREAM);
        if !stream || !sockopt::socket_acceptconn(&socket).is_ok_and(|listens| listens) {
            return Err(wrong());
        }
        rustix::io::ioctl_fionbio(&socket, true).map_err(|_| wrong())?;
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).map_err(|_| wrong())?;
        let bound = rustix::net::getsockname(&socket).map_err(|_| wrong())?;
        let address = if let Ok(addr) = SocketAddr::try_from(bound.clone()) {
            Address::Tcp(addr)
        } else {
            let unix = SocketAddrUnix::try_from(bound).map_err(|_| wrong())?;
            let path = unix.path_bytes().unwrap_or(name.as_bytes());
            Address::Unix(PathBuf::from(std::ffi::OsStr::from_bytes(path)))
        };
        Ok(Self { socket, address, file: None })
    }

    /// Where it listens, with the port in use.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The next connection, non-blocking and tuned for requests and replies; `None` if there is none now.
    ///
    /// # Errors
    /// The system's; EMFILE, ENFILE, ENOBUFS and ENOMEM pass.
    pub fn accept(&self) -> io::Result<Option<(OwnedFd, Peer)>> {
        let socket = match rustix::net::accept_with(&self.socket, FLAGS) {
            Ok(socket) => socket,
            // Errors of a connection that is gone already are not errors of the listener (accept(2)).
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED | Errno::PROTO | Errno::NETDOWN) => {
                return Ok(None);
            }
            Err(e) => return Err(e.into()),
        };
        // A connection that went while it was looked at is somebody's who left.
        Ok(tune(&socket, &self.address).ok().map(|peer| (socket, peer)))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Address::Unix(path) = &self.address else { return };
        let there = std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        if self.file.is_some() && there == self.file {
            // Already gone is as good.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Who is at the other end of a socket that somebody else has accepted, as inetd does; the socket is tuned.
///
/// # Errors
/// It is not a connected stream socket.
pub fn peer_of(socket: &OwnedFd) -> io::Result<Peer> {
    rustix::io::ioctl_fionbio(socket, true)?;
    let peer = rustix::net::getpeername(socket)?.ok_or(Errno::NOTCONN)?;
    let address = match SocketAddr::try_from(peer) {
        Ok(addr) => Address::Tcp(addr),
        Err(_) => Address::Stdio,
    };
    Ok(tune(socket, &address)?)
}

fn tune(socket: &OwnedFd, address: &Address) -> rustix::io::Result<Peer> {
    match address {
        Address::Unix(_) | Address::Stdio => {
            // Best effort: beyond net.core.wmem_max only root may go.
            if sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
                let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER);
            }
            let who = sockopt::socket_peercred(socket)?;
            Ok(Peer::Unix { pid: who.pid.as_raw_nonzero().get() as u32, uid: who.uid.as_raw() })
        }
        Address::Tcp(_) => {
            sockopt::set_tcp_nodelay(socket, true)?;
            // A client that lost its power never says good-bye.
            sockopt::set_socket_keepalive(socket, true)?;
            sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
            sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
            sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
            let peer = rustix::net::getpeername(socket)?.ok_or(Errno::NOTCONN)?;
            Ok(Peer::Tcp(SocketAddr::try_from(peer).map_err(|_| Errno::AFNOSUPPORT)?))
        }
    }
}

/// Clients cannot send descriptors, which nobody here would receive: to drop them might wait (a TCP socket that lingers).
/// Connections have it from their listener. Linux before 6.16 has no such option.
fn pass_no_descriptors(socket: &OwnedFd) {
    /// Source: linux/include/uapi/asm-generic/socket.h; the same on all architectures that this is built for.
    const SO_PASSRIGHTS: libc::c_int = 83;
    let off: libc::c_int = 0;
    // SAFETY: an open socket, and an option of one int, which lives during the call.
    let _ = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const off).cast(),
            size_of_val(&off) as libc::socklen_t,
        )
    };
}

/// Removes the file of a server that died. Anything else at the path is somebody's.
fn remove_stale(address: &Address, path: &Path, unix: &SocketAddrUnix) -> Result<(), ListenError> {
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(ListenError::System { what: "look at", address: address.clone(), source }),
        Ok(m) if !m.file_type().is_socket() => return Err(ListenError::NotASocket(path.into())),
        Ok(_) => {}
    }
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)
        .map_err(system("make a socket for", address))?;
    match rustix::net::connect(&probe, unix) {
        // Nobody listens there.
        Err(Errno::CONNREFUSED) => {
            rustix::fs::unlink(path).map_err(system("remove the stale socket", address))
        }
        Err(Errno::NOENT) => Ok(()),
        // It answers, its backlog is full, or it may not be asked.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse(address.clone())),
        Err(e) => Err(system("take over", address)(e)),
    }
}

fn system<E: Into<io::Error>>(what: &'static str, address: &Address) -> impl FnOnce(E) -> ListenError {
    let address = address.clone();
    move |e| ListenError::System { what, address, source: e.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use test_support::Dir;

    #[test]
    fn a_socket_that_listens_already_is_taken_over() {
        let dir = Dir::new("nbd-listener");
        let path = dir.join("sock");
        let listening = UnixListener::bind(&path).unwrap();
        let listener = Listener::adopt(listening.into(), "test").unwrap();
        assert_eq!(listener.address(), &Address::Unix(path.clone()));
        let client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some() && listener.accept().unwrap().is_none());
        drop(listener);
        assert!(path.exists(), "the file is somebody else's");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = tcp.local_addr().unwrap();
        assert_eq!(Listener::adopt(tcp.into(), "test").unwrap().address(), &Address::Tcp(addr));
        let connected = Listener::adopt(client.into(), "client").unwrap_err();
        assert_eq!(connected.to_string(), "client is not a listening stream socket (TCP or unix)");
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Listener::adopt(file.into(), "f"), Err(ListenError::NotListening(_))));
    }

    #[test]
    fn a_unix_socket_is_private_and_goes_with_its_listener() {
        let dir = Dir::new("nbd-listener");
        let path = dir.join("sock");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(listener.accept().unwrap().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        let (_, peer) = listener.accept().unwrap().unwrap();
        let Peer::Unix { pid, .. } = peer else { panic!("{peer:?}") };
        assert_eq!(pid, std::process::id());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn descriptors_are_not_passed() {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let dir = Dir::new("nbd-listener");
        let path = dir.join("sock");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [listener.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        match sendmsg(&client, &[io::IoSlice::new(b"x")], &mut control, SendFlags::empty()) {
            Err(Errno::PERM) => {}
            // Of no use before Linux 6.16.
            other => eprintln!("skipped: this kernel passes them all the same: {other:?}"),
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = Dir::new("nbd-listener");
        let path = dir.join("sock");
        let address = Address::Unix(path.clone());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let first = Listener::bind(&address).unwrap();
        assert!(matches!(Listener::bind(&address), Err(ListenError::InUse(_))));
        // The probe above was a connection like any other, and is gone.
        assert!(first.accept().unwrap().is_some());
        assert!(path.exists());
        // Somebody else's file is not removed.
        std::fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(other);
    }

    #[test]
    fn what_is_no_socket_stays() {
        let dir = Dir::new("nbd-listener");
        let path = dir.join("sock");
        std::fs::write(&path, b"data").unwrap();
        let result = Listener::bind(&Address::Unix(path.clone()));
        assert!(matches!(result, Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(108)));
        for bad in [long, PathBuf::new()] {
            assert!(matches!(Listener::bind(&Address::Unix(bad)), Err(ListenError::Path { .. })));
        }
        let gone = PathBuf::from("/nonexistent/dir/sock");
        assert!(matches!(Listener::bind(&Address::Unix(gone)), Err(e) if e.errno() == libc::ENOENT));
    }

    #[test]
    fn tcp_takes_a_free_port_and_knows_it() {
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = Listener::bind(&Address::Tcp(addr.parse().unwrap())) else {
                eprintln!("skipped: no {addr} on this host");
                continue;
            };
            let Address::Tcp(bound) = listener.address().clone() else { panic!() };
            assert_ne!(bound.port(), 0);
            assert!(matches!(Listener::bind(&Address::Tcp(bound)), Err(ListenError::InUse(_))));
            let client = std::net::TcpStream::connect(bound).unwrap();
            let (socket, peer) = listener.accept().unwrap().unwrap();
            assert_eq!(peer, Peer::Tcp(client.local_addr().unwrap()));
            assert!(sockopt::tcp_nodelay(&socket).unwrap());
        }
    }
}
