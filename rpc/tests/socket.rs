//! The server on a real socket in a temporary directory, with clients in other threads.

use rpc::{Client, ListenError, MethodTable, Responder, RpcError, Server, State, States};
use rustix::event::{PollFd, PollFlags};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use test_support::{patience, until};

/// A directory that is removed at the end of the test.
struct Dir(test_support::Dir);

impl Dir {
    fn new() -> Self {
        Dir(test_support::Dir::new("rpc-test"))
    }

    fn socket(&self) -> PathBuf {
        self.0.join("rpc.sock")
    }
}

#[derive(Default)]
struct App {
    kept: Vec<Responder>,
    notified: u32,
}

#[derive(Deserialize)]
struct Size {
    bytes: usize,
}

#[derive(Deserialize)]
struct Echo {
    value: Value,
}

fn table() -> MethodTable<App> {
    let mut table = MethodTable::new();
    table.method::<Echo>("echo", States::ANY, |_, p, r| r.ok(p.value));
    table.method::<Size>("big", States::ANY, |_, p, r| r.ok("x".repeat(p.bytes)));
    table.method_without_params("keep", States::ANY, |app: &mut App, r| app.kept.push(r));
    table.method_without_params("release", States::ANY, |app, r| {
        for kept in app.kept.drain(..) {
            kept.ok("released");
        }
        r.ok(true);
    });
    table.method_without_params("drop", States::ANY, |app, r| {
        app.kept.clear();
        r.ok(true);
    });
    table.method_without_params("later", States::ANY, |_, r| {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            r.ok("from another thread");
        });
    });
    table.method_without_params("notified", States::ANY, |app, r| r.ok(app.notified));
    table.method_without_params("notify", States::ANY, |app, r| {
        app.notified += 1;
        r.ok(true);
    });
    table.method_sync::<rpc::NoParams, bool>("fail", States::ANY, |_, _| Err(RpcError::from_errno(95)));
    table
}

/// A server in a thread of its own that sleeps whenever there is nothing to do, as in the idle policy `adaptive`: a
/// wake-up that is missing shows as a client's timeout.
struct Running {
    dir: Dir,
    stop: Arc<AtomicBool>,
    /// Turns of the loop, to notice spinning.
    turns: Arc<AtomicU32>,
    /// It has nothing to do.
    asleep: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start() -> Self {
        let dir = Dir::new();
        let mut server = Server::listen(&dir.socket(), Arc::new(table())).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let turns = Arc::new(AtomicU32::new(0));
        let asleep = Arc::new(AtomicBool::new(false));
        let (stop2, turns2, asleep2) = (Arc::clone(&stop), Arc::clone(&turns), Arc::clone(&asleep));
        let thread = std::thread::spawn(move || {
            let mut app = App::default();
            while !stop2.load(Ordering::Relaxed) {
                turns2.fetch_add(1, Ordering::Relaxed);
                if !server.poll(&mut app) {
                    // No time-out, so that no test passes by it: clients give up.
                    let mut fds = [PollFd::new(&server, PollFlags::IN)];
                    asleep2.store(true, Ordering::Relaxed);
                    rustix::event::poll(&mut fds, None).unwrap();
                    asleep2.store(false, Ordering::Relaxed);
                }
            }
        });
        Running { dir, stop, turns, asleep, thread: Some(thread) }
    }

    fn client(&self) -> Client {
        let mut client = Client::connect(self.dir.socket()).unwrap();
        client.set_timeout(Some(patience())).unwrap();
        client
    }

    fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.socket()).unwrap();
        stream.set_read_timeout(Some(patience())).unwrap();
        stream
    }

    /// Waits for a moment in which the loop stands still; one that spins has none.
    fn comes_to_rest(&self) {
        until("the server sleeps", || {
            let before = self.turns.load(Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(100));
            self.asleep.load(Ordering::Relaxed) && self.turns.load(Ordering::Relaxed) - before <= 1
        });
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the loop.
        let _ = UnixStream::connect(self.dir.socket());
        let result = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            result.unwrap();
            assert!(!self.dir.socket().exists(), "the socket is removed");
            assert_eq!(std::fs::read_dir(self.dir.0.path()).unwrap().count(), 0, "and so is the lock file");
        }
    }
}

