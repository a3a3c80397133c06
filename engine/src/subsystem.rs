//! What joins the engine: a front end that offers bdevs, or a module that brings them.

use bdev::BdevStatus;
use reactor::{Handle, Turn};
use rpc::{MethodTable, Responder, RpcError};
use serde_json::Value;

use crate::app::{App, Error};

/// A method's documentation: name, result, what it does. The parameters come from the method table.
pub type MethodText = (&'static str, &'static str, &'static str);

/// A part of the program with methods and a configuration of its own (SPDK's word, `spdk_subsystem`).
///
/// Everything here runs on the control thread. A subsystem keeps what it works on in the state map of [`App`], where
/// its RPC handlers find it with [`App::state`].
///
/// The order of calls: [`methods`](Self::methods), [`prepare`](Self::prepare), start-up calls of the configuration,
/// [`initialise`](Self::initialise), run-time calls, [`shutdown`](Self::shutdown). Subsystems are initialised in the
/// order of their registration and shut down in reverse, each after the former is done.
pub trait Subsystem {
    /// As `framework_get_subsystems` lists it.
    fn name(&self) -> &'static str;

    /// Subsystems whose configuration is loaded before its own.
    fn depends_on(&self) -> &'static [&'static str] {
        &["bdev"]
    }

    /// Adds its RPC methods.
    fn methods(&self, table: &mut MethodTable<App>);

    /// Adds methods of a library that has a JSON-RPC of its own, except where this program has one of that name: all its own
    /// are in the table now.
    fn foreign_methods(&self, _table: &mut MethodTable<App>) {}

    /// One text for each of its methods, for `docs/rpc.md`.
    fn texts(&self) -> &'static [MethodText];

    /// Flags of `log_set_flag`, each with a crate or module whose events it lets through. A flag may come more than
    /// once.
    fn log_flags(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// Sets the state that start-up methods change.
    fn prepare(&self, _app: &mut App) {}

    /// Makes it ready for run-time methods.
    ///
    /// # Errors
    /// The program ends with it.
    fn initialise(&self, app: &mut App, cx: &mut Turn<'_>) -> Result<(), Error>;

    /// Whether what [`initialise`](Self::initialise) began is done, where that takes longer than a call may. Asked again and
    /// again until it is; the next subsystem follows then. An end of the program may come first.
    ///
    /// # Errors
    /// The program ends with it.
    fn initialised(&self, _app: &mut App) -> Result<bool, Error> {
        Ok(true)
    }

    /// The calls that make its present state, for `framework_get_config`.
    fn config(&self, app: &App) -> Vec<Value>;

    /// Methods that offer a bdev to somebody. A configuration with one of them says who may have what, also while the call
    /// has not been made yet.
    fn exporting(&self) -> &'static [&'static str] {
        &[]
    }

    /// The configuration has been carried out, but for what waits for a bdev.
    fn ready(&self, _app: &mut App, _cx: &mut Turn<'_>) {}

    /// A bdev was registered; not called before [`ready`](Self::ready).
    fn bdev_registered(&self, _app: &mut App) {}

    /// As [`config`](Self::config), where somebody else has to be asked for it, who may not answer: a part of a configuration
    /// must not be saved as the whole.
    ///
    /// # Errors
    /// Why it is not known.
    fn try_config(&self, app: &App) -> Result<Vec<Value>, RpcError> {
        Ok(self.config(app))
    }

    /// Whether a bdev of this name will come later, from a server that is not there yet: calls of the configuration
    /// that name it wait for it.
    fn expects_bdev(&self, _app: &App, _name: &str) -> bool {
        false
    }

    /// If it made this bdev: how it is listed and made again.
    fn bdev_kind(&self, _bdev: &BdevStatus) -> Option<BdevKind> {
        None
    }

    /// Adds to the row of `bdev_get_bdevs` for a bdev that it made, or changes what it knows better.
    fn describe_bdev(&self, _bdev: &BdevStatus, _row: &mut Value) {}

    /// A call of `method` about `bdev`, or about all (`None`), which the library below it has to carry out. `params` is null if
    /// the method has none. Gives the responder back if that is not so.
    fn call_about(
        &self,
        _app: &mut App,
        _method: &str,
        _params: Value,
        _bdev: Option<&BdevStatus>,
        responder: Responder,
    ) -> Option<Responder> {
        Some(responder)
    }

    /// Who on this host uses what an end of the program would take away. Asked before an orderly end. Reads what the kernel
    /// keeps in memory, and waits for nothing.
    fn in_use(&self, _app: &App) -> Vec<InUse> {
        Vec::new()
    }

    /// Ends it in order: nothing new is taken on, what is in flight is finished and answered. Completes `done` then,
    /// at once or later. Called only after [`initialise`](Self::initialise).
    fn shutdown(&self, app: &mut App, cx: &mut Turn<'_>, done: ShutdownDone);

    /// The program gives up waiting for requests in flight. Every subsystem hears of it, before the first is aborted.
    fn giving_up(&self) {}

    /// Gives up what [`shutdown`](Self::shutdown) waits for, which then comes to its end.
    fn abort(&self, _app: &mut App, _cx: &mut Turn<'_>) {}
}

/// Somebody on this host uses a device of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InUse {
    /// In words: "/dev/ublkb0 is mounted on /srv".
    pub text: String,
    /// The device can outlive the program: its requests wait until the next run takes it over.
    pub kept: bool,
}

/// A bdev as the subsystem that made it knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct BdevKind {
    /// Key of its values in `driver_specific` of `bdev_get_bdevs`.
    pub section: &'static str,
    /// The call `{method, params}` that makes it, for the configuration of "bdev"; `None` if no call does.
    pub create: Option<Value>,
}

/// The promise of a subsystem to come to its end. Dropped, on any thread, it counts as kept: nobody can keep it then.
#[derive(Debug)]
#[must_use = "the shutdown goes on when this is dropped"]
pub struct ShutdownDone(Handle);

impl ShutdownDone {
    pub(crate) fn new(control: Handle) -> Self {
        Self(control)
    }

    /// The subsystem has ended.
    pub fn complete(self) {
        drop(self);
    }
}

impl Drop for ShutdownDone {
    fn drop(&mut self) {
        App::send(&self.0, App::shutdown_next);
    }
}
