//! The program as a user sees it, a target in this process, soft-roce between them.

use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::log::LogControl;
use engine::{App, Options, app};
use reactor::{Handle, IdlePolicy};
use serde_json::json;
use test_support::{Dir, listens, patience, until};

/// Addresses and files of one test.
struct Place {
    server: Ipv4Addr,
    client: Ipv4Addr,
    /// Of a second path.
    others: [Ipv4Addr; 2],
    dir: Dir,
}

impl Place {
    /// The RoCE port is the same for all, so every test has addresses of its own.
    fn new() -> Self {
        let network = test_support::network();
        let address = |last| test_support::address(network, last);
        let dir = Dir::new("rnbd-direct");
        Self { server: address(1), client: address(2), others: [address(3), address(4)], dir }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

struct Target {
    control: Handle,
    thread: JoinHandle<Result<(), app::Error>>,
}

impl Target {
    /// Serves "disk0" for everybody, and "image" for reading.
    fn start(place: &Place) -> Self {
        let malloc = |name| {
            json!({"method": "bdev_malloc_create",
                "params": {"name": name, "num_blocks": 131_072, "block_size": 512}})
        };
        let export = |path, bdev, read_only| {
            json!({"method": "rnbd_create_export",
                "params": {"device_path": path, "bdev_name": bdev, "read_only": read_only}})
        };
        let listen = |address: Ipv4Addr| {
            json!({"method": "rnbd_create_listener",
                "params": {"traddr": address.to_string(), "provider": "soft-roce"}})
        };
        let config = json!({"subsystems": [
            {"subsystem": "bdev", "config": [malloc("M0"), malloc("M1")]},
            {"subsystem": "rnbd", "config": [
                export("disk0", "M0", false), export("image", "M1", true),
                listen(place.server), listen(place.others[0])]}]});
        let rpc_socket = place.file("target.sock");
        let (tx, rx) = channel();
        let thread = std::thread::spawn(move || {
            let options = Options {
                program: rnbd_target::PROGRAM,
                subsystems: rnbd_target::subsystems(Vec::new()),
                cpumask: "0x1".parse().unwrap(),
                rpc_socket,
                config: Some(rpc::Config::parse(config.to_string().into_bytes(), "test").unwrap()),
                wait_for_rpc: false,
                rpcs_allowed: None,
                ignore_init_errors: false,
                idle: IdlePolicy::Adaptive { spin: Duration::from_micros(20) },
                log: LogControl::detached(),
                on_ready: Some(Box::new(move |app, _| tx.send(app.control.clone()).unwrap())),
                on_refusal: None,
            };
            app::run(options, |_| ())
        });
        let Ok(control) = rx.recv() else { panic!("no start: {:?}", thread.join()) };
        Self { control, thread }
    }

    fn stop(self) {
        App::send(&self.control, App::shutdown);
        self.thread.join().unwrap().unwrap();
    }
}

/// The program under test.
struct Initiator {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

fn lines(stdout: ChildStdout) -> Receiver<String> {
    let (tx, rx) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if tx.send(line).is_err() {
                return;
            }
        }
    });
    rx
}

impl Initiator {
    fn map(place: &Place, words: &[&str]) -> Self {
        let path = format!("path=ip:{}@ip:{}", place.client, place.server);
        Self::run(place, &[&["map", "sessname=direct", &path, "reconnect_delay_sec=1"], words].concat())
    }

    fn run(place: &Place, args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_rnbd-initiator"))
            .args(args)
            .arg("-r")
            .arg(place.file("initiator.sock"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines(child.stdout.take().unwrap());
        Self { child, lines, seen: Vec::new() }
    }

    /// The next line that has all of `words`.
    fn says(&mut self, words: &[&str]) -> String {
        let until = Instant::now() + patience();
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if words.iter().all(|w| line.contains(w)) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("never said {words:?}, only {:#?}", self.seen),
                Err(RecvTimeoutError::Disconnected) => {
                    let stderr = self.stderr();
                    panic!("ended without {words:?}, after {:#?}: {stderr}", self.seen)
                }
            }
        }
    }

    /// Waits for a state, in which the program still runs.
    fn until(&mut self, what: &str, mut state: impl FnMut() -> bool) {
        until(what, || {
            assert!(self.child.try_wait().unwrap().is_none(), "{}", self.stderr());
            state()
        });
    }

