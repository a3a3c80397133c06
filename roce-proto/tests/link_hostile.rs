//! A peer that sends whatever it likes: no panic, nothing is touched outside of what was allowed, every posted request
//! completes at most once, and in order.

mod hostile;

use hostile::Driver;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn nothing_breaks(input in prop::collection::vec(any::<u8>(), 0..4000)) {
        Driver::new(&input).run();
    }
}

#[test]
fn arbitrary_input_reaches_every_kind_of_outcome() {
    let mut seen = hostile::Seen::default();
    let mut state = 1u64;
    for _ in 0..3000 {
        let input: Vec<u8> = (0..3000)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect();
        seen.merge(&Driver::new(&input).run());
    }
    assert!(seen.is_complete(), "{seen:?}");
}
