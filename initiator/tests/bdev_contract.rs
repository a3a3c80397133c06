//! The contract of a bdev, checked on remote ones: the same tests as of the backends in `bdev`.
//!
//! They use channels on threads of their own, so everything goes through the proxy to a reactor's channel.

#[path = "../../bdev/tests/common/mod.rs"]
mod common;
#[path = "../../bdev/tests/contract/mod.rs"]
#[macro_use]
mod contract;
mod world;

use common::Setup;
use serde_json::json;
use world::{Initiator, Net, Target, malloc};

/// A malloc bdev of a target in this process.
fn remote(block_size: u32, rotate: bool) -> Setup {
    let setup = Setup::of(move |manager| {
        let net = Net::loopback();
        let options = json!({"queue_depth": 32, "rotate_rkeys": rotate});
        let target = Target::start(&net, &[malloc("m", block_size)], options);
        let initiator = Initiator::with(&net, manager.clone());
        let name = initiator.map(initiator.params("r", "m")).unwrap();
        // Dropped in this order.
        (name, Some(Box::new((initiator, target))))
    });
    setup.bounded()
}

suite! {
    remote_512 => remote(512, false);
    remote_4096 => remote(4096, false);
    remote_with_rotating_keys => remote(512, true);
}
