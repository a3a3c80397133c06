//! Files that may be mapped for a front end.
//!
//! Whoever touches a page of a file waits until its file system has it. Where that is a process of the front end's (FUSE)
//! or a server somewhere, a reactor could wait for ever, and so could whoever only asks such a file for its size. So the
//! question is put to the kernel alone: to the file's own kind, or to the table of mounts.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// File systems of the kernel, on disks of this host.
const LOCAL: [&str; 5] = ["ext2", "ext3", "ext4", "xfs", "btrfs"];

/// What is right, for errors.
pub(crate) const WANTED: &str = "memfd, tmpfs and hugetlbfs are right, or ext4, xfs, btrfs as mounted here";

/// Whether the pages of `file` come from memory or from a local disk.
///
/// # Errors
/// The descriptor is closed, or /proc is not there.
pub(crate) fn is_local(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    // Of memfd, tmpfs and hugetlbfs only: `memfd_fcntl` in mm/memfd.c.
    match rustix::fs::fcntl_get_seals(file) {
        Ok(_) => return Ok(true),
        Err(Errno::INVAL) => {}
        Err(e) => return Err(e),
    }
    let read =
        |path: &str| std::fs::read_to_string(path).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO));
    let info = read(&format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let mount = info.lines().find_map(|l| l.strip_prefix("mnt_id:")).map(str::trim);
    let Some(mount) = mount else { return Ok(false) };
    let mounts = read("/proc/self/mountinfo")?;
    Ok(file_system(&mounts, mount).is_some_and(|kind| LOCAL.contains(&kind)))
}

/// The type of the mount `id` in a table like /proc/self/mountinfo (proc_pid_mountinfo(5)).
fn file_system<'a>(mounts: &'a str, id: &str) -> Option<&'a str> {
    let line = mounts.lines().find(|l| l.split(' ').next() == Some(id))?;
    line.split_once(" - ")?.1.split(' ').next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn memory_is_local_and_a_file_that_a_process_makes_up_is_not() {
        let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(is_local(memory.as_fd()), Ok(true));
        // A regular file by its mode, too, and as little on a disk as one of FUSE.
        let made_up = std::fs::File::open("/proc/self/status").unwrap();
        assert!(made_up.metadata().unwrap().is_file());
        assert_eq!(is_local(made_up.as_fd()), Ok(false));
    }

    #[test]
    fn mounts_are_found_by_their_numbers() {
        let mounts = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            210 21 0:40 / /mnt/a - b rw - fuse.sshfs host:/ rw,user_id=0\n";
        assert_eq!(file_system(mounts, "21"), Some("ext4"));
        assert_eq!(file_system(mounts, "2"), None);
        assert!(!LOCAL.contains(&file_system(mounts, "210").unwrap()));
    }
}
