//! The log of the real program: what peers say in it, how much they can make it say, and that nobody waits for its reader.

#[allow(dead_code)]
mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};

use common::Target;
use rpc::Client;
use serde_json::{Value, json};
use test_support::{Dir, until, until_some};

/// The program under test, on an address of its own.
struct Program {
    child: Child,
    dir: Dir,
    network: [u8; 3],
}

impl Program {
    fn start() -> Self {
        let (dir, network) = (Dir::new("rnbd-log"), test_support::network());
        let nbd = dir.join("nbd.sock");
        let config = json!({"subsystems": [
            {"subsystem": "bdev", "config": [
                {"method": "bdev_malloc_create", "params": {"name": "M0", "num_blocks": 2048, "block_size": 512}}]},
            {"subsystem": "rnbd", "config": [
                {"method": "rnbd_create_export", "params": {"device_path": "disk0", "bdev_name": "M0"}},
                {"method": "rnbd_create_listener",
                 "params": {"traddr": test_support::address(network, 1).to_string(), "provider": "soft-roce"}}]},
            {"subsystem": "nbd_server", "config": [
                {"method": "nbd_server_create_export", "params": {"name": "disk0", "bdev_name": "M0"}},
                {"method": "nbd_server_add_listener", "params": {"path": nbd}}]}]});
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_rnbd-target"))
            .args(["-m", "0x1", "-c"])
            .arg(dir.join("config.json"))
            .arg("-r")
            .arg(dir.join("rpc.sock"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let program = Self { child, dir, network };
        until("the program is ready", || {
            program.client().is_some_and(|mut c| c.call("framework_wait_init", Value::Null).is_ok())
        });
        program
    }

    fn client(&self) -> Option<Client> {
        Client::connect(self.dir.join("rpc.sock")).ok()
    }

    fn call(&self, method: &str, params: Value) -> Value {
        self.client().unwrap().call(method, params).unwrap()
    }

    fn address(&self, last: u8) -> Ipv4Addr {
        test_support::address(self.network, last)
    }

    fn nbd_socket(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    fn stderr(&mut self) -> BufReader<ChildStderr> {
        BufReader::new(self.child.stderr.take().unwrap())
    }

    /// Ends it in order.
    fn stop(mut self) {
        self.call("spdk_kill_instance", json!({"sig_name": "SIGTERM"}));
        let status = until_some("the program ends", || self.child.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A peer that maps `device_path` in a session named `sessname`.
fn map(peer: &Target, of: &Program, sessname: &str, device_path: &str) -> Result<Value, rpc::RpcError> {
    let path = json!({"src": of.address(2).to_string(), "dst": of.address(1).to_string()});
    peer.call(
        "bdev_rnbd_map",
        json!({"name": "R0", "sessname": sessname, "device_path": device_path, "paths": [path],
            "provider": "soft-roce"}),
    )
}

#[test]
fn what_peers_say_stays_in_its_line() {
    let mut program = Program::start();
    let lines = program.stderr();
    let peer = Target::start(&[]);
    let name = "s\n1970-01-01T00:00:00Z ERROR forged\u{1b}[2J\u{202e}";
    map(&peer, &program, name, "gone\nforged\u{1b}]0;x\u{7}\u{2028}\u{2066}").unwrap_err();
    peer.stop();
    program.stop();
    let lines: Vec<String> = lines.lines().map(Result::unwrap).collect();
    let text = lines.join("\n");
    for line in &lines {
        let stamp = line.split(' ').next().unwrap();
        assert!(stamp.starts_with("20") && stamp.ends_with('Z'), "not a message of the program: {line:?}");
        assert!(line.chars().all(|c| c.is_ascii_graphic() || c == ' '), "{line:?}");
    }
    assert!(text.contains(r"s\n1970-01-01T00:00:00Z ERROR forged\u{1b}[2J\u{202e}"), "{text}");
    assert!(text.contains(r"gone\nforged\u{1b}]0;x\u{7}\u{2028}\u{2066}"), "{text}");
}

#[test]
fn a_peer_that_opens_and_closes_for_ever_says_little() {
    let mut program = Program::start();
    let lines = program.stderr();
    let peer = Target::start(&[]);
    let rounds = 130;
    for _ in 0..rounds {
        map(&peer, &program, "flood", "disk0").unwrap();
        peer.call("bdev_rnbd_unmap", json!({"name": "R0"})).unwrap();
    }
    peer.stop();
    program.stop();
    let lines: Vec<String> = lines.lines().map(Result::unwrap).collect();
    for what in ["path connected", "device opened", "device closed", "session ended"] {
        let said = lines.iter().filter(|l| l.contains(what) && !l.contains("more like this")).count();
        let left_out = lines.iter().find(|l| l.contains(&format!("like=\"{what}\"")));
        let left_out: usize = left_out
            .and_then(|l| l.split_whitespace().find_map(|word| word.parse().ok()))
            .unwrap_or_else(|| panic!("{what}: {said} times, and not how many more"));
        assert!(said < rounds && said + left_out == rounds, "{what}: {said} and {left_out}");
    }
}

/// A client of the NBD server that reads a block whenever it is asked to.
struct Bystander(UnixStream);

impl Bystander {
    fn connect(program: &Program) -> Self {
        let mut socket = UnixStream::connect(program.nbd_socket()).unwrap();
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        // Fixed newstyle, no zeroes; EXPORT_NAME.
        socket.write_all(&3u32.to_be_bytes()).unwrap();
        socket.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x05disk0").unwrap();
        let mut export = [0; 10];
        socket.read_exact(&mut export).unwrap();
        Self(socket)
    }

    fn read(&mut self) {
        let mut request = [0; 28];
        request[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
        request[24..].copy_from_slice(&512u32.to_be_bytes());
        self.0.write_all(&request).unwrap();
        let mut reply = [0; 16 + 512];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4], "the read failed");
    }
}

/// Has the program log 100 messages, of about 80 bytes each.
fn say_100(client: &mut Client) {
    let names = || (0..50).map(|n| format!("N{n}"));
    let create =
        names().map(|name| ("bdev_null_create", json!({"name": name, "num_blocks": 8, "block_size": 512})));
    let delete = names().map(|name| ("bdev_null_delete", json!({"name": name})));
    for calls in [create.collect::<Vec<_>>(), delete.collect()] {
        client.call_batch(&calls).unwrap().into_iter().for_each(|answer| drop(answer.unwrap()));
    }
}

#[test]
fn nobody_waits_for_who_reads_the_log() {
    let mut program = Program::start();
    let mut bystander = Bystander::connect(&program);
    let mut client = program.client().unwrap();
    // The pipe takes 64 KiB, and the queue 4096 messages.
    for _ in 0..70 {
        say_100(&mut client);
        bystander.read();
    }
    assert_eq!(program.call("bdev_get_bdevs", json!({}))[0]["name"], "M0");
    bystander.read();
    // Somebody reads again.
    let mut lines = program.stderr().lines().map(Result::unwrap);
    let told = lines.find(|l| l.contains("messages were dropped")).expect("what was dropped is told");
    assert!(told.contains("ERROR"), "{told}");
    bystander.read();
    drop(lines);
    program.stop();
}

#[test]
fn the_end_does_not_wait_for_ever_for_who_reads_the_log() {
    let program = Program::start();
    let mut client = program.client().unwrap();
    // More than a pipe takes.
    (0..20).for_each(|_| say_100(&mut client));
    drop(client);
    program.stop();
}
