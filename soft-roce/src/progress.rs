//! The thread that makes progress where the user polls rarely.

use std::io;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use crate::Host;
use crate::engine::Engine;

/// How long the thread sleeps at most. Short, because it does not watch engines that are opened meanwhile.
const NAP: Duration = Duration::from_millis(1);
/// Rounds without work before it sleeps.
const IDLE_ROUNDS: u32 = 50;

/// Starts the thread. It ends when nobody has the host any more.
pub fn start(host: &Arc<Host>) -> io::Result<()> {
    let host = Arc::downgrade(host);
    thread::Builder::new().name("soft-roce".into()).spawn(move || run(&host)).map(drop)
}

fn run(host: &Weak<Host>) {
    let mut idle = 0;
    while let Some(host) = host.upgrade() {
        let (mut busy, engines) = {
            let mut control = host.control();
            (control.turn(), control.engines())
        };
        for engine in &engines {
            busy |= engine.progress();
        }
        idle = if busy { 0 } else { idle + 1 };
        if idle > IDLE_ROUNDS {
            engines.iter().for_each(|engine| engine.prepare_sleep());
            nap(&host, &engines);
        } else {
            thread::yield_now();
        }
    }
}

/// Sleeps until something is to be done or the nap is over.
fn nap(host: &Host, engines: &[Arc<Engine>]) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let control = host.control_fd();
    let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(&control, PollFlags::IN)];
    let sources: Vec<_> = engines.iter().map(|engine| engine.sources()).collect();
    fds.extend(sources.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
    let timeout = Timespec { tv_sec: 0, tv_nsec: NAP.as_nanos() as i64 };
    // Interrupted or failed: then it was a short nap.
    let _ = poll(&mut fds, Some(&timeout));
}
