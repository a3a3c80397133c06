//! An open bdev: the right to make channels, to hear of events, and to claim.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use crate::device::{Bdev, ChannelError, Info};
use crate::iochannel::IoChannel;
use crate::manager::{Entry, Error};

/// How a bdev is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Reads; every modification is answered with `Status::ReadOnly`. Always possible, claimed or not.
    ReadOnly,
    /// Everything. Refused while somebody else has a claim.
    ReadWrite,
}

/// Who opens a bdev, and what that means for others who ask for it by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// A front end that offers it to somebody and has rules of its own for that: "NBD export 'a'".
    Export(String),
    /// The bdev of this name is built on it.
    Layer(String),
    /// A client that a front end has let in, in words. It keeps nobody else off.
    Client(String),
    /// Another part of the program.
    Part,
}

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Export(what) | Self::Client(what) => f.write_str(what),
            Self::Layer(name) => write!(f, "bdev {name}, which is built on it"),
            Self::Part => f.write_str("another part of this program"),
        }
    }
}

/// What the users of a bdev are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It was unregistered: drop the channels on their threads, then the descriptor.
    Removed,
    /// Its size changed.
    Resized {
        /// New size.
        blocks: u64,
    },
}

/// A claim as `bdev_get_bdevs` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Who has it, in words: "delay bdev D0".
    pub holder: String,
    owner: u64,
}

impl Claim {
    /// SPDK's word for the only kind there is.
    pub const TYPE: &'static str = "exclusive_write";
}

/// The descriptors of one bdev.
#[derive(Default)]
pub(crate) struct Opens {
    list: Vec<(u64, Mode, Weak<Open>)>,
    claim: Option<Claim>,
}

impl Opens {
    pub(crate) fn claim(&self) -> Option<&Claim> {
        self.claim.as_ref()
    }

    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Open>> {
        self.list.iter().filter_map(|(_, _, d)| d.upgrade()).collect()
    }
}

/// State shared by a descriptor's clones and its channels.
pub(crate) struct Open {
    pub(crate) entry: Arc<Entry>,
    pub(crate) mode: Mode,
    pub(crate) user: User,
    id: u64,
    events: Box<dyn Fn(Event) + Send + Sync>,
}

impl Open {
    pub(crate) fn notify(&self, event: Event) {
        (self.events)(event);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut opens = self.entry.opens();
        opens.list.retain(|(id, ..)| *id != self.id);
        if opens.claim.as_ref().is_some_and(|c| c.owner == self.id) {
            opens.claim = None;
        }
        drop(opens);
        self.entry.bdev().closed(self.mode);
    }
}

/// An open bdev. Clones share it; it closes when the last clone and the last channel are dropped.
#[derive(Clone)]
pub struct Descriptor(Arc<Open>);

impl std::fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Descriptor")
            .field("bdev", &self.0.entry.info().name)
            .field("mode", &self.0.mode)
            .finish()
    }
}

impl Descriptor {
    pub(crate) fn open(
        entry: Arc<Entry>,
        mode: Mode,
        user: User,
        events: Box<dyn Fn(Event) + Send + Sync>,
    ) -> Result<Self, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = || entry.info().name.clone();
        if mode == Mode::ReadWrite && entry.info().read_only {
            return Err(Error::ReadOnly { name: name() });
        }
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        // Without the lock: the device may have to ask a thread that wants it. Undone by the drop of `open`.
        entry.bdev().opened(mode)?;
        let open = Arc::new(Open { entry: entry.clone(), mode, user, id, events });
        let mut opens = entry.opens();
        // Under this lock, so that `unregister` either finds the new descriptor or is seen here.
        if entry.removed.load(Ordering::Acquire) {
            return Err(Error::NotFound { name: name() });
        }
        if let (Mode::ReadWrite, Some(claim)) = (mode, &opens.claim) {
            let holder = format!(
                "{} has an exclusive claim on it; open it read-only, or delete the holder",
                claim.holder
            );
            return Err(Error::Busy { name: name(), wish: "opened for writing", holder });
        }
        opens.list.push((id, mode, Arc::downgrade(&open)));
        drop(opens);
        Ok(Self(open))
    }

    /// Makes this descriptor the only writer until it is closed. `holder` names the claimer to others, e.g.
    /// "delay bdev D0". Modules that put a layer on a bdev do this.
    ///
    /// # Errors
    /// `Busy` if somebody else has a claim or is open for writing; `Invalid` on a read-only descriptor.
    pub fn claim(&self, holder: &str) -> Result<(), Error> {
        let name = || self.info().name.clone();
        if self.0.mode == Mode::ReadOnly {
            let reason = format!("a claim on {} needs a descriptor opened for writing", name());
            return Err(Error::Invalid { parameter: "mode", reason });
        }
        let mut opens = self.0.entry.opens();
        if let Some(claim) = opens.claim.as_ref().filter(|c| c.owner != self.0.id) {
            let holder = format!("{} has an exclusive claim on it; delete that one first", claim.holder);
            return Err(Error::Busy { name: name(), wish: "claimed", holder });
        }
        let writers =
            opens.list.iter().filter(|(id, m, _)| *id != self.0.id && *m == Mode::ReadWrite).count();
        if writers > 0 {
            let holder = format!("{writers} other users have it open for writing; close them first");
            return Err(Error::Busy { name: name(), wish: "claimed", holder });
        }
        opens.claim = Some(Claim { holder: holder.to_owned(), owner: self.0.id });
        Ok(())
    }

    /// A data path for the calling thread; use and drop it there.
    ///
    /// # Errors
    /// As [`Bdev::channel`].
    pub fn channel(&self) -> Result<IoChannel, ChannelError> {
        IoChannel::new(self.0.clone())
    }

    /// Properties.
    pub fn info(&self) -> &Info {
        self.0.entry.info()
    }

    /// The bdev.
    pub fn bdev(&self) -> &Arc<dyn Bdev> {
        self.0.entry.bdev()
    }

    /// Size now, in blocks.
    pub fn blocks(&self) -> u64 {
        self.0.entry.blocks.load(Ordering::Relaxed)
    }

    /// As opened.
    pub fn mode(&self) -> Mode {
        self.0.mode
    }

    /// The bdev was unregistered.
    pub fn is_removed(&self) -> bool {
        self.0.entry.removed.load(Ordering::Acquire)
    }
}
