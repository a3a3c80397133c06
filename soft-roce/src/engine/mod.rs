//! The data path: one engine per completion queue, with sockets of its own, run by whoever polls the queue.
//!
//! A turn: messages from control → packets that wait to be sent → packets that have come, each checked (addresses,
//! ICRC) before its queue pair sees it → timers → what has become possible to send. Nothing is kept across turns but
//! the state machines: data go from registered memory to the socket and from the socket to registered memory.

mod completions;
mod entry;
mod place;
mod qps;
mod slots;
mod table;
mod transmit;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use roce_proto::cm::{Attributes, ConnId};
use roce_proto::{Counter, Counters, Nanos, rc};
use rustix::event::epoll;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use verbs::Wc;

use crate::clock::now;
use crate::exclusive::{Exclusive, Guard};
use crate::faults::Weather;
use crate::mailbox::Mailbox;
use crate::port::{Port, Sockets};
use crate::shared::{MAX_NOTICES, Notice};
use crate::udp::{Receiver, SLOT_MASK, sys};
use completions::Completions;
pub use entry::Entry;
pub use qps::{Qps, verify_once};
use transmit::Batch;

/// Batches of datagrams per turn at most, so that a flood does not keep the thread.
const MAX_BATCHES: usize = 4;
/// Batches at most that a new engine throws away; what comes later finds no queue pair either.
const MAX_STALE_BATCHES: usize = 64;
/// Packets for an engine that came in elsewhere and wait at most.
const MAX_STRAYS: usize = 1024;
/// When to try again after the system had no room for a packet.
const BUSY_PAUSE: Nanos = 100_000;

/// Messages to an engine.
pub enum Mail {
    /// A new queue pair.
    Add(Box<Entry>),
    /// It is to receive, and may send.
    Connect { attrs: Attributes, config: rc::Config },
    /// It is to break.
    Fail { qpn: u32 },
    /// A packet that came in on another socket.
    Stray(Stray),
}

/// See [`Mail::Stray`].
pub struct Stray {
    pub bytes: Box<[u8]>,
    pub from: Source,
}

/// How to reach an engine.
pub type EngineMailbox = Mailbox<Mail>;

/// Where a packet came from.
#[derive(Clone, Copy)]
pub struct Source {
    pub src: IpAddr,
    pub src_port: u16,
    /// Our address that it was sent to.
    pub dst: IpAddr,
    /// Its place in what the kernel has merged.
    pub index: u16,
}

/// What an engine is made of.
pub struct Parts {
    pub port: Arc<Port>,
    pub slot: u8,
    pub entries: u32,
}

/// See the module.
pub struct Engine {
    port: Arc<Port>,
    slot: u8,
    entries: u32,
    mailbox: Arc<EngineMailbox>,
    counters: Counters,
    core: Exclusive<Core>,
    /// Readable when a turn is worth taking.
    sources: OwnedFd,
    /// Readable when a completion came after arming. A copy, to be had without entering the core.
    bell: OwnedFd,
    timer: OwnedFd,
}

/// What is used in turns.
pub struct Core {
    sockets: Option<Box<Sockets>>,
    pub qps: Qps,
    batch: Batch,
    /// The system had no room for packets.
    busy: bool,
    sleep: Sleep,
}

/// Whether the user will come back by itself.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sleep {
    /// It polls.
    Awake,
    /// It has armed the queue, and will poll once more.
    Armed,
    /// It has done so; if that found nothing it sleeps.
    Asleep,
}

impl Engine {
    /// # Errors
    /// Out of file descriptors; gives the sockets back.
    pub fn new(parts: Parts, mut sockets: Box<Sockets>) -> Result<Arc<Self>, (io::Error, Box<Sockets>)> {
        let Parts { port, slot, entries } = parts;
        // What came for an earlier user of the socket is nobody's.
        for _ in 0..MAX_STALE_BATCHES {
            if !sockets.rx.receive().is_ok_and(|(n, _)| n > 0) {
                break;
            }
        }
        let weather = port.shared.options.faults.map(|faults| Weather::new(faults, u64::from(slot)));
        match Fds::open(&sockets.rx, entries, port.shared.options.progress_thread) {
            Ok(Fds { mailbox, completions, sources, bell, timer }) => Ok(Arc::new(Self {
                port,
                slot,
                entries,
                mailbox: Arc::new(mailbox),
                counters: Counters::default(),
                core: Exclusive::new(Core {
                    sockets: Some(sockets),
                    qps: Qps::new(completions, weather),
                    batch: Batch::new(),
                    busy: false,
                    sleep: Sleep::Awake,
                }),
                sources,
                bell,
                timer,
            })),
            Err(e) => Err((e, sockets)),
        }
    }

