//! How bdev_nbd joins the engine.

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use bdev::{Bdev, BdevStatus};
use engine::{App, BdevKind, Error, MethodText, ShutdownDone, Subsystem};
use reactor::Turn;
use rpc::MethodTable;
use serde_json::Value;

use super::drives::Drives;
use super::lane::NbdDisk;
use super::{create, methods};

/// Subsystem "bdev_nbd": exports of NBD servers as bdevs.
#[derive(Default)]
pub struct BdevNbd {
    drives: RefCell<Option<Rc<RefCell<Drives>>>>,
}

/// The configuration is being carried out.
pub(super) struct Loading(pub bool);

impl Subsystem for BdevNbd {
    fn name(&self) -> &'static str {
        "bdev_nbd"
    }

    fn methods(&self, table: &mut MethodTable<App>) {
        methods::register(table);
    }

    fn texts(&self) -> &'static [MethodText] {
        methods::TEXTS
    }

    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[("bdev_nbd", "rnbd_initiator::bdev::nbd"), ("bdev_nbd", "nbd_poll")]
    }

    fn initialise(&self, app: &mut App, cx: &mut Turn<'_>) -> Result<(), Error> {
        let drives = Drives::install(cx, app.manager.clone(), &app.reactors, app.placement.clone());
        *self.drives.borrow_mut() = Some(drives.clone());
        app.set_state(drives);
        app.set_state(Rc::new(RefCell::new(Loading(true))));
        app.call("framework_wait_init", &Value::Null, |app, _, _| {
            if let Some(loading) = app.state::<Loading>() {
                loading.borrow_mut().0 = false;
            }
        });
        Ok(())
    }

    /// Devices without a bdev; the others are among the bdevs, in their order.
    fn config(&self, app: &App) -> Vec<Value> {
        let Some(drives) = app.state::<Drives>() else { return Vec::new() };
        let devices = drives.borrow().devices(Instant::now(), None);
        devices.iter().filter(|d| d.bdev.is_none()).map(create::call).collect()
    }

    fn expects_bdev(&self, app: &App, name: &str) -> bool {
        let drives = app.state::<Drives>();
        drives
            .is_some_and(|d| d.borrow().devices(Instant::now(), Some(name)).iter().any(|d| d.bdev.is_none()))
    }

    fn bdev_kind(&self, bdev: &BdevStatus) -> Option<BdevKind> {
        let any: &dyn Any = &*bdev.bdev;
        let disk = any.downcast_ref::<NbdDisk>()?;
        let drives = self.drives.borrow();
        let device = drives.as_ref()?.borrow().devices(Instant::now(), Some(&disk.info().name)).pop();
        Some(BdevKind { section: "nbd", create: device.map(|d| create::call(&d)) })
    }

    fn shutdown(&self, app: &mut App, cx: &mut Turn<'_>, done: ShutdownDone) {
        if let Some(drives) = app.state::<Drives>() {
            drives.borrow_mut().shutdown(cx, |_| done.complete());
        }
    }
}
