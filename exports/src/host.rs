//! What this host does with a kernel device that a bdev has become: who uses it, and writing back what it caches.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long [`sync`] may take before a device is stopped all the same.
pub(crate) const SYNC_TIME: Duration = Duration::from_secs(30);
/// How often it is looked after.
pub(crate) const SYNC_POLL: Duration = Duration::from_millis(10);

/// Starts to write back the page cache of the disk `disk` ("ublkb0") and its partitions.
///
/// That is work for another process: a thread of ours that waits for the disk could not end if the disk does not answer, and
/// neither could we. The kernel would think that we still have the device, and nobody could recover it.
///
/// # Errors
/// sync(1) cannot be run.
pub(crate) fn sync(disk: &str) -> std::io::Result<Child> {
    let devices = names(disk).into_iter().map(|name| format!("/dev/{name}"));
    let mut command = Command::new("sync");
    command.arg("--data").args(devices);
    // A group of its own: ^C is for us, who then wait for it.
    command.process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

/// What has the disk `disk` or a partition of it for itself, in words: mounts that this process sees, swap, and devices on top
/// of it. Reads what the kernel keeps in memory, and waits for nothing.
pub(crate) fn users(disk: &str) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut users = Vec::new();
    for name in names(disk) {
        let number = fs::read_to_string(format!("/sys/class/block/{name}/dev")).unwrap_or_default();
        users.extend(
            mounted(&mounts, number.trim()).map(|point| format!("/dev/{name} is mounted on {point}")),
        );
        let holders =
            fs::read_dir(format!("/sys/class/block/{name}/holders")).into_iter().flatten().flatten();
        users.extend(holders.map(|h| format!("/dev/{name} is part of {}", h.file_name().to_string_lossy())));
        if swaps.lines().any(|l| l.split_whitespace().next() == Some(&format!("/dev/{name}"))) {
            users.push(format!("/dev/{name} is swap space"));
        }
    }
    users
}

/// The disk and its partitions, by name.
fn names(disk: &str) -> Vec<String> {
    let partition = format!("{disk}p");
    let found = fs::read_dir(format!("/sys/block/{disk}")).into_iter().flatten().flatten();
    let names = found.filter_map(|e| e.file_name().into_string().ok());
    let partitions = names.filter(|name| name.starts_with(&partition));
    std::iter::once(disk.to_owned()).chain(partitions).collect()
}

/// Mount points of the block device `number` ("259:0"). Source: proc_pid_mountinfo(5).
fn mounted<'a>(mountinfo: &'a str, number: &str) -> impl Iterator<Item = &'a str> {
    mountinfo.lines().filter_map(move |line| {
        let mut fields = line.split(' ').skip(2);
        let (device, point) = (fields.next()?, fields.nth(1)?);
        (device == number).then_some(point)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number() {
        let info = "22 1 0:20 / /proc rw - proc proc rw\n\
                    36 35 259:3 / /mnt/a rw,noatime master:1 - ext4 /dev/ublkb1 rw\n\
                    37 35 259:4 /sub /mnt/b rw - ext4 /dev/ublkb1p1 rw\nshort\n";
        assert!(mounted(info, "259:3").eq(["/mnt/a"]));
        assert!(mounted(info, "259:4").eq(["/mnt/b"]));
        assert!(mounted(info, "259:5").next().is_none());
    }

    #[test]
    fn a_disk_that_is_not_there_has_no_partitions_and_no_users() {
        assert_eq!(names("ublkb999999"), ["ublkb999999"]);
        assert!(users("ublkb999999").is_empty());
    }
}
