//! The name space: which bdev a client's device path means, and who may have it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use engine::{Network, NoNetwork};
use rnbd_proto::errno::Errno;
use rnbd_proto::open::SearchPath;
use serde::{Deserialize, Serialize};

/// Who may open an export. All given parts must match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allow {
    /// Session name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Source address, `10.0.0.7`, or network, `10.0.0.0/24`, `fd00::/8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addr: Option<String>,
}

/// An entry of the export table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// What clients ask for, below `dev_search_path`; without leading slash.
    pub device_path: String,
    /// The bdev behind it.
    pub bdev_name: String,
    /// Nobody may open it for writing.
    pub read_only: bool,
    /// Empty: everybody.
    pub allow: Vec<Allow>,
}

/// Not a valid export.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// Taken.
    #[error("device_path '{0}' is exported already; delete that export first")]
    Exists(String),
    /// Not there.
    #[error("no export with device_path '{0}'; rnbd_get_exports lists those that exist")]
    NotFound(String),
    /// Bad path.
    #[error("device_path '{0}': use 1 to 254 characters without '..', such as disk0 or pool/disk0")]
    Path(String),
    /// Bad allow entry.
    #[error("allow: {0}")]
    Addr(NoNetwork),
    /// Empty allow entry.
    #[error("allow: an entry needs session, addr or both")]
    EmptyAllow,
}

/// What a device path led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A bdev.
    Bdev {
        /// Its name.
        name: String,
        /// The export forbids writing.
        read_only: bool,
    },
    /// A file or block device to be opened as a bdev of this name.
    File(PathBuf),
}

/// Why a client does not get what it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// For the client.
    pub errno: Errno,
    /// For the log.
    pub why: String,
}

/// The export table and the rules around it.
#[derive(Debug, Default)]
pub struct Exports {
    /// Where device paths are looked up.
    pub search_path: SearchPath,
    /// Open files and block devices below the search path.
    pub open_files: bool,
    table: Vec<Export>,
}

impl Exports {
    /// Adds an entry.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn add(&mut self, mut export: Export) -> Result<(), ExportError> {
        let path = normal(&export.device_path);
        if path.is_empty() || path.len() > 254 || path.contains("..") || path.contains('\0') {
            return Err(ExportError::Path(export.device_path));
        }
        if self.table.iter().any(|e| e.device_path == path) {
            return Err(ExportError::Exists(path));
        }
        for allow in &export.allow {
            if allow.session.is_none() && allow.addr.is_none() {
                return Err(ExportError::EmptyAllow);
            }
            if let Some(addr) = &allow.addr {
                addr.parse::<Network>().map_err(ExportError::Addr)?;
            }
        }
        export.device_path = path;
        self.table.push(export);
        Ok(())
    }

    /// Removes an entry; devices that are open stay open.
    ///
    /// # Errors
    /// [`ExportError::NotFound`].
    pub fn remove(&mut self, device_path: &str) -> Result<Export, ExportError> {
        let path = normal(device_path);
        let i = self.table.iter().position(|e| e.device_path == path);
        i.map(|i| self.table.remove(i)).ok_or_else(|| ExportError::NotFound(device_path.into()))
    }

    /// All entries, in order of creation.
    pub fn list(&self) -> &[Export] {
        &self.table
    }

    /// An export's allow list has an address or network that `peer` is in.
    pub fn names(&self, peer: IpAddr) -> bool {
        let networks =
            self.table.iter().flat_map(|e| &e.allow).filter_map(|a| a.addr.as_deref()?.parse().ok());
        networks.into_iter().any(|network: Network| network.has(peer))
    }

    /// Looks a client's device path up. `bdev` gives the own name of the bdev that has a name or alias.
    ///
    /// # Errors
    /// The errno for the client (EINVAL for impossible names, EACCES for those it may not have, ENOENT), and why, for the log.
    pub fn resolve(
        &self,
        sessname: &str,
        peer: IpAddr,
        device_path: &str,
        bdev: impl Fn(&str) -> Option<String>,
    ) -> Result<Found, Refused> {
        let refused = |errno, why: String| Err(Refused { errno, why });
        let full = self
            .search_path
            .full_path(sessname, device_path)
            .map_err(|bad| Refused { errno: bad.errno(), why: bad.to_string() })?;
        let prefix = self.search_path.prefix(sessname);
        let remainder = full.strip_prefix(&prefix).unwrap_or(&full);
        let names = [remainder, full.trim_start_matches('/')];
        if let Some(export) = self.table.iter().find(|e| names.contains(&e.device_path.as_str())) {
            if !allowed(&export.allow, sessname, peer) {
                let entries = export.allow.len();
                let why = format!(
                    "none of the {entries} allow entries of the export fits this session and address"
                );
                return refused(Errno::EACCES, why);
            }
            return Ok(Found::Bdev { name: export.bdev_name.clone(), read_only: export.read_only });
        }
        // Without an export, and by whatever name, only while no export says who may have the bdev.
        let is_exported = |own: &str| {
            self.table.iter().any(|e| e.bdev_name == own || bdev(&e.bdev_name).is_some_and(|n| n == own))
        };
        if let Some(name) = bdev(remainder) {
            if is_exported(&name) {
                let why =
                    format!("bdev {name} is exported, so it is opened by the names of its exports only");
                return refused(Errno::EACCES, why);
            }
            return Ok(Found::Bdev { name, read_only: false });
        }
        if !self.open_files {
            return refused(
                Errno::ENOENT,
                "no export and no bdev has this name, and open_files is off".into(),
            );
        }
        let path = real_path(&prefix, &full)?;
        // The bdev of a file has its path as name.
        if path.to_str().and_then(&bdev).is_some_and(|own| is_exported(&own)) {
            return refused(
                Errno::EACCES,
                "the file is exported, so it is opened by the names of its exports only".into(),
            );
        }
        Ok(Found::File(path))
    }
}

