//! SPDK on the control thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bdev::Manager;
use bdev::spdk::{self, Change, Runtime, SpdkBdev};
use reactor::Handle;
use rpc::{Config, Responder, RpcError};
use serde_json::Value;

use super::calls::{Answer, Calls, NVME_OPTIONS};
use super::config;
use super::options::SetOptions;
use super::poller;
use crate::app::App;
use crate::subsystem::ShutdownDone;

/// What the subsystem keeps.
#[derive(Default)]
pub(super) struct State {
    /// Set: SPDK is wanted.
    pub(super) options: Option<SetOptions>,
    /// SPDK's configuration, until it has been loaded.
    pub(super) load: Option<Config>,
    running: Option<Running>,
    /// It ran, and does not any more.
    ended: bool,
}

struct Running {
    // Field order is drop order: SPDK's server goes before SPDK.
    calls: Calls,
    runtime: Runtime,
    manager: Arc<Manager>,
    reactors: Vec<Handle>,
    phase: Phase,
    /// SPDK's bdevs that are not offered yet.
    found: Vec<String>,
    /// The call that waits until SPDK's modules have looked at them, which they claim them for.
    examination: Option<u64>,
    /// Answers that wait for that: what they tell of can be used when they come.
    held: Vec<(u64, Answer)>,
    /// SPDK's bdevs that could not be offered since the last answers, in words.
    not_offered: Vec<String>,
}

enum Phase {
    Up,
    /// SPDK's subsystems come to their end.
    Finishing(ShutdownDone),
    /// Reactors let go; so many have not yet.
    Leaving(Arc<AtomicUsize>, ShutdownDone),
}

/// Starts SPDK, unless it runs.
///
/// # Errors
/// It was not asked for, has ended, or did not start.
pub(super) fn start(app: &App) -> Result<(), RpcError> {
    let Some(cell) = app.state::<State>() else { return Err(RpcError::internal("spdk: no state")) };
    let mut state = cell.borrow_mut();
    if state.running.is_some() {
        return Ok(());
    }
    let refused = |text: &str| RpcError::errno(19, format!("SPDK is not running: {text}"));
    if state.ended || app.shutting_down() {
        return Err(refused("this program is ending"));
    }
    let Some(options) = &state.options else {
        let text = "the configuration does not ask for it";
        return Err(refused(text).hint("begin the configuration with spdk_set_options"));
    };
    let mut runtime =
        Runtime::start(&options.environment()).map_err(|e| RpcError::errno(19, e.to_string()))?;
    if let Some(provider) = spdk::provider() {
        app.manager.registry().set_provider(provider);
    }
    let idle = options.idle_poll();
    place_threads(&mut runtime, app.reactors.clone());
    for reactor in &app.reactors {
        reactor.send(move |cx| {
            cx.add_poller("spdk", Box::new(poller::OnReactor { idle }));
        });
    }
    let calls = Calls::new(spdk::Port::open()?);
    let (manager, reactors) = (app.manager.clone(), app.reactors.clone());
    state.running = Some(Running {
        calls,
        runtime,
        manager,
        reactors,
        phase: Phase::Up,
        found: Vec::new(),
        examination: None,
        held: Vec::new(),
        not_offered: Vec::new(),
    });
    // Handlers have no turn of the control thread; the next one has.
    app.later(move |app, cx| {
        if let Some(state) = app.state::<State>() {
            cx.add_poller("spdk", Box::new(poller::OnControl { state, idle }));
        }
    });
    Ok(())
}

/// Threads that SPDK's modules make go to the reactors, in turn.
fn place_threads(runtime: &mut Runtime, reactors: Vec<Handle>) {
    let next = AtomicUsize::new(0);
    runtime.set_placer(move |thread| {
        let reactor = &reactors[next.fetch_add(1, Ordering::Relaxed) % reactors.len()];
        reactor.send(move |_| spdk::adopt(thread));
    });
}

impl State {
    pub(super) fn is_running(&self) -> bool {
        self.running.as_ref().is_some_and(|r| matches!(r.phase, Phase::Up))
    }

    pub(super) fn has_subsystem(&self, name: &str) -> bool {
        self.running.as_ref().is_some_and(|r| r.runtime.has_subsystem(name))
    }

    /// Loads SPDK's configuration around the initialisation of its subsystems.
    pub(super) fn initialise(&mut self) -> Result<(), RpcError> {
        let config = self.load.take();
        if let Some(config) = &config {
            config::load(self, config, true)?;
        }
        self.flush_nvme()?;
        if let Some(running) = &mut self.running {
            running.runtime.init().map_err(|e| RpcError::internal(e.to_string()))?;
        }
        if let Some(config) = &config {
            config::load(self, config, false)?;
        }
        // Whatever the initialisation found, and what was found on that.
        if self.is_running() {
            self.call("bdev_wait_for_examine", None)?;
        }
        match &mut self.running {
            Some(running) if !running.not_offered.is_empty() => {
                Err(RpcError::errno(17, std::mem::take(&mut running.not_offered).join("; ")))
            }
            _ => Ok(()),
        }
    }

    /// Has NVMe drives flushed when they are asked to.
    fn flush_nvme(&mut self) -> Result<(), RpcError> {
        if !self.is_running() || spdk::states_of(NVME_OPTIONS).is_none() {
            return Ok(());
        }
        if spdk::flushes_nvme() {
            return self.call(NVME_OPTIONS, None).map(|_| ());
        }
        tracing::warn!(
            spdk = spdk::version(),
            "this SPDK never sends NVMe drives a flush (v25.09 and later do): data may be lost with power though they were \
             flushed, unless the drives have no volatile write cache, or power-loss protection"
        );
        Ok(())
    }

