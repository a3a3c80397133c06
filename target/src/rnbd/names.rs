//! Which bdev or file a client's device path means.
//!
//! `dev_search_path` and the path make one path, which is looked up in order:
//! 1. in the export table, whose `allow` and `read_only` then decide;
//! 2. among the bdevs, by what is below the search path, if those are offered: with `offer_bdevs`, or as long as nobody
//!    has exported anything at all. Never one that an export, a layer or a module uses, or that is built on such a one;
//! 3. with `open_files`, among the files and block devices below the search path, but for those that are bdevs already.
//!
//! Bdevs and files are told apart by what they are, not by what they are called.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use bdev::uring::FileId;
use rnbd_proto::errno::Errno;

use super::export::{Allow, Export, Exports, allowed};
use super::files;

/// What a device path led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A bdev.
    Bdev {
        /// Its name, or an alias.
        name: String,
        /// Writing is forbidden.
        read_only: bool,
        /// Why the client may have it.
        by: By,
    },
    /// A file or block device to be opened as a bdev of this name.
    File(File),
}

/// A file or block device below the search path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Without symbolic links; UTF-8.
    pub path: PathBuf,
    /// What was there.
    pub id: FileId,
    /// Writing is forbidden.
    pub read_only: bool,
}

/// By which of the rules a client may have a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// It is exported.
    Export {
        /// Under this path.
        device_path: String,
        /// To these; a path from elsewhere may not join a session that has it open. Empty: to everybody.
        allow: Arc<[Allow]>,
    },
    /// Its name was said while bdevs are offered.
    Name,
    /// It is a file below the search path.
    File,
}

impl By {
    /// For listings.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Export { .. } => "export",
            Self::Name => "bdev_name",
            Self::File => "file",
        }
    }
}

/// Why a client does not get what it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// For the client.
    pub errno: Errno,
    /// For the log.
    pub why: String,
}

pub(super) fn refused<T>(errno: Errno, why: impl Into<String>) -> Result<T, Refused> {
    Err(Refused { errno, why: why.into() })
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Asking<'a> {
    /// Session name.
    pub session: &'a str,
    /// Addresses from which the session's paths come, all of which must be welcome.
    pub peers: &'a [IpAddr],
}

/// What the name space has to know of the bdevs. Of a function that gives the own name of the bdev with a name or alias, none
/// is used or built on another, and nothing is exported by others.
pub trait Bdevs {
    /// The own name of the bdev that has this name or alias.
    fn own_name(&self, name: &str) -> Option<String>;

    /// Who uses the bdev of this own name, so that it must not be had by saying its name.
    fn used_by(&self, _own: &str) -> Option<String> {
        None
    }

    /// The bdevs that it is built on, or that have the same file.
    fn bases(&self, _own: &str) -> Vec<String> {
        Vec::new()
    }

    /// Somebody has exported something, whoever and to whomever.
    fn was_exported(&self) -> bool {
        false
    }

    /// The bdev that has this file, unless it was made for clients who asked for the file.
    fn on_file(&self, _file: FileId) -> Option<String> {
        None
    }
}

impl<F: Fn(&str) -> Option<String>> Bdevs for F {
    fn own_name(&self, name: &str) -> Option<String> {
        self(name)
    }
}

impl Exports {
    /// Looks a client's device path up.
    ///
    /// # Errors
    /// The errno for the client (EINVAL for impossible names, EACCES for those it may not have, ENOENT), and why, for the log.
    pub fn resolve(
        &self,
        bdevs: &impl Bdevs,
        asking: Asking<'_>,
        device_path: &str,
    ) -> Result<Found, Refused> {
        let full = self
            .search_path
            .full_path(asking.session, device_path)
            .map_err(|bad| Refused { errno: bad.errno(), why: bad.to_string() })?;
        let prefix = self.search_path.prefix(asking.session);
        let remainder = full.strip_prefix(&prefix).unwrap_or(&full);
        if let Some(export) = self.table.iter().find(|e| self.means(e, &full, remainder)) {
            return exported(export, asking);
        }
        let mut why = "no export has this name".to_owned();
        if let Some(own) = bdevs.own_name(remainder) {
            if self.offers_bdevs(bdevs) {
                return self.by_name(bdevs, own);
            }
            why = format!(
                "no export has this name; bdev {own} has, but is not offered: name it by rnbd_create_export, or set \
                 offer_bdevs to offer all bdevs that nobody uses"
            );
        }
        if !self.open_files {
            return refused(Errno::ENOENT, why);
        }
        self.file(bdevs, asking.session, &full)
    }

