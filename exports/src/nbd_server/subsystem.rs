//! How the NBD server joins the engine.

use std::cell::RefCell;
use std::rc::Rc;

use engine::{App, Error, MethodText, ShutdownDone, Subsystem};
use reactor::Turn;
use rpc::{MethodTable, RpcError};
use serde_json::Value;

use super::methods;
use super::server::Server;

/// Subsystem "nbd_server".
#[derive(Debug, Default)]
pub struct NbdServer {
    depends_on: Option<&'static [&'static str]>,
}

impl NbdServer {
    /// `depends_on`: subsystems that are configured before: "bdev", and what else brings bdevs to the program.
    pub fn new(depends_on: &'static [&'static str]) -> Self {
        Self { depends_on: Some(depends_on) }
    }
}

/// The state of this subsystem.
///
/// # Errors
/// The program has no such subsystem.
pub(super) fn server(app: &App) -> Result<Rc<RefCell<Server>>, RpcError> {
    app.state::<Server>().ok_or_else(|| RpcError::internal("this program has no NBD server"))
}

impl Subsystem for NbdServer {
    fn name(&self) -> &'static str {
        "nbd_server"
    }

    fn depends_on(&self) -> &'static [&'static str] {
        self.depends_on.unwrap_or(&["bdev"])
    }

    fn methods(&self, table: &mut MethodTable<App>) {
        methods::register(table);
    }

    fn texts(&self) -> &'static [MethodText] {
        methods::TEXTS
    }

    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[("nbd", "nbd_poll"), ("nbd_server", "exports::nbd_server")]
    }

    fn exporting(&self) -> &'static [&'static str] {
        &["nbd_server_create_export"]
    }

    fn prepare(&self, app: &mut App) {
        let server = Server::new(
            app.manager.clone(),
            app.control.clone(),
            app.reactors.clone(),
            app.placement.clone(),
        );
        app.set_state(Rc::new(RefCell::new(server)));
    }

    fn initialise(&self, app: &mut App, cx: &mut Turn<'_>) -> Result<(), Error> {
        if let Some(server) = app.state::<Server>() {
            Server::install(&server, cx);
        }
        Ok(())
    }

    fn config(&self, app: &App) -> Vec<Value> {
        server(app).map(|server| methods::config(&server.borrow())).unwrap_or_default()
    }

    fn shutdown(&self, app: &mut App, cx: &mut Turn<'_>, done: ShutdownDone) {
        if let Ok(server) = server(app) {
            server.borrow_mut().shutdown(cx, || done.complete());
        }
    }

    fn abort(&self, app: &mut App, _: &mut Turn<'_>) {
        if let Ok(server) = server(app) {
            server.borrow_mut().abort();
        }
    }
}
