//! An acceptor with clients on real sockets, in one thread.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nbd_poll::listener::{Acceptor, AcceptorOptions, Address, Event, HandshakeError, Listener, Peer, Socket};
use nbd_proto::haggle::wire::{OptionHeader, opt};
use nbd_proto::haggle::{BlockSizes, Catalog, Export, Refusal};
use nbd_proto::wire::TransmissionFlags;
use zerocopy::IntoBytes;

/// `count` exports, named by numbers of four digits.
struct Numbers(Vec<String>);

impl Numbers {
    fn new(count: usize) -> Self {
        Self((0..count).map(|i| format!("{i:04}")).collect())
    }

    fn export(&self, i: usize) -> Export<'_> {
        Export {
            id: i as u64,
            name: &self.0[i],
            description: "a number",
            size: 1 << 20,
            flags: TransmissionFlags::HAS_FLAGS,
            sizes: BlockSizes { minimum: 512, preferred: 4096, max_payload: 1 << 20 },
        }
    }
}

impl Catalog for Numbers {
    fn next(&self, after: Option<&str>) -> Option<Export<'_>> {
        let i = self.0.partition_point(|n| after.is_some_and(|a| n.as_str() <= a));
        (i < self.0.len()).then(|| self.export(i))
    }

    fn find(&self, name: &str) -> Result<Export<'_>, Refusal> {
        self.0
            .binary_search_by(|n| n.as_str().cmp(name))
            .map(|i| self.export(i))
            .map_err(|_| Refusal::Unknown)
    }
}

struct Bench {
    acceptor: Acceptor,
    catalog: Numbers,
    events: Vec<Event>,
    now: Instant,
    admits: bool,
    path: PathBuf,
}

