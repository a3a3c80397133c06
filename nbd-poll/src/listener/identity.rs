//! Who a client is, and what it may see.

use std::fmt;

use nbd_proto::haggle::{Catalog, Export, Refusal};

use super::address::Peer;

/// A client, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Where it comes from.
    pub peer: Peer,
    /// What TLS says of it; `None` without.
    pub tls: Option<TlsIdentity>,
}

/// What is known of a client by TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsIdentity {
    /// Version and cipher suite.
    pub cipher: String,
    /// The common name in its certificate, which an authority of the server has signed.
    pub common_name: Option<String>,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.peer.fmt(f)?;
        match self.tls.as_ref().and_then(|t| t.common_name.as_ref()) {
            Some(name) => write!(f, " \"{}\"", name.escape_debug()),
            None => Ok(()),
        }
    }
}

/// The exports of a server, as each client may see them. Every [`Catalog`] is one that is the same for all.
pub trait Shelf {
    /// As [`Catalog::next`].
    fn next(&self, who: &Identity, after: Option<&str>) -> Option<Export<'_>>;

    /// As [`Catalog::find`].
    ///
    /// # Errors
    /// [`Refusal`].
    fn find(&self, who: &Identity, name: &str) -> Result<Export<'_>, Refusal>;
}

impl<C: Catalog> Shelf for C {
    fn next(&self, _: &Identity, after: Option<&str>) -> Option<Export<'_>> {
        Catalog::next(self, after)
    }

    fn find(&self, _: &Identity, name: &str) -> Result<Export<'_>, Refusal> {
        Catalog::find(self, name)
    }
}

/// What one client sees.
pub(super) struct Seen<'a> {
    pub(super) shelf: &'a dyn Shelf,
    pub(super) who: &'a Identity,
}

impl Catalog for Seen<'_> {
    fn next(&self, after: Option<&str>) -> Option<Export<'_>> {
        self.shelf.next(self.who, after)
    }

    fn find(&self, name: &str) -> Result<Export<'_>, Refusal> {
        self.shelf.find(self.who, name)
    }
}
