//! How bdev_rnbd joins the engine.

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;

use bdev::{Bdev, BdevStatus};
use engine::{App, BdevKind, Error, MethodText, ShutdownDone, Subsystem};
use reactor::Turn;
use rpc::MethodTable;
use serde_json::Value;
use verbs::Cm;

use super::disk::RnbdDisk;
use super::maps::Maps;
use super::methods;

/// Subsystem "bdev_rnbd": devices of RNBD servers as bdevs.
#[derive(Default)]
pub struct BdevRnbd {
    /// For the client, when it is made.
    cms: RefCell<Vec<Box<dyn Cm>>>,
    maps: RefCell<Option<Rc<RefCell<Maps>>>>,
}

/// The configuration is being carried out.
pub(super) struct Loading(pub bool);

impl BdevRnbd {
    /// `cms`: connection managers besides those that sessions open (tests bring a loopback).
    pub fn new(cms: Vec<Box<dyn Cm>>) -> Self {
        Self { cms: RefCell::new(cms), maps: RefCell::default() }
    }
}

impl Subsystem for BdevRnbd {
    fn name(&self) -> &'static str {
        "bdev_rnbd"
    }

    fn methods(&self, table: &mut MethodTable<App>) {
        methods::register(table);
    }

    fn texts(&self) -> &'static [MethodText] {
        methods::TEXTS
    }

    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[("bdev_rnbd", "rnbd_initiator"), ("rtrs", "rtrs_poll"), ("verbs", "verbs")]
    }

    fn initialise(&self, app: &mut App, cx: &mut Turn<'_>) -> Result<(), Error> {
        let installed = Maps::install(cx, app.manager.clone(), &app.reactors, self.cms.take());
        let maps = installed.map_err(|e| Error::System("cannot watch a connection manager", e))?;
        *self.maps.borrow_mut() = Some(maps.clone());
        app.set_state(maps);
        app.set_state(Rc::new(RefCell::new(Loading(true))));
        app.call("framework_wait_init", &Value::Null, |app, _, _| {
            if let Some(loading) = app.state::<Loading>() {
                loading.borrow_mut().0 = false;
            }
        });
        Ok(())
    }

    /// Mappings without a bdev; the others are among the bdevs, in their order.
    fn config(&self, app: &App) -> Vec<Value> {
        let Some(maps) = app.state::<Maps>() else { return Vec::new() };
        let devices = maps.borrow().devices(None);
        devices.iter().filter(|d| d.bdev.is_none()).map(methods::create).collect()
    }

    fn expects_bdev(&self, app: &App, name: &str) -> bool {
        let maps = app.state::<Maps>();
        maps.is_some_and(|m| m.borrow().devices(Some(name)).iter().any(|d| d.bdev.is_none()))
    }

    fn bdev_kind(&self, bdev: &BdevStatus) -> Option<BdevKind> {
        let any: &dyn Any = &*bdev.bdev;
        let disk = any.downcast_ref::<RnbdDisk>()?;
        let maps = self.maps.borrow();
        let device = maps.as_ref()?.borrow().devices(Some(&disk.info().name)).pop();
        Some(BdevKind { section: "rnbd", create: device.map(|d| methods::create(&d)) })
    }

    fn shutdown(&self, app: &mut App, cx: &mut Turn<'_>, done: ShutdownDone) {
        if let Some(maps) = app.state::<Maps>() {
            maps.borrow_mut().shutdown(cx, |_| done.complete());
        }
    }
}
