//! Keeps requests of a connection that broke off from overtaking what comes after them.
//!
//! A client that has lost its connection connects again and repeats what was not answered. If the repetition were
//! executed, answered, and followed by a newer write to the same place while the old request is still on its way to the
//! device, the newer data would be lost. So as long as such requests are in flight, nobody's requests for that export
//! are taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Of an export, shared by the reactors.
#[derive(Clone, Debug, Default)]
pub(super) struct Fence(Arc<AtomicUsize>);

impl Fence {
    /// Requests wait.
    pub(super) fn is_up(&self) -> bool {
        self.0.load(Ordering::Acquire) > 0
    }

    /// Up until the guard is dropped.
    pub(super) fn raise(&self) -> Raised {
        self.0.fetch_add(1, Ordering::AcqRel);
        Raised(self.clone())
    }
}

/// Somebody's requests are in flight though nobody waits for them.
#[derive(Debug)]
pub(super) struct Raised(Fence);

impl Drop for Raised {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}
