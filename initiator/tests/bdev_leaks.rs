//! Mappings that come and go leave nothing: alone in its process, whose descriptors it counts.

mod world;

use bdev::Manager;
use serde_json::json;
use world::load::Load;
use world::{Initiator, Net, Target, malloc, until};

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn regions(manager: &Manager) -> usize {
    manager.registry().snapshot().regions.iter().flatten().count()
}

#[test]
fn fifty_mappings_leave_nothing() {
    let net = Net::loopback();
    let target = Target::start(&net, &[malloc("a", 512), malloc("b", 4096)], json!({"queue_depth": 32}));
    let initiator = Initiator::new(&net);
    let mut first = None;
    for round in 0..50 {
        initiator.map(initiator.params("a", "a")).unwrap();
        initiator.map(initiator.params("b", "b")).unwrap();
        let load = Load::start(
            &initiator.manager,
            &initiator.reactors[round % initiator.reactors.len()],
            "a",
            4,
            16,
        );
        load.goes_on(8);
        load.stop().good();
        initiator.unmap("a", false).unwrap();
        initiator.unmap("b", false).unwrap();
        assert_eq!(initiator.sessions(), [""; 0]);
        until("the server has forgotten it", || target.paths().is_empty());
        if round == 4 {
            first = Some((open_files(), regions(&initiator.manager)));
        }
    }
    let (files, memory) = first.unwrap();
    until("regions are given back", || regions(&initiator.manager) <= memory);
    until("descriptors are given back", || open_files() <= files);
    assert!(initiator.manager.list().is_empty());
}
