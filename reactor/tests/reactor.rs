//! Behaviour of a running reactor.

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use reactor::{Handle, IdlePolicy, Polled, Poller, Reactor, Turn};
use test_support::{recv, until, until_some};

const ADAPTIVE: IdlePolicy = IdlePolicy::Adaptive { spin: Duration::from_micros(50) };

fn spawn(policy: IdlePolicy) -> (Handle, std::thread::JoinHandle<()>) {
    let (tx, rx) = mpsc::channel();
    let join = std::thread::spawn(move || {
        let reactor = Reactor::new("test", None, policy).unwrap();
        tx.send(reactor.handle()).unwrap();
        reactor.run();
    });
    (rx.recv().unwrap(), join)
}

/// Sends `f` and waits for its answer.
fn ask<R: Send + 'static>(h: &Handle, f: impl FnOnce(&mut Turn<'_>) -> R + Send + 'static) -> R {
    let (tx, rx) = mpsc::channel();
    h.send(move |cx| tx.send(f(cx)).unwrap());
    recv(&rx)
}

struct Count(Rc<Cell<u64>>, Polled);
impl Poller for Count {
    fn poll(&mut self, _: &mut Turn<'_>) -> Polled {
        self.0.set(self.0.get() + 1);
        self.1
    }
}

#[test]
fn messages_run_in_order_and_wake_a_sleeper() {
    let (h, join) = spawn(ADAPTIVE);
    for round in 0..200 {
        if round % 50 == 0 {
            until("sleep", || h.stats().asleep);
        }
        assert_eq!(ask(&h, move |_| round), round);
    }
    h.stop();
    join.join().unwrap();
}

#[test]
fn messages_to_a_reactor_that_has_ended_are_dropped() {
    let held = std::sync::Arc::new(());
    let (reactor, thread) = spawn(IdlePolicy::Adaptive { spin: Duration::ZERO });
    let senders: Vec<_> = (0..2)
        .map(|_| {
            let (to, held) = (reactor.clone(), held.clone());
            std::thread::spawn(move || {
                for _ in 0..10_000 {
                    // What a message holds is often a handle.
                    let (held, itself) = (held.clone(), to.clone());
                    to.send(move |_| drop((held, itself)));
                }
            })
        })
        .collect();
    reactor.stop();
    thread.join().unwrap();
    senders.into_iter().for_each(|s| s.join().unwrap());
    assert_eq!(std::sync::Arc::strong_count(&held), 1);
}

#[test]
fn adaptive_sleeps_when_idle_and_poll_does_not() {
    let (h, join) = spawn(ADAPTIVE);
    until("sleep", || h.stats().asleep);
    let a = h.stats();
    // Nothing wakes it, so there is nothing to wait for.
    std::thread::sleep(Duration::from_millis(100));
    let b = h.stats();
    assert!(b.asleep && b.turns - a.turns < 50, "{a:?} {b:?}");
    h.set_policy(IdlePolicy::Poll);
    until("turns without work", || h.stats().turns - b.turns > 1000);
    let c = h.stats();
    assert!(!c.asleep && c.sleeps - b.sleeps <= 1, "{b:?} {c:?}");
    assert_eq!(h.policy(), IdlePolicy::Poll);
    h.stop();
    join.join().unwrap();
}

/// Works once in 200 µs, and says so.
struct Pulse {
    next: Instant,
    last: Instant,
    seen: Arc<Seen>,
}

/// Read without a message, which would be work.
#[derive(Default)]
struct Seen {
    /// Times that it worked.
    times: AtomicU64,
    /// The shortest time between two of them, nanoseconds.
    shortest: AtomicU64,
}

impl Poller for Pulse {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        if cx.now < self.next {
            return Polled::Idle;
        }
        self.seen.times.fetch_add(1, Relaxed);
        self.seen.shortest.fetch_min((cx.now - self.last).as_nanos() as u64, Relaxed);
        (self.last, self.next) = (cx.now, cx.now + Duration::from_micros(200));
        Polled::Busy
    }

    fn deadline(&self) -> Option<Instant> {
        Some(self.next)
    }

    fn rests(&self) -> bool {
        true
    }
}

/// That other work keeps the reactor awake is decided by `Reactor::idle` alone, and tested there: seen from outside, a busy
/// machine would send it to sleep, too.
#[test]
fn work_that_rests_keeps_nobody_awake_and_is_done_in_time() {
    let (h, join) = spawn(IdlePolicy::Adaptive { spin: Duration::from_millis(20) });
    let seen = Arc::<Seen>::default();
    let pulse = seen.clone();
    ask(&h, move |cx| {
        let (next, last) = (cx.now, cx.now - Duration::from_secs(1));
        cx.add_poller("pulse", Box::new(Pulse { next, last, seen: pulse }));
    });
    until("work", || seen.times.load(Relaxed) > 0);
    // The message that made it keeps it awake for a while.
    until("rest", || h.stats().asleep);
    seen.shortest.store(u64::MAX, Relaxed);
    let before = h.stats();
    until("many rests", || h.stats().sleeps - before.sleeps > 100);
    let after = h.stats();
    let (turns, sleeps) = (after.turns - before.turns, after.sleeps - before.sleeps);
    assert!(turns < 8 * (sleeps + 1), "{turns} turns, {sleeps} sleeps");
    // Not rounded up to the milliseconds of epoll_wait: else it would never come so soon.
    until("work in time", || seen.shortest.load(Relaxed) < 900_000);
    h.stop();
    join.join().unwrap();
}

