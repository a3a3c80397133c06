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

/// How the program is asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// By somebody who can ask again: SIGINT, SIGTERM, an RPC.
    Once,
    /// The terminal is gone (SIGHUP). That may come more than once, and nobody insists.
    HangUp,
}

/// Where shutdown is.
#[derive(Default)]
pub(crate) struct Shutdown {
    phase: Phase,
    /// Those that still run, in order of registration.
    left: Vec<Rc<dyn Subsystem>>,
    /// The one that is ending.
    current: Option<Rc<dyn Subsystem>>,
    /// An end was asked for and refused: whoever asks again insists.
    refused: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    No,
    Draining,
    Aborted,
}

impl App {
    /// Ends the program, unless that would take a device away from somebody on this host who uses it: then it says who that
    /// is, and goes on until it is asked again. Asked during the shutdown, gives up waiting for requests in flight.
    pub fn end(&mut self, cx: &mut Turn<'_>, ask: Ask) {
        if self.shutting_down() {
            return if ask == Ask::Once {
                self.shutdown(cx)
            };
        }
        let subsystems = self.subsystems[..self.startup.initialised].iter();
        let in_use = subsystems.flat_map(|s| s.in_use(self));
        let lost: Vec<String> =
            in_use.filter(|u| !(u.kept && self.keeps_devices())).map(|u| u.text).collect();
        let insists = ask == Ask::Once && self.shutdown.refused;
        if lost.is_empty() || insists {
            return self.shutdown(cx);
        }
        self.shutdown.refused |= ask == Ask::Once;
        match self.on_refusal {
            Some(tell) => tell(&lost),
            None => tracing::warn!(
                "not ended: {}; end that use first, or ask again: then the device goes, and its users get I/O errors",
                lost.join("; ")
            ),
        }
    }

    /// Devices in use outlive the program where they can, for its next run.
    pub fn keeps_devices(&self) -> bool {
        self.on_refusal.is_none()
    }

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
        self.subsystems.iter().for_each(|subsystem| subsystem.giving_up());
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
