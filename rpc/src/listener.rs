//! The listening socket and the lock file beside it.

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Why the socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Another process holds the lock file.
    #[error(
        "RPC socket {} is in use{}; stop that process or choose another socket with -r",
        path.display(),
        pid.map(|pid| format!(" by process {pid}")).unwrap_or_default()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
        /// The holder, if its lock file says so.
        pid: Option<u32>,
    },
    /// There is something else at the path, and it is not removed.
    #[error("{} exists and is not a {should}; choose another path with -r", path.display())]
    NotA {
        /// What it should be.
        should: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The socket or its lock file is somebody else's: anybody can put files into a directory such as /var/tmp.
    #[error(
        "{} belongs to user {owner}, not to us (user {}); remove it, or choose another path with -r, best in a directory \
         that only its user can write, such as /run/rnbd",
        path.display(),
        rustix::process::geteuid().as_raw()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// User ID of who has made it.
        owner: u32,
    },
    /// A path of a Unix socket has at most 107 bytes (`unix(7)`).
    #[error("RPC socket path {} has {length} bytes; at most 107 are possible", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// A system call failed.
    #[error("cannot {what} {}: {source}", path.display())]
    System {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
}

fn system(what: &'static str, path: &Path) -> impl FnOnce(Errno) -> ListenError {
    let path = path.to_owned();
    move |errno| ListenError::System { what, path, source: errno.into() }
}

/// `unix(7)`: `sun_path` has 108 bytes, the last of which is NUL.
const MAX_PATH: usize = 107;

/// A listening Unix socket that no other process can take over while it exists. Both files go when it is dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    // Dropped in this order, after `drop` has removed the socket: the lock is released last.
    socket: OwnedFd,
    path: PathBuf,
    _lock: LockFile,
}

impl Listener {
    /// Wins the lock `<path>.lock`, removes a stale socket and listens, with mode 0600 from the first moment.
    pub(crate) fn bind(path: &Path) -> Result<Self, ListenError> {
        let length = path.as_os_str().len();
        if length > MAX_PATH {
            return Err(ListenError::PathTooLong { path: path.to_owned(), length });
        }
        let lock = LockFile::acquire(path)?;
        remove_stale(path)?;
        let socket = listen(path)?;
        Ok(Self { socket, path: path.to_owned(), _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection, non-blocking; `None` if there is none now.
    pub(crate) fn accept(&self) -> Result<Option<OwnedFd>, Errno> {
        match rustix::net::accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The socket of a server that died is removed; anything else at the path is somebody's file.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(ListenError::System { what: "look at", path: path.to_owned(), source }),
    };
    check_owner(path, metadata.uid())?;
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotA { should: "socket", path: path.to_owned() });
    }
    rustix::fs::unlink(path).map_err(system("remove the stale socket", path))
}

/// Root's files are as good as ours: a program that was started as root may have become another user.
fn check_owner(path: &Path, owner: u32) -> Result<(), ListenError> {
    match owner {
        0 => Ok(()),
        _ if owner == rustix::process::geteuid().as_raw() => Ok(()),
        _ => Err(ListenError::Foreign { path: path.to_owned(), owner }),
    }
}

fn listen(path: &Path) -> Result<OwnedFd, ListenError> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(system("create the socket", path))?;
    // Linux gives the file the mode of the socket's inode (`unix_bind` in net/unix/af_unix.c), so that there is no
    // moment in which others could connect.
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::fchmod(&socket, mode).map_err(system("restrict", path))?;
    let address = SocketAddrUnix::new(path).map_err(system("use the path", path))?;
    rustix::net::bind(&socket, &address).map_err(system("bind the RPC socket to", path))?;
    let ready = rustix::fs::chmodat(CWD, path, mode, AtFlags::empty())
        .map_err(system("restrict", path))
        .and_then(|()| rustix::net::listen(&socket, 512).map_err(system("listen on", path)));
    if let Err(error) = ready {
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(socket)
}

/// A locked file that is removed when the lock is given up.
#[derive(Debug)]
struct LockFile {
    path: PathBuf,
    /// Holds the lock until it is closed, after the file has been removed.
    _file: File,
}

impl LockFile {
    fn acquire(socket: &Path) -> Result<Self, ListenError> {
        let mut name: OsString = socket.as_os_str().to_owned();
        name.push(".lock");
        let path = PathBuf::from(name);
        loop {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            // A FIFO opens as well; a file of another user may not (fs.protected_regular), not even for root.
            let fd = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(|errno| {
                let owner = std::fs::symlink_metadata(&path).ok().map(|metadata| metadata.uid());
                let foreign = owner.and_then(|owner| check_owner(&path, owner).err());
                foreign.unwrap_or_else(|| system("open the lock file", &path)(errno))
            })?;
            let mut file = File::from(fd);
            let metadata = file.metadata().map_err(|source| ListenError::System {
                what: "look at the lock file",
                path: path.clone(),
                source,
            })?;
            check_owner(&path, metadata.uid())?;
            if !metadata.is_file() {
                return Err(ListenError::NotA { should: "file", path });
            }
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    return Err(ListenError::InUse { path: socket.to_owned(), pid: read_pid(&mut file) });
                }
                Err(errno) => return Err(system("lock", &path)(errno)),
            }
            // The last holder may have removed the file between our open and our lock; then this lock keeps nobody
            // out, and the next turn makes a new file.
            if !is_file_at(&file, &path) {
                continue;
            }
            // The number is for the message of a second instance only; the lock works without it.
            if let Err(error) =
                file.set_len(0).and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()))
            {
                tracing::warn!(path = %path.display(), %error, "cannot write the process number to the lock file");
            }
            return Ok(Self { path, _file: file });
        }
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn is_file_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => ours.dev() == there.dev() && ours.ino() == there.ino(),
        _ => false,
    }
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
