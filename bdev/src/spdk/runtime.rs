//! The life of SPDK in this process, from `spdk_env_init` to `spdk_env_fini`, and the thread that owns it.
//!
//! ```text
//!   Runtime::start ─ start-up methods ─ init ─ run-time methods, bdevs ─ begin_finish … finished ─ stop
//! ```
//! Between two of these, and while anything waits, [`Runtime::poll`] keeps it going.

use std::cell::Cell;
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, mpsc};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use spdk_sys as sys;

use super::env::{self, Options, StartError};
use super::local::{self, Foreign, Local};
use super::{disk, ffi, memory};

/// Where other threads find the app thread. Held for reading while it must not go.
static APP: RwLock<Option<App>> = RwLock::new(None);

/// Threads that modules made and nobody polls yet.
static NEW_THREADS: Mutex<Vec<Foreign>> = Mutex::new(Vec::new());

thread_local! {
    /// The thread that is being made is this program's.
    static OWN: Cell<bool> = const { Cell::new(false) };
}

#[derive(Clone, Copy)]
struct App {
    os_thread: ThreadId,
    thread: *mut sys::spdk_thread,
}

// SAFETY: other threads only send messages to it, which SPDK allows from anywhere.
unsafe impl Send for App {}
// SAFETY: as for `Send`.
unsafe impl Sync for App {}

/// Something happened to SPDK's bdevs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A bdev of this name was registered.
    Registered(String),
    /// It is gone.
    Unregistered(String),
}

type Placer = Box<dyn Fn(Foreign)>;

/// SPDK, on the thread that started it. `!Send`.
pub struct Runtime {
    app: Rc<Local>,
    placer: Option<Placer>,
    /// Of SPDK's list of notifications: the first that was not seen.
    seen: u64,
    changes: VecDeque<Change>,
    init: Init,
    finishing: bool,
    /// `spdk_subsystem_fini` was called.
    fini: bool,
}

/// How far the initialisation of SPDK's subsystems is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Not begun: only start-up methods can be called.
    Not,
    /// Under way.
    Pending,
    /// Over: run-time methods can be called, and no start-up methods any more.
    Done,
    /// Over, and SPDK is of no use.
    Failed,
}

/// SPDK's modules look at the bdevs that there were when it began.
#[derive(Debug)]
pub struct Examination(Arc<AtomicBool>);

