//! Writing back what this host caches for a disk, before a stop makes the kernel fail it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Starts to write back the page cache of disk `id` and its partitions.
///
/// That is work for another process: a thread of ours that waits for the disk could not end if we crash, the kernel
/// would think that we still have the device, and nobody could recover it.
///
/// # Errors
/// sync(1) cannot be run.
pub(super) fn start(id: u32) -> std::io::Result<Child> {
    let devices = names(id).into_iter().map(|name| format!("/dev/{name}"));
    let mut command = Command::new("sync");
    command.arg("--data").args(devices);
    // A group of its own: ^C is for us, who then wait for it.
    command.process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

/// What keeps disk `id` or a partition of it in use: mounts that this process sees, and devices on top of it. The kernel
/// does not delete a disk before they are gone.
pub(super) fn users(id: u32) -> Vec<String> {
    let number = |name: &String| fs::read_to_string(format!("/sys/class/block/{name}/dev")).ok();
    let names = names(id);
    let numbers: Vec<String> = names.iter().filter_map(number).collect();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let holders =
        |name: &String| fs::read_dir(format!("/sys/class/block/{name}/holders")).into_iter().flatten();
    let holders = names.iter().flat_map(holders).flatten();
    let held = holders.map(|h| format!("is part of {}", h.file_name().to_string_lossy()));
    mounted(&mounts, &numbers).into_iter().map(|place| format!("is mounted at {place}")).chain(held).collect()
}

/// ublkbN and its partitions.
fn names(id: u32) -> Vec<String> {
    let disk = format!("ublkb{id}");
    let partition = format!("{disk}p");
    let found = fs::read_dir(format!("/sys/block/{disk}")).into_iter().flatten().flatten();
    let names = found.filter_map(|e| e.file_name().into_string().ok());
    let partitions: Vec<String> = names.filter(|name| name.starts_with(&partition)).collect();
    std::iter::once(disk).chain(partitions).collect()
}

/// Mount points of devices `numbers` ("259:0"). Source: proc_pid_mountinfo(5).
fn mounted(mountinfo: &str, numbers: &[String]) -> Vec<String> {
    let mount = |line: &str| {
        let mut fields = line.split(' ').skip(2);
        let (device, point) = (fields.next()?, fields.nth(1)?);
        numbers.iter().any(|n| n.trim() == device).then(|| point.to_owned())
    };
    mountinfo.lines().filter_map(mount).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number() {
        let info = "22 1 0:20 / /proc rw - proc proc rw\n\
                    36 35 259:3 / /mnt/a rw,noatime master:1 - ext4 /dev/ublkb1 rw\n\
                    37 35 259:4 /sub /mnt/b rw - ext4 /dev/ublkb1p1 rw\nshort\n";
        let numbers = |list: &[&str]| list.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        assert_eq!(mounted(info, &numbers(&["259:3\n", "259:4\n"])), ["/mnt/a", "/mnt/b"]);
        assert!(mounted(info, &numbers(&["259:5\n"])).is_empty());
    }

    #[test]
    fn a_disk_that_is_not_there_has_no_partitions() {
        assert_eq!(names(999_999), ["ublkb999999"]);
        assert!(users(999_999).is_empty());
    }
}
