//! One round: two sockets, two threads, and what they share.

use std::net::UdpSocket;
use std::ops::Sub;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

use core_affinity::CoreId;

use crate::args::Options;
use crate::report::Round;
use crate::{client, server, socket};

/// What both threads are doing. They only go forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Exchanges that do not count.
    WarmUp,
    /// Exchanges that count.
    Measure,
    /// The threads end.
    Over,
}

/// Which phase it is, for both threads. Read every turn, written twice: the cache line stays shared.
#[derive(Debug, Default)]
pub struct Progress(AtomicU8);

impl Progress {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        // Relaxed: nothing else is handed over by it.
        match self.0.load(Ordering::Relaxed) {
            0 => Phase::WarmUp,
            1 => Phase::Measure,
            _ => Phase::Over,
        }
    }

    /// Enters `phase`, unless a later one has been entered.
    pub fn enter(&self, phase: Phase) {
        self.0.fetch_max(phase as u8, Ordering::Relaxed);
    }
}

/// CPU time of a thread, `getrusage(2)`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// In the program.
    pub user: Duration,
    /// In the kernel.
    pub system: Duration,
    /// How often other work took the core away.
    pub preempted: u64,
}

impl Usage {
    /// Of the calling thread since it began.
    pub fn of_this_thread() -> Self {
        // SAFETY: integers only; all zero is a valid value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure, which lives across the call.
        let rc = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
        assert_eq!(rc, 0, "getrusage(2) fails only for a bad pointer or an unknown `who`");
        let time =
            |t: libc::timeval| Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64);
        Self { user: time(usage.ru_utime), system: time(usage.ru_stime), preempted: usage.ru_nivcsw as u64 }
    }
}

impl Sub for Usage {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            // The kernel's split into user and system time is an estimate that may go back a little.
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
            preempted: self.preempted - before.preempted,
        }
    }
}

/// Measures one round with sockets of its own.
pub fn round(options: &Options) -> Result<Round, String> {
    let depth = options.depth as usize;
    let answering = socket::open(options.address, depth * options.request, options.gso)?;
    let asking = socket::open(options.address, depth * options.reply, options.gso)?;
    let receive_buffer = socket::receive_buffer(&asking).map_err(|e| format!("SO_RCVBUF: {e}"))?;
    let (asked, served) = both(options, &asking, &answering)?;
    Ok(Round::new(&asked, &served, receive_buffer))
}

/// Runs the two threads to their end.
fn both(
    options: &Options,
    asking: &UdpSocket,
    answering: &UdpSocket,
) -> Result<(client::Asked, server::Served), String> {
    let address = socket::address(answering).map_err(|e| format!("getsockname: {e}"))?;
    let progress = Progress::default();
    let (asked, served) = thread::scope(|scope| {
        let served = scope.spawn(|| {
            let served = pin("--server-core", options.server_core)
                .and_then(|()| server::serve(options, answering, &progress));
            progress.enter(Phase::Over);
            served
        });
        let asked = scope.spawn(|| {
            let asked = pin("--client-core", options.client_core)
                .and_then(|()| client::ask(options, asking, address, &progress));
            progress.enter(Phase::Over);
            asked
        });
        (asked.join(), served.join())
    });
    let panicked = |_| "a thread panicked, see above".to_owned();
    // The server's error first: the client then only stopped early.
    let served = served.map_err(panicked)??;
    Ok((asked.map_err(panicked)??, served))
}

/// Ties the calling thread to `core`, if one is given.
fn pin(option: &str, core: Option<usize>) -> Result<(), String> {
    let Some(core) = core else { return Ok(()) };
    let usable: Vec<usize> = core_affinity::get_core_ids().unwrap_or_default().iter().map(|c| c.id).collect();
    if usable.contains(&core) && core_affinity::set_for_current(CoreId { id: core }) {
        return Ok(());
    }
    Err(format!("{option} {core}: this process may use cores {usable:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::tests::short;

    /// A short run: exchanges happened, each of the packets and bytes that were asked for.
    #[track_caller]
    fn check(options: &Options) {
        // A side that is held up for long is taken for a loss, and what it says later is ignored. In the warm-up only
        // the latter is counted: such a run is made again.
        let (asked, served) = test_support::until_some("a run without a stall", || {
            let bytes = [options.request, options.reply].map(|bytes| options.depth as usize * bytes);
            let sockets = bytes.map(|bytes| {
                socket::open(options.address, bytes, options.gso).expect("a socket on loopback")
            });
            let (asked, served) = both(options, &sockets[1], &sockets[0]).expect("a run");
            (asked.exchanges > 0 && (asked.lost > 0 || asked.ignored == 0)).then_some((asked, served))
        });
        assert!(served.requests > 0, "{served:?}");
        assert!(asked.elapsed >= options.duration());
        assert_eq!(asked.latency.len(), asked.exchanges);
        // Exchanges that the round's ends or a loss cut in two have only some of their packets in it.
        let whole = asked.exchanges * options.packets() as u64;
        let cut = (u64::from(options.depth) + asked.lost) * options.packets() as u64;
        assert!(asked.packets + cut >= whole && asked.packets <= whole + cut, "{asked:?}");
        let (whole, cut) = (asked.exchanges * options.reply as u64, cut * options.mtu as u64);
        assert!(asked.bytes + cut >= whole && asked.bytes <= whole + cut, "{asked:?}");
    }

    #[test]
    fn one_packet_at_depth_one() {
        check(&short(1, 4140, true));
    }

    #[test]
    fn one_packet_at_depth_32() {
        check(&short(32, 4140, true));
    }

    #[test]
    fn replies_of_many_packets_with_a_short_last_one() {
        check(&short(4, 131072, true));
    }

    #[test]
    fn without_segmentation_offload() {
        check(&short(4, 131072, false));
    }

    #[test]
    fn ipv6() {
        let options = Options { address: std::net::Ipv6Addr::LOCALHOST.into(), ..short(4, 10000, true) };
        if UdpSocket::bind((options.address, 0)).is_err() {
            eprintln!("skipped: this host has no ::1");
            return;
        }
        check(&options);
    }

    #[test]
    fn a_server_that_fails_ends_the_run_with_its_reason() {
        let options = Options { server_core: Some(1 << 20), ..short(1, 4140, true) };
        let error = round(&options).expect_err("no such core");
        assert!(error.starts_with("--server-core 1048576: this process may use cores ["), "{error}");
    }

    #[test]
    fn an_unanswered_exchange_is_begun_anew_and_counted() {
        let options = short(2, 4140, true);
        let [silent, asking] = [100, 4140].map(|n| socket::open(options.address, n, true).expect("a socket"));
        let to = socket::address(&silent).expect("its address");
        let asked = client::ask(&options, &asking, to, &Progress::default()).expect("a run");
        assert_eq!((asked.exchanges, asked.packets), (0, 0));
        // Of two exchanges, one try each per 50 to 60 ms of 200 ms, fewer on a busy machine.
        assert!((2..=8).contains(&asked.lost), "{asked:?}");
    }

    #[test]
    fn phases_only_go_forward() {
        let progress = Progress::default();
        assert_eq!(progress.phase(), Phase::WarmUp);
        progress.enter(Phase::Over);
        progress.enter(Phase::Measure);
        assert_eq!(progress.phase(), Phase::Over);
    }
}