    /// Calls a method and waits for its answer. SPDK goes on meanwhile, this program's control thread does not.
    pub(super) fn call(&mut self, method: &str, params: Option<&Value>) -> Answer {
        let Some(running) = &mut self.running else { return Err(RpcError::errno(19, "SPDK is not running")) };
        let id = running.calls.send(method, params);
        let mut told = Instant::now();
        loop {
            for (answered, answer) in running.turn() {
                if answered == id {
                    return answer;
                }
                running.deliver(answered, answer);
            }
            if told.elapsed().as_secs() >= 10 {
                told = Instant::now();
                tracing::warn!(method, "SPDK has not answered yet");
            }
        }
    }

    /// Calls a method that `responder` answers, later.
    pub(super) fn send(&mut self, method: &str, params: Option<&Value>, responder: Responder) {
        match &mut self.running {
            Some(running) if matches!(running.phase, Phase::Up) => {
                running.calls.forward(method, params, responder)
            }
            _ => responder.err(RpcError::errno(19, "SPDK is not running: this program is ending")),
        }
    }

    /// One turn; true while it must not sleep.
    pub(super) fn poll(&mut self) -> bool {
        let Some(running) = &mut self.running else { return false };
        for (id, answer) in running.turn() {
            running.deliver(id, answer);
        }
        match &running.phase {
            Phase::Up => {}
            Phase::Finishing(_) if running.runtime.finished() => running.leave(),
            Phase::Leaving(left, _) if left.load(Ordering::Acquire) == 0 => {
                self.end();
                return true;
            }
            Phase::Finishing(_) | Phase::Leaving(..) => return true,
        }
        !running.calls.is_empty() || running.examination.is_some()
    }

    pub(super) fn begin_shutdown(&mut self, done: ShutdownDone) {
        // Without SPDK `done` is dropped: it has ended.
        let Some(running) = &mut self.running else { return };
        for bdev in running.manager.list() {
            let any: &dyn std::any::Any = &*bdev.bdev;
            if any.is::<SpdkBdev>() {
                // Layers go with it. Not found: it went by itself.
                let _ = running.manager.unregister(&bdev.bdev.info().name, Box::new(|| ()));
            }
        }
        running.runtime.begin_finish();
        running.phase = Phase::Finishing(done);
    }

    /// Gives SPDK up as it is; the process is about to end.
    pub(super) fn abort(&mut self) {
        self.ended = true;
        if let Some(running) = self.running.take() {
            tracing::warn!("SPDK did not end in time");
            // What it waits for cannot be taken down under it.
            std::mem::forget(running.runtime);
        }
    }

    /// Everybody has left.
    fn end(&mut self) {
        self.ended = true;
        let Some(Running { runtime, calls, phase, .. }) = self.running.take() else { return };
        drop(calls);
        let whole = runtime.stop();
        tracing::info!(whole, "SPDK stopped");
        if let Phase::Finishing(done) | Phase::Leaving(_, done) = phase {
            done.complete();
        }
    }
}

impl Running {
    /// SPDK's turn, with its new bdevs offered before anybody hears of an answer.
    fn turn(&mut self) -> Vec<(u64, Answer)> {
        // First: what was dropped before a call is closed before it.
        self.runtime.poll();
        self.held.extend(self.calls.turn());
        self.runtime.poll();
        while let Some(change) = self.runtime.next_change() {
            // Removal comes as an event of the bdev.
            if let Change::Registered(name) = change {
                self.found.push(name);
            }
        }
        if !matches!(self.phase, Phase::Up) {
            return std::mem::take(&mut self.held);
        }
        let examined = self.held.iter().position(|(id, _)| Some(*id) == self.examination);
        if let Some(i) = examined {
            if let (_, Err(error)) = self.held.remove(i) {
                tracing::warn!(%error, "SPDK's modules did not look at new bdevs");
            }
            self.examination = None;
        }
        if self.examination.is_none() && !self.found.is_empty() {
            if examined.is_some() {
                // More may have been found on them, which is examined next.
                std::mem::take(&mut self.found).iter().for_each(|name| self.offer(name));
            } else {
                self.examination = Some(self.calls.send("bdev_wait_for_examine", None));
            }
        }
        if self.examination.is_some() || self.held.is_empty() {
            return Vec::new();
        }
        let mut answers = std::mem::take(&mut self.held);
        if let Some((_, answer)) = answers.iter_mut().find(|(_, a)| a.is_ok())
            && !self.not_offered.is_empty()
        {
            *answer = Err(RpcError::errno(17, std::mem::take(&mut self.not_offered).join("; ")));
        }
        answers
    }

    /// Offers a bdev of SPDK to this program.
    fn offer(&mut self, name: &str) {
        match spdk::offer(&self.manager, name) {
            Ok(_) | Err(bdev::Error::NotFound { .. }) => {}
            Err(e) => {
                let text = format!("SPDK made its bdev {name}, which is not offered by this program: {e}");
                tracing::error!("{text}");
                self.not_offered.push(text);
            }
        }
    }

    fn deliver(&mut self, id: u64, answer: Answer) {
        match (self.calls.responder(id), answer) {
            (Some(responder), Ok(result)) => responder.ok(result),
            (Some(responder), Err(error)) => responder.err(error),
            (None, _) => {}
        }
    }

    /// Has every reactor let go of SPDK.
    fn leave(&mut self) {
        let left = Arc::new(AtomicUsize::new(self.reactors.len()));
        for reactor in &self.reactors {
            let left = left.clone();
            reactor.send(move |_| {
                spdk::leave();
                left.fetch_sub(1, Ordering::AcqRel);
            });
        }
        let up = std::mem::replace(&mut self.phase, Phase::Up);
        if let Phase::Finishing(done) = up {
            self.phase = Phase::Leaving(left, done);
        }
    }
}
