//! SPDK on the control thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bdev::Manager;
use bdev::spdk::{self, Runtime, SpdkBdev};
use reactor::Handle;
use rpc::{Config, OnError, Responder, RpcError};
use serde_json::Value;

use super::bdevs::Bdevs;
use super::calls::{AT_ONCE, Answer, Answered, Caller, Calls};
use super::config::Loading;
use super::options::SetOptions;
use super::poller;
use crate::app::App;
use crate::subsystem::ShutdownDone;

/// What the subsystem keeps.
#[derive(Default)]
pub(super) struct State {
    /// Set: SPDK is wanted.
    pub(super) options: Option<SetOptions>,
    /// SPDK's configuration, until it is loaded.
    pub(super) load: Option<Config>,
    loading: Option<Loading>,
    running: Option<Running>,
    /// It ran, and does not any more.
    ended: bool,
}

/// SPDK, once it was started.
pub(super) struct Running {
    // Field order is drop order: SPDK's server goes before SPDK.
    pub(super) calls: Calls,
    pub(super) runtime: Runtime,
    manager: Arc<Manager>,
    reactors: Vec<Handle>,
    phase: Phase,
    bdevs: Bdevs,
    /// Answers that wait for bdevs: what they tell of can be used when they come.
    held: Vec<Held>,
    /// Answers to calls of this program's own.
    own: Vec<(u64, Answer)>,
}

/// An answer, and the new bdevs that it waits for.
struct Held(Answered, Vec<String>);

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
        bdevs: Bdevs::new(manager.clone()),
        manager,
        reactors,
        phase: Phase::Up,
        held: Vec::new(),
        own: Vec::new(),
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

    /// Begins to load SPDK's configuration, around the initialisation of its subsystems.
    pub(super) fn begin_loading(&mut self, on_error: OnError) {
        self.loading = Some(Loading::new(self.load.take(), on_error));
    }

    /// Goes on with that; true when it is done.
    ///
    /// # Errors
    /// A call of the configuration failed, or SPDK's initialisation.
    pub(super) fn loaded(&mut self) -> Result<bool, RpcError> {
        let (Some(loading), Some(running)) = (&mut self.loading, &mut self.running) else { return Ok(true) };
        if !loading.advance(running)? {
            return Ok(false);
        }
        self.loading = None;
        Ok(true)
    }

    /// Calls a method that answers at once, and returns its answer.
    pub(super) fn call(&mut self, method: &str, params: Option<&Value>) -> Answer {
        let Some(running) = &mut self.running else { return Err(RpcError::errno(19, "SPDK is not running")) };
        let id = running.calls.send(method, params, Caller::Own);
        let since = Instant::now();
        loop {
            running.turn();
            if let Some(answer) = running.take_answer(id) {
                return answer;
            }
            if since.elapsed() >= AT_ONCE {
                return Err(RpcError::errno(110, format!("{method}: SPDK has not answered for {AT_ONCE:?}")));
            }
        }
    }

    /// Calls a method that `responder` answers, later.
    pub(super) fn send(&mut self, method: &str, params: Option<&Value>, responder: Responder) {
        match &mut self.running {
            Some(running) if matches!(running.phase, Phase::Up) => {
                running.calls.send(method, params, Caller::Responder(responder));
            }
            _ => responder.err(RpcError::errno(19, "SPDK is not running: this program is ending")),
        }
    }

    /// One turn; true while it must not sleep.
    pub(super) fn poll(&mut self) -> bool {
        let Some(running) = &mut self.running else { return false };
        running.turn();
        match &running.phase {
            Phase::Up => {}
            Phase::Finishing(_) if running.runtime.finished() => running.leave(),
            Phase::Leaving(left, _) if left.load(Ordering::Acquire) == 0 => {
                self.end();
                return true;
            }
            Phase::Finishing(_) | Phase::Leaving(..) => return true,
        }
        running.calls.working() || running.offers()
    }

    pub(super) fn begin_shutdown(&mut self, done: ShutdownDone) {
        self.loading = None;
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
            running.runtime.abandon();
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
    /// SPDK's turn. Its new bdevs are offered before anybody hears of an answer that tells of them; other answers do not wait
    /// for that.
    fn turn(&mut self) {
        // First: what was dropped before a call is closed before it.
        self.runtime.poll();
        let answered = self.calls.turn();
        self.runtime.poll();
        if !matches!(self.phase, Phase::Up) {
            let held = std::mem::take(&mut self.held).into_iter().map(|Held(answered, _)| answered);
            return held.chain(answered).for_each(|a| self.deliver(a));
        }
        let new = self.bdevs.turn(&mut self.runtime, !answered.is_empty());
        for answered in answered {
            let waits = match answered.call.caller {
                // It looks after the bdevs by itself, when all calls are done.
                Caller::Own => Vec::new(),
                Caller::Responder(_) if answered.answer.is_err() => Vec::new(),
                Caller::Responder(_) => {
                    let made = answered.made().into_iter().map(str::to_owned);
                    made.chain(new.iter().cloned()).collect()
                }
            };
            self.held.push(Held(answered, waits));
        }
        for Held(answered, waits) in std::mem::take(&mut self.held) {
            if waits.iter().any(|name| self.bdevs.is_new(name)) {
                self.held.push(Held(answered, waits));
            } else {
                self.deliver(answered);
            }
        }
    }

    /// Answers a call. One that made a bdev which cannot be used here has not done what its caller wanted; of several, it
    /// answers with those that can be used.
    fn deliver(&mut self, answered: Answered) {
        let since = answered.call.since;
        let refusal = answered.made().into_iter().find_map(|name| self.bdevs.refusal(name, since)).cloned();
        let Answered { id, call, mut answer } = answered;
        let r = match call.caller {
            Caller::Own => return self.own.push((id, answer)),
            Caller::Responder(r) => r,
        };
        if let Some(refusal) = refusal {
            let usable = |name: &Value| name.as_str().is_none_or(|n| self.bdevs.refusal(n, since).is_none());
            match &mut answer {
                Ok(Value::Array(names)) if names.iter().any(usable) => names.retain(usable),
                _ => {
                    let message = format!("{}: {}", r.method(), refusal.message);
                    answer = Err(RpcError { message, ..refusal });
                }
            }
        }
        r.reply(answer);
    }

    /// The answer to a call of this program's own, if it is there.
    pub(super) fn take_answer(&mut self, id: u64) -> Option<Answer> {
        let at = self.own.iter().position(|(of, _)| *of == id)?;
        Some(self.own.swap_remove(at).1)
    }

    /// Bdevs wait to be offered.
    pub(super) fn offers(&self) -> bool {
        self.bdevs.busy()
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
