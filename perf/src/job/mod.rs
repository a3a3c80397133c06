//! Load on bdevs, and on vhost-user-blk sockets, from the reactors of an engine.
//!
//! ```text
//! control thread   run/:   remote bdevs are made ─▶ opened ─▶ workers prepared ─▶ go ─▶ samples … results ─▶ RunResult
//! each reactor     worker/: a poller per job; what completes is submitted anew, in batches
//!                    pattern.rs: which blocks next     rate.rs: when     record.rs: latencies, by interval
//!                    queue.rs, vhost.rs: the device, a bdev's channel or a virtqueue
//! ```
//!
//! A request costs no allocation, no lock and no clock reading of its own: requests that are found complete in one turn
//! end at one time stamp, and those submitted in one turn begin at one.

mod collect;
mod jobfile;
mod options;
mod pattern;
mod progress;
mod queue;
mod rate;
mod record;
mod run;
mod target;
mod units;
mod vhost;
mod worker;

pub use jobfile::parse as parse_jobs;
pub use options::{Job, Progress, RunOptions, Workload};
pub use progress::{si, time};
pub use run::{Perf, Report};
pub use target::{RnbdTarget, Target, VhostTarget};
pub use units::size;
