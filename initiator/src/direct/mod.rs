//! The direct form: `rnbd-initiator map …` maps one device of an RNBD or NBD server, says how it fares, and lets it go
//! at Ctrl-C.
//!
//! It is the ordinary program, which is told by method calls what to do, as any client could. Its words go to standard
//! output; the log stays on standard error.

mod export;
mod nbd;
mod say;
mod spec;
mod watch;
mod words;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use engine::app::OnReady;
use engine::{App, Error};
use reactor::Turn;
use rpc::RpcError;
use serde_json::Value;

pub use export::Export;
pub use say::all_said;
pub use spec::Spec;

use nbd::NbdWatch;
use say::say;
use watch::Watch;

/// What was asked for.
#[derive(Clone, Debug)]
pub struct Direct {
    /// The device.
    pub spec: Spec,
    /// What it becomes here.
    pub export: Export,
}

/// How often the state of the connection is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The device is in use, and the program goes on though it was asked to end.
pub fn refused(users: &[String]) {
    users.iter().for_each(|user| say(user));
    say(
        "still serving: end that use first (umount, swapoff); Ctrl-C once more takes the device away, with I/O errors",
    );
}

impl Direct {
    /// Does it, once the program is ready.
    pub fn on_ready(self) -> OnReady {
        // Behind the messages of this turn, which end the start: a mapping of the start would be kept though it fails.
        Box::new(move |app, _| app.later(move |app, _| self.map(app)))
    }

    /// The program has ended in order.
    pub fn ended(&self) {
        say(&self.spec.ended());
    }

    fn map(self, app: &mut App) {
        say(&format!("connecting to {}", self.spec.servers()));
        app.set_state(Rc::new(RefCell::new(match &self.spec {
            Spec::Rnbd(spec) => Watching::Rnbd(Watch::new(spec)),
            Spec::Nbd(spec) => Watching::Nbd(NbdWatch::new(spec)),
        })));
        keep_looking(app);
        let (method, params) = self.spec.call();
        app.call(method, &params, move |app, cx, answer| match answer {
            Ok(_) => self.export(app),
            Err(error) => fail(app, cx, method, &error),
        });
    }

    fn export(self, app: &mut App) {
        let mut calls = self.export.calls(&self.spec.bdev_name());
        calls.reverse();
        self.call_next(app, calls, &Value::Null);
    }

    /// Makes the last of `calls`, then the others; `result` is that of the call before.
    fn call_next(self, app: &mut App, mut calls: Vec<(&'static str, Value)>, result: &Value) {
        let Some((method, params)) = calls.pop() else {
            let place = self.export.place(result);
            // What is known by now comes before "ready".
            return look(app, move |_, _| self.ready(&place));
        };
        if app.shutting_down() {
            return;
        }
        app.call(method, &params, move |app, cx, answer| match answer {
            Ok(result) => self.call_next(app, calls, &result),
            Err(error) => fail(app, cx, method, &error),
        });
    }

    fn ready(&self, place: &str) {
        say(&format!("ready: {place} is {}; Ctrl-C ends it", self.spec.device()));
    }
}

/// Ends the program because of what `method` said, unless it is ending anyway.
fn fail(app: &mut App, cx: &mut Turn<'_>, method: &str, error: &RpcError) {
    if app.shutting_down() {
        return;
    }
    let mut text = error.message.trim_start_matches(&format!("{method}: ")).to_owned();
    let hint = error.data.as_ref().and_then(|d| d["hint"].as_str());
    // Those that tell which method to call are of no use here.
    let about_methods = |hint: &str| app.table.methods().any(|m| hint.contains(m.name));
    if let Some(hint) = hint.filter(|hint| !about_methods(hint)) {
        text = format!("{text} ({hint})");
    }
    app.fail(cx, Error::Call(text));
}

/// Says what has changed, again and again.
fn keep_looking(app: &mut App) {
    if app.shutting_down() {
        return say("stopping: requests in flight are finished first");
    }
    look(app, |_, cx| {
        let control = cx.handle().clone();
        cx.after(LOOK, move |_| App::send(&control, |app, _| keep_looking(app)));
    });
}

/// Who says it.
enum Watching {
    Rnbd(Watch),
    Nbd(NbdWatch),
}

/// Says what has changed since the last look, then runs `then`.
fn look(app: &mut App, then: impl FnOnce(&mut App, &mut Turn<'_>) + Send + 'static) {
    let Some(watching) = app.state::<Watching>() else { return };
    let (session, device) = match &*watching.borrow() {
        Watching::Rnbd(watch) => {
            let (session, device) = watch.asks();
            (Some(session), device)
        }
        Watching::Nbd(watch) => (None, watch.asks()),
    };
    // What is asked about is unknown until it is made.
    match session {
        Some(session) => {
            app.call("bdev_rnbd_get_sessions", &session, move |app, _, sessions| {
                app.call("bdev_rnbd_get_devices", &device, move |app, cx, devices| {
                    seen(app, &[sessions.unwrap_or_default(), devices.unwrap_or_default()], cx.now);
                    then(app, cx);
                });
            });
        }
        None => {
            app.call("bdev_nbd_get_devices", &device, move |app, cx, devices| {
                seen(app, &[devices.unwrap_or_default()], cx.now);
                then(app, cx);
            });
        }
    }
}

/// Says what is new in the answers.
fn seen(app: &App, answers: &[Value], now: Instant) {
    let Some(watching) = app.state::<Watching>() else { return };
    let lines = match (&mut *watching.borrow_mut(), answers) {
        (Watching::Rnbd(watch), [sessions, devices]) => watch.see(sessions, devices, now),
        (Watching::Nbd(watch), [devices]) => watch.see(devices, now),
        _ => Vec::new(),
    };
    lines.iter().for_each(|line| say(line));
}
