//! How the RNBD front end joins the engine.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use engine::{App, Error, MethodText, ShutdownDone, Subsystem};
use reactor::Turn;
use rpc::{MethodTable, RpcError};
use serde_json::Value;
use verbs::Cm;

use super::control::Control;
use super::export::Exports;
use super::lane::RnbdLane;
use super::shared::Shared;
use super::{methods, strangers, texts};

/// The RTRS server under the front end.
pub type Server = rtrs_poll::Server<RnbdLane>;

/// Subsystem "rnbd".
pub struct Rnbd {
    /// For the server, when it is made.
    cms: RefCell<Vec<Box<dyn Cm>>>,
}

/// What its RPC methods work on: [`App::state`] of this type.
#[derive(Default)]
pub struct RnbdState {
    /// Name space.
    pub exports: Rc<RefCell<Exports>>,
    /// Options of the RTRS server, until it is made.
    pub options: rtrs_poll::Options,
    /// Providers of listeners as they were asked for, by the listeners' addresses.
    pub asked: BTreeMap<SocketAddr, String>,
    /// What the log has said that strangers can open; `None` before the configuration has been carried out.
    pub(super) told: Option<BTreeSet<String>>,
    /// Sessions and their devices; from initialisation on.
    pub control: Option<Rc<RefCell<Control>>>,
    /// RTRS server; from initialisation on.
    pub server: Option<Rc<RefCell<Server>>>,
}

impl Rnbd {
    /// `cms`: connection managers besides those that listeners open.
    pub fn new(cms: Vec<Box<dyn Cm>>) -> Self {
        Self { cms: RefCell::new(cms) }
    }
}

/// The state of this subsystem.
///
/// # Errors
/// The program has no such subsystem.
pub(super) fn state(app: &App) -> Result<Rc<RefCell<RnbdState>>, RpcError> {
    app.state::<RnbdState>().ok_or_else(|| RpcError::internal("this program has no RNBD server"))
}

/// The name space.
pub(super) fn exports(app: &App) -> Result<Rc<RefCell<Exports>>, RpcError> {
    Ok(state(app)?.borrow().exports.clone())
}

/// The RTRS server.
///
/// # Errors
/// Before initialisation.
pub(super) fn server(app: &App) -> Result<Rc<RefCell<Server>>, RpcError> {
    let server = state(app)?.borrow().server.clone();
    server.ok_or_else(|| RpcError::internal("the RTRS server is not initialised yet"))
}

/// Sessions and their devices.
///
/// # Errors
/// Before initialisation.
pub(super) fn control(app: &App) -> Result<Rc<RefCell<Control>>, RpcError> {
    let control = state(app)?.borrow().control.clone();
    control.ok_or_else(|| RpcError::internal("RNBD is not initialised yet"))
}

impl Subsystem for Rnbd {
    fn name(&self) -> &'static str {
        "rnbd"
    }

    fn methods(&self, table: &mut MethodTable<App>) {
        methods::register(table);
    }

    fn texts(&self) -> &'static [MethodText] {
        texts::TEXTS
    }

    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[("rnbd", "rnbd_target"), ("rtrs", "rtrs_poll"), ("verbs", "verbs")]
    }

    fn exporting(&self) -> &'static [&'static str] {
        &["rnbd_create_export"]
    }

    fn prepare(&self, app: &mut App) {
        app.set_state(Rc::new(RefCell::new(RnbdState::default())));
    }

    /// Makes the server and its lanes.
    fn initialise(&self, app: &mut App, cx: &mut Turn<'_>) -> Result<(), Error> {
        let Some(state) = app.state::<RnbdState>() else { return Ok(()) };
        let mut state = state.borrow_mut();
        let shared = Arc::<Shared>::default();
        let rnbd = Control::install(
            cx,
            app.manager.clone(),
            state.exports.clone(),
            shared.clone(),
            app.reactors.clone(),
        );
        let control = app.control.clone();
        app.manager.on_first_export(move || Control::send(&control, |control, _| control.first_export()));
        let control = app.control.clone();
        let server = Server::install(
            cx,
            state.options.clone(),
            app.manager.registry().clone(),
            &app.reactors,
            move |_| RnbdLane::new(control.clone(), shared.clone()),
            rnbd.clone(),
        );
        for cm in self.cms.take() {
            let added = server.borrow_mut().add_cm(cx, cm);
            added.map_err(|e| Error::System("cannot watch a connection manager", e))?;
        }
        state.control = Some(rnbd);
        state.server = Some(server);
        Ok(())
    }

    fn ready(&self, app: &mut App, _: &mut Turn<'_>) {
        if let Ok(control) = control(app) {
            control.borrow_mut().ready();
        }
        strangers::begin(app);
    }

    fn bdev_registered(&self, app: &mut App) {
        strangers::tell(app);
    }

    fn config(&self, app: &App) -> Vec<Value> {
        methods::config(app)
    }

    fn shutdown(&self, app: &mut App, cx: &mut Turn<'_>, done: ShutdownDone) {
        if let Ok(server) = server(app) {
            server.borrow_mut().shutdown(cx, |_| done.complete());
        }
    }

    fn abort(&self, app: &mut App, cx: &mut Turn<'_>) {
        if let Ok(server) = server(app) {
            server.borrow_mut().abort(cx);
        }
    }
}
