//! A bdev of SPDK, offered to a [`Manager`].

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use spdk_sys as sys;
use uuid::Uuid;

use super::channel::SpdkChannel;
use super::{ffi, runtime};
use crate::descriptor::Mode;
use crate::device::{Bdev, Channel, ChannelError, Info, OpSet};
use crate::io::Op;
use crate::manager::{Error, Manager};

/// The backend.
pub struct SpdkBdev {
    info: Info,
    blocks: AtomicU64,
    manager: Weak<Manager>,
    /// Open read-only as long as this lives: hears of removal and resizes.
    watch: Mutex<Option<Arc<Desc>>>,
    writer: Mutex<Writer>,
    /// How SPDK calls it.
    name: String,
}

/// The descriptor for writing, shared by all who have the bdev open for that.
#[derive(Default)]
struct Writer {
    desc: Option<Arc<Desc>>,
    users: usize,
}

/// An open descriptor of SPDK. Closed on the app thread, when the last user drops it.
pub(super) struct Desc {
    desc: *mut sys::spdk_bdev_desc,
    /// What its events are about; SPDK has the address.
    context: *mut Context,
}

/// The bdev that events are about: none for descriptors whose events nobody needs.
struct Context(Option<Weak<SpdkBdev>>);

// SAFETY: SPDK uses a descriptor on any thread that has a channel of it, and closes it on the thread that opened it, which
// is the app thread (`open`, `drop`).
unsafe impl Send for Desc {}
// SAFETY: as for `Send`: nothing here changes while it is shared.
unsafe impl Sync for Desc {}

/// What SPDK told of a bdev.
#[derive(Clone, Copy)]
enum Told {
    Removed,
    Resized,
}

/// Taken by [`run_events`] after the poll that brought them: their handlers must not run inside SPDK.
static EVENTS: Mutex<Vec<(Weak<SpdkBdev>, Told)>> = Mutex::new(Vec::new());

impl Desc {
    /// Opens `name`. On the app thread.
    fn open(name: &str, write: bool, context: Context) -> Result<Self, i32> {
        let context = Box::into_raw(Box::new(context));
        let mut desc = std::ptr::null_mut();
        // SAFETY: a C string; the context lives until the descriptor is closed; the answer goes to `desc`.
        let rc = unsafe {
            sys::spdk_bdev_open_ext(
                ffi::c_string(name).as_ptr(),
                write,
                Some(event),
                context.cast(),
                &mut desc,
            )
        };
        if rc == 0 {
            return Ok(Self { desc, context });
        }
        // SAFETY: from `into_raw` above; SPDK did not keep it.
        drop(unsafe { Box::from_raw(context) });
        Err(rc)
    }

    pub(super) fn as_ptr(&self) -> *mut sys::spdk_bdev_desc {
        self.desc
    }

    fn bdev(&self) -> *mut sys::spdk_bdev {
        // SAFETY: open until drop.
        unsafe { sys::spdk_bdev_desc_get_bdev(self.desc) }
    }

    /// Keeps SPDK's modules from writing what is open for writing here.
    fn claim(&self) -> i32 {
        use sys::spdk_bdev_claim_type::SPDK_BDEV_CLAIM_READ_MANY_WRITE_ONE as KIND;
        // SAFETY: an open descriptor, no options, and a module that lives for ever.
        unsafe { sys::spdk_bdev_module_claim_bdev_desc(self.desc, KIND, std::ptr::null_mut(), module()) }
    }
}

impl Drop for Desc {
    fn drop(&mut self) {
        let (desc, context) = (Closing(self.desc), Closing(self.context));
        runtime::post(move || {
            let (desc, context) = (desc, context);
            // SAFETY: opened on this thread; its last user dropped it. No event comes after the close, which was the last
            // to know the context.
            unsafe {
                sys::spdk_bdev_close(desc.0);
                drop(Box::from_raw(context.0));
            }
        });
    }
}

/// On its way to the app thread.
struct Closing<T>(*mut T);

// SAFETY: the sender has no other use for it.
unsafe impl<T> Send for Closing<T> {}

