//! Memory for long requests, of which one peer leaves something for others.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use super::*;

const MIB: u32 = 1 << 20;

/// "big" of 64 MiB over TCP, so that clients have addresses; its port.
fn start(options: Value) -> (Program, u16) {
    let program = Program::start("0x1", 0, options);
    let null = json!({"name": "N0", "num_blocks": 131_072, "block_size": 512});
    program.call("bdev_null_create", null).unwrap();
    program.call("nbd_server_create_export", json!({"name": "big", "bdev_name": "N0"})).unwrap();
    let listen = json!({"traddr": "127.0.0.1", "trsvcid": "0"});
    program.call("nbd_server_add_listener", listen).unwrap();
    let listeners = program.call("nbd_server_get_listeners", Value::Null).unwrap();
    let port = listeners.as_array().unwrap().iter().find_map(|l| l["trsvcid"].as_str()).unwrap();
    let port = port.parse().unwrap();
    (program, port)
}

/// A client from 127.0.0.`host`, with a socket that holds little.
fn client(port: u16, host: u8) -> TcpStream {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
    let socket = socket.unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 4096).unwrap();
    rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::new(127, 0, 0, host), 0))).unwrap();
    rustix::net::connect(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, port))).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(patience())).unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03big").unwrap();
    let mut hello = [0; 28];
    stream.read_exact(&mut hello).unwrap();
    stream
}

fn ask(stream: &mut TcpStream, len: u32) {
    let header = RequestHeader {
        magic: REQUEST_MAGIC.into(),
        flags: 0.into(),
        command: cmd::READ.into(),
        cookie: 1.into(),
        offset: 0.into(),
        length: len.into(),
    };
    stream.write_all(header.as_bytes()).unwrap();
}

fn take(stream: &mut TcpStream, len: u32) -> std::io::Result<()> {
    let mut answer = vec![0; 16 + len as usize];
    stream.read_exact(&mut answer)
}

#[test]
fn who_asks_for_much_and_does_not_read_keeps_nobody_out() {
    let (program, port) = start(json!({}));
    let mut greedy: Vec<TcpStream> = (0..8).map(|_| client(port, 9)).collect();
    greedy.iter_mut().for_each(|c| ask(c, 32 * MIB));
    let asked = |n: u64| {
        let all: u64 = program.connections().iter().map(|c| c["num_read_ops"].as_u64().unwrap()).sum();
        all >= n
    };
    until("half of them have their memory", || asked(4));
    for host in [10, 11] {
        let mut other = client(port, host);
        for len in [2 * MIB, 32 * MIB] {
            ask(&mut other, len);
            take(&mut other, len).unwrap();
        }
    }
    // And who was greedy gets everything, once it reads.
    for c in &mut greedy {
        take(c, 32 * MIB).unwrap();
    }
    program.shut_down();
    program.end();
}

#[test]
fn answers_that_nobody_reads_go_when_others_need_the_memory() {
    let (program, port) = start(json!({"progress_time_ms": 300}));
    // Alone, they may wait for as long as they like.
    let mut patient = client(port, 9);
    ask(&mut patient, 32 * MIB);
    std::thread::sleep(Duration::from_millis(700));
    take(&mut patient, 32 * MIB).unwrap();
    // Together, they have everything.
    let mut greedy: Vec<TcpStream> = (0..32).map(|n| client(port, 20 + n % 8)).collect();
    greedy.iter_mut().for_each(|c| ask(c, 32 * MIB));
    let mut other = client(port, 50);
    ask(&mut other, 16 * MIB);
    take(&mut other, 16 * MIB).unwrap();
    drop(greedy);
    program.shut_down();
    program.end();
}
