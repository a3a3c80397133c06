//! Both ends of TLS in one process, over a socket that holds little. The keys are made by openssl; without it the tests
//! say that they were skipped.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::{ClientConfig, ClientConnection, ServerConnection};

use super::*;

/// A directory with an authority, and a certificate of it for localhost; goes away.
struct Keys(PathBuf);

impl Keys {
    /// `None` without openssl.
    fn new(name: &str) -> Option<Self> {
        let dir = std::env::temp_dir().join(format!("nbd-tls-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let keys = Self(dir);
        let new_key = "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        let made = keys.openssl(&format!(
            "{new_key} -x509 -days 2 -subj /CN=authority -keyout ca-key.pem -out ca-cert.pem"
        )) && keys
            .openssl(&format!("{new_key} -subj /CN=server -keyout server-key.pem -out server.csr"));
        std::fs::write(keys.0.join("ext"), "subjectAltName=DNS:localhost\n").unwrap();
        let sign =
            "x509 -req -in server.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile ext";
        if !(made && keys.openssl(&format!("{sign} -out server-cert.pem"))) {
            eprintln!("skipped: openssl is missing, or made no certificates");
            return None;
        }
        Some(keys)
    }

    fn openssl(&self, arguments: &str) -> bool {
        let words = arguments.split(' ');
        Command::new("openssl").args(words).current_dir(&self.0).output().is_ok_and(|o| o.status.success())
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn client(config: Arc<ClientConfig>, name: &'static str) -> Connection {
    ClientConnection::new(config, ServerName::try_from(name).unwrap()).unwrap().into()
}

/// Client and server, before their handshake.
fn pair(keys: &Keys, config: Arc<ClientConfig>, name: &'static str) -> (TlsStream, TlsStream) {
    let (a, b) = UnixStream::pair().unwrap();
    for socket in [&a, &b] {
        rustix::net::sockopt::set_socket_send_buffer_size(socket, 4096).unwrap();
    }
    let server = ServerConnection::new(server::server_config(&keys.0, false).unwrap()).unwrap().into();
    let stream = |s: UnixStream| Stream::new(s.into()).unwrap();
    (TlsStream::new(stream(a), client(config, name)), TlsStream::new(stream(b), server))
}

/// Both ends in turn, until both are done or one has failed.
fn shake(client: &mut TlsStream, server: &mut TlsStream) -> io::Result<()> {
    for _ in 0..1000 {
        let (a, b) = (client.handshake()?, server.handshake()?);
        if (a, b) == (Handshake::Done, Handshake::Done) {
            return Ok(());
        }
    }
    panic!("no end of the handshake")
}

fn pieces(bytes: &mut [u8], size: usize) -> Vec<libc::iovec> {
    bytes
        .chunks_mut(size)
        .map(|c| libc::iovec { iov_base: c.as_mut_ptr().cast(), iov_len: c.len() })
        .collect()
}

/// Sends `bytes` from one end to the other, which reads into pieces of 1000; what has arrived.
fn send(from: &mut TlsStream, to: &mut TlsStream, bytes: &mut [u8]) -> Vec<u8> {
    let mut got = vec![0u8; bytes.len()];
    let (mut sent, mut read) = (0, 0);
    while read < got.len() {
        if sent < bytes.len() {
            // SAFETY: pieces of `bytes`, which lives to the end of the call and is not changed.
            match unsafe { from.write(&pieces(&mut bytes[sent..], 5000)) }.unwrap() {
                Moved::Some(n) => sent += n,
                Moved::WouldBlock => assert!(from.has_ciphertext()),
                Moved::End => panic!("the end"),
            }
        } else {
            from.flush().unwrap();
        }
        // SAFETY: pieces of `got`, exclusively borrowed until behind the call.
        match unsafe { to.read(&pieces(&mut got[read..], 1000)) }.unwrap() {
            Moved::Some(n) => read += n,
            Moved::WouldBlock => {}
            Moved::End => panic!("the end"),
        }
    }
    assert!(!to.has_plaintext());
    got
}

fn read_one(tls: &mut TlsStream) -> io::Result<Moved> {
    let mut byte = [0u8; 1];
    // SAFETY: a piece of a local array.
    unsafe { tls.read(&pieces(&mut byte, 1)) }
}

#[test]
fn a_mebibyte_each_way_through_a_small_socket() {
    let Some(keys) = Keys::new("data") else { return };
    let config = files::client_config(Some(&keys.0), true).unwrap();
    let (mut client, mut server) = pair(&keys, config, "localhost");
    shake(&mut client, &mut server).unwrap();
    assert!(client.describe().starts_with("TLSv1_3 "), "{}", client.describe());
    let mut bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let want = bytes.clone();
    assert!(send(&mut client, &mut server, &mut bytes) == want);
    assert!(send(&mut server, &mut client, &mut bytes) == want);
    assert_eq!(read_one(&mut client).unwrap(), Moved::WouldBlock);
    server.close_notify();
    server.flush().unwrap();
    assert_eq!(read_one(&mut client).unwrap(), Moved::End);
    // One that goes without a word is gone, too.
    drop(client);
    assert_eq!(read_one(&mut server).unwrap(), Moved::End);
}

#[test]
fn nobody_is_trusted_without_reason() {
    let (Some(keys), Some(other)) = (Keys::new("mine"), Keys::new("other")) else { return };
    let verify = |dir: &Path| files::client_config(Some(dir), true).unwrap();
    let fails = |config, name| {
        let (mut client, mut server) = pair(&keys, config, name);
        shake(&mut client, &mut server).unwrap_err().to_string()
    };
    assert!(fails(verify(&other.0), "localhost").contains("invalid peer certificate"));
    assert!(fails(verify(&keys.0), "elsewhere").contains("not valid for name"));
    let anybody = files::client_config(Some(&other.0), false).unwrap();
    let (mut client, mut server) = pair(&keys, anybody, "elsewhere");
    shake(&mut client, &mut server).unwrap();
}

#[test]
fn what_is_no_tls_is_an_error() {
    let config = files::client_config(None, false).unwrap();
    let (a, b) = UnixStream::pair().unwrap();
    let mut tls = TlsStream::new(Stream::new(a.into()).unwrap(), client(config, "localhost"));
    assert_eq!(tls.handshake().unwrap(), Handshake::Read);
    // An option's reply in the clear, such as somebody in between would slip in.
    io::Write::write_all(&mut &b, b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0").unwrap();
    assert_eq!(tls.handshake().unwrap_err().kind(), io::ErrorKind::InvalidData);
    drop(b);
}

#[test]
fn files_that_are_missing_or_something_else_are_named() {
    let dir = std::env::temp_dir().join(format!("nbd-tls-{}-none", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let why = |dir: &Path| files::client_config(Some(dir), true).unwrap_err().to_string();
    assert!(why(&dir).contains("ca-cert.pem"));
    std::fs::write(dir.join("ca-cert.pem"), "nothing of use").unwrap();
    assert!(why(&dir).contains("no certificate in it"), "{}", why(&dir));
    assert!(files::private_key(&dir.join("ca-cert.pem")).unwrap_err().to_string().contains("ca-cert.pem"));
    std::fs::remove_dir_all(&dir).unwrap();
}
