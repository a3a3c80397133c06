//! Other users of the host: what they put in the way of the program is named, and they cannot put anything where it looks
//! for its own.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::json;
use test_support::Dir;

/// Users that no other test and no host has.
const USER: u32 = 64_901;
const STRANGER: u32 = 64_902;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: programs of other users need root");
    }
    root
}

/// A directory that `USER` may use, and the program in it.
fn place(network: [u8; 3]) -> (Dir, PathBuf) {
    let dir = Dir::new("rnbd-strangers");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = dir.join("rnbd-target");
    // By another process: what this one has open for writing, a child of another test has, too, until it is a program of its
    // own, and then the copy cannot be started (ETXTBSY).
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_rnbd-target")).arg(&program).status().unwrap();
    assert!(copied.success());
    let listener = json!({"traddr": test_support::address(network, 1).to_string(), "provider": "soft-roce"});
    let config = json!({"subsystems": [{"subsystem": "rnbd", "config": [
        {"method": "rnbd_create_listener", "params": listener}]}]});
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    (dir, program)
}

/// Runs the program as `USER` with a lock file that is somebody else's, so that it ends at once, or with another reason to.
fn run(dir: &Dir, program: &Path, rpc_socket: &Path) -> Output {
    let mut command = Command::new(program);
    command.uid(USER).gid(USER).arg("-c").arg(dir.join("config.json")).arg("-r").arg(rpc_socket);
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_squatted_rpc_socket_names_its_owner() {
    if !is_root() {
        return;
    }
    let (dir, program) = place(test_support::network());
    // As /var/tmp.
    let shared = dir.join("tmp");
    std::fs::create_dir(&shared).unwrap();
    std::fs::set_permissions(&shared, PermissionsExt::from_mode(0o1777)).unwrap();
    let lock = shared.join("rpc.sock.lock");
    std::fs::write(&lock, "1\n").unwrap();
    std::fs::set_permissions(&lock, PermissionsExt::from_mode(0o666)).unwrap();
    chown(&lock, Some(STRANGER), Some(STRANGER)).unwrap();
    let output = run(&dir, &program, &shared.join("rpc.sock"));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{text}");
    assert!(text.contains(&format!("{} belongs to user {STRANGER}", lock.display())), "{text}");
    assert!(text.contains("-r"), "{text}");
}

#[test]
fn squatted_names_of_soft_roce_name_their_owner() {
    if !is_root() {
        return;
    }
    let (dir, program) = place(test_support::network());
    let own = dir.join("own");
    std::fs::create_dir(&own).unwrap();
    chown(&own, Some(USER), Some(USER)).unwrap();
    // Nobody is logged in as USER, so this is where its programs meet.
    let names = PathBuf::from(format!("/tmp/rnbd-{USER}"));
    std::fs::create_dir(&names).unwrap();
    chown(&names, Some(STRANGER), Some(STRANGER)).unwrap();
    let output = run(&dir, &program, &own.join("rpc.sock"));
    std::fs::remove_dir(&names).unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{text}");
    assert!(text.contains(&format!("{} belongs to user {STRANGER}", names.display())), "{text}");
    assert!(!text.contains("ulimit"), "{text}");
}
