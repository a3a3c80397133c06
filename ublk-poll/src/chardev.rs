//! /dev/ublkcN: where requests of one device come from.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::abi::{self, IoDesc};

/// The open char device, shared by the queues of a device. The kernel lets one process open it once.
#[derive(Debug)]
pub struct CharDevice {
    id: u32,
    file: OwnedFd,
}

impl CharDevice {
    /// Opens /dev/ublkcN.
    ///
    /// # Errors
    /// `NOENT` and `ACCESS` until udev has made the node; `BUSY`: another process serves the device.
    pub fn open(id: u32) -> Result<Arc<Self>, Errno> {
        // O_NONBLOCK tells io_uring that reads and writes need no worker thread: they copy memory and are done.
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(format!("/dev/ublkc{id}"), flags, Mode::empty())?;
        Ok(Arc::new(Self { id, file }))
    }

    /// N.
    pub fn id(&self) -> u32 {
        self.id
    }
}

impl AsRawFd for CharDevice {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for CharDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The descriptors of one queue, mapped read-only. The kernel writes one before the FETCH of its tag ends, and not again
/// before the tag is answered.
#[derive(Debug)]
pub(crate) struct Descriptors {
    base: NonNull<IoDesc>,
    depth: u16,
    len: usize,
}

impl Descriptors {
    pub(crate) fn map(device: &CharDevice, queue: u16, depth: u16) -> Result<Self, Errno> {
        let (position, len) = abi::descriptors(queue, depth);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::POPULATE,
                &device.file,
                position,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { base, depth, len })
    }

    /// A copy of the descriptor of `tag`, which must be below the depth.
    pub(crate) fn read(&self, tag: u16) -> IoDesc {
        assert!(tag < self.depth, "tags are checked where completions are read");
        // SAFETY: inside the mapping, which holds `depth` descriptors from a page boundary on. Volatile, because the
        // kernel writes there; the copy is checked before use.
        unsafe { self.base.as_ptr().add(usize::from(tag)).read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`, whole, of which no reference was ever given out.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