impl Examination {
    /// They have.
    pub fn over(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Result of `spdk_subsystem_init`; `PENDING` until it calls back.
static INIT: AtomicI32 = AtomicI32::new(PENDING);
const PENDING: i32 = i32::MAX;
static FINISHED: AtomicBool = AtomicBool::new(false);

impl Runtime {
    /// Starts the environment and makes the calling thread SPDK's app thread.
    ///
    /// # Errors
    /// [`StartError`]; SPDK cannot be started again then.
    pub fn start(options: &Options) -> Result<Self, StartError> {
        env::init(options)?;
        // SAFETY: a function that lives for ever, and no context.
        let rc = unsafe { sys::spdk_thread_lib_init(Some(thread_made), 0) };
        if rc != 0 {
            return Err(StartError::step("spdk_thread_lib_init", rc));
        }
        let app =
            Local::app().map_err(|log| StartError::Step { step: "spdk_thread_create", rc: -12, log })?;
        // SAFETY: the app thread exists and is the current one.
        if !unsafe { sys::spdk_subsystem_exists(c"bdev".as_ptr()) } {
            return Err(StartError::NotLinked);
        }
        *write_app() = Some(App { os_thread: std::thread::current().id(), thread: app.thread() });
        tracing::info!(version = super::version(), hugepages = !options.no_huge, "SPDK started");
        let (placer, changes) = (None, VecDeque::new());
        Ok(Self { app, placer, seen: 0, changes, init: Init::Not, finishing: false, fini: false })
    }

    /// Initialises SPDK's subsystems, and waits for that, however long it takes.
    ///
    /// # Errors
    /// As [`Runtime::initialised`].
    pub fn init(&mut self) -> Result<(), StartError> {
        self.begin_init();
        while !self.initialised()? {
            self.poll();
        }
        Ok(())
    }

    /// Begins to initialise SPDK's subsystems: bdev modules look for their devices now. Once.
    pub fn begin_init(&mut self) {
        debug_assert_eq!(self.init, Init::Not);
        self.init = Init::Pending;
        // SAFETY: the app thread is the current one; the callback lives for ever.
        unsafe { sys::spdk_subsystem_init(Some(initialised), std::ptr::null_mut()) };
    }

    /// Whether that is done. Start-up methods cannot be called any more then.
    ///
    /// # Errors
    /// `Step`, with what SPDK said.
    pub fn initialised(&mut self) -> Result<bool, StartError> {
        if self.init == Init::Pending {
            match INIT.load(Ordering::Acquire) {
                PENDING => {}
                0 => {
                    // SAFETY: a plain number.
                    unsafe { sys::spdk_rpc_set_state(sys::SPDK_RPC_RUNTIME) };
                    self.init = Init::Done;
                }
                rc => {
                    self.init = Init::Failed;
                    return Err(StartError::step("spdk_subsystem_init", rc));
                }
            }
        }
        Ok(self.init == Init::Done)
    }

    /// How far that is.
    pub fn init_state(&self) -> Init {
        self.init
    }

    /// Has SPDK tell when its modules have looked at all bdevs that there are now, which they may claim then. It can take as
    /// long as a device takes to answer.
    pub fn examination(&self) -> Examination {
        unsafe extern "C" fn over(flag: *mut c_void) {
            // SAFETY: the reference that was given away below, taken back once.
            let flag = unsafe { Arc::from_raw(flag.cast_const().cast::<AtomicBool>()) };
            flag.store(true, Ordering::Release);
        }
        let flag = Arc::new(AtomicBool::new(false));
        let context = Arc::into_raw(flag.clone());
        // SAFETY: the app thread is the current one; SPDK has the reference until it calls back.
        let rc = unsafe { sys::spdk_bdev_wait_for_examine(Some(over), context.cast_mut().cast()) };
        if rc != 0 {
            // No memory. There is nothing to wait for then, and SPDK has not kept it.
            // SAFETY: from `into_raw` above.
            drop(unsafe { Arc::from_raw(context) });
            flag.store(true, Ordering::Release);
        }
        Examination(flag)
    }

    /// Whether SPDK's subsystem `name` ("bdev", "nvmf", …) is linked.
    pub fn has_subsystem(&self, name: &str) -> bool {
        // SAFETY: a C string; the app thread is this one.
        unsafe { sys::spdk_subsystem_exists(ffi::c_string(name).as_ptr()) }
    }

    /// Gives threads that modules make to `placer`, which hands each to a thread that [`adopt`](super::adopt)s it. Without
    /// one, and if that fails, they are polled here.
    pub fn set_placer(&mut self, placer: impl Fn(Foreign) + 'static) {
        self.placer = Some(Box::new(placer));
    }

    /// One turn: SPDK's pollers and messages, then what its events ask of the bdevs here. True if SPDK was busy.
    pub fn poll(&mut self) -> bool {
        let busy = self.app.poll();
        for thread in std::mem::take(&mut *new_threads()) {
            match &self.placer {
                Some(placer) if !self.finishing => placer(thread),
                _ => self.app.adopt(thread),
            }
        }
        disk::run_events();
        self.look();
        if self.finishing {
            self.go_on_finishing();
        }
        busy
    }

    /// The next change that was not told yet.
    pub fn next_change(&mut self) -> Option<Change> {
        self.changes.pop_front()
    }

    fn look(&mut self) {
        unsafe extern "C" fn see(_: u64, event: *const sys::spdk_notify_event, list: *mut c_void) -> c_int {
            // SAFETY: the list of the caller below, and an event of SPDK whose texts are C strings.
            let (list, kind, name) = unsafe {
                let event = &*event;
                (
                    &mut *list.cast::<VecDeque<Change>>(),
                    ffi::text(event.type_.as_ptr()),
                    ffi::text(event.ctx.as_ptr()),
                )
            };
            match kind.as_str() {
                "bdev_register" => list.push_back(Change::Registered(name)),
                "bdev_unregister" => list.push_back(Change::Unregistered(name)),
                _ => {}
            }
            0
        }
        // SAFETY: the list outlives the call, which keeps no pointer to it.
        let count = unsafe {
            sys::spdk_notify_foreach_event(self.seen, u64::MAX, Some(see), (&raw mut self.changes).cast())
        };
        self.seen += count;
    }

    /// Begins to finish the subsystems: every bdev of SPDK is removed. Their users must be gone, or go. An initialisation that
    /// is under way comes to its end before.
    pub fn begin_finish(&mut self) {
        self.finishing = true;
        self.go_on_finishing();
    }

    fn go_on_finishing(&mut self) {
        if self.fini || self.finished() {
            return;
        }
        // A failure was told to whoever asked; it is the same here.
        let _ = self.initialised();
        match self.init {
            Init::Pending => {}
            Init::Not => FINISHED.store(true, Ordering::Release),
            Init::Done | Init::Failed => {
                self.fini = true;
                // SAFETY: the app thread is the current one; the callback lives for ever.
                unsafe { sys::spdk_subsystem_fini(Some(finished), std::ptr::null_mut()) };
            }
        }
    }

    /// Leaves SPDK as it is, for a process that is about to end: something there does not end. Nobody waits for the app thread
    /// from now on.
    pub fn abandon(self) {
        *write_app() = None;
        // What it waits for cannot be taken down under it.
        std::mem::forget(self);
    }

    /// The subsystems are finished.
    pub fn finished(&self) -> bool {
        FINISHED.load(Ordering::Acquire)
    }

    /// Ends SPDK, after [`Runtime::finished`], when every other thread has left. False if threads or memory are still in use:
    /// then the environment stays, until the process ends.
    pub fn stop(mut self) -> bool {
        self.end()
    }

    fn end(&mut self) -> bool {
        self.finishing = true;
        self.poll();
        *write_app() = None;
        // Nobody can send any more; what was sent is run.
        for _ in 0..64 {
            self.app.poll();
        }
        let waiting = std::mem::take(&mut *new_threads());
        for thread in self.app.take_foreign().into_iter().chain(waiting) {
            thread.end();
        }
        if local::live() > 1 {
            tracing::warn!(
                threads = local::live() - 1,
                "threads still use SPDK; its environment stays until the process ends"
            );
            return false;
        }
        // SAFETY: the app thread is this one's, and the last; nothing polls it any more.
        unsafe {
            local::exit(self.app.thread());
            sys::spdk_thread_lib_fini();
            if memory::lent() > 0 {
                return false;
            }
            env::finish();
        }
        memory::set(false, false);
        true
    }
}

impl Drop for Runtime {
    /// For ends that are not in order (a start that failed): what can be finished in a moment is.
    fn drop(&mut self) {
        if read_app().is_none() {
            return;
        }
        if !self.finishing {
            self.begin_finish();
        }
        let until = Instant::now() + Duration::from_secs(2);
        while !self.finished() && Instant::now() < until {
            self.poll();
        }
        if self.finished() {
            self.end();
        } else {
            *write_app() = None;
        }
    }
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").field("init", &self.init).field("finishing", &self.finishing).finish()
    }
}

/// SPDK was started, and has not been stopped.
pub fn running() -> bool {
    read_app().is_some()
}

/// The calling thread is SPDK's app thread.
pub(super) fn is_app() -> bool {
    read_app().is_some_and(|app| app.os_thread == std::thread::current().id())
}

/// Runs `f` if SPDK is running, and keeps it so meanwhile.
pub(super) fn while_running<R>(f: impl FnOnce() -> R) -> Option<R> {
    let app = read_app();
    app.is_some().then(f)
}

/// How long other threads wait for the app thread: it answers in its next turn, or not at all any more.
const APP_ANSWERS: Duration = Duration::from_secs(60);

/// Runs `f` on the app thread and waits for its answer: at once if that is the calling one. `None`: SPDK is not running.
pub(super) fn on_app<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> Option<R> {
    let (sender, answer) = mpsc::channel();
    post(move || {
        let _ = sender.send(f());
    });
    answer.recv_timeout(APP_ANSWERS).ok()
}

/// Runs `f` on the app thread, soon: at once if that is the calling one. Without SPDK it is dropped.
pub(super) fn post(f: impl FnOnce() + Send + 'static) {
    type Work = Box<dyn FnOnce() + Send>;
    unsafe extern "C" fn run(work: *mut c_void) {
        // SAFETY: the box that was sent, run once.
        let work = unsafe { Box::from_raw(work.cast::<Work>()) };
        work();
    }
    let app = read_app();
    let Some(App { os_thread, thread }) = *app else { return };
    if std::thread::current().id() == os_thread {
        drop(app);
        return f();
    }
    let work: Box<Work> = Box::new(Box::new(f));
    let work = Box::into_raw(work).cast();
    // SAFETY: the lock keeps the thread alive; the box is freed by `run`, or here if it was not sent.
    unsafe {
        if sys::spdk_thread_send_msg(thread, Some(run), work) != 0 {
            drop(Box::from_raw(work.cast::<Work>()));
        }
    }
}

/// Makes a thread that is not given to anybody.
pub(super) fn own_thread<R>(make: impl FnOnce() -> R) -> R {
    OWN.set(true);
    let made = make();
    OWN.set(false);
    made
}

/// Somebody has to poll it.
pub(super) fn new_thread(thread: Foreign) {
    new_threads().push(thread);
}

fn new_threads() -> MutexGuard<'static, Vec<Foreign>> {
    NEW_THREADS.lock().unwrap_or_else(|e| e.into_inner())
}

fn read_app() -> std::sync::RwLockReadGuard<'static, Option<App>> {
    APP.read().unwrap_or_else(|e| e.into_inner())
}

fn write_app() -> std::sync::RwLockWriteGuard<'static, Option<App>> {
    APP.write().unwrap_or_else(|e| e.into_inner())
}

/// SPDK's `spdk_new_thread_fn`.
unsafe extern "C" fn thread_made(thread: *mut sys::spdk_thread) -> c_int {
    if !OWN.get() {
        new_thread(Foreign::new(thread));
    }
    0
}

unsafe extern "C" fn initialised(rc: c_int, _: *mut c_void) {
    INIT.store(rc, Ordering::Release);
}

unsafe extern "C" fn finished(_: *mut c_void) {
    FINISHED.store(true, Ordering::Release);
}
