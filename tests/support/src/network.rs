//! Addresses and ports that no other test uses, in this process or beside it.

use std::net::Ipv4Addr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// 127.192.0.0 to 127.254.255.0; scripts use those below.
const NETWORKS: u32 = 63 << 8;
/// Below what systems give to those who do not choose (ip_local_port_range).
const PORTS: std::ops::Range<u32> = 20_000..32_000;

/// The first three bytes of a network of the loopback device, all of whose addresses are the caller's for as long as
/// the process lives.
///
/// # Panics
/// All are taken.
pub fn network() -> [u8; 3] {
    let n = claim("network", NETWORKS);
    [127, 192 + (n >> 8) as u8, n as u8]
}

/// A port that is the caller's, on all addresses, for as long as the process lives. For what needs to know it before
/// anybody binds it; whoever can bind port 0 does that.
///
/// # Panics
/// All are taken.
pub fn port() -> u16 {
    (PORTS.start + claim("port", PORTS.len() as u32)) as u16
}

/// A number below `count` that nobody else has: an abstract socket has its name, which the kernel gives to one only
/// and takes back when the process ends. Names are those of a network namespace, as addresses are.
fn claim(what: &str, count: u32) -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(37);
    for _ in 0..count {
        let n = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % count;
        let name = format!("rnbd-test-{what}-{n}");
        let address = SocketAddr::from_abstract_name(name).expect("a short name");
        if let Ok(socket) = UnixListener::bind_addr(&address) {
            // Nobody else may have the number while this process lives.
            std::mem::forget(socket);
            return n;
        }
    }
    panic!("no {what} is free")
}

/// Somebody accepts connections on the unix socket `path`. Its file is there before that, as soon as the socket has its
/// name.
pub fn listens(path: impl AsRef<Path>) -> bool {
    UnixStream::connect(path).is_ok()
}

/// Address `last` of a network of [`network`].
pub fn address(network: [u8; 3], last: u8) -> Ipv4Addr {
    let [a, b, c] = network;
    Ipv4Addr::new(a, b, c, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_no_listener() {
        let path = crate::Dir::new("listens").file("s", 0);
        assert!(!listens(&path), "no socket");
        let dir = crate::Dir::new("listens");
        let listener = UnixListener::bind(dir.join("s")).unwrap();
        assert!(listens(dir.join("s")));
        drop(listener);
        assert!(!listens(dir.join("s")) && dir.join("s").exists());
    }

    #[test]
    fn nobody_gets_the_same() {
        let networks: Vec<[u8; 3]> = (0..20).map(|_| network()).collect();
        assert!((1..20).all(|i| !networks[..i].contains(&networks[i])), "{networks:?}");
        assert!(networks.iter().all(|n| n[0] == 127 && (192..255).contains(&n[1])), "{networks:?}");
        let ports: Vec<u16> = (0..20).map(|_| port()).collect();
        assert!((1..20).all(|i| !ports[..i].contains(&ports[i])), "{ports:?}");
        assert_eq!(address([127, 192, 3], 4).to_string(), "127.192.3.4");
    }
}
