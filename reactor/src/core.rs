//! The loop of a reactor.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{self, Timespec, epoll};

use crate::crowd::Crowd;
use crate::mailbox::{Handle, IdlePolicy};
use crate::poller::{Polled, Poller, PollerId};
use crate::stats::PollerStats;
use crate::timer::{Action, TimerId, Timers};

/// Messages run per turn, so that a flood of control work cannot starve the pollers.
const MESSAGES_PER_TURN: usize = 64;

/// A reactor that spins offers its core to others after this long without work. On a core of its own that costs nothing; the
/// scheduler would otherwise let a kernel worker, perhaps the very one this reactor waits for, wait for a time slice.
const YIELD_AFTER: Duration = Duration::from_micros(5);

/// A reactor could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// No such core, or not allowed by this process's affinity.
    #[error(
        "cannot pin a reactor to core {core}: this process may use cores {allowed:?}; choose among them with -m"
    )]
    Core {
        /// Wanted.
        core: usize,
        /// Usable.
        allowed: Vec<usize>,
    },
    /// epoll or eventfd refused.
    #[error("cannot set up a reactor: {0}")]
    System(#[from] rustix::io::Errno),
    /// No thread for it.
    #[error("cannot start a reactor thread: {0}")]
    Thread(std::io::Error),
}

/// A polling loop. Make it anywhere, then [`Reactor::run`] it on its thread.
pub struct Reactor {
    core: Core,
    pollers: Vec<Entry>,
    /// When a turn last had work that is a reason to spin.
    last_work: Instant,
    crowd: Crowd,
}

struct Entry {
    id: PollerId,
    poller: Box<dyn Poller>,
    /// Timed pollers: interval and next due time.
    timed: Option<(Duration, Instant)>,
}

/// What a reactor does between two turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    Spin,
    Yield,
    Sleep,
}

/// Everything of a reactor except its pollers, so that a poller can be handed the rest.
struct Core {
    handle: Handle,
    epoll: OwnedFd,
    locals: HashMap<TypeId, Rc<dyn Any>>,
    timers: Timers,
    added: Vec<Entry>,
    removed: Vec<PollerId>,
    next_poller: u64,
    poller_stats: Vec<PollerStats>,
}

/// What a poller or message may do to its reactor. `now` is read once per turn.
pub struct Turn<'a> {
    /// When this turn began.
    pub now: Instant,
    core: &'a mut Core,
}

impl Reactor {
    /// A reactor named `name`, pinned to `core` once it runs.
    ///
    /// # Errors
    /// The core is not there or not allowed; no descriptors left.
    pub fn new(name: &str, core: Option<usize>, policy: IdlePolicy) -> Result<Self, SetupError> {
        if let Some(core) = core {
            let allowed: Vec<usize> =
                core_affinity::get_core_ids().unwrap_or_default().iter().map(|c| c.id).collect();
            if !allowed.contains(&core) {
                return Err(SetupError::Core { core, allowed });
            }
        }
        let handle = Handle::new(name.into(), core, policy)?;
        // A reactor does not move between threads: the one that makes it is the one that runs it.
        handle.0.time.belongs_to_this_thread();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &handle.0.eventfd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        Ok(Self {
            core: Core {
                handle,
                epoll,
                locals: HashMap::new(),
                timers: Timers::default(),
                added: Vec::new(),
                removed: Vec::new(),
                next_poller: 0,
                poller_stats: Vec::new(),
            },
            pollers: Vec::new(),
            last_work: Instant::now(),
            crowd: Crowd::default(),
        })
    }

    /// The sendable side.
    pub fn handle(&self) -> Handle {
        self.core.handle.clone()
    }

