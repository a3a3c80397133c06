//! Device names and access rights (`rnbd-srv.c`, `process_msg_open`, `rnbd_srv_get_full_path`,
//! `rnbd_srv_check_update_open_perm`).

use std::collections::BTreeMap;
use std::fmt;

use crate::errno::Errno;
use crate::wire::MsgOpen;

/// Paths have fewer bytes than this (`PATH_MAX`).
pub const PATH_MAX: usize = 4096;
/// Stands for the session name in a search path.
pub const SESSNAME: &str = "%SESSNAME%";

/// What an open wants to do, and lets others do meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessMode {
    /// Read; always possible, and in nobody's way.
    ReadOnly,
    /// Read and write, as the only writer.
    ReadWrite,
    /// Read and write beside one other writer, while a virtual machine moves from one host to another.
    Migration,
}

impl AccessMode {
    /// From [`MsgOpen::access_mode`].
    pub const fn from_wire(mode: u8) -> Option<AccessMode> {
        match mode {
            0 => Some(AccessMode::ReadOnly),
            1 => Some(AccessMode::ReadWrite),
            2 => Some(AccessMode::Migration),
            _ => None,
        }
    }

    /// For [`MsgOpen::access_mode`].
    pub const fn to_wire(self) -> u8 {
        match self {
            AccessMode::ReadOnly => 0,
            AccessMode::ReadWrite => 1,
            AccessMode::Migration => 2,
        }
    }

    /// It may change the device.
    pub const fn writes(self) -> bool {
        !matches!(self, AccessMode::ReadOnly)
    }
}

impl fmt::Display for AccessMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AccessMode::ReadOnly => "ro",
            AccessMode::ReadWrite => "rw",
            AccessMode::Migration => "migration",
        })
    }
}

/// May `mode` join `writers` other writers of the device, over all sessions?
///
/// # Errors
/// EPERM, as the kernel server.
pub const fn check_access(writers: u32, mode: AccessMode) -> Result<(), Errno> {
    match mode {
        AccessMode::ReadOnly => Ok(()),
        AccessMode::ReadWrite if writers == 0 => Ok(()),
        AccessMode::Migration if writers < 2 => Ok(()),
        AccessMode::ReadWrite | AccessMode::Migration => Err(Errno::EPERM),
    }
}

/// Writers of each device over all sessions. `K` names a device by what it is, not by the path it was opened with.
/// Holds one entry per device that has a writer.
#[derive(Debug)]
pub struct AccessTable<K> {
    writers: BTreeMap<K, u32>,
}

impl<K: Ord + Clone> AccessTable<K> {
    /// Nothing is open.
    pub const fn new() -> AccessTable<K> {
        AccessTable { writers: BTreeMap::new() }
    }

    /// Counts an open of `device`. Pair it with [`AccessTable::release`].
    ///
    /// # Errors
    /// EPERM; see [`check_access`]. Nothing is counted.
    pub fn acquire(&mut self, device: &K, mode: AccessMode) -> Result<(), Errno> {
        check_access(self.writers(device), mode)?;
        if mode.writes() {
            *self.writers.entry(device.clone()).or_insert(0) += 1;
        }
        Ok(())
    }

    /// Takes an open of `device` back.
    pub fn release(&mut self, device: &K, mode: AccessMode) {
        if !mode.writes() {
            return;
        }
        if let Some(writers) = self.writers.get_mut(device) {
            *writers -= 1;
            if *writers == 0 {
                self.writers.remove(device);
            }
        }
    }

    /// Writers of `device` now.
    pub fn writers(&self, device: &K) -> u32 {
        self.writers.get(device).copied().unwrap_or(0)
    }
}

impl<K: Ord + Clone> Default for AccessTable<K> {
    fn default() -> AccessTable<K> {
        AccessTable::new()
    }
}

/// Why a device is not opened; found before anyone looks for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadOpen {
    /// No NUL among the 255 bytes.
    #[error("device name is not NUL-terminated")]
    Unterminated,
    /// Stricter than the kernel, because names are JSON strings in the RPC.
    #[error("device name {0:?} must be UTF-8")]
    NotUtf8(Box<[u8]>),
    /// Nothing to look for.
    #[error("device name is empty")]
    Empty,
    /// It might leave the search path. The kernel refuses these two dots anywhere in a name.
    #[error("device name {0:?} contains \"..\"")]
    DotDot(Box<str>),
    /// Not below PATH_MAX together with the search path.
    #[error("path of {0} bytes is too long: at most 4095")]
    PathTooLong(usize),
    /// None of the three.
    #[error("access mode {0} is none of 0 (ro), 1 (rw), 2 (migration)")]
    AccessMode(u8),
    /// Limit of the server.
    #[error("session has {0} devices open, which is the limit")]
    TooMany(usize),
}

