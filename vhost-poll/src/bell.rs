//! Signals to eventfds that a front end holds as well, none of which can block this process.
//!
//! A write to an eventfd waits while its counter is full, unless O_NONBLOCK is set. Flag and counter belong to the open
//! file, and whoever holds the file changes them at any time: no look before the write tells what the write will do, and
//! the kernel takes no RWF_NOWAIT there. The kernel's own signals never wait, though: a full counter stays full, and its
//! reader is woken all the same. Two of its interfaces give such a signal for a completion, so a bell is rung by
//! completing something.
//!
//! - **io_uring**, IORING_REGISTER_EVENTFD: a ring of one entry for each bell, and a NOP each time.
//! - **AIO**, IOCB_FLAG_RESFD, where the system does not allow io_uring (containers, kernel.io_uring_disabled): one
//!   context for the process, and a read of /dev/null each time. It takes twice as long, and its context need not be
//!   made for each bell, which takes the kernel milliseconds.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use io_uring::{IoUring, opcode};

/// How often a signal is tried again that the kernel has no memory for at the moment.
const TRIES: u32 = 8;

/// A way to signal one eventfd.
pub(crate) struct Bell(Kind);

enum Kind {
    /// The kernel keeps the eventfd; our descriptor of it is closed.
    Ring(Box<Ring>),
    Aio(OwnedFd),
}

struct Ring {
    ring: IoUring,
    /// Calls of [`Ring::ring`] that the signal on its way may not cover. Who makes it 1 has the queues of the ring.
    calls: AtomicU32,
}

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Kind::Ring(_) => "Bell(io_uring)",
            Kind::Aio(_) => "Bell(aio)",
        })
    }
}

impl Bell {
    /// A bell for an eventfd. It has one descriptor.
    ///
    /// # Errors
    /// No descriptors or memory left; the system has neither io_uring nor AIO.
    pub(crate) fn new(eventfd: OwnedFd) -> io::Result<Self> {
        match Ring::new(&eventfd) {
            Ok(ring) => Ok(Self(Kind::Ring(Box::new(ring)))),
            // What passes is told to the caller: the other way would not be found anew.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => Err(e),
            Err(_) => Self::aio(eventfd),
        }
    }

    fn aio(eventfd: OwnedFd) -> io::Result<Self> {
        match Aio::of_process() {
            Ok(_) => Ok(Self(Kind::Aio(eventfd))),
            Err(errno) => Err(io::Error::from_raw_os_error(*errno)),
        }
    }

    /// Adds one to the counter, or leaves it full, and wakes whoever waits. Never waits itself.
    #[inline]
    pub(crate) fn ring(&self) {
        match &self.0 {
            Kind::Ring(ring) => ring.ring(),
            Kind::Aio(eventfd) => {
                if let Ok(aio) = Aio::of_process() {
                    aio.ring(eventfd);
                }
            }
        }
    }
}

impl Ring {
    fn new(eventfd: &OwnedFd) -> io::Result<Self> {
        let ring = IoUring::new(1)?;
        ring.submitter().register_eventfd(eventfd.as_raw_fd())?;
        Ok(Self { ring, calls: AtomicU32::new(0) })
    }

    #[inline]
    fn ring(&self) {
        if self.calls.fetch_add(1, Ordering::AcqRel) > 0 {
            return;
        }
        // Whoever called while a signal was on its way may have had news that its reader did not see.
        loop {
            let covered = self.calls.load(Ordering::Acquire);
            self.signal();
            if self.calls.compare_exchange(covered, 0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return;
            }
        }
    }

    /// For who has made `calls` 1.
    #[inline]
    fn signal(&self) {
        // SAFETY: `calls` lets one at a time get here, so these are the only handles of the two queues.
        let (mut submission, mut completion) =
            unsafe { (self.ring.submission_shared(), self.ring.completion_shared()) };
        // An entry that is still there is one that the kernel did not take last time: it is as good.
        // SAFETY: a NOP has no memory.
        let _ = unsafe { submission.push(&opcode::Nop::new().build()) };
        submission.sync();
        for _ in 0..TRIES {
            // SAFETY: no argument, so no memory; the one entry is a NOP.
            if unsafe { self.ring.submitter().enter::<libc::sigset_t>(1, 0, 0, None) }.is_ok_and(|n| n > 0) {
                break;
            }
        }
        completion.sync();
        completion.by_ref().for_each(drop);
        completion.sync();
    }
}

/// The AIO context of this process, which stays.
struct Aio {
    /// `aio_context_t`, which is the address of the ring of completions.
    context: usize,
    null: File,
}

