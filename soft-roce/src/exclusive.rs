//! A value that one thread uses at a time.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};

/// One atomic swap to enter, one store to leave. An engine's completion queue and queue pairs live on one thread, so
/// nobody else is ever inside in production; where tests or a progress thread share an engine, the other one waits
/// for the turn to end.
pub struct Exclusive<T> {
    busy: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `enter` lets one thread in at a time, and its acquire pairs with the release of the guard's drop, so `T` is
// used as if it were sent from thread to thread.
unsafe impl<T: Send> Sync for Exclusive<T> {}

/// Access to the value until it is dropped.
pub struct Guard<'a, T> {
    of: &'a Exclusive<T>,
    /// As shareable as what it gives.
    _value: PhantomData<&'a mut T>,
}

impl<T> Exclusive<T> {
    pub const fn new(value: T) -> Self {
        Self { busy: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Without waiting: nobody else has the value.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    /// Waits until nobody is inside. Not reentrant.
    pub fn enter(&self) -> Guard<'_, T> {
        let mut spins = 0u32;
        while self.busy.swap(true, Ordering::Acquire) {
            // The other's thread may need this core to get out.
            spins += 1;
            if spins < 64 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        Guard { of: self, _value: PhantomData }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this guard is the only one (`enter`), so no `&mut T` exists but through it.
        unsafe { &*self.of.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and `self` is exclusively borrowed.
        unsafe { &mut *self.of.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.of.busy.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_threads_never_meet_inside() {
        let shared = Exclusive::new((0u64, 0u64));
        std::thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    for _ in 0..20_000 {
                        let mut v = shared.enter();
                        let (a, b) = &mut *v;
                        assert_eq!(a, b);
                        *a += 1;
                        *b += 1;
                    }
                });
            }
        });
        assert_eq!(*shared.enter(), (40_000, 40_000));
    }
}