impl BadOpen {
    /// What to answer.
    pub const fn errno(&self) -> Errno {
        match self {
            BadOpen::TooMany(_) => Errno::ENOMEM,
            _ => Errno::EINVAL,
        }
    }
}

/// Reads the device name of an OPEN.
///
/// # Errors
/// [`BadOpen::Unterminated`], [`BadOpen::NotUtf8`].
pub fn device_name(msg: &MsgOpen) -> Result<&str, BadOpen> {
    let name = msg.name().ok_or(BadOpen::Unterminated)?;
    std::str::from_utf8(name).map_err(|_| BadOpen::NotUtf8(name.into()))
}

/// Where device names are looked up: the server's `dev_search_path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SearchPath(Box<str>);

impl SearchPath {
    /// `path`: may contain [`SESSNAME`], after which nothing counts. One trailing newline is removed.
    ///
    /// # Errors
    /// [`BadOpen::PathTooLong`] from 4096 bytes on.
    pub fn new(path: &str) -> Result<SearchPath, BadOpen> {
        let path = path.strip_suffix('\n').unwrap_or(path);
        if path.len() >= PATH_MAX {
            return Err(BadOpen::PathTooLong(path.len()));
        }
        Ok(SearchPath(path.into()))
    }

    /// As given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What lies before every device name in a session called `sessname`, slashes collapsed, ending in one. A full
    /// path without this prefix is its device name.
    pub fn prefix(&self, sessname: &str) -> String {
        collapse_slashes(&self.raw_prefix(sessname))
    }

    /// What all prefixes begin with: what lies before [`SESSNAME`], slashes collapsed, ending in one.
    pub fn common(&self) -> String {
        let before = self.0.split_once(SESSNAME).map_or(&*self.0, |(before, _)| before);
        collapse_slashes(&format!("{before}/"))
    }

    /// Sessions have paths of their own.
    pub fn by_session(&self) -> bool {
        self.0.contains(SESSNAME)
    }

    /// The path of `dev_name` for the session called `sessname`, put together as the kernel does.
    ///
    /// # Errors
    /// [`BadOpen::Empty`], [`BadOpen::DotDot`], [`BadOpen::PathTooLong`].
    pub fn full_path(&self, sessname: &str, dev_name: &str) -> Result<String, BadOpen> {
        if dev_name.is_empty() {
            return Err(BadOpen::Empty);
        }
        if self.0.len() + dev_name.len() >= PATH_MAX {
            return Err(BadOpen::PathTooLong(self.0.len() + dev_name.len()));
        }
        if dev_name.contains("..") {
            return Err(BadOpen::DotDot(dev_name.into()));
        }
        let path = self.raw_prefix(sessname) + dev_name;
        if path.len() >= PATH_MAX {
            return Err(BadOpen::PathTooLong(path.len()));
        }
        Ok(collapse_slashes(&path))
    }

    fn raw_prefix(&self, sessname: &str) -> String {
        match self.0.split_once(SESSNAME) {
            Some((before, _)) => format!("{before}/{sessname}/"),
            None => format!("{}/", self.0),
        }
    }
}

impl Default for SearchPath {
    fn default() -> SearchPath {
        SearchPath("/".into())
    }
}

