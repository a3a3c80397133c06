//! A packed ring in memory of any contents.
#![no_main]

mod vhost_guest;

use libfuzzer_sys::fuzz_target;
use vhost_guest::{SIZE, boot, check};
use vhost_poll::ring::Chain;
use vhost_poll::ring::packed::PackedRing;

fuzz_target!(|input: &[u8]| {
    let (config, memory) = boot(input, true);
    let mut chain = Chain::new();
    let mut ring = PackedRing::new(config, memory, 0x8000_8000).unwrap();
    let mut taken = 0;
    while let Ok(Some(one)) = ring.take(&mut chain) {
        check(&mut chain);
        // What is used is not available again in this lap, so a guest that does not move cannot keep it going.
        taken += u32::from(one.count);
        assert!(taken <= 2 * SIZE);
        ring.push_used(one, 1);
        ring.publish();
    }
});
