//! rnbd-target as a process of its own.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use serde_json::{Value, json};
use test_support::{Dir, listens, until};

/// The program, with a device `disk0` of 64 MiB.
pub struct Program {
    child: Mutex<Child>,
    network: [u8; 3],
    /// Where it listens.
    pub addr: SocketAddr,
    dir: Dir,
}

/// What the program uses.
pub struct Usage {
    pub descriptors: usize,
    /// Bytes that are resident.
    pub memory: u64,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} descriptors, {} MiB", self.descriptors, self.memory >> 20)
    }
}

impl Program {
    /// Starts it with these options of `rnbd_set_options`.
    pub fn start(options: &Value) -> Self {
        let network = test_support::network();
        let ip = IpAddr::from(test_support::address(network, 1));
        let dir = Dir::new("exhaustion");
        let config = json!({"subsystems": [
            {"subsystem": "bdev", "config": [
                {"method": "bdev_malloc_create", "params": {"name": "m0", "num_blocks": 131072, "block_size": 512}}]},
            {"subsystem": "rnbd", "config": [
                {"method": "rnbd_set_options", "params": options},
                {"method": "rnbd_create_export", "params": {"device_path": "disk0", "bdev_name": "m0"}},
                {"method": "rnbd_create_listener", "params": {"traddr": ip.to_string(), "provider": "soft-roce"}}]}]});
        std::fs::write(dir.join("target.json"), config.to_string()).unwrap();
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_rnbd-target"))
            .args(["-m", "0x1", "-c"])
            .arg(dir.join("target.json"))
            .arg("-r")
            .arg(dir.join("rpc.sock"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let program = Self { child: Mutex::new(child), network, addr: SocketAddr::new(ip, 1234), dir };
        until("the program is ready", || {
            let ended = program.child.lock().unwrap().try_wait().unwrap();
            assert_eq!(ended, None, "{}", program.log());
            listens(program.dir.join("rpc.sock")) && program.log().contains(" ready ")
        });
        program
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// An address of the test's network; the program's is number 1.
    pub fn ip(&self, last: u8) -> IpAddr {
        test_support::address(self.network, last).into()
    }

    /// One call.
    pub fn call(&self, method: &str, params: Value) -> Value {
        let mut client = rpc::Client::connect(self.dir.join("rpc.sock")).unwrap();
        client.call(method, params).unwrap()
    }

    /// Paths to addresses from number 100 on.
    pub fn paths_of_strangers(&self) -> usize {
        let sessions = self.call("rnbd_get_sessions", Value::Null);
        let paths = sessions.as_array().unwrap().iter().flat_map(|s| s["paths"].as_array().unwrap());
        let stranger = |src: &str| src.rsplit('.').next().unwrap().parse::<u8>().unwrap() >= 100;
        paths.filter(|p| stranger(p["src"].as_str().unwrap())).count()
    }

    pub fn usage(&self) -> Usage {
        let proc = format!("/proc/{}", self.child.lock().unwrap().id());
        let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        Usage { descriptors: std::fs::read_dir(format!("{proc}/fd")).unwrap().count(), memory: kib << 10 }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        if std::thread::panicking() {
            println!("{}", self.log());
        }
    }
}
