//! Both ends of TLS in one process, over a socket that holds little. The keys are made by openssl.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::UnixTime;
use rustls::{ClientConfig, ClientConnection, ServerConnection};

use super::*;

const EC: &str = "ec -pkeyopt ec_paramgen_curve:prime256v1";

/// A directory with an authority, and a certificate of it for localhost; goes away.
struct Keys(PathBuf);

impl Keys {
    fn new(name: &str) -> Self {
        let keys = Self::authority(name);
        keys.server(EC, "-extfile ext");
        keys
    }

    /// A directory with `ca-cert.pem` and its key.
    fn authority(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("nbd-tls-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let keys = Self(dir);
        std::fs::write(keys.0.join("ext"), "subjectAltName=DNS:localhost\n").unwrap();
        keys.openssl(&format!(
            "req -newkey {EC} -nodes -x509 -days 2 -subj /CN=authority -keyout ca-key.pem -out ca-cert.pem"
        ));
        keys
    }

    /// The certificate of a server with such a key, signed by the authority.
    fn server(&self, key: &str, options: &str) {
        self.openssl(&format!(
            "req -newkey {key} -nodes -subj /CN=server -keyout server-key.pem -out server.csr"
        ));
        self.openssl(&format!(
            "x509 -req -in server.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 {options} \
             -out server-cert.pem"
        ));
    }

    /// A certificate that `openssl req -x509` makes: an authority's, signed by itself, valid for two days.
    fn by_itself(&self, who: &str) {
        self.openssl(&format!(
            "req -newkey {EC} -nodes -x509 -days 2 -subj /CN={who} -addext subjectAltName=DNS:localhost \
             -keyout {who}-key.pem -out {who}-cert.pem"
        ));
    }

    fn copy(&self, from: &str, to: &str) {
        std::fs::copy(self.0.join(from), self.0.join(to)).unwrap();
    }

    fn openssl(&self, arguments: &str) {
        let mut command = Command::new("openssl");
        command.args(arguments.split(' ').filter(|w| !w.is_empty())).current_dir(&self.0);
        let done = command.output().expect("these tests need openssl");
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
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
    let verify = keys.0.join("client-cert.pem").exists();
    let server = ServerConnection::new(server::server_config(&keys.0, verify).unwrap()).unwrap().into();
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
    let keys = Keys::new("data");
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
    // The system may count what was read as not read for a moment.
    test_support::until("the good-bye is sent", || server.flush().unwrap());
    assert_eq!(read_one(&mut client).unwrap(), Moved::End);
    // One that goes without a word is gone, too. A program that another test starts has a copy of the socket for a moment.
    drop(client);
    let next = || Some(read_one(&mut server).unwrap()).filter(|moved| *moved != Moved::WouldBlock);
    assert_eq!(test_support::until_some("the end", next), Moved::End);
}

#[test]
fn nobody_is_trusted_without_reason() {
    let (keys, other) = (Keys::new("mine"), Keys::new("other"));
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

/// What comes of a handshake in which the client trusts the directory's `ca-cert.pem`.
fn handshake(keys: &Keys) -> Result<(), String> {
    let config = files::client_config(Some(&keys.0), true).map_err(|e| e.to_string())?;
    let (mut client, mut server) = pair(keys, config, "localhost");
    shake(&mut client, &mut server).map_err(|e| e.to_string())
}

#[test]
fn keys_of_every_kind_that_peers_make() {
    let keys = Keys::authority("kinds");
    for bits in [2048, 2432, 2560] {
        keys.server(&format!("rsa:{bits}"), "-extfile ext");
        assert_eq!(handshake(&keys), Ok(()), "RSA, {bits} bits");
    }
    for curve in ["secp384r1", "secp521r1"] {
        keys.server(&format!("ec -pkeyopt ec_paramgen_curve:{curve}"), "-extfile ext");
        assert_eq!(handshake(&keys), Ok(()), "{curve}");
    }
    keys.server("ed25519", "-extfile ext");
    assert_eq!(handshake(&keys), Ok(()), "Ed25519");
    keys.server("rsa:1024", "-extfile ext");
    let why = server::server_config(&keys.0, false).unwrap_err().to_string();
    assert!(why.contains("server-key.pem") && why.contains("2048 to 8192 bits"), "{why}");
}

#[test]
fn a_certificate_that_is_trusted_itself_need_not_be_signed() {
    let keys = Keys::authority("itself");
    keys.by_itself("server");
    let why = handshake(&keys).unwrap_err();
    assert!(why.contains("is an authority's") && why.contains("is not in ca-cert.pem itself"), "{why}");
    keys.copy("server-cert.pem", "ca-cert.pem");
    assert_eq!(handshake(&keys), Ok(()));
    let trusts = files::client_config(Some(&keys.0), true).unwrap();
    let (mut client, mut server) = pair(&keys, trusts, "elsewhere");
    let why = shake(&mut client, &mut server).unwrap_err().to_string();
    assert!(why.contains("not valid for name"), "{why}");
    // The same for a client's.
    keys.by_itself("client");
    assert!(handshake(&keys).is_err());
    let both = ["server-cert.pem", "client-cert.pem"].map(|f| std::fs::read(keys.0.join(f)).unwrap());
    std::fs::write(keys.0.join("ca-cert.pem"), both.concat()).unwrap();
    assert_eq!(handshake(&keys), Ok(()));
}

#[test]
fn a_trusted_certificate_ends_with_its_time() {
    let keys = Keys::authority("time");
    keys.by_itself("server");
    keys.copy("server-cert.pem", "ca-cert.pem");
    let verifier = files::trusted_server(Some(&keys.0)).unwrap();
    let shown = files::certificates(&keys.0.join("server-cert.pem")).unwrap();
    let localhost = ServerName::try_from("localhost").unwrap();
    let after = |days: u64| {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() + days * 86400));
        verifier.verify_server_cert(&shown[0], &[], &localhost, &[], now).map_err(|e| e.to_string())
    };
    assert!(after(1).is_ok());
    let why = after(3).unwrap_err();
    assert!(why.contains("expired"), "{why}");
}

#[test]
fn an_old_certificate_is_refused_with_advice() {
    let keys = Keys::authority("version-1");
    keys.server(EC, "");
    let why = server::server_config(&keys.0, false).unwrap_err().to_string();
    assert!(why.contains("server-cert.pem") && why.contains("version 1: make one of version 3"), "{why}");
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