    pub fn port(&self) -> &Arc<Port> {
        &self.port
    }

    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// Entries of the completion queue.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    pub fn mailbox(&self) -> &Arc<EngineMailbox> {
        &self.mailbox
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Access to queue pairs and completions, up to date with what control has sent.
    pub fn enter(&self) -> Guard<'_, Core> {
        let mut core = self.core.enter();
        core.take_mail(self);
        core
    }

    /// For [`crate::SoftRoce::inject`].
    #[cfg(fuzzing)]
    pub fn inject(&self, datagram: &crate::udp::Datagram<'_>) {
        self.enter().qps.datagram(self, datagram, now());
    }

    /// Takes a queue pair out, after it has acknowledged what it received.
    pub fn remove(&self, qpn: u32) {
        let mut core = self.enter();
        core.qps.last_words(qpn);
        core.transmit(self, now());
        core.qps.remove(qpn);
    }

    /// Takes a turn and moves completions to `out`.
    ///
    /// # Errors
    /// The socket failed, or completions were lost: EOVERFLOW.
    pub fn poll(&self, out: &mut [Wc]) -> io::Result<usize> {
        let mut core = self.core.enter();
        core.turn(self)?;
        let completions = &mut core.qps.completions;
        if completions.is_overrun() && completions.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::EOVERFLOW));
        }
        Ok(completions.take(out))
    }

    /// Takes a turn for somebody who does not poll. True: there was something to do.
    pub fn progress(&self) -> bool {
        self.core.enter().turn(self).unwrap_or(false)
    }

    /// Readable from now on only when a turn has something to do: sends what must not wait, sets the timer. Take a
    /// turn after it, and sleep only if that found nothing.
    pub fn prepare_sleep(&self) {
        self.core.enter().prepare_sleep(self);
    }

    /// As [`Engine::prepare_sleep`], and asks for a sign of the next completion.
    pub fn arm(&self) {
        let mut core = self.core.enter();
        core.qps.completions.arm();
        core.prepare_sleep(self);
    }

    /// For [`Engine::prepare_sleep`].
    pub fn sources(&self) -> BorrowedFd<'_> {
        self.sources.as_fd()
    }

    /// For [`Engine::arm`]: the first completion's sign where somebody else takes the turns, else whatever may lead to
    /// one.
    pub fn wait_fd(&self) -> BorrowedFd<'_> {
        if self.port.shared.options.progress_thread { self.bell.as_fd() } else { self.sources.as_fd() }
    }

    /// Passes a packet of connection management on to control.
    fn pass_mad(&self, from: &Source, udp: &[u8]) {
        self.port.shared.notices.push_below(MAX_NOTICES, Notice::Mad { from: *from, udp: udp.into() });
    }

    /// Passes a packet for another engine's queue pair on.
    fn pass_on(&self, qpn: u32, from: &Source, udp: &[u8]) -> Result<(), Counter> {
        let shared = &self.port.shared;
        let Some(mailbox) = shared.engine_of(qpn) else {
            // A process that has all addresses counts its slots for itself.
            if qpn & SLOT_MASK == u32::from(self.slot) && self.port.ip.is_unspecified() {
                return Err(Counter::UnknownQpn);
            }
            // Another process' slot, perhaps.
            let foreign = Notice::Foreign { port: self.port.ip, from: *from, udp: udp.into() };
            shared.notices.push_below(MAX_NOTICES, foreign);
            return Ok(());
        };
        // Its number, but not here: it has just been removed.
        if Arc::ptr_eq(&mailbox, &self.mailbox) {
            return Err(Counter::UnknownQpn);
        }
        mailbox.push_below(MAX_STRAYS, Mail::Stray(Stray { bytes: udp.into(), from: *from }));
        Ok(())
    }

    /// Control is to know that the peer of `conn` is there.
    fn heard(&self, conn: ConnId) {
        self.port.shared.notices.push(Notice::Heard(conn));
    }
}

impl Core {
    fn take_mail(&mut self, engine: &Engine) {
        let Some(sockets) = &self.sockets else { return };
        if !engine.mailbox.check() {
            return;
        }
        let now = now();
        for n in 0.. {
            // Strays can come as fast as this takes them.
            if n == 2 * MAX_STRAYS {
                engine.mailbox.later();
                break;
            }
            let Some(mail) = engine.mailbox.pop() else { break };
            self.qps.mail(engine, mail, sockets.tx.port(), now);
        }
    }