impl Bench {
    fn new(name: &str, options: AcceptorOptions) -> Self {
        let path = std::env::temp_dir().join(format!("nbd-acceptor-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        let acceptor = Acceptor::new(listener, options).unwrap();
        let catalog = Numbers::new(20);
        Self { acceptor, catalog, events: Vec::new(), now: Instant::now(), admits: true, path }
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    fn turn(&mut self) -> bool {
        let admits = self.admits;
        self.acceptor.poll(self.now, &|_: &Peer| admits, &self.catalog, &mut self.events)
    }

    /// Polls until there is nothing to do.
    fn run(&mut self) {
        let mut turns = 0;
        while self.turn() {
            turns += 1;
            assert!(turns < 10_000, "never comes to rest");
        }
    }

    /// What the server says until the client has all of it.
    fn said(&mut self, client: &mut UnixStream) -> Vec<u8> {
        let mut said = Vec::new();
        loop {
            self.run();
            let mut piece = [0; 65536];
            match client.read(&mut piece) {
                Ok(0) => return said,
                Ok(n) => said.extend_from_slice(&piece[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return said,
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return said,
                Err(e) => panic!("{e}"),
            }
        }
    }

    fn event(&mut self) -> Event {
        self.run();
        assert_eq!(self.events.len(), 1, "{:?}", self.events);
        self.events.remove(0)
    }
}

fn request(option: u32, data: &[u8]) -> Vec<u8> {
    let header = OptionHeader {
        magic: nbd_proto::haggle::wire::IHAVEOPT.into(),
        option: option.into(),
        len: (data.len() as u32).into(),
    };
    [header.as_bytes(), data].concat()
}

fn go(name: &str) -> Vec<u8> {
    let len = (name.len() as u32).to_be_bytes();
    request(opt::GO, &[len.as_slice(), name.as_bytes(), &[0, 0]].concat())
}

const FLAGS: [u8; 4] = [0, 0, 0, 3];

#[test]
fn a_client_chooses_and_its_first_request_stays_in_the_socket() {
    let mut b = Bench::new("choose", AcceptorOptions::default());
    let mut client = b.client();
    assert_eq!(b.said(&mut client), b"NBDMAGICIHAVEOPT\0\x03");
    // All at once, as no client should, and the first request right behind.
    client.write_all(&[FLAGS.as_slice(), &go("none"), &go("0007"), b"request"].concat()).unwrap();
    let Event::Accepted(accepted) = b.event() else { panic!() };
    assert_eq!((accepted.chosen.export, accepted.chosen.size), (7, 1 << 20));
    assert!(matches!(accepted.who.peer, Peer::Unix { .. }));
    assert_eq!(b.acceptor.handshakes(), 0);
    let Socket::Plain(socket) = accepted.socket else { panic!() };
    let mut socket = UnixStream::from(socket);
    let mut bytes = [0; 20];
    assert_eq!(socket.read(&mut bytes).unwrap(), 7);
    assert_eq!(&bytes[..7], b"request");
    // The acceptor has let go of it.
    client.write_all(b"more").unwrap();
    assert!(!b.turn());
}

#[test]
fn byte_by_byte_over_tcp() {
    let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let Address::Tcp(addr) = listener.address().clone() else { panic!() };
    let mut acceptor = Acceptor::new(listener, AcceptorOptions::default()).unwrap();
    let catalog = Numbers::new(3);
    let mut client = TcpStream::connect(addr).unwrap();
    client.set_nodelay(true).unwrap();
    let (mut events, start) = (Vec::new(), Instant::now());
    let poll = |acceptor: &mut Acceptor, events: &mut Vec<Event>| {
        acceptor.poll(start, &|_: &Peer| true, &catalog, events);
    };
    for byte in [FLAGS.as_slice(), &request(opt::LIST, b""), &go("0002")].concat() {
        client.write_all(&[byte]).unwrap();
        poll(&mut acceptor, &mut events);
    }
    test_support::until("an event", || {
        poll(&mut acceptor, &mut events);
        !events.is_empty()
    });
    let Event::Accepted(accepted) = &events[0] else { panic!("{events:?}") };
    assert_eq!(accepted.who.peer, Peer::Tcp(client.local_addr().unwrap()));
    assert_eq!(accepted.chosen.export, 2);
}

#[test]
fn clients_that_leave_or_misbehave() {
    let mut b = Bench::new("leave", AcceptorOptions::default());
    let mut client = b.client();
    client.write_all(&[FLAGS.as_slice(), &request(opt::ABORT, b"")].concat()).unwrap();
    assert!(matches!(b.event(), Event::Left(_)));
    drop(b.client());
    assert!(matches!(b.event(), Event::Failed(_, HandshakeError::Closed)));
    let mut client = b.client();
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    assert!(matches!(b.event(), Event::Failed(_, HandshakeError::Protocol(_))));
    let mut client = b.client();
    client.write_all(&[FLAGS.as_slice(), &request(opt::EXPORT_NAME, b"none")].concat()).unwrap();
    let Event::Failed(_, why) = b.event() else { panic!() };
    assert_eq!(why.to_string(), "EXPORT_NAME for 'none': there is no export named 'none'");
    // The client sees the end of the stream.
    assert_eq!(b.said(&mut client), b"NBDMAGICIHAVEOPT\0\x03");
    assert_eq!(b.acceptor.handshakes(), 0);
}

#[test]
fn a_silent_client_is_dropped_in_time() {
    let options = AcceptorOptions { timeout: Duration::from_secs(5), ..AcceptorOptions::default() };
    let mut b = Bench::new("silent", options);
    assert_eq!(b.acceptor.deadline(), None);
    let start = b.now;
    let mut client = b.client();
    client.write_all(&FLAGS).unwrap();
    b.run();
    assert_eq!(b.acceptor.deadline(), Some(start + Duration::from_secs(5)));
    // Being busy does not buy time.
    b.now = start + Duration::from_secs(4);
    client.write_all(&request(opt::LIST, b"")).unwrap();
    b.run();
    assert_eq!(b.acceptor.handshakes(), 1);
    b.now = start + Duration::from_secs(5);
    assert!(matches!(b.event(), Event::Failed(_, HandshakeError::TimedOut)));
    assert_eq!(b.acceptor.deadline(), None);
}

#[test]
fn handshakes_and_connections_have_limits() {
    let options = AcceptorOptions { max_handshakes: 3, ..AcceptorOptions::default() };
    let mut b = Bench::new("limits", options);
    let mut clients: Vec<UnixStream> = (0..5).map(|_| b.client()).collect();
    b.run();
    // The first two have made room, and nothing keeps the thread awake.
    assert_eq!(b.acceptor.handshakes(), 3);
    let displaced = |e: &Event| matches!(e, Event::Failed(_, HandshakeError::Displaced));
    assert!(b.events.len() == 2 && b.events.iter().all(displaced), "{:?}", b.events);
    b.events.clear();
    assert!(!b.turn());
    for (n, client) in clients.iter_mut().enumerate() {
        client.set_nonblocking(false).unwrap();
        let mut hello = [0; 18];
        client.read_exact(&mut hello).unwrap();
        client.set_nonblocking(true).unwrap();
        let more = client.read(&mut [0]);
        if n < 2 {
            assert_eq!(more.unwrap(), 0)
        } else {
            assert_eq!(more.unwrap_err().kind(), ErrorKind::WouldBlock)
        }
    }
    clients.clear();
    b.run();
    b.events.clear();
    assert_eq!(b.acceptor.handshakes(), 0);
    b.admits = false;
    let mut refused = b.client();
    assert!(matches!(b.event(), Event::Failed(_, HandshakeError::Full)));
    assert_eq!(b.said(&mut refused), b"");
}

/// A client from 127.0.0.`host`.
fn tcp_client(port: u16, host: u8) -> TcpStream {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
    let socket = socket.unwrap();
    rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::new(127, 0, 0, host), 0))).unwrap();
    rustix::net::connect(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, port))).unwrap();
    TcpStream::from(socket)
}

