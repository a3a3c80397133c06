//! An RPC server in a process that has no descriptors left.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rpc::{MethodTable, Server};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use test_support::{Dir, Exhausted};

#[test]
fn who_comes_is_told_at_once() {
    let dir = Dir::new("rpc-exhausted");
    let path = dir.join("sock");
    let mut server = Server::<()>::listen(&path, Arc::new(MethodTable::new())).unwrap();
    let sockets: Vec<OwnedFd> =
        (0..3).map(|_| rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap()).collect();
    let exhausted = Exhausted::new();
    // All stay open, so that no descriptor is free.
    let mut clients: Vec<UnixStream> = sockets.into_iter().map(UnixStream::from).collect();
    for client in &mut clients {
        rustix::net::connect(&*client, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        server.poll(&mut ());
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        assert_eq!(server.connections(), 0);
    }
    assert!(!server.poll(&mut ()));
    drop(exhausted);
    let _client = UnixStream::connect(&path).unwrap();
    server.poll(&mut ());
    assert_eq!(server.connections(), 1);
}
