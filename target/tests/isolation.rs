//! What the program cannot do any more once it has given it up, and that it serves all the same.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rpc::Client;
use serde_json::{Value, json};
use test_support::{Dir, until, until_some};

/// A user that no host has.
const USER: u32 = 64_903;

struct Program {
    child: Child,
    dir: Dir,
}

impl Program {
    /// With `args` besides the configuration, which has a disk and a listener over soft-roce.
    fn start(args: &[&str]) -> Self {
        let dir = Dir::new("rnbd-isolation");
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::create_dir(dir.join("disks")).unwrap();
        std::fs::set_permissions(dir.join("disks"), PermissionsExt::from_mode(0o777)).unwrap();
        let address = test_support::address(test_support::network(), 1).to_string();
        let config = json!({"subsystems": [
            {"subsystem": "bdev", "config": [
                {"method": "bdev_malloc_create", "params": {"name": "M0", "num_blocks": 2048, "block_size": 512}}]},
            {"subsystem": "rnbd", "config": [
                {"method": "rnbd_create_listener", "params": {"traddr": address, "provider": "soft-roce"}}]}]});
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rnbd-target"));
        command.arg("-c").arg(dir.join("config.json")).arg("-r").arg(dir.join("rpc.sock"));
        command.arg("--allow-path").arg(dir.join("disks")).args(args);
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut program = Self { child, dir };
        until("the program is ready", || {
            if let Some(status) = program.child.try_wait().unwrap() {
                panic!("{status}: {}", program.said());
            }
            let client = Client::connect(program.dir.join("rpc.sock"));
            client.is_ok_and(|mut c| c.call("framework_wait_init", Value::Null).is_ok())
        });
        program
    }

    fn said(&mut self) -> String {
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    fn file_bdev(&self, path: PathBuf) -> Result<Value, rpc::RpcError> {
        let params = json!({"name": "File", "filename": path, "block_size": 512});
        Client::connect(self.dir.join("rpc.sock")).unwrap().call("bdev_uring_create", params)
    }

    fn disk(&self, of: &str) -> PathBuf {
        let path = self.dir.join(of);
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
        path
    }

    /// What /proc says of each thread.
    fn threads(&self) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap()).collect()
    }

    fn stop(mut self) {
        let mut client = Client::connect(self.dir.join("rpc.sock")).unwrap();
        client.call("spdk_kill_instance", json!({"sig_name": "SIGTERM"})).unwrap();
        let status = until_some("the program ends", || self.child.try_wait().unwrap());
        assert!(status.success(), "{status}: {}", self.said());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn has_landlock() -> bool {
    let dir = Dir::new("rnbd-landlock");
    // It ends at once, one way or the other.
    let config = json!({"subsystems": [{"subsystem": "bdev", "config": [
        {"method": "bdev_null_delete", "params": {"name": "none"}}]}]});
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_rnbd-target"))
        .args(["-r".into(), dir.join("rpc.sock"), "-c".into(), dir.join("config.json")])
        .arg("--allow-path")
        .arg(dir.path())
        .output()
        .unwrap();
    !String::from_utf8_lossy(&output.stderr).contains("no Landlock")
}

/// A line of /proc/PID/status.
fn line<'a>(status: &'a str, name: &str) -> &'a str {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("{name} in {status}")).trim()
}

#[test]
fn files_that_were_not_named_stay_closed() {
    if !has_landlock() {
        return println!("SKIPPED: this kernel has no Landlock");
    }
    let program = Program::start(&["--sandbox", "kill"]);
    let (inside, outside) = (program.disk("disks/inside"), program.disk("outside"));
    let refused = program.file_bdev(outside).unwrap_err();
    assert!(refused.message.contains("ermission denied"), "{refused}");
    program.file_bdev(inside).unwrap();
    for status in program.threads() {
        assert_eq!((line(&status, "Seccomp"), line(&status, "NoNewPrivs")), ("2", "1"), "{status}");
    }
    program.stop();
}

#[test]
fn another_user_has_no_capability_in_any_thread() {
    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED: becoming another user needs root");
    }
    let user = USER.to_string();
    let args = ["--user", &user, "--group", &user, "--sandbox", "kill"];
    let program = Program::start(&args);
    let ids = [USER; 4].map(|id| id.to_string()).join("\t");
    for status in program.threads() {
        assert_eq!((line(&status, "Uid"), line(&status, "Gid"), line(&status, "Groups")), (&*ids, &*ids, ""));
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(u64::from_str_radix(line(&status, set), 16), Ok(0), "{set} of {status}");
        }
    }
    // The configuration was carried out as that user, and so is what is called now.
    let (disk, secret) = (program.disk("disks/disk"), program.disk("disks/secret"));
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    assert!(program.file_bdev(secret).is_err());
    program.file_bdev(disk).unwrap();
    program.stop();
    std::fs::remove_dir_all(format!("/run/rnbd-{USER}")).unwrap();
}

#[test]
fn what_was_asked_to_be_kept_is_all_there_is() {
    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED: capabilities need root");
    }
    let program = Program::start(&["--capabilities", "CAP_NET_BIND_SERVICE,ipc_lock"]);
    for status in program.threads() {
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            assert_eq!(
                u64::from_str_radix(line(&status, set), 16),
                Ok(1 << 10 | 1 << 14),
                "{set} of {status}"
            );
        }
    }
    program.stop();
}
