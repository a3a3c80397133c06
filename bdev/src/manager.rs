//! The table of bdevs: names, life cycle, events. Control path only; every lock here is held for a few lines.
//!
//! Life of a bdev: [`Manager::register`] → opens and closes → [`Manager::unregister`]: each [`Descriptor`] gets
//! [`Event::Removed`], new opens are refused, new I/O is answered with `Gone` → the last descriptor (and every
//! channel made from it) is dropped → the backend is dropped → `on_gone` is called and the name is free again.
//! A layer unregisters itself when its base is removed, so removal cascades upwards.

use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use iobuf::{Region, Registry};

use crate::descriptor::{Claim, Descriptor, Event, Mode, Opens, User};
use crate::device::{Bdev, Info, OpSet};
use crate::histogram::{HistogramConfig, LatencyHistogram};
use crate::stats::{BdevStats, IoStats, ResetMode};

/// Called once when a bdev is gone; from the thread that dropped its last user.
pub type OnGone = Box<dyn FnOnce() + Send>;

/// Refusal of a control operation. The text says what would have been right.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// EEXIST.
    #[error("a bdev named {name} exists already{}; choose another name or delete it first", if *.removing { " and is being removed" } else { "" })]
    Exists {
        /// The name or alias in question.
        name: String,
        /// It was unregistered, but has open descriptors.
        removing: bool,
    },
    /// ENODEV.
    #[error("no bdev named {name}; bdev_get_bdevs lists those that exist")]
    NotFound {
        /// As asked for.
        name: String,
    },
    /// EPERM in SPDK, EBUSY in Linux.
    #[error("bdev {name} cannot be {wish}: {holder}")]
    Busy {
        /// The bdev.
        name: String,
        /// "opened for writing", "claimed".
        wish: &'static str,
        /// Who holds it, and what that one would have to do.
        holder: String,
    },
    /// EROFS.
    #[error("bdev {name} is read-only; open it read-only")]
    ReadOnly {
        /// The bdev.
        name: String,
    },
    /// A method for one kind of bdev met another kind.
    #[error("bdev {name} is a \"{product}\", which this method is not for")]
    WrongKind {
        /// The bdev.
        name: String,
        /// What it is.
        product: &'static str,
    },
    /// EINVAL: a parameter.
    #[error("{parameter}: {reason}")]
    Invalid {
        /// Name of the parameter.
        parameter: &'static str,
        /// What would be right.
        reason: String,
    },
    /// A file, device or memory was refused by the system.
    #[error("{context}: {source}")]
    System {
        /// What was tried, on what, and what would help.
        context: String,
        /// The errno.
        source: rustix::io::Errno,
    },
    /// No memory.
    #[error(transparent)]
    Memory(#[from] iobuf::MapError),
}

impl Error {
    /// As a positive Linux errno (the RPC layer negates it, as SPDK does).
    pub fn errno(&self) -> i32 {
        use rustix::io::Errno;
        match self {
            Self::Exists { .. } => Errno::EXIST,
            Self::NotFound { .. } => Errno::NODEV,
            Self::Busy { .. } => Errno::BUSY,
            Self::ReadOnly { .. } => Errno::ROFS,
            Self::WrongKind { .. } => Errno::NODEV,
            Self::Invalid { .. } => Errno::INVAL,
            Self::System { source, .. } => *source,
            Self::Memory(_) => Errno::NOMEM,
        }
        .raw_os_error()
    }
}

/// What happened in the table, for `notify_get_notifications`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// `bdev_register`
    Registered,
    /// `bdev_unregister`
    Unregistered,
    /// `bdev_resize`
    Resized,
}

impl Notice {
    /// SPDK's name of the type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registered => "bdev_register",
            Self::Unregistered => "bdev_unregister",
            Self::Resized => "bdev_resize",
        }
    }
}

/// One row of `bdev_get_bdevs`.
pub struct BdevStatus {
    /// The backend, for `driver_specific` and its own type.
    pub bdev: Arc<dyn Bdev>,
    /// Size now.
    pub blocks: u64,
    /// Operations that its `IoChannel`s take, emulated ones included.
    pub supported: OpSet,
    /// The claim on it.
    pub claim: Option<Claim>,
    /// Open descriptors.
    pub opens: usize,
}

/// See [`Manager::on_first_export`].
pub(crate) type FirstExport = Box<dyn FnOnce() + Send>;

