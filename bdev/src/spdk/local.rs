//! A thread of this program as SPDK sees it: one `spdk_thread`, made when the first channel is, and those of SPDK's modules
//! that it was given.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use spdk_sys as sys;

use super::{ffi, runtime};

thread_local! {
    static LOCAL: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
}

/// Threads of this program that have requests in flight.
static BUSY: AtomicUsize = AtomicUsize::new(0);

/// Least time between two looks at an idle SPDK.
const SOONEST: Duration = Duration::from_millis(1);

/// The program gives up what it waits for: see [`give_up_soon`].
static GIVE_UP: AtomicBool = AtomicBool::new(false);

/// `Local`s that live. The environment must not end before them.
static LIVE: AtomicUsize = AtomicUsize::new(0);

/// An `spdk_thread` that a module of SPDK made. Somebody has to poll it, any thread, but one at a time.
#[derive(Debug)]
pub struct Foreign(*mut sys::spdk_thread);

// SAFETY: an `spdk_thread` is bound to no OS thread, only to being polled by one at a time, which ownership of this sees to
// (SPDK's own reactors move them as well).
unsafe impl Send for Foreign {}

impl Foreign {
    pub(super) fn new(thread: *mut sys::spdk_thread) -> Self {
        Self(thread)
    }

    /// Polls once; false when it has come to its end, and is gone.
    fn poll(&self) -> bool {
        // SAFETY: lives until it is destroyed here, and is polled by its owner only.
        unsafe {
            sys::spdk_thread_poll(self.0, 0, 0);
            if !sys::spdk_thread_is_exited(self.0) {
                return true;
            }
            sys::spdk_thread_destroy(self.0);
        }
        false
    }

    /// Ends it, whatever it is for: its module has been finished.
    pub(super) fn end(self) {
        // SAFETY: as in `poll`. `spdk_thread_exit` is for the current thread.
        unsafe { exit(self.0) };
    }
}

/// Asks `thread` to exit, polls until it has, and destroys it. The current thread is the former one afterwards.
///
/// # Safety
/// It lives, and nobody else polls it.
pub(super) unsafe fn exit(thread: *mut sys::spdk_thread) {
    // SAFETY: by the caller's promise; SPDK bounds how long the exit of a thread takes.
    unsafe {
        let former = sys::spdk_get_thread();
        sys::spdk_set_thread(thread);
        sys::spdk_thread_exit(thread);
        while !sys::spdk_thread_is_exited(thread) {
            sys::spdk_thread_poll(thread, 0, 0);
        }
        sys::spdk_thread_destroy(thread);
        sys::spdk_set_thread(if former == thread { std::ptr::null_mut() } else { former });
    }
}

/// See the module. `!Send`.
#[derive(Debug)]
pub(super) struct Local {
    thread: *mut sys::spdk_thread,
    /// Channels that have requests in flight.
    working: Cell<usize>,
    foreign: RefCell<Vec<Foreign>>,
    /// Polled since `poll_idle` last asked.
    polled: Cell<bool>,
    /// A channel was given up with requests in flight, so nothing of SPDK may run here any more ([`Local::give_up`]).
    given_up: Cell<bool>,
    /// The app thread, which its `Runtime` ends.
    app: bool,
}

impl Local {
    /// The calling thread's; made if there is none.
    pub(super) fn current() -> Result<Rc<Self>, String> {
        if let Some(local) = LOCAL.with_borrow(|l| l.clone()) {
            if local.given_up.get() {
                return Err(
                    "SPDK holds a request of this thread that it does not end; the program is ending".into(),
                );
            }
            return Ok(local);
        }
        let name = std::thread::current().name().unwrap_or("rnbd").to_owned();
        let local = runtime::while_running(|| Self::create(&name, false)).ok_or("SPDK is not running")??;
        LOCAL.set(Some(local.clone()));
        Ok(local)
    }

    /// The app thread: the first `spdk_thread` of the process.
    pub(super) fn app() -> Result<Rc<Self>, String> {
        let local = Self::create("app", true)?;
        LOCAL.set(Some(local.clone()));
        Ok(local)
    }

    fn create(name: &str, app: bool) -> Result<Rc<Self>, String> {
        // SAFETY: a C string, which SPDK copies; no set of cores, since its own scheduling is not in use.
        let thread = unsafe {
            let thread = runtime::own_thread(|| {
                sys::spdk_thread_create(ffi::c_string(name).as_ptr(), std::ptr::null())
            });
            if thread.is_null() {
                return Err(format!("spdk_thread_create failed: {}", super::recent_errors()));
            }
            sys::spdk_set_thread(thread);
            thread
        };
        LIVE.fetch_add(1, Ordering::AcqRel);
        Ok(Rc::new(Self {
            thread,
            working: Cell::new(0),
            foreign: RefCell::default(),
            polled: Cell::new(false),
            given_up: Cell::new(false),
            app,
        }))
    }

    pub(super) fn thread(&self) -> *mut sys::spdk_thread {
        self.thread
    }