fn send(stream: &UnixStream, text: &str) {
    use std::io::Write;
    (&*stream).write_all(text.as_bytes()).unwrap();
}

fn read_to_end(mut stream: &UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn calls_and_errors() {
    let server = Running::start();
    let mut client = server.client();
    assert_eq!(client.call("echo", json!({"value": "h\u{e4}"})), Ok(json!("h\u{e4}")));
    assert_eq!(client.call("fail", Value::Null).unwrap_err().code, -95);
    assert_eq!(client.call("nothing", Value::Null).unwrap_err().code, -32601);
    assert_eq!(client.call("echo", json!({"v": 1})).unwrap_err().code, -32602);
    let names = client.call("rpc_get_methods", json!({"current": true, "include_aliases": false})).unwrap();
    assert!(names.as_array().unwrap().contains(&json!("echo")));
    // The server sleeps when idle.
    server.comes_to_rest();
}

#[test]
fn pretty_printed_pipelined_requests_in_any_pieces() {
    let server = Running::start();
    let mut client = server.client();
    let text: String = (0..3)
        .map(|id| {
            let request =
                json!({"jsonrpc": "2.0", "method": "echo", "id": id, "params": {"value": "\u{1f4be}"}});
            serde_json::to_string_pretty(&request).unwrap() + "\n"
        })
        .collect();
    for piece in text.as_bytes().chunks(7) {
        client.send_bytes(piece).unwrap();
        std::thread::yield_now();
    }
    for id in 0..3 {
        let reply = client.receive().unwrap();
        assert_eq!(reply, json!({"jsonrpc": "2.0", "id": id, "result": "\u{1f4be}"}));
    }
}

#[test]
fn replies_are_ascii_lines() {
    let server = Running::start();
    let stream = server.stream();
    send(&stream, "{\"method\":\"echo\",\"params\":{\"value\":\"\u{e4}\"},\"id\":\"\u{20ac}\"}");
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&stream), "{\"jsonrpc\":\"2.0\",\"id\":\"\\u20ac\",\"result\":\"\\u00e4\"}\n");
}

#[test]
fn broken_json_is_answered_after_earlier_requests_and_closes() {
    let server = Running::start();
    let stream = server.stream();
    send(
        &stream,
        "{\"method\":\"echo\",\"params\":{\"value\":1},\"id\":1} {\"method\" oops {\"method\":\"fail\",\"id\":2}",
    );
    let text = read_to_end(&stream);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert_eq!(lines[0]["result"], 1);
    assert_eq!(lines[1]["error"]["code"], -32700);
    assert_eq!(lines[1]["id"], Value::Null);
    assert!(lines[1].as_object().unwrap().contains_key("id"));
}

#[test]
fn too_large_a_request_is_refused() {
    let server = Running::start();
    let stream = server.stream();
    let writer = stream.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        use std::io::Write;
        // The server closes somewhere in the middle.
        let _ = (&writer).write_all(format!("{{\"method\":\"{}", "x".repeat(4 << 20)).as_bytes());
    });
    let mut reply = Client::connect(server.dir.socket()).unwrap();
    assert_eq!(reply.call("echo", json!({"value": 1})), Ok(json!(1)), "others are served meanwhile");
    let mut bytes = Vec::new();
    let mut piece = [0; 1000];
    while let Ok(n @ 1..) = (&stream).read(&mut piece) {
        bytes.extend_from_slice(&piece[..n]);
    }
    assert!(String::from_utf8(bytes).unwrap().contains("-32700"));
    thread.join().unwrap();
}

