//! What the program `rnbd-initiator` consists of.

use engine::Subsystem;
use rnbd_initiator::bdev::BdevRnbd;
use rnbd_initiator::bdev::nbd::BdevNbd;

/// The program's name.
pub const PROGRAM: &str = "rnbd-initiator";

/// What joins the engine in this program: remote devices, then the exports, which are shut down before them.
pub fn subsystems() -> Vec<Box<dyn Subsystem>> {
    let mut all: Vec<Box<dyn Subsystem>> = vec![Box::new(BdevRnbd::default()), Box::new(BdevNbd::default())];
    all.extend(exports::subsystems());
    #[cfg(feature = "spdk")]
    all.insert(0, Box::new(engine::spdk::Spdk::default()));
    all
}
