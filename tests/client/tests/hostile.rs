//! The hostile table against a whole target over loopback, with both kinds of keys and of read answers.

mod common;

use common::{Target, descriptors};
use serde_json::{Value, json};
use test_client::runner::run_table;
use test_client::{Client, Opts, Place};
use test_support::until_some;

/// Waits until the server has no path and the process no more than `most` descriptors; returns how many it has.
fn settled(target: &Target, most: usize) -> usize {
    until_some(format_args!("no paths, and {most} descriptors at most, as before"), || {
        let count = descriptors();
        (target.paths().unwrap().is_empty() && count <= most).then_some(count)
    })
}

/// Returns how many cases failed.
fn table(name: &str, options: &Value) -> usize {
    let target = Target::start(name, options);
    // Whatever is made once comes with the first connections.
    drop(Client::connect(target.cm().unwrap(), target.dst(), Opts::new("first")).unwrap());
    let before = settled(&target, usize::MAX);
    let failed = run_table(&target, &std::env::var("HOSTILE_CASE").unwrap_or_default()).unwrap();
    settled(&target, before);
    failed
}

// One test, so that descriptors can be counted.
#[test]
fn a_hostile_client_harms_nobody() {
    // The witness answers heartbeats between cases, of which one may take long here.
    let patient = 1000;
    let modes = [
        ("one-message", json!({"heartbeat_missed_max": patient})),
        ("invalidate", json!({"heartbeat_missed_max": patient, "one_message_reads": false})),
        ("rotating", json!({"heartbeat_missed_max": patient, "rotate_rkeys": true})),
    ];
    let run = |(name, options): &(&str, Value)| {
        println!("--- {name}");
        table(name, options)
    };
    let failed: usize = modes.iter().map(run).sum();
    assert_eq!(failed, 0, "cases failed");
}
