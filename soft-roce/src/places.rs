//! Directories in which the programs of one user find each other, and nobody else can put anything.
//!
//! | user | directories |
//! |---|---|
//! | root | `/run/rnbd`; if that is not root's, `/tmp/rnbd-0` |
//! | others | all that are theirs of `$RUNTIME_DIRECTORY` (a service's, systemd.exec(5)), `/run/rnbd-UID` (made by `--user`), `/run/user/UID/rnbd` (there while the user is logged in), `/tmp/rnbd-UID` |
//!
//! One is used only if it belongs to the user and nobody else may write to it. In each there is one for the network namespace,
//! since the addresses in the names are those of the namespace.

use std::fmt::Write as _;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, Stat, fstat, mkdirat, openat, stat};
use rustix::io::Errno;

/// A directory that is ours.
pub struct Place {
    path: PathBuf,
    dir: OwnedFd,
}

/// Keeps other programs from making names until it is dropped.
pub struct Locked<'a>(&'a Place);

/// Why a directory is not used.
enum Refusal {
    /// It is not there and cannot be made, or not looked at.
    System(Errno),
    /// It belongs to somebody else.
    Owner(u32),
    /// Others may write to it.
    Mode(u32),
}

impl Place {
    /// Directories to make names in, all of which count; made if need be.
    ///
    /// # Errors
    /// There is none, in words that name each, its owner and mode.
    pub fn all() -> io::Result<Vec<Self>> {
        let uid = rustix::process::geteuid().as_raw();
        let own = format!("/tmp/rnbd-{uid}");
        if uid == 0 {
            return Self::among(&["/run/rnbd".into(), own.into()], uid);
        }
        let service = std::env::var("RUNTIME_DIRECTORY").unwrap_or_default();
        let service = service.split(':').filter(|path| path.starts_with('/')).map(PathBuf::from);
        let others = [format!("/run/rnbd-{uid}"), format!("/run/user/{uid}/rnbd"), own].map(PathBuf::from);
        let candidates: Vec<PathBuf> = service.chain(others).collect();
        Self::among(&candidates, uid)
    }

    /// As [`Place::all`], of `candidates`. Root takes the first.
    pub(crate) fn among(candidates: &[PathBuf], uid: u32) -> io::Result<Vec<Self>> {
        let namespace = stat("/proc/self/ns/net").map_or(0, |s| s.st_ino);
        let (mut places, mut why) = (Vec::new(), String::new());
        for base in candidates {
            match open_own(base, 0o755, uid)
                .and_then(|_| Self::open(base.join(format!("roce-{namespace}")), uid))
            {
                Ok(place) => places.push(place),
                Err(refusal) => {
                    let _ = write!(why, "; {}", refusal.text(base));
                }
            }
            if uid == 0 && !places.is_empty() {
                break;
            }
        }
        if places.is_empty() {
            let text = format!("no directory in which programs of user {uid} can find each other{why}");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(places)
    }

    fn open(path: PathBuf, uid: u32) -> Result<Self, Refusal> {
        let dir = open_own(&path, 0o700, uid)?;
        Ok(Self { path, dir })
    }

    /// Where `name` is.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Every name, of living programs and dead ones.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let entries = std::fs::read_dir(&self.path).into_iter().flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
    }

    /// Waits until no other program of this user makes a name, which takes them no time.
    ///
    /// # Errors
    /// As `flock(2)`.
    pub fn lock(&self) -> io::Result<Locked<'_>> {
        rustix::fs::flock(&self.dir, FlockOperation::LockExclusive)?;
        Ok(Locked(self))
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Closing the descriptor would do it, too; it cannot fail for one that is open.
        let _ = rustix::fs::flock(&self.0.dir, FlockOperation::Unlock);
    }
}

/// Opens a directory of `uid`'s, made with `mode` if there is none. Follows no link at its end.
fn open_own(path: &Path, mode: u32, uid: u32) -> Result<OwnedFd, Refusal> {
    match mkdirat(CWD, path, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => {}
        // It may be there all the same, on a file system that is read-only.
        Err(errno) if stat(path).is_err() => return Err(Refusal::System(errno)),
        Err(_) => {}
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(CWD, path, flags, Mode::empty()).map_err(|errno| match owner(path) {
        // Not to be opened because it is somebody else's.
        Some(owner) if owner != uid => Refusal::Owner(owner),
        _ => Refusal::System(errno),
    })?;
    let Stat { st_uid, st_mode, .. } = fstat(&dir).map_err(Refusal::System)?;
    match st_mode & 0o7777 {
        _ if st_uid != uid => Err(Refusal::Owner(st_uid)),
        mode if mode & 0o022 != 0 => Err(Refusal::Mode(mode)),
        _ => Ok(dir),
    }
}

fn owner(path: &Path) -> Option<u32> {
    rustix::fs::lstat(path).ok().map(|s| s.st_uid)
}

impl Refusal {
    fn text(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::System(errno) => format!("{path}: {errno}"),
            Self::Owner(owner) => format!("{path} belongs to user {owner}"),
            Self::Mode(mode) => format!("{path} has mode {mode:o}, which lets others write"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn uid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn why(candidates: &[PathBuf], uid: u32) -> String {
        Place::among(candidates, uid).err().expect("no such directory is used").to_string()
    }

    #[test]
    fn only_what_is_ours_alone_is_used() {
        let dir = test_support::Dir::new("places");
        let fresh = dir.join("fresh");
        let place = &Place::among(std::slice::from_ref(&fresh), uid()).unwrap()[0];
        assert!(place.path.starts_with(&fresh) && place.path.is_dir());
        assert_eq!(std::fs::metadata(&place.path).unwrap().permissions().mode() & 0o777, 0o700);

        // Somebody else's: as if we were another.
        let text = why(std::slice::from_ref(&fresh), uid() + 1);
        assert!(text.contains(&format!("{} belongs to user {}", fresh.display(), uid())), "{text}");
        let open = dir.join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o777)).unwrap();
        assert!(why(std::slice::from_ref(&open), uid()).contains("mode 777"));
        // A link, even to what is ours; a file; nothing that could be made.
        let link = dir.join("link");
        symlink(&fresh, &link).unwrap();
        why(std::slice::from_ref(&link), uid());
        std::fs::write(dir.join("file"), "").unwrap();
        why(&[dir.join("file"), dir.join("none/none")], uid());
        // What is of no use does not matter while something else is.
        assert_eq!(Place::among(&[open, fresh], uid()).unwrap().len(), 1);
    }
}