/// `struct iocb` of linux/aio_abi.h; this crate is for little-endian machines.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_FLAG_RESFD: u32 = 1;
/// `AIO_RING_MAGIC` of fs/aio.c.
const MAGIC: u32 = 0xa10a_10a1;
/// Completions for which the context has room: each thread that rings has one for a moment.
const EVENTS: u32 = 128;

impl Aio {
    /// Made when it is first asked for; or the errno that said no.
    fn of_process() -> &'static Result<Self, i32> {
        static AIO: OnceLock<Result<Aio, i32>> = OnceLock::new();
        AIO.get_or_init(|| Self::new().map_err(|e| e.raw_os_error().unwrap_or(libc::ENOSYS)))
    }

    fn new() -> io::Result<Self> {
        let null = File::open("/dev/null")?;
        let mut context = 0usize;
        // SAFETY: io_setup(2) writes one word to `context`.
        if unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut context) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let this = Self { context, null };
        match this.word(4).load(Ordering::Relaxed) {
            MAGIC => Ok(this),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// A word of `struct aio_ring` (fs/aio.c), which libaio reads and writes in the same way: id, nr, head, tail, magic.
    fn word(&self, index: usize) -> &AtomicU32 {
        debug_assert!(index < 5);
        // SAFETY: io_setup(2) has mapped the ring at the address that is the context's name, at least a page of it, and it
        // stays mapped: the context is never destroyed. Kernel and process both change it, by single words.
        unsafe { &*(self.context as *const AtomicU32).add(index) }
    }

    /// Any thread may.
    #[cold]
    fn ring(&self, eventfd: &OwnedFd) {
        let mut iocb = Iocb {
            opcode: IOCB_CMD_PREAD,
            file: self.null.as_raw_fd() as u32,
            flags: IOCB_FLAG_RESFD,
            eventfd: eventfd.as_raw_fd() as u32,
            ..Iocb::default()
        };
        let list = [&raw mut iocb];
        for _ in 0..TRIES {
            // SAFETY: one control block, which lives during the call; the kernel has copied it when the call returns, and its
            // read of no bytes has ended by then, as every read of /dev/null.
            let n = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1usize, list.as_ptr()) };
            // Nobody wants to know how it ended. Two threads may store in the wrong order: then some completions keep their
            // places until the next one stores.
            self.word(2).store(self.word(3).load(Ordering::Acquire), Ordering::Release);
            if n > 0 {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use super::*;
    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

    /// A bell of either kind, and another descriptor of its eventfd.
    fn bells() -> Vec<(Bell, OwnedFd)> {
        let mut bells = Vec::new();
        for make in [Bell::new, Bell::aio] {
            let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let ours = fd.try_clone().unwrap();
            match make(ours) {
                Ok(bell) => bells.push((bell, fd)),
                Err(e) => eprintln!("skipped: {e}"),
            }
        }
        assert!(!bells.is_empty(), "this system has neither io_uring nor AIO");
        bells
    }

    fn readable(fd: &OwnedFd) -> bool {
        let mut set = [PollFd::new(fd, PollFlags::IN)];
        poll(&mut set, Some(&Timespec::default())).unwrap() == 1
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        if readable(fd) {
            rustix::io::read(fd, &mut bytes).unwrap();
        }
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn each_ring_counts_one() {
        for (bell, fd) in bells() {
            assert!(!readable(&fd), "{bell:?}");
            for n in [1, 3, 1000] {
                (0..n).for_each(|_| bell.ring());
                assert_eq!(count(&fd), n, "{bell:?}");
            }
        }
    }

    #[test]
    fn a_full_counter_of_a_descriptor_that_blocks_holds_nobody_up() {
        for (bell, fd) in bells() {
            rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            let (tx, rx) = std::sync::mpsc::channel();
            let named = format!("{bell:?}");
            let thread = std::thread::spawn(move || {
                (0..100).for_each(|_| bell.ring());
                tx.send(bell).unwrap();
            });
            let bell = test_support::recv(&rx);
            thread.join().unwrap();
            assert!(readable(&fd), "{named}");
            // And it works again once somebody has read.
            assert!(count(&fd) >= u64::MAX - 1);
            bell.ring();
            assert_eq!(count(&fd), 1, "{named}");
        }
    }

    #[test]
    fn threads_may_ring_together() {
        for (bell, fd) in bells() {
            let bell = Arc::new(bell);
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let bell = bell.clone();
                    std::thread::spawn(move || (0..2000).for_each(|_| bell.ring()))
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().unwrap());
            bell.ring();
            assert!((1..=8001).contains(&count(&fd)), "{bell:?}");
        }
    }

    #[test]
    fn what_is_no_eventfd_is_refused_by_either() {
        let null = File::open("/dev/null").unwrap();
        let fd = null.as_fd().try_clone_to_owned().unwrap();
        assert!(Ring::new(&fd).is_err());
    }
}
