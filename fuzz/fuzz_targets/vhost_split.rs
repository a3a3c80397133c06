//! A split ring in memory of any contents.
#![no_main]

mod vhost_guest;

use libfuzzer_sys::fuzz_target;
use vhost_guest::{SIZE, boot, check};
use vhost_poll::ring::Chain;
use vhost_poll::ring::split::SplitRing;

fuzz_target!(|input: &[u8]| {
    let (config, memory) = boot(input, false);
    let mut chain = Chain::new();
    let mut ring = SplitRing::new(config, memory, 0).unwrap();
    for _ in 0..=SIZE {
        let Ok(Some(head)) = ring.take() else { break };
        if ring.read(head, &mut chain).is_ok() {
            check(&mut chain);
        }
        ring.push_used(head, 1);
        ring.publish();
    }
});
