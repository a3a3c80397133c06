//! The hostile table against a whole target over loopback, with both kinds of keys and of read answers.

mod common;

use std::time::{Duration, Instant};

use common::{Target, descriptors};
use serde_json::{Value, json};
use test_client::runner::run_table;
use test_client::{Client, Opts, Place};

/// Waits until the server has no path and the process no more than `most` descriptors; returns how many it has.
fn settled(target: &Target, most: usize) -> usize {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let (paths, count) = (target.paths().unwrap(), descriptors());
        if paths.is_empty() && count <= most {
            return count;
        }
        assert!(Instant::now() < end, "{paths:?}; {count} descriptors where {most} were before");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Returns how many cases failed.
fn table(name: &str, options: &Value) -> usize {
    let target = Target::start(name, options);
    // The server's completion queues come with the first connections, and stay.
    drop(Client::connect(target.cm().unwrap(), target.dst(), Opts::new("first")).unwrap());
    let before = settled(&target, usize::MAX);
    let failed = run_table(&target, &std::env::var("HOSTILE_CASE").unwrap_or_default()).unwrap();
    settled(&target, before);
    failed
}

// One test, so that descriptors can be counted.
#[test]
fn a_hostile_client_harms_nobody() {
    let modes = [
        ("one-message", json!({})),
        ("invalidate", json!({"one_message_reads": false})),
        ("rotating", json!({"rotate_rkeys": true})),
    ];
    let run = |(name, options): &(&str, Value)| {
        println!("--- {name}");
        table(name, options)
    };
    let failed: usize = modes.iter().map(run).sum();
    assert_eq!(failed, 0, "cases failed");
}
