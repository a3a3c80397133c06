//! A client of the NBD server on a unix socket, simple replies.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use exports::nbd_server::NbdServer;
use nbd_proto::haggle::wire::{IHAVEOPT, opt};
use nbd_proto::wire::{REQUEST_LEN, REQUEST_MAGIC, SIMPLE_REPLY_LEN, cmd};
use serde_json::json;

use crate::gate::{Gate, settle};
use crate::program::Program;
use crate::{Kind, LEN, Round};

pub fn server(kind: Kind, depth: usize) -> Round {
    let program = Program::start(
        || vec![Box::new(NbdServer::default())],
        |dir| {
            vec![json!({ "subsystem": "nbd_server", "config": [
                { "method": "nbd_server_create_export", "params": { "name": "disk", "bdev_name": "disk" } },
                { "method": "nbd_server_add_listener", "params": { "path": dir.join("nbd.sock") } },
            ]})]
        },
    );
    let mut client =
        connect(&program.dir().join("nbd.sock")).unwrap_or_else(|e| panic!("NBD handshake: {e}"));
    let requests = requests(kind, depth);
    let reply = if kind == Kind::Read { SIMPLE_REPLY_LEN + LEN } else { SIMPLE_REPLY_LEN };
    let mut replies = vec![0; depth * reply];
    Box::new(move || {
        let gate = Gate::close(&program.reactor);
        // A unix socket's buffer holds a round in either direction.
        client.write_all(&requests).expect("the server reads");
        drop(gate);
        client.read_exact(&mut replies).expect("the server answers");
        assert!(replies.chunks(reply).all(|r| r[4..8] == [0; 4]), "an NBD error");
        settle(&program.reactor);
    })
}

fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let mut client = UnixStream::connect(path)?;
    client.set_read_timeout(Some(test_support::patience()))?;
    let mut hello = 3u32.to_be_bytes().to_vec();
    hello.extend(IHAVEOPT.to_be_bytes());
    hello.extend(opt::GO.to_be_bytes());
    hello.extend(6u32.to_be_bytes());
    hello.extend([0; 6]);
    client.write_all(&hello)?;
    // The greeting, INFO EXPORT, the last ACK.
    client.read_exact(&mut [0; 18 + 32 + 20])?;
    Ok(client)
}

fn requests(kind: Kind, depth: usize) -> Vec<u8> {
    let command = if kind == Kind::Read { cmd::READ } else { cmd::WRITE };
    let mut all = Vec::with_capacity(depth * (REQUEST_LEN + LEN));
    for cookie in 0..depth as u64 {
        all.extend(REQUEST_MAGIC.to_be_bytes());
        all.extend(0u16.to_be_bytes());
        all.extend(command.to_be_bytes());
        all.extend(cookie.to_be_bytes());
        all.extend((cookie * LEN as u64).to_be_bytes());
        all.extend((LEN as u32).to_be_bytes());
        if kind == Kind::Write {
            all.resize(all.len() + LEN, 7);
        }
    }
    all
}
