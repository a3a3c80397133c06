//! Executing a configuration, one call after the other.

use crate::config::{Call, Config};
use crate::error::RpcError;
use crate::responder::{Outcome, Responder};
use crate::table::{MethodTable, State};
use std::collections::VecDeque;
use std::fmt;
use std::path::PathBuf;
use std::sync::mpsc;

/// What a failed call means for those after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// They are not executed.
    Stop,
    /// They are (`--json-ignore-init-errors`).
    Continue,
}

/// How far a [`Replay`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A call has not been answered yet. Poll again when the control thread has done something else.
    Waiting,
    /// Nothing is left to do.
    Done,
}

/// A call of the configuration that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The file.
    pub path: PathBuf,
    /// The call and its place in the file.
    pub call: Call,
    /// Why.
    pub error: RpcError,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.path.display(), self.call)?;
        // Most messages name the method already.
        if !self.error.message.contains(&self.call.method) {
            write!(f, "{}: ", self.call.method)?;
        }
        f.write_str(&self.error.message)
    }
}

impl std::error::Error for Failure {}

/// Runs the calls of a configuration that belong to one state, each after the one before has been answered; those of
/// a batch as well. The allow-list of the socket does not apply.
///
/// As in SPDK, a call that is possible in both states is executed at start-up and not again: a replay for `Startup`
/// runs what may be called then (and reports unknown methods), one for `Runtime` runs the rest.
#[derive(Debug)]
pub struct Replay {
    path: PathBuf,
    phase: State,
    on_error: OnError,
    calls: VecDeque<Call>,
    current: Option<(Call, mpsc::Receiver<Outcome>)>,
    failures: Vec<Failure>,
}

impl Replay {
    /// Prepares the calls of `config` that belong to `phase`; nothing is executed before [`Replay::poll`].
    pub fn new(config: &Config, phase: State, on_error: OnError) -> Self {
        Self {
            path: config.path.clone(),
            phase,
            on_error,
            calls: config.calls.iter().cloned().collect(),
            current: None,
            failures: Vec::new(),
        }
    }

