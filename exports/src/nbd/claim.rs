//! Who made a kernel device, for the case that its maker dies: a locked file per device in /run.
//!
//! The kernel keeps a device whose maker was killed, with dead sockets, for its dead-connection timeout. A later run of
//! the program may give it new ones, but only if the device was this program's, of the same bdev, and nobody serves it:
//! the lock says whether the maker lives, the kernel's backend identifier (Linux 5.14) whose the device is. Where the
//! kernel has no such identifier, what the file says must agree with the kernel's pid of the maker.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nbd_poll::kernel::sysfs::State;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::bridge;

/// Where the files are: cleared at boot, like the devices.
pub(super) const RUN_DIR: &str = "/run/rnbd";

/// What is known of a device's maker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The program's process.
    pub pid: u32,
    /// As /sys/block/nbdN/pid has it.
    pub kernel_pid: Option<u32>,
    pub bdev_name: String,
    /// Sockets that the device was made with.
    pub connections: usize,
}

/// The right to a device, while it is held.
#[derive(Debug)]
pub(super) struct Claim {
    file: File,
    path: PathBuf,
    /// Of the former holder, who did not end in order.
    pub former: Option<Record>,
}

/// Why a device cannot be claimed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClaimError {
    /// Its maker lives.
    #[error("it belongs to process {}", .0.map_or("of another name space".to_owned(), |p| p.to_string()))]
    Held(Option<u32>),
    /// No file.
    #[error("cannot lock {path}: {source}")]
    System { path: String, source: io::Error },
}

/// Claims device `index`.
pub(super) fn claim(dir: &Path, index: u32) -> Result<Claim, ClaimError> {
    let path = dir.join(format!("nbd{index}"));
    let system = |source: io::Error| ClaimError::System { path: path.display().to_string(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(system)?;
    // Whoever can write there could have another file written to in its stead.
    let owner = fs::metadata(dir).map_err(system)?.uid();
    if owner != rustix::process::geteuid().as_raw() {
        let text = format!("{} belongs to user {owner}; it should be ours", dir.display());
        return Err(system(io::Error::new(io::ErrorKind::PermissionDenied, text)));
    }
    loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
        let mut file = options.open(&path).map_err(system)?;
        let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
        // Its holder may have removed the file between the two calls; then the lock is worth nothing.
        let same = |file: &File| {
            let inode = |m: io::Result<fs::Metadata>| m.ok().map(|m| m.ino());
            inode(file.metadata()) == inode(fs::metadata(&path))
        };
        let record = read(&mut file);
        match locked {
            Ok(()) if same(&file) => return Ok(Claim { file, path: path.clone(), former: record }),
            Ok(()) => {}
            Err(rustix::io::Errno::AGAIN) => return Err(ClaimError::Held(record.map(|r| r.pid))),
            Err(e) => return Err(system(e.into())),
        }
    }
}

/// `None`: nothing, or nothing that makes sense.
fn read(file: &mut File) -> Option<Record> {
    let mut text = String::new();
    file.take(4096).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

impl Claim {
    /// Writes down whose the device is now.
    pub(super) fn record(&mut self, record: &Record) {
        let text = serde_json::to_string(record).unwrap_or_default();
        let written = self.file.set_len(0).and_then(|()| self.file.rewind());
        if let Err(error) = written.and_then(|()| self.file.write_all(text.as_bytes())) {
            // Only a device without a backend identifier needs it.
            tracing::warn!(path = %self.path.display(), %error, "cannot write down who serves an NBD device");
        }
    }

    /// The device is free: nobody need know that it was ours.
    pub(super) fn give_up(self) {
        // While locked, so that nobody can hold the file that goes.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether a device that is there was made for `bdev` by an earlier run of `program`.
///
/// # Errors
/// Whose it is instead, in words.
pub(super) fn judge(
    device: &State,
    former: Option<&Record>,
    program: &str,
    bdev: &str,
) -> Result<(), String> {
    let of_other = |name: &str| {
        format!(
            "is left over from an earlier run and was bdev {name}; start that one on it, or disconnect it"
        )
    };
    match (&device.backend, former) {
        (Some(backend), _) => match bridge::bdev_of(program, backend) {
            Some(name) if name == bdev => Ok(()),
            Some(name) => Err(of_other(name)),
            None => Err(format!("belongs to somebody else (backend \"{backend}\")")),
        },
        (None, Some(record)) if record.kernel_pid.is_some() && record.kernel_pid == device.pid => {
            if record.bdev_name == bdev { Ok(()) } else { Err(of_other(&record.bdev_name)) }
        }
        (None, _) => Err("belongs to somebody else".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("nbd-claim-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    fn record(kernel_pid: Option<u32>) -> Record {
        Record { pid: 77, kernel_pid, bdev_name: "B0".into(), connections: 1 }
    }

    #[test]
    fn one_holder_at_a_time_and_what_a_dead_one_leaves() {
        let dir = dir("holders");
        let mut first = claim(&dir, 3).unwrap();
        assert_eq!(first.former, None);
        first.record(&record(Some(5)));
        assert!(matches!(claim(&dir, 3), Err(ClaimError::Held(Some(77)))));
        assert!(claim(&dir, 4).unwrap().former.is_none());
        // The holder dies.
        drop(first);
        let second = claim(&dir, 3).unwrap();
        assert_eq!(second.former, Some(record(Some(5))));
        second.give_up();
        assert_eq!(claim(&dir, 3).unwrap().former, None);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn nonsense_in_the_file_is_no_record() {
        let dir = dir("nonsense");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("nbd0"), "{\"pid\":").unwrap();
        assert_eq!(claim(&dir, 0).unwrap().former, None);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn only_our_own_devices_of_the_same_bdev() {
        let device = |backend: Option<&str>, pid| State {
            backend: backend.map(str::to_owned),
            pid,
            size: 512,
            ..State::default()
        };
        let ours = bridge::backend("p", "B0");
        assert_eq!(judge(&device(Some(&ours), Some(1)), None, "p", "B0"), Ok(()));
        for (backend, bdev) in [(Some(&*ours), "B1"), (Some("image"), "B0"), (None, "B0")] {
            assert!(judge(&device(backend, Some(1)), None, "p", bdev).is_err(), "{backend:?}");
        }
        // Without an identifier the record must fit the kernel's pid.
        assert_eq!(judge(&device(None, Some(5)), Some(&record(Some(5))), "p", "B0"), Ok(()));
        for (pid, kernel_pid, bdev) in
            [(Some(5), Some(6), "B0"), (None, None, "B0"), (Some(5), Some(5), "B1")]
        {
            assert!(judge(&device(None, pid), Some(&record(kernel_pid)), "p", bdev).is_err());
        }
        // A foreign identifier wins over a record.
        assert!(judge(&device(Some("image"), Some(5)), Some(&record(Some(5))), "p", "B0").is_err());
    }
}
