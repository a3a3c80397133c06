//! The mode of unix sockets. A program of its own, since the umask is one for all threads.

use std::os::unix::fs::PermissionsExt;

use nbd_poll::listener::{Address, Listener};
use rustix::fs::Mode;
use test_support::Dir;

#[test]
fn a_unix_socket_is_private_whatever_the_umask() {
    let dir = Dir::new("nbd-private");
    for umask in [0, 0o22, 0o77, 0o777] {
        let before = rustix::process::umask(Mode::from_raw_mode(umask));
        let path = dir.join(format!("{umask:o}"));
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        rustix::process::umask(before);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{umask:o}");
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
        drop(listener);
    }
}
