//! Front ends that want to keep everybody else out: by descriptors that make others wait, and by taking all there are.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::OFlags;
use vhost::vhost_user::message::FrontendReq as R;
use vhost_driver::{Disk, FrontEnd, Options};

/// Somebody else's disk, and what he sees of the attack.
struct Bystander {
    disk: Disk,
    sector: u64,
}

impl Bystander {
    fn connect(backend: &Backend) -> Self {
        let options = Options { queues: 1, ..Options::default() };
        Self { disk: Disk::connect(&backend.path, options).unwrap(), sector: 0 }
    }

    /// Writes something new, and reads it back.
    fn is_served(&mut self) {
        self.sector = (self.sector + 8) % 1024;
        let data: Vec<u8> = (0..4096u64).map(|i| (self.sector * 31 + i * 7) as u8).collect();
        self.disk.write(self.sector, &data).unwrap();
        assert_eq!(self.disk.read(self.sector, 4096).unwrap(), data);
    }
}

/// Everybody else is served, and comes in.
fn all_is_well(backend: &Backend, bystander: &mut Bystander) {
    bystander.is_served();
    Bystander::connect(backend).is_served();
}

/// Reads and writes wait from now on, wherever the descriptor is.
fn make_blocking(fd: &OwnedFd) {
    let flags = rustix::fs::fcntl_getfl(fd).unwrap();
    rustix::fs::fcntl_setfl(fd, flags - OFlags::NONBLOCK).unwrap();
}

/// The counter of `fd` is full: the next write waits.
fn fill(fd: &OwnedFd) {
    let flags = rustix::fs::fcntl_getfl(fd).unwrap();
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK).unwrap();
    let _ = rustix::io::read(fd, &mut [0; 8]);
    let _ = rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes());
    make_blocking(fd);
}

fn is_readable(fd: &OwnedFd) -> bool {
    let mut set = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut set, Some(&Timespec::default())).unwrap() == 1
}

#[test]
fn an_eventfd_whose_writer_would_wait_stops_nobody() {
    for packed in [false, true] {
        let backend = Backend::start("call", MemDisk::new(1 << 20));
        let mut bystander = Bystander::connect(&backend);
        let options = Options { queues: 1, queue_size: 16, packed, ..Options::default() };
        let mut guest = Disk::connect(&backend.path, options).unwrap();
        let err = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert!(guest.front.send_acked(R::SET_VRING_ERR, &0u64.to_ne_bytes(), &[err.as_fd()]).unwrap());
        fill(guest.call_fd(0));
        fill(&err);
        for _ in 0..20 {
            let slot = guest.take(0).unwrap();
            assert!(guest.submit(0, slot, IN, 0, 512, false));
            guest.publish(0);
            assert_eq!(guest.wait(0).unwrap().1, 0);
            all_is_well(&backend, &mut bystander);
        }
        assert!(is_readable(guest.call_fd(0)));
        // A ring that breaks is told by the other descriptor.
        let slot = guest.take(0).unwrap();
        let request = guest.request(0, slot);
        guest.ram.write(request.header, &[0xff; 16]);
        if !packed {
            let at = guest.ring(0).addrs.avail + 2;
            guest.ram.write(at, &1000u16.to_le_bytes());
            guest.kick(0);
        }
        all_is_well(&backend, &mut bystander);
    }
}

