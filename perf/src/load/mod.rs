//! Load on one device of an RNBD server.
//!
//! ```text
//! driver.rs (control thread): connect ─▶ open ─▶ memory ─▶ start ─▶ … ─▶ results ─▶ close ─▶ report.rs
//! worker.rs (each reactor):   `queue_depth` slots, each with a buffer; what completes is submitted anew
//!   workload.rs: which blocks next          crate::stamp: what was written there
//! ```

mod driver;
mod options;
mod report;
mod worker;
mod workload;

pub use driver::{LoadError, Stopper, run};
pub use options::{LoadOptions, OptionsError, Pattern};
pub use report::{Report, Verified};
