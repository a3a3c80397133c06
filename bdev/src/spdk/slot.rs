//! One request on its way through SPDK.

use std::cell::{Cell, UnsafeCell};
use std::ffi::{c_int, c_void};

use iobuf::Segment;
use smallvec::SmallVec;
use spdk_sys as sys;

use super::channel::Inner;
use super::memory::{self, Bounce};
use crate::io::{IoRequest, Op, Status};

/// Longer lists go through a bounce buffer: drivers have limits of their own (IOV_MAX, a page of PRPs).
const MAX_SEGMENTS: usize = 64;

/// Its address is known to SPDK while a request is in it, and does not change.
pub(super) struct Slot {
    owner: *const Inner,
    /// The next free one.
    pub(super) next: Cell<*const Slot>,
    pub(super) cookie: Cell<u64>,
    lba: Cell<u64>,
    blocks: Cell<u64>,
    /// The data if they are in one piece; else null, and `iovs` has them.
    buffer: Cell<*mut c_void>,
    pub(super) op: Cell<Op>,
    bounced: Cell<bool>,
    /// SPDK has the request.
    pub(super) sent: Cell<bool>,
    rare: UnsafeCell<Rare>,
}

/// What most requests do not have.
struct Rare {
    iovs: SmallVec<[sys::iovec; 4]>,
    /// Where the data belong that go through `bounce`.
    segments: SmallVec<[Segment; 4]>,
    bounce: Option<Bounce>,
    wait: sys::spdk_bdev_io_wait_entry,
}

/// Whether SPDK can use the segments as they are: blocks are whole in each (drivers split lists between segments), and
/// devices can reach them.
#[inline]
pub(super) fn fits(segments: &[Segment], block_size: u32) -> bool {
    let whole = segments.len() == 1 || segments.iter().all(|s| s.len & (block_size - 1) == 0);
    whole
        && segments.len() <= MAX_SEGMENTS
        && (!memory::dma() || segments.iter().all(|s| memory::reachable(s.addr, s.len)))
}

impl Slot {
    pub(super) fn new(owner: *const Inner) -> Self {
        let rare = Rare {
            iovs: SmallVec::new(),
            segments: SmallVec::new(),
            bounce: None,
            // SAFETY: plain C data, for which zeroes are valid.
            wait: unsafe { std::mem::zeroed() },
        };
        Self {
            owner,
            next: Cell::new(std::ptr::null()),
            cookie: Cell::new(0),
            lba: Cell::new(0),
            blocks: Cell::new(0),
            buffer: Cell::new(std::ptr::null_mut()),
            op: Cell::new(Op::Flush),
            bounced: Cell::new(false),
            sent: Cell::new(false),
            rare: UnsafeCell::new(rare),
        }
    }

    /// The channel it belongs to.
    pub(super) fn owner(&self) -> *const Inner {
        self.owner
    }

    /// Puts a request in whose data SPDK can use as they are.
    #[inline]
    pub(super) fn fill(&self, request: &IoRequest) {
        self.cookie.set(request.cookie);
        self.op.set(request.op);
        self.lba.set(request.lba);
        self.blocks.set(request.blocks);
        match request.segments.as_slice() {
            [one] => self.buffer.set(one.as_ptr().cast()),
            list => self.fill_list(list),
        }
    }

    #[cold]
    fn fill_list(&self, list: &[Segment]) {
        self.buffer.set(std::ptr::null_mut());
        // SAFETY: the slot is free: SPDK does not know it, and no other reference to what is rare exists.
        let iovs = unsafe { &mut (*self.rare.get()).iovs };
        iovs.clear();
        iovs.extend(list.iter().map(|s| sys::iovec { iov_base: s.as_ptr().cast(), iov_len: s.len as _ }));
    }

    /// Puts a request in whose data go through `bounce`, which has room for them.
    #[cold]
    pub(super) fn fill_bounced(&self, request: &IoRequest, bounce: Bounce) {
        self.fill(request);
        if request.op == Op::Write {
            copy(&bounce, &request.segments, Direction::In);
        }
        self.buffer.set(bounce.as_ptr().cast());
        self.bounced.set(true);
        // SAFETY: as in `fill_list`.
        let rare = unsafe { &mut *self.rare.get() };
        rare.segments = request.segments.clone();
        rare.bounce = Some(bounce);
    }