/// As many silent ones as there may be, of one address, of two, of all different ones; some have said a little.
#[test]
fn who_has_most_makes_room() {
    type Host = fn(u8) -> u8;
    let crowds: [Host; 3] = [|_| 9, |n| 9 + n % 2, |n| 20 + n];
    for (hosts, speaks) in crowds.into_iter().flat_map(|h| [(h, false), (h, true)]) {
        let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
        let Address::Tcp(addr) = listener.address().clone() else { panic!() };
        let options = AcceptorOptions { max_handshakes: 16, ..AcceptorOptions::default() };
        let mut acceptor = Acceptor::new(listener, options).unwrap();
        let (catalog, mut events, mut now) = (Numbers::new(3), Vec::new(), Instant::now());
        let mut crowd = Vec::new();
        for round in 0..3u8 {
            // More of the crowd come in the middle of the bystander's handshake.
            let mut bystander = tcp_client(addr.port(), 5);
            let mut step = |acceptor: &mut Acceptor, events: &mut Vec<Event>| {
                now += Duration::from_millis(1);
                acceptor.poll(now, &|_: &Peer| true, &catalog, events)
            };
            let mut hello = [0; 18];
            bystander.set_nonblocking(true).unwrap();
            test_support::until("the greeting", || {
                step(&mut acceptor, &mut events);
                bystander.read_exact(&mut hello).is_ok()
            });
            for byte in [FLAGS.as_slice(), &go("0002")].concat() {
                bystander.write_all(&[byte]).unwrap();
                let mut stranger = tcp_client(addr.port(), hosts(round * 40 + crowd.len() as u8 % 40));
                if speaks {
                    stranger.write_all(&FLAGS).unwrap();
                }
                crowd.push(stranger);
                while step(&mut acceptor, &mut events) {}
                assert!(acceptor.handshakes() <= 16);
            }
            test_support::until("the bystander's end", || {
                step(&mut acceptor, &mut events);
                events.iter().any(|e| matches!(e, Event::Accepted(_)))
            });
            let ours = |e: &&Event| match e {
                Event::Accepted(a) => a.who.peer == Peer::Tcp(bystander.local_addr().unwrap()),
                Event::Failed(who, _) | Event::Left(who) => {
                    who.peer == Peer::Tcp(bystander.local_addr().unwrap())
                }
                Event::Paused(_) => true,
            };
            let of_us: Vec<&Event> = events.iter().filter(ours).collect();
            assert!(matches!(of_us[..], [Event::Accepted(_)]), "{of_us:?}");
            events.clear();
        }
    }
}

/// A byte from time to time puts nothing off.
#[test]
fn a_handshake_has_one_deadline() {
    let mut b = Bench::new("trickle", AcceptorOptions::default());
    let start = b.now;
    let mut client = b.client();
    b.run();
    let bytes = [FLAGS.as_slice(), &request(opt::LIST, b"").repeat(3)].concat();
    for byte in &bytes[..18] {
        b.now += Duration::from_millis(500);
        client.write_all(&[*byte]).unwrap();
        b.run();
        assert_eq!(b.acceptor.deadline(), Some(start + Duration::from_secs(10)));
    }
    b.now = start + Duration::from_secs(10);
    client.write_all(&bytes[18..19]).unwrap();
    assert!(matches!(b.event(), Event::Failed(_, HandshakeError::TimedOut)));
}

#[test]
fn a_long_list_reaches_a_slow_reader() {
    let mut b = Bench::new("list", AcceptorOptions::default());
    b.catalog = Numbers::new(9999);
    // Larger than any socket buffer.
    let mut client = b.client();
    client.write_all(&[FLAGS.as_slice(), &request(opt::LIST, b"").repeat(20), &go("9998")].concat()).unwrap();
    b.run();
    let before = b.events.len();
    let mut total = 0;
    let accepted = loop {
        total += b.said(&mut client).len();
        if b.events.len() > before {
            break b.events.pop();
        }
    };
    assert!(matches!(accepted, Some(Event::Accepted(a)) if a.chosen.export == 9998));
    let line = 20 + 4 + 4 + "a number".len();
    assert_eq!(total, 18 + 20 * (9999 * line + 20) + 20 + 12 + 20);
}

#[test]
fn a_stopped_server_refuses_and_then_closes() {
    let mut b = Bench::new("stop", AcceptorOptions::default());
    let mut client = b.client();
    client.write_all(&FLAGS).unwrap();
    assert_eq!(b.said(&mut client).len(), 18);
    b.acceptor.stop();
    let late = b.client();
    client.write_all(&go("0001")).unwrap();
    let said = b.said(&mut client);
    assert_eq!(said[12..16], 0x8000_0007_u32.to_be_bytes());
    assert_eq!(b.acceptor.handshakes(), 1);
    b.acceptor.close_handshakes(&mut b.events);
    assert!(matches!(b.event(), Event::Failed(_, HandshakeError::Stopped)));
    let path = b.path.clone();
    drop(b);
    assert!(!path.exists());
    drop(late);
}
