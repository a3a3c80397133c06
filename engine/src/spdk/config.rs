//! SPDK's own configuration: loaded as `spdk_tgt` loads it, and saved.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bdev::spdk::{self, Init, States, states_of};
use rpc::{Call, Config, ConfigError, OnError, RpcError};
use serde_json::{Value, json};

use super::calls::{Answer, Caller, NVME_OPTIONS};
use super::state::{Running, State};

/// Waits until SPDK's modules have looked at all bdevs: the last call of every saved configuration.
pub(super) const WAIT: &str = "bdev_wait_for_examine";

/// How long the start waits for that. A large store that was not closed takes a minute; a device that hangs takes for ever,
/// and must not keep the others from being served.
const EXAMINE_TIME: Duration = Duration::from_secs(120);

/// How often a call without an answer is mentioned.
const MENTION: Duration = Duration::from_secs(10);

/// SPDK's start: start-up calls of its configuration, the initialisation of its subsystems, the other calls. One call after
/// the other, as `spdk_tgt` does it; the control thread goes on meanwhile.
pub(super) struct Loading {
    config: Option<Config>,
    on_error: OnError,
    step: Step,
    /// Calls that this step has not looked at yet.
    left: VecDeque<Call>,
    sent: Option<Sent>,
    passed_over: BTreeSet<String>,
    /// SPDK's modules did not come to an end with some bdev.
    hung: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Startup,
    Flushes,
    Init,
    Runtime,
    Examine,
    Offer,
}

/// The call whose answer is awaited.
struct Sent {
    id: u64,
    method: String,
    /// In the configuration; `None` for one of this program's.
    place: Option<String>,
    since: Instant,
    mentioned: Instant,
}

impl Loading {
    pub(super) fn new(config: Option<Config>, on_error: OnError) -> Self {
        let left = config.iter().flat_map(|c| c.calls.iter().cloned()).collect();
        let (step, sent, passed_over, hung) = (Step::Startup, None, BTreeSet::new(), false);
        Self { config, on_error, step, left, sent, passed_over, hung }
    }

    /// Goes on; true when everything is done.
    ///
    /// # Errors
    /// A call failed, or the initialisation.
    pub(super) fn advance(&mut self, running: &mut Running) -> Result<bool, RpcError> {
        loop {
            if let Some(sent) = &mut self.sent {
                match running.take_answer(sent.id) {
                    Some(answer) => self.answered(answer)?,
                    None if sent.method == WAIT && sent.since.elapsed() >= EXAMINE_TIME => {
                        self.give_up_waiting()
                    }
                    None => {
                        sent.mention();
                        return Ok(false);
                    }
                }
            }
            match self.step {
                Step::Startup | Step::Runtime => self.next_call(running)?,
                Step::Flushes => self.flush_nvme(running),
                Step::Init => {
                    if running.runtime.init_state() == Init::Not {
                        running.runtime.begin_init();
                    }
                    let done = running.runtime.initialised();
                    if !done.map_err(|e| RpcError::internal(e.to_string()))? {
                        return Ok(false);
                    }
                    self.left = self.config.iter().flat_map(|c| c.calls.iter().cloned()).collect();
                    self.step = Step::Runtime;
                }
                // Whatever the initialisation found, and what was found on that.
                Step::Examine => {
                    self.step = Step::Offer;
                    if !self.hung {
                        self.send(running, WAIT, None, None);
                    }
                }
                Step::Offer => return Ok(!running.offers()),
            }
        }
    }

    fn next_call(&mut self, running: &mut Running) -> Result<(), RpcError> {
        let startup = self.step == Step::Startup;
        let Some(call) = self.left.pop_front() else {
            self.step = if startup { Step::Flushes } else { Step::Examine };
            if startup {
                self.tell_passed_over();
            }
            return Ok(());
        };
        match states_of(&call.method) {
            Some(states) if belongs(states, startup) => {
                let place = Some(self.place(&call));
                self.send(running, &call.method, call.params.as_ref(), place);
            }
            Some(_) => {}
            None => self.unknown(running, &call)?,
        }
        Ok(())
    }

