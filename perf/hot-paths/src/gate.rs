//! Holding a reactor back, so that what comes meanwhile is found all at once.

use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use reactor::Handle;

/// The reactor waits while this is there.
pub struct Gate(#[expect(dead_code, reason = "dropping it is what counts")] Sender<()>);

impl Gate {
    /// Returns when the reactor waits.
    pub fn close(reactor: &Handle) -> Self {
        let (open, opened) = mpsc::channel::<()>();
        let (tx, waits) = mpsc::channel();
        reactor.send(move |_| {
            let _ = tx.send(());
            let _ = opened.recv();
        });
        waits.recv().expect("the reactor runs");
        Self(open)
    }
}

/// Waits until the reactor sleeps with nothing left to do.
pub fn settle(reactor: &Handle) {
    let (begin, patience) = (Instant::now(), test_support::patience());
    let mut quiet = 0;
    let mut sleeps = 0;
    // A reactor that has just been called may not have heard it: it must be found asleep, of the same sleep, twice.
    while quiet < 2 {
        std::thread::sleep(Duration::from_micros(200));
        assert!(begin.elapsed() < patience, "the reactor does not come to rest");
        let stats = reactor.stats();
        quiet = if stats.asleep && stats.sleeps == sleeps { quiet + 1 } else { 0 };
        sleeps = stats.sleeps;
    }
}
