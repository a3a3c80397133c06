//! System calls: those that the program, its libraries and the C library have a use for, and no other. Source: `seccomp(2)`.
//!
//! What goes through an io_uring is no system call, so a filter does not see it; what can be opened there is what Landlock
//! leaves.

use std::collections::BTreeMap;

use libc::c_long;
use rustix::thread::{CapabilitySet, capabilities};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter_all_threads,
};

use super::Sandbox;

/// On every architecture.
#[rustfmt::skip]
const CALLS: &[c_long] = &[
    // Memory.
    libc::SYS_brk, libc::SYS_madvise, libc::SYS_membarrier, libc::SYS_memfd_create, libc::SYS_mincore, libc::SYS_mlock,
    libc::SYS_mlock2, libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_mremap, libc::SYS_munlock, libc::SYS_munmap,
    libc::SYS_get_mempolicy, libc::SYS_set_mempolicy, libc::SYS_mbind,
    // Files.
    libc::SYS_close, libc::SYS_close_range, libc::SYS_dup, libc::SYS_dup3, libc::SYS_faccessat, libc::SYS_faccessat2,
    libc::SYS_fadvise64, libc::SYS_fallocate, libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_fcntl, libc::SYS_fdatasync,
    libc::SYS_flock, libc::SYS_fstat, libc::SYS_fstatfs, libc::SYS_fsync, libc::SYS_ftruncate, libc::SYS_getcwd,
    libc::SYS_getdents64, libc::SYS_ioctl, libc::SYS_lseek, libc::SYS_mkdirat, libc::SYS_newfstatat, libc::SYS_openat,
    libc::SYS_openat2, libc::SYS_pipe2, libc::SYS_pread64, libc::SYS_preadv, libc::SYS_preadv2, libc::SYS_pwrite64,
    libc::SYS_pwritev, libc::SYS_pwritev2, libc::SYS_read, libc::SYS_readlinkat, libc::SYS_readv, libc::SYS_renameat2,
    libc::SYS_statfs, libc::SYS_statx, libc::SYS_syncfs, libc::SYS_umask, libc::SYS_unlinkat, libc::SYS_write,
    libc::SYS_writev,
    // io_uring.
    libc::SYS_io_uring_enter, libc::SYS_io_uring_register, libc::SYS_io_uring_setup,
    // Events and time.
    libc::SYS_clock_getres, libc::SYS_clock_gettime, libc::SYS_clock_nanosleep, libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2, libc::SYS_eventfd2, libc::SYS_gettimeofday,
    libc::SYS_nanosleep, libc::SYS_ppoll, libc::SYS_pselect6, libc::SYS_timerfd_create, libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    // Sockets; their families are looked at below.
    libc::SYS_accept, libc::SYS_accept4, libc::SYS_bind, libc::SYS_connect, libc::SYS_getpeername, libc::SYS_getsockname,
    libc::SYS_getsockopt, libc::SYS_listen, libc::SYS_recvfrom, libc::SYS_recvmmsg, libc::SYS_recvmsg, libc::SYS_sendmmsg,
    libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_setsockopt, libc::SYS_shutdown, libc::SYS_socketpair,
    // Threads.
    libc::SYS_clone, libc::SYS_clone3, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_futex, libc::SYS_get_robust_list,
    libc::SYS_getcpu, libc::SYS_gettid, libc::SYS_rseq, libc::SYS_sched_get_priority_max, libc::SYS_sched_get_priority_min,
    libc::SYS_sched_getaffinity, libc::SYS_sched_getparam, libc::SYS_sched_getscheduler, libc::SYS_sched_setaffinity,
    libc::SYS_sched_setscheduler, libc::SYS_sched_yield, libc::SYS_set_robust_list, libc::SYS_set_tid_address,
    // Signals.
    libc::SYS_kill, libc::SYS_restart_syscall, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait, libc::SYS_sigaltstack, libc::SYS_tgkill,
    // What the process is, and what it has.
    libc::SYS_capget, libc::SYS_getegid, libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getgroups, libc::SYS_getpid,
    libc::SYS_getppid, libc::SYS_getpriority, libc::SYS_getrandom, libc::SYS_getresgid, libc::SYS_getresuid,
    libc::SYS_getrusage, libc::SYS_getuid, libc::SYS_prctl, libc::SYS_prlimit64, libc::SYS_sysinfo, libc::SYS_times,
    libc::SYS_uname, libc::SYS_wait4, libc::SYS_waitid,
];

