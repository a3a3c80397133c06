//! A worker as a poller of its reactor.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use reactor::{Polled, Poller, Turn};

use super::super::queue::Queue;
use super::super::record::Sample;
use super::{Phase, Said, Say, Worker};

/// Empty samples that the control thread gives back to the workers of a reactor.
#[derive(Default)]
#[expect(clippy::vec_box, reason = "samples travel between threads in their boxes")]
pub(in super::super) struct Spares(RefCell<Vec<Box<Sample>>>);

impl Spares {
    /// On the reactor of the sample's worker.
    pub fn give_back(cx: &Turn<'_>, sample: Box<Sample>) {
        if let Some(spares) = cx.local::<Self>() {
            spares.0.borrow_mut().push(sample);
        }
    }

    pub(super) fn take(cx: &Turn<'_>, worker: usize) -> Option<Box<Sample>> {
        let spares = cx.local::<Self>()?;
        let mut list = spares.0.borrow_mut();
        let at = list.iter().position(|s| s.worker == worker)?;
        Some(list.swap_remove(at))
    }
}

/// Rounds in one turn of the reactor, as long as the device has something at once: with one request in flight on a device that
/// is done before it is asked, the reactor's own turn would be most of what is measured.
const ROUNDS: usize = 8;

/// A worker on its reactor. Once it is done, an empty shell.
pub(in super::super) struct Runner<Q> {
    worker: Option<Worker<Q>>,
    say: Say,
}

impl<Q: Queue> Runner<Q> {
    /// Adds a worker to the reactor.
    ///
    /// # Errors
    /// The descriptor of the device cannot be waited for.
    pub fn start(cx: &mut Turn<'_>, worker: Worker<Q>, say: Say) -> rustix::io::Result<()> {
        if let Some(fd) = worker.queue.wait_fd() {
            cx.watch(fd)?;
        }
        if cx.local::<Spares>().is_none() {
            cx.set_local(Rc::new(Spares::default()));
        }
        cx.add_poller("perf", Box::new(Self { worker: Some(worker), say }));
        Ok(())
    }

    /// The device goes before the control thread hears of it, which may take it down then.
    #[cold]
    fn finish(&mut self, cx: &mut Turn<'_>) {
        let Some(Worker { queue, outcome, .. }) = self.worker.take() else { return };
        if let Some(fd) = queue.wait_fd() {
            cx.unwatch(fd);
        }
        drop(queue);
        (self.say)(Said::Done(Box::new(outcome)));
    }
}

impl<Q: Queue> Poller for Runner<Q> {
    fn poll(&mut self, cx: &mut Turn<'_>) -> Polled {
        let mut busy = false;
        for _ in 0..ROUNDS {
            let Some(worker) = &mut self.worker else { break };
            let found = worker.turn(cx, &self.say);
            let more = found && worker.queue.ready();
            busy |= found;
            if worker.is_over() {
                self.finish(cx);
            } else if !more {
                break;
            }
        }
        busy.into()
    }

    fn before_sleep(&mut self, _: &mut Turn<'_>) -> Polled {
        let Some(worker) = &self.worker else { return Polled::Idle };
        let began_last_pass = worker.phase == Phase::LastPass && worker.inflight == 0;
        (worker.queue.ready() || began_last_pass).into()
    }

    fn deadline(&self) -> Option<Instant> {
        self.worker.as_ref()?.deadline()
    }
}