    fn stderr(&mut self) -> String {
        let mut text = String::new();
        let stderr: Option<&mut ChildStderr> = self.child.stderr.as_mut();
        stderr.unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Waits for the end; status and standard error.
    fn end(&mut self) -> (i32, String) {
        let status = self.child.wait().unwrap();
        (status.code().unwrap_or(-1), self.stderr())
    }

    fn interrupt(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    }
}

impl Drop for Initiator {
    fn drop(&mut self) {
        // Already over where the test went well.
        let _ = self.child.kill();
    }
}

/// What an NBD server says first (NBD protocol, fixed newstyle).
fn greeting(socket: &Path) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(patience())).unwrap();
    let mut bytes = vec![0; 16];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn mapped_lost_restored_and_let_go() {
    let place = Place::new();
    let target = Target::start(&place);
    let socket = place.file("disk0.nbd");
    let mut p = Initiator::map(&place, &["device_path=disk0", "--nbd-socket", socket.to_str().unwrap()]);
    p.says(&["connecting to", &place.server.to_string()]);
    p.says(&["path ", "connected by soft-roce"]);
    p.says(&["device disk0: opened (rw), 64 MiB, blocks of 512 bytes"]);
    p.says(&["ready: nbd+unix:///?socket=", "disk0.nbd is disk0 of session direct"]);
    assert_eq!(greeting(&socket), b"NBDMAGICIHAVEOPT");
    target.stop();
    p.says(&["path ", "lost: "]);
    p.says(&["I/O waits"]);
    let target = Target::start(&place);
    p.says(&["path ", "restored after"]);
    p.says(&["connected again after"]);
    p.interrupt();
    p.says(&["disk0 is not mapped any more, session direct is closed"]);
    let (status, stderr) = p.end();
    assert_eq!((status, stderr.as_str()), (0, ""));
    assert!(!socket.exists(), "the socket is left behind");
    target.stop();
}

#[test]
fn refusals_are_told_in_words() {
    let place = Place::new();
    let target = Target::start(&place);
    let socket = place.file("x.nbd");
    let socket = socket.to_str().unwrap();
    for (words, says) in [
        (&["device_path=nothing", "--nbd-socket", socket][..], "ENOENT"),
        (&["device_path=image", "--nbd-socket", socket], "EROFS"),
        (&["device_path=disk0", "--nbd", "/dev/null"], "/dev/null"),
    ] {
        let mut p = Initiator::map(&place, words);
        let (status, stderr) = p.end();
        assert_eq!(status, 1, "{words:?}: {stderr}");
        assert!(stderr.contains(says), "{words:?}: {stderr}");
        assert!(stderr.starts_with("rnbd-initiator: "), "{words:?}: {stderr}");
    }
    target.stop();
    let mut p = Initiator::map(&place, &["device_path=disk0", "--nbd-socket", socket]);
    let (status, stderr) = p.end();
    assert_eq!(status, 1, "nobody listens: {stderr}");
    // A RoCE port that is gone does not answer; another program on the same port says that nobody listens.
    let told = ["nobody listens", "no answer to the connection request"];
    assert!(told.iter().any(|words| stderr.contains(words)), "{stderr}");
}

#[test]
fn read_only() {
    let place = Place::new();
    let target = Target::start(&place);
    let socket = place.file("image.nbd");
    let words = ["device_path=image", "access_mode=ro", "--nbd-socket", socket.to_str().unwrap()];
    let mut p = Initiator::map(&place, &words);
    p.says(&["opened (ro)"]);
    p.says(&["ready: "]);
    p.interrupt();
    assert_eq!(p.end().0, 0);
    target.stop();
}

#[test]
fn the_shipped_configuration() {
    shipped_configuration(&Place::new(), false);
}

/// What is made of the disk waits for it, and the rest of the program does not.
#[test]
fn the_shipped_configuration_before_its_server() {
    shipped_configuration(&Place::new(), true);
}

fn shipped_configuration(place: &Place, late: bool) {
    let mut target = (!late).then(|| Target::start(place));
    let (file, socket) = (place.file("initiator.json"), place.file("remote0.sock"));
    let mut text = include_str!("../../configs/initiator.json").to_owned();
    for (there, here) in [
        ("\"192.0.2.10\"", format!("\"{}\"", place.client)),
        ("\"192.0.2.1\"", format!("\"{}\"", place.server)),
        ("\"198.51.100.10\"", format!("\"{}\"", place.others[1])),
        ("\"198.51.100.1\"", format!("\"{}\"", place.others[0])),
        ("/var/tmp/remote0.sock", socket.to_str().unwrap().to_owned()),
    ] {
        assert!(text.contains(there), "{there} is not in the configuration any more");
        text = text.replace(there, &here);
    }
    std::fs::write(&file, text).unwrap();
    let mut p = Initiator::run(place, &["-c", file.to_str().unwrap()]);
    if late {
        p.until("the initialisation", || {
            rpc::Client::connect(place.file("initiator.sock"))
                .is_ok_and(|mut rpc| rpc.call("framework_wait_init", serde_json::Value::Null).is_ok())
        });
        assert!(!socket.exists());
        target = Some(Target::start(place));
    }
    p.until("the socket", || listens(&socket));
    assert_eq!(greeting(&socket), b"NBDMAGICIHAVEOPT");
    let connected = || {
        let mut rpc = rpc::Client::connect(place.file("initiator.sock")).unwrap();
        let sessions = rpc.call("bdev_rnbd_get_sessions", serde_json::Value::Null).unwrap();
        sessions[0]["paths"].as_array().unwrap().iter().filter(|p| p["state"] == "connected").count()
    };
    p.until("two connected paths", || connected() == 2);
    p.interrupt();
    let (status, stderr) = p.end();
    assert_eq!(status, 0, "{stderr}");
    target.unwrap().stop();
}
