//! Directories of tests.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory of this test alone, which goes away with it. Its path is short enough for sockets.
#[derive(Debug)]
pub struct Dir(PathBuf);

impl Dir {
    /// In the system's directory for temporary files.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn new(name: &str) -> Self {
        Self::new_in(&std::env::temp_dir(), name)
    }

    /// In `parent`. What another test of the same process number has left there is let alone.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn new_in(parent: &Path, name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("{name}-{}-{n}", std::process::id()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Self(path),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => panic!("{}: {e}", path.display()),
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }

    /// A new file of zeroes in it.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn file(&self, name: &str, len: u64) -> PathBuf {
        let path = self.join(name);
        let made = std::fs::File::create_new(&path).and_then(|f| f.set_len(len));
        made.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // Failure leaves a directory, which spoils no test.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_new_and_go_away() {
        let parent = Dir::new("support");
        let next = Dir::new_in(parent.path(), "d");
        let first = next.path().to_owned();
        // As if a process of this number had been killed before.
        let in_the_way: Vec<PathBuf> = (0..50)
            .map(|n| parent.join(format!("e-{}-{n}", std::process::id())))
            .inspect(|p| std::fs::create_dir(p).unwrap())
            .collect();
        let other = Dir::new_in(parent.path(), "e");
        assert!(!in_the_way.contains(&other.path().to_owned()));
        assert_eq!(std::fs::metadata(other.file("f", 10)).unwrap().len(), 10);
        drop((next, other));
        assert!(!first.exists() && in_the_way[0].exists());
    }
}