    /// Runs `f` as if it were a message, before the loop: to add the first pollers.
    pub fn setup<R>(&mut self, f: impl FnOnce(&mut Turn<'_>) -> R) -> R {
        f(&mut Turn { now: Instant::now(), core: &mut self.core })
    }

    /// Polls until [`Handle::stop`], then drops pollers and local state on this thread.
    pub fn run(mut self) {
        if let Some(core) = self.core.handle.core() {
            core_affinity::set_for_current(core_affinity::CoreId { id: core });
        }
        let shared = self.core.handle.0.clone();
        // Sleeps of some microseconds would take 50 more otherwise. Fails nowhere that matters.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
        let mut turn_began = Instant::now();
        self.last_work = turn_began;
        while !shared.stop.load(Ordering::Acquire) {
            let busy = self.turn(turn_began) == Polled::Busy;
            let slept = !busy && self.idle(turn_began);
            let now = Instant::now();
            if !busy && !slept {
                self.crowd.spun(turn_began, now);
            }
            shared.time.turn(busy, now.duration_since(turn_began).as_nanos() as u64);
            turn_began = now;
        }
        // What is still queued may own resources of this thread's pollers: drop it while they are alive.
        while shared.queue.0.pop().is_some() {}
    }

    fn turn(&mut self, now: Instant) -> Polled {
        let mut busy = self.core.run_messages(now) | self.core.run_timers(now);
        let mut spins = busy;
        self.apply_changes();
        for (entry, stats) in self.pollers.iter_mut().zip(0..) {
            if let Some((period, due)) = &mut entry.timed {
                if *due > now {
                    continue;
                }
                *due = now + *period;
            }
            let found = entry.poller.poll(&mut Turn { now, core: &mut self.core }) == Polled::Busy;
            let stats = &mut self.core.poller_stats[stats];
            stats.run_count += 1;
            stats.busy_count += u64::from(found);
            busy |= found;
            spins |= found && !entry.poller.rests();
        }
        if spins {
            self.last_work = now;
        }
        self.apply_changes();
        busy.into()
    }

    /// Entries and their statistics stay in step: both vectors are only changed here.
    fn apply_changes(&mut self) {
        if self.core.removed.is_empty() && self.core.added.is_empty() {
            return;
        }
        self.pollers.append(&mut self.core.added);
        for id in std::mem::take(&mut self.core.removed) {
            if let Some(i) = self.pollers.iter().position(|e| e.id == id) {
                self.pollers.remove(i);
                self.core.poller_stats.remove(i);
            }
        }
    }

    /// Spins, yields or sleeps, as the policy says. True: it has slept.
    fn idle(&mut self, now: Instant) -> bool {
        let pause = self.pause(now);
        match pause {
            Pause::Sleep => self.sleep(now),
            // If that takes long, it was the last time: see `Crowd`.
            Pause::Yield => std::thread::yield_now(),
            Pause::Spin => std::hint::spin_loop(),
        }
        pause == Pause::Sleep
    }

    /// What to do after a turn without work that began at `now`.
    #[inline]
    fn pause(&self, now: Instant) -> Pause {
        let idle = now.duration_since(self.last_work);
        match self.core.handle.policy() {
            IdlePolicy::Adaptive { spin } if idle >= spin || self.crowd.is_there(now) => Pause::Sleep,
            _ if idle >= YIELD_AFTER => Pause::Yield,
            _ => Pause::Spin,
        }
    }

    fn sleep(&mut self, now: Instant) {
        let shared = self.core.handle.0.clone();
        shared.sleep.announce();
        if shared.queue.0.is_empty() && !shared.stop.load(Ordering::Acquire) && self.may_sleep(now) {
            shared.time.sleeping(true);
            self.wait(self.next_deadline());
            shared.time.sleeping(false);
        }
        shared.sleep.clear();
    }

    fn may_sleep(&mut self, now: Instant) -> bool {
        let core = &mut self.core;
        let awake =
            self.pollers.iter_mut().any(|e| e.poller.before_sleep(&mut Turn { now, core }) == Polled::Busy);
        !awake && self.core.added.is_empty() && self.core.removed.is_empty()
    }

    fn next_deadline(&self) -> Option<Instant> {
        let pollers = self.pollers.iter().flat_map(|e| [e.poller.deadline(), e.timed.map(|(_, due)| due)]);
        pollers.chain([self.core.timers.next_deadline()]).flatten().min()
    }

    fn wait(&self, until: Option<Instant>) {
        let left = until.map(|t| t.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return;
        }
        let timeout = left.and_then(|d| Timespec::try_from(d).ok());
        // epoll_wait(2) counts milliseconds, ppoll(2) nanoseconds, and epoll_pwait2(2) is not everywhere. Other deadlines
        // than those of a short rest are better met together.
        let short = timeout.filter(|t| t.tv_sec == 0 && t.tv_nsec < 1_000_000);
        if let Some(short) = short.filter(|_| self.pollers.iter().any(|e| e.poller.rests())) {
            let mut set = [event::PollFd::new(&self.core.epoll, event::PollFlags::IN)];
            if matches!(event::poll(&mut set, Some(&short)), Ok(0) | Err(_)) {
                return;
            }
        }
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 8];
        // EINTR only means an early turn. Which descriptor fired does not matter: every poller is asked anyway.
        if let Ok(n) = epoll::wait(&self.core.epoll, &mut events[..], timeout.as_ref())
            && events[..n].iter().any(|e| e.data.u64() == 0)
        {
            let _ = rustix::io::read(&self.core.handle.0.eventfd, &mut [0u8; 8]);
        }
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // Pollers first: they may use local state of the reactor while they go.
        self.pollers.clear();
        self.core.added.clear();
        self.core.locals.clear();
        self.core.handle.end();
    }
}