    /// Hands the request to SPDK, whose answer is a negative errno if it did not take it.
    ///
    /// # Safety
    /// `desc` is open, and `channel` one of it of the calling thread, until the request has completed.
    #[inline]
    pub(super) unsafe fn send(
        &self,
        desc: *mut sys::spdk_bdev_desc,
        channel: *mut sys::spdk_io_channel,
    ) -> c_int {
        let (done, this) = (Some(done as _), std::ptr::from_ref(self).cast_mut().cast());
        let (lba, blocks, buffer) = (self.lba.get(), self.blocks.get(), self.buffer.get());
        // SAFETY: descriptor and channel by the caller's promise; lists and data stay as they are until `done`, which SPDK
        // calls once if it returns 0 here, on this thread.
        unsafe {
            match self.op.get() {
                Op::Read if !buffer.is_null() => {
                    sys::spdk_bdev_read_blocks(desc, channel, buffer, lba, blocks, done, this)
                }
                Op::Write if !buffer.is_null() => {
                    sys::spdk_bdev_write_blocks(desc, channel, buffer, lba, blocks, done, this)
                }
                Op::Read => {
                    let iovs = &mut (*self.rare.get()).iovs;
                    let count = iovs.len() as c_int;
                    sys::spdk_bdev_readv_blocks(
                        desc,
                        channel,
                        iovs.as_mut_ptr(),
                        count,
                        lba,
                        blocks,
                        done,
                        this,
                    )
                }
                Op::Write => {
                    let iovs = &mut (*self.rare.get()).iovs;
                    let count = iovs.len() as c_int;
                    sys::spdk_bdev_writev_blocks(
                        desc,
                        channel,
                        iovs.as_mut_ptr(),
                        count,
                        lba,
                        blocks,
                        done,
                        this,
                    )
                }
                Op::Discard => sys::spdk_bdev_unmap_blocks(desc, channel, lba, blocks, done, this),
                Op::WriteZeroes => sys::spdk_bdev_write_zeroes_blocks(desc, channel, lba, blocks, done, this),
                Op::Flush => {
                    let all = sys::spdk_bdev_get_num_blocks(sys::spdk_bdev_desc_get_bdev(desc));
                    sys::spdk_bdev_flush_blocks(desc, channel, 0, all, done, this)
                }
                Op::Reset => sys::spdk_bdev_reset(desc, channel, done, this),
                Op::SecureErase => -95,
            }
        }
    }

    /// Has SPDK call again when it has memory for a request. False: that is already so.
    ///
    /// # Safety
    /// As for [`Slot::send`].
    pub(super) unsafe fn wait(
        &self,
        desc: *mut sys::spdk_bdev_desc,
        channel: *mut sys::spdk_io_channel,
    ) -> bool {
        // SAFETY: the entry is not in SPDK's list (the slot's request is neither there nor sent), and stays until it is
        // called; the rest by the caller's promise.
        unsafe {
            let entry = &raw mut (*self.rare.get()).wait;
            (*entry).bdev = sys::spdk_bdev_desc_get_bdev(desc);
            (*entry).cb_fn = Some(again);
            (*entry).cb_arg = std::ptr::from_ref(self).cast_mut().cast();
            sys::spdk_bdev_queue_io_wait((*entry).bdev, channel, entry) == 0
        }
    }

    /// The request is over: data that were read go where they belong, the bounce buffer comes out.
    #[inline]
    pub(super) fn empty(&self, status: Status) -> Option<Bounce> {
        if !self.bounced.get() {
            return None;
        }
        self.bounced.set(false);
        // SAFETY: SPDK is done with the slot, and no other reference to what is rare exists.
        let rare = unsafe { &mut *self.rare.get() };
        let bounce = rare.bounce.take()?;
        if self.op.get() == Op::Read && status == Status::Ok {
            copy(&bounce, &rare.segments, Direction::Out);
        }
        Some(bounce)
    }
}

enum Direction {
    /// Segments to buffer.
    In,
    /// Buffer to segments.
    Out,
}

