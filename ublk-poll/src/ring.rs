//! io_uring instances for commands that a driver completes on the submitting thread.

use io_uring::{IoUring, cqueue, squeue};
use rustix::io::Errno;

/// A ring with the cheapest completion mode that the kernel knows.
///
/// The driver hands a request over as task work of the thread that fetched it. With COOP_TASKRUN that work does not
/// interrupt the polling thread; TASKRUN_FLAG says that some is there, and a thread that sleeps in epoll_wait is woken by
/// it. SINGLE_ISSUER is from Linux 6.0.
pub(crate) fn build<S: squeue::EntryMarker>(entries: u32) -> std::io::Result<IoUring<S, cqueue::Entry>> {
    let modern = IoUring::<S, cqueue::Entry>::builder()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_single_issuer()
        .build(entries);
    match modern {
        Err(e) if Errno::from_io_error(&e) == Some(Errno::INVAL) => IoUring::builder().build(entries),
        other => other,
    }
}

/// What a failed set-up of a ring means, in words.
pub fn explain(e: &std::io::Error) -> String {
    let hint = match Errno::from_io_error(e) {
        Some(Errno::NOSYS) => ": this kernel has no io_uring",
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
