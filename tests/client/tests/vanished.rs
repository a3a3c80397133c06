//! Clients of whom nothing is heard any more: heartbeats must end their paths, and nothing else may.

mod common;

use std::time::{Duration, Instant};

use common::Target;
use rnbd_proto::wire::Flags;
use serde_json::json;
use test_client::{Client, Opts, Outcome, Place};
use test_support::{limit, until};

const MISSED_MAX: u32 = 6;

/// Clients have several of these to answer, however slow the machine is.
fn interval() -> Duration {
    limit(1) / 2
}

/// From the last sign of life to the end: one interval until the first heartbeat, then the patience (`rtrs.c`,
/// `hb_work`).
fn silence() -> Duration {
    interval() * (MISSED_MAX + 2)
}

fn target(name: &str) -> Target {
    let ms = interval().as_millis() as u64;
    Target::start(name, &json!({"heartbeat_interval_ms": ms, "heartbeat_missed_max": MISSED_MAX}))
}

fn connect(target: &Target, opts: Opts) -> (Client, u32) {
    let mut client = Client::connect(target.cm().unwrap(), target.dst(), opts).unwrap();
    let device = client.open("slow", 1).unwrap().device_id.get();
    (client, device)
}

#[test]
fn a_client_behind_a_cut_cable_is_forgotten_with_its_requests() {
    let target = target("cut");
    let (mut client, device) = connect(&target, Opts::new("cut"));
    let msg = rnbd_proto::wire::MsgIo::request(device, rnbd_proto::wire::Op::Write, Flags::SYNC, 0, 512, 0);
    let began = Instant::now();
    for id in 0..8 {
        let frame = test_client::Frame::write(&[1; 512], zerocopy::IntoBytes::as_bytes(&msg));
        client.send(1, id, &frame).unwrap();
    }
    for address in client.addresses() {
        target.fabric.cut(address, target.dst());
    }
    until("the path is forgotten", || target.paths().unwrap().is_empty());
    let took = began.elapsed();
    assert!(took >= silence() / 2, "{took:?}: too early");
    // Its device is free.
    let (mut next, device) = connect(&target, Opts::new("next"));
    assert_eq!(next.flush(device).unwrap(), Outcome::Ok);
}

#[test]
fn a_client_that_does_not_answer_heartbeats_is_disconnected() {
    let target = target("mute");
    let (mut client, device) = connect(&target, Opts { answer_heartbeats: false, ..Opts::new("mute") });
    let began = Instant::now();
    assert_eq!(client.flush(device).unwrap(), Outcome::Ok);
    assert!(client.wait_closed(target.timeout()), "the path stays");
    assert!(client.heartbeats > 0, "it was closed without being asked");
    assert!(began.elapsed() >= silence() / 2, "{:?}: too early", began.elapsed());
}

#[test]
fn a_client_with_traffic_need_not_answer_heartbeats() {
    let target = target("busy");
    let (mut client, device) = connect(&target, Opts { answer_heartbeats: false, ..Opts::new("busy") });
    let began = Instant::now();
    while began.elapsed() < silence() * 2 {
        assert_eq!(client.flush(device).unwrap(), Outcome::Ok);
        client.pump_for(interval() / 4);
    }
    assert!(client.is_up());
}

#[test]
fn an_idle_client_that_answers_stays() {
    let target = target("idle");
    let (mut client, device) = connect(&target, Opts::new("idle"));
    client.pump_for(silence() * 2);
    assert!(client.is_up() && client.heartbeats >= 2, "{} heartbeats", client.heartbeats);
    assert_eq!(client.flush(device).unwrap(), Outcome::Ok);
}
