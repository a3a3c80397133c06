//! The suite on the in-process provider, or on rdma-core: `VERBS_CONTRACT=rdma-core@10.9.1.1,10.9.1.2 contract
//! --test-threads=1` runs it on the RDMA devices behind these two local addresses, which may be the same.

mod common;
mod suite;

use common::World;
use verbs::loopback::Fabric;

fn world() -> World {
    match std::env::var("VERBS_CONTRACT") {
        Ok(text) => {
            let ips = text.strip_prefix("rdma-core@").expect("VERBS_CONTRACT=rdma-core@SERVER,CLIENT");
            World::new(|| verbs::rdma_core::open().expect("rdma-core"), ips)
        }
        Err(_) => World::loopback(Fabric::new()),
    }
}