impl Core {
    fn run_messages(&mut self, now: Instant) -> bool {
        if self.handle.0.queue.0.is_empty() {
            return false;
        }
        let shared = self.handle.0.clone();
        for n in 0..MESSAGES_PER_TURN {
            let Some(message) = shared.queue.0.pop() else { return n > 0 };
            message(&mut Turn { now, core: self });
        }
        true
    }

    fn run_timers(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some(action) = self.timers.pop_due(now) {
            action(&mut Turn { now, core: self });
            any = true;
        }
        any
    }

    fn add(&mut self, name: &str, poller: Box<dyn Poller>, timed: Option<(Duration, Instant)>) -> PollerId {
        let id = PollerId(self.next_poller);
        self.next_poller += 1;
        let period_ns = timed.map(|(p, _)| p.as_nanos() as u64);
        self.poller_stats.push(PollerStats {
            name: name.into(),
            id: id.0,
            run_count: 0,
            busy_count: 0,
            period_ns,
        });
        self.added.push(Entry { id, poller, timed });
        id
    }
}

impl Turn<'_> {
    /// Adds a poller that is asked every turn, from the next turn on.
    pub fn add_poller(&mut self, name: &str, poller: Box<dyn Poller>) -> PollerId {
        self.core.add(name, poller, None)
    }

    /// Adds a poller that is asked every `period`.
    pub fn add_timed_poller(&mut self, name: &str, period: Duration, poller: Box<dyn Poller>) -> PollerId {
        let due = self.now + period;
        self.core.add(name, poller, Some((period, due)))
    }

    /// Drops a poller, after this turn.
    pub fn remove_poller(&mut self, id: PollerId) {
        self.core.removed.push(id);
    }

    /// Runs `action` once, `delay` from now.
    pub fn after(&mut self, delay: Duration, action: impl FnOnce(&mut Turn<'_>) + 'static) -> TimerId {
        let action: Action = Box::new(action);
        self.core.timers.add(self.now + delay, action)
    }

    /// Cancels a timer; false if it has run or was cancelled.
    pub fn cancel(&mut self, id: TimerId) -> bool {
        self.core.timers.cancel(id)
    }

    /// Wakes the reactor from sleep whenever `fd` is readable (level-triggered: whoever owns it drains it).
    ///
    /// # Errors
    /// The kernel's refusal, such as a descriptor that cannot be waited for. Source: epoll_ctl(2).
    pub fn watch(&mut self, fd: RawFd) -> rustix::io::Result<()> {
        // Data 1: anything but the mailbox's own eventfd.
        with_fd(fd, |fd| {
            epoll::add(&self.core.epoll, fd, epoll::EventData::new_u64(1), epoll::EventFlags::IN)
        })
    }

    /// Ends [`Turn::watch`]; call it before closing `fd`.
    pub fn unwatch(&mut self, fd: RawFd) {
        // Failure means that the descriptor is closed already, and then the kernel has forgotten it too.
        let _ = with_fd(fd, |fd| epoll::delete(&self.core.epoll, fd));
    }

    /// State of this reactor by type, set with [`Turn::set_local`].
    pub fn local<T: 'static>(&self) -> Option<Rc<T>> {
        self.core.locals.get(&TypeId::of::<T>())?.clone().downcast().ok()
    }

    /// Keeps `value` for messages and pollers of this reactor to find by its type. Replaces a former one.
    pub fn set_local<T: 'static>(&mut self, value: Rc<T>) {
        self.core.locals.insert(TypeId::of::<T>(), value);
    }

    /// This reactor's sendable side.
    pub fn handle(&self) -> &Handle {
        &self.core.handle
    }

    /// Counts of every poller.
    pub fn poller_stats(&self) -> &[PollerStats] {
        &self.core.poller_stats
    }
}

