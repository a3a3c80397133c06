//! What the load programs share. Each program is a file or folder of `src/bin`.
//!
//! [`job`] puts load on bdevs and vhost-user-blk sockets and measures it, [`result`] is what comes out, and [`report`]
//! makes pages of it: together they are `rnbd-perf`. [`load`] is `rtrs-load`'s.

pub mod job;
pub mod load;
mod machine;
mod provider;
pub mod report;
pub mod result;
mod rng;
mod stamp;

pub use provider::open_provider;

/// Sources of this build: a commit, with "+" if there were changes besides.
pub fn revision() -> String {
    let git = machine::git();
    git.revision + if git.dirty { "+" } else { "" }
}
