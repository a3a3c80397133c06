//! The table "who can do what by default" in docs/threat-model.md, where no other test is about a row.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::*;

const ALLOWED: u8 = 2;
const STRANGER: u8 = 66;

/// An export for everybody, one for an address, and one of the NBD server's for another.
fn target() -> Target {
    Target::start(|network, _| {
        let allowed = addr(test_support::address(network, ALLOWED).into());
        vec![
            malloc("Public"),
            malloc("Private"),
            malloc("Unnamed"),
            export("public", "Public", json!([])),
            export("private", "Private", json!([allowed])),
            call("nbd_server_create_export", json!({"name": "public", "bdev_name": "Public"})),
            call(
                "nbd_server_create_export",
                json!({"name": "private", "bdev_name": "Private", "allow": [allowed]}),
            ),
            call(
                "nbd_server_add_listener",
                json!({"traddr": test_support::address(network, 1).to_string(), "trsvcid": "0"}),
            ),
        ]
    })
}

#[test]
fn a_stranger_on_the_rdma_port_gets_exports_without_allow() {
    let t = target();
    assert_eq!(t.open("eve", STRANGER, "public", 1), Ok(()));
    assert_eq!(t.open("eve", STRANGER, "private", 0), Err(Errno::EACCES));
    for device in ["Public", "Private", "Unnamed", "etc/passwd", "/etc/passwd", "dev/sda"] {
        assert_eq!(t.open("eve", STRANGER, device, 0), Err(Errno::ENOENT), "{device}");
    }
    assert_eq!(t.open("eve", STRANGER, "../etc/passwd", 0), Err(Errno::EINVAL));
    let open_to: Vec<Value> = t.rpc("rnbd_get_name_space", Value::Null)["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["open_to"].clone())
        .collect();
    assert_eq!(open_to, ["everybody", "addresses"]);
}

/// Whatever it calls itself, and whichever of the host's users it is: the address is all that is looked at.
#[test]
fn who_holds_an_allowed_address_gets_what_it_is_allowed() {
    let t = target();
    for name in ["root", "nobody", "eve"] {
        assert_eq!(t.open(name, ALLOWED, "private", 1), Ok(()), "{name}");
        assert_eq!(t.open(name, STRANGER, "private", 1), Err(Errno::EACCES), "{name}");
    }
}

/// Chooses an export by NBD_OPT_GO from address `last`: the type of the server's last reply.
fn nbd_go(t: &Target, last: u8, export: &str) -> u32 {
    let port: u16 =
        t.rpc("nbd_server_get_listeners", Value::Null)[0]["trsvcid"].as_str().unwrap().parse().unwrap();
    let mut stream = connect_from(t.address(last), SocketAddr::new(t.address(1), port));
    let mut hello = [0; 18];
    stream.read_exact(&mut hello).unwrap();
    let data = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), &[0, 0]].concat();
    let head =
        [3_u32.to_be_bytes(), *b"IHAV", *b"EOPT", 7_u32.to_be_bytes(), (data.len() as u32).to_be_bytes()];
    stream.write_all(&[&head.concat(), &data[..]].concat()).unwrap();
    loop {
        let mut reply = [0; 20];
        stream.read_exact(&mut reply).unwrap();
        let number = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().unwrap());
        let (kind, len) = (number(12), number(16));
        stream.read_exact(&mut vec![0; len as usize]).unwrap();
        // NBD_REP_INFO
        if kind != 3 {
            return kind;
        }
    }
}

fn connect_from(src: IpAddr, dst: SocketAddr) -> TcpStream {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let fd = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&fd, &SocketAddr::new(src, 0)).unwrap();
    connect(&fd, &dst).unwrap();
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(patience())).unwrap();
    stream
}

#[test]
fn a_stranger_on_the_nbd_port_gets_exports_without_allow() {
    const ACK: u32 = 1;
    let t = target();
    assert_eq!(nbd_go(&t, STRANGER, "public"), ACK);
    assert_eq!(nbd_go(&t, ALLOWED, "private"), ACK);
    for export in ["private", "Private", "Unnamed", "/etc/passwd"] {
        assert_ne!(nbd_go(&t, STRANGER, export), ACK, "{export}");
    }
}

#[test]
fn other_users_of_the_host_cannot_open_the_sockets() {
    use std::os::unix::fs::PermissionsExt;
    let t = target();
    let (nbd, vhost) = (t.dir.join("nbd.sock"), t.dir.join("vhost.sock"));
    t.make(call("nbd_server_add_listener", json!({"path": nbd})));
    t.make(call("vhost_create_blk_controller", json!({"ctrlr": vhost, "dev_name": "Unnamed"})));
    for socket in [t.socket(), nbd, vhost] {
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
        // Who connects needs the right to write: unix(7).
        assert_eq!(mode & 0o022, 0, "{}: {mode:o}", socket.display());
    }
}

/// Who may open it can do everything that the program can.
#[test]
fn who_opens_the_rpc_socket_has_full_control() {
    let t = target();
    let image = t.dir.file("image", 1 << 20);
    t.make(call("bdev_uring_create", json!({"name": "Any", "filename": image, "block_size": 512})));
    t.make(export("any", "Any", json!([])));
    assert_eq!(t.open("eve", STRANGER, "any", 1), Ok(()));
}
