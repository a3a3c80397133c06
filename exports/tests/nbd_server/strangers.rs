//! Strangers who want to keep everybody else out, and a bystander who is not to notice.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Instant;

use test_support::until_some;

use super::*;

const MIB: u32 = 1 << 20;

/// "big" of 64 MiB in memory over TCP, so that clients have addresses; its port.
fn start(options: Value) -> (Program, u16) {
    let program = Program::start("0x1", 0, options);
    let malloc = json!({"name": "B0", "num_blocks": 131_072, "block_size": 512});
    program.call("bdev_malloc_create", malloc).unwrap();
    program.call("nbd_server_create_export", json!({"name": "big", "bdev_name": "B0"})).unwrap();
    program.call("nbd_server_add_listener", json!({"traddr": "127.0.0.1", "trsvcid": "0"})).unwrap();
    let listeners = program.call("nbd_server_get_listeners", Value::Null).unwrap();
    let port = listeners.as_array().unwrap().iter().find_map(|l| l["trsvcid"].as_str()).unwrap();
    let port = port.parse().unwrap();
    (program, port)
}

/// A connection from 127.0.0.`host`, with sockets that hold little.
fn stranger(port: u16, host: u8) -> TcpStream {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
    let socket = socket.unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 4096).unwrap();
    rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::new(127, 0, 0, host), 0))).unwrap();
    rustix::net::connect(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, port))).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(patience())).unwrap();
    stream
}

/// The same with an export, which it can use; `None` if the server has closed.
fn client(port: u16, host: u8) -> Option<TcpStream> {
    let mut stream = stranger(port, host);
    let chosen = stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03big");
    let mut hello = [0; 28];
    chosen.and_then(|()| stream.read_exact(&mut hello)).ok()?;
    let mut answer = [0; 16 + 512];
    try_ask(&mut stream, cmd::READ, 0, 512).and_then(|()| stream.read_exact(&mut answer)).ok()?;
    Some(stream)
}

fn ask(stream: &mut TcpStream, command: u16, offset: u64, len: u32) {
    try_ask(stream, command, offset, len).unwrap();
}

fn try_ask(stream: &mut TcpStream, command: u16, offset: u64, len: u32) -> std::io::Result<()> {
    let header = RequestHeader {
        magic: REQUEST_MAGIC.into(),
        flags: 0.into(),
        command: command.into(),
        cookie: 1.into(),
        offset: offset.into(),
        length: len.into(),
    };
    stream.write_all(header.as_bytes())
}

/// Writes and reads back, on an own part of the disk.
fn verify(stream: &mut TcpStream, len: u32, seed: u8) {
    let offset = u64::from(32 * MIB);
    let data: Vec<u8> = (0..len).map(|i| (i / 512) as u8 ^ seed).collect();
    ask(stream, cmd::WRITE, offset, len);
    stream.write_all(&data).unwrap();
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[4..8], [0; 4]);
    ask(stream, cmd::READ, offset, len);
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[4..8], [0; 4]);
    let mut back = vec![0; len as usize];
    stream.read_exact(&mut back).unwrap();
    assert!(back == data);
}

struct Bystander {
    port: u16,
    kept: TcpStream,
    slowest: Duration,
    rounds: u8,
}

impl Bystander {
    const HOST: u8 = 5;

    fn new(port: u16) -> Self {
        Self { port, kept: client(port, Self::HOST).unwrap(), slowest: Duration::ZERO, rounds: 0 }
    }

    /// Uses its connection, and another one.
    fn is_served(&mut self) {
        self.rounds = self.rounds.wrapping_add(1);
        verify(&mut self.kept, 65_536, self.rounds);
        let begun = Instant::now();
        // At once, unless the server has yet to see that its former ones are gone.
        let mut new = until_some("the bystander comes in", || client(self.port, Self::HOST));
        self.slowest = self.slowest.max(begun.elapsed());
        verify(&mut new, 4096, self.rounds);
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        println!("{} rounds; a new connection took at most {:?}", self.rounds, self.slowest);
    }
}

fn limits(program: &Program) -> Value {
    program.call("nbd_server_get_limits", Value::Null).unwrap()
}

#[test]
fn silent_connections_keep_nobody_out() {
    let (program, port) = start(json!({}));
    let mut bystander = Bystander::new(port);
    let mut crowd = Vec::new();
    for n in 0..300 {
        crowd.push(stranger(port, 9));
        if n % 10 == 0 {
            bystander.is_served();
        }
    }
    // One address could be many.
    for n in 0..200 {
        crowd.push(stranger(port, 20 + n as u8));
        if n % 10 == 0 {
            bystander.is_served();
        }
    }
    let shown = limits(&program);
    assert_eq!(shown["handshakes"]["set"], 64);
    assert!(shown["handshakes"]["now"].as_u64() <= Some(64), "{shown}");
    assert!(shown["turned"]["displaced"].as_u64() >= Some(300), "{shown}");
    drop((crowd, bystander));
    program.shut_down();
    program.end();
}