    /// Something was queued: nobody may come to send it.
    pub fn posted(&self, engine: &Engine) {
        if self.sleep != Sleep::Awake {
            engine.mailbox.wake();
        }
    }

    fn turn(&mut self, engine: &Engine) -> io::Result<bool> {
        let checked = self.sleep == Sleep::Armed;
        self.sleep = if checked { Sleep::Asleep } else { Sleep::Awake };
        let busy = self.work(engine)?;
        // The last look before sleep may have changed what was prepared for it.
        if checked {
            self.finish_and_set_timer(engine);
        }
        Ok(busy)
    }

    fn work(&mut self, engine: &Engine) -> io::Result<bool> {
        let now = now();
        self.take_mail(engine);
        self.transmit(engine, now);
        let failing = self.qps.failing();
        let received = self.receive(engine, now)?;
        self.qps.break_failing(failing);
        let due = self.qps.timers(engine, now);
        self.transmit(engine, now);
        Ok(received || due || failing > 0)
    }

    fn receive(&mut self, engine: &Engine, now: Nanos) -> io::Result<bool> {
        let mut any = false;
        for _ in 0..MAX_BATCHES {
            let Some(sockets) = &mut self.sockets else { break };
            let (n, dropped) = sockets.rx.receive()?;
            if dropped > 0 {
                engine.counters.add(Counter::RxOverflow, u64::from(dropped));
            }
            if n == 0 {
                break;
            }
            any = true;
            // What has come may be the answer to what control did since the turn began.
            self.take_mail(engine);
            let Some(sockets) = &self.sockets else { break };
            for datagram in (0..n).filter_map(|i| sockets.rx.datagram(i)) {
                self.qps.datagram(engine, &datagram, now);
            }
            if !Receiver::is_full(n) {
                break;
            }
        }
        Ok(any)
    }

    fn transmit(&mut self, engine: &Engine, now: Nanos) {
        let Some(sockets) = &mut self.sockets else { return };
        if self.qps.has_active() {
            self.busy = self.batch.transmit(engine, &mut self.qps, &mut sockets.tx, now);
        }
    }

    fn prepare_sleep(&mut self, engine: &Engine) {
        engine.mailbox.quiet();
        sys::drain(engine.timer.as_fd());
        self.take_mail(engine);
        self.sleep = Sleep::Armed;
        self.finish_and_set_timer(engine);
    }

    /// Leaves nothing undone that could be done now, and has the timer wake for the rest.
    fn finish_and_set_timer(&mut self, engine: &Engine) {
        let now = now();
        self.qps.flush_acks();
        self.transmit(engine, now);
        let mut at = self.qps.exact_deadline();
        if self.busy {
            at = now + BUSY_PAUSE;
        }
        // The turn was not enough for all.
        if self.qps.failing() > 0 || (self.qps.has_active() && !self.busy) {
            at = now;
        }
        set_timer(&engine.timer, at);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // No queue pair is left: each holds an `Arc`.
        if let Some(sockets) = self.core.get_mut().sockets.take() {
            self.port.close_engine(self.slot, sockets, &self.counters);
        }
    }
}

struct Fds {
    mailbox: EngineMailbox,
    completions: Completions,
    sources: OwnedFd,
    bell: OwnedFd,
    timer: OwnedFd,
}

impl Fds {
    fn open(rx: &Receiver, entries: u32, progress_thread: bool) -> io::Result<Self> {
        let mailbox = EngineMailbox::new()?;
        let completions = Completions::new(entries)?;
        let bell = completions.fd().try_clone_to_owned()?;
        let timer = new_timer()?;
        let sources = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [rx.fd(), mailbox.fd(), timer.as_fd()] {
            epoll::add(&sources, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        if !progress_thread {
            epoll::add(&sources, &bell, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self { mailbox, completions, sources, bell, timer })
    }
}

/// A timer descriptor for [`set_timer`].
pub fn new_timer() -> io::Result<OwnedFd> {
    Ok(timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?)
}

/// Lets `timer` become readable at `at`; never for [`Nanos::MAX`].
pub fn set_timer(timer: &OwnedFd, at: Nanos) {
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let at = if at == Nanos::MAX {
        zero
    } else {
        // Zero would mean never.
        let at = at.max(1);
        Timespec { tv_sec: (at / 1_000_000_000) as i64, tv_nsec: (at % 1_000_000_000) as i64 }
    };
    let spec = Itimerspec { it_interval: zero, it_value: at };
    if let Err(error) = timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &spec) {
        tracing::error!(%error, "timerfd_settime");
    }
}
