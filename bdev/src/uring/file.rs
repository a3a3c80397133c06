//! Opening a file or block device, and finding out what it can do.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use crate::manager::Error;

/// A file or block device, opened, locked and examined.
#[derive(Debug)]
pub(super) struct Backing {
    pub(super) fd: OwnedFd,
    pub(super) path: String,
    pub(super) is_device: bool,
    pub(super) read_only: bool,
    /// `O_DIRECT`. Otherwise the page cache is used.
    pub(super) direct: bool,
    /// Segments must start at multiples of this (1 when not direct).
    pub(super) memory_align: u32,
    /// Offsets and lengths must be multiples of this (1 when not direct).
    pub(super) offset_align: u32,
    /// Of the device; 512 for files.
    pub(super) logical_block: u32,
    /// Of the device; the file system's preferred size for files.
    pub(super) physical_block: u32,
    /// What was found out at run time to be missing; shared by all channels.
    pub(super) able: Able,
}

/// What a file or block device is, by whatever path: one has it as long as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileId {
    /// A file.
    File {
        /// Of its file system.
        device: u64,
        /// In there.
        inode: u64,
    },
    /// A block device, by its number.
    Device(u64),
}

impl FileId {
    /// Of what `fd` is open on; `None` if that is neither a regular file nor a block device.
    ///
    /// # Errors
    /// fstat(2).
    pub fn of(fd: impl AsFd) -> Result<Option<Self>, Errno> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Some(Self::File { device: stat.st_dev, inode: stat.st_ino }),
            FileType::BlockDevice => Some(Self::Device(stat.st_rdev)),
            _ => None,
        })
    }
}

/// Abilities that a file system may turn out to lack.
#[derive(Debug)]
pub(super) struct Able {
    /// Zeroing a range may be writing zeroes: the kernel's fallback on block devices.
    pub(super) zero_range_writes: bool,
    pub(super) punch: AtomicBool,
    pub(super) zero_range: AtomicBool,
    /// `BLOCK_URING_CMD_DISCARD` (Linux 6.12).
    pub(super) command_discard: AtomicBool,
}

/// What the creator wants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    pub(super) read_only: bool,
    pub(super) direct: bool,
    /// Space may be given back.
    pub(super) punch: bool,
    /// Block size the bdev will have, if it was given.
    pub(super) block_size: Option<u32>,
}

impl Drop for Backing {
    /// The lock would go with the last descriptor, but a child of this process may have copies between its fork and exec.
    fn drop(&mut self) {
        if !self.is_device {
            let _ = rustix::fs::flock(&self.fd, FlockOperation::Unlock);
        }
    }
}

fn system(what: &str, path: &str, source: Errno) -> Error {
    Error::System { context: format!("cannot {what} {path}"), source }
}

impl Backing {
    /// Opens `path` as wished, and read-only where the system allows no more.
    pub(super) fn open(path: &str, wish: Wish) -> Result<Self, Error> {
        let stat = rustix::fs::stat(Path::new(path)).map_err(|e| system("open", path, e))?;
        let is_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            other => {
                let reason = format!("{path} is a {other:?}; a regular file or a block device is right");
                return Err(Error::Invalid { parameter: "filename", reason });
            }
        };
        let (fd, read_only) = open_fd(path, is_device, wish.read_only)?;
        lock(&fd, path, is_device, read_only)?;
        let logical_block = if is_device {
            rustix::fs::ioctl_blksszget(&fd).map_err(|e| system("ask the block size of", path, e))?
        } else {
            512
        };
        let physical_block = if is_device {
            rustix::fs::ioctl_blkpbszget(&fd).unwrap_or(logical_block)
        } else {
            (stat.st_blksize as u32).clamp(512, 65536)
        };
        let align = direct_align(&fd, is_device.then_some(logical_block));
        let block_size = wish.block_size.unwrap_or(logical_block.max(512));
        let direct = wish.direct && align.is_some_and(|a| a.offset <= block_size) && set_direct(&fd);
        if wish.direct && !direct {
            let needs = align.map_or(0, |a| a.offset);
            tracing::warn!(
                path,
                block_size,
                direct_io_align = needs,
                "no direct I/O with this block size here: using the page cache"
            );
        }
        let align = align.filter(|_| direct).unwrap_or(Align { memory: 1, offset: 1 });
        let able = Able {
            zero_range_writes: is_device,
            punch: AtomicBool::new(!read_only && wish.punch && (is_device || punches(&fd))),
            zero_range: AtomicBool::new(!read_only),
            command_discard: AtomicBool::new(is_device),
        };
        Ok(Self {
            fd,
            path: path.to_owned(),
            is_device,
            read_only,
            direct,
            memory_align: align.memory,
            offset_align: align.offset,
            logical_block,
            physical_block,
            able,
        })
    }

    /// Size now, bytes. Works on files and block devices alike, where `fstat` says 0 for the latter.
    pub(super) fn size(&self) -> Result<u64, Error> {
        rustix::fs::seek(&self.fd, SeekFrom::End(0)).map_err(|e| system("find the size of", &self.path, e))
    }

    /// What of `len` bytes from `offset` on is allocated: data (true) and holes, alternating, in order and without gaps,
    /// at most `max` of them. `None` where the file system cannot tell, and on devices. May wait for the disk.
    pub(super) fn allocation(&self, offset: u64, len: u64, max: usize) -> Option<Vec<(bool, u64)>> {
        let end = offset + len;
        let (mut runs, mut at) = (Vec::new(), offset);
        while at < end && runs.len() < max {
            let data = match rustix::fs::seek(&self.fd, SeekFrom::Data(at)) {
                Ok(data) => data.min(end),
                // No data from here to the end.
                Err(Errno::NXIO) => end,
                Err(_) => return None,
            };
            if data > at {
                runs.push((false, data - at));
                at = data;
                continue;
            }
            let hole = rustix::fs::seek(&self.fd, SeekFrom::Hole(at)).ok()?.min(end);
            // Somebody punched the data away between the two calls: what was found so far is still an answer.
            if hole <= at {
                break;
            }
            runs.push((true, hole - at));
            at = hole;
        }
        (!runs.is_empty()).then_some(runs)
    }

    /// Whether discard is worth offering: files that punch, devices whose queue discards.
    pub(super) fn discards(&self) -> bool {
        !self.read_only
            && if self.is_device { queue_limit(self, "discard_max_bytes") > 0 } else { has(&self.able.punch) }
    }

    /// The device, or the one that the file's file system is on, has disks that spin. Of a file system on several devices
    /// (btrfs, ZFS) or on none (tmpfs) nothing is known.
    pub(super) fn is_rotational(&self) -> bool {
        queue_limit(self, "rotational") == 1
    }

    /// Smallest unit that discard frees, bytes.
    pub(super) fn discard_granularity(&self) -> u32 {
        if !self.is_device {
            return self.physical_block;
        }
        u32::try_from(queue_limit(self, "discard_granularity")).unwrap_or(0).max(self.logical_block)
    }
}