#[test]
fn batches_answer_in_one_array_without_notifications() {
    let server = Running::start();
    let mut client = server.client();
    let batch = json!([
        {"method": "keep", "id": 1},
        {"method": "echo", "params": {"value": 2}, "id": 2},
        {"method": "notify"},
        {"method": "fail"},
        5,
        {"method": "later", "id": 6},
        {"method": "release", "id": 7}
    ]);
    client.send_bytes(batch.to_string().as_bytes()).unwrap();
    let replies = client.receive().unwrap();
    let replies = replies.as_array().unwrap();
    let short: Vec<Value> =
        replies.iter().map(|r| json!([r["id"], r.get("result").or(r["error"].get("code"))])).collect();
    assert_eq!(
        json!(short),
        json!([[1, "released"], [2, 2], [null, -95], [null, -32600], [6, "from another thread"], [7, true]])
    );
    // All of them notifications: silence, so that the next reply is that of the next request.
    client.send_bytes(br#"[{"method":"notify"},{"method":"notify"}]"#).unwrap();
    assert_eq!(client.call("notified", Value::Null), Ok(json!(3)));
    client.send_bytes(b"[]").unwrap();
    assert_eq!(client.receive().unwrap()["error"]["code"], -32600);
    let outcomes = client.call_batch(&[("echo", json!({"value": 1})), ("fail", Value::Null)]).unwrap();
    assert_eq!(outcomes[0], Ok(json!(1)));
    assert_eq!(outcomes[1].as_ref().unwrap_err().code, -95);
}

#[test]
fn notifications_are_silent_unless_they_fail() {
    let server = Running::start();
    let mut client = server.client();
    client.notify("notify", Value::Null).unwrap();
    client.notify("fail", Value::Null).unwrap();
    let reply = client.receive().unwrap();
    assert_eq!((&reply["id"], &reply["error"]["code"]), (&Value::Null, &json!(-95)));
    assert_eq!(client.call("notified", Value::Null), Ok(json!(1)));
}

#[test]
fn deferred_replies_wake_the_server_and_may_overtake() {
    let server = Running::start();
    let mut client = server.client();
    assert_eq!(client.call("later", Value::Null), Ok(json!("from another thread")));
    client
        .send_bytes(br#"{"method":"keep","id":"a"}{"method":"echo","params":{"value":1},"id":"b"}"#)
        .unwrap();
    assert_eq!(client.receive().unwrap()["id"], "b");
    server.client().call("release", Value::Null).unwrap();
    assert_eq!(client.receive().unwrap()["id"], "a");
    client.send_bytes(br#"{"method":"keep","id":"c"}"#).unwrap();
    client.send_bytes(br#"{"method":"drop","id":"d"}"#).unwrap();
    let reply = client.receive().unwrap();
    assert_eq!((&reply["id"], &reply["error"]["code"]), (&json!("c"), &json!(-32603)));
}

#[test]
fn replies_to_a_connection_that_is_gone_go_nowhere() {
    let server = Running::start();
    let mut gone = server.client();
    gone.notify("keep", Value::Null).unwrap();
    gone.send_bytes(br#"[{"method":"keep","id":1},{"method":"keep","id":2}]{"method":"keep","id":3}"#)
        .unwrap();
    drop(gone);
    // Takes over the slot as soon as it is free.
    let mut client = server.client();
    for _ in 0..10_000 {
        assert_eq!(client.call("release", Value::Null), Ok(json!(true)));
    }
    server.comes_to_rest();
}

#[test]
fn what_was_sent_before_hanging_up_is_executed() {
    let server = Running::start();
    let stream = server.stream();
    send(
        &stream,
        &"{\"method\":\"notify\"}{\"method\":\"echo\",\"params\":{\"value\":1},\"id\":1}".repeat(200),
    );
    drop(stream);
    let mut client = server.client();
    until("all notifications are executed", || client.call("notified", Value::Null).unwrap() == json!(200));
}

#[test]
fn the_65th_client_waits_for_a_free_place() {
    let server = Running::start();
    let mut clients: Vec<Client> = (0..rpc::MAX_CONNECTIONS).map(|_| server.client()).collect();
    for client in &mut clients {
        client.call("echo", json!({"value": 1})).unwrap();
    }
    let mut waiting = server.client();
    waiting.send_bytes(br#"{"method":"echo","params":{"value":65},"id":1}"#).unwrap();
    waiting.set_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(waiting.receive().unwrap_err().code, -110);
    // A waiting client does not keep the server awake.
    server.comes_to_rest();
    clients.pop();
    waiting.set_timeout(Some(patience())).unwrap();
    assert_eq!(waiting.receive().unwrap()["result"], 65);
}

#[test]
fn slow_reader_is_held_back_and_loses_nothing() {
    let server = Running::start();
    let mut slow = server.client();
    let requests: String = (0..100)
        .map(|id| format!("{{\"method\":\"big\",\"params\":{{\"bytes\":100000}},\"id\":{id}}}"))
        .collect();
    slow.send_bytes(requests.as_bytes()).unwrap();
    slow.notify("notify", Value::Null).unwrap();
    let mut other = server.client();
    // A full queue does not keep the server awake.
    server.comes_to_rest();
    assert_eq!(
        other.call("notified", Value::Null),
        Ok(json!(0)),
        "the slow client's last request has not started"
    );
    for id in 0..100 {
        let reply = slow.receive().unwrap();
        assert_eq!(reply["id"], id);
        assert_eq!(reply["result"].as_str().unwrap().len(), 100_000);
    }
    assert_eq!(slow.call("notified", Value::Null), Ok(json!(1)));
}

#[test]
fn replies_have_a_limit() {
    let server = Running::start();
    let mut client = server.client();
    let largest = client.call("big", json!({"bytes": 30 << 20})).unwrap();
    assert_eq!(largest.as_str().unwrap().len(), 30 << 20);
    assert_eq!(client.call("big", json!({"bytes": 33 << 20})).unwrap_err().code, -32603);
    let outcome =
        client.call_batch(&[("big", json!({"bytes": 20 << 20})), ("big", json!({"bytes": 20 << 20}))]);
    assert_eq!(outcome.unwrap_err().code, -32603);
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let server = Running::start();
    let mut client = server.client();
    let mut writer = server.client();
    let count = 5000;
    // More than one turn's budget and more than the limit of requests in flight.
    let text: String = (0..count)
        .map(|id| format!("{{\"method\":\"echo\",\"params\":{{\"value\":{id}}},\"id\":{id}}}\n"))
        .collect();
    writer.call("notify", Value::Null).unwrap();
    std::thread::scope(|scope| {
        let stream = server.stream();
        let reader = stream.try_clone().unwrap();
        scope.spawn(move || {
            send(&stream, &text);
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let text = read_to_end(&reader);
        assert_eq!(text.lines().count(), count);
    });
    // 1000 deferred ones: reading stops at the limit, goes on when they are answered.
    // In one piece, because the kernel's accounting lets few small pieces wait.
    let text: String = (0..1000).map(|id| format!("{{\"method\":\"keep\",\"id\":{id}}}")).collect();
    client.send_bytes(text.as_bytes()).unwrap();
    let mut got = 0;
    client.set_timeout(Some(Duration::from_millis(50))).unwrap();
    until("1000 replies", || {
        writer.call("release", Value::Null).unwrap();
        while client.receive().is_ok() {
            got += 1;
        }
        got == 1000
    });
}

/// All requests are in the decoder when the limit is reached, so that the socket will not wake the server for the rest.
#[test]
fn requests_held_back_go_on_when_the_others_are_answered() {
    let server = Running::start();
    let mut client = server.client();
    let mut text = "{\"method\":\"keep\",\"id\":1}".repeat(256);
    text += "{\"method\":\"echo\",\"params\":{\"value\":2},\"id\":2}";
    client.send_bytes(text.as_bytes()).unwrap();
    server.comes_to_rest();
    assert_eq!(server.client().call("release", Value::Null), Ok(json!(true)));
    for _ in 0..256 {
        assert_eq!(client.receive().unwrap()["id"], 1);
    }
    assert_eq!(client.receive().unwrap()["id"], 2);
}

#[test]
fn second_instance_is_refused_by_name_and_process() {
    let server = Running::start();
    let socket = server.dir.socket();
    let metadata = std::fs::metadata(&socket).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    let Err(error) = Server::listen(&socket, Arc::new(table())) else { panic!("two servers on one socket") };
    let text = error.to_string();
    assert!(matches!(error, ListenError::InUse { .. }));
    assert!(text.contains(socket.to_str().unwrap()), "{text}");
    assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
    assert_eq!(server.client().call("echo", json!({"value": 1})), Ok(json!(1)));
}

#[test]
fn stale_files_are_replaced_but_other_files_are_not() {
    let dir = Dir::new();
    let socket = dir.socket();
    drop(UnixListener::bind(&socket).unwrap());
    std::fs::write(dir.0.join("rpc.sock.lock"), "999999\n").unwrap();
    drop(Server::listen(&socket, Arc::new(table())).unwrap());
    assert_eq!(std::fs::read_dir(dir.0.path()).unwrap().count(), 0);

    std::fs::write(&socket, "precious").unwrap();
    let error = Server::listen(&socket, Arc::new(table())).err().unwrap();
    assert!(matches!(error, ListenError::NotA { should: "socket", .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
}

#[test]
fn what_a_stranger_has_put_there_is_named_with_its_owner() {
    const STRANGER: u32 = 65534;
    let dir = Dir::new();
    let (socket, lock) = (dir.socket(), dir.0.join("rpc.sock.lock"));
    let refused = || Server::listen(&socket, Arc::new(table())).err().expect("it is refused");

    // A link would have a file made or changed elsewhere.
    let precious = dir.0.join("precious");
    std::fs::write(&precious, "precious").unwrap();
    std::os::unix::fs::symlink(&precious, &lock).unwrap();
    let text = refused().to_string();
    assert!(text.contains(lock.to_str().unwrap()), "{text}");
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "precious");
    std::fs::remove_file(&lock).unwrap();
    // So would a directory be in the way.
    std::fs::create_dir(&lock).unwrap();
    let text = refused().to_string();
    assert!(text.contains(lock.to_str().unwrap()), "{text}");
    std::fs::remove_dir(&lock).unwrap();

    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED: files of another user need root");
    }
    for path in [&lock, &socket] {
        if path == &socket {
            drop(UnixListener::bind(path).unwrap());
        } else {
            std::fs::write(path, "1\n").unwrap();
        }
        std::os::unix::fs::chown(path, Some(STRANGER), None).unwrap();
        let error = refused();
        assert!(matches!(error, ListenError::Foreign { owner: STRANGER, .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("user 65534"), "{text}");
        assert!(path.exists(), "somebody else's file is not removed");
        std::fs::remove_file(path).unwrap();
    }
    drop(Server::listen(&socket, Arc::new(table())).unwrap());
}

#[test]
fn impossible_paths_are_named() {
    let dir = Dir::new();
    let long = dir.0.join("x".repeat(120));
    let error = Server::listen(&long, Arc::new(table())).err().unwrap();
    assert!(matches!(error, ListenError::PathTooLong { .. }), "{error}");
    let error = Server::listen(Path::new("/nonexistent/rpc.sock"), Arc::new(table())).err().unwrap();
    assert!(error.to_string().contains("/nonexistent/rpc.sock.lock"), "{error}");
}

#[test]
fn state_is_the_tables() {
    let dir = Dir::new();
    let mut table: MethodTable<()> = MethodTable::new();
    table.method_without_params("run", States::RUNTIME, |(), r| r.ok(true));
    let table = Arc::new(table);
    let mut server = Server::listen(&dir.socket(), Arc::clone(&table)).unwrap();
    let client = UnixStream::connect(dir.socket()).unwrap();
    let mut reply = |table_state| {
        table.set_state(table_state);
        send(&client, r#"{"method":"run","id":1}"#);
        let mut buffer = [0; 1000];
        while server.poll(&mut ()) {}
        let n = (&client).read(&mut buffer).unwrap();
        serde_json::from_slice::<Value>(&buffer[..n]).unwrap()
    };
    assert_eq!(reply(State::Startup)["error"]["code"], -1);
    assert_eq!(reply(State::Runtime)["result"], true);
}
