//! The export table: what clients may ask for by which path, and who.

use std::net::IpAddr;

use engine::{Network, NoNetwork};
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

impl Allow {
    /// A session of this name with a path from `peer` fits it.
    pub fn fits(&self, session: &str, peer: IpAddr) -> bool {
        self.session.as_deref().is_none_or(|name| name == session)
            && self.addr.as_deref().is_none_or(|net| net.parse().is_ok_and(|net: Network| net.has(peer)))
    }
}

/// Whether a list lets a session of this name in by a path from `peer`; an empty one lets everybody in.
pub fn allowed(list: &[Allow], session: &str, peer: IpAddr) -> bool {
    list.is_empty() || list.iter().any(|allow| allow.fits(session, peer))
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

/// Not a valid export, or not valid options.
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

/// The name space: the export table, and the rules for names that are not in it.
#[derive(Debug)]
pub struct Exports {
    /// Where device paths are looked up.
    pub search_path: SearchPath,
    /// Whether clients get bdevs by their own names: always, never, or (`None`) until anything is exported.
    pub offer_bdevs: Option<bool>,
    /// Open files and block devices below the search path.
    pub open_files: bool,
    /// Nobody may open those for writing.
    pub open_files_read_only: bool,
    /// A session's paths come from one address, unless `allow` entries name others for it.
    pub bind_sessions: bool,
    pub(super) table: Vec<Export>,
}

impl Default for Exports {
    fn default() -> Self {
        Self {
            search_path: SearchPath::default(),
            offer_bdevs: None,
            open_files: false,
            open_files_read_only: true,
            bind_sessions: false,
            table: Vec::new(),
        }
    }
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
    pub fn expects(&self, peer: IpAddr) -> bool {
        let networks =
            self.table.iter().flat_map(|e| &e.allow).filter_map(|a| a.addr.as_deref()?.parse().ok());
        networks.into_iter().any(|network: Network| network.has(peer))
    }

    /// Whether exports say who may have this bdev. `own`: the own name of the bdev that has a name or alias.
    pub(super) fn names(&self, bdev: &str, own: impl Fn(&str) -> Option<String>) -> bool {
        let is_it = |name: &str| name == bdev || own(name).is_some_and(|own| own == bdev);
        self.table.iter().any(|export| is_it(&export.bdev_name))
    }
}

pub(super) fn normal(path: &str) -> String {
    path.split('/').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/")
}