type NotifyFn = Arc<dyn Fn(Notice, &str) + Send + Sync>;

/// All bdevs of the process.
pub struct Manager {
    registry: Arc<Registry>,
    zeroes: OnceLock<Arc<Region>>,
    table: Mutex<Table>,
    notify: Mutex<Option<NotifyFn>>,
    /// See [`Manager::note_export`].
    pub(crate) exported: AtomicBool,
    pub(crate) on_first_export: Mutex<Option<FirstExport>>,
    /// See [`Manager::reserve`].
    pub(crate) reserved: Mutex<HashSet<String>>,
}

#[derive(Default)]
struct Table {
    /// Names and aliases, also of bdevs that are being removed.
    names: HashMap<String, u64>,
    /// In order of registration; those being removed are not here any more.
    live: BTreeMap<u64, Arc<Entry>>,
    next_id: u64,
}

/// One bdev and what the manager knows of it. Dropped with the last descriptor after `unregister`.
pub(crate) struct Entry {
    /// `None` only during drop.
    bdev: Option<Arc<dyn Bdev>>,
    manager: Weak<Manager>,
    /// Copy of the backend's size that channels check against: moves when the change is announced.
    pub(crate) blocks: AtomicU64,
    pub(crate) removed: AtomicBool,
    pub(crate) opens: Mutex<Opens>,
    pub(crate) stats: Arc<BdevStats>,
    on_gone: Mutex<Option<OnGone>>,
}

impl Entry {
    pub(crate) fn bdev(&self) -> &Arc<dyn Bdev> {
        self.bdev.as_ref().expect("present until drop")
    }

    pub(crate) fn info(&self) -> &Info {
        self.bdev().info()
    }

    pub(crate) fn opens(&self) -> MutexGuard<'_, Opens> {
        self.opens.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn manager(&self) -> Option<Arc<Manager>> {
        self.manager.upgrade()
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Some(bdev) = self.bdev.take() else { return };
        let names: Vec<String> = names_of(bdev.info()).collect();
        // The backend first: its file is closed and its lock released before anyone hears that it is gone.
        drop(bdev);
        if let Some(manager) = self.manager.upgrade() {
            let mut table = manager.table();
            names.iter().for_each(|name| {
                table.names.remove(name);
            });
        }
        let on_gone = self.on_gone.get_mut().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(on_gone) = on_gone {
            on_gone();
        }
    }
}

impl Manager {
    /// An empty table whose devices share `registry`.
    pub fn new(registry: Arc<Registry>) -> Arc<Self> {
        Arc::new(Self {
            registry,
            zeroes: OnceLock::new(),
            table: Mutex::default(),
            notify: Mutex::new(None),
            exported: AtomicBool::new(false),
            on_first_export: Mutex::new(None),
            reserved: Mutex::default(),
        })
    }

    /// Data memory that devices register ahead of time.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Sets the one hook that hears of registrations, removals and resizes. It must not block.
    pub fn set_notify(&self, hook: impl Fn(Notice, &str) + Send + Sync + 'static) {
        *self.notify.lock().unwrap_or_else(|e| e.into_inner()) = Some(Arc::new(hook));
    }

    /// `prefix` and the first number that makes a free name: Malloc0, Malloc1, …
    pub fn free_name(&self, prefix: &str) -> String {
        let table = self.table();
        let free = (0u64..).map(|n| format!("{prefix}{n}")).find(|name| !table.names.contains_key(name));
        free.expect("fewer than 2^64 bdevs")
    }

    /// Adds a bdev under its name and aliases.
    ///
    /// # Errors
    /// `Exists`; `Invalid` for properties no bdev may have.
    pub fn register(self: &Arc<Self>, bdev: Arc<dyn Bdev>) -> Result<(), Error> {
        let info = bdev.info().clone();
        if let Some(reason) = info.problem() {
            return Err(Error::Invalid { parameter: "bdev", reason: format!("{}: {reason}", info.name) });
        }
        {
            let mut table = self.table();
            for name in names_of(&info) {
                if let Some(id) = table.names.get(&name) {
                    let removing = !table.live.contains_key(id);
                    return Err(Error::Exists { name, removing });
                }
            }
            let id = table.next_id;
            table.next_id += 1;
            for name in names_of(&info) {
                table.names.insert(name, id);
            }
            let entry = Entry {
                blocks: AtomicU64::new(bdev.blocks()),
                bdev: Some(bdev),
                manager: Arc::downgrade(self),
                removed: AtomicBool::new(false),
                opens: Mutex::default(),
                stats: Arc::default(),
                on_gone: Mutex::new(None),
            };
            table.live.insert(id, Arc::new(entry));
        }
        tracing::info!(bdev = info.name, product = info.product_name, "bdev registered");
        self.announce(Notice::Registered, &info.name);
        Ok(())
    }

