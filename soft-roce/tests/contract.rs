//! The suite that every provider passes, over the loopback interface.

#[path = "../../verbs/tests/common/mod.rs"]
mod common;
#[path = "../../verbs/tests/suite/mod.rs"]
mod suite;

use std::sync::OnceLock;

use common::World;
use soft_roce::{Options, SoftRoce};

/// Tests run side by side, on the same two addresses.
fn world() -> World {
    static HOST: OnceLock<SoftRoce> = OnceLock::new();
    let open = || {
        let options = Options { progress_thread: true, ..Options::default() };
        HOST.get_or_init(|| SoftRoce::new(options).expect("software RoCE")).cm().expect("connection manager")
    };
    // Addresses of this process, as others may test beside it.
    let [.., b, c] = std::process::id().to_be_bytes();
    World::new(open, &format!("127.{}.{c}.1,127.{}.{c}.2", 64 | b & 63, 64 | b & 63))
}