    /// One turn of everything here; true if SPDK found something to do.
    pub(super) fn poll(&self) -> bool {
        self.polled.set(true);
        // SAFETY: this thread's own `spdk_thread`, alive until drop; only here is it polled.
        let busy = !self.given_up.get() && unsafe { sys::spdk_thread_poll(self.thread, 0, 0) } > 0;
        if self.foreign.borrow().is_empty() {
            return busy;
        }
        // Out of the cell: modules may make more threads while they are polled.
        let mut foreign = self.foreign.take();
        foreign.retain(Foreign::poll);
        self.foreign.borrow_mut().extend(foreign);
        busy
    }

    /// Never polls this thread's `spdk_thread` again: the memory of requests that SPDK holds on it may go from now on, and
    /// SPDK touches it nowhere else. (Devices do; so memory that they can reach is kept, see `memory`.) For an end of the
    /// program that a lost device must not hold up.
    pub(super) fn give_up(&self) {
        self.given_up.set(true);
        super::memory::keep_all();
    }

    pub(super) fn has_given_up(&self) -> bool {
        self.given_up.get()
    }

    pub(super) fn adopt(&self, thread: Foreign) {
        self.foreign.borrow_mut().push(thread);
    }

    pub(super) fn take_foreign(&self) -> Vec<Foreign> {
        self.foreign.take()
    }

    /// A channel has requests in flight from now on.
    #[inline]
    pub(super) fn channel_works(&self) {
        let working = self.working.get();
        self.working.set(working + 1);
        if working == 0 {
            BUSY.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A channel has no more requests in flight.
    #[inline]
    pub(super) fn channel_rests(&self) {
        let working = self.working.get() - 1;
        self.working.set(working);
        if working == 0 {
            BUSY.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// When the next timed poller here is due.
    fn next_timer(&self) -> Option<Instant> {
        // SAFETY: threads that are polled by this OS thread only.
        unsafe {
            let foreign = self.foreign.borrow();
            let threads = foreign.iter().map(|f| f.0).chain([self.thread]);
            let due =
                threads.map(|t| sys::spdk_thread_next_poller_expiration(t)).filter(|due| *due > 0).min()?;
            let left = due.saturating_sub(sys::spdk_get_ticks());
            let ns = u128::from(left) * 1_000_000_000 / u128::from(sys::spdk_get_ticks_hz().max(1));
            Instant::now().checked_add(Duration::from_nanos(ns.min(u128::from(u64::MAX)) as u64))
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        for thread in self.foreign.take() {
            runtime::new_thread(thread);
        }
        if !self.app {
            // SAFETY: this thread's own; every channel on it is gone, since they hold this.
            unsafe { exit(self.thread) };
        }
        LIVE.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Threads of this program that SPDK knows, the app thread among them.
pub(super) fn live() -> usize {
    LIVE.load(Ordering::Acquire)
}

/// Lets SPDK do what it does besides the requests of this program: timed pollers, messages. Channels poll by themselves
/// while they have something in flight; so this polls only where none did since the last call.
///
/// True while requests are in flight here, so that the thread must not sleep.
pub fn poll_idle() -> bool {
    LOCAL.with_borrow(|local| {
        let Some(local) = local else { return false };
        if !local.polled.replace(false) {
            local.poll();
            local.polled.set(false);
        }
        local.working.get() > 0 && !local.given_up.get()
    })
}

/// When the calling thread should call [`poll_idle`] again though nothing is in flight here: at SPDK's next timer, and after
/// `idle` at the latest, since messages come unannounced. While other threads have requests in flight, which may need this
/// one (a volume that grows), that is after 1 ms; and never sooner, so that no timer of SPDK makes an idle program busy.
/// `None` where SPDK is not in use.
pub fn next_wake(idle: Duration) -> Option<Instant> {
    LOCAL.with_borrow(|local| {
        let local = local.as_ref()?;
        let now = Instant::now();
        let soonest = now + SOONEST;
        let latest = if BUSY.load(Ordering::Relaxed) > 0 { soonest } else { now + idle.max(SOONEST) };
        Some(local.next_timer().map_or(latest, |timer| timer.clamp(soonest, latest)))
    })
}

/// Takes a module's thread over: it is polled by [`poll_idle`] here from now on. Back to the app thread if there is no SPDK.
pub fn adopt(thread: Foreign) {
    match Local::current() {
        Ok(local) => local.adopt(thread),
        Err(_) => runtime::new_thread(thread),
    }
}

/// The program is ending, and has waited for requests in flight in vain: channels that are dropped wait for two seconds, and
/// then give up what SPDK does not end. (Before, and in programs that never say so, they wait for as long as it takes: a thread
/// that gave up cannot use SPDK any more.)
pub fn give_up_soon() {
    GIVE_UP.store(true, Ordering::Release);
}

/// [`give_up_soon`] was called.
pub(super) fn gives_up() -> bool {
    GIVE_UP.load(Ordering::Acquire)
}

/// The calling thread is done with SPDK: its channels are gone, and it will make no more. Before [`super::Runtime::stop`]; a
/// thread that ends does the same.
pub fn leave() {
    if LOCAL.with_borrow(|l| l.as_ref().is_some_and(|l| !l.app)) {
        drop(LOCAL.take());
    }
}