    /// Whether clients get bdevs that nobody uses by their own names.
    pub fn offers_bdevs(&self, bdevs: &impl Bdevs) -> bool {
        self.offer_bdevs.unwrap_or_else(|| self.table.is_empty() && !bdevs.was_exported())
    }

    /// Why the bdev of this own name is not given to who says that name.
    pub fn withheld(&self, bdevs: &impl Bdevs, own: &str) -> Option<String> {
        let own_name = |name: &str| bdevs.own_name(name);
        if self.names(own, own_name) {
            return Some(format!("bdev {own} is exported, so it is opened by the names of its exports only"));
        }
        if let Some(user) = bdevs.used_by(own) {
            return Some(format!("bdev {own} is not offered by its name: it is used by {user}"));
        }
        // Whoever writes to a layer writes to what is below.
        bdevs.bases(own).into_iter().find(|base| self.names(base, own_name)).map(|base| {
            format!("bdev {own} is not offered by its name: it is the same as, or built on, {base}, which is exported")
        })
    }

    /// Whether a path means this export: as a whole, or what is below the search path. If sessions have paths of their own,
    /// an export that is one session's must not be had by another that repeats its path below its own.
    fn means(&self, export: &Export, full: &str, remainder: &str) -> bool {
        let path = export.device_path.as_str();
        let whole = full.trim_start_matches('/');
        let common = self.search_path.common();
        let common = common.trim_start_matches('/');
        let is_whole = match common {
            "" => self.search_path.by_session() && path.contains('/'),
            _ => path.starts_with(common),
        };
        path == if is_whole { whole } else { remainder }
    }

    fn by_name(&self, bdevs: &impl Bdevs, own: String) -> Result<Found, Refused> {
        match self.withheld(bdevs, &own) {
            Some(why) => refused(Errno::EACCES, why),
            None => Ok(Found::Bdev { name: own, read_only: false, by: By::Name }),
        }
    }

    fn file(&self, bdevs: &impl Bdevs, session: &str, full: &str) -> Result<Found, Refused> {
        let (path, id) = files::find(&self.search_path, session, full)?;
        // A bdev may be gone, and its export wait for it to come back.
        let named = path.to_str().is_some_and(|path| self.names(path, |name| bdevs.own_name(name)));
        match bdevs.on_file(id) {
            Some(bdev) => {
                let why = format!("bdev {bdev} is on this file, so its exports say who may have it");
                refused(Errno::EACCES, why)
            }
            None if named => {
                let why = "the file is exported, so it is opened by the names of its exports only";
                refused(Errno::EACCES, why)
            }
            None => Ok(Found::File(File { path, id, read_only: self.open_files_read_only })),
        }
    }
}