#[test]
fn an_eventfd_whose_reader_would_wait_stops_nobody() {
    let backend = Backend::start("kick", MemDisk::new(1 << 20));
    let mut bystander = Bystander::connect(&backend);
    let mut guest = Disk::connect(&backend.path, Options { queues: 1, ..Options::default() }).unwrap();
    make_blocking(guest.kick_fd(0));
    for n in 0..50 {
        let slot = guest.take(0).unwrap();
        assert!(guest.submit(0, slot, IN, 0, 512, false));
        guest.publish(0);
        if n % 2 == 0 && is_readable(guest.kick_fd(0)) {
            // Whoever looks now finds nothing to read. It may have been read in between.
            rustix::fs::fcntl_setfl(guest.kick_fd(0), OFlags::NONBLOCK).unwrap();
            let _ = rustix::io::read(guest.kick_fd(0), &mut [0; 8]);
            make_blocking(guest.kick_fd(0));
        }
        // What was taken from the back end may have been the only kick.
        guest.kick(0);
        assert_eq!(guest.wait(0).unwrap().1, 0);
        all_is_well(&backend, &mut bystander);
        // The lane sleeps, and drains once more.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The flag changes all the time, so that no look at it tells anything.
#[test]
fn a_flag_that_changes_all_the_time_stops_nobody() {
    let backend = Backend::start("flag", MemDisk::new(1 << 20));
    let mut bystander = Bystander::connect(&backend);
    let mut guest = Disk::connect(&backend.path, Options { queues: 1, ..Options::default() }).unwrap();
    fill(guest.call_fd(0));
    let call = guest.call_fd(0).try_clone().unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let attacker = std::thread::spawn(move || {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            rustix::fs::fcntl_setfl(&call, OFlags::NONBLOCK).unwrap();
            make_blocking(&call);
        }
    });
    for _ in 0..200 {
        let slot = guest.take(0).unwrap();
        assert!(guest.submit(0, slot, IN, 0, 512, false));
        guest.publish(0);
        assert_eq!(guest.wait(0).unwrap().1, 0);
        bystander.is_served();
    }
    all_is_well(&backend, &mut bystander);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    attacker.join().unwrap();
}

#[test]
fn a_front_end_that_reads_nothing_on_its_channel_stops_nobody() {
    let backend = Backend::start("channel", MemDisk::new(1 << 20));
    let mut bystander = Bystander::connect(&backend);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let guest = Disk::connect(&backend.path, Options { queues: 1, ..Options::default() }).unwrap();
    guest.front.send(R::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]).unwrap();
    // A blocking socket, as its other end is: nobody reads what fills it.
    for _ in 0..2000 {
        backend.with(|c, _| c.config_changed());
    }
    all_is_well(&backend, &mut bystander);
    drop((ours, guest));
}

#[test]
fn a_front_end_has_so_many_descriptors_and_no_more() {
    let backend = Backend::start("hoard", MemDisk::new(1 << 20));
    let mut bystander = Bystander::connect(&backend);
    for (what, most) in [(R::SET_VRING_KICK, 16), (R::SET_VRING_CALL, 16), (R::SET_VRING_ERR, 16)] {
        let front = FrontEnd::connect(&backend.path).unwrap();
        for index in 0..most {
            let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            front.send(what, &u64::to_ne_bytes(index), &[fd.as_fd()]).unwrap();
        }
        assert!(front.number(R::GET_FEATURES).is_ok(), "{what:?}: 16 are few");
    }
    // 16 queues: three each are 48, with the connection 49.
    let guest = Disk::connect(&backend.path, Options { queues: 16, ..Options::default() }).unwrap();
    for index in 0..16u64 {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        guest.front.send(R::SET_VRING_ERR, &index.to_ne_bytes(), &[fd.as_fd()]).unwrap();
    }
    assert!(guest.front.number(R::GET_FEATURES).is_ok());
    let held = backend.with(|c, _| c.sessions().iter().map(|s| s.descriptors).max().unwrap());
    assert_eq!(held, 49);
    // As many as a message has, and then silence: they are counted as well.
    let fds: Vec<OwnedFd> = (0..60).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    guest.front.send_bytes(&[5, 0, 0, 0, 1], &fds).unwrap();
    eventually("it is ended", || guest.front.is_closed());
    all_is_well(&backend, &mut bystander);
    // In peace, each has what it needs for the queues that it was told of.
    assert_eq!(vhost_poll::controller::queues(256, 64), 30);
    assert_eq!(vhost_poll::controller::queues(8, 64), 8);
    assert_eq!(vhost_poll::controller::queues(256, vhost_poll::controller::descriptors(256)), 256);
}

