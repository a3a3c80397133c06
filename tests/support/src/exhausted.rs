//! A process without descriptors.

use std::fs::File;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// While it is there, this process can open nothing more. For tests that are alone in their process.
#[derive(Debug)]
pub struct Exhausted {
    before: Rlimit,
    _all: Vec<File>,
}

impl Exhausted {
    /// Lowers the soft limit, and opens files until it is reached.
    ///
    /// # Panics
    /// There is no /proc or /dev/null.
    pub fn new() -> Self {
        let before = getrlimit(Resource::Nofile);
        let open = std::fs::read_dir("/proc/self/fd").expect("/proc").count() as u64;
        setrlimit(Resource::Nofile, Rlimit { current: Some(open + 16), ..before }).expect("a lower limit");
        let all = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        Self { before, _all: all }
    }
}

impl Default for Exhausted {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Exhausted {
    fn drop(&mut self) {
        // As it was, so it is allowed.
        let _ = setrlimit(Resource::Nofile, self.before);
    }
}