/// The file behind `full` without symbolic links, if it lies below `prefix`. Its path is UTF-8.
fn real_path(prefix: &str, full: &str) -> Result<PathBuf, Refused> {
    let refused = |errno, why: String| Err(Refused { errno, why });
    let io = |e: std::io::Error| {
        let errno = Errno::from_raw(e.raw_os_error().unwrap_or(5)).unwrap_or(Errno::EIO);
        Refused { errno, why: format!("no export and no bdev has this name, and no file: {full}: {e}") }
    };
    let base = Path::new(prefix).canonicalize().map_err(io)?;
    let path = Path::new(full).canonicalize().map_err(io)?;
    if !path.starts_with(&base) {
        return refused(Errno::EACCES, format!("{full} leads out of the search path, to {}", path.display()));
    }
    if path.is_dir() {
        return refused(Errno::ENOTBLK, format!("{full} is a directory"));
    }
    // Its bdev would be named like that of another file.
    if path.to_str().is_none() {
        return refused(
            Errno::EINVAL,
            format!("{full} leads to a name that is not UTF-8: {}", path.display()),
        );
    }
    Ok(path)
}

fn normal(path: &str) -> String {
    path.split('/').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/")
}

fn allowed(allow: &[Allow], sessname: &str, peer: IpAddr) -> bool {
    let matches = |a: &Allow| {
        a.session.as_deref().is_none_or(|s| s == sessname)
            && a.addr.as_deref().is_none_or(|n| n.parse().is_ok_and(|n: Network| n.has(peer)))
    };
    allow.is_empty() || allow.iter().any(matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(path: &str, bdev: &str, allow: Vec<Allow>) -> Export {
        Export { device_path: path.into(), bdev_name: bdev.into(), read_only: false, allow }
    }

    fn exports(path: &str) -> Exports {
        Exports { search_path: SearchPath::new(path).unwrap(), ..Exports::default() }
    }

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 7));

    fn bdev(name: &str) -> Result<Found, Errno> {
        Ok(Found::Bdev { name: name.into(), read_only: false })
    }

    /// Bdevs: one of every name, none, one.
    fn any(name: &str) -> Option<String> {
        Some(name.into())
    }

    fn none(_: &str) -> Option<String> {
        None
    }

    fn only(one: &str) -> impl Fn(&str) -> Option<String> {
        move |name| (name == one).then(|| name.into())
    }

    #[test]
    fn exports_come_before_bdevs() {
        let mut e = exports("/");
        e.add(export("/disks//one", "M0", vec![])).unwrap();
        assert_eq!(e.resolve("s", PEER, "disks/one", any).map_err(|r| r.errno), bdev("M0"));
        assert_eq!(e.resolve("s", PEER, "/disks/one", any).map_err(|r| r.errno), bdev("M0"));
        assert_eq!(e.resolve("s", PEER, "M1", only("M1")).map_err(|r| r.errno), bdev("M1"));
        assert_eq!(e.resolve("s", PEER, "M0", any).map_err(|r| r.errno), Err(Errno::EACCES));
        assert_eq!(e.resolve("s", PEER, "M2", none).map_err(|r| r.errno), Err(Errno::ENOENT));
        assert_eq!(e.resolve("s", PEER, "a/../M1", any).map_err(|r| r.errno), Err(Errno::EINVAL));
    }

    #[test]
    fn session_names_make_own_name_spaces() {
        let mut e = exports("/exports/%SESSNAME%/ignored");
        e.add(export("M7", "B7", vec![])).unwrap();
        assert_eq!(e.resolve("s", PEER, "M1", only("M1")).map_err(|r| r.errno), bdev("M1"));
        assert_eq!(e.resolve("s", PEER, "M7", none).map_err(|r| r.errno), bdev("B7"));
        e.add(export("exports/alice/own", "B8", vec![])).unwrap();
        assert_eq!(e.resolve("alice", PEER, "own", none).map_err(|r| r.errno), bdev("B8"));
        assert_eq!(e.resolve("bob", PEER, "own", none).map_err(|r| r.errno), Err(Errno::ENOENT));
    }

    /// Of a bdev with the name `own` and an alias, `alias`.
    #[test]
    fn an_export_is_about_a_bdev_by_all_of_its_names() {
        let find = |name: &str| ["own", "store/alias"].contains(&name).then(|| "own".to_owned());
        for exported in ["own", "store/alias"] {
            let mut e = exports("/");
            let alice = Allow { session: Some("alice".into()), addr: None };
            e.add(export("d", exported, vec![alice])).unwrap();
            assert_eq!(e.resolve("alice", PEER, "d", find).map_err(|r| r.errno), bdev(exported));
            for asked in ["d", "own", "store/alias"] {
                assert_eq!(
                    e.resolve("bob", PEER, asked, find).map_err(|r| r.errno),
                    Err(Errno::EACCES),
                    "{asked} of {exported}"
                );
            }
        }
        assert_eq!(exports("/").resolve("bob", PEER, "store/alias", find).map_err(|r| r.errno), bdev("own"));
    }

    #[test]
    fn allow_lists() {
        let allow = |session: Option<&str>, addr: Option<&str>| Allow {
            session: session.map(Into::into),
            addr: addr.map(Into::into),
        };
        let mut e = exports("/");
        e.add(export("d", "M0", vec![allow(Some("alice"), Some("10.0.0.0/24")), allow(Some("bob"), None)]))
            .unwrap();
        let ask = |s: &str, a: &str| e.resolve(s, a.parse().unwrap(), "d", any).is_ok();
        assert!(ask("alice", "10.0.0.7") && ask("alice", "::ffff:10.0.0.7") && ask("bob", "192.0.2.1"));
        assert!(!ask("alice", "10.0.1.7") && !ask("eve", "10.0.0.7") && !ask("alice", "fd00::1"));
        let refused = e.resolve("eve", PEER, "d", any).unwrap_err();
        assert!(refused.why.contains("none of the 2 allow entries"), "{refused:?}");
        assert_eq!(e.add(export("x", "M", vec![allow(None, None)])), Err(ExportError::EmptyAllow));
        assert!(matches!(
            e.add(export("x", "M", vec![allow(None, Some("10.0.0.0/33"))])),
            Err(ExportError::Addr(_))
        ));
    }

    #[test]
    fn files_stay_below_the_search_path() {
        use std::os::unix::ffi::OsStrExt;
        let dir = std::env::temp_dir().join(format!("rnbd-export-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("in")).unwrap();
        std::fs::write(dir.join("in/disk"), b"x").unwrap();
        std::fs::write(dir.join("secret"), b"x").unwrap();
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, dir.join("in").join(name)).unwrap();
        link("../secret", "out");
        link("disk", "alias");
        let mut e = exports(dir.join("in").to_str().unwrap());
        e.open_files = true;
        let real = dir.canonicalize().unwrap().join("in/disk");
        let ask = |name: &str| e.resolve("s", PEER, name, none).map_err(|r| r.errno);
        assert_eq!(ask("disk"), Ok(Found::File(real.clone())));
        assert_eq!(ask("alias"), Ok(Found::File(real.clone())));
        assert_eq!(ask("out"), Err(Errno::EACCES));
        assert_eq!(ask("gone"), Err(Errno::ENOENT));
        assert_eq!(ask("../secret"), Err(Errno::EINVAL));
        // A file that is served as a bdev already, which is exported.
        let path = real.to_str().unwrap().to_owned();
        e.add(export("d", &path, vec![Allow { session: Some("alice".into()), addr: None }])).unwrap();
        assert_eq!(e.resolve("s", PEER, "disk", only(&path)).map_err(|r| r.errno), Err(Errno::EACCES));
        // Names that are not UTF-8 look alike.
        let odd = dir.join("in").join(std::ffi::OsStr::from_bytes(b"d\xff"));
        std::fs::write(&odd, b"x").unwrap();
        std::os::unix::fs::symlink(&odd, dir.join("in/odd")).unwrap();
        assert_eq!(e.resolve("s", PEER, "odd", none).map_err(|r| r.errno), Err(Errno::EINVAL));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
