//! Words for the user on standard output.

use std::sync::OnceLock;

use engine::log::{LAST_WORDS, LineQueue, escaped};

/// `None`: the system has no thread for it.
static OUT: OnceLock<Option<LineQueue>> = OnceLock::new();

/// A line for the user. Nobody may be reading any more, or not just now, which is no reason to stop serving. Names and
/// reasons in it may be a server's: they are escaped.
pub fn say(line: &str) {
    let out = OUT.get_or_init(|| LineQueue::start(std::io::stdout(), "words").ok());
    if let Some(out) = out {
        out.push(format!("{}\n", escaped(line)).as_bytes());
    }
}

/// The program ends: waits until everything is said, for [`LAST_WORDS`] at most.
pub fn all_said() {
    if let Some(Some(out)) = OUT.get() {
        out.flush(LAST_WORDS);
    }
}
