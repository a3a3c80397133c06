//! The whole stack over soft-roce on a network that loses, doubles, changes and reorders packets: slower, never wrong.

mod common;

use std::time::Duration;

use common::{Net, Target, options};
use perf::load::{LoadOptions, Pattern};
use serde_json::json;
use soft_roce::{Faults, Options, SoftRoce};

/// Every packet passes the faults of its receiver.
fn net(faults: Faults) -> Net {
    let host = |seed| {
        let faults = Some(Faults { seed, ..faults });
        SoftRoce::new(Options { faults, ..Options::default() }).expect("software RoCE")
    };
    let (server, client) = (host(1), host(2));
    let network = test_support::network();
    Net {
        server: server.cm().expect("a connection manager"),
        client: Box::new(move || client.cm().expect("a connection manager")),
        provider: "soft-roce",
        server_ip: test_support::address(network, 1).into(),
        client_ip: test_support::address(network, 2).into(),
    }
}

fn verify(name: &str, faults: Faults, rotate: bool) {
    let rtrs = json!({ "queue_depth": 64, "rotate_rkeys": rotate });
    let target = Target::start_on(net(faults), &rtrs);
    for block_size in [512, 4096, 65536] {
        let time = Duration::from_secs(2);
        let mut o = LoadOptions { block_size, time, ..options(Pattern::Verify, "m512") };
        // A session each: the server may not have heard yet that the last one ended.
        o.session.name = format!("load-{block_size}");
        let report = target.load(o).unwrap_or_else(|e| panic!("{name} {block_size}: {e}"));
        let v = report.verify.as_ref().expect("asked for");
        assert!(report.is_good(), "{name} {block_size}: {:?} {:?}", report.first_error, v.mismatch);
        assert!(v.blocks_checked > v.blocks_checked_at_end && v.blocks_checked_at_end > 0, "{v:?}");
        println!("{name}, {block_size} bytes: {}", report.summary());
    }
}

const FAULTS: Faults = Faults { seed: 0, lost: 0, doubled: 0, changed: 0, overtaken: 0 };

#[test]
fn a_good_network() {
    verify("good", FAULTS, false);
}

#[test]
fn lost_packets() {
    verify("lost", Faults { lost: 10, ..FAULTS }, false);
}

#[test]
fn changed_packets() {
    verify("changed", Faults { changed: 10, ..FAULTS }, false);
}

#[test]
fn overtaken_and_doubled_packets() {
    verify("overtaken", Faults { overtaken: 20, doubled: 20, ..FAULTS }, false);
}

#[test]
fn everything_at_once_with_rotating_keys() {
    verify("all", Faults { lost: 10, doubled: 10, changed: 10, overtaken: 10, ..FAULTS }, true);
}