#[test]
fn connections_of_one_source_leave_some_for_others() {
    let (program, port) = start(json!({"max_connections": 32}));
    // Before anybody else has been there.
    let greedy: Vec<TcpStream> = (0..100).map_while(|_| client(port, 9)).collect();
    assert_eq!(greedy.len(), 14, "half of three quarters, and two");
    let second: Vec<TcpStream> = (0..100).map_while(|_| client(port, 10)).collect();
    assert_eq!(second.len(), 8);
    let mut bystander = Bystander::new(port);
    for n in 0..50 {
        // Each new one of theirs is refused, and so is the first of many others.
        assert!(client(port, 9).is_none());
        let _ = client(port, 100 + n);
        bystander.is_served();
    }
    let shown = limits(&program);
    assert_eq!(shown["connections"], json!({"set": 32, "most": 32, "now": shown["connections"]["now"]}));
    assert_eq!(shown["sources"][0], json!({"source": "127.0.0.9", "connections": 14}));
    assert!(shown["turned"]["away"].as_u64() >= Some(52), "{shown}");
    drop((greedy, second, bystander));
    program.shut_down();
    program.end();
}

/// Who has been there comes back while as many strangers as possible, of as many addresses, hold what there is.
#[test]
fn who_is_known_comes_back() {
    let (program, port) = start(json!({"max_connections": 32}));
    let mut bystander = Bystander::new(port);
    bystander.is_served();
    let crowd: Vec<TcpStream> = (20..200).filter_map(|host| client(port, host)).collect();
    assert!(crowd.len() >= 20, "{}", crowd.len());
    assert!(client(port, 201).is_none(), "there is no room for strangers");
    (0..10).for_each(|_| bystander.is_served());
    drop((crowd, bystander));
    program.shut_down();
    program.end();
}

/// `who` of different addresses begin writes of 32 MiB, and send a byte from time to time.
fn trickle(port: u16, who: std::ops::Range<u8>) -> Vec<TcpStream> {
    let mut crowd: Vec<TcpStream> = who.map(|host| client(port, host).unwrap()).collect();
    for c in &mut crowd {
        ask(c, cmd::WRITE, 0, 32 * MIB);
        c.write_all(&[7; 1000]).unwrap();
    }
    crowd
}

#[test]
fn writes_that_trickle_keep_nobody_waiting() {
    let (program, port) = start(json!({"progress_time_ms": 500}));
    let mut bystander = Bystander::new(port);
    let mut crowd = trickle(port, 20..36);
    for n in 0..5 {
        // Some are at it still, with a byte now and then; who was ended begins anew.
        for (host, c) in (20..).zip(&mut crowd) {
            if c.write_all(&[8]).is_err() {
                *c = trickle(port, host..host + 1).remove(0);
            }
        }
        bystander.is_served();
        verify(&mut bystander.kept, 8 * MIB, n);
    }
    assert!(limits(&program)["turned"]["out"].as_u64() >= Some(1), "{}", limits(&program));
    drop((crowd, bystander));
    program.shut_down();
    program.end();
}

#[test]
fn answers_that_are_read_by_the_byte_keep_nobody_waiting() {
    let (program, port) = start(json!({"progress_time_ms": 500}));
    let mut bystander = Bystander::new(port);
    let mut crowd: Vec<TcpStream> = (20..36).map(|host| client(port, host).unwrap()).collect();
    crowd.iter_mut().for_each(|c| ask(c, cmd::READ, 0, 32 * MIB));
    for n in 0..5 {
        for c in &mut crowd {
            c.set_nonblocking(true).unwrap();
            let _ = c.read(&mut [0; 100]);
        }
        bystander.is_served();
        verify(&mut bystander.kept, 8 * MIB, n);
    }
    assert!(limits(&program)["turned"]["out"].as_u64() >= Some(1), "{}", limits(&program));
    drop((crowd, bystander));
    program.shut_down();
    program.end();
}

/// Slow, and nobody minds.
#[test]
fn who_is_slow_alone_is_left_alone() {
    let (program, port) = start(json!({"progress_time_ms": 100}));
    let mut slow = client(port, 9).unwrap();
    ask(&mut slow, cmd::WRITE, 0, 2 * MIB);
    for _ in 0..8 {
        slow.write_all(&[3; MIB as usize / 8]).unwrap();
        std::thread::sleep(Duration::from_millis(150));
    }
    slow.write_all(&vec![3; MIB as usize]).unwrap();
    let mut answer = [0; 16];
    slow.read_exact(&mut answer).unwrap();
    assert_eq!(answer[4..8], [0; 4]);
    program.shut_down();
    program.end();
}
