//! What the program consists of, and a run of it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use engine::Subsystem;
use engine::args::Common;
use perf::job::{Perf, RunOptions};
use reactor::IdlePolicy;
use rnbd_initiator::bdev::BdevRnbd;
use rnbd_initiator::bdev::nbd::BdevNbd;
use rpc::Config;

use super::outcome;

/// The program's name.
pub const PROGRAM: &str = "rnbd-perf";

/// Sections of the programs' configurations that only offer bdevs to others. Here nobody is offered anything, so that the
/// configuration of a server that is running can be measured as it is.
const EXPORTS: [&str; 5] = ["rnbd", "nbd", "nbd_server", "ublk", "vhost_blk"];

/// What brings bdevs besides the engine itself.
fn subsystems() -> Vec<Box<dyn Subsystem>> {
    vec![
        #[cfg(feature = "spdk")]
        Box::new(engine::spdk::Spdk::default()),
        Box::new(BdevRnbd::default()),
        Box::new(BdevNbd::default()),
    ]
}

/// A run as the command line describes it.
pub struct Run {
    /// Of the engine.
    pub common: Common,
    /// How long reactors poll after the last work; `None`: always.
    pub spin: Option<Duration>,
    /// What to measure.
    pub options: RunOptions,
    /// Where the result goes besides the summary; "-": standard output.
    pub json: Option<PathBuf>,
}

/// Measures.
pub fn run(run: Run) -> ExitCode {
    let Run { common, spin, options, json } = run;
    let report = move |result: &_| outcome::write(result, json.as_deref());
    let (perf, start) = Perf::new(options, Box::new(report));
    let mut all = subsystems();
    all.push(Box::new(perf));
    let options = common.options(PROGRAM, all).map(|mut o| {
        o.idle = spin.map_or(IdlePolicy::Poll, |spin| IdlePolicy::Adaptive { spin });
        o.on_ready = Some(start);
        o.config.iter_mut().for_each(leave_exports_out);
        o
    });
    engine::args::main(PROGRAM, options)
}

fn leave_exports_out(config: &mut Config) {
    let mut left_out: Vec<String> = Vec::new();
    config.calls.retain(|call| {
        let export = EXPORTS.contains(&call.subsystem.as_str());
        if export && !left_out.contains(&call.subsystem) {
            left_out.push(call.subsystem.clone());
        }
        !export
    });
    if !left_out.is_empty() {
        let names = left_out.join(", ");
        eprintln!("{PROGRAM}: {}: exports are left out: {names}", config.path.display());
    }
}
