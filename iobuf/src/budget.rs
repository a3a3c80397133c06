//! How much memory this process may have.

use std::path::{Path, PathBuf};

/// Bytes of memory that this process may use: what the machine has, or less if a control group of the process says so
/// (`memory.max` of cgroup v2, as containers and systemd's `MemoryMax` set it).
pub fn usable_memory() -> u64 {
    let info = rustix::system::sysinfo();
    let machine = info.totalram.saturating_mul(u64::from(info.mem_unit));
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    limit_of(Path::new("/sys/fs/cgroup"), &own).map_or(machine, |limit| limit.min(machine))
}

/// Gives memory that has been freed back to the system, which the allocator would keep for later. Takes milliseconds
/// where much was freed: after a burst, on a thread that has time. Does nothing where the C library is not glibc.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks, and touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The lowest `memory.max` from the control group in `own`, as `/proc/self/cgroup` tells it, up to `root`.
fn limit_of(root: &Path, own: &str) -> Option<u64> {
    let group = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut dir: PathBuf = root.join(group);
    let mut lowest = None;
    while dir.starts_with(root) {
        let limit = std::fs::read_to_string(dir.join("memory.max")).ok();
        // "max" is no number.
        let limit = limit.and_then(|text| text.trim().parse::<u64>().ok());
        lowest = [lowest, limit].into_iter().flatten().min();
        if !dir.pop() {
            break;
        }
    }
    lowest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_memory() {
        assert!(usable_memory() > 1 << 20);
    }

    #[test]
    fn the_lowest_limit_on_the_way_up_holds() {
        let root = std::env::temp_dir().join(format!("iobuf-budget-{}", std::process::id()));
        let group = root.join("a/b");
        std::fs::create_dir_all(&group).unwrap();
        let set = |dir: &Path, text: &str| std::fs::write(dir.join("memory.max"), text).unwrap();
        assert_eq!(limit_of(&root, "0::/a/b\n"), None);
        set(&group, "max\n");
        set(&root.join("a"), "1000\n");
        assert_eq!(limit_of(&root, "1:name=systemd:/x\n0::/a/b\n"), Some(1000));
        set(&group, "500\n");
        assert_eq!(limit_of(&root, "0::/a/b\n"), Some(500));
        assert_eq!(limit_of(&root, "0::/\n"), None);
        assert_eq!(limit_of(&root, ""), None);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
