//! The RPC methods of every program, one file per group. Names, parameters and results are SPDK's where SPDK has the method.

mod bdev;
mod bdev_config;
mod bdev_modules;
pub mod doc;
mod framework;
mod log;
mod notify;
mod stats;
mod threads;

use std::rc::Rc;

use rpc::{MethodTable, RpcError};

use crate::app::App;
use crate::subsystem::Subsystem;

/// All methods of a program with `subsystems`, in state start-up.
pub fn table(subsystems: &[Rc<dyn Subsystem>]) -> MethodTable<App> {
    let mut table = MethodTable::new();
    framework::register(&mut table);
    threads::register(&mut table);
    log::register(&mut table);
    notify::register(&mut table);
    bdev::register(&mut table);
    stats::register(&mut table);
    bdev_modules::register(&mut table);
    #[cfg(not(feature = "spdk"))]
    table.explain_absent("spdk_", "this program was built without SPDK (--features spdk, see docs/spdk.md)");
    subsystems.iter().for_each(|s| s.methods(&mut table));
    subsystems.iter().for_each(|s| s.foreign_methods(&mut table));
    table
}

/// What the bdev layer refused, about the bdev `name`.
pub fn bdev_error(method: &str, name: &str, e: &::bdev::Error) -> RpcError {
    let error = RpcError::errno(e.errno(), format!("{method}: {e}")).method(method).object("bdev", name);
    match e {
        ::bdev::Error::Invalid { parameter, .. } => error.param(parameter),
        ::bdev::Error::NotFound { .. } => error.hint("bdev_get_bdevs lists the bdevs"),
        _ => error,
    }
}

/// `param` asks for something that is not offered.
pub fn unsupported(method: &str, param: &str, text: &str) -> RpcError {
    const ENOTSUP: i32 = 95;
    RpcError::errno(ENOTSUP, format!("{method}: {param}: {text}")).method(method).param(param)
}