fn exported(export: &Export, Asking { session, peers }: Asking<'_>) -> Result<Found, Refused> {
    if let Some(stranger) = peers.iter().find(|peer| !allowed(&export.allow, session, **peer)) {
        let entries = export.allow.len();
        let path = if peers.len() > 1 { "that of its paths from" } else { "address" };
        let why = format!(
            "none of the {entries} allow entries of the export fits this session and {path} {}",
            stranger.to_canonical()
        );
        return refused(Errno::EACCES, why);
    }
    Ok(Found::Bdev {
        name: export.bdev_name.clone(),
        read_only: export.read_only,
        by: By::Export { device_path: export.device_path.clone(), allow: export.allow.clone().into() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rnbd::export::ExportError;
    use rnbd_proto::open::SearchPath;

    fn export(path: &str, bdev: &str, allow: Vec<Allow>) -> Export {
        Export { device_path: path.into(), bdev_name: bdev.into(), read_only: false, allow }
    }

    fn exports(path: &str) -> Exports {
        Exports { search_path: SearchPath::new(path).unwrap(), ..Exports::default() }
    }

    /// As [`exports`], with all bdevs that nobody uses.
    fn offering(path: &str) -> Exports {
        Exports { offer_bdevs: Some(true), ..exports(path) }
    }

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 7));

    fn ask(e: &Exports, bdevs: &impl Bdevs, session: &str, path: &str) -> Result<Found, Errno> {
        e.resolve(bdevs, Asking { session, peers: &[PEER] }, path).map_err(|refused| refused.errno)
    }

    /// The bdev that a client gets.
    fn bdev(e: &Exports, bdevs: &impl Bdevs, session: &str, path: &str) -> Result<String, Errno> {
        ask(e, bdevs, session, path).map(|found| match found {
            Found::Bdev { name, .. } => name,
            Found::File(file) => panic!("{file:?}"),
        })
    }

    fn got(name: &str) -> Result<String, Errno> {
        Ok(name.into())
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

    fn alice() -> Vec<Allow> {
        vec![Allow { session: Some("alice".into()), addr: None }]
    }

    #[test]
    fn exports_come_before_bdevs() {
        let mut e = offering("/");
        e.add(export("/disks//one", "M0", vec![])).unwrap();
        assert_eq!(bdev(&e, &any, "s", "disks/one"), got("M0"));
        assert_eq!(bdev(&e, &any, "s", "/disks/one"), got("M0"));
        assert_eq!(bdev(&e, &only("M1"), "s", "M1"), got("M1"));
        assert_eq!(bdev(&e, &any, "s", "M0"), Err(Errno::EACCES));
        assert_eq!(bdev(&e, &none, "s", "M2"), Err(Errno::ENOENT));
        assert_eq!(bdev(&e, &any, "s", "a/../M1"), Err(Errno::EINVAL));
    }

    #[test]
    fn bdevs_are_offered_until_anything_is_exported() {
        struct Exported;
        impl Bdevs for Exported {
            fn own_name(&self, name: &str) -> Option<String> {
                any(name)
            }
            fn was_exported(&self) -> bool {
                true
            }
        }
        let mut e = exports("/");
        assert_eq!(bdev(&e, &any, "s", "M1"), got("M1"));
        assert_eq!(bdev(&e, &Exported, "s", "M1"), Err(Errno::ENOENT), "by whatever front end");
        e.add(export("d", "M0", vec![])).unwrap();
        assert_eq!(bdev(&e, &any, "s", "M1"), Err(Errno::ENOENT));
        e.offer_bdevs = Some(true);
        assert_eq!(bdev(&e, &Exported, "s", "M1"), got("M1"));
        assert_eq!(bdev(&e, &Exported, "s", "M0"), Err(Errno::EACCES));
        e.remove("d").unwrap();
        e.offer_bdevs = Some(false);
        assert_eq!(bdev(&e, &any, "s", "M1"), Err(Errno::ENOENT));
    }

    #[test]
    fn what_somebody_uses_is_not_offered() {
        struct Used;
        impl Bdevs for Used {
            fn own_name(&self, name: &str) -> Option<String> {
                any(name)
            }
            fn used_by(&self, own: &str) -> Option<String> {
                (own == "base").then(|| "bdev layer".into())
            }
            fn bases(&self, own: &str) -> Vec<String> {
                if own == "layer" { vec!["base".into()] } else { Vec::new() }
            }
        }
        let mut e = offering("/");
        assert_eq!(bdev(&e, &Used, "s", "base"), Err(Errno::EACCES));
        assert_eq!(bdev(&e, &Used, "s", "layer"), got("layer"));
        // Who writes to the layer writes to the base, past its export.
        e.add(Export { read_only: true, ..export("d", "base", vec![]) }).unwrap();
        assert_eq!(bdev(&e, &Used, "s", "layer"), Err(Errno::EACCES));
        assert_eq!(bdev(&e, &Used, "s", "d"), got("base"));
    }

    #[test]
    fn session_names_make_own_name_spaces() {
        let mut e = exports("/exports/%SESSNAME%/ignored");
        assert_eq!(bdev(&e, &only("M1"), "s", "M1"), got("M1"));
        e.add(export("M7", "B7", vec![])).unwrap();
        assert_eq!(bdev(&e, &none, "s", "M7"), got("B7"));
        e.add(export("exports/alice/own", "B8", vec![])).unwrap();
        assert_eq!(bdev(&e, &none, "alice", "own"), got("B8"));
        assert_eq!(bdev(&e, &none, "bob", "own"), Err(Errno::ENOENT));
        assert_eq!(bdev(&e, &none, "bob", "exports/alice/own"), Err(Errno::ENOENT), "below bob's own path");
        let mut e = exports("/%SESSNAME%");
        e.add(export("alice/own", "B8", vec![])).unwrap();
        e.add(export("M7", "B7", vec![])).unwrap();
        assert_eq!(bdev(&e, &none, "alice", "own"), got("B8"));
        assert_eq!(bdev(&e, &none, "bob", "alice/own"), Err(Errno::ENOENT));
        assert_eq!(bdev(&e, &none, "bob", "M7"), got("B7"));
    }

    /// Of a bdev with the name `own` and an alias, `alias`.
    #[test]
    fn an_export_is_about_a_bdev_by_all_of_its_names() {
        let find = |name: &str| ["own", "store/alias"].contains(&name).then(|| "own".to_owned());
        for exported in ["own", "store/alias"] {
            let mut e = offering("/");
            e.add(export("d", exported, alice())).unwrap();
            assert_eq!(bdev(&e, &find, "alice", "d"), got(exported));
            for asked in ["d", "own", "store/alias"] {
                assert_eq!(bdev(&e, &find, "bob", asked), Err(Errno::EACCES), "{asked} of {exported}");
            }
        }
        assert_eq!(bdev(&exports("/"), &find, "bob", "store/alias"), got("own"));
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
        let ask = |session: &str, peers: &[&str]| {
            let peers: Vec<IpAddr> = peers.iter().map(|p| p.parse().unwrap()).collect();
            e.resolve(&any, Asking { session, peers: &peers }, "d")
        };
        assert!(ask("alice", &["10.0.0.7"]).is_ok() && ask("alice", &["::ffff:10.0.0.7"]).is_ok());
        assert!(ask("alice", &["10.0.0.7", "10.0.0.8"]).is_ok() && ask("bob", &["192.0.2.1"]).is_ok());
        for (session, peers) in
            [("alice", &["10.0.1.7"][..]), ("eve", &["10.0.0.7"]), ("alice", &["10.0.0.7", "192.0.2.1"])]
        {
            let refused = ask(session, peers).unwrap_err();
            assert!(refused.why.contains("none of the 2 allow entries"), "{refused:?}");
            assert!(refused.why.contains(peers[peers.len() - 1]), "{refused:?}");
        }
        assert_eq!(e.add(export("x", "M", vec![allow(None, None)])), Err(ExportError::EmptyAllow));
        assert!(matches!(
            e.add(export("x", "M", vec![allow(None, Some("10.0.0.0/33"))])),
            Err(ExportError::Addr(_))
        ));
    }

    #[test]
    fn files_stay_below_the_search_path() {
        use std::os::unix::ffi::OsStrExt;
        let dir = test_support::Dir::new("rnbd-export");
        std::fs::create_dir_all(dir.join("in/sub")).unwrap();
        std::fs::write(dir.join("in/disk"), b"x").unwrap();
        std::fs::write(dir.join("secret"), b"x").unwrap();
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, dir.join("in").join(name)).unwrap();
        link("../secret", "out");
        link("disk", "alias");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.join("in/pipe"),
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        let mut e = exports(dir.join("in").to_str().unwrap());
        let real = dir.path().canonicalize().unwrap().join("in/disk");
        let ask = |e: &Exports, bdevs: &dyn Fn(&str) -> Option<String>, name: &str| {
            super::tests::ask(e, &bdevs, "s", name).map(|found| match found {
                Found::File(file) => (file.path, file.read_only),
                Found::Bdev { name, .. } => panic!("bdev {name}"),
            })
        };
        assert_eq!(ask(&e, &none, "disk"), Err(Errno::ENOENT), "only if asked for");
        e.open_files = true;
        assert_eq!(ask(&e, &none, "disk"), Ok((real.clone(), true)));
        assert_eq!(ask(&e, &none, "alias"), Ok((real.clone(), true)));
        e.open_files_read_only = false;
        assert_eq!(ask(&e, &none, "disk"), Ok((real.clone(), false)));
        assert_eq!(ask(&e, &none, "out"), Err(Errno::EACCES));
        assert_eq!(ask(&e, &none, "gone"), Err(Errno::ENOENT));
        assert_eq!(ask(&e, &none, "../secret"), Err(Errno::EINVAL));
        assert_eq!(ask(&e, &none, "sub"), Err(Errno::ENOTBLK));
        assert_eq!(ask(&e, &none, "/"), Err(Errno::ENOTBLK), "the search path itself");
        assert_eq!(ask(&e, &none, "pipe"), Err(Errno::ENOTBLK), "and nobody waits for its other end");
        // A file that is served as a bdev already, which is exported.
        let path = real.to_str().unwrap().to_owned();
        e.add(export("d", &path, alice())).unwrap();
        assert_eq!(ask(&e, &only(&path), "disk"), Err(Errno::EACCES));
        // Names that are not UTF-8 look alike.
        let odd = dir.join("in").join(std::ffi::OsStr::from_bytes(b"d\xff"));
        std::fs::write(&odd, b"x").unwrap();
        std::os::unix::fs::symlink(&odd, dir.join("in/odd")).unwrap();
        assert_eq!(ask(&e, &none, "odd"), Err(Errno::EINVAL));
        // Nor is a session's directory a way out, or the root a directory for disks.
        std::os::unix::fs::symlink("..", dir.join("in/eve")).unwrap();
        e.search_path = SearchPath::new(&format!("{}/%SESSNAME%", dir.join("in").display())).unwrap();
        assert_eq!(super::tests::ask(&e, &none, "eve", "secret").map(drop), Err(Errno::EACCES));
        e.search_path = SearchPath::default();
        let passwd = super::tests::ask(&e, &none, "s", "etc/passwd").map(drop);
        assert_eq!(passwd, Err(Errno::EACCES));
    }
}
