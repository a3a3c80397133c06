//! How ublk joins the engine.

use std::cell::RefCell;
use std::rc::Rc;

use engine::{App, Error, InUse, MethodText, ShutdownDone, Subsystem};
use reactor::Turn;
use rpc::{MethodTable, RpcError};
use serde_json::Value;

use super::methods;
use super::target::Target;

/// Subsystem "ublk".
#[derive(Debug, Default)]
pub struct Ublk(());

/// The state of this subsystem.
///
/// # Errors
/// Before initialisation.
pub(super) fn target(app: &App) -> Result<Rc<RefCell<Target>>, RpcError> {
    app.state::<Target>().ok_or_else(|| RpcError::internal("ublk is not initialised yet"))
}

impl Subsystem for Ublk {
    fn name(&self) -> &'static str {
        "ublk"
    }

    fn methods(&self, table: &mut MethodTable<App>) {
        methods::register(table);
    }

    fn texts(&self) -> &'static [MethodText] {
        methods::TEXTS
    }

    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[("ublk", "ublk_poll"), ("ublk", "exports::ublk")]
    }

    fn exporting(&self) -> &'static [&'static str] {
        &["ublk_start_disk", "ublk_recover_disk"]
    }

    fn initialise(&self, app: &mut App, cx: &mut Turn<'_>) -> Result<(), Error> {
        let target = Target::install(cx, app.manager.clone(), app.reactors.clone(), app.placement.clone());
        app.set_state(target);
        Ok(())
    }

    fn config(&self, app: &App) -> Vec<Value> {
        target(app).map(|t| t.borrow().config()).unwrap_or_default()
    }

    fn in_use(&self, app: &App) -> Vec<InUse> {
        target(app).map(|t| t.borrow().in_use()).unwrap_or_default()
    }

    /// Stops every disk, but for those in use that the next run can take over, if the program keeps such.
    fn shutdown(&self, app: &mut App, cx: &mut Turn<'_>, done: ShutdownDone) {
        if let Ok(target) = target(app) {
            let mut target = target.borrow_mut();
            if app.keeps_devices() {
                target.keep_used(cx);
            }
            target.drain(cx, Box::new(|_, _| done.complete()));
        }
    }

    /// What is in flight fails, so that the kernel lets go of the disks, and of this process.
    fn abort(&self, app: &mut App, cx: &mut Turn<'_>) {
        if let Ok(target) = target(app) {
            target.borrow_mut().give_up(cx);
        }
    }
}