/// On a core that others use, too, spinning makes every request wait until they have had their share.
#[test]
fn beside_a_busy_neighbour_it_sleeps_whatever_the_policy_spins() {
    let core = core_affinity::get_core_ids().unwrap()[0];
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let neighbour = {
        let over = over.clone();
        std::thread::spawn(move || {
            core_affinity::set_for_current(core);
            while !over.load(Relaxed) {
                std::hint::spin_loop();
            }
        })
    };
    let (tx, rx) = mpsc::channel();
    let join = std::thread::spawn(move || {
        let spin = Duration::from_secs(1000);
        let reactor = Reactor::new("test", Some(core.id), IdlePolicy::Adaptive { spin }).unwrap();
        tx.send(reactor.handle()).unwrap();
        reactor.run();
    });
    let h = recv(&rx);
    for _ in 0..5 {
        ask(&h, |_| ());
        until("sleep", || h.stats().asleep);
    }
    over.store(true, Relaxed);
    neighbour.join().unwrap();
    h.stop();
    join.join().unwrap();
}

#[test]
fn timers_fire_once_in_order_even_from_sleep() {
    let (h, join) = spawn(ADAPTIVE);
    let (tx, rx) = mpsc::channel();
    let began = Instant::now();
    h.send(move |cx| {
        for ms in [30u64, 10, 20] {
            let tx = tx.clone();
            cx.after(Duration::from_millis(ms), move |_| tx.send(ms).unwrap());
        }
        let cancelled = cx.after(Duration::from_millis(15), |_| panic!("cancelled timer ran"));
        assert!(cx.cancel(cancelled));
        assert!(!cx.cancel(cancelled));
    });
    let got: Vec<u64> = (0..3).map(|_| recv(&rx)).collect();
    assert_eq!(got, [10, 20, 30]);
    assert!(began.elapsed() >= Duration::from_millis(30), "never early");
    h.stop();
    join.join().unwrap();
}

#[test]
fn busy_and_timed_pollers_are_counted_and_removed() {
    let began = Instant::now();
    let (h, join) = spawn(ADAPTIVE);
    let (busy, timed) = ask(&h, |cx| {
        let n = Rc::new(Cell::new(0));
        cx.set_local(n.clone());
        let busy = cx.add_poller("busy", Box::new(Count(n.clone(), Polled::Busy)));
        (busy, cx.add_timed_poller("timed", Duration::from_millis(10), Box::new(Count(n, Polled::Idle))))
    });
    let stats = until_some("both at work", || {
        let stats = ask(&h, |cx| cx.poller_stats().to_vec());
        (stats[0].busy_count > 100 && stats[1].run_count > 2).then_some(stats)
    });
    assert_eq!(stats[0].busy_count, stats[0].run_count, "{stats:?}");
    // Never early.
    let most = began.elapsed().as_millis() as u64 / 10 + 1;
    assert!((1..=most).contains(&stats[1].run_count) && stats[1].period_ns == Some(10_000_000), "{stats:?}");
    assert!(h.stats().busy_ns > 0);
    ask(&h, move |cx| {
        cx.remove_poller(busy);
        cx.remove_poller(timed);
    });
    // Removal takes effect at the end of a turn; both messages may have met in one.
    let left = |h: &Handle| {
        ask(h, |cx| (cx.poller_stats().len(), Rc::strong_count(&cx.local::<Cell<u64>>().unwrap())))
    };
    until("removal", || left(&h) == (0, 2));
    h.stop();
    join.join().unwrap();
}

/// A poller that owns an eventfd: the reactor must sleep on it and wake for it.
struct Drain(Rc<std::os::fd::OwnedFd>, mpsc::Sender<()>);
impl Poller for Drain {
    fn poll(&mut self, _: &mut Turn<'_>) -> Polled {
        let got = rustix::io::read(&*self.0, &mut [0u8; 8]).is_ok();
        if got {
            self.1.send(()).unwrap();
        }
        got.into()
    }
}

#[test]
fn a_watched_descriptor_wakes_the_reactor() {
    let (h, join) = spawn(ADAPTIVE);
    let (tx, rx) = mpsc::channel();
    let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let writer = fd.try_clone().unwrap();
    ask(&h, move |cx| {
        cx.watch(fd.as_raw_fd()).unwrap();
        cx.add_poller("drain", Box::new(Drain(Rc::new(fd), tx)));
    });
    until("sleep", || h.stats().asleep);
    rustix::io::write(&writer, &1u64.to_ne_bytes()).unwrap();
    recv(&rx);
    h.stop();
    join.join().unwrap();
}

#[test]
fn a_core_that_is_not_there_is_refused_in_words() {
    let e = Reactor::new("x", Some(1000), IdlePolicy::Poll).err().unwrap().to_string();
    assert!(e.contains("core 1000") && e.contains("-m"), "{e}");
}
