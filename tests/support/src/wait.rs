//! Waiting for states.

use std::fmt::Display;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How much longer everything may take here: `TIME_SCALE`, a number of at least 1, which is the default.
///
/// # Panics
/// It is something else.
pub fn scale() -> f64 {
    static SCALE: OnceLock<f64> = OnceLock::new();
    *SCALE.get_or_init(|| match std::env::var("TIME_SCALE") {
        Ok(text) => parse(&text).unwrap_or_else(|| panic!("TIME_SCALE: '{text}' is no number of 1 to 1000")),
        Err(_) => 1.0,
    })
}

fn parse(text: &str) -> Option<f64> {
    text.trim().parse().ok().filter(|scale| (1.0..=1000.0).contains(scale))
}

/// So many seconds, on this machine.
pub fn limit(seconds: u64) -> Duration {
    Duration::from_secs(seconds).mul_f64(scale())
}

/// How long any one thing may take before it counts as hanging.
pub fn patience() -> Duration {
    limit(120)
}

/// Waits until `state` is true.
///
/// # Panics
/// It hangs.
#[track_caller]
pub fn until(what: impl Display, mut state: impl FnMut() -> bool) {
    until_some(what, || state().then_some(()));
}

/// Waits until `state` is something, and returns it. The first looks come one after the other, the later ones with
/// pauses that leave the processor to others.
///
/// # Panics
/// It hangs.
#[track_caller]
pub fn until_some<T>(what: impl Display, mut state: impl FnMut() -> Option<T>) -> T {
    let (begin, patience) = (Instant::now(), patience());
    let mut looks = 0u32;
    loop {
        if let Some(found) = state() {
            return found;
        }
        // The time of a state that came while this thread stood still counts, too: one more look decides.
        if begin.elapsed() > patience {
            return state().unwrap_or_else(|| panic!("not within {patience:?}: {what}"));
        }
        looks += 1;
        match looks {
            0..100 => std::thread::yield_now(),
            100..200 => std::thread::sleep(Duration::from_micros(100)),
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// What comes next.
///
/// # Panics
/// Nothing does, or nobody is left to send anything.
#[track_caller]
pub fn recv<T>(from: &Receiver<T>) -> T {
    match from.recv_timeout(patience()) {
        Ok(found) => found,
        Err(RecvTimeoutError::Timeout) => panic!("nothing came within {:?}", patience()),
        Err(RecvTimeoutError::Disconnected) => panic!("nothing comes any more: who should send it has ended"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_numbers_from_1_on() {
        assert_eq!(["1", "2.5", " 8\n"].map(parse), [Some(1.0), Some(2.5), Some(8.0)]);
        assert_eq!(["", "0.5", "-1", "x", "nan", "inf", "1001"].map(parse), [None; 7]);
    }

    #[test]
    fn waiting_ends_with_the_state() {
        let mut looks = 0;
        until("a few looks", || {
            looks += 1;
            looks == 250
        });
        assert_eq!(until_some("something", || Some(7)), 7);
        let (tx, rx) = std::sync::mpsc::channel();
        tx.send(3).unwrap();
        assert_eq!(recv(&rx), 3);
        drop(tx);
        assert!(std::panic::catch_unwind(move || recv(&rx)).is_err());
    }
}
