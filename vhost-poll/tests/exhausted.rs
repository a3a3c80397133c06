//! A controller in a process that has no descriptors left.

mod common;

use std::os::fd::OwnedFd;

use common::*;
use reactor::ReactorStats;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use test_support::Exhausted;
use vhost_driver::{Disk, Options};

#[test]
fn it_neither_spins_nor_forgets_who_waits() {
    let backend = Backend::start("exhausted", MemDisk::new(1 << 20));
    let mut disk = Disk::connect(&backend.path, Options { queues: 1, ..Options::default() }).unwrap();
    // It has seen all that this front end has sent, and opens and closes nothing any more.
    disk.write(0, &[1; 4096]).unwrap();
    assert_eq!(backend.with(|c, _| c.sessions().len()), 1);
    let socket: OwnedFd = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let exhausted = Exhausted::new();
    rustix::net::connect(&socket, &SocketAddrUnix::new(&backend.path).unwrap()).unwrap();
    // It tries now and then, and sleeps in between.
    let stats = || -> ReactorStats { backend.control.stats() };
    eventually("it sleeps while somebody waits", || stats().asleep);
    let before = stats();
    eventually("a few tries", || stats().sleeps >= before.sleeps + 5);
    let after = stats();
    let (turns, sleeps) = (after.turns - before.turns, after.sleeps - before.sleeps);
    assert!(turns < sleeps * 20_000, "{turns} turns, {sleeps} sleeps");
    disk.write(0, &[7; 4096]).unwrap();
    assert_eq!(disk.read(0, 4096).unwrap(), [7; 4096]);
    assert_eq!(backend.with(|c, _| c.sessions().len()), 1);
    drop(exhausted);
    eventually("who waited is served", || backend.with(|c, _| c.sessions().len()) == 2);
}
