//! Devices by ioctl, as nbd-client did before netlink (Linux `include/uapi/linux/nbd.h`). A thread stays in
//! `NBD_DO_IT` for as long as the device lives; the device ends with the thread, and so with the process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::{Disk, Error, sysfs};

/// `_IO(0xab, nr)`: none of them has a size or direction.
const fn request(nr: u64) -> libc::Ioctl {
    (0xab << 8 | nr) as libc::Ioctl
}

const NBD_SET_SOCK: libc::Ioctl = request(0);
const NBD_SET_BLKSIZE: libc::Ioctl = request(1);
const NBD_DO_IT: libc::Ioctl = request(3);
const NBD_CLEAR_SOCK: libc::Ioctl = request(4);
const NBD_SET_SIZE_BLOCKS: libc::Ioctl = request(7);
const NBD_DISCONNECT: libc::Ioctl = request(8);
const NBD_SET_TIMEOUT: libc::Ioctl = request(9);
const NBD_SET_FLAGS: libc::Ioctl = request(10);

/// How long a device may take to come up.
const UP_TIME: Duration = Duration::from_secs(5);

/// An open device node.
struct Node(File);

impl Node {
    fn open(path: &Path) -> Result<Self, Error> {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        // A read-only device can only be opened for reading, which is enough for these calls.
        let file = opened.or_else(|_| OpenOptions::new().read(true).open(path));
        file.map(Self).map_err(|e| Error::new(format!("cannot open {}", path.display()), e))
    }

    fn call(&self, request: libc::Ioctl, argument: u64) -> io::Result<()> {
        // SAFETY: the NBD ioctls take a number, no pointer; what the number names (a descriptor) the kernel checks.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument as libc::c_ulong) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    fn set_up(&self, disk: &Disk, sockets: &[OwnedFd]) -> io::Result<()> {
        for socket in sockets {
            self.call(NBD_SET_SOCK, socket.as_raw_fd() as u64)?;
        }
        self.call(NBD_SET_BLKSIZE, disk.block_size.into())?;
        self.call(NBD_SET_SIZE_BLOCKS, disk.size / u64::from(disk.block_size))?;
        self.call(NBD_SET_FLAGS, disk.flags.0.into())?;
        self.call(NBD_SET_TIMEOUT, disk.timeout_sec)
    }
}

/// Makes /dev/nbdN of connected sockets, and returns when it is up. `ended` runs on the device's thread when the device
/// is gone, with the reason if nobody asked for it; not if this fails.
///
/// # Errors
/// EBUSY: in use, see [`sysfs::openers`]. What open(2) and the ioctls say.
pub fn connect(
    index: u32,
    disk: &Disk,
    sockets: Vec<OwnedFd>,
    ended: impl FnOnce(io::Result<()>) + Send + 'static,
) -> Result<(), Error> {
    let path = sysfs::node(index);
    let what = move || format!("cannot make /dev/nbd{index} by ioctl");
    let (tx, rx) = mpsc::channel();
    let disk = disk.clone();
    let body = move || {
        block_signals();
        // The driver wants all calls from the thread that made the first one.
        let ready = Node::open(&path).and_then(|node| {
            let done = node.set_up(&disk, &sockets);
            if done.is_err() {
                let _ = node.call(NBD_CLEAR_SOCK, 0);
            }
            done.map(|()| node).map_err(|e| Error::new(what(), e))
        });
        let node = match ready {
            Ok(node) => node,
            Err(e) => return drop(tx.send(Err(e))),
        };
        // The driver has its own references now: only with ours gone does the other end see the kernel's close.
        drop(sockets);
        let _ = tx.send(Ok(()));
        let result = node.call(NBD_DO_IT, 0);
        let _ = node.call(NBD_CLEAR_SOCK, 0);
        drop(node);
        ended(result);
    };
    let thread = std::thread::Builder::new().name(format!("nbd{index}"));
    thread.spawn(body).map_err(|e| Error::new(format!("cannot start a thread for /dev/nbd{index}"), e))?;
    let stopped = || Error::new(format!("/dev/nbd{index}"), io::ErrorKind::TimedOut.into());
    rx.recv().map_err(|_| stopped())??;
    let until = Instant::now() + UP_TIME;
    while !sysfs::state(index).is_some_and(|s| s.pid.is_some() && s.size > 0) {
        if Instant::now() > until {
            let _ = disconnect(index);
            return Err(stopped());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Ends a device: its sockets get `DISC`; when their other ends are closed, it is gone.
///
/// # Errors
/// What open(2) and the ioctl say.
pub fn disconnect(index: u32) -> Result<(), Error> {
    let node = Node::open(&sysfs::node(index))?;
    node.call(NBD_DISCONNECT, 0).map_err(|e| Error::new(format!("cannot disconnect /dev/nbd{index}"), e))
}

/// Changes the size of a device, bytes.
///
/// # Errors
/// What open(2) and the ioctl say.
pub fn resize(index: u32, size: u64, block_size: u32) -> Result<(), Error> {
    let node = Node::open(&sysfs::node(index))?;
    let done = node.call(NBD_SET_SIZE_BLOCKS, size / u64::from(block_size));
    done.map_err(|e| Error::new(format!("cannot resize /dev/nbd{index}"), e))
}

/// A signal would end `NBD_DO_IT`, and with it the device.
fn block_signals() {
    // SAFETY: all zeroes is a valid place for sigfillset(3) to fill; both calls only touch it and this thread's mask.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
    }
}
