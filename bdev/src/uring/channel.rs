//! One core's ring on one file.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use iobuf::{Buffer, Pool, Registry};
use rustix::io::Errno;

use super::buffers::FixedBuffers;
use super::file::Backing;
use super::slot::{Slot, Way, aligned, way};
use crate::device::Channel;
use crate::io::{Completion, Completions, IoRequest, Op, Rejected, Status};
use crate::manager::Error;

/// Requests in flight on one channel; more get [`Status::Busy`].
pub(super) const DEPTH: u32 = 256;
/// Bounce buffers of a channel, made at the first unaligned request, and the size of each: longer requests go in
/// parts. Requests that find none get [`Status::Busy`].
const BOUNCES: u32 = 16;
const BOUNCE_SIZE: usize = 128 << 10;
/// How often a request is sent again after EAGAIN or EINTR before its submitter hears of it.
const MAX_RETRIES: u8 = 100;
/// Failed requests that one channel logs in full; later ones at debug level.
const MAX_WARNINGS: u32 = 10;

pub(super) struct UringChannel {
    // Field order is drop order: the ring first, and with it the kernel's last use of the slots' iovecs.
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u32>,
    buffers: FixedBuffers,
    bounces: Option<Pool>,
    registry: Arc<Registry>,
    backing: Arc<Backing>,
    shift: u32,
    /// Entries are in the submission queue that the kernel has not seen.
    unsent: bool,
    warnings: u32,
}

/// A ring with the cheapest completion mode that the kernel knows.
fn build(entries: u32) -> std::io::Result<IoUring> {
    // COOP_TASKRUN: completions do not interrupt the polling core; TASKRUN_FLAG says when there are some
    // (Linux 5.19); SINGLE_ISSUER from 6.0.
    let modern =
        IoUring::builder().setup_coop_taskrun().setup_taskrun_flag().setup_single_issuer().build(entries);
    match modern {
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => IoUring::new(entries),
        other => other,
    }
}

/// What a failed set-up means.
pub(super) fn explain(e: &std::io::Error) -> String {
    let hint = match Errno::from_io_error(e) {
        Some(Errno::NOSYS) => ": this kernel has no io_uring (5.6 or later is needed)",
        Some(Errno::PERM | Errno::ACCESS) => {
            ": io_uring is forbidden here; set sysctl kernel.io_uring_disabled=0, and allow io_uring_setup in the \
             container's seccomp profile"
        }
        Some(Errno::NOMEM) => ": raise the limit of locked memory (ulimit -l)",
        Some(Errno::MFILE | Errno::NFILE) => ": raise the limit of open files (ulimit -n)",
        _ => "",
    };
    format!("io_uring: {e}{hint}")
}

/// Whether io_uring is to be had at all, so that a bdev is refused at creation rather than at its first use.
pub(super) fn probe() -> Result<(), Error> {
    IoUring::new(2).map(drop).map_err(|e| Error::System {
        context: explain(&e),
        source: Errno::from_io_error(&e).unwrap_or(Errno::IO),
    })
}

impl UringChannel {
    pub(super) fn new(backing: Arc<Backing>, registry: Arc<Registry>, shift: u32) -> std::io::Result<Self> {
        let ring = build(DEPTH)?;
        ring.submitter().register_files(&[backing.fd.as_raw_fd()])?;
        let buffers = FixedBuffers::new(registry.clone(), &ring);
        Ok(Self {
            ring,
            slots: (0..DEPTH).map(|_| Slot::new()).collect(),
            free: (0..DEPTH).rev().collect(),
            buffers,
            bounces: None,
            registry,
            backing,
            shift,
            unsent: false,
            warnings: 0,
        })
    }

    /// `Ok(None)`: none is needed.
    fn bounce_for(&mut self, request: &IoRequest) -> Result<Option<Buffer>, Status> {
        if !self.backing.direct || !request.op.has_data() || aligned(&request.segments, &self.backing) {
            return Ok(None);
        }
        if self.bounces.is_none() {
            let pool = Pool::new(&self.registry, BOUNCES, BOUNCE_SIZE).map_err(|_| Status::Busy)?;
            self.bounces = Some(pool);
        }
        let buffer = self.bounces.as_ref().and_then(Pool::take);
        buffer.map(Some).ok_or(Status::Busy)
    }

    /// Puts the next part of slot `index` into the submission queue.
    fn arm(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let entry = if slot.op.has_data() {
            let region = match slot.bounce() {
                Some(buffer) => Some(buffer.region().id()),
                None => slot.single().map(|s| s.region),
            };
            let fixed = region.and_then(|r| self.buffers.index(r, &self.ring));
            slot.transfer(fixed)
        } else {
            match slot.op {
                Op::Reset => opcode::AsyncCancel2::new(types::CancelBuilder::any()).build(),
                _ => slot.command(),
            }
        };
        self.push(entry.user_data(u64::from(index)));
    }

    fn push(&mut self, entry: squeue::Entry) {
        self.unsent = true;
        loop {
            // SAFETY: what the entry points to (iovecs, bounce buffer, the submitter's segments) stays in the slot
            // until its completion; `Drop` waits for that too.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // One entry per slot at most, so the queue can only be full of entries that a failing `send` left.
            self.send();
            std::thread::yield_now();
        }
    }