/// Which later architectures do without, or the crate libc has not for them.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const OLD_CALLS: &[c_long] = &[
    libc::SYS_access, libc::SYS_arch_prctl, libc::SYS_chmod, libc::SYS_dup2, libc::SYS_epoll_create, libc::SYS_epoll_wait,
    libc::SYS_eventfd, libc::SYS_getdents, libc::SYS_getrlimit, libc::SYS_lstat, libc::SYS_mkdir, libc::SYS_open,
    libc::SYS_pipe, libc::SYS_poll, libc::SYS_readlink, libc::SYS_rename, libc::SYS_renameat, libc::SYS_rmdir,
    libc::SYS_select, libc::SYS_stat, libc::SYS_sync_file_range, libc::SYS_time, libc::SYS_unlink,
];
/// renameat and sync_file_range (asm-generic/unistd.h).
#[cfg(not(target_arch = "x86_64"))]
const OLD_CALLS: &[c_long] = &[38, 84];

/// Of [`libc::SYS_socket`].
const FAMILIES: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Namespaces, in which a user without rights would be root.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// Requests of [`libc::SYS_ioctl`], TIOCSTI and TIOCLINUX (asm-generic/ioctls.h).
const TERMINAL: [u64; 2] = [0x5412, 0x541c];

/// Leaves all threads the calls above.
pub(super) fn restrict(sandbox: Sandbox) -> Result<(), String> {
    let action = match sandbox {
        Sandbox::Off => return Ok(()),
        Sandbox::Log => SeccompAction::Log,
        Sandbox::Kill => SeccompAction::KillProcess,
    };
    let failed = |e: String| format!("--sandbox: {e}");
    let all = allowed(action).map_err(|e| failed(e.to_string()))?;
    let details = refused().map_err(|e| failed(e.to_string()))?;
    // The one that leaves no filter to be added comes last.
    if sandbox == Sandbox::Kill {
        apply_filter_all_threads(&details).map_err(|e| failed(e.to_string()))?;
    }
    apply_filter_all_threads(&all).map_err(|e| failed(e.to_string()))
}

fn architecture() -> Result<seccompiler::TargetArch, seccompiler::BackendError> {
    std::env::consts::ARCH.try_into()
}

/// Allows the calls above, and has `action` done with others.
fn allowed(action: SeccompAction) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().chain(OLD_CALLS).map(|call| (*call, Vec::new())).collect();
    let family = |family: i32| {
        let condition = SeccompCondition::new(0, Len::Dword, Op::Eq, family as u64)?;
        SeccompRule::new(vec![condition])
    };
    rules.insert(libc::SYS_socket, FAMILIES.iter().map(|f| family(*f)).collect::<Result<_, _>>()?);
    // Only to have the host's cache written back (sync) behind a ublk disk, of which there are none without this.
    if capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN)) {
        rules.insert(libc::SYS_execve, Vec::new());
        #[cfg(target_arch = "x86_64")]
        rules.insert(libc::SYS_vfork, Vec::new());
    }
    SeccompFilter::new(rules, action, SeccompAction::Allow, architecture()?)?.try_into()
}

/// Refuses what allowed calls could be misused for, with ENOSYS. The C library then does without clone3, whose flags a
/// filter cannot see.
fn refused() -> Result<BpfProgram, seccompiler::BackendError> {
    let equals = |arg, op, value| SeccompRule::new(vec![SeccompCondition::new(arg, Len::Dword, op, value)?]);
    let namespace = |flag: &i32| equals(0, Op::MaskedEq(*flag as u64), *flag as u64);
    // Keys put into the terminal's input would be read by its next reader.
    let terminal = TERMINAL.map(|request| equals(1, Op::Eq, request));
    let rules = BTreeMap::from([
        (libc::SYS_clone3, Vec::new()),
        (libc::SYS_clone, NAMESPACES.iter().map(namespace).collect::<Result<_, _>>()?),
        (libc::SYS_ioctl, terminal.into_iter().collect::<Result<_, _>>()?),
    ]);
    let refuse = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture()?)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a process of its own, for it dies of it.
    #[test]
    fn what_is_not_allowed_ends_the_process() {
        use std::os::unix::process::ExitStatusExt;
        const CHILD: &str = "ENGINE_TEST_SANDBOX";
        let mode = std::env::var(CHILD).unwrap_or_default();
        if !mode.is_empty() {
            restrict(if mode == "kill" { Sandbox::Kill } else { Sandbox::Log }).unwrap();
            std::thread::spawn(|| std::fs::read("/proc/self/status").unwrap()).join().unwrap();
            // Refused for want of rights or not: the call is made.
            let _ = std::os::unix::fs::chroot("/nonexistent");
            return;
        }
        let name = "isolation::calls::tests::what_is_not_allowed_ends_the_process";
        let run = |mode| {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", name]).env(CHILD, mode).output().unwrap().status
        };
        assert_eq!(run("kill").signal(), Some(libc::SIGSYS));
        assert!(run("log").success());
    }

    #[test]
    fn filters_can_be_made_and_fit() {
        for program in [allowed(SeccompAction::KillProcess).unwrap(), refused().unwrap()] {
            // BPF_MAXINSNS.
            assert!(program.len() <= 4096, "{}", program.len());
        }
    }
}
