//! Attempts to connect, with servers that are a few bytes.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;

use super::*;

fn options() -> DialOptions {
    let wishes = Wishes::new("");
    DialOptions { wishes, secure: None, original: None, timeout: test_support::patience() }
}

/// Polls an attempt to its end.
fn run(address: Address, options: DialOptions) -> Result<Dialled, DialError> {
    let mut dial = Dial::start(address, options, Instant::now())?;
    let fd = dial.wait_fd();
    test_support::until_some("the end", || {
        let result = dial.poll(Instant::now());
        assert!(result.is_some() || dial.wait_fd() == fd, "one descriptor for all of it");
        result
    })
}

/// An oldstyle greeting of 1 MiB.
fn oldstyle() -> Vec<u8> {
    let mut all = b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0\0\0\0\x10\0\0\0\0\0\x05".to_vec();
    all.resize(152, 0);
    all
}

#[test]
fn over_tcp_and_unix_byte_by_byte() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = std::env::temp_dir().join(format!("nbd-dial-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("s");
    let unix = UnixListener::bind(&path).unwrap();
    let addresses = [Address::Tcp(tcp.local_addr().unwrap()), Address::Unix(path)];
    let server = std::thread::spawn(move || {
        let greet = |socket: &mut dyn Write| oldstyle().iter().for_each(|b| socket.write_all(&[*b]).unwrap());
        greet(&mut tcp.accept().unwrap().0);
        greet(&mut unix.accept().unwrap().0);
    });
    for address in addresses {
        let dialled = run(address.clone(), options()).unwrap();
        assert_eq!((dialled.agreed.size, dialled.agreed.style), (1 << 20, "oldstyle"));
        assert_eq!((dialled.address, dialled.cipher), (address, None));
    }
    server.join().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn servers_of_1997_are_taken_at_our_word() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let original = Some(Original { size: 4096, reply_magic: 7 });
    let dialled =
        run(Address::Tcp(tcp.local_addr().unwrap()), DialOptions { original, ..options() }).unwrap();
    assert_eq!(dialled.agreed.framing, Framing::Original { reply_magic: 7 });
    assert_eq!(dialled.agreed.size, 4096);
}

#[test]
fn nobody_there() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [Address::Tcp(port), Address::Unix("/nonexistent/nbd.sock".into())] {
        let e = run(address, options()).unwrap_err();
        assert!(matches!(e, DialError::Connect { .. }) && e.is_absence(), "{e}");
        assert!([libc::ECONNREFUSED, libc::ENOENT].contains(&e.errno()));
    }
    let long = Address::Unix(format!("/{}", "x".repeat(200)).into());
    assert!(matches!(run(long, options()), Err(DialError::Connect { .. })));
}

#[test]
fn a_silent_server_is_given_up() {
    let (tcp, options, start) = (TcpListener::bind("127.0.0.1:0").unwrap(), options(), Instant::now());
    let timeout = options.timeout;
    let mut dial = Dial::start(Address::Tcp(tcp.local_addr().unwrap()), options, start).unwrap();
    let _silent = tcp.accept().unwrap();
    // Time passes as the test says.
    assert!((0..10).all(|_| dial.poll(start + timeout / 2).is_none()));
    let e = dial.poll(start + timeout).unwrap().unwrap_err();
    assert!(e.to_string().contains("no end of the handshake") && e.errno() == libc::ETIMEDOUT, "{e}");
}

#[test]
fn servers_that_break_off_or_break_rules() {
    let cases: [(&[u8], &str, i32); 3] = [
        (b"NBDMAGIC", "has closed the connection during the handshake", libc::ECONNRESET),
        (b"SSH-2.0-OpenSSH_9.2", "no NBD server: it begins with \"SSH-2.0-\"", libc::EPROTO),
        (b"NBDMAGICIHAVEOPT\0\x03", "has closed the connection during the handshake", libc::ECONNRESET),
    ];
    for (bytes, says, errno) in cases {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(tcp.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let (mut socket, _) = tcp.accept().unwrap();
            socket.write_all(bytes).unwrap();
            if bytes.len() == 18 {
                // The client's flags and first option.
                socket.read_exact(&mut [0; 20]).unwrap();
            }
        });
        let e = run(address, options()).unwrap_err();
        assert!(e.to_string().contains(says), "{e}");
        assert_eq!(e.errno(), errno);
        assert!(!e.is_absence());
        server.join().unwrap();
    }
}

#[test]
fn tls_without_keys_is_an_error() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(tcp.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut socket, _) = tcp.accept().unwrap();
        socket.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        socket.read_exact(&mut [0; 20]).unwrap();
        socket.write_all(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0").unwrap();
        socket
    });
    let wishes = Wishes { tls: Tls::Require, ..Wishes::new("") };
    let e = run(address, DialOptions { wishes, ..options() }).unwrap_err();
    assert!(matches!(e, DialError::Tls { .. }), "{e}");
    drop(server.join().unwrap());
}
