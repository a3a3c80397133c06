//! Shutdown: subsystems end in reverse order, each when the former is done; then the program stops.

use std::rc::Rc;
use std::time::Duration;

use reactor::Turn;

use crate::app::{App, Error};
use crate::subsystem::{ShutdownDone, Subsystem};

/// How long a shutdown waits for requests in flight before it gives them up.
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// How long subsystems may take after that.
const ABORT_TIME: Duration = Duration::from_secs(2);

/// Where shutdown is.
#[derive(Default)]
pub(crate) struct Shutdown {
    phase: Phase,
    /// Those that still run, in order of registration.
    left: Vec<Rc<dyn Subsystem>>,
    /// The one that is ending.
    current: Option<Rc<dyn Subsystem>>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    No,
    Draining,
    Aborted,
}

impl App {
    /// Begins an orderly shutdown; called again, gives up waiting for requests in flight.
    pub fn shutdown(&mut self, cx: &mut Turn<'_>) {
        match self.shutdown.phase {
            Phase::No => {
                tracing::info!("shutting down");
                self.shutdown.phase = Phase::Draining;
                self.startup.stop();
                self.pending.clear();
                self.shutdown.left = self.subsystems[..self.startup.initialised].to_vec();
                cx.after(DRAIN_TIME, |cx| {
                    let handle = cx.handle().clone();
                    Self::send(&handle, Self::abort);
                });
                self.shutdown_next(cx);
            }
            Phase::Draining => self.abort(cx),
            Phase::Aborted => cx.handle().stop(),
        }
    }

    /// True once the program is about to end: nothing new should be begun.
    pub fn shutting_down(&self) -> bool {
        self.shutdown.phase != Phase::No
    }

    /// The former subsystem has ended.
    pub(crate) fn shutdown_next(&mut self, cx: &mut Turn<'_>) {
        let Some(subsystem) = self.shutdown.left.pop() else { return cx.handle().stop() };
        tracing::debug!(subsystem = subsystem.name(), "shutting down");
        self.shutdown.current = Some(subsystem.clone());
        subsystem.shutdown(self, cx, ShutdownDone::new(self.control.clone()));
        if self.shutdown.phase == Phase::Aborted {
            subsystem.abort(self, cx);
        }
    }

    /// Gives up what the subsystems wait for.
    fn abort(&mut self, cx: &mut Turn<'_>) {
        if self.shutdown.phase != Phase::Draining {
            return;
        }
        tracing::warn!("giving up requests in flight");
        self.shutdown.phase = Phase::Aborted;
        if let Some(subsystem) = self.shutdown.current.clone() {
            subsystem.abort(self, cx);
        }
        cx.after(ABORT_TIME, |cx| cx.handle().stop());
    }

    /// Ends the program with an error, in order: what has been set up is taken down.
    pub fn fail(&mut self, cx: &mut Turn<'_>, error: Error) {
        self.failure.get_or_insert(error);
        if !self.shutting_down() {
            self.shutdown(cx);
        }
    }
}