/// Copies between a bounce buffer and the segments, which fit into it.
fn copy(bounce: &Bounce, segments: &[Segment], direction: Direction) {
    let mut at = 0;
    for segment in segments {
        let len = (segment.len as usize).min(bounce.len() - at);
        // SAFETY: `at + len` is inside the buffer; the submitter keeps the segment valid until the completion
        // (`IoRequest::segments`); the two are different memory.
        unsafe {
            let inside = bounce.as_ptr().add(at);
            match direction {
                Direction::In => std::ptr::copy_nonoverlapping(segment.as_ptr(), inside, len),
                Direction::Out => std::ptr::copy_nonoverlapping(inside, segment.as_ptr(), len),
            }
        }
        at += len;
    }
}

/// SPDK's `spdk_bdev_io_completion_cb`.
unsafe extern "C" fn done(io: *mut sys::spdk_bdev_io, success: bool, slot: *mut c_void) {
    // SAFETY: the slot that was sent, alive with its channel, which waits for it; the request of SPDK is freed once, here.
    let (slot, status) = unsafe {
        let status = if success { Status::Ok } else { status_of(io) };
        sys::spdk_bdev_free_io(io);
        (&*slot.cast::<Slot>(), status)
    };
    // SAFETY: as above; completions come on the channel's thread.
    unsafe { &*slot.owner }.completed(slot, status);
}

/// SPDK's `spdk_bdev_io_wait_cb`.
unsafe extern "C" fn again(slot: *mut c_void) {
    // SAFETY: the slot whose entry waited; its channel waits for it.
    unsafe {
        let slot = &*slot.cast::<Slot>();
        (*slot.owner).send(slot);
    }
}

/// Why a request of SPDK failed.
///
/// # Safety
/// It is one that has just completed.
unsafe fn status_of(io: *const sys::spdk_bdev_io) -> Status {
    let (mut cdw0, mut sct, mut sc) = (0, 0, 0);
    // SAFETY: by the caller's promise; the answers go to numbers of this function. Failures of other kinds are translated.
    unsafe { sys::spdk_bdev_io_get_nvme_status(io, &mut cdw0, &mut sct, &mut sc) };
    nvme_status(sct, sc)
}

/// NVMe status codes (NVM Express Base Specification 2.1, 4.2.3) and what SPDK makes of its own failures.
fn nvme_status(sct: c_int, sc: c_int) -> Status {
    match (sct, sc) {
        (0, 0x00) => Status::Ok,
        (0, 0x01) => Status::Unsupported,
        (0, 0x02 | 0x0b | 0x13) => Status::Invalid,
        // Aborted by request, by a deleted queue, by fused commands, by a power loss.
        (0, 0x05 | 0x07 | 0x08 | 0x09 | 0x0a) | (3, 0x70..=0x72) => Status::Aborted,
        (0, 0x20) | (1, 0x82) => Status::ReadOnly,
        (0, 0x80) => Status::OutOfRange,
        (0, 0x81) => Status::NoSpace,
        (2, 0x80 | 0x81 | 0x87) => Status::MediumError,
        _ => Status::IoError,
    }
}

/// What a function of SPDK refused.
pub(super) fn refused(rc: c_int) -> Status {
    use rustix::io::Errno;
    match super::ffi::errno(rc) {
        Errno::NOMEM | Errno::AGAIN => Status::Busy,
        Errno::NODEV | Errno::NXIO => Status::Gone,
        Errno::OPNOTSUPP => Status::Unsupported,
        Errno::BADF | Errno::PERM | Errno::ROFS => Status::ReadOnly,
        Errno::INVAL => Status::Invalid,
        _ => Status::IoError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_of_nvme() {
        for (sct, sc, status) in [
            (0, 0x04, Status::IoError),
            (0, 0x06, Status::IoError),
            (0, 0x07, Status::Aborted),
            (0, 0x80, Status::OutOfRange),
            (1, 0x82, Status::ReadOnly),
            (2, 0x81, Status::MediumError),
            (7, 0xff, Status::IoError),
        ] {
            assert_eq!(nvme_status(sct, sc), status, "{sct:x}/{sc:x}");
        }
    }
}