    /// Opens a bdev by name or alias. `events` hears of removal and resizes, from a control thread; it must not
    /// block. The owner answers [`Event::Removed`] by dropping its channels, then the descriptor.
    ///
    /// # Errors
    /// `NotFound`; `ReadOnly`; `Busy` when it is claimed, naming the holder.
    pub fn open(
        self: &Arc<Self>,
        name: &str,
        mode: Mode,
        events: Box<dyn Fn(Event) + Send + Sync>,
    ) -> Result<Descriptor, Error> {
        self.open_as(User::Part, name, mode, events)
    }

    /// As [`Manager::open`], saying who opens it.
    ///
    /// # Errors
    /// As there.
    pub fn open_as(
        self: &Arc<Self>,
        user: User,
        name: &str,
        mode: Mode,
        events: Box<dyn Fn(Event) + Send + Sync>,
    ) -> Result<Descriptor, Error> {
        let is_export = matches!(user, User::Export(_));
        let descriptor = Descriptor::open(self.entry(name)?, mode, user, events)?;
        if is_export {
            self.note_export();
        }
        Ok(descriptor)
    }

    /// Takes a bdev off the table and tells its users. `on_gone` runs when the last of them let go: at once, from
    /// this call, if there is none.
    ///
    /// # Errors
    /// `NotFound`, also for one that is being removed already.
    pub fn unregister(&self, name: &str, on_gone: OnGone) -> Result<(), Error> {
        let entry = {
            let mut table = self.table();
            let id = table.names.get(name).copied();
            id.and_then(|id| table.live.remove(&id))
                .ok_or_else(|| Error::NotFound { name: name.to_owned() })?
        };
        *entry.on_gone.lock().unwrap_or_else(|e| e.into_inner()) = Some(on_gone);
        entry.removed.store(true, Ordering::Release);
        let name = entry.info().name.clone();
        tracing::info!(bdev = name, users = entry.opens().len(), "bdev removed");
        self.announce(Notice::Unregistered, &name);
        entry.tell(Event::Removed);
        Ok(())
    }

    /// [`Manager::unregister`], provided the bdev is of kind `T` (`bdev_malloc_delete` must not delete a file).
    ///
    /// # Errors
    /// `WrongKind`, or as `unregister`.
    pub fn delete<T: Bdev>(&self, name: &str, on_gone: OnGone) -> Result<(), Error> {
        self.get_as::<T>(name)?;
        self.unregister(name, on_gone)
    }

