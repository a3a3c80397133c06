//! The mode of the RPC socket. A program of its own, since the umask is one for all threads.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use rpc::{MethodTable, Server};
use rustix::fs::Mode;
use test_support::Dir;

#[test]
fn the_socket_is_private_whatever_the_umask() {
    let dir = Dir::new("rpc-private");
    for umask in [0, 0o22, 0o77, 0o777] {
        let before = rustix::process::umask(Mode::from_raw_mode(umask));
        let path = dir.join(format!("{umask:o}"));
        let server = Server::<()>::listen(&path, Arc::new(MethodTable::new())).unwrap();
        rustix::process::umask(before);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{umask:o}");
        drop(server);
    }
}