/// Who claims, for SPDK's messages.
fn module() -> *mut sys::spdk_bdev_module {
    struct Module(std::cell::UnsafeCell<sys::spdk_bdev_module>);
    // SAFETY: SPDK compares its address and reads its name; nobody writes it.
    unsafe impl Sync for Module {}
    // SAFETY: plain C data, for which zeroes are valid.
    static MODULE: Module = Module(std::cell::UnsafeCell::new(unsafe {
        let mut module: sys::spdk_bdev_module = std::mem::zeroed();
        module.name = c"rnbd".as_ptr();
        module
    }));
    MODULE.0.get()
}

/// SPDK's `spdk_bdev_event_cb_t`.
unsafe extern "C" fn event(
    kind: sys::spdk_bdev_event_type::Type,
    _: *mut sys::spdk_bdev,
    context: *mut c_void,
) {
    use sys::spdk_bdev_event_type::{SPDK_BDEV_EVENT_REMOVE, SPDK_BDEV_EVENT_RESIZE};
    let told = match kind {
        SPDK_BDEV_EVENT_REMOVE => Told::Removed,
        SPDK_BDEV_EVENT_RESIZE => Told::Resized,
        _ => return,
    };
    // SAFETY: the context of a descriptor that is open; only read here, on the app thread.
    if let Some(disk) = unsafe { &(*context.cast::<Context>()).0 } {
        EVENTS.lock().unwrap_or_else(|e| e.into_inner()).push((disk.clone(), told));
    }
}

/// What SPDK's events ask of the managers. On the app thread, outside of SPDK.
pub(super) fn run_events() {
    let events = std::mem::take(&mut *EVENTS.lock().unwrap_or_else(|e| e.into_inner()));
    for (disk, told) in events {
        let Some(disk) = disk.upgrade() else { continue };
        let Some(manager) = disk.manager.upgrade() else { continue };
        // Not found: it was taken off the table here, too.
        let _ = match told {
            Told::Removed => manager.unregister(&disk.info.name, Box::new(|| ())),
            Told::Resized => {
                disk.ask_size();
                manager.resized(&disk.info.name)
            }
        };
    }
}

/// The names of all bdevs that SPDK has now, in the order of their creation. On the app thread; elsewhere, and without SPDK,
/// there are none.
pub fn bdevs() -> Vec<String> {
    let mut names = Vec::new();
    if !runtime::is_app() {
        return names;
    }
    // SAFETY: the app thread is the current one; it is the only one that adds bdevs and removes them, so that each is there
    // until the next is asked for.
    unsafe {
        let mut bdev = sys::spdk_bdev_first();
        while !bdev.is_null() {
            names.push(ffi::text(sys::spdk_bdev_get_name(bdev)));
            bdev = sys::spdk_bdev_next(bdev);
        }
    }
    names
}

/// The name of the bdev of SPDK that has the name, the alias or the UUID `name`. On the app thread, as [`bdevs`].
pub fn name_of(name: &str) -> Option<String> {
    if !runtime::is_app() {
        return None;
    }
    // SAFETY: as in `bdevs`; null, or a bdev whose name is copied at once.
    unsafe {
        let bdev = sys::spdk_bdev_get_by_name(ffi::c_string(name).as_ptr());
        (!bdev.is_null()).then(|| ffi::text(sys::spdk_bdev_get_name(bdev)))
    }
}

/// What SPDK tells of a bdev that this crate has no place for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// The object `driver_specific` of SPDK's `bdev_get_bdevs`, as JSON.
    pub driver_specific: String,
    /// The claim of a module of SPDK, or of this program, in SPDK's words.
    pub claim: Option<String>,
    /// Limits of `bdev_set_qos_limit`, with their names.
    pub limits: Vec<(String, u64)>,
}