#[test]
fn front_ends_that_only_connect_make_room_for_others() {
    let backend = Backend::start("idle", MemDisk::new(1 << 20));
    let mut bystander = Bystander::connect(&backend);
    let crowd = vhost_poll::controller::MAX_SESSIONS + 40;
    let idle: Vec<UnixStream> = (0..crowd).map(|_| UnixStream::connect(&backend.path).unwrap()).collect();
    let begun = Instant::now();
    for _ in 0..10 {
        all_is_well(&backend, &mut bystander);
    }
    println!("ten front ends more have come within {:?}", begun.elapsed());
    // Those who have said something stay longer than those who have not.
    let spoken = FrontEnd::connect(&backend.path).unwrap();
    assert!(spoken.number(R::GET_FEATURES).is_ok());
    let more: Vec<UnixStream> = (0..40).map(|_| UnixStream::connect(&backend.path).unwrap()).collect();
    all_is_well(&backend, &mut bystander);
    assert!(spoken.number(R::GET_FEATURES).is_ok());
    drop((idle, more));
}

/// A TCP socket whose last close waits for its peer, who reads nothing.
fn lingering() -> (std::net::TcpStream, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::from_secs(3600))).unwrap();
    socket.set_nonblocking(true).unwrap();
    while std::io::Write::write(&mut &socket, &[0; 65_536]).is_ok() {}
    (socket, listener.accept().unwrap().0)
}

#[test]
fn descriptors_whose_close_waits_stop_nobody() {
    let backend = Backend::start("linger", MemDisk::new(1 << 20));
    let mut bystander = Bystander::connect(&backend);
    let mut peers = Vec::new();
    let send: [fn(&FrontEnd, &std::net::TcpStream); 6] = [
        |front, socket| front.send(R::SET_VRING_KICK, &0u64.to_ne_bytes(), &[socket.as_fd()]).unwrap(),
        |front, socket| front.send(R::SET_BACKEND_REQ_FD, &[], &[socket.as_fd()]).unwrap(),
        |front, socket| front.send(R::GET_FEATURES, &[], &[socket.as_fd()]).unwrap(),
        |front, socket| front.send(R::ADD_MEM_REG, &[1; 40], &[socket.as_fd()]).unwrap(),
        // Half a message.
        |front, socket| front.send_bytes(&[1, 0], &[socket.as_fd()]).unwrap(),
        // Behind what ends the connection, so that nobody receives it.
        |front, socket| {
            front.send_raw(99, 1, &[], &[]).unwrap();
            let _ = front.send(R::SET_VRING_KICK, &0u64.to_ne_bytes(), &[socket.as_fd()]);
        },
    ];
    for send in send {
        let (socket, peer) = lingering();
        let front = FrontEnd::connect(&backend.path).unwrap();
        // While the back end stands still, so that it has the last one when it goes on.
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        backend.control.send(move |_| wait.recv().unwrap());
        send(&front, &socket);
        drop(socket);
        go_on.send(()).unwrap();
        all_is_well(&backend, &mut bystander);
        drop(front);
        all_is_well(&backend, &mut bystander);
        peers.push(peer);
    }
    // What waits ends with its peers.
    drop(peers);
}

#[test]
fn its_socket_is_private_whatever_the_umask() {
    // Of this process: the tests of this file that make files do not mind.
    let before = rustix::process::umask(rustix::fs::Mode::empty());
    let backend = Backend::start("open", MemDisk::new(1 << 20));
    let open = std::fs::metadata(&backend.path).unwrap().permissions().mode();
    drop(backend);
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o777));
    let backend = Backend::start("shut", MemDisk::new(1 << 20));
    let shut = std::fs::metadata(&backend.path).unwrap().permissions().mode();
    rustix::process::umask(before);
    assert_eq!((open & 0o777, shut & 0o777), (0o600, 0o600));
}
