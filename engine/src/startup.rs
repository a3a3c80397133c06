//! Start-up: the configuration's calls, before and after the subsystems are initialised.

use std::collections::VecDeque;

use reactor::Turn;
use rpc::{Call, Config, OnError, Progress, Replay, Responder, State};

use crate::app::{App, Error, OnReady};

/// Where start-up is.
pub(crate) struct Startup {
    config: Option<Config>,
    pub(crate) on_error: OnError,
    replay: Option<Replay>,
    /// Calls to be made at run time.
    left: VecDeque<Call>,
    wait_for_rpc: bool,
    /// Initialisation has begun.
    begun: bool,
    /// How many subsystems are initialised, or about to be: those that have something to end.
    pub(crate) initialised: usize,
    /// The last of them is not ready yet.
    waiting: bool,
    /// Callers of `framework_start_init` and `framework_wait_init`.
    waiters: Vec<Responder>,
    on_ready: Option<OnReady>,
    /// The configuration has been carried out.
    is_ready: bool,
}

impl Startup {
    pub(crate) fn new(
        config: Option<Config>,
        ignore_errors: bool,
        wait_for_rpc: bool,
        on_ready: Option<OnReady>,
    ) -> Result<Self, Error> {
        let on_error = if ignore_errors { OnError::Continue } else { OnError::Stop };
        // Without a file there is still the step from start-up to run time to take.
        let first = match &config {
            Some(config) => Replay::new(config, State::Startup, on_error),
            None => {
                let empty = Config::parse(br#"{"subsystems":[]}"#.to_vec(), "none")?;
                Replay::new(&empty, State::Startup, on_error)
            }
        };
        let replay = Some(first);
        let (begun, initialised, waiting, waiters) = (false, 0, false, Vec::new());
        let left = VecDeque::new();
        Ok(Self {
            config,
            on_error,
            replay,
            left,
            wait_for_rpc,
            begun,
            initialised,
            waiting,
            waiters,
            on_ready,
            is_ready: false,
        })
    }

    /// Calls that were not begun.
    pub(crate) fn left(&self) -> impl Iterator<Item = &Call> {
        self.left.iter()
    }

    /// Makes no more calls.
    pub(crate) fn stop(&mut self) {
        self.replay = None;
        self.left.clear();
        self.waiting = false;
    }
}

impl App {
    /// `framework_start_init`.
    pub(crate) fn start_init(&mut self, responder: Responder) {
        self.startup.waiters.push(responder);
        self.later(|app, cx| {
            if !app.startup.begun {
                app.initialise(cx);
            }
        });
    }

    /// `framework_wait_init`.
    pub(crate) fn wait_init(&mut self, responder: Responder) {
        if self.table.state() == State::Runtime && self.startup.replay.is_none() {
            responder.ok(true);
        } else {
            self.startup.waiters.push(responder);
        }
    }

    /// Initialises the subsystems, then runs the run-time part of the configuration.
    fn initialise(&mut self, cx: &mut Turn<'_>) {
        self.startup.begun = true;
        while let Some(subsystem) = self.subsystems.get(self.startup.initialised).cloned() {
            if let Err(e) = subsystem.initialise(self, cx) {
                return self.fail(cx, e);
            }
            self.startup.initialised += 1;
            self.startup.waiting = true;
            if !self.is_initialised(cx) {
                return;
            }
        }
        self.initialised(cx);
    }

    /// Whether the last subsystem that was initialised is ready for the next.
    fn is_initialised(&mut self, cx: &mut Turn<'_>) -> bool {
        let subsystem = self.subsystems[self.startup.initialised - 1].clone();
        match subsystem.initialised(self) {
            Ok(ready) => {
                self.startup.waiting = !ready;
                ready
            }
            Err(e) => {
                self.fail(cx, e);
                false
            }
        }
    }

    fn initialised(&mut self, cx: &mut Turn<'_>) {
        self.table.set_state(State::Runtime);
        self.startup.left = self.startup.config.iter().flat_map(|c| c.calls.iter().cloned()).collect();
        self.next_call(cx);
    }

    /// Begins the next run-time call of the configuration; those that have to wait for a bdev are put off.
    fn next_call(&mut self, cx: &mut Turn<'_>) {
        while let Some(call) = self.startup.left.pop_front() {
            let Some(call) = self.put_off(call) else { continue };
            let path = self.startup.config.as_ref().map(|c| c.path.clone()).unwrap_or_default();
            let one = Config { path, calls: vec![call], ignored: Vec::new() };
            self.startup.replay = Some(Replay::new(&one, State::Runtime, self.startup.on_error));
            return;
        }
        self.ready(cx);
    }

    fn ready(&mut self, cx: &mut Turn<'_>) {
        for waiter in self.startup.waiters.drain(..) {
            waiter.ok(true);
        }
        tracing::info!(cores = self.cpumask.to_hex(), "ready");
        self.startup.is_ready = true;
        for subsystem in self.subsystems.clone() {
            subsystem.ready(self, cx);
        }
        if let Some(on_ready) = self.startup.on_ready.take() {
            on_ready(self, cx);
        }
    }

    /// A bdev is there that was not.
    pub(crate) fn bdev_registered(&mut self, bdev: String) {
        if self.startup.is_ready {
            for subsystem in self.subsystems.clone() {
                subsystem.bdev_registered(self);
            }
        }
        self.bdev_arrived(bdev);
    }

    /// Goes on with the configuration; true while there is something to do.
    pub(crate) fn poll_startup(&mut self, cx: &mut Turn<'_>) -> bool {
        if self.startup.waiting {
            if self.is_initialised(cx) {
                self.initialise(cx);
            }
            return true;
        }
        let Some(mut replay) = self.startup.replay.take() else { return false };
        let table = self.table.clone();
        if replay.poll(&table, self) == Progress::Waiting {
            self.startup.replay = Some(replay);
            return true;
        }
        if self.startup.on_error == OnError::Continue {
            replay.failures().iter().for_each(|failure| tracing::error!("{failure}"));
        }
        if let (Some(failure), OnError::Stop) = (replay.failures().first(), self.startup.on_error) {
            self.fail(cx, Error::Call(failure.to_string()));
        } else if self.table.state() == State::Runtime {
            self.next_call(cx);
        } else if !self.startup.wait_for_rpc {
            self.initialise(cx);
        }
        true
    }
}
