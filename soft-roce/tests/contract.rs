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
    static NETWORK: OnceLock<[u8; 3]> = OnceLock::new();
    let network = *NETWORK.get_or_init(test_support::network);
    World::new(open, &common::ips(network))
}
