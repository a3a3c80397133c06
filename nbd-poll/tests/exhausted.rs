//! A listener in a process that has no descriptors left.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nbd_poll::listener::{Acceptor, AcceptorOptions, Address, Event, Listener, Peer};
use nbd_proto::haggle::{Catalog, Export, Refusal};
use rustix::net::{AddressFamily, SocketType};
use test_support::Exhausted;

struct Nothing;

impl Catalog for Nothing {
    fn next(&self, _: Option<&str>) -> Option<Export<'_>> {
        None
    }

    fn find(&self, _: &str) -> Result<Export<'_>, Refusal> {
        Err(Refusal::Unknown)
    }
}

#[test]
fn it_tries_by_time_and_says_so_once_in_a_while() {
    drop(TcpListener::bind("127.0.0.1:0").unwrap());
    let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let Address::Tcp(addr) = listener.address().clone() else { panic!() };
    let mut acceptor = Acceptor::new(listener, AcceptorOptions::default()).unwrap();
    let (mut now, mut events) = (Instant::now(), Vec::new());
    let mut poll = |now, events: &mut Vec<Event>| acceptor.poll(now, &|_: &Peer| true, &Nothing, events);
    let client: OwnedFd = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    let exhausted = Exhausted::new();
    rustix::net::connect(&client, &addr).unwrap();
    test_support::until("it finds that it cannot", || {
        poll(now, &mut events);
        !events.is_empty()
    });
    // In a pause nothing wakes it.
    let busy = (0..100).filter(|_| poll(now, &mut events)).count();
    assert!(busy <= 1, "{busy}");
    for _ in 0..20 {
        now += Duration::from_millis(250);
        poll(now, &mut events);
        poll(now, &mut events);
    }
    assert!(matches!(events[..], [Event::Paused(_)]), "{events:?}");
    drop(exhausted);
    now += Duration::from_millis(250);
    poll(now, &mut events);
    poll(now, &mut events);
    assert_eq!(acceptor.handshakes(), 1);
}
