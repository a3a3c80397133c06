//! Files and block devices below the search path, for `open_files`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bdev::uring::FileId;
use rnbd_proto::errno::Errno;
use rnbd_proto::open::SearchPath;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::names::{Refused, refused};

/// Why files of this search path are not opened, in words: what would be right.
pub fn problem(search: &SearchPath) -> Option<String> {
    let common = search.common();
    let is_root = || Path::new(&common).canonicalize().is_ok_and(|path| path == Path::new("/"));
    let why = match common.as_str() {
        "/" => "which would offer every file of this host",
        path if !path.starts_with('/') => "which is not absolute",
        path if path.split('/').any(|part| part == "..") => "which has '..' in it",
        _ if is_root() => "which leads to /, and so to every file of this host",
        _ => return None,
    };
    Some(format!(
        "open_files needs a dev_search_path that begins with a directory of its own, as /srv/rnbd or \
         /srv/rnbd/%SESSNAME%; it is '{search}', {why}"
    ))
}

/// The file behind `full`, a path of `session`, without symbolic links, and what it is now. Its path is UTF-8.
pub(super) fn find(search: &SearchPath, session: &str, full: &str) -> Result<(PathBuf, FileId), Refused> {
    if let Some(problem) = problem(search) {
        return refused(Errno::EACCES, problem);
    }
    let (base, path) = real(search, session, full)?;
    let fd = open(&base, &path).map_err(|e| io(full, &e.into()))?;
    match FileId::of(&fd) {
        Ok(Some(id)) => Ok((path, id)),
        Ok(None) if path.is_dir() => refused(Errno::ENOTBLK, format!("{full} is a directory")),
        Ok(None) => refused(Errno::ENOTBLK, format!("{full} is neither a block device nor a regular file")),
        Err(e) => Err(io(full, &e.into())),
    }
}

fn io(full: &str, e: &std::io::Error) -> Refused {
    let errno = Errno::from_raw(e.raw_os_error().unwrap_or(5)).unwrap_or(Errno::EIO);
    Refused { errno, why: format!("no export has this name, and no file: {full}: {e}") }
}

/// The search path of `session` and the path, without symbolic links.
fn real(search: &SearchPath, session: &str, full: &str) -> Result<(PathBuf, PathBuf), Refused> {
    let canonical = |path: &str| Path::new(path).canonicalize().map_err(|e| io(full, &e));
    let common = canonical(&search.common())?;
    let (base, path) = (canonical(&search.prefix(session))?, canonical(full)?);
    // A session's directory may be a link, too.
    if !base.starts_with(&common) || !path.starts_with(&base) {
        let why = format!("{full} leads out of the search path, to {}", path.display());
        return refused(Errno::EACCES, why);
    }
    // Its bdev would be named like that of another file.
    if path.to_str().is_none() {
        let why = format!("{full} leads to a name that is not UTF-8: {}", path.display());
        return refused(Errno::EINVAL, why);
    }
    Ok((base, path))
}

/// Finds the file without opening it: a pipe would wait for somebody at its other end. A link that has come into the path since
/// it was looked at is refused.
fn open(base: &Path, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let below = path.strip_prefix(base).ok().filter(|below| !below.as_os_str().is_empty());
    let base = rustix::fs::open(base, flags, Mode::empty())?;
    // The search path itself.
    let Some(below) = below else { return Ok(base) };
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match rustix::fs::openat2(&base, below, flags, Mode::empty(), beneath) {
        // Before Linux 5.6.
        Err(rustix::io::Errno::NOSYS) => rustix::fs::openat(&base, below, flags, Mode::empty()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_nobodys_disk() {
        let problem = |path: &str| problem(&SearchPath::new(path).unwrap());
        let dir = test_support::Dir::new("files");
        let link = dir.join("root");
        std::os::unix::fs::symlink("/", &link).unwrap();
        for bad in
            ["", "/", "//", "/%SESSNAME%", "/%SESSNAME%/x", "/./", "srv", "/srv/../", link.to_str().unwrap()]
        {
            assert!(problem(bad).is_some(), "{bad}");
        }
        for good in ["/srv/rnbd", "/srv/rnbd/%SESSNAME%/", "/nowhere/at/all", dir.path().to_str().unwrap()] {
            assert_eq!(problem(good), None, "{good}");
        }
    }
}
