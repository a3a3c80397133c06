//! One request in a ring: what is left of it, and the queue entry for its next part.

use io_uring::{opcode, squeue, types};
use iobuf::{Buffer, Segment};
use rustix::fs::FallocateFlags;
use rustix::io::ReadWriteFlags;

use super::buffers::IoVec;
use super::file::{Able, Backing, has};
use crate::io::{Flags, Op, Segments};

/// The file is number 0 of the ring's registered files.
const FILE: types::Fixed = types::Fixed(0);
/// Most iovecs of one call (`UIO_MAXIOV`); a longer list goes in parts, as after a short transfer.
const MAX_IOVECS: usize = 1024;
/// Most bytes of one part: under the kernel's `MAX_RW_COUNT`, and a multiple of every alignment.
const MAX_PART: u64 = 1 << 30;
/// `BLOCK_URING_CMD_DISCARD`, `_IO(0x12, 0)`: include/uapi/linux/blkdev.h.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// How a range operation is asked of the kernel at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Command,
    Punch,
    ZeroRange,
}

/// A request, from submit to completion. The memory of `iovecs` is kept for the next user of the slot.
pub(super) struct Slot {
    pub(super) cookie: u64,
    pub(super) op: Op,
    flags: Flags,
    segments: Segments,
    /// Bytes.
    offset: u64,
    len: u64,
    done: u64,
    pub(super) way: Way,
    /// The present part goes through this buffer because the segments are not aligned.
    bounce: Option<Buffer>,
    part: u64,
    pub(super) retries: u8,
    /// A reset came after it.
    pub(super) aborted: bool,
    iovecs: Vec<IoVec>,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self {
            cookie: 0,
            op: Op::Reset,
            flags: Flags::NONE,
            segments: Segments::new(),
            offset: 0,
            len: 0,
            done: 0,
            way: Way::Punch,
            bounce: None,
            part: 0,
            retries: 0,
            aborted: false,
            iovecs: Vec::with_capacity(4),
        }
    }

    pub(super) fn start(&mut self, request: crate::IoRequest, shift: u32, bounce: Option<Buffer>, way: Way) {
        self.cookie = request.cookie;
        self.op = request.op;
        self.flags = request.flags;
        self.segments = request.segments;
        self.offset = request.lba << shift;
        self.len = request.blocks << shift;
        self.done = 0;
        self.way = way;
        self.bounce = bounce;
        self.retries = 0;
        self.aborted = false;
    }

    /// Gives back what the request brought.
    pub(super) fn clear(&mut self) {
        self.segments = Segments::new();
        self.bounce = None;
    }

    /// The segment and its rest at byte `done`.
    fn position(&self) -> (usize, u32) {
        let mut left = self.done;
        for (i, s) in self.segments.iter().enumerate() {
            if left < u64::from(s.len) {
                return (i, left as u32);
            }
            left -= u64::from(s.len);
        }
        (self.segments.len(), 0)
    }

    /// The one segment that holds all the rest, if there is one.
    pub(super) fn single(&self) -> Option<Segment> {
        let (index, skip) = self.position();
        let s = self.segments.get(index).filter(|_| index + 1 == self.segments.len())?;
        Some(Segment { addr: s.addr + u64::from(skip), len: s.len - skip, region: s.region })
    }

    pub(super) fn bounce(&self) -> Option<&Buffer> {
        self.bounce.as_ref()
    }

    /// The queue entry for the next part of a read or write. `fixed`: table index of the memory it goes through,
    /// which is the bounce buffer or the single segment.
    pub(super) fn transfer(&mut self, fixed: Option<u16>) -> squeue::Entry {
        let rest = (self.len - self.done).min(MAX_PART);
        let offset = self.offset + self.done;
        let dsync = if self.flags.has(Flags::FUA) { ReadWriteFlags::DSYNC.bits() as i32 } else { 0 };
        let whole = match self.bounce.take() {
            Some(buffer) => {
                let len = rest.min(buffer.len() as u64);
                if self.op == Op::Write {
                    self.copy(&buffer, len, true);
                }
                // SAFETY: the buffer stays in the slot until the completion.
                let segment = unsafe { buffer.segment(len as usize) };
                self.bounce = Some(buffer);
                segment
            }
            None => self.single(),
        };
        if let (Some(s), Some(index)) = (whole, fixed) {
            let len = u64::from(s.len).min(rest);
            self.part = len;
            return match self.op {
                Op::Read => {
                    opcode::ReadFixed::new(FILE, s.as_ptr(), len as u32, index).offset(offset).build()
                }
                _ => opcode::WriteFixed::new(FILE, s.as_ptr(), len as u32, index)
                    .offset(offset)
                    .rw_flags(dsync)
                    .build(),
            };
        }
        self.part = self.gather(whole, rest);
        let (vec, count) = (self.iovecs.as_ptr().cast(), self.iovecs.len() as u32);
        match self.op {
            Op::Read => opcode::Readv::new(FILE, vec, count).offset(offset).build(),
            _ => opcode::Writev::new(FILE, vec, count).offset(offset).rw_flags(dsync).build(),
        }
    }

    /// Fills the iovecs with the next part of the segments (or `whole`), at most `limit` bytes; returns the bytes.
    fn gather(&mut self, whole: Option<Segment>, limit: u64) -> u64 {
        self.iovecs.clear();
        let mut left = limit;
        let (index, mut skip) = self.position();
        let list = match &whole {
            Some(s) => {
                skip = 0;
                std::slice::from_ref(s)
            }
            None => &self.segments[index..],
        };
        for s in list.iter().take(MAX_IOVECS) {
            let len = u64::from(s.len - skip).min(left);
            // SAFETY: `skip` is inside the segment.
            let base = unsafe { s.as_ptr().add(skip as usize) };
            skip = 0;
            if len > 0 {
                self.iovecs.push(IoVec { base, len: len as usize });
            }
            left -= len;
        }
        limit - left
    }

    /// Copies between the bounce buffer's first `len` bytes and the segments from `done` on.
    fn copy(&self, buffer: &Buffer, len: u64, to_buffer: bool) {
        let (index, mut skip) = self.position();
        let (mut at, end) = (buffer.offset(), buffer.offset() + len as usize);
        for s in &self.segments[index..] {
            let piece = Segment {
                addr: s.addr + u64::from(skip),
                len: (s.len - skip).min((end - at) as u32),
                region: s.region,
            };
            skip = 0;
            // SAFETY: the submitter keeps the segments valid until the completion; the bounce buffer is this
            // channel's own, so the two are disjoint.
            let inside = unsafe {
                if to_buffer {
                    buffer.region().write_from(at, &piece)
                } else {
                    buffer.region().read_to(at, &piece)
                }
            };
            debug_assert!(inside, "a bounce buffer is inside its region");
            at += piece.len as usize;
            if at == end {
                return;
            }
        }
    }

    /// `moved` bytes of the present part are through. True: that was the last.
    pub(super) fn advance(&mut self, moved: u64) -> bool {
        if self.op == Op::Read
            && let Some(buffer) = &self.bounce
        {
            self.copy(buffer, moved.min(self.part), false);
        }
        self.done += moved.min(self.part);
        self.retries = 0;
        self.done >= self.len
    }

    /// The queue entry of an operation without data.
    pub(super) fn command(&self) -> squeue::Entry {
        let mode = match self.way {
            _ if self.op == Op::Flush => {
                return opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build();
            }
            Way::Command => {
                let mut cmd = [0; 16];
                // The entry's `addr3` is the start of `cmd`: the length (blkdev_uring_cmd in block/ioctl.c).
                cmd[..8].copy_from_slice(&self.len.to_ne_bytes());
                return opcode::UringCmd16::new(FILE, BLOCK_URING_CMD_DISCARD)
                    .addr(Some(self.offset))
                    .cmd(cmd)
                    .build();
            }
            Way::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Way::ZeroRange => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        opcode::Fallocate::new(FILE, self.len).offset(self.offset).mode(mode.bits() as i32).build()
    }

    /// The present way is not to be had here: notes that, and takes the next one if there is one.
    pub(super) fn next_way(&mut self, able: &Able) -> bool {
        let missing = match self.way {
            Way::Command => &able.command_discard,
            Way::Punch => &able.punch,
            Way::ZeroRange => &able.zero_range,
        };
        missing.store(false, std::sync::atomic::Ordering::Relaxed);
        match way(self.op, self.flags, able) {
            Some(way) => {
                self.way = way;
                true
            }
            None => false,
        }
    }
}

/// How to ask for a range operation, `None` if there is no way.
pub(super) fn way(op: Op, flags: Flags, able: &Able) -> Option<Way> {
    let punch = has(&able.punch).then_some(Way::Punch);
    let zero = has(&able.zero_range).then_some(Way::ZeroRange);
    let fast = flags.has(Flags::FAST) && able.zero_range_writes;
    let zero = zero.filter(|_| !fast);
    match op {
        Op::Discard => has(&able.command_discard).then_some(Way::Command).or(punch),
        _ if flags.has(Flags::NO_UNMAP) => zero,
        _ => punch.or(zero),
    }
}

/// Whether direct I/O can use the segments as they are.
pub(super) fn aligned(segments: &[Segment], backing: &Backing) -> bool {
    let memory = u64::from(backing.memory_align - 1);
    let length = backing.offset_align - 1;
    segments.iter().all(|s| s.addr & memory == 0 && s.len & length == 0)
}