fn with_fd<R>(fd: RawFd, f: impl FnOnce(BorrowedFd<'_>) -> R) -> R {
    // SAFETY: the number is only handed to epoll_ctl, which answers EBADF if it is not open; nothing is read, written
    // or closed through it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    f(fd.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Works at every turn, if it is told to.
    struct Worker {
        works: Rc<std::cell::Cell<bool>>,
        rests: bool,
    }

    impl Poller for Worker {
        fn poll(&mut self, _: &mut Turn<'_>) -> Polled {
            self.works.get().into()
        }

        fn rests(&self) -> bool {
            self.rests
        }
    }

    const SPIN: Duration = Duration::from_millis(20);

    #[test]
    fn work_is_a_reason_to_spin_unless_it_rests() {
        for rests in [false, true] {
            let mut reactor = Reactor::new("test", None, IdlePolicy::Adaptive { spin: SPIN }).unwrap();
            let works = Rc::new(std::cell::Cell::new(true));
            let worker = Worker { works: works.clone(), rests };
            reactor.setup(|cx| cx.add_poller("worker", Box::new(worker)));
            let start = reactor.last_work;
            let mut now = start;
            for _ in 0..20 {
                now += SPIN / 10;
                assert!(reactor.turn(now) == Polled::Busy);
            }
            works.set(false);
            assert!(reactor.turn(now) == Polled::Idle);
            assert_eq!(reactor.pause(now), if rests { Pause::Sleep } else { Pause::Spin });
            if !rests {
                assert_eq!(reactor.pause(now + YIELD_AFTER), Pause::Yield);
                assert_eq!(reactor.pause(now + SPIN - Duration::from_nanos(1)), Pause::Yield);
                assert_eq!(reactor.pause(now + SPIN), Pause::Sleep);
            }
        }
    }

    #[test]
    fn a_crowd_sends_to_sleep_at_once_but_not_a_reactor_that_always_polls() {
        let mut reactor = Reactor::new("test", None, IdlePolicy::Adaptive { spin: SPIN }).unwrap();
        let now = reactor.last_work;
        assert_eq!(reactor.pause(now), Pause::Spin);
        let later = now + Duration::from_millis(3);
        reactor.crowd.spun(now, later);
        reactor.last_work = later;
        assert_eq!(reactor.pause(later), Pause::Sleep);
        reactor.handle().set_policy(IdlePolicy::Poll);
        assert_eq!(reactor.pause(later), Pause::Spin);
        assert_eq!(reactor.pause(later + SPIN), Pause::Yield);
    }
}
