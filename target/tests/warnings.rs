//! What the log of the program says of strangers.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use serde_json::{Value, json};
use test_support::{Dir, recv, until_some};

struct Program {
    child: Child,
    log: Receiver<String>,
    dir: Dir,
}

impl Program {
    fn start(calls: impl FnOnce(&Dir, &str) -> Vec<Value>) -> Self {
        let dir = Dir::new("warnings");
        let address = test_support::address(test_support::network(), 1).to_string();
        let config = json!({"subsystems": [{"subsystem": "rnbd", "config": calls(&dir, &address)}]});
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        // Both streams into one pipe, so that it does not matter which of them the log is.
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 2>&1", env!("CARGO_BIN_EXE_rnbd-target"), "-m", "0x1", "-c"])
            .arg(dir.join("config.json"))
            .arg("-r")
            .arg(dir.join("rpc.sock"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (tx, log) = channel();
        // Ends with the program, or with the test.
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| tx.send(line)));
        Self { child, log, dir }
    }

    /// The next line that warns of strangers, and whether the program was ready before it.
    fn warning(&mut self) -> (String, bool) {
        let mut ready = false;
        loop {
            let line = recv(&self.log);
            ready |= line.contains(" ready ");
            if line.contains("everybody who reaches a listener can open") {
                assert!(line.contains("WARN"), "{line}");
                return (line, ready);
            }
        }
    }

    fn call(&self, method: &str, params: Value) {
        let mut client =
            until_some("its socket is there", || rpc::Client::connect(self.dir.join("rpc.sock")).ok());
        client.call(method, params).unwrap_or_else(|e| panic!("{method}: {e}"));
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listener(address: &str) -> Value {
    json!({"method": "rnbd_create_listener", "params": {"traddr": address, "provider": "soft-roce"}})
}

fn malloc(name: &str) -> Value {
    json!({"method": "bdev_malloc_create", "params": {"name": name, "num_blocks": 64, "block_size": 512}})
}

fn export(path: &str, bdev: &str, allow: Value) -> Value {
    json!({"method": "rnbd_create_export", "params": {"device_path": path, "bdev_name": bdev, "allow": allow}})
}

#[test]
fn exports_for_everybody_are_named_when_the_program_is_ready_and_later() {
    let mut p = Program::start(|dir, address| {
        let set = json!({"open_files": true, "dev_search_path": dir.path()});
        vec![
            json!({"method": "rnbd_set_options", "params": set}),
            malloc("Public"),
            malloc("Named"),
            malloc("Private"),
            listener(address),
            export("public", "Public", json!([])),
            export("named", "Named", json!([{"session": "backup"}])),
            export("private", "Private", json!([{"addr": "192.0.2.1"}])),
        ]
    });
    let (line, ready) = p.warning();
    assert!(ready, "once the configuration has been carried out: {line}");
    assert!(
        line.contains("'public' (read-write)") && line.contains("'named' (read-write, whoever"),
        "{line}"
    );
    assert!(line.contains(&format!("below {}/ (read-only)", p.dir.path().display())), "{line}");
    assert!(!line.contains("'private'") && !line.contains("bdev '"), "{line}");
    p.call("bdev_null_create", json!({"name": "More", "num_blocks": 64, "block_size": 512}));
    p.call("rnbd_create_export", json!({"device_path": "more", "bdev_name": "More", "read_only": true}));
    let (line, _) = p.warning();
    assert!(line.contains("can open 'more' (read-only);"), "only what is new: {line}");
}

#[test]
fn bdevs_without_exports_are_named_when_they_come() {
    let mut p = Program::start(|_, address| vec![malloc("First"), listener(address)]);
    let (line, _) = p.warning();
    assert!(line.contains("can open bdev 'First' by its own name (read-write);"), "{line}");
    p.call("bdev_null_create", json!({"name": "Second", "num_blocks": 64, "block_size": 512}));
    let (line, _) = p.warning();
    assert!(line.contains("can open bdev 'Second' by its own name (read-write);"), "{line}");
}
