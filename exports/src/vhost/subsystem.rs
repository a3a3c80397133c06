//! How vhost joins the engine.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use engine::{App, Error, MethodText, ShutdownDone, Subsystem};
use reactor::Turn;
use rpc::MethodTable;
use serde_json::Value;

use super::methods;
use super::state::{self, VhostState};

/// Subsystem "vhost_blk".
#[derive(Debug, Default)]
pub struct Vhost {
    /// Subsystems whose bdevs controllers may be made of, besides "bdev".
    depends_on: &'static [&'static str],
}

impl Vhost {
    /// `depends_on`: subsystems that are configured before; "bdev", and what else brings bdevs to the program.
    pub fn new(depends_on: &'static [&'static str]) -> Self {
        Self { depends_on }
    }
}

impl Subsystem for Vhost {
    fn name(&self) -> &'static str {
        "vhost_blk"
    }

    fn depends_on(&self) -> &'static [&'static str] {
        if self.depends_on.is_empty() { &["bdev"] } else { self.depends_on }
    }

    fn methods(&self, table: &mut MethodTable<App>) {
        methods::register(table);
    }

    fn texts(&self) -> &'static [MethodText] {
        methods::TEXTS
    }

    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("vhost", "vhost_poll"),
            ("vhost", "exports::vhost"),
            ("vhost_blk", "exports::vhost"),
            ("vhost_ring", "vhost_poll::queue"),
        ]
    }

    fn exporting(&self) -> &'static [&'static str] {
        &["vhost_create_blk_controller"]
    }

    fn prepare(&self, app: &mut App) {
        app.set_state(Rc::new(RefCell::new(VhostState::default())));
    }

    fn initialise(&self, _: &mut App, _: &mut Turn<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn config(&self, app: &App) -> Vec<Value> {
        let Ok(state) = state::state(app) else { return Vec::new() };
        let state = state.borrow();
        let controllers = state.controllers.values().filter(|e| !e.gone && !e.closing);
        state.options.config().into_iter().chain(controllers.flat_map(|e| e.config())).collect()
    }

    /// Front ends see their connections closed once what they asked for is done; they may connect to a later run.
    fn shutdown(&self, app: &mut App, cx: &mut Turn<'_>, done: ShutdownDone) {
        let Ok(state) = state::state(app) else { return };
        let names: Vec<String> = state.borrow().controllers.keys().cloned().collect();
        let left = Rc::new(Cell::new(names.len()));
        let done = Rc::new(Cell::new(Some(done)));
        for name in names {
            let (left, done) = (left.clone(), done.clone());
            state::close(&state, cx, &name, move |_| {
                left.set(left.get() - 1);
                if left.get() == 0
                    && let Some(done) = done.take()
                {
                    done.complete();
                }
            });
        }
    }

    /// Requests that do not end are left to the disks.
    fn abort(&self, app: &mut App, _: &mut Turn<'_>) {
        if let Ok(state) = state::state(app) {
            state.borrow_mut().controllers.clear();
        }
    }
}
