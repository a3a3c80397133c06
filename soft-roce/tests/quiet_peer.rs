//! Connection management without packets to wake it: only its timers do, and nobody takes turns but who waits for its
//! descriptor.

use std::net::{IpAddr, UdpSocket};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use soft_roce::{Options, SoftRoce};
use test_support::{patience, until};
use verbs::{Cm, CmEvent, ConnParams, QpCaps};

/// Waits for the descriptor and polls, for `time` or until there is an event.
fn wait(cm: &mut dyn Cm, time: Duration) -> Option<CmEvent> {
    let end = Instant::now() + time;
    loop {
        if let Some(event) = cm.poll().expect("the event queue works") {
            return Some(event);
        }
        let left = end.checked_duration_since(Instant::now())?;
        // SAFETY: the descriptor is the manager's, which lives.
        let fd = unsafe { BorrowedFd::borrow_raw(cm.wait_fd()) };
        let left = Timespec::try_from(left).expect("short");
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)).expect("poll");
    }
}

#[test]
fn a_request_without_an_answer_is_repeated() {
    let network = test_support::network();
    let ip = |last| IpAddr::from(test_support::address(network, last));
    let peer = UdpSocket::bind((ip(2), 4791)).expect("nobody else uses this address");
    peer.set_nonblocking(true).expect("a socket");
    let host = SoftRoce::new(Options::default()).expect("software RoCE");
    let mut cm = host.cm().expect("a connection manager");
    let id = cm.resolve(Some(ip(1)), (ip(2), 1234).into(), patience()).expect("resolve");
    assert!(matches!(wait(&mut *cm, patience()), Some(CmEvent::Resolved(_))));
    let cq = cm.device(id).expect("a device").create_cq(16).expect("a completion queue");
    let caps = QpCaps {
        max_send_wr: 4,
        max_recv_wr: 4,
        max_send_sge: 1,
        max_recv_sge: 1,
        domain: verbs::Domain::COMMON,
    };
    let _qp = cm.create_qp(id, &caps, &cq.handle()).expect("a queue pair");
    let begin = Instant::now();
    cm.connect(id, ConnParams::FOREVER, b"").expect("connect");
    // At 0, 0.25, 0.75 and 1.75 s, or later; not the other ones at once.
    let (mut requests, mut at) = (0, Vec::new());
    until("four requests", || {
        assert!(wait(&mut *cm, Duration::from_millis(100)).is_none());
        let mut packet = [0; 512];
        let more = std::iter::from_fn(|| peer.recv(&mut packet).ok()).filter(|len| *len == 280).count();
        requests += more;
        at.resize(requests, begin.elapsed());
        requests >= 4
    });
    assert!(at[3] >= Duration::from_millis(1750), "never early: {at:?}");
}
