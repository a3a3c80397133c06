//! Alone in its process, for it counts descriptors.

mod common;

use common::{TestClient, TestServer, server_options, session_options, short_heartbeat, wait_for};
use rtrs_poll::Options;
use rtrs_poll::client::SessionOptions;
use verbs::loopback::Fabric;

/// What is left after many sessions: nothing.
#[test]
fn sessions_leave_nothing() {
    let fabric = Fabric::new();
    let server = TestServer::start(&fabric, Options { heartbeat: short_heartbeat(), ..server_options(true) });
    let client = TestClient::start(&fabric, 2);
    let descriptors = || std::fs::read_dir("/proc/self/fd").expect("Linux").count();
    let before = descriptors();
    for cycle in 0..50 {
        let c = client.connect(SessionOptions { connections: 3, reactors: vec![0, 1], ..session_options(2) });
        client.start_load(&c, 4);
        client.verify_more(&c, 10);
        // In the middle of it, or after it has ended.
        if cycle % 2 == 1 {
            client.stop_load(&c);
        }
        client.close(c.id);
        for n in 0..2 {
            client.on_lane(n, |probe, _| probe.load = None);
        }
        drop(c);
        while client.seen.try_recv().is_ok() {}
        wait_for("the server to forget", || server.sessions() == 0);
        wait_for("memory to be given back", || {
            client.with(|cl, _| cl.refresh_memory());
            client.registry.snapshot().regions.iter().flatten().count() == 0
        });
        wait_for("descriptors to be closed", || descriptors() == before);
    }
}