    /// As in SPDK, calls of subsystems that are not linked are passed over: a configuration of `spdk_tgt` has many that are
    /// nothing to a program that wants bdevs. Those of a subsystem that is linked are mistakes.
    fn unknown(&mut self, running: &Running, call: &Call) -> Result<(), RpcError> {
        if running.runtime.has_subsystem(&call.subsystem) && self.step == Step::Startup {
            let (place, method) = (self.place(call), &call.method);
            let text = format!("{place}: no module of the SPDK that is linked has the method {method}");
            return self.failed(RpcError::new(rpc::code::METHOD_NOT_FOUND, text));
        }
        self.passed_over.insert(call.subsystem.clone());
        Ok(())
    }

    fn tell_passed_over(&mut self) {
        if !self.passed_over.is_empty() {
            let subsystems = std::mem::take(&mut self.passed_over).into_iter().collect::<Vec<_>>().join(", ");
            let config = self.config.as_ref().map(|c| c.path.display().to_string());
            tracing::warn!(subsystems, config, "passed over: these subsystems of SPDK are not linked");
        }
    }

    fn place(&self, call: &Call) -> String {
        let path = self.config.as_ref().map(|c| c.path.display().to_string()).unwrap_or_default();
        format!("{path}:{call}")
    }

    fn send(&mut self, running: &mut Running, method: &str, params: Option<&Value>, place: Option<String>) {
        let id = running.calls.send(method, params, Caller::Own);
        let now = Instant::now();
        self.sent = Some(Sent { id, method: method.to_owned(), place, since: now, mentioned: now });
    }

    fn answered(&mut self, answer: Answer) -> Result<(), RpcError> {
        let Some(sent) = self.sent.take() else { return Ok(()) };
        let Err(error) = answer else { return Ok(()) };
        let message = match &sent.place {
            Some(place) => format!("{place}, {}: {}", sent.method, error.message),
            None => format!("{}: {}", sent.method, error.message),
        };
        let error = RpcError { message, ..error };
        // What this program calls for its own sake is not the configuration's to get wrong.
        if sent.place.is_none() { Err(error) } else { self.failed(error) }
    }

    fn failed(&self, error: RpcError) -> Result<(), RpcError> {
        match self.on_error {
            OnError::Stop => Err(error),
            OnError::Continue => {
                tracing::error!("{}", error.message);
                Ok(())
            }
        }
    }

    fn give_up_waiting(&mut self) {
        tracing::error!(
            seconds = EXAMINE_TIME.as_secs(),
            "SPDK's modules have not come to an end with a bdev, which does not answer: the start goes on without what is on it"
        );
        self.sent = None;
        self.hung = true;
    }

    /// Has NVMe drives flushed when they are asked to.
    fn flush_nvme(&mut self, running: &mut Running) {
        self.step = Step::Init;
        if states_of(NVME_OPTIONS).is_none() {
            return;
        }
        if spdk::flushes_nvme() {
            return self.send(running, NVME_OPTIONS, None, None);
        }
        tracing::warn!(
            spdk = spdk::version(),
            "this SPDK never sends NVMe drives a flush (v25.09 and later do): data may be lost with power though they were \
             flushed, unless the drives have no volatile write cache, or power-loss protection"
        );
    }
}

impl Sent {
    fn mention(&mut self) {
        if self.mentioned.elapsed() >= MENTION {
            self.mentioned = Instant::now();
            tracing::warn!(method = self.method, "SPDK has not answered yet");
        }
    }
}

/// A method of both states is called once, in the first.
fn belongs(states: States, startup: bool) -> bool {
    states.startup == startup
}

/// The configuration that SPDK would save now; `None` if it does not run.
///
/// # Errors
/// SPDK's.
pub(super) fn present(state: &mut State) -> Result<Option<Value>, RpcError> {
    if !state.is_running() {
        return Ok(None);
    }
    let listed = state.call("framework_get_subsystems", None)?;
    let listed = listed.as_array().into_iter().flatten();
    let names = listed.filter_map(|s| s["subsystem"].as_str().map(str::to_owned));
    let mut subsystems = Vec::new();
    for name in names.collect::<Vec<_>>() {
        let config = state.call("framework_get_config", Some(&json!({"name": name})))?;
        if config.as_array().is_some_and(|calls| !calls.is_empty()) {
            subsystems.push(json!({"subsystem": name, "config": config}));
        }
    }
    Ok(Some(Value::Array(subsystems)))
}

/// A configuration that cannot be read.
pub(super) fn refused(param: &str, e: &ConfigError) -> RpcError {
    RpcError::invalid_params(format!("spdk_set_options: {param}: {e}")).param(param)
}