impl fmt::Display for SearchPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn collapse_slashes(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !out.ends_with('/') {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(search: &str, name: &str) -> Result<String, BadOpen> {
        SearchPath::new(search).unwrap().full_path("s1", name)
    }

    #[test]
    fn full_paths_as_the_kernel_builds_them() {
        assert_eq!(full("/", "dev/ram0").unwrap(), "/dev/ram0");
        assert_eq!(full("/", "/dev//ram0").unwrap(), "/dev/ram0");
        assert_eq!(full("/srv/", "a").unwrap(), "/srv/a");
        assert_eq!(full("", "a").unwrap(), "/a");
        assert_eq!(full("/srv/%SESSNAME%/", "a").unwrap(), "/srv/s1/a");
        assert_eq!(full("/srv/x%SESSNAME%", "a").unwrap(), "/srv/x/s1/a");
    }

    #[test]
    fn text_after_the_session_name_is_discarded() {
        assert_eq!(full("/srv/%SESSNAME%/more/%SESSNAME%", "a").unwrap(), "/srv/s1/a");
    }

    #[test]
    fn the_prefix_is_what_full_paths_begin_with() {
        for search in ["/", "", "//srv//", "/srv/%SESSNAME%/x"] {
            let search = SearchPath::new(search).unwrap();
            let path = search.full_path("s1", "a/b").unwrap();
            assert_eq!(path.strip_prefix(&search.prefix("s1")), Some("a/b"));
            assert!(path.starts_with(&search.common()) && search.common().ends_with('/'));
            assert_eq!(search.by_session(), search.prefix("s1") != search.common());
        }
    }

    #[test]
    fn names_that_are_refused() {
        for name in ["..", "../a", "a/../b", "a..b"] {
            assert_eq!(full("/", name), Err(BadOpen::DotDot(name.into())));
        }
        assert_eq!(full("/", ""), Err(BadOpen::Empty));
        assert!(full("/", "a.b/.c").is_ok());
    }

    #[test]
    fn lengths_are_checked_before_slashes_collapse() {
        let long = "/".repeat(4094);
        assert_eq!(full(&long, "ab"), Err(BadOpen::PathTooLong(4096)));
        assert_eq!(full(&long, "a"), Err(BadOpen::PathTooLong(4096)), "with the slash between");
        assert_eq!(full(&long[1..], "a").unwrap(), "/a");
        assert_eq!(SearchPath::new(&"x".repeat(4096)), Err(BadOpen::PathTooLong(4096)));
        assert_eq!(SearchPath::new("/srv\n").unwrap().as_str(), "/srv");
    }

    #[test]
    fn names_on_the_wire() {
        let msg = MsgOpen::request(0, "dev/ram0".as_bytes()).unwrap();
        assert_eq!(device_name(&msg), Ok("dev/ram0"));
        let mut bad = msg;
        bad.dev_name.fill(b'x');
        assert_eq!(device_name(&bad), Err(BadOpen::Unterminated));
        bad.dev_name[1] = 0;
        bad.dev_name[0] = 0xff;
        assert_eq!(device_name(&bad), Err(BadOpen::NotUtf8([0xff].into())));
    }

    #[test]
    fn access_rules() {
        use AccessMode::{Migration, ReadOnly, ReadWrite};
        let allowed = |writers, mode| check_access(writers, mode).is_ok();
        assert_eq!([0, 1, 2, 3].map(|w| allowed(w, ReadOnly)), [true; 4]);
        assert_eq!([0, 1, 2].map(|w| allowed(w, ReadWrite)), [true, false, false]);
        assert_eq!([0, 1, 2].map(|w| allowed(w, Migration)), [true, true, false]);
        assert_eq!(check_access(1, ReadWrite), Err(Errno::EPERM));
        for mode in 0..=2 {
            assert_eq!(AccessMode::from_wire(mode).unwrap().to_wire(), mode);
        }
        assert_eq!(AccessMode::from_wire(3), None);
    }

    #[test]
    fn writers_are_counted_and_released() {
        let mut t = AccessTable::new();
        t.acquire(&"d", AccessMode::ReadWrite).unwrap();
        t.acquire(&"d", AccessMode::ReadOnly).unwrap();
        t.acquire(&"d", AccessMode::Migration).unwrap();
        assert_eq!(t.acquire(&"d", AccessMode::Migration), Err(Errno::EPERM));
        assert_eq!(t.writers(&"d"), 2);
        t.release(&"d", AccessMode::ReadOnly);
        t.release(&"d", AccessMode::ReadWrite);
        assert_eq!(t.acquire(&"d", AccessMode::ReadWrite), Err(Errno::EPERM));
        t.release(&"d", AccessMode::Migration);
        assert_eq!(t.writers(&"d"), 0);
        t.acquire(&"d", AccessMode::ReadWrite).unwrap();
        t.acquire(&"e", AccessMode::ReadWrite).unwrap();
    }
}