    fn send(&mut self) {
        match self.ring.submit() {
            Ok(_) => self.unsent = !self.ring.submission().is_empty(),
            // The kernel is short of memory or the completion queue is full: again at the next poll.
            Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::INTR | Errno::AGAIN | Errno::BUSY)) => {}
            Err(e) => tracing::error!(path = self.backing.path, error = %e, "io_uring_enter failed"),
        }
    }

    /// A completion of the kernel. `Some`: the request is over.
    fn reap(&mut self, index: u32, result: i32) -> Option<Completion> {
        let slot = &mut self.slots[index as usize];
        let status = match slot.op {
            // How many it cancelled, or ENOENT: either way the abort is done.
            Op::Reset => Status::Ok,
            _ if result < 0 => self.failed(index, Errno::from_raw_os_error(-result))?,
            Op::Read | Op::Write if result == 0 => {
                if self.warnings < MAX_WARNINGS {
                    self.warnings += 1;
                    tracing::warn!(path = self.backing.path, "I/O behind the end: the file has shrunk");
                }
                Status::IoError
            }
            Op::Read | Op::Write => {
                if !slot.advance(result as u64) {
                    if slot.aborted {
                        return Some(self.release(index, Status::Aborted));
                    }
                    self.arm(index);
                    return None;
                }
                Status::Ok
            }
            _ => Status::Ok,
        };
        Some(self.release(index, status))
    }

    /// `None`: it was sent again.
    #[cold]
    fn failed(&mut self, index: u32, errno: Errno) -> Option<Status> {
        let slot = &mut self.slots[index as usize];
        if slot.aborted && matches!(errno, Errno::CANCELED | Errno::INTR | Errno::AGAIN) {
            return Some(Status::Aborted);
        }
        if matches!(errno, Errno::AGAIN | Errno::INTR) && slot.retries < MAX_RETRIES {
            slot.retries += 1;
            self.arm(index);
            return None;
        }
        let ranged = slot.op.has_range() && !slot.op.has_data();
        let absent = matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY)
            || (errno == Errno::INVAL && slot.way == Way::Command);
        if ranged && absent {
            if !slot.next_way(&self.backing.able) {
                return Some(Status::Unsupported);
            }
            self.arm(index);
            return None;
        }
        let (op, path) = (slot.op, &self.backing.path);
        if self.warnings < MAX_WARNINGS {
            self.warnings += 1;
            tracing::warn!(?op, path, error = %errno, "I/O failed");
        } else {
            tracing::debug!(?op, path, error = %errno, "I/O failed");
        }
        Some(status_of(errno))
    }

    fn release(&mut self, index: u32, status: Status) -> Completion {
        let slot = &mut self.slots[index as usize];
        slot.clear();
        self.free.push(index);
        Completion { cookie: slot.cookie, status }
    }

    fn inflight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// All that the kernel has finished; true if there was anything.
    fn drain(&mut self, done: &mut Completions) -> bool {
        let before = done.len();
        // Completed work may wait for this thread to enter the kernel; then the flag says so.
        if self.ring.submission().taskrun() {
            self.send();
        }
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            if let Some(completion) = self.reap(entry.user_data() as u32, entry.result()) {
                done.push(completion);
            }
        }
        done.len() > before
    }
}

/// errno to status; the detail was logged.
fn status_of(errno: Errno) -> Status {
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Status::NoSpace,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY => Status::Unsupported,
        Errno::NODATA => Status::MediumError,
        Errno::ROFS => Status::ReadOnly,
        Errno::TIMEDOUT | Errno::TIME => Status::TimedOut,
        Errno::CANCELED => Status::Aborted,
        Errno::AGAIN | Errno::INTR | Errno::NOMEM | Errno::NOBUFS => Status::Busy,
        Errno::NODEV | Errno::NXIO => Status::Gone,
        _ => Status::IoError,
    }
}

impl Channel for UringChannel {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        let Some(&index) = self.free.last() else { return Err(Rejected { request, status: Status::Busy }) };
        let ranged = request.op.has_range() && !request.op.has_data();
        let way = match ranged.then(|| way(request.op, request.flags, &self.backing.able)) {
            Some(None) => return Err(Rejected { request, status: Status::Unsupported }),
            Some(Some(way)) => way,
            None => Way::Punch,
        };
        let bounce = match self.bounce_for(&request) {
            Ok(bounce) => bounce,
            Err(status) => return Err(Rejected { request, status }),
        };
        if request.op == Op::Reset {
            self.slots.iter_mut().for_each(|s| s.aborted = true);
        }
        self.free.pop();
        self.slots[index as usize].start(request, self.shift, bounce, way);
        self.arm(index);
        Ok(())
    }

    fn kick(&mut self) {
        if self.unsent {
            self.send();
        }
    }

    fn poll(&mut self, done: &mut Completions) -> bool {
        if self.free.len() == self.slots.len() {
            return false;
        }
        let any = self.drain(done);
        // Parts and retries of this turn, and what a busy kernel left. A batch that its owner is still building has
        // no harm from going early.
        self.kick();
        any
    }

    /// The ring itself: readable while it has completions (io_uring(7)).
    fn wait_fd(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }

    fn ready(&self) -> bool {
        // Entries that the kernel would not take raise no event.
        self.unsent && self.inflight() > 0
    }
}

impl UringChannel {
    /// Cancels what can be cancelled and waits until the kernel is done with the memory of every request.
    fn abandon(&mut self) {
        self.slots.iter_mut().for_each(|s| s.aborted = true);
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
        self.push(cancel.user_data(u64::MAX));
        while self.inflight() > 0 {
            let _ = self.ring.submit_and_wait(1);
            loop {
                let Some(entry) = self.ring.completion().next() else { break };
                if entry.user_data() != u64::MAX {
                    let _ = self.reap(entry.user_data() as u32, entry.result());
                }
            }
        }
    }
}

impl Drop for UringChannel {
    fn drop(&mut self) {
        if self.inflight() > 0 {
            self.abandon();
        }
        // Closing a ring lets go of its files and pages some time later (`io_ring_exit_work`); who deletes a bdev
        // wants the file free when he is told so.
        let _ = self.ring.submitter().unregister_files();
        let _ = self.ring.submitter().unregister_buffers();
    }
}
