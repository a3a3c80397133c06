//! A queue pair whose peer and consumer do what the input says; the driver checks what the queue pair may do.
#![no_main]

use libfuzzer_sys::fuzz_target;

// Also under a property test, which asks what it has seen.
#[allow(dead_code)]
#[path = "../../roce-proto/tests/hostile/mod.rs"]
mod hostile;

fuzz_target!(|input: &[u8]| {
    hostile::Driver::new(input).run();
});