pub(super) fn has(ability: &AtomicBool) -> bool {
    ability.load(Ordering::Relaxed)
}

fn open_fd(path: &str, is_device: bool, read_only: bool) -> Result<(OwnedFd, bool), Error> {
    // O_EXCL without O_CREAT: the kernel's claim on a block device (open(2)); mounted or claimed ones say EBUSY.
    let exclusive = if is_device { OFlags::EXCL } else { OFlags::empty() };
    let common = OFlags::CLOEXEC | OFlags::NOCTTY;
    if !read_only {
        match rustix::fs::open(path, OFlags::RDWR | exclusive | common, Mode::empty()) {
            Ok(fd) => return Ok((fd, false)),
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM) => {
                tracing::warn!(path, "not writable: opened read-only");
            }
            Err(Errno::BUSY) => {
                let context =
                    format!("{path} is in use (mounted, or claimed by another program); release it first");
                return Err(Error::System { context, source: Errno::BUSY });
            }
            Err(e) => return Err(system("open", path, e)),
        }
    }
    let fd = rustix::fs::open(path, OFlags::RDONLY | common, Mode::empty())
        .map_err(|e| system("open", path, e))?;
    Ok((fd, true))
}

/// Advisory: keeps a second bdev, or another program that asks too, off the same file. Source: flock(2).
fn lock(fd: &OwnedFd, path: &str, is_device: bool, read_only: bool) -> Result<(), Error> {
    // udev watches flock on block devices (BLOCK_DEVICE_LOCKING); O_EXCL does the work there.
    if is_device {
        return Ok(());
    }
    let kind = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(fd, kind) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => {
            let context =
                format!("{path} is locked (flock) by another bdev or program; close it there first");
            Err(Error::System { context, source: Errno::BUSY })
        }
        Err(e) => {
            tracing::warn!(path, error = %e, "the file system has no locks: nothing keeps other programs off");
            Ok(())
        }
    }
}

#[derive(Clone, Copy)]
struct Align {
    memory: u32,
    offset: u32,
}

/// What direct I/O demands here, `None` if there is none. Source: statx(2), STATX_DIOALIGN (Linux 6.1).
fn direct_align(fd: &OwnedFd, device_block: Option<u32>) -> Option<Align> {
    let unknown = device_block.unwrap_or(4096);
    let fallback = Align { memory: unknown.max(512), offset: unknown };
    match rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(s) if StatxFlags::from_bits_retain(s.stx_mask).contains(StatxFlags::DIOALIGN) => {
            let align = Align { memory: s.stx_dio_mem_align, offset: s.stx_dio_offset_align };
            (align.memory.is_power_of_two() && align.offset.is_power_of_two()).then_some(align)
        }
        // Older kernels and file systems do not say: 4096 suits every disk.
        _ => Some(fallback),
    }
}

/// Switches direct I/O on; file systems without it refuse. Source: fcntl(2), F_SETFL.
fn set_direct(fd: &OwnedFd) -> bool {
    rustix::fs::fcntl_getfl(fd).and_then(|flags| rustix::fs::fcntl_setfl(fd, flags | OFlags::DIRECT)).is_ok()
}

/// Asks the file system to punch a hole behind the end of the file, which changes nothing.
fn punches(fd: &OwnedFd) -> bool {
    let Ok(end) = rustix::fs::seek(fd, SeekFrom::End(0)) else { return false };
    let behind = end.next_multiple_of(65536);
    rustix::fs::fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, behind, 65536).is_ok()
}

/// A number from the request queue, in sysfs, of the device or of the one that the file is on; 0 if it is not there. A
/// partition has its disk's queue.
fn queue_limit(backing: &Backing, name: &str) -> u64 {
    let Ok(stat) = rustix::fs::fstat(&backing.fd) else { return 0 };
    let device = if backing.is_device { stat.st_rdev } else { stat.st_dev };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let read = |up: &str| {
        let path = format!("/sys/dev/block/{major}:{minor}/{up}queue/{name}");
        std::fs::read_to_string(path).ok().and_then(|s| s.trim().parse().ok())
    };
    read("").or_else(|| read("../")).unwrap_or(0)
}