/// Registers SPDK's bdev `name` with `manager`, under the name and the aliases that it has there. It leaves the manager when
/// SPDK removes it. Returns its first name.
///
/// # Errors
/// `NotFound`; `Exists`, if a name of it is taken here; `Invalid` for devices that this crate cannot use (zones, blocks with
/// metadata in them); `System`, if SPDK is not running.
pub fn offer(manager: &Arc<Manager>, name: &str) -> Result<String, Error> {
    let (asked, to) = (name.to_owned(), Arc::downgrade(manager));
    let disk = runtime::on_app(move || SpdkBdev::open(&asked, to)).ok_or_else(|| Error::System {
        context: format!("SPDK's bdev {name}: SPDK is not running; call spdk_set_options first"),
        source: rustix::io::Errno::NODEV,
    })??;
    let name = disk.info.name.clone();
    manager.register(disk.clone())?;
    // A removal that came before the registration found nothing.
    disk.ask_size();
    if !disk.info.read_only && !disk.info.native.has(Op::Flush) {
        tracing::warn!(
            bdev = name,
            kind = disk.info.product_name,
            "SPDK cannot flush this kind of bdev: what a drive below it keeps in a volatile write cache may be lost with \
             power, though it was flushed; switch that cache off, or use drives with power-loss protection"
        );
    }
    Ok(name)
}

impl SpdkBdev {
    /// On the app thread.
    fn open(name: &str, manager: Weak<Manager>) -> Result<Arc<Self>, Error> {
        let mut opened = Err(-19);
        let disk = Arc::new_cyclic(|weak: &Weak<Self>| {
            opened = Desc::open(name, false, Context(Some(weak.clone())));
            let bdev = opened.as_ref().map_or(std::ptr::null_mut(), Desc::bdev);
            Self {
                // SAFETY: null, or of a descriptor that is open.
                info: unsafe { info(bdev) },
                blocks: AtomicU64::new(0),
                manager,
                watch: Mutex::default(),
                writer: Mutex::default(),
                name: name.to_owned(),
            }
        });
        let desc = opened.map_err(|rc| match ffi::errno(rc) {
            rustix::io::Errno::NODEV => Error::NotFound { name: name.to_owned() },
            source => Error::System { context: format!("SPDK's bdev {name} cannot be opened"), source },
        })?;
        let bdev = desc.bdev();
        // SAFETY: of a descriptor that is open.
        let problem = unsafe {
            if sys::spdk_bdev_is_zoned(bdev) {
                Some("zoned devices are not supported")
            } else if sys::spdk_bdev_get_md_size(bdev) > 0 && sys::spdk_bdev_is_md_interleaved(bdev) {
                Some(
                    "blocks with metadata in them are not supported; format the device without, or with separate metadata",
                )
            } else {
                None
            }
        };
        if let Some(problem) = problem {
            return Err(Error::Invalid {
                parameter: "bdev",
                reason: format!("SPDK's bdev {name}: {problem}"),
            });
        }
        *lock(&disk.watch) = Some(Arc::new(desc));
        disk.ask_size();
        Ok(disk)
    }

    fn ask_size(&self) {
        if let Some(watch) = &*lock(&self.watch) {
            // SAFETY: open as long as it is there.
            self.blocks.store(unsafe { sys::spdk_bdev_get_num_blocks(watch.bdev()) }, Ordering::Relaxed);
        }
    }

    /// How SPDK calls it.
    pub fn spdk_name(&self) -> &str {
        &self.name
    }

    /// What else SPDK tells of it. On the app thread; elsewhere, and of a bdev that is going, nothing.
    pub fn details(&self) -> Details {
        let watch = lock(&self.watch);
        match &*watch {
            // SAFETY: of a descriptor that is open, on the app thread.
            Some(watch) if runtime::is_app() => unsafe { details(watch.bdev()) },
            _ => Details::default(),
        }
    }

    fn open_writer(&self) -> Result<Arc<Desc>, Error> {
        let name = self.name.clone();
        let opened = runtime::on_app(move || {
            let desc = Desc::open(&name, true, Context(None))?;
            match desc.claim() {
                0 => Ok(desc),
                rc => Err(rc),
            }
        });
        let name = || self.info.name.clone();
        match opened {
            None => Err(Error::NotFound { name: name() }),
            Some(Ok(desc)) => Ok(Arc::new(desc)),
            Some(Err(rc)) => Err(match ffi::errno(rc) {
                rustix::io::Errno::NODEV => Error::NotFound { name: name() },
                rustix::io::Errno::PERM | rustix::io::Errno::BUSY => Error::Busy {
                    name: name(),
                    wish: "opened for writing",
                    holder: "a module of SPDK has claimed it or writes it (lvol, raid, crypto, nvmf …); use the bdev that \
                             it made of this one, or delete that"
                        .into(),
                },
                source => Error::System {
                    context: format!("SPDK's bdev {} cannot be opened for writing: {}", name(), super::recent_errors()),
                    source,
                },
            }),
        }
    }
}