    /// The size of `name` changed: channels check against the new one from now on, users get [`Event::Resized`].
    /// Backends call this after they changed.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn resized(&self, name: &str) -> Result<(), Error> {
        let entry = self.entry(name)?;
        let blocks = entry.bdev().blocks();
        let old = entry.blocks.swap(blocks, Ordering::Relaxed);
        if old == blocks {
            return Ok(());
        }
        let (bdev, users) = (&entry.info().name, entry.opens().len());
        if blocks < old && users > 0 {
            tracing::warn!(
                bdev,
                old,
                blocks,
                users,
                "bdev shrunk under its users: what lay behind its new end is lost"
            );
        } else {
            tracing::info!(bdev, old, blocks, users, "bdev resized");
        }
        self.announce(Notice::Resized, &entry.info().name);
        entry.tell(Event::Resized { blocks });
        Ok(())
    }

    /// A bdev by name or alias.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Bdev>, Error> {
        Ok(self.entry(name)?.bdev().clone())
    }

    /// A bdev of kind `T` by name or alias.
    ///
    /// # Errors
    /// `NotFound`, `WrongKind`.
    pub fn get_as<T: Bdev>(&self, name: &str) -> Result<Arc<T>, Error> {
        let bdev = self.get(name)?;
        let product = bdev.info().product_name;
        let any: Arc<dyn Any + Send + Sync> = bdev;
        any.downcast().map_err(|_| Error::WrongKind { name: name.to_owned(), product })
    }

    /// One row of `bdev_get_bdevs`.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn status(&self, name: &str) -> Result<BdevStatus, Error> {
        Ok(self.entry(name)?.status())
    }

    /// All bdevs in order of registration.
    pub fn list(&self) -> Vec<BdevStatus> {
        self.entries().iter().map(|e| e.status()).collect()
    }

    /// Counts of `name` over all its channels since the last reset.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn stats(&self, name: &str) -> Result<IoStats, Error> {
        Ok(self.entry(name)?.stats.total())
    }

    /// Counts of each live channel of `name`, with the name of its thread. Resets of counts do not show here.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn channel_stats(&self, name: &str) -> Result<Vec<(String, IoStats)>, Error> {
        Ok(self.entry(name)?.stats.per_channel())
    }

    /// Resets counts of one bdev, or of all (`None`).
    ///
    /// # Errors
    /// `NotFound`.
    pub fn reset_stats(&self, name: Option<&str>, mode: ResetMode) -> Result<(), Error> {
        let entries = match name {
            Some(name) => vec![self.entry(name)?],
            None => self.entries(),
        };
        entries.iter().for_each(|e| e.stats.reset(mode));
        Ok(())
    }

    /// Switches the latency histogram of `name` on (empty, also if it was on) or off. Channels notice at their next
    /// poll.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a granularity outside 1..=10.
    pub fn enable_histogram(&self, name: &str, config: Option<HistogramConfig>) -> Result<(), Error> {
        if let Some(c) = config
            && !(1..=10).contains(&c.granularity)
        {
            let reason = format!("{} is outside 1..=10", c.granularity);
            return Err(Error::Invalid { parameter: "granularity", reason });
        }
        self.entry(name)?.stats.set_histogram(config);
        Ok(())
    }

    /// The latency histogram of `name`.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is not enabled.
    pub fn histogram(&self, name: &str) -> Result<LatencyHistogram, Error> {
        let (config, counts) = self.entry(name)?.stats.histogram().ok_or_else(|| Error::Invalid {
            parameter: "name",
            reason: format!("no histogram on {name}; call bdev_enable_histogram first"),
        })?;
        Ok(LatencyHistogram { config, counts })
    }

    /// Zeroed memory that nobody writes, source of emulated write-zeroes. Mapped at first use.
    pub(crate) fn zeroes(&self) -> Result<Arc<Region>, iobuf::MapError> {
        if let Some(region) = self.zeroes.get() {
            return Ok(region.clone());
        }
        // Outside the registry: registering would pin a MiB where reading leaves the kernel's zero page.
        let region = Region::new(Self::ZEROES_LEN)?;
        Ok(self.zeroes.get_or_init(|| region).clone())
    }

    /// Bytes of [`Manager::zeroes`]: the largest piece of an emulated write-zeroes.
    pub(crate) const ZEROES_LEN: usize = 1 << 20;

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    // Entries leave the lock as clones: dropping the last one takes the lock again.
    pub(crate) fn entry(&self, name: &str) -> Result<Arc<Entry>, Error> {
        let table = self.table();
        let entry = table.names.get(name).and_then(|id| table.live.get(id)).cloned();
        entry.ok_or_else(|| Error::NotFound { name: name.to_owned() })
    }

    pub(crate) fn entries(&self) -> Vec<Arc<Entry>> {
        self.table().live.values().cloned().collect()
    }

    fn announce(&self, notice: Notice, name: &str) {
        let hook = self.notify.lock().unwrap_or_else(|e| e.into_inner()).clone();
        if let Some(hook) = hook {
            hook(notice, name);
        }
    }
}

/// Name and aliases.
pub(crate) fn names_of(info: &Info) -> impl Iterator<Item = String> {
    std::iter::once(info.name.clone()).chain(info.all_aliases())
}

impl Entry {
    fn status(&self) -> BdevStatus {
        let opens = self.opens();
        BdevStatus {
            bdev: self.bdev().clone(),
            blocks: self.blocks.load(Ordering::Relaxed),
            supported: self.info().supported(),
            claim: opens.claim().cloned(),
            opens: opens.len(),
        }
    }

    /// Tells every descriptor, outside of the lock: a handler may drop its descriptor at once.
    fn tell(&self, event: Event) {
        let open = self.opens().all();
        open.iter().for_each(|d| d.notify(event));
    }
}
