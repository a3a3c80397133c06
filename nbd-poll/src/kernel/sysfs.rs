//! What a device is doing, and who uses it: /sys/block/nbdN and /proc.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// `NBD_MAJOR`.
const MAJOR: u64 = 43;

/// What /sys/block/nbdN says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Bytes; 0 while it is not made.
    pub size: u64,
    /// The process or thread that made it, while it is made.
    pub pid: Option<u32>,
    /// No writes.
    pub read_only: bool,
    /// What it was made with.
    pub backend: Option<String>,
    /// Hardware queues: the number of its sockets.
    pub sockets: usize,
    /// Bytes of a logical block.
    pub block_size: u32,
}

impl State {
    /// Has been made, and is not gone.
    pub fn is_made(&self) -> bool {
        self.pid.is_some() || self.size > 0
    }
}

/// The state of device `index`; `None`: the driver has no such device (yet).
pub fn state(index: u32) -> Option<State> {
    let dir = PathBuf::from(format!("/sys/block/nbd{index}"));
    let text = |name: &str| fs::read_to_string(dir.join(name)).ok().map(|t| t.trim().to_owned());
    let number = |name: &str| text(name).and_then(|t| t.parse::<u64>().ok());
    let sectors = number("size")?;
    Some(State {
        size: sectors * 512,
        pid: number("pid").and_then(|p| u32::try_from(p).ok()),
        read_only: number("ro") == Some(1),
        backend: text("backend"),
        sockets: fs::read_dir(dir.join("mq")).map_or(0, |d| d.count()),
        block_size: number("queue/logical_block_size").and_then(|b| u32::try_from(b).ok()).unwrap_or(512),
    })
}

/// Numbers of the devices that there are, in order.
pub fn devices() -> Vec<u32> {
    let names = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let mut all: Vec<u32> = names.filter_map(|e| number_of(e.file_name().to_str()?)).collect();
    all.sort_unstable();
    all
}

/// The device node of `index`.
pub fn node(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

/// The number of the device that `path` names: "/dev/nbd3", "nbd3", or a link to it.
pub fn index_of(path: &str) -> Option<u32> {
    let name = path.strip_prefix("/dev/").unwrap_or(path);
    if let Some(index) = number_of(name) {
        return Some(index);
    }
    let found = fs::metadata(path).ok().filter(|m| m.file_type().is_block_device())?;
    let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
    if u64::from(major) != MAJOR {
        return None;
    }
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    number_of(link.file_name()?.to_str()?)
}

/// "nbd12" → 12; partitions ("nbd1p2") are not devices.
fn number_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("nbd")?;
    let plain = digits == "0" || !digits.starts_with('0');
    if plain && digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
}

/// The processes that have the device or a partition of it open, other than this one. In words. Looks through /proc:
/// milliseconds.
pub fn openers(index: u32) -> Vec<String> {
    let names: Vec<PathBuf> = parts(index).iter().map(|(name, _)| Path::new("/dev").join(name)).collect();
    let own = std::process::id();
    let mut openers = Vec::new();
    for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = pid.file_name().to_str().and_then(|n| n.parse::<u32>().ok()).filter(|p| *p != own)
        else {
            continue;
        };
        let mut open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        // The link's text, not what it points to: that might be a dead file server.
        if open.any(|fd| fs::read_link(fd.path()).is_ok_and(|target| names.contains(&target))) {
            let command = command_of(pid).unwrap_or_default();
            openers.push(format!("process {pid} ({command}) has /dev/nbd{index} open"));
        }
    }
    openers
}

/// Who made the device, in words.
pub fn maker(index: u32) -> Option<String> {
    let pid = state(index)?.pid?;
    Some(match (process_of(pid), command_of(pid)) {
        (Some(process), Some(command)) => {
            format!("/dev/nbd{index} was made by process {process} ({command})")
        }
        _ => format!("/dev/nbd{index} was made by process {pid}, which has ended"),
    })
}

/// The process that a thread belongs to.
fn process_of(thread: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("Tgid:"))?.trim().parse().ok()
}

fn command_of(pid: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|c| c.trim().to_owned())
}

/// The device and its partitions: name and "major:minor".
fn parts(index: u32) -> Vec<(String, String)> {
    let name = format!("nbd{index}");
    let dir = PathBuf::from(format!("/sys/block/{name}"));
    let number = |dir: &Path| fs::read_to_string(dir.join("dev")).ok().map(|t| t.trim().to_owned());
    let mut parts: Vec<(String, String)> = number(&dir).map(|n| (name.clone(), n)).into_iter().collect();
    for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
        let part = entry.file_name().to_string_lossy().into_owned();
        if part.starts_with(&format!("{name}p"))
            && let Some(number) = number(&entry.path())
        {
            parts.push((part, number));
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        for (path, index) in [("/dev/nbd0", 0), ("nbd15", 15), ("/dev/nbd123456", 123_456)] {
            assert_eq!(index_of(path), Some(index), "{path}");
        }
        for path in [
            "",
            "/dev/",
            "/dev/nbd",
            "/dev/nbd1p2",
            "/dev/nbd01",
            "/dev/sda",
            "nbd-1",
            "/dev/nbd99999999999",
            "/dev/null",
        ] {
            assert_eq!(index_of(path), None, "{path}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_has_no_state_and_no_users() {
        assert_eq!(state(4_000_000_000), None);
        assert!(maker(4_000_000_000).is_none() && openers(4_000_000_000).is_empty());
    }
}
