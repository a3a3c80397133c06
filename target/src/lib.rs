//! `rnbd-target` as a library: bdevs behind RNBD exports, steered by JSON-RPC.
//!
//! The program is an [`engine`]; [`rnbd`] is its front end, and the [`exports`] are there too.

pub mod rnbd;

use engine::Subsystem;
use rnbd_initiator::bdev::BdevRnbd;
use rnbd_initiator::bdev::nbd::BdevNbd;
use verbs::Cm;

/// The program's name.
pub const PROGRAM: &str = "rnbd-target";

/// What joins the engine in this program. `cms`: connection managers of the RNBD server besides those that its
/// listeners open (tests bring a loopback).
pub fn subsystems(cms: Vec<Box<dyn Cm>>) -> Vec<Box<dyn Subsystem>> {
    let mut all: Vec<Box<dyn Subsystem>> =
        vec![Box::new(BdevRnbd::default()), Box::new(BdevNbd::default()), Box::new(rnbd::Rnbd::new(cms))];
    all.extend(exports::subsystems());
    #[cfg(feature = "spdk")]
    all.insert(0, Box::new(engine::spdk::Spdk::default()));
    all
}