    /// Executes calls until one defers its answer or none is left. Does not block.
    pub fn poll<C: 'static>(&mut self, table: &MethodTable<C>, cx: &mut C) -> Progress {
        loop {
            if self.current.is_none() && !self.start_next(table, cx) {
                return Progress::Done;
            }
            if !self.finish_current() {
                return Progress::Waiting;
            }
        }
    }

    /// Polls to the end, with `turn` called while an answer is awaited, and returns the failures.
    pub fn run<C: 'static>(
        mut self,
        table: &MethodTable<C>,
        cx: &mut C,
        mut turn: impl FnMut(&mut C),
    ) -> Vec<Failure> {
        while self.poll(table, cx) == Progress::Waiting {
            turn(cx);
        }
        self.failures
    }

    /// The call whose answer is awaited.
    pub fn current(&self) -> Option<&Call> {
        self.current.as_ref().map(|(call, _)| call)
    }

    /// What has failed so far.
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    fn start_next<C: 'static>(&mut self, table: &MethodTable<C>, cx: &mut C) -> bool {
        while let Some(call) = self.calls.pop_front() {
            if !self.belongs_to_phase(&call, table) {
                continue;
            }
            tracing::debug!(method = call.method, at = %call.at, "calling a method of the configuration");
            let (tx, rx) = mpsc::channel();
            // The receiver is gone if the replay was given up; then nobody wants the outcome.
            let responder = Responder::new(&call.method, move |outcome| drop(tx.send(outcome)));
            table.call(cx, &call.method, call.params.as_ref(), responder);
            self.current = Some((call, rx));
            return true;
        }
        false
    }

    fn belongs_to_phase<C: 'static>(&self, call: &Call, table: &MethodTable<C>) -> bool {
        let at_startup = table.states_of(&call.method).is_none_or(|states| states.contains(State::Startup));
        at_startup == (self.phase == State::Startup)
    }

    /// Takes the answer of the current call, if it is there.
    fn finish_current(&mut self) -> bool {
        let Some((call, rx)) = self.current.take() else { return true };
        let outcome = match rx.try_recv() {
            Ok(outcome) => outcome,
            Err(mpsc::TryRecvError::Empty) => {
                self.current = Some((call, rx));
                return false;
            }
            Err(mpsc::TryRecvError::Disconnected) => Err(RpcError::internal("no answer")),
        };
        if let Err(error) = outcome {
            self.failures.push(Failure { path: self.path.clone(), call, error });
            if self.on_error == OnError::Stop {
                self.calls.clear();
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::States;
    use serde::Deserialize;

    #[derive(Default)]
    struct App {
        log: Vec<String>,
        later: Vec<Responder>,
    }

    #[derive(Deserialize)]
    struct Named {
        name: String,
    }

    fn table() -> MethodTable<App> {
        let mut table = MethodTable::new();
        table.method::<Named>("set", States::STARTUP, |app: &mut App, p, r| {
            app.log.push(format!("set {}", p.name));
            r.ok(true);
        });
        table.method::<Named>("both", States::ANY, |app, p, r| {
            app.log.push(format!("both {}", p.name));
            r.ok(true);
        });
        table.method::<Named>("create", States::RUNTIME, |app, p, r| {
            app.log.push(format!("create {}", p.name));
            app.later.push(r);
        });
        table
    }

    const TEXT: &str = r#"{"subsystems": [{"subsystem": "s", "config": [
        {"method": "create", "params": {"name": "a"}},
        {"method": "set", "params": {"name": "b"}},
        [{"method": "create", "params": {"name": "c"}}, {"method": "create", "params": {"nam": "d"}}],
        {"method": "both", "params": {"name": "e"}},
        {"method": "create", "params": {"name": "f"}}
    ]}]}"#;

    #[test]
    fn each_phase_runs_its_calls_once_and_each_answer_is_awaited() {
        let table = table();
        let config = Config::parse(TEXT, "c.json").unwrap();
        let mut app = App::default();
        let failures =
            Replay::new(&config, State::Startup, OnError::Stop).run(&table, &mut app, |_| panic!());
        assert!(failures.is_empty());
        assert_eq!(app.log, ["set b", "both e"]);

        table.set_state(State::Runtime);
        app.log.clear();
        let mut replay = Replay::new(&config, State::Runtime, OnError::Continue);
        assert_eq!(replay.poll(&table, &mut app), Progress::Waiting);
        assert_eq!(replay.poll(&table, &mut app), Progress::Waiting);
        assert_eq!(app.log, ["create a"]);
        assert_eq!(replay.current().unwrap().at.to_string(), "2:9");
        app.later.remove(0).err(RpcError::from_errno(17));
        let failures = replay.run(&table, &mut app, |app| app.later.remove(0).ok("x"));
        assert_eq!(app.log, ["create a", "create c", "create f"]);
        let texts: Vec<String> = failures.iter().map(Failure::to_string).collect();
        assert_eq!(
            texts,
            [
                "c.json:2:9: subsystem 's', entry 1: create: File exists",
                "c.json:4:57: subsystem 's', entry 3: create: unknown parameter 'nam' (did you mean 'name'?); \
                 accepted: name"
            ]
        );
    }

    #[test]
    fn the_first_failure_stops() {
        let table = table();
        table.set_state(State::Runtime);
        let config = Config::parse(TEXT, "c.json").unwrap();
        let mut app = App::default();
        let failures = Replay::new(&config, State::Runtime, OnError::Stop)
            .run(&table, &mut app, |app| app.later.clear());
        assert_eq!(app.log, ["create a"]);
        assert_eq!(failures[0].error.code, -32603);
    }

    #[test]
    fn unknown_methods_fail_at_startup() {
        let config =
            Config::parse(r#"{"subsystems":[{"subsystem":"s","config":[{"method":"x"}]}]}"#, "c").unwrap();
        let run =
            |phase| Replay::new(&config, phase, OnError::Stop).run(&table(), &mut App::default(), |_| {});
        assert_eq!(run(State::Startup)[0].error.code, -32601);
        assert!(run(State::Runtime).is_empty());
    }
}
