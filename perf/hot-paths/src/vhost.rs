//! A guest's disk: one queue, driven from here.

use exports::vhost::Vhost;
use serde_json::json;
use vhost_driver::{Disk, Options};

use crate::gate::{Gate, settle};
use crate::program::Program;
use crate::{Kind, LEN, Round};

pub fn split(kind: Kind, depth: usize) -> Round {
    rounds(kind, depth, Options::default())
}

pub fn packed(kind: Kind, depth: usize) -> Round {
    rounds(kind, depth, Options { packed: true, ..Options::default() })
}

fn rounds(kind: Kind, depth: usize, guest: Options) -> Round {
    let program = Program::start(
        || vec![Box::new(Vhost::default())],
        |dir| {
            let controller =
                json!({ "ctrlr": dir.join("vhost.sock"), "dev_name": "disk", "packed_ring": true });
            vec![json!({ "subsystem": "vhost_blk", "config": [
                { "method": "vhost_create_blk_controller", "params": controller },
            ]})]
        },
    );
    let mut disk = Disk::connect(&program.dir().join("vhost.sock"), guest)
        .unwrap_or_else(|e| panic!("vhost-user handshake: {e}"));
    let mut sector = 0;
    Box::new(move || {
        let gate = Gate::close(&program.reactor);
        for _ in 0..depth {
            let slot = disk.take(0).expect("a free request");
            let (virtio_kind, out) = if kind == Kind::Read { (0, false) } else { (1, true) };
            assert!(disk.submit(0, slot, virtio_kind, sector, LEN as u32, out), "room in the ring");
            sector = (sector + 8) % 8192;
        }
        disk.publish(0);
        drop(gate);
        for _ in 0..depth {
            let (_, status) = disk.wait(0).expect("an answer");
            assert_eq!(status, 0, "the disk's status");
        }
        settle(&program.reactor);
    })
}
