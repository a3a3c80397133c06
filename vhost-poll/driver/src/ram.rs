//! A guest's memory: one memfd, mapped here and described to the back end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use iobuf::Region;
use rustix::fs::{FallocateFlags, MemfdFlags};

/// Where the guest's memory begins, in its own addresses.
const GUEST_BASE: u64 = 0x4000_0000;
/// Where the front end claims to have it: an address that nobody uses.
const USER_BASE: u64 = 0x7123_0000_0000;

/// Memory, handed out from its beginning and never taken back.
#[derive(Debug)]
pub struct Ram {
    fd: OwnedFd,
    region: Arc<Region>,
    next: usize,
}

impl Ram {
    /// `len` bytes: whole pages.
    ///
    /// # Panics
    /// If the system has no memory: there is no test without.
    pub fn new(len: usize) -> Self {
        let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&fd, len as u64).expect("memory for the guest");
        let region = Region::shared(fd.as_fd(), 0, len).expect("memory for the guest");
        Self { fd, region, next: 0 }
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "a guest has memory")]
    pub fn len(&self) -> usize {
        self.region.len()
    }

    /// Guest address of `len` bytes that nobody else has, zeroed.
    ///
    /// # Panics
    /// If there are none left.
    pub fn alloc(&mut self, len: usize, align: usize) -> u64 {
        let at = self.next.next_multiple_of(align);
        assert!(at + len <= self.region.len(), "the guest's memory is too small");
        self.next = at + len;
        GUEST_BASE + at as u64
    }

    /// First guest address.
    pub fn guest_base(&self) -> u64 {
        GUEST_BASE
    }

    /// The front end's own address of a guest address.
    pub fn user(&self, guest: u64) -> u64 {
        guest - GUEST_BASE + USER_BASE
    }

    /// Where `len` bytes at a guest address are in this process.
    ///
    /// # Panics
    /// If they are not in the memory.
    pub fn ptr(&self, guest: u64, len: usize) -> *mut u8 {
        let offset = (guest - GUEST_BASE) as usize;
        assert!(offset + len <= self.region.len(), "{guest:#x} is not in the guest's memory");
        self.region.as_ptr().wrapping_add(offset)
    }

    /// Copies `data` to a guest address.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write(&self, guest: u64, data: &[u8]) {
        assert!(self.region.copy_in((guest - GUEST_BASE) as usize, data));
    }

    /// Copies `len` bytes from a guest address.
    ///
    /// # Panics
    /// If they are not there.
    pub fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(self.region.copy_out((guest - GUEST_BASE) as usize, &mut out));
        out
    }

    /// The host takes `len` bytes at a guest address back, as QEMU does for a balloon: their pages leave the file, and the
    /// next touch brings new, zeroed ones.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn take_back(&self, guest: u64, len: usize) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.fd, flags, guest - GUEST_BASE, len as u64).expect("a hole in a memfd");
    }

    /// The table of the front end: one region, as bytes of SET_MEM_TABLE.
    pub fn table(&self) -> Vec<u8> {
        let mut table = Vec::from(1u64.to_ne_bytes());
        for field in [GUEST_BASE, self.region.len() as u64, USER_BASE, 0] {
            table.extend(field.to_ne_bytes());
        }
        table
    }
}
