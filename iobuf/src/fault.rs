//! Shared memory that goes away under us: what becomes of SIGBUS.
//!
//! Whoever shares a file with this process can make it shorter, unless it is sealed against that, and its file system
//! can have no page left for a hole in it. Touching such memory raises SIGBUS, which ends a process. A handler of the
//! signal puts zeroed memory of our own in the place of the whole mapping instead. The instruction that was under way
//! goes on with that, on whatever thread and in whatever copy it was, and the mapping's owner finds it
//! [lost](crate::Region::is_lost) and parts with the peer. Every other SIGBUS ends the process as ever.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

/// Shared mappings at once; what is beyond is not guarded. The table costs memory for those that are used.
const CAPACITY: usize = 8192;

/// A mapping. The handler reads it at any time, so all of it is atomic.
struct Entry {
    /// First address; `FREE`, or `CLAIMED` while `len` is being set.
    start: AtomicUsize,
    len: AtomicUsize,
    state: AtomicU8,
}

/// No address of a mapping, and no pages.
const FREE: usize = 0;
const CLAIMED: usize = 1;

/// States: as mapped; a thread is at it; replaced; could not be replaced.
const INTACT: u8 = 0;
const REPLACING: u8 = 1;
const REPLACED: u8 = 2;
const BEYOND_HELP: u8 = 3;

static TABLE: [Entry; CAPACITY] = [const {
    Entry { start: AtomicUsize::new(FREE), len: AtomicUsize::new(0), state: AtomicU8::new(INTACT) }
}; CAPACITY];

/// Entries below this have been used: as far as the handler has to look.
static USED: AtomicUsize = AtomicUsize::new(0);

static LOSSES: AtomicU64 = AtomicU64::new(0);

/// What handled the signal before.
static BEFORE: OnceLock<Before> = OnceLock::new();

/// `sigaction`, which holds an address.
struct Before(libc::sigaction);

/// How many shared mappings this process has lost so far. Cheap enough to look at in every turn of a reactor: who sees
/// it move looks whether one is his.
pub fn losses() -> u64 {
    LOSSES.load(Ordering::Relaxed)
}

/// Keeps one mapping in the table.
#[derive(Debug)]
pub(crate) struct Guard(usize);

impl Guard {
    /// For `len` bytes at `start`, a mapping of whole pages. `None`: there is no place left, or no handler can be set.
    ///
    /// # Safety
    /// The mapping is the caller's, stays there until the guard is dropped, and may be replaced by anonymous memory at
    /// any time before.
    pub unsafe fn new(start: *mut u8, len: usize) -> Option<Self> {
        if !install() {
            return None;
        }
        let claim =
            |e: &Entry| e.start.compare_exchange(FREE, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok();
        let place = TABLE.iter().position(claim)?;
        let entry = &TABLE[place];
        entry.len.store(len, Ordering::Relaxed);
        entry.state.store(INTACT, Ordering::Relaxed);
        entry.start.store(start as usize, Ordering::Release);
        USED.fetch_max(place + 1, Ordering::Release);
        Some(Self(place))
    }

    /// The memory is not shared any more.
    pub fn is_lost(&self) -> bool {
        TABLE[self.0].state.load(Ordering::Acquire) != INTACT
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        TABLE[self.0].start.store(FREE, Ordering::Release);
    }
}

/// Sets the handler, once in the life of the process.
fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        // SAFETY: integers, a set of bits and an address: all zero is valid, and means the default action.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: asks for the present action only; `before` has room for it.
        if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) } != 0 {
            return false;
        }
        // Before the handler can run for the first time.
        let _ = BEFORE.set(Before(before));
        // SAFETY: as above.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        // On the thread's alternate stack, which Rust's own handler has set up, as a stack may be what is at fault.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `on_sigbus` has the signature that SA_SIGINFO asks for, and does only what a handler may: atomic
        // loads and stores, system calls, and what handled the signal before.
        unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) == 0 }
    })
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid `siginfo_t`; for SIGBUS it has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Not memory that is broken (BUS_MCEERR_*) nor misaligned, and no signal that somebody sent.
    if code == libc::BUS_ADRERR && replace(address) {
        return;
    }
    pass_on(signal, info, context);
}

/// Replaces the mapping that holds `address`. False: there is none, or it cannot be.
fn replace(address: usize) -> bool {
    let used = USED.load(Ordering::Acquire);
    let holds = |e: &&Entry| {
        let start = e.start.load(Ordering::Acquire);
        start > CLAIMED && address >= start && address - start < e.len.load(Ordering::Relaxed)
    };
    let Some(entry) = TABLE[..used].iter().find(holds) else { return false };
    match entry.state.compare_exchange(INTACT, REPLACING, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        // Another thread is at it, or was done with it since this one's signal was raised: anonymous memory raises none. The
        // instruction that is tried again finds the new memory, or comes back here.
        Err(REPLACING | REPLACED) => return true,
        Err(_) => return false,
    }
    let (start, len) = (entry.start.load(Ordering::Relaxed), entry.len.load(Ordering::Relaxed));
    // SAFETY: the whole of a mapping whose owner has agreed to this (`Guard::new`) and which stays while its entry does:
    // threads that can fault on it are users of the mapping, which the owner keeps until they are done. A plain system
    // call, which leaves errno alone.
    let new = unsafe {
        rustix::mm::mmap_anonymous(
            start as *mut c_void,
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
        )
    };
    entry.state.store(if new.is_ok() { REPLACED } else { BEYOND_HELP }, Ordering::Release);
    LOSSES.fetch_add(1, Ordering::Relaxed);
    new.is_ok()
}