impl std::fmt::Debug for SpdkBdev {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpdkBdev").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Bdev for SpdkBdev {
    fn info(&self) -> &Info {
        &self.info
    }

    fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    fn opened(&self, mode: Mode) -> Result<(), Error> {
        if mode == Mode::ReadOnly {
            return Ok(());
        }
        // Held while SPDK opens it: on the control path, by one caller at a time.
        let mut writer = lock(&self.writer);
        if writer.desc.is_none() {
            writer.desc = Some(self.open_writer()?);
        }
        writer.users += 1;
        Ok(())
    }

    fn closed(&self, mode: Mode) {
        if mode == Mode::ReadWrite {
            let mut writer = lock(&self.writer);
            writer.users -= 1;
            if writer.users == 0 {
                writer.desc = None;
            }
        }
    }

    /// SPDK has no other question for this: whoever may write, may claim it, and nobody else has.
    fn is_held(&self) -> bool {
        let opened = self.opened(Mode::ReadWrite);
        if opened.is_ok() {
            self.closed(Mode::ReadWrite);
        }
        opened.is_err()
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        self.channel_for(Mode::ReadOnly)
    }

    fn channel_for(self: Arc<Self>, mode: Mode) -> Result<Box<dyn Channel>, ChannelError> {
        let desc = match mode {
            Mode::ReadOnly => lock(&self.watch).clone(),
            Mode::ReadWrite => lock(&self.writer).desc.clone(),
        };
        let refused = |reason| ChannelError { bdev: self.info.name.clone(), reason };
        let desc = desc.ok_or_else(|| refused("it is not open".to_owned()))?;
        let fast_zeroes = self.info.native.has(Op::Discard);
        SpdkChannel::new(desc, mode == Mode::ReadOnly, self.info.block_size, fast_zeroes)
            .map(|c| Box::new(c) as Box<dyn Channel>)
            .map_err(refused)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Properties as SPDK has them; anything for null.
///
/// # Safety
/// Null, or of a descriptor that is open.
unsafe fn info(bdev: *mut sys::spdk_bdev) -> Info {
    use sys::spdk_bdev_io_type::*;
    if bdev.is_null() {
        return Info {
            name: String::new(),
            aliases: Vec::new(),
            product_name: "",
            uuid: Uuid::nil(),
            block_size: 512,
            physical_block_size: 512,
            native: OpSet::of(&[]),
            native_fua: false,
            write_cache: false,
            read_only: true,
            volatile: false,
            discard_granularity: 0,
            rotational: false,
            max_unmap_blocks: 1,
            buffer_align: 1,
        };
    }
    // SAFETY: open by the caller's promise; all of these only read, and their texts stay while it is.
    unsafe {
        let can = |kind| sys::spdk_bdev_io_type_supported(bdev, kind);
        let block_size = sys::spdk_bdev_get_block_size(bdev);
        let physical = sys::spdk_bdev_get_physical_block_size(bdev);
        let read_only = !can(SPDK_BDEV_IO_TYPE_WRITE);
        let product = ffi::text(sys::spdk_bdev_get_product_name(bdev));
        // What can be flushed is. Some modules (raid, virtio) say "no cache" whatever is below them; a drive knows.
        let no_cache = product == "NVMe disk" && !sys::spdk_bdev_has_write_cache(bdev);
        let write_cache = can(SPDK_BDEV_IO_TYPE_FLUSH) && !no_cache;
        let mut native = OpSet::of(&[]);
        for (op, kind) in [
            (Op::Read, SPDK_BDEV_IO_TYPE_READ),
            (Op::Write, SPDK_BDEV_IO_TYPE_WRITE),
            (Op::Discard, SPDK_BDEV_IO_TYPE_UNMAP),
            (Op::WriteZeroes, SPDK_BDEV_IO_TYPE_WRITE_ZEROES),
            (Op::Flush, SPDK_BDEV_IO_TYPE_FLUSH),
            (Op::Reset, SPDK_BDEV_IO_TYPE_RESET),
        ] {
            if can(kind) && !(read_only && op.modifies()) {
                native = native.with(op);
            }
        }
        #[cfg(spdk_unmap_granularity)]
        let granularity = sys::spdk_bdev_get_preferred_unmap_granularity(bdev);
        #[cfg(not(spdk_unmap_granularity))]
        let granularity = 1u32;
        Info {
            name: ffi::text(sys::spdk_bdev_get_name(bdev)),
            aliases: aliases(bdev),
            volatile: product == "Malloc disk",
            product_name: interned(product),
            uuid: Uuid::from_bytes((*sys::spdk_bdev_get_uuid(bdev)).u.raw),
            block_size,
            physical_block_size: physical.max(block_size).checked_next_power_of_two().unwrap_or(block_size),
            native,
            native_fua: false,
            write_cache,
            read_only,
            discard_granularity: if native.has(Op::Discard) {
                granularity.max(1).saturating_mul(block_size)
            } else {
                0
            },
            rotational: false,
            max_unmap_blocks: u64::MAX,
            buffer_align: 1,
        }
    }
}

/// See [`Details`].
///
/// # Safety
/// Of a descriptor that is open, on the app thread.
unsafe fn details(bdev: *mut sys::spdk_bdev) -> Details {
    use sys::spdk_bdev_claim_type::SPDK_BDEV_CLAIM_NONE;
    use sys::spdk_bdev_qos_rate_limit_type::SPDK_BDEV_QOS_NUM_RATE_LIMIT_TYPES;
    /// SPDK's `spdk_json_write_cb`.
    unsafe extern "C" fn collect(text: *mut c_void, data: *const c_void, size: usize) -> c_int {
        // SAFETY: the list of the caller below; SPDK gives `size` bytes.
        unsafe {
            let piece = std::slice::from_raw_parts(data.cast::<u8>(), size);
            (*text.cast::<Vec<u8>>()).extend_from_slice(piece);
        }
        0
    }
    let mut text: Vec<u8> = Vec::new();
    let mut limits = [0u64; SPDK_BDEV_QOS_NUM_RATE_LIMIT_TYPES as usize];
    // SAFETY: a bdev that stays (the caller's promise), a list that outlives the writer, and room for as many limits as SPDK
    // has. The claim is read on the thread that changes it.
    unsafe {
        let writer = sys::spdk_json_write_begin(Some(collect), (&raw mut text).cast(), 0);
        if !writer.is_null() {
            sys::spdk_json_write_object_begin(writer);
            sys::spdk_bdev_dump_info_json(bdev, writer);
            sys::spdk_json_write_object_end(writer);
            // Writes out what is left, and frees the writer.
            sys::spdk_json_write_end(writer);
        }
        sys::spdk_bdev_get_qos_rate_limits(bdev, limits.as_mut_ptr());
        let claim = (*bdev).internal.claim_type;
        let named = |(i, limit): (usize, u64)| (ffi::text(sys::spdk_bdev_get_qos_rpc_type(i as _)), limit);
        Details {
            driver_specific: String::from_utf8_lossy(&text).into_owned(),
            claim: (claim != SPDK_BDEV_CLAIM_NONE).then(|| ffi::text(sys::spdk_bdev_claim_get_name(claim))),
            limits: limits.into_iter().enumerate().map(named).collect(),
        }
    }
}

/// Other names: "store/volume" of an lvol.
///
/// # Safety
/// Of a descriptor that is open; on the app thread, which changes the list.
unsafe fn aliases(bdev: *mut sys::spdk_bdev) -> Vec<String> {
    // SAFETY: by the caller's promise.
    unsafe {
        let list = sys::spdk_bdev_get_aliases(bdev);
        let mut next = (*list).tqh_first;
        let mut names = Vec::new();
        while let Some(entry) = next.as_ref() {
            names.push(ffi::text(entry.alias.name));
            next = entry.tailq.tqe_next;
        }
        names
    }
}

/// Product names are few, and live as long as the program.
fn interned(name: String) -> &'static str {
    static NAMES: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());
    let mut names = lock(&NAMES);
    if let Some(known) = names.iter().find(|n| **n == name) {
        return known;
    }
    let name: &'static str = name.leak();
    names.push(name);
    name
}