/// Lets whatever handled the signal before have it.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let before = BEFORE.get().map(|b| &b.0);
    let handler = before.map_or(libc::SIG_DFL, |b| b.sa_sigaction);
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // SAFETY: the default action. The signal is raised once more, and ends the process when this handler returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    let with_info = before.is_some_and(|b| b.sa_flags & libc::SA_SIGINFO != 0);
    // SAFETY: the address is that of the handler that was installed before, which has the signature that its flags say;
    // it gets what the kernel gave.
    unsafe {
        if with_info {
            let f: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = std::mem::transmute(handler);
            f(signal, info, context);
        } else {
            let f: extern "C" fn(c_int) = std::mem::transmute(handler);
            f(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::Region;

    fn shared(len: usize) -> (std::os::fd::OwnedFd, std::sync::Arc<Region>) {
        let fd = rustix::fs::memfd_create("lost", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len as u64).unwrap();
        let region = Region::shared(fd.as_fd(), 0, len).unwrap();
        (fd, region)
    }

    #[test]
    fn memory_that_goes_away_is_replaced_and_found_lost() {
        let (fd, region) = shared(65536);
        let (_other_fd, other) = shared(4096);
        assert!(region.copy_in(0, &[7; 65536]) && !region.is_lost());
        let before = losses();
        rustix::fs::ftruncate(&fd, 8192).unwrap();
        let mut out = [1u8; 16];
        // What is left of the file can still be read.
        assert!(region.copy_out(0, &mut out) && out == [7; 16] && !region.is_lost());
        // From several threads at once, for reading and for writing.
        std::thread::scope(|s| {
            for t in 0..4 {
                let region = &region;
                s.spawn(move || {
                    let mut out = [1u8; 4096];
                    assert!(region.copy_out(16384 + t * 4096, &mut out) && out == [0; 4096]);
                    assert!(region.copy_in(40960 + t * 4096, &[9; 4096]));
                });
            }
        });
        assert!(region.is_lost() && !other.is_lost());
        assert!(losses() > before);
        // It is memory as any other now, and the file's other users do not see it.
        assert!(region.copy_in(0, &[3; 16]) && region.copy_out(0, &mut out) && out == [3; 16]);
        drop(region);
        assert!(other.copy_in(0, &[1; 4096]));
    }

    /// Threads that touch lost memory at the same moment all get their signal, one of them after another has replaced it.
    /// Handed on to what handled the signal before, it would take this handler away.
    #[test]
    fn threads_may_lose_the_same_memory_at_once() {
        for _ in 0..200 {
            let (fd, region) = shared(16 * 4096);
            rustix::fs::ftruncate(&fd, 0).unwrap();
            let at_once = std::sync::Barrier::new(4);
            std::thread::scope(|s| {
                for t in 0..4 {
                    let (region, at_once) = (&region, &at_once);
                    s.spawn(move || {
                        at_once.wait();
                        assert!(region.copy_in(t * 4 * 4096, &[1]));
                    });
                }
            });
            assert!(region.is_lost());
        }
    }

    #[test]
    fn places_in_the_table_are_given_back() {
        for _ in 0..2 * CAPACITY {
            drop(shared(4096));
        }
        let (fd, region) = shared(4096);
        rustix::fs::ftruncate(&fd, 0).unwrap();
        assert!(region.copy_in(0, &[1]) && region.is_lost());
    }

    /// In a process of its own, for it dies of it.
    #[test]
    fn any_other_sigbus_ends_the_process() {
        use std::os::unix::process::ExitStatusExt;
        const CHILD: &str = "IOBUF_TEST_SIGBUS";
        if std::env::var_os(CHILD).is_some() {
            let (_fd, _region) = shared(4096);
            let fd = rustix::fs::memfd_create("plain", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            // SAFETY: a fresh mapping of an empty file: reading it raises SIGBUS, which is what this is about.
            unsafe {
                let at = rustix::mm::mmap(
                    std::ptr::null_mut(),
                    4096,
                    ProtFlags::READ,
                    MapFlags::SHARED,
                    fd.as_fd(),
                    0,
                )
                .unwrap();
                at.cast::<u8>().read_volatile();
            }
            unreachable!("there is no such memory");
        }
        let name = "fault::tests::any_other_sigbus_ends_the_process";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let ended = child.args(["--exact", name]).env(CHILD, "1").output().unwrap().status;
        assert_eq!(ended.signal(), Some(libc::SIGBUS), "{ended:?}");
    }
}
